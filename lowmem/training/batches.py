"""Sequences of tokens, and the padded batches that they make."""

import random
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import KW_ONLY, dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F

from lowmem.training import parallel
from lowmem.training.parallel import ceil_div

IGNORE = -100  # label of a position that is not trained: F.cross_entropy's default ignore_index


@dataclass
class Sequence:
    """Token ids of a context and a continuation; the last `targets` of them are trained or scored."""

    ids: list[int]
    targets: int


@dataclass
class Batch:
    """ids and labels, int64 [rows, length]. labels[r, t] is the token to predict after ids[r, : t + 1], or IGNORE.

    The same targets as a list: targets, int64 [n], belong to the flat indices positions, int64 [n], of [rows, length];
    weights, fp32 [n], are 1 / their number, and 0 where `pad_batch` filled up.
    rows, tokens and target_tokens count those of all ranks.
    """

    ids: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    rows: int
    tokens: int
    target_tokens: int

    @classmethod
    def of(cls, ids: torch.Tensor, labels: torch.Tensor, tokens: int) -> "Batch":
        """The batch of ids and labels [rows, length] on the host, where finding the targets makes no device wait."""
        positions = (labels.flatten() != IGNORE).nonzero().flatten()
        weights = torch.full((len(positions),), 1 / max(1, len(positions)))
        return cls(ids, labels, positions, labels.flatten()[positions], weights, len(ids), tokens, len(positions))

    def shard(self) -> "Batch":
        """This rank's rows of the batch, filled up so that all ranks' have one shape, with one target at least.

        Weights are still 1 / the number of all targets.
        """
        if parallel.world_size() == 1:
            return self
        ids, labels = (parallel.deal_to_ranks(x)[parallel.rank()] for x in (self.ids, self.labels))
        most = max((labels != IGNORE).sum().item() for labels in parallel.deal_to_ranks(self.labels))
        own = Batch.of(ids, labels, self.tokens)  # of no rows where these are fewer than the ranks
        own = replace(own, rows=self.rows, target_tokens=self.target_tokens)
        own.weights.fill_(1 / self.target_tokens)
        return pad_batch(own, rows=ceil_div(self.rows, parallel.world_size()), targets=most)

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on `device`. Copies to a GPU go from pinned memory, so that the host does not wait for it."""
        pin = torch.device(device).type == "cuda"
        tensors = {name: value for name, value in vars(self).items() if torch.is_tensor(value)}
        return replace(
            self, **{name: (t.pin_memory() if pin else t).to(device, non_blocking=pin) for name, t in tensors.items()}
        )


def pad_batch(batch: Batch, rows: int, targets: int) -> Batch:
    """The batch filled up to `rows` rows of zeros and to `targets` targets of weight 0; never cut."""
    more_rows, more = max(0, rows - len(batch.ids)), max(0, targets - len(batch.targets))
    return replace(
        batch,
        ids=F.pad(batch.ids, (0, 0, 0, more_rows)),
        labels=F.pad(batch.labels, (0, 0, 0, more_rows), value=IGNORE),
        **{name: F.pad(getattr(batch, name), (0, more)) for name in ("positions", "targets", "weights")},
    )


@dataclass
class Data:
    """What a run trains on and is scored on, as sequences, and how they are put into batches.

    train: [Sequence], empty where nothing is trained. scored: [Sequence], the held-out ones.
    max_tokens: most tokens that the model takes. batch_size: rows of a training batch, of all ranks together.
    multiple: batches are padded to a multiple of so many tokens.
    eval_tokens: about so many tokens are evaluated at a time, on each rank.
    """

    train: list[Sequence]
    scored: list[Sequence]
    max_tokens: int
    _: KW_ONLY
    batch_size: int = 8
    multiple: int = 8
    eval_tokens: int = 1024

    SCORES: ClassVar[dict[str, tuple[str, str, str]]] = {}  # of a score: what it is called, its unit, its format

    def batch(self, sequences: list[Sequence]) -> Batch:
        """The sequences right-padded with zeros to one length; causality hides the padding."""
        length = max(self.lengths(sequences))
        ids = torch.zeros(len(sequences), length, dtype=torch.int64)
        labels = torch.full_like(ids, IGNORE)
        for row, s in enumerate(sequences):
            end = len(s.ids) - 1
            ids[row, :end] = torch.tensor(s.ids[:-1])
            labels[row, end - s.targets : end] = torch.tensor(s.ids[-s.targets :])
        return Batch.of(ids, labels, tokens=sum(len(s.ids) - 1 for s in sequences))

    def lengths(self, sequences: Iterable[Sequence]) -> set[int]:
        """The lengths that batches of such sequences can have: multiples of `multiple`, at most `max_tokens`."""
        return {min(self._padded(len(s.ids) - 1), self.max_tokens) for s in sequences}

    def _padded(self, length):
        return ceil_div(length, self.multiple) * self.multiple

    def shape(self, sequences: list[Sequence]) -> tuple[int, int, int]:
        """(rows, length, targets) of a rank's part of the batch that the sequences make."""
        shards = parallel.deal_to_ranks(sequences)
        targets = max(sum(s.targets for s in shard) for shard in shards)
        return len(shards[0]), max(self.lengths(sequences)), targets

    def largest(self, sequences: list[Sequence], rows: int) -> Batch:
        """A batch as long as the longest of the sequences, with as many targets as any `rows` of them (or all) have."""
        rows = min(rows, len(sequences))
        ids = torch.zeros(rows, max(self.lengths(sequences)), dtype=torch.int64)
        labels = torch.full_like(ids, IGNORE)
        labels.view(-1)[: sum(sorted(s.targets for s in sequences)[-rows:])] = 0
        return Batch.of(ids, labels, tokens=ids.numel())

    def small(self) -> Batch:
        """Two rows of at most 32 tokens, for the start-up checks."""
        return self.batch([Sequence(s.ids[-33:], min(s.targets, 32)) for s in (self.train or self.scored)[:2]])

    def training_order(self, seed: int, epoch: int) -> list[list[int]]:
        """The epoch's batches as lists of indices: shuffled, then like lengths together in windows of 64 batches."""
        order = list(range(len(self.train)))
        rng = random.Random(f"{seed} {epoch}")
        rng.shuffle(order)
        batches = []
        size = self.batch_size
        for start in range(0, len(order), 64 * size):
            window = sorted(order[start : start + 64 * size], key=lambda at: len(self.train[at].ids))
            window = [window[i : i + size] for i in range(0, len(window), size)]
            rng.shuffle(window)
            batches += window
        return batches

    def evaluation_order(self) -> Iterator[list[int]]:
        """The batches of an evaluation as lists of indices of `scored`: like lengths together, the longest first."""
        order = sorted(range(len(self.scored)), key=lambda at: -len(self.scored[at].ids))
        while order:
            padded = self._padded(len(self.scored[order[0]].ids) - 1)
            count = max(1, self.eval_tokens * parallel.world_size() // padded)
            yield order[:count]
            order = order[count:]

    @property
    def rows_per_rank(self) -> int:
        """Rows of a rank's largest training batch."""
        return ceil_div(min(self.batch_size, len(self.train) or self.batch_size), parallel.world_size())

    def planned_steps(self, args) -> int:
        """Steps of a whole run. A resumed one counts what is done too, and so makes the same choices again."""
        steps = args.epochs * ceil_div(len(self.train), self.batch_size)
        return min(steps, args.max_steps or steps)

    def describe(self) -> str:
        """How much it is, for the reader."""
        return f"{len(self.train):,} sequences to train on, {len(self.scored):,} held out"

    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(len(s.ids) for s in (*self.train, *self.scored))

    def largest_id(self) -> int:
        """The largest token id."""
        return max(max(s.ids) for s in (*self.train, *self.scored))

    def content(self) -> Iterator[bytes]:
        """What a resumed run must find again, in pieces to be hashed: all token ids and numbers of targets."""
        for s in (*self.train, *self.scored):
            yield array("q", [s.targets, *s.ids]).tobytes()
