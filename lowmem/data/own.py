"""Own data: the rows that --dataset names as sequences to train on and to be scored on."""

import math
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import date
from itertools import islice
from typing import NamedTuple

import torch
from tqdm import tqdm

from lowmem.data import files, formats
from lowmem.data.chat import Chats, Conversation
from lowmem.data.documents import Documents
from lowmem.data.tokens import Encoder
from lowmem.training.batches import Sequence
from lowmem.training.data import Data, Scores
from lowmem.training.errors import UserError

BATCH_ROWS, BATCH_CHARACTERS = 512, 2**20  # that are tokenized at a time, at most: some 100 MB while it is done
UNREAD_KEY = "unread_key_"  # what counts of rows with such a key are called
EVAL_ROWS, EVAL_SHARE = 200, 10  # held out where no split is: so many rows, at most one of so many


class Row(NamedTuple):
    """A row's number in its split, and its sequences: several where a template drops what was thought earlier."""

    number: int
    sequences: list[Sequence]


@dataclass
class OwnData(Data):
    """Sequences of a user's rows. `rows` has the number of the row of each of `scored`, in order.

    For the reader: what, the kind of the rows, and origin, where those held out are from.
    """

    rows: list[int] = field(default_factory=list)
    what: str = ""
    origin: str = ""

    SCORES = {
        "nll": ("NLL a token", "", ".4f"),
        "perplexity": ("perplexity", "", ".3f"),
        "token_accuracy": ("tokens right", "%", ".2f"),
    }

    def describe(self) -> str:
        """What and how much it is, for the reader."""
        rows, held_out = self.counts.get("train_rows", 0), len(set(self.rows))
        several = f" as {len(self.train):,} sequences" if len(self.train) > rows else ""
        return f"{self.what}: {rows:,} to train on{several}, {held_out:,} held out ({self.origin})"

    def content(self) -> Iterator[bytes]:
        """What a resumed run must find again, in pieces to be hashed: also which sequences are of one row."""
        yield from super().content()
        yield repr(self.rows).encode()

    def score(self, log_likelihoods: torch.Tensor, right: torch.Tensor) -> Scores:
        """The scores of the held-out rows.

        log_likelihoods: fp64 [sequences of `scored`], the sums of their targets' log-probabilities. right: int64, how
        many of their targets are predicted right.
        """
        rows = {number: {"row": number, "nll": 0.0, "target_tokens": 0, "right": 0} for number in self.rows}
        found = zip(self.rows, self.scored, log_likelihoods.tolist(), right.tolist(), strict=True)
        for number, s, log_likelihood, hits in found:
            row = rows[number]
            row["nll"] -= log_likelihood
            row["target_tokens"] += s.targets
            row["right"] += hits
        targets = sum(s.targets for s in self.scored)
        nll = -log_likelihoods.sum() / targets
        values = {
            "nll": nll.item(),
            "perplexity": nll.exp().item(),
            "token_accuracy": 100 * right.sum().item() / targets,
        }
        return Scores(values, list(rows.values()), finite=math.isfinite(values["perplexity"]))  # beyond e^709 it is not


def load(args, tokenizer, max_tokens: int) -> OwnData:
    """The sequences that --dataset gives; none to train on when --epochs is 0. Raises UserError."""
    reader, names = Reader(args, tokenizer, max_tokens), files.splits(args.dataset)
    held_out = next((name for name in files.HELD_OUT if name in names), None)
    if others := files.not_read(args.dataset, ("train", held_out or "train")):
        print(f"not read, for their names (docs/data.md): {', '.join(others)}")
    if held_out:
        train = reader.read("train", args.train_rows) if args.epochs else []
        scored, origin = reader.read(held_out, args.eval_rows), f"split {held_out}"
    else:
        train, scored = hold_out(reader.read("train", args.train_rows), args.eval_rows, args.seed, reader.counts)
        origin = f"of the split train, by --seed {args.seed}"
        train = train if args.epochs else []
    reader.counts.update(train_rows=len(train), eval_rows=len(scored))
    return OwnData(
        [s for row in train for s in row.sequences],
        [s for row in scored for s in row.sequences],
        max_tokens,
        batch_size=args.batch_size,
        epochs=args.epochs,
        max_steps=args.max_steps,
        seed=args.seed,
        rows=[row.number for row in scored for _ in row.sequences],
        counts=dict(reader.counts),
        what=reader.what,
        origin=origin,
    )


class Reader:
    """Reads splits of --dataset as sequences of at most --max_length tokens, and counts what it cuts and leaves out."""

    def __init__(self, args, tokenizer, max_tokens: int):
        self.args, self.encoder = args, Encoder(tokenizer)
        self.limit = args.max_length or max_tokens
        self.flag = "--max_length" if args.max_length else "the model's limit"
        self.counts: Counter[str] = Counter()
        self.form = self.maker = self.what = None

    def read(self, split: str, most: int | None) -> list[Row]:
        """Of the first `most` rows of a split those with something to be trained or scored.

        Raises UserError if none has.
        """
        name = f"dataset {self.args.dataset}, split {split}"
        numbered = enumerate(islice(files.rows(self.args.dataset, split), most))
        counts, rows = Counter(), []
        bar = tqdm(numbered, desc=f"tokenizing {split}", unit=" rows", mininterval=0.5, delay=1)
        for batch in _batches(self._contents(bar, counts)):
            made = self.maker.sequences([(where, content) for _, where, content in batch])
            for (number, _, _), sequences in zip(batch, made, strict=True):
                if kept := self._within_limit(sequences, counts):
                    rows.append(Row(number, kept))
        if not counts["read"]:
            raise UserError(f"{name} is empty: give it rows")
        self._report(name, counts, len(rows))
        self.counts.update({f"{split}_{what}": count for what, count in counts.items()})
        return rows

    def _contents(self, numbered, counts):
        """Yield (number, where, Conversation or Document) of each row with an answer."""
        for number, (where, row) in numbered:
            counts["read"] += 1
            if self.form is None:
                self._recognise(row, where)
            content = formats.read(row, where, self.form)
            if self.form.kind is Conversation:
                if not content.turns():
                    counts["without_assistant_turn"] += 1
                    continue
                counts.update(UNREAD_KEY + key for key in self.maker.unread_keys(content))
            yield number, where, content

    def _recognise(self, row, where):
        self.form, everything = formats.recognise(row, where), self.args.train_on == "all"
        self.what = (
            f"{self.form.name} (column{'s' if len(self.form.columns) > 1 else ''} {', '.join(self.form.columns)})"
        )
        if self.form.kind is Conversation:
            self.maker = Chats(self.encoder, everything, date.fromisoformat(self.args.date))
        else:
            self.maker = Documents(self.encoder, everything)

    def _within_limit(self, sequences, counts):
        """The sequences cut at their ends to as many tokens as are read, those without a target left out."""
        counts["cut"] += any(s.tokens > self.limit for s in sequences)
        cut = [s.slice(0, self.limit + 1) if s.tokens > self.limit else s for s in sequences]
        kept = [s for s in cut if s.targets]
        counts["without_target"] += not kept
        return kept

    def _report(self, name, counts, kept):
        """Print what was cut and left out. Raises UserError if nothing is left."""
        of = f"of the {counts['read']:,} rows of {name}"
        turns, targets = counts["without_assistant_turn"], counts["without_target"]
        within = f" within {self.limit:,} tokens ({self.flag})" if counts["cut"] else ""
        if not kept:
            why = [f"{turns:,} have no assistant turn to train"] * (turns > 0)
            why += [f"{targets:,} have nothing to train{within}"] * (targets > 0)
            raise UserError(
                f"{name}: no row can be used: {', '.join(why)}: "
                + ("take a larger --max_length" if counts["cut"] and self.args.max_length else "take other rows")
            )
        if counts["cut"]:
            print(f"{counts['cut']:,} {of} are longer than {self.limit:,} tokens ({self.flag}): cut at their ends")
        if turns:
            print(f"{turns:,} {of} have no assistant turn to train: left out")
        if targets:
            print(f"{targets:,} {of} have nothing to train{within}: left out")
        for what, count in counts.items():
            if what.startswith(UNREAD_KEY):
                key = what.removeprefix(UNREAD_KEY)
                print(f"{count:,} {of} have messages with {key!r}, which the chat template does not name: left aside")


def _batches(contents: Iterable[tuple]) -> Iterator[list[tuple]]:
    """Yield them in lists of BATCH_ROWS at most, and of about BATCH_CHARACTERS."""
    batch, size = [], 0
    for one in contents:
        batch.append(one)
        size += one[-1].size
        if len(batch) == BATCH_ROWS or size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def hold_out(rows: list[Row], most: int | None, seed: int, counts: Counter[str]) -> tuple[list[Row], list[Row]]:
    """(rows to train on, rows held out): of each ten rows one at most, chosen by the seed, and one at least.

    Training rows that equal a held-out one are left out and counted. Raises UserError if none is left.
    """
    number = max(1, min(most or EVAL_ROWS, len(rows) // EVAL_SHARE))
    chosen = set(random.Random(f"{seed} held out").sample(range(len(rows)), number))
    held_out = [row for k, row in enumerate(rows) if k in chosen]
    theirs = {_content(row) for row in held_out}
    others = [row for k, row in enumerate(rows) if k not in chosen]
    train = [row for row in others if _content(row) not in theirs]
    if equal := len(others) - len(train):
        counts["equal_to_held_out"] = equal
        print(f"{equal:,} rows to train on equal a held-out row: left out")
    if not train:
        raise UserError(
            f"the {len(rows)} rows of the split train cannot be dealt out to train on and to be held out: give more "
            "that differ, or a split validation"
        )
    return train, held_out


def _content(row):
    return tuple((s.ids.tobytes(), s.spans) for s in row.sequences)
