"""HellaSwag for both scripts: rows, prompts and sequences, and the evaluation, as lm-evaluation-harness 0.4 scores it
(task version 1.0).
"""

import gzip
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
from tqdm import tqdm

from lowmem.training import models, parallel, source, tokenizing
from lowmem.training.batches import Batch, Data, Sequence
from lowmem.training.errors import UserError
from lowmem.training.models import CausalLM
from lowmem.training.run import Scores


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
    import datasets

    max_rows = {"train": args.train_rows, "validation": args.eval_rows}[split] or sys.maxsize
    folder = Path(args.dataset)
    if not args.dataset or folder.is_file():
        raise UserError(f"--dataset {args.dataset!r} is no folder: give the folder that holds train.* and validation.*")
    with source.explain_loading("dataset", args.dataset):
        if (folder / "dataset_dict.json").is_file():
            splits = datasets.load_from_disk(str(folder))
            if split not in splits:
                raise UserError(f"dataset {folder} has no split {split}, only {', '.join(splits)}")
            rows = splits[split].take(max_rows).to_list()
        elif folder.is_dir():
            rows = []
            for file in split_files(folder, split):
                if len(rows) < max_rows:
                    rows += read_rows(file, max_rows - len(rows))
        else:
            rows = datasets.load_dataset(args.dataset, split=split).take(max_rows).to_list()
    if not rows:
        raise UserError(f"dataset {args.dataset}: split {split} is empty")
    needed = ("activity_label", "ctx_a", "ctx_b", "ctx", "endings", "label")
    if missing := [name for name in needed if not any(name in row for row in rows)]:
        raise UserError(f"dataset {args.dataset}, split {split}, lacks the HellaSwag columns {', '.join(missing)}")
    return [check_row(row, number, f"dataset {args.dataset}, split {split}") for number, row in enumerate(rows)]


def split_files(folder: Path, split: str) -> list[Path]:
    """The files of a split: <split>.jsonl, .jsonl.gz or .parquet, or as the hub has them, in parts and in data/, as
    train-00000-of-00002.parquet, with a hash behind in older ones. Raises UserError.
    """
    part = r"(?:-\d{5}-of-(\d{5}))?"
    pattern = re.compile(rf"({split}{part})(?:-[0-9a-f]{{16}})?(?:\..*)?\.(?:jsonl|jsonl\.gz|parquet)")
    files = sorted([*folder.iterdir(), *(folder / "data").glob("*")], key=lambda file: file.name)
    found = {file: match for file in files if (match := pattern.fullmatch(file.name))}
    for count in {match[2] for match in found.values()}:
        parts = [split] if count is None else [f"{split}-{k:05}-of-{count}" for k in range(int(count))]
        if [match[1] for match in found.values()] == parts:
            return list(found)
    names = ", ".join(str(file.relative_to(folder)) for file in found) or "none"
    raise UserError(
        f"dataset {folder} needs one file {split}.jsonl, .jsonl.gz or .parquet, or all parts {split}-00000-of-0000N "
        f"of one, and has {names[:200]}"
    )


def read_rows(file: Path, max_rows: int) -> list[dict]:
    """The first `max_rows` rows of a jsonl, jsonl.gz or parquet file as dicts. Raises UserError or what pyarrow raises.

    Python reads JSON itself: datasets' reader ends the process on some damaged lines, and names none.
    """
    if file.suffix == ".parquet":
        import pyarrow.parquet

        return pyarrow.parquet.read_table(file).slice(0, max_rows).to_pylist()
    rows = []
    with (gzip.open if file.suffix == ".gz" else open)(file, "rt", encoding="utf-8-sig") as lines:
        numbered = ((number, line) for number, line in enumerate(lines, 1) if line.strip())
        for number, line in islice(numbered, max_rows):
            try:
                rows.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise UserError(f"{file}, line {number}, is not JSON ({str(error)[:100]}): get it again") from error
            if not isinstance(rows[-1], dict):
                raise UserError(f"{file}, line {number}, is not a row, which is a JSON object: get it again")
    return rows


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


def load_hellaswag(args, tokenizer, max_tokens: int) -> HellaSwag:
    """The sequences that --dataset gives; none to train on when --epochs is 0. Raises UserError."""
    train = training_sequences(load_rows(args, "train"), tokenizer, args.train_text, max_tokens) if args.epochs else []
    rows, scored = evaluation_rows(load_rows(args, "validation"), tokenizer, max_tokens)
    data = HellaSwag(train, scored, max_tokens, batch_size=args.batch_size, rows=rows)
    steps = data.planned_steps(args)
    if train and args.warmup_steps >= steps:
        raise UserError(f"--warmup_steps {args.warmup_steps} is not less than the run's {steps} steps: take fewer")
    return data


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
            sequences.append(Sequence(context + continuation + [tokenizer.eos_token_id], len(continuation) + 1))
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
    cut = [Sequence(s.ids[-(max_tokens + 1) :], min(s.targets, len(s.ids) - 1, max_tokens)) for s in sequences]
    if longer := sum(len(s.ids) > max_tokens + 1 for s in sequences):
        what = f"{longer} of {len(cut)} sequences to {split} on"
        print(f"{what} are longer than the model's {max_tokens} tokens: cut on the left")
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
    scored = _cut([Sequence(context + ids, len(ids)) for context, ids in pairs], max_tokens, "evaluate")
    made = [
        EvalRow(row["ind"], row["label"], [len(ending) for ending in endings])
        for row, (_, endings) in zip(rows, texts, strict=True)
    ]
    return made, scored


def _encode_with_bar(tokenizer, pairs, label):
    n = 4000  # pairs at a time
    starts = tqdm(range(0, len(pairs), n), desc=label, unit_scale=n, unit="text", disable=len(pairs) <= n)
    return [pair for start in starts for pair in encode_pairs(tokenizer, pairs[start : start + n])]


@torch.no_grad()
def evaluate(
    lm: CausalLM, data: HellaSwag, device: torch.device, log_probs: Callable[[Batch], torch.Tensor] | None = None
) -> Scores:
    """The scores of the held-out rows: of each ending the sum of its tokens' fp32 log-probabilities.

    log_probs: function(batch on `device`) -> as `lm.log_probs`, which is used if None is given. No [rows, tokens,
    vocabulary] array exists. The sequences of a batch are dealt out, and each is scored by one rank.
    """
    log_probs, done, sums = log_probs or lm.log_probs, [], torch.zeros(len(data.scored), dtype=torch.float64)
    bar = tqdm(total=len(data.rows), desc="evaluating", unit="row", mininterval=0.5)
    with bar, models.mode(lm.network, training=False):
        for chosen in data.evaluation_order():
            batch = data.batch([data.scored[at] for at in chosen]).shard()
            sequence_of = (batch.positions // batch.ids.shape[1])[batch.weights > 0]
            own = parallel.deal_to_ranks(chosen)[parallel.rank()]
            done.append((own, sequence_of, log_probs(batch.to(device))))
            bar.update(len(chosen) / 4)
    for own, sequence_of, found in done:  # only now, so that the device never waits for the host
        by_sequence = torch.zeros(len(own)).index_add_(0, sequence_of, found.cpu()[: len(sequence_of)])
        sums[torch.tensor(own, dtype=torch.int64)] = by_sequence.double()
    scores = parallel.sum_over_ranks(sums).view(-1, 4)
    rows = [
        {"ind": row.ind, "label": row.label, "loglikelihoods": of_row, "chars": row.chars}
        for row, of_row in zip(data.rows, scores.tolist(), strict=True)
    ]
    return Scores(accuracy(data.rows, scores.tolist()), rows, finite=scores.isfinite().all().item())


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
