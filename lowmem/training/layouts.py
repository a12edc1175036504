"""How rows make a batch: end to end in one line, or padded to one length."""

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch

from lowmem.training import parallel
from lowmem.training.batches import IGNORE, Batch, Sequence, Shape
from lowmem.training.parallel import ceil_div

TILE_TOKENS = 128  # that a GPU's kernels take at a time
TAIL_TOKENS = 128  # at most, of a row that only fills a line up: attention within it costs next to nothing
ROWS_PER_SPARE_TOKEN = 2  # of a line: rows seldom fill it to the last


def step_of(length: int, parts: int, least: int) -> int:
    """Lengths near `length` are multiples of this, so that they are few: 1 / `parts` of the power of two below it."""
    return max(least, 2 ** (length.bit_length() - 1) // parts)


def balanced(sizes: list[int], most: list[int]) -> list[list[int]]:
    """Indices of `sizes` in groups, of at most so many as `most` says for each, whose sums are about alike.

    The largest first, each to the group with the least so far (Graham 1969).
    """
    groups, heap = [[] for _ in most], [(0, k) for k, room in enumerate(most) if room]
    for at in sorted(range(len(sizes)), key=lambda at: -sizes[at]):
        total, k = heapq.heappop(heap)
        groups[k].append(at)
        if len(groups[k]) < most[k]:
            heapq.heappush(heap, (total + sizes[at], k))
    return groups


def shared_out(sizes: list[int], shares: list[tuple[int, int]]) -> list[list[int]]:
    """Indices of `sizes` in a group for each of the shares (most indices, sum), which together have room for all.

    The largest first, each to the group with most room left for each that it may still take.
    """
    groups, left = [[] for _ in shares], [list(share) for share in shares]
    for at in sorted(range(len(sizes)), key=lambda at: -sizes[at]):
        k = max((k for k, (most, _) in enumerate(left) if most), key=lambda k: left[k][1] / left[k][0])
        groups[k].append(at)
        left[k] = [left[k][0] - 1, left[k][1] - sizes[at]]
    return groups


@dataclass
class Layout:
    """How rows make a batch. longest: tokens of the longest row. max_tokens: the most that the model takes.

    few_lengths: whether batches are filled up to few lengths, since each is a CUDA graph of its own.
    """

    longest: int
    max_tokens: int
    few_lengths: bool = False

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

    def window(self, rows: int, batch_size: int) -> int:
        """How many of an epoch's shuffled rows are dealt into batches together."""
        raise NotImplementedError

    def deal(self, tokens: list[int], batch_size: int) -> list[list[int]]:
        """Indices of rows of so many tokens each, in batches; the same ones with graphs and without, on any ranks."""
        raise NotImplementedError

    def deal_all(self, tokens: list[int], most: int) -> list[list[int]]:
        """Indices of rows of so many tokens each, in batches of about `most` tokens, or as many as the longest row."""
        raise NotImplementedError

    def made_up(self, train: list[Sequence], rows: int) -> Iterator[list[Sequence]]:
        """Yield a batch of `rows` rows of each length that chance may make in other epochs than the first."""
        raise NotImplementedError


class PaddedRows(Layout):
    """Rows right-padded with zeros to one length, [rows, length]; causality hides the padding."""

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
        return Batch.of(ids, labels, ids.numel())

    def blank(self, shape: Shape) -> Batch:
        """As `Layout.blank` says."""
        ids = torch.zeros(shape.rows, shape.length, dtype=torch.int64)
        return Batch.of(ids, _labels_of_zeros(ids, shape.targets), ids.numel())

    def window(self, rows: int, batch_size: int) -> int:
        """Not all: or length alone would say which rows meet."""
        return 64 * batch_size

    def deal(self, tokens: list[int], batch_size: int) -> list[list[int]]:
        """Like lengths together."""
        order = sorted(range(len(tokens)), key=lambda at: tokens[at])
        return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]

    def deal_all(self, tokens: list[int], most: int) -> list[list[int]]:
        """The longest first."""
        order, batches = sorted(range(len(tokens)), key=lambda at: -tokens[at]), []
        while order:
            count = max(1, most // self.length([tokens[order[0]]]))
            batches.append(order[:count])
            order = order[count:]
        return batches

    def made_up(self, train: list[Sequence], rows: int) -> Iterator[list[Sequence]]:
        """As `Layout.made_up` says."""
        of_length = {self.length([s.tokens]): s for s in train}
        return ([s] * rows for s in of_length.values())


class Lines(Layout):
    """Rows end to end in one line, [1, length], with attention within each row: no padding.

    Where lengths must be few, rows of TAIL_TOKENS tokens at most fill the line up.
    """

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
        return Batch.of(ids, labels, ids.numel(), position_ids=position_ids, row_starts=row_starts, longest=longest)

    def window(self, rows: int, batch_size: int) -> int:
        """All: so batches meet the mean."""
        return max(1, rows)

    def deal(self, tokens: list[int], batch_size: int) -> list[list[int]]:
        """Each with about the tokens of one of two lengths, those of few between which the mean is.

        Also where lengths need not be few, and whatever the ranks: a run may go on without graphs, or on others.
        """
        count = ceil_div(len(tokens), batch_size)
        mean = ceil_div(sum(tokens), count) + ceil_div(batch_size, ROWS_PER_SPARE_TOKEN)
        step = step_of(mean, 16, least=TILE_TOKENS)
        short, longer = mean // step * step, ceil_div(mean % step * count, step)
        kinds = [(n, n * length) for n, length in ((longer, short + step), (count - longer, short)) if n]
        dealt = shared_out(tokens, [(n * batch_size, room) for n, room in kinds])
        batches = []
        for (n, _), rows in zip(kinds, dealt, strict=True):
            batches += _alike([tokens[at] for at in rows], rows, n, batch_size)
        return batches

    def deal_all(self, tokens: list[int], most: int) -> list[list[int]]:
        """As `Layout.deal_all` says."""
        if not tokens:
            return []
        count = ceil_div(sum(tokens), max(most, *tokens))
        return _alike(tokens, range(len(tokens)), count, len(tokens))

    def made_up(self, train: list[Sequence], rows: int) -> Iterator[list[Sequence]]:
        """None: which lengths there are depends on those of the rows alone."""
        return iter(())


def _alike(tokens, rows, count, most):
    """The rows in `count` batches of about equally many tokens, in such order that each rank is dealt alike many."""
    ranks, batches = parallel.world_size(), []
    for batch in balanced(tokens, [most] * count):
        # as many for each rank as `parallel.deal_to_ranks` deals
        parts = balanced([tokens[k] for k in batch], [len(range(rank, len(batch), ranks)) for rank in range(ranks)])
        batches.append([rows[batch[part[k]]] for k in range(len(parts[0])) for part in parts if k < len(part)])
    return batches


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
