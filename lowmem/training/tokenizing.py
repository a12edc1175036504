"""The tokenizer of a model, read as its file says, and the longest text that the model takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from lowmem.training import source
from lowmem.training.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

# Tokenizers that are not alike read it otherwise
PROBE = "A man's 2 cats (x**2) sat.\nTHEY'RE 45% of it; naïve café, 東京 1234567\n"
PROBE_START = 4  # tokens at its beginning that a space before the text, `add_prefix_space`, may change


def load(name: str, weights: bool = True) -> tuple[PreTrainedTokenizerBase, int]:
    """(tokenizer, most tokens the model takes) of `name`, hub id or folder. Raises UserError.

    weights: whether a folder must have them too.
    """
    from transformers import AutoTokenizer

    source.check_folder(name, weights)
    with source.explain_loading("model", name):
        source.say_adapters(name)
        config, _ = source.read_config(name)
        tokenizer = as_its_file(AutoTokenizer.from_pretrained(name, trust_remote_code=False), name)
        limit = length_limit(config, tokenizer)
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer of {name} has no EOS token, which training appends to each row: choose another model"
        )
    return tokenizer, limit


def as_its_file(tokenizer: PreTrainedTokenizerBase, name: str) -> PreTrainedTokenizerBase:
    """The tokenizer, or, where it reads a text otherwise than the tokenizer.json that it comes from, that file's own.

    transformers 4 reads the file; 5 builds a tokenizer anew from its vocabulary, after the pattern of the class that is
    named, which can be the wrong one: LlamaTokenizerFast for DeepSeek's distilled Llamas, whose texts then lose all
    spaces; GPT2Tokenizer for GPT-4o's, whose numbers and capitals are then cut otherwise.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    file = source.file(name, "tokenizer.json")
    if file and tokenizer.is_fast:
        plain = Tokenizer.from_file(str(file))
        plain.no_truncation()
        there = probed(lambda text: plain.encode(text, add_special_tokens=False).ids)
        here = probed(lambda text: tokenizer(text, add_special_tokens=False)["input_ids"])
        count = max(1, min(len(there), len(here)) - PROBE_START)
        if here[-count:] != there[-count:]:
            print(f"the tokenizer of {name} is read as its tokenizer.json says, unlike {type(tokenizer).__name__} does")
            return PreTrainedTokenizerFast.from_pretrained(name)
    return tokenizer


def probed(encode: Callable[[str], list[int]]) -> list[int]:
    """The ids of PROBE; none of a tokenizer without a token for characters that it does not know, which raises."""
    try:
        return encode(PROBE)
    except Exception:  # nothing more special is raised
        return []


def added_behind(tokenizer: PreTrainedTokenizerBase) -> int:
    """Number of tokens that the tokenizer adds behind a text, as one with `add_eos_token` adds EOS."""
    alone, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    return whole[::-1].index(alone[-1]) if alone and alone[-1] in whole else 0


def length_limit(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    """Most tokens the model takes, found as lm-evaluation-harness finds it: config, then tokenizer, then 2048."""
    config, longest = config.get_text_config(), tokenizer.model_max_length
    if not isinstance(longest, int | float):
        raise ValueError(f"model_max_length {longest!r} is no number")
    limits = (getattr(config, name, None) for name in ("n_positions", "max_position_embeddings", "n_ctx"))
    limit = next(filter(None, limits), None) or (longest if longest < 10**9 else 2048)
    if not isinstance(limit, int) or limit < 2:
        raise ValueError(f"{limit!r} is no number of tokens that the model takes")
    return limit
