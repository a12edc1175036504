"""The tokenizer of a model reads as its file says, and the longest text. python -m pytest tests/test_tokenizing.py"""

import shutil

import pytest
import transformers
from support.damage import change_json
from support.saving import save_again
from support.tiny import TINY, make_model, make_tokenizer
from tokenizers import Tokenizer, processors

from lowmem.training import tokenizing
from lowmem.training.errors import UserError

# ---------------------------------------------------------------------------------------------------------------------
# Read as its file says


MISREAD = {  # name in tokenizer_config.json: (class of transformers 5, tokenizer)
    "LlamaTokenizerFast": ("LlamaTokenizer", make_tokenizer),
    "GPT2TokenizerFast": ("GPT2Tokenizer", lambda: make_tokenizer(merge_across_words=True)),
}


@pytest.mark.parametrize("name", MISREAD)
def test_a_tokenizer_whose_class_misreads_its_file_is_read_as_the_file_says(name, tmp_path, capsys):
    """As DeepSeek's distilled Llamas, which lose all spaces so, and GPT-4o's, whose ids alone are others."""
    model, text = tmp_path / "model", "Someone sees it. he takes the drum home."
    read_as, make = MISREAD[name]
    make_model().save_pretrained(model)
    make().save_pretrained(model)
    change_json(model / "tokenizer_config.json", tokenizer_class=name)
    ids = Tokenizer.from_file(str(model / "tokenizer.json")).encode(text).ids
    misread = transformers.AutoTokenizer.from_pretrained(model)(text, add_special_tokens=False)["input_ids"] != ids
    assert misread or name == "LlamaTokenizerFast"  # which transformers reads right from 5.22 on
    _, tokenizer = save_again(model, tmp_path / "saved")
    said = capsys.readouterr().out
    assert (f"the tokenizer of {model} is read as its tokenizer.json says, unlike {read_as} does" in said) == misread
    saved = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert tokenizer(text)["input_ids"] == saved(text)["input_ids"] == ids


def test_a_space_before_the_text_is_a_setting_not_a_misreading(model_folder, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(model_folder(), model)
    change_json(model / "tokenizer_config.json", tokenizer_class="GPT2TokenizerFast", add_prefix_space=True)
    tokenizer, _ = tokenizing.load(str(model))
    assert tokenizer("He")["input_ids"] == tokenizer(" He")["input_ids"]
    assert type(tokenizer).__name__ == "GPT2Tokenizer"
    assert not capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# EOS


def test_a_tokenizer_without_eos_is_refused(model_folder, tmp_path):
    shutil.copytree(model_folder(), tmp_path / "model")
    change_json(tmp_path / "model" / "tokenizer_config.json", eos_token=...)
    with pytest.raises(UserError, match="has no EOS token, which training appends to each row"):
        tokenizing.load(str(tmp_path / "model"))


@pytest.mark.parametrize("behind", ["", "<eos>", "<eos> <eos>", "<bos> <eos>"])
@pytest.mark.parametrize("bos", [False, True])
def test_what_a_tokenizer_adds_behind_a_text_is_counted(bos, behind):
    tokenizer = make_tokenizer(bos)
    template, tokens = "<bos> $A" if bos else "$A", [("<bos>", 0), ("<eos>", 1)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        f"{template} {behind}".strip(), special_tokens=tokens
    )
    assert tokenizing.added_behind(tokenizer) == len(behind.split())


# ---------------------------------------------------------------------------------------------------------------------
# The longest text


PICTURES_TOO = {"text_config": TINY | {"head_dim": 8, "max_position_embeddings": 96}}
LIMITS = {  # (configuration, the tokenizer's model_max_length, most tokens)
    "config": (transformers.LlamaConfig(**TINY), 64, 128),
    "the config's other name": (transformers.GPT2Config(n_positions=96), 64, 96),
    "its text's part": (transformers.Gemma3Config(**PICTURES_TOO), 64, 96),
    "tokenizer": (transformers.BloomConfig(), 64, 64),
    "neither": (transformers.BloomConfig(), 10**30, 2048),
}


@pytest.mark.parametrize("case", LIMITS)
def test_the_longest_text_is_the_config_s_or_the_tokenizer_s(case):
    """As lm-evaluation-harness finds it."""
    config, of_tokenizer, most = LIMITS[case]
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = of_tokenizer
    assert tokenizing.length_limit(config, tokenizer) == most


@pytest.mark.parametrize(
    ("of_config", "of_tokenizer", "message"),
    [
        ({"max_position_embeddings": -5}, {}, "-5 is no number of tokens that the model takes"),
        ({}, {"model_max_length": "x"}, "its files are damaged.* 'x' is no number"),
    ],
)
def test_a_length_that_is_none_is_refused(of_config, of_tokenizer, message, model_folder, tmp_path):
    shutil.copytree(model_folder(), tmp_path / "model")
    change_json(tmp_path / "model" / "config.json", **of_config)
    change_json(tmp_path / "model" / "tokenizer_config.json", **of_tokenizer)
    with pytest.raises(UserError, match=message):
        tokenizing.load(str(tmp_path / "model"))
