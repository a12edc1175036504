"""Sequences of tokens, and batches of them as tensors."""

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F

IGNORE = -100  # label of a position that is not trained: F.cross_entropy's default ignore_index


@dataclass(slots=True)
class Sequence:
    """Token ids, int32, and the spans (start, end) of them that are trained or scored, in order; never the first id."""

    ids: array
    spans: tuple[tuple[int, int], ...]

    @classmethod
    def ending(cls, ids: Iterable[int], targets: int) -> "Sequence":
        """The sequence whose last `targets` ids are trained or scored."""
        ids = array("i", ids)
        return cls(ids, ((len(ids) - targets, len(ids)),))

    @property
    def targets(self) -> int:
        """Number of ids that are trained or scored."""
        return sum(end - start for start, end in self.spans)

    @property
    def tokens(self) -> int:
        """Number of ids that the model reads: all but the last, which it only predicts."""
        return len(self.ids) - 1

    def slice(self, start: int, end: int) -> "Sequence":
        """The ids from `start` to before `end`, and what is left of the spans."""
        spans = [(max(a - start, 1), min(b, end) - start) for a, b in self.spans]
        return Sequence(self.ids[start:end], tuple(span for span in spans if span[0] < span[1]))


class Shape(NamedTuple):
    """Sizes of a batch: ids [rows, length], number of targets, and of entries in row_starts."""

    rows: int
    length: int
    targets: int
    row_starts: int = 0

    def with_room_for(self, other: "Shape") -> "Shape":
        """The larger of each."""
        return Shape(*map(max, self, other))


@dataclass
class Batch:
    """ids and labels, int64 [rows, length]. labels[r, t] is the token to predict after ids[r, : t + 1], or IGNORE.

    The same targets as a list: targets, int64 [n], belong to the flat indices `indices`, int64 [n], of [rows, length];
    weights, fp32 [n], are 1 / their number, and 0 where `pad_batch` filled up.
    A line has ids [1, length], in which several rows stand end to end. position_ids, int64 [1, length], start at 0 in
    each; row_starts, int32, say where rows start, the last entry where they end: entries that are equal make rows of no
    tokens. No row has more than `longest` tokens. Of padded rows position_ids and row_starts are None.
    rows, tokens and target_tokens count those of all ranks.
    """

    ids: torch.Tensor
    labels: torch.Tensor
    indices: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    rows: int
    tokens: int
    target_tokens: int
    position_ids: torch.Tensor | None = None
    row_starts: torch.Tensor | None = None
    longest: int = 0

    @classmethod
    def of(cls, ids: torch.Tensor, labels: torch.Tensor, **line) -> "Batch":
        """The batch of ids and labels [rows, length] on the host, where finding the targets makes no device wait.

        line: position_ids, row_starts and longest, of a line. What fills rows up counts as tokens.
        """
        indices = (labels.flatten() != IGNORE).nonzero().flatten()
        weights = torch.full((len(indices),), 1 / max(1, len(indices)))
        targets = labels.flatten()[indices]
        return cls(ids, labels, indices, targets, weights, len(ids), ids.numel(), len(indices), **line)

    @property
    def shape(self) -> Shape:
        """Its sizes."""
        return Shape(*self.ids.shape, len(self.targets), 0 if self.row_starts is None else len(self.row_starts))

    def inputs(self) -> dict[str, object]:
        """The arguments of a model: the ids, and of a line where its rows are, in transformers' words."""
        if self.row_starts is None:
            return {"input_ids": self.ids}
        return {
            "input_ids": self.ids,
            "position_ids": self.position_ids,
            "cu_seq_lens_q": self.row_starts,
            "cu_seq_lens_k": self.row_starts,
            "max_length_q": self.longest,
            "max_length_k": self.longest,
        }

    def tensors(self) -> dict[str, torch.Tensor]:
        """{name: tensor} of all that it has."""
        return {name: value for name, value in vars(self).items() if torch.is_tensor(value)}

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on `device`. Copies to a GPU go from pinned memory, so that the host does not wait for it."""
        pin = torch.device(device).type == "cuda"
        tensors = self.tensors().items()
        return replace(
            self, **{name: (t.pin_memory() if pin else t).to(device, non_blocking=pin) for name, t in tensors}
        )


def pad_batch(batch: Batch, shape: Shape) -> Batch:
    """The batch filled up to `shape`, whose length it has, with rows of zeros, targets of weight 0, and in a line rows
    of no tokens.
    """
    more = Shape(*(max(0, wanted - here) for wanted, here in zip(shape, batch.shape, strict=True)))
    starts = batch.row_starts
    return replace(
        batch,
        ids=F.pad(batch.ids, (0, 0, 0, more.rows)),
        labels=F.pad(batch.labels, (0, 0, 0, more.rows), value=IGNORE),
        row_starts=None if starts is None else torch.cat([starts, starts[-1:].expand(more.row_starts)]),
        **{name: F.pad(getattr(batch, name), (0, more.targets)) for name in ("indices", "targets", "weights")},
    )
