"""How rows make a batch: end to end in one line, or padded to one length."""

import heapq
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch

from lowmem.training import parallel
from lowmem.training.batches import IGNORE, Batch, Sequence, Shape
from lowmem.training.parallel import ceil_div

TILE_TOKENS = 128  # that a GPU's kernels take at a time
TAIL_TOKENS = 128  # of each row that fills a line up, so that attention within it costs next to nothing
SPARE_TOKENS = 4  # of a line, which rows seldom fill to the last


def step_of(length: int, parts: int, least: int) -> int:
    """Lengths near `length` are multiples of this, so that they are few: 1 / `parts` of the power of two below it."""
    return max(least, 2 ** (length.bit_length() - 1) // parts)


def balanced(sizes: list[int], count: int, most: int) -> list[list[int]]:
    """Indices of `sizes` in `count` groups of at most `most`, whose sums are about alike.

    The largest first, each to the group with the least so far (Graham 1969).
    """
    groups, heap = [[] for _ in range(count)], [(0, k) for k in range(count)]
    for at in sorted(range(len(sizes)), key=lambda at: -sizes[at]):
        total, k = heapq.heappop(heap)
        groups[k].append(at)
        if len(groups[k]) < most:
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


class PaddedRows(Layout):
    """Rows right-padded with zeros to one length, [rows, length]; causality hides the padding."""

    def length(self, tokens: list[int]) -> int:
        """Length of the batch of rows of so many tokens each."""
        longest = max(tokens, default=0)
        multiple = step_of(longest, 8, least=32) if self.few_lengths else 8
        return min(ceil_div(longest, multiple) * multiple, self.max_tokens)

    def shape(self, shards: list[list[int]], targets: int) -> Shape:
        """Sizes that are enough for each rank's rows, of so many tokens each, and so many targets."""
        return Shape(len(shards[0]), max(map(self.length, shards)), targets)

    def batch(self, sequences: list[Sequence], shape: Shape) -> Batch:
        """The batch of the sequences, as long as `shape` says."""
        ids = torch.zeros(len(sequences), shape.length, dtype=torch.int64)
        labels = torch.full_like(ids, IGNORE)
        for row, s in enumerate(sequences):
            _write(s, ids[row], labels[row])
        return Batch.of(ids, labels, ids.numel())

    def blank(self, shape: Shape) -> Batch:
        """A batch of zeros with these sizes."""
        ids = torch.zeros(shape.rows, shape.length, dtype=torch.int64)
        return Batch.of(ids, _labels_of_zeros(ids, shape.targets), ids.numel())

    def window(self, rows: int, batch_size: int) -> int:
        """How many of an epoch's shuffled rows are dealt together: not all, or only length would deal them."""
        return 64 * batch_size

    def deal(self, tokens: list[int], batch_size: int) -> list[list[int]]:
        """Indices of rows of so many tokens each, in batches: like lengths together."""
        order = sorted(range(len(tokens)), key=lambda at: tokens[at])
        return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]

    def deal_all(self, tokens: list[int], most: int) -> list[list[int]]:
        """Indices of rows of so many tokens each, in batches of `most` tokens at most or one row, the longest first."""
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

    def length(self, tokens: list[int]) -> int:
        """Length of the batch of rows of so many tokens each."""
        multiple = step_of(sum(tokens), 16, least=TILE_TOKENS) if self.few_lengths else 1
        return ceil_div(sum(tokens), multiple) * multiple

    def shape(self, shards: list[list[int]], targets: int) -> Shape:
        """Sizes that are enough for each rank's rows, of so many tokens each, and so many targets."""
        length = max(map(self.length, shards))
        # as many for all batches of a length, so that they have one shape
        most = step_of(length, 16, least=TILE_TOKENS) if self.few_lengths else 0
        filled = max(most, length - min(map(sum, shards)))
        return Shape(1, length, targets, 1 + len(shards[0]) + ceil_div(filled, self._tail))

    @property
    def _tail(self):
        return min(TAIL_TOKENS, self.longest)

    def batch(self, sequences: list[Sequence], shape: Shape) -> Batch:
        """The batch of the sequences, as long as `shape` says."""
        ids = torch.zeros(1, shape.length, dtype=torch.int64)
        labels = torch.full_like(ids, IGNORE)
        starts = [0, *accumulate(s.tokens for s in sequences)]
        for start, s in zip(starts, sequences, strict=False):
            _write(s, ids[0, start:], labels[0, start:])
        return self._line(ids, labels, [*starts[:-1], *range(starts[-1], shape.length, self._tail), shape.length])

    def blank(self, shape: Shape) -> Batch:
        """A batch of zeros with these sizes."""
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
        """How many of an epoch's shuffled rows are dealt into batches together: all, so that batches meet the mean."""
        return max(1, rows)

    def deal(self, tokens: list[int], batch_size: int) -> list[list[int]]:
        """Indices of rows of so many tokens each, in batches of about equally many tokens, or that fill up a length."""
        kinds = self._kinds(sum(tokens), ceil_div(len(tokens), batch_size))
        batches = []
        for (count, _), rows in zip(
            kinds, shared_out(tokens, [(n * batch_size, room) for n, room in kinds]), strict=True
        ):
            batches += self._alike([tokens[at] for at in rows], rows, count, batch_size)
        return batches

    def _kinds(self, tokens, count):
        """[(how many batches, the tokens that they have together)] of the kinds of batches: those between whose two
        lengths the mean of all is, if lengths shall be few.
        """
        if not self.few_lengths:
            return [(count, tokens)]
        ranks = parallel.world_size()
        mean = ceil_div(tokens, count * ranks) + SPARE_TOKENS
        step = step_of(mean, 16, least=TILE_TOKENS)
        short, longer = mean // step * step, ceil_div(mean % step * count, step)
        kinds = [(longer, longer * ranks * (short + step)), (count - longer, (count - longer) * ranks * short)]
        return [kind for kind in kinds if kind[0]]

    def deal_all(self, tokens: list[int], most: int) -> list[list[int]]:
        """Indices of rows of so many tokens each, in batches of about `most` tokens, or as many as the longest row."""
        if not tokens:
            return []
        return self._alike(tokens, range(len(tokens)), ceil_div(sum(tokens), max(most, *tokens)), len(tokens))

    def _alike(self, tokens, rows, count, most):
        """The rows in `count` batches of about equally many tokens, each dealt to the ranks alike."""
        ranks, batches = parallel.world_size(), []
        for batch in balanced(tokens, count, most):
            parts = balanced([tokens[k] for k in batch], ranks, ceil_div(len(batch), ranks))
            parts.sort(key=len, reverse=True)  # `parallel.deal_to_ranks` takes turns
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
