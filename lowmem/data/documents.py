"""Texts without a chat template: a prompt and its completion, or one text, as sequences."""

from dataclasses import dataclass

from lowmem.data.tokens import Encoder, check
from lowmem.training.batches import Sequence


@dataclass(slots=True)
class Document:
    """A text, of which the characters from `start` on, and EOS behind them, are trained or scored."""

    text: str
    start: int = 0

    @property
    def size(self) -> int:
        """Characters of it."""
        return len(self.text)


class Documents:
    """Makes sequences of documents. everything: whether what stands before `start` is trained too."""

    def __init__(self, encoder: Encoder, everything: bool):
        self.encoder, self.everything = encoder, everything

    def sequences(self, rows: list[tuple[str, Document]]) -> list[list[Sequence]]:
        """[the one sequence] of each (where it is, document). The tokenizer adds its BOS.

        A text is tokenized whole; a token that holds characters before and after `start` is a target. Raises UserError.
        """
        texts = self.encoder.encode([check(document.text, where) for where, document in rows], special=True)
        return [[self._sequence(*row, text)] for row, text in zip(rows, texts, strict=True)]

    def _sequence(self, where, document, text):
        start = 0 if self.everything or not document.start else text.border(document.start)[0]
        ids = text.ids if text.ids[-1:] == [self.encoder.eos] else [*text.ids, self.encoder.eos]
        return self.encoder.sequence(ids, [(min(start, len(ids) - 1), len(ids))], where)
