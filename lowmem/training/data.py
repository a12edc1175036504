"""What a run trains on and is scored on, and the order in which it comes."""

import random
from collections.abc import Iterable, Iterator
from dataclasses import KW_ONLY, dataclass, field, replace
from itertools import chain, islice
from typing import ClassVar

import torch

from lowmem.training import parallel
from lowmem.training.batches import Batch, Sequence, Shape, pad_batch
from lowmem.training.layouts import PaddedRows
from lowmem.training.parallel import ceil_div

STEPS_LOOKED_AT = 20_000  # of a run, before it begins: 2 s


@dataclass
class Scores:
    """What an evaluation finds: `values` by name, and `rows`, a dict for each held-out row; whether all is finite."""

    values: dict[str, float]
    rows: list[dict]
    finite: bool


@dataclass
class Data:
    """What a run trains on and is scored on, as sequences, and how they are put into batches.

    train: [Sequence], empty where nothing is trained. scored: [Sequence], the held-out ones.
    max_tokens: most tokens that the model takes. batch_size: rows of a training batch, of all ranks together.
    epochs, max_steps: how long is trained. seed: of the training order.
    eval_tokens: about so many tokens are evaluated at a time, on each rank.
    counts: rows read, cut, left out, and why, for summary.json.
    """

    train: list[Sequence]
    scored: list[Sequence]
    max_tokens: int
    _: KW_ONLY
    batch_size: int = 8
    epochs: int = 1
    max_steps: int | None = None
    seed: int = 0
    eval_tokens: int = 1024
    counts: dict[str, int] = field(default_factory=dict)

    SCORES: ClassVar[dict[str, tuple[str, str, str]]] = {}  # of a score: what it is called, its unit, its format

    def __post_init__(self):
        self.layout = PaddedRows(self.longest(), self.max_tokens)
        self._training_shapes = {}

    def batch(self, sequences: list[Sequence]) -> Batch:
        """This rank's part of the batch of the sequences: of one shape on all ranks, its counts those of all.

        Weights are 1 / the number of all targets.
        """
        shape, own = self.shape(sequences), parallel.deal_to_ranks(sequences)[parallel.rank()]
        batch, targets = self.layout.batch(own, shape), sum(s.targets for s in sequences)
        batch.weights.fill_(1 / targets)
        if parallel.world_size() > 1:
            batch = pad_batch(batch, shape)
        tokens = sum(s.tokens for s in sequences)
        return replace(batch, rows=len(sequences), tokens=tokens, target_tokens=targets)

    def shape(self, sequences: list[Sequence]) -> Shape:
        """The sizes of a rank's part of the batch that the sequences make, of the largest of each."""
        shards = parallel.deal_to_ranks(sequences)
        targets = max(sum(s.targets for s in shard) for shard in shards)
        return self.layout.shape([[s.tokens for s in shard] for shard in shards], targets)

    def shapes(self, batches: Iterable[list[Sequence]]) -> list[Shape]:
        """One for each length that such batches have, with room for all of them; the longest first."""
        found = {}
        for shape in map(self.shape, batches):
            found[shape.length] = shape.with_room_for(found.get(shape.length, shape))
        return [found[length] for length in sorted(found, reverse=True)]

    def training_shapes(self) -> list[Shape]:
        """`shapes` of the training batches."""
        case = (type(self.layout), self.layout.few_lengths, parallel.world_size())
        if case not in self._training_shapes:  # an epoch of 100,000 rows takes a second
            self._training_shapes[case] = self.shapes(self.training_batches())
        return self._training_shapes[case]

    def evaluation_shapes(self) -> list[Shape]:
        """`shapes` of an evaluation's batches."""
        return self.shapes(self.evaluation_batches())

    def largest(self, shapes: list[Shape]) -> Batch:
        """A batch of zeros with as many tokens, targets and rows in a line as any of the shapes."""
        most = max(shapes, key=lambda shape: shape.rows * shape.length)
        targets, starts = (max(getattr(shape, what) for shape in shapes) for what in ("targets", "row_starts"))
        return self.layout.blank(most._replace(targets=targets, row_starts=starts))

    def small(self) -> Batch:
        """Two rows of at most 32 tokens, the same on all ranks, for the start-up checks."""
        first = (self.train or self.scored)[:2]
        ends = [(s, s.spans[-1][1]) for s in (first * 2)[:2]]  # one alone twice: do rows see each other?
        rows = [s.slice(max(0, end - 33), end) for s, end in ends]
        return self.layout.batch(rows, self.layout.shape([[s.tokens for s in rows]], targets=0))

    def training_order(self, epoch: int) -> list[list[int]]:
        """The epoch's batches as lists of indices: rows shuffled, put together as the layout says, batches shuffled."""
        order = list(range(len(self.train)))
        rng = random.Random(f"{self.seed} {epoch}")
        rng.shuffle(order)
        batches = self.layout.deal([self.train[at].tokens for at in order], self.batch_size, rng) if order else []
        rng.shuffle(batches)
        return [[order[k] for k in batch] for batch in batches]

    def evaluation_order(self) -> list[list[int]]:
        """The batches of an evaluation as lists of indices of `scored`."""
        return self.layout.deal_all([s.tokens for s in self.scored], self.eval_tokens * parallel.world_size())

    def training_batches(self) -> Iterator[list[Sequence]]:
        """Yield the sequences of each training batch; of a long run those of its first epochs, three at least, which
        tell what may come.
        """
        steps = max(1, ceil_div(len(self.train), self.batch_size))
        epochs = range(1, 1 + min(self.epochs, max(3, STEPS_LOOKED_AT // steps)))
        order = chain.from_iterable(map(self.training_order, epochs))
        for rows in islice(order, self.max_steps):
            yield [self.train[at] for at in rows]

    def evaluation_batches(self) -> Iterator[list[Sequence]]:
        """Yield the sequences of each batch of an evaluation."""
        for rows in self.evaluation_order():
            yield [self.scored[at] for at in rows]

    def planned_steps(self) -> int:
        """Steps of a whole run. A resumed one counts what is done too, and so makes the same choices again."""
        steps = self.epochs * ceil_div(len(self.train), self.batch_size)
        return min(steps, self.max_steps or steps)

    def score(self, log_likelihoods: torch.Tensor, right: torch.Tensor) -> Scores:
        """The scores: of each scored sequence its targets' log-probabilities, fp64 [n], and how many are predicted
        right, int64 [n].
        """
        raise NotImplementedError

    def in_words(self, values: dict[str, float]) -> str:
        """The scores `values`, for the reader."""
        return ", ".join(f"{what} {values[k]:{form}} {unit}".strip() for k, (what, unit, form) in self.SCORES.items())

    def describe(self) -> str:
        """How much it is, for the reader."""
        return f"{len(self.train):,} sequences to train on, {len(self.scored):,} held out"

    def describe_tokens(self) -> str:
        """How long its training sequences are, for the reader."""
        of = self.train or self.scored
        tokens, most = sum(s.tokens for s in of), max(s.tokens for s in of)
        share = 100 * sum(s.targets for s in of) / tokens
        return f"{tokens / len(of):,.0f} a sequence, {most:,} at most; {share:.1f} % are targets"

    def longest(self) -> int:
        """Tokens that the model reads of the longest sequence."""
        return max((s.tokens for s in (*self.train, *self.scored)), default=1)

    def largest_id(self) -> int:
        """The largest token id."""
        return max(max(s.ids) for s in (*self.train, *self.scored))

    def content(self) -> Iterator[bytes]:
        """What a resumed run must find again, in pieces to be hashed: all token ids, and which of them are targets."""
        for s in (*self.train, *self.scored):
            yield s.ids.tobytes()
            yield repr(s.spans).encode()
