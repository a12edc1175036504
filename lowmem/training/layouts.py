"""How rows make a batch: end to end in one line, or padded to one length."""

import heapq
import random
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import ClassVar

import torch

from lowmem.training import parallel
from lowmem.training.batches import IGNORE, Batch, Sequence, Shape
from lowmem.training.parallel import ceil_div

TILE_TOKENS = 128  # that a GPU's kernels take at a time
TAIL_TOKENS = 128  # at most, of a row that only fills a line up: attention within it costs next to nothing
ROWS_PER_SPARE_TOKEN = 2  # of a line: rows seldom fill it to the last
SIZE_NOISE = 0.3  # part of a row's length: dealt by length alone, the same rows would meet in each epoch
EXCHANGE_TRIES = 1000  # with 100, one of HellaSwag's 3,009 lines was too full, and a graph of its own
HOPELESS_GROUPS = 100  # of rows of very different lengths; more of them would take a minute of 100,000 batches of one
PADDED_WINDOW = 64  # batches whose rows are sorted by length together


def step_of(length: int, parts: int, least: int) -> int:
    """Lengths near `length` are multiples of this, so that they are few: 1 / `parts` of the power of two below it."""
    return max(least, 2 ** (length.bit_length() - 1) // parts)


def balanced(
    sizes: list[int], most: list[int], rooms: list[int] | None = None, order: Iterable[int] | None = None
) -> list[list[int]]:
    """Indices of `sizes` in groups, of at most so many as `most` says for each, whose sums are about alike.

    The largest first, or in the `order` given, each to the group with the least so far (Graham 1969).
    rooms: the sums that the groups shall have, where those differ.
    """
    groups = [[] for _ in most]
    heap = [(-room, k) for k, room in enumerate(rooms or [0] * len(most)) if most[k]]
    heapq.heapify(heap)
    for at in sorted(range(len(sizes)), key=lambda at: -sizes[at]) if order is None else order:
        total, k = heapq.heappop(heap)
        groups[k].append(at)
        if len(groups[k]) < most[k]:
            heapq.heappush(heap, (total + sizes[at], k))
    return groups


def exchange(groups: list[list[int]], sizes: list[int], rooms: list[int], rng: random.Random) -> None:
    """Let groups of indices of `sizes` whose sums exceed their rooms exchange indices with others that have room.

    `rng` draws what is tried, EXCHANGE_TRIES times for each such group, those that exceed least first, until
    HOPELESS_GROUPS of them have not found room.
    """
    hopeless = 0
    left = [room - sum(sizes[at] for at in group) for group, room in zip(groups, rooms, strict=True)]
    for k in sorted((k for k in range(len(groups)) if left[k] < 0), key=lambda k: -left[k]):
        for _ in range(EXCHANGE_TRIES):
            other = rng.randrange(len(groups))
            mine, theirs = rng.randrange(len(groups[k])), rng.randrange(len(groups[other]))
            less = sizes[groups[k][mine]] - sizes[groups[other][theirs]]
            if 0 < less <= left[other]:
                groups[k][mine], groups[other][theirs] = groups[other][theirs], groups[k][mine]
                left[k], left[other] = left[k] + less, left[other] - less
            if left[k] >= 0:
                break
        hopeless += left[k] < 0
        if hopeless == HOPELESS_GROUPS:
            break


@dataclass
class Layout:
    """How rows make a batch. longest: tokens of the longest row. max_tokens: the most that the model takes.

    few_lengths: whether batches are filled up to few lengths, since each is a CUDA graph of its own.
    """

    longest: int
    max_tokens: int
    few_lengths: bool = False

    NAME: ClassVar[str]  # what the reader is told

    def length(self, tokens: list[int]) -> int:
        """Length of the batch of rows of so many tokens each."""
        raise NotImplementedError

    def shape(self, shards: list[list[int]], targets: int) -> Shape:
        """Sizes that are enough for each rank's rows, of so many tokens each, and so many targets."""
        raise NotImplementedError

    def batch(self, sequences: list[Sequence], shape: Shape) -> Batch:
        """The batch of the sequences, as long as `shape` says."""
        raise NotImplementedError

    def blank(self, shape: Shape) -> Batch:
        """A batch of zeros with these sizes."""
        raise NotImplementedError

    def deal(self, tokens: list[int], batch_size: int, rng: random.Random) -> list[list[int]]:
        """Indices of an epoch's shuffled rows of so many tokens each, in the fewest batches of `batch_size` at most.

        The same ones with graphs and without, on any ranks: a run may go on otherwise.
        """
        raise NotImplementedError

    def deal_all(self, tokens: list[int], most: int) -> list[list[int]]:
        """Indices of rows of so many tokens each, in batches of about `most` tokens, or as many as the longest row."""
        raise NotImplementedError


class PaddedRows(Layout):
    """Rows right-padded with zeros to one length, [rows, length]; causality hides the padding."""

    NAME = "padded rows"

    def length(self, tokens: list[int]) -> int:
        """As `Layout.length` says."""
        longest = max(tokens, default=0)
        multiple = step_of(longest, 8, least=32) if self.few_lengths else 8
        return min(ceil_div(longest, multiple) * multiple, self.max_tokens)

    def shape(self, shards: list[list[int]], targets: int) -> Shape:
        """As `Layout.shape` says."""
        return Shape(len(shards[0]), max(map(self.length, shards)), targets)

    def batch(self, sequences: list[Sequence], shape: Shape) -> Batch:
        """As `Layout.batch` says."""
        ids = torch.zeros(len(sequences), shape.length, dtype=torch.int64)
        labels = torch.full_like(ids, IGNORE)
        for row, s in enumerate(sequences):
            _write(s, ids[row], labels[row])
        return Batch.of(ids, labels)

    def blank(self, shape: Shape) -> Batch:
        """As `Layout.blank` says."""
        ids = torch.zeros(shape.rows, shape.length, dtype=torch.int64)
        return Batch.of(ids, _labels_of_zeros(ids, shape.targets))

    def deal(self, tokens: list[int], batch_size: int, rng: random.Random) -> list[list[int]]:
        """Like lengths together, in windows of a fourth of the rows at most, or length alone would say which meet."""
        window = batch_size * max(1, min(PADDED_WINDOW, len(tokens) // (4 * batch_size)))
        order = [
            at
            for start in range(0, len(tokens), window)
            for at in sorted(range(start, min(start + window, len(tokens))), key=lambda at: tokens[at])
        ]
        return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]

    def deal_all(self, tokens: list[int], most: int) -> list[list[int]]:
        """The longest first."""
        order, batches = sorted(range(len(tokens)), key=lambda at: -tokens[at]), []
        while order:
            count = max(1, most // self.length([tokens[order[0]]]))
            batches.append(order[:count])
            order = order[count:]
        return batches


class Lines(Layout):
    """Rows end to end in one line, [1, length], with attention within each row: no padding.

    Where lengths must be few, rows of TAIL_TOKENS tokens at most fill the line up.
    """

    NAME = "rows end to end in one line"

    def length(self, tokens: list[int]) -> int:
        """As `Layout.length` says."""
        multiple = self._multiple(sum(tokens)) if self.few_lengths else 1
        return ceil_div(sum(tokens), multiple) * multiple

    def _multiple(self, length):
        """Tokens of which a line near `length` has a multiple; of a rank's part fewer: `deal` fills whole batches."""
        return step_of(length, 16, least=TILE_TOKENS if parallel.world_size() == 1 else 32)

    def shape(self, shards: list[list[int]], targets: int) -> Shape:
        """As `Layout.shape` says."""
        length = max(map(self.length, shards))
        # as many for all batches of a length, so that they have one shape
        most = self._multiple(length) if self.few_lengths else 0
        filled = max(most, length - min(map(sum, shards)))
        return Shape(1, length, targets, 1 + len(shards[0]) + ceil_div(filled, self._tail))

    @property
    def _tail(self):
        return min(TAIL_TOKENS, self.longest)

    def batch(self, sequences: list[Sequence], shape: Shape) -> Batch:
        """As `Layout.batch` says."""
        ids = torch.zeros(1, shape.length, dtype=torch.int64)
        labels = torch.full_like(ids, IGNORE)
        starts = [0, *accumulate(s.tokens for s in sequences)]
        for start, s in zip(starts, sequences, strict=False):
            _write(s, ids[0, start:], labels[0, start:])
        return self._line(ids, labels, [*starts[:-1], *range(starts[-1], shape.length, self._tail), shape.length])

    def blank(self, shape: Shape) -> Batch:
        """As `Layout.blank` says."""
        ids, rows = torch.zeros(1, shape.length, dtype=torch.int64), shape.row_starts - 1
        starts = [shape.length * k // rows for k in range(shape.row_starts)]
        return self._line(ids, _labels_of_zeros(ids, shape.targets), starts)

    def _line(self, ids, labels, starts):
        position_ids = torch.cat([torch.arange(end - start) for start, end in pairwise(starts)])[None]
        # one for all batches of a length, as their graph needs it
        longest = min(ids.numel(), ceil_div(self.longest, TILE_TOKENS) * TILE_TOKENS)
        row_starts = torch.tensor(starts, dtype=torch.int32)
        return Batch.of(ids, labels, position_ids=position_ids, row_starts=row_starts, longest=longest)

    def deal(self, tokens: list[int], batch_size: int, rng: random.Random) -> list[list[int]]:
        """Each with the tokens of one of two lengths at most, as far as rows allow: those between which the mean is."""
        count = ceil_div(len(tokens), batch_size)
        mean = ceil_div(sum(tokens), count) + ceil_div(batch_size, ROWS_PER_SPARE_TOKEN)
        step = step_of(mean, 16, least=TILE_TOKENS)
        short = mean // step * step
        longer = ceil_div((mean - short) * count, step) if short else count
        rooms = [short + step] * longer + [short] * (count - longer)
        noise = [rng.uniform(1 - SIZE_NOISE, 1 + SIZE_NOISE) for _ in tokens]
        about_largest_first = sorted(range(len(tokens)), key=lambda at: -tokens[at] * noise[at])
        batches = balanced(tokens, [batch_size] * count, rooms, about_largest_first)
        exchange(batches, tokens, rooms, rng)
        return [_for_ranks(batch, tokens) for batch in batches]

    def deal_all(self, tokens: list[int], most: int) -> list[list[int]]:
        """As `Layout.deal_all` says."""
        if not tokens:
            return []
        count = ceil_div(sum(tokens), max(most, *tokens))
        return [_for_ranks(batch, tokens) for batch in balanced(tokens, [len(tokens)] * count)]


def _for_ranks(batch, tokens):
    """The batch's indices of `tokens` in such order that `parallel.deal_to_ranks` gives each rank about alike many."""
    ranks = parallel.world_size()
    parts = balanced([tokens[at] for at in batch], [len(range(rank, len(batch), ranks)) for rank in range(ranks)])
    return [batch[part[k]] for k in range(len(parts[0])) for part in parts if k < len(part)]


def _write(sequence, ids, labels):
    """Write a row's ids and labels to the beginning of int64 tensors [its length or more]."""
    row = torch.tensor(sequence.ids, dtype=torch.int64)
    ids[: len(row) - 1] = row[:-1]
    for start, end in sequence.spans:
        labels[start - 1 : end - 1] = row[start:end]


def _labels_of_zeros(ids, targets):
    labels = torch.full_like(ids, IGNORE)
    labels.view(-1)[:targets] = 0
    return labels
