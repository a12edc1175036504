"""HellaSwag for both scripts: rows, prompts and sequences, and scores, as lm-evaluation-harness 0.4 has them (task
version 1.0). And which data a run has: these or, by lowmem/data, a user's own; what is said of them at the start.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

import torch
from tqdm import tqdm

from lowmem.data import facts, files, own
from lowmem.training import records, tokenizing
from lowmem.training.batches import Sequence
from lowmem.training.data import Data, Scores
from lowmem.training.errors import UserError
from lowmem.training.models import CausalLM

LINE_CHARACTERS = 1500  # of a row that is shown, its beginning and its end
COLUMNS = ("activity_label", "ctx_a", "ctx_b", "ctx", "endings", "label")


@dataclass
class EvalRow:
    """One row to score: its index in the data set, the right ending, the cleaned endings' lengths in characters."""

    ind: int
    label: int
    chars: list[int]


@dataclass
class HellaSwag(Data):
    """Sequences of HellaSwag. `scored` has four for each of `rows`, in order."""

    rows: list[EvalRow] = field(default_factory=list)

    SCORES = {"acc": ("acc", "%", ".2f"), "acc_norm": ("acc_norm", "%", ".2f"), "gold_nll": ("gold NLL", "", ".3f")}

    def score(self, log_likelihoods: torch.Tensor, right: torch.Tensor) -> Scores:
        """acc, acc_norm and the right endings' NLL, from the sums of each ending's log-probabilities, fp64 [n]."""
        scores = log_likelihoods.view(-1, 4).tolist()
        rows = [
            {"ind": row.ind, "label": row.label, "loglikelihoods": of_row, "chars": row.chars}
            for row, of_row in zip(self.rows, scores, strict=True)
        ]
        return Scores(accuracy(self.rows, scores), rows, finite=log_likelihoods.isfinite().all().item())

    def describe(self) -> str:
        """How many rows there are, for the reader."""
        return f"{len(self.train):,} to train on, {len(self.rows):,} held out"

    def content(self) -> Iterator[bytes]:
        """What a resumed run must find again, in pieces to be hashed: token ids, labels, lengths of the endings."""
        yield from super().content()
        for row in self.rows:
            yield repr((row.ind, row.label, row.chars)).encode()


def clean(text: str) -> str:
    """The harness's clean-up of WikiHow's markers. One pass of two spaces to one, as there."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def harness_text(row: dict) -> tuple[str, list[str]]:
    """(query, four endings) of a row, as the harness builds them; capitalize() lower-cases the rest of ctx_b."""
    query = clean(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")
    return query, [clean(ending) for ending in row["endings"]]


def encode_pairs(tokenizer, pairs: list[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
    """[(context ids, continuation ids)] of [(context, continuation)] strings.

    Context + continuation is encoded as one string, and the continuation is what follows the first len(encode(context))
    ids, also where a token crosses the boundary. Trailing white space of the context moves to the continuation
    (lm_eval.api.model.TemplateLM._encode_pair). What the tokenizer adds behind a text, as EOS, is taken off, unlike
    there: the text goes on.
    An empty context becomes the BOS token, or EOS where there is none.
    """
    contexts = [context.rstrip() for context, _ in pairs]
    wholes = [context + continuation for context, continuation in pairs]
    added = tokenizing.added_behind(tokenizer)
    encoded = [ids[: len(ids) - added] for ids in tokenizer(contexts + wholes, verbose=False)["input_ids"]]
    result = []
    for context, whole, context_ids, ids in zip(contexts, wholes, encoded, encoded[len(pairs) :], strict=False):
        if not context:
            prefix = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
            ids = tokenizer(whole, add_special_tokens=False, verbose=False)["input_ids"]
            context_ids, ids = [prefix], ids if ids[:1] == [prefix] else [prefix, *ids]
        result.append((context_ids, ids[len(context_ids) :]))
    return result


def load_rows(args, split: str) -> list[dict]:
    """The first rows of `split` ("train" or "validation") as dicts with an int label. Raises UserError."""
    where = f"dataset {args.dataset}, split {split}"
    most = {"train": args.train_rows, "validation": args.eval_rows}[split]
    rows = [row for _, row in islice(files.rows(args.dataset, split), most)]
    if not rows:
        raise UserError(f"dataset {args.dataset}: split {split} is empty")
    if missing := [name for name in COLUMNS if not any(name in row for row in rows)]:
        raise UserError(f"{where}, lacks the HellaSwag columns {', '.join(missing)}")
    return [check_row(row, number, where) for number, row in enumerate(rows)]


def check_row(row: dict, number: int, where: str) -> dict:
    """The row, a dict with HellaSwag's columns, with an int label, and an `ind` if it has none. Raises UserError."""
    where, texts = f"{where}, row {number}", [row.get(name) for name in ("activity_label", "ctx_a", "ctx_b", "ctx")]
    if not all(isinstance(text, str) for text in texts):
        raise UserError(f"{where}: activity_label, ctx_a, ctx_b and ctx must be strings")
    endings, label = row.get("endings"), row.get("label")
    if not (isinstance(endings, list) and len(endings) == 4 and all(isinstance(ending, str) for ending in endings)):
        raise UserError(f"{where}: endings must be four strings")
    if any(re.search(r"[\0\ud800-\udfff]", text) for text in texts + endings):
        raise UserError(f"{where} contains a NUL character or half of a surrogate pair: the file is damaged")
    if str(label) not in ("0", "1", "2", "3"):
        raise UserError(
            f"{where}: label {str(label)[:40]!r} is not 0, 1, 2 or 3 (HellaSwag's test split has none: use train and "
            "validation)"
        )
    ind = row.get("ind")
    return row | {"label": int(label), "ind": ind if isinstance(ind, int | str) else number}


def load(args, tokenizer, max_tokens: int) -> Data:
    """The sequences that --dataset gives: HellaSwag's, or a user's own; none to train on when --epochs is 0.

    Raises UserError.
    """
    if (args.max_length or 0) > max_tokens:
        raise UserError(f"--max_length {args.max_length} is more than the {max_tokens} tokens that the model takes")
    if not is_hellaswag(args):
        data = own.load(args, tokenizer, max_tokens)
    elif args.train_on != "answers":
        raise UserError(f"--train_on {args.train_on} is for other rows than HellaSwag's, whose endings are trained")
    else:
        data = load_hellaswag(args, tokenizer, args.max_length or max_tokens)
    require_steps(args, data)
    return data


def say_examples(data: Data, tokenizer) -> None:
    """Print how much the data are, and three of the training sequences, from all parts of them, as the model sees them,
    their targets between ⟦ and ⟧.
    """
    records.say("rows", data.describe())
    records.say("tokens", data.describe_tokens())
    half = LINE_CHARACTERS // 2
    sequences = data.train or data.scored
    for s in sequences[:: max(1, len(sequences) // 3)][:3]:
        line = facts.marked(s, tokenizer, most=half // 2)
        print(f"\n{line}" if len(line) <= 2 * half else f"\n{line[:half]} ... {line[-half:]}")
    print()


def say_special_tokens(args, lm: CausalLM, data: Data, tokenizer) -> None:
    """Say which special tokens of a user's rows the model does not know, and at which of those that end a turn its
    generation does not stop.
    """
    if isinstance(data, HellaSwag):
        return
    embeddings = lm.network.get_input_embeddings().weight.detach()
    if args.trained != "all" and (unseen := facts.unseen_tokens(data, tokenizer, embeddings)):
        print(
            f"the model was hardly trained on {', '.join(unseen)}, which these rows have (their embeddings are next to "
            "nothing, or alike): take --trained all, which trains them, or a model that knows them"
        )
    stops = getattr(lm.network.generation_config, "eos_token_id", None)
    missing, some_stop = facts.stops(data, tokenizer, stops)
    if missing:
        print(
            f"these rows end answers with {', '.join(missing)}, at which generation does not stop: add it to "
            "eos_token_id in the saved model's generation_config.json"
        )
    elif not some_stop:
        print(
            "no answer in these rows ends with a token at which generation stops (eos_token_id in the model's "
            "generation_config.json): it will not learn to end"
        )


def is_hellaswag(args) -> bool:
    """Whether the first row has columns that HellaSwag alone has. Raises UserError."""
    names, order = files.splits(args.dataset), ("train", *files.HELD_OUT) if args.epochs else (*files.HELD_OUT, "train")
    split = next((name for name in order if name in names), "train")
    _, row = next(files.rows(args.dataset, split), (None, {}))
    return not row.keys().isdisjoint({"activity_label", "ctx_a", "ctx_b"})


def require_steps(args, data: Data) -> None:
    """Refuse a warm-up that is longer than the run."""
    steps = data.planned_steps()
    if data.train and args.warmup_steps >= steps:
        raise UserError(f"--warmup_steps {args.warmup_steps} is not less than the run's {steps} steps: take fewer")


def load_hellaswag(args, tokenizer, max_tokens: int) -> HellaSwag:
    """The sequences that --dataset gives; none to train on when --epochs is 0. Raises UserError."""
    train = training_sequences(load_rows(args, "train"), tokenizer, args.train_text, max_tokens) if args.epochs else []
    rows, scored = evaluation_rows(load_rows(args, "validation"), tokenizer, max_tokens)
    how = {name: getattr(args, name) for name in ("batch_size", "epochs", "max_steps", "seed")}
    return HellaSwag(train, scored, max_tokens, rows=rows, **how)


def training_sequences(rows: list[dict], tokenizer, text: str, max_tokens: int) -> list[Sequence]:
    """[Sequence] to train on: the right ending's ids and EOS after it are the targets; cut on the left at `max_tokens`.

    text: "harness" or "raw", see --train_text. Rows whose ending is empty or has no token of its own, since one that
    begins in the context holds all of it, are left out and named. Raises UserError if none remains.
    """
    pairs = []
    for row in rows:
        query, endings = harness_text(row) if text == "harness" else (row["ctx"], row["endings"])
        pairs.append((query, " " + endings[row["label"]]))
    sequences, vanished = [], []
    for number, (context, continuation) in enumerate(_encode_with_bar(tokenizer, pairs, "tokenizing train")):
        if continuation and pairs[number][1].strip():
            sequences.append(Sequence.ending([*context, *continuation, tokenizer.eos_token_id], len(continuation) + 1))
        else:
            vanished.append(f"row {number} {pairs[number][1]!r}")
    if vanished:
        what = f"{len(vanished)} of {len(pairs)} rows to train on have a right ending without a token of its own"
        what += f" ({_first_of(vanished)})"
        if not sequences:
            raise UserError(f"{what}: choose a model with another tokenizer, or other rows")
        print(f"{what}: left out")
    return _cut(sequences, max_tokens, "train")


def _first_of(names):
    return ", ".join(names if len(names) <= 3 else [*names[:3], "..."])


def _cut(sequences, max_tokens, split):
    """The sequences cut on the left to the `max_tokens` + 1 ids that so many positions can use; says how many."""
    cut = [s.slice(max(0, s.tokens - max_tokens), len(s.ids)) for s in sequences]
    if longer := sum(s.tokens > max_tokens for s in sequences):
        what = f"{longer} of {len(cut)} sequences to {split} on"
        print(f"{what} are longer than {max_tokens} tokens: cut on the left")
    return cut


def evaluation_rows(rows: list[dict], tokenizer, max_tokens: int) -> tuple[list[EvalRow], list[Sequence]]:
    """([EvalRow], their sequences, four each) of validation rows; contexts are cut on the left at `max_tokens`.

    A row of which an ending cannot be scored is refused with a UserError, as by lm-evaluation-harness: without it the
    accuracy would be that of other rows.
    """
    texts = [harness_text(row) for row in rows]
    pairs = [(query, " " + ending) for query, endings in texts for ending in endings]
    pairs = _encode_with_bar(tokenizer, pairs, "tokenizing validation")
    unscorable = []
    for at, (context, ids) in enumerate(pairs):
        row, ending = at // 4, texts[at // 4][1][at % 4]
        if not (ending and context and 0 < len(ids) <= max_tokens):
            tokens = f"{len(ids)} tokens" if ids else "no token of its own"
            unscorable.append(f"row {row} (ind {rows[row]['ind']}), ending {at % 4}, {ending[:40]!r}: {tokens}")
    if unscorable:
        raise UserError(
            f"{len(unscorable)} validation endings cannot be scored: each ending needs between 1 and {max_tokens} "
            f"tokens, and these have others: {_first_of(unscorable)}; take their rows out"
        )
    scored = _cut([Sequence.ending([*context, *ids], len(ids)) for context, ids in pairs], max_tokens, "evaluate")
    made = [
        EvalRow(row["ind"], row["label"], [len(ending) for ending in endings])
        for row, (_, endings) in zip(rows, texts, strict=True)
    ]
    return made, scored


def _encode_with_bar(tokenizer, pairs, label):
    n = 4000  # pairs at a time
    starts = tqdm(range(0, len(pairs), n), desc=label, unit_scale=n, unit="text", disable=len(pairs) <= n)
    return [pair for start in starts for pair in encode_pairs(tokenizer, pairs[start : start + n])]


def accuracy(rows: list[EvalRow], scores: list[list[float]]) -> dict[str, float]:
    """{acc, acc_norm} in percent and gold_nll in nats. acc_norm divides by characters; ties go to the lowest index."""
    best = [row_scores.index(max(row_scores)) for row_scores in scores]
    per_char = [
        [score / chars for score, chars in zip(s, row.chars, strict=True)] for row, s in zip(rows, scores, strict=True)
    ]
    best_norm = [values.index(max(values)) for values in per_char]
    labels = [row.label for row in rows]

    def percent(chosen):
        return 100 * sum(c == label for c, label in zip(chosen, labels, strict=True)) / len(rows)

    gold_nll = -sum(s[label] for s, label in zip(scores, labels, strict=True)) / len(rows)
    return {"acc": percent(best), "acc_norm": percent(best_norm), "gold_nll": gold_nll}
