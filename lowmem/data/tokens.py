"""Texts to token ids, and from characters to tokens: where in the ids a part of a text begins and ends."""

import re
from array import array

from lowmem.training import tokenizing
from lowmem.training.batches import Sequence
from lowmem.training.errors import UserError

PROBE = "a b\n\nc  d"  # of which a tokenizer with exact offsets leaves no character out, white space neither


class Encoded:
    """A text and its token ids."""

    def __init__(self, text: str, ids: list[int]):
        self.text, self.ids = text, ids

    def border(self, char: int) -> tuple[int, bool]:
        """(Index of the first token with characters from `char` on; whether it has some before `char` too)."""
        raise NotImplementedError

    def last(self, char: int) -> int:
        """Index of the last token with characters before `char`."""
        first, across = self.border(char)
        return first if across else first - 1


class WithOffsets(Encoded):
    """A text of a fast tokenizer, whose encoding says of which characters a token is."""

    def __init__(self, text: str, ids: list[int], encoding):
        super().__init__(text, ids)
        self.encoding = encoding

    def border(self, char: int) -> tuple[int, bool]:
        """As `Encoded.border` says. Characters that the tokenizer drops are passed over."""
        for at in range(char, len(self.text)):
            if (token := self.encoding.char_to_token(at)) is not None:
                return token, self.encoding.token_to_chars(token)[0] < char
        return len(self.ids), False


class WithPrefixes(Encoded):
    """A text of another tokenizer: the ids of its beginning tell, where all ids begin with them."""

    def __init__(self, text: str, ids: list[int], encode):
        super().__init__(text, ids)
        self.encode = encode

    def border(self, char: int) -> tuple[int, bool]:
        """As `Encoded.border` says."""
        if char >= len(self.text):
            return len(self.ids), False
        before = self.encode(self.text[:char])
        differ = (k for k, (one, other) in enumerate(zip(before, self.ids, strict=False)) if one != other)
        common = next(differ, min(len(before), len(self.ids)))
        return common, common < len(before)


def special_tokens(tokenizer) -> frozenset[int]:
    """The ids of the tokenizer's special and added tokens."""
    return frozenset({*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids})


class Encoder:
    """A tokenizer, asked for many texts at a time: a fast one uses all cores.

    added: ids of its special and added tokens.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.bos, self.eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self.added = special_tokens(tokenizer)
        self.behind = tokenizing.added_behind(tokenizer)
        self.has_offsets = tokenizer.is_fast and self._offsets_are_exact()

    def _offsets_are_exact(self):
        encoding = self._call([PROBE], special=False).encodings[0]
        return all(encoding.char_to_token(at) is not None for at in range(len(PROBE)))

    def _call(self, texts, special):
        return self.tokenizer(
            texts, add_special_tokens=special, return_attention_mask=False, return_token_type_ids=False, verbose=False
        )

    def _ids(self, texts, special):
        """(ids of each text, without those that the tokenizer adds behind it, as EOS; the tokenizer's whole answer)."""
        found = self._call(texts, special)
        behind = self.behind if special else 0
        return [ids[: len(ids) - behind] for ids in found["input_ids"]] if behind else found["input_ids"], found

    def encode(self, texts: list[str], special: bool) -> list[Encoded]:
        """Each text with its ids. special: whether the tokenizer adds what stands before a text, as BOS."""
        if not texts:
            return []
        ids, found = self._ids(texts, special)
        if self.has_offsets:
            return list(map(WithOffsets, texts, ids, found.encodings))
        return [
            WithPrefixes(text, own, lambda part: self._ids([part], special)[0][0])
            for text, own in zip(texts, ids, strict=True)
        ]

    def sequence(self, ids: list[int], spans: list[tuple[int, int]], where: str) -> Sequence:
        """The sequence of ids and the spans of its targets, which may share a token. Raises UserError if it begins with
        two BOS.
        """
        if self.bos is not None and ids[:2] == [self.bos, self.bos]:
            raise UserError(
                f"{where} begins with two {self.tokenizer.bos_token}: the text has one, and the chat template or the "
                "tokenizer puts one before it: take the text's out"
            )
        apart, last = [], 1
        for start, end in spans:
            if max(start, last) < end:
                apart.append((max(start, last), end))
                last = end
        return Sequence(array("i", ids), tuple(apart))


def check(text: str, where: str) -> str:
    """The text, if tokenizers can read it. Raises UserError."""
    if "\0" in text or not text.isascii() and re.search("[\ud800-\udfff]", text):
        raise UserError(f"{where} contains a NUL character or half of a surrogate pair: mend the row or take it out")
    return text
