"""What to know of data before it is trained: a row as the model sees it, tokens that the model has never seen."""

import functools
import re

import torch

from lowmem.data.tokens import special_tokens
from lowmem.training.batches import Sequence
from lowmem.training.data import Data

SMALL = 1 / 4  # of the median norm: the embedding of a token that was never trained
SAME = 0.01  # of its norm: so near is the embedding of another one that was not trained either
UNPRINTED = re.compile(  # what a terminal would act upon, and what shows nothing
    r"[\\\x00-\x1f\x7f-\xa0\xad\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\uffff\U000e0000-\U000e007f]"
)
SAMPLE = 4096  # rows of an embedding matrix of which the median norm is taken


def used_tokens(data: Data) -> set[int]:
    """The ids that the model reads or predicts."""
    seen = torch.zeros(data.largest_id() + 1, dtype=torch.bool)
    for s in (*data.train, *data.scored):
        seen[torch.frombuffer(s.ids, dtype=torch.int32)] = True
    return set(seen.nonzero().flatten().tolist())


def unseen_tokens(data: Data, tokenizer, embeddings: torch.Tensor) -> list[str]:
    """The special tokens in the data that the model has not been trained to tell apart from nothing, or from another.

    Of such a token the row of `embeddings` [vocabulary, hidden size] is next to nothing, or that of another special
    token in the data.
    """
    used = sorted(k for k in used_tokens(data) & special_tokens(tokenizer) if k < len(embeddings))
    if not used:
        return []
    median = embeddings[:: max(1, len(embeddings) // SAMPLE)].float().norm(dim=1).median()
    rows = embeddings[used].float()
    norms = rows.norm(dim=1)
    distances = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")  # small ones exactly
    distances.fill_diagonal_(torch.inf)
    unseen = (norms < SMALL * median) | (distances.amin(dim=1) < SAME * norms)
    return [tokenizer.convert_ids_to_tokens(k) for k, is_unseen in zip(used, unseen.tolist(), strict=True) if is_unseen]


def stops(data: Data, tokenizer, stop_tokens: int | list[int] | None) -> tuple[list[str], bool]:
    """The special tokens that end what is trained, as a turn, and at which generation would run on; and whether some of
    it ends with a token at which generation stops. White space left aside.

    stop_tokens: `eos_token_id` of the model's generation_config.
    """
    known = {stop_tokens} if isinstance(stop_tokens, int) else set(stop_tokens or ())
    is_space = functools.cache(lambda token: tokenizer.decode([token]).isspace())
    ends = set()
    for s in (*data.train, *data.scored):
        for start, end in s.spans:
            said = range(end - 1, start - 1, -1)
            ends.add(next((s.ids[at] for at in said if not is_space(s.ids[at])), s.ids[end - 1]))
    missing = sorted((ends & special_tokens(tokenizer)) - known)
    return tokenizer.convert_ids_to_tokens(missing), bool(ends & known)


def marked(sequence: Sequence, tokenizer, most: int | None = None) -> str:
    """The sequence as the model sees it, in one line, its targets between ⟦ and ⟧.

    most: characters of each stretch that is trained or is not; of a longer one its beginning and end.
    """

    def cut(piece):
        return piece if most is None or len(piece) <= most else f"{piece[: most // 2]} ... {piece[-most // 2 :]}"

    def text(end):
        return tokenizer.decode(sequence.ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)

    pieces, at = [], 0
    for start, end in sequence.spans:
        before, up_to = text(start), text(end)
        pieces += [cut(before[at:]), "⟦", cut(up_to[len(before) :]), "⟧"]
        at = len(up_to)
    line = "".join(pieces) + cut(text(len(sequence.ids))[at:])
    return UNPRINTED.sub(lambda found: found[0].encode("unicode_escape").decode(), line)
