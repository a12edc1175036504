"""What is saved is what was trained, for transformers 4 and 5, and read back. python -m pytest tests/test_saved_model.py

The checks against the real transformers 4 need a folder that it is installed in, and skip themselves without:

    pip install --no-deps --target FOLDER "transformers==4.57.*" "tokenizers==0.22.*" "huggingface-hub==0.36.*"
    TRANSFORMERS_4=FOLDER python -m pytest -m slow tests/test_saved_model.py
"""

import json
import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
import transformers
from support.damage import change_json, change_weights, cut, flip
from support.quantized import EXPERTS
from support.runs import both_scripts, last_line, weights
from support.saving import loaded, save_again
from support.tiny import TINY, make_model, make_tokenizer, many_rows
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers.integrations import accelerate

from lowmem.training import memory, saved_model, source, tokenizing
from lowmem.training.errors import UserError

TEXT = "Someone sees it. he takes the drum home."


# ---------------------------------------------------------------------------------------------------------------------
# Read back


UP = "model.layers.1.mlp.up_proj.weight"
NOT_AS_TRAINED = {
    "a flipped bit": (lambda f: flip(f / "model.safetensors", 0.9), "differs"),
    "a value": (lambda f: change_weights(f, lambda w: w[UP][0, 0].add_(1)), f"{UP} differs"),
    "two layers swapped": (lambda f: change_weights(f, lambda w: w.update({UP: w[UP.replace("1", "0")].clone()})), f"{UP} differs"),
    "a tensor missing": (lambda f: change_weights(f, lambda w: w.pop(UP)), "the names of its tensors differs"),
    "a tensor too many": (lambda f: change_weights(f, lambda w: w.update(more=w[UP].clone())), "the names of its tensors differs"),
    "another shape": (lambda f: change_weights(f, lambda w: w.update({UP: w[UP][:32].clone()})), "the shape of"),
    "another type": (lambda f: change_weights(f, lambda w: w.update({UP: w[UP].double()})), f"the type of {UP} differs"),
    "another configuration": (lambda f: change_json(f / "config.json", rms_norm_eps=1e-3), "rms_norm_eps of its configuration differs"),
    "another tokenizer": (lambda f: make_tokenizer(bos=True).save_pretrained(f), "its tokenizer differs"),
    "a file cut": (lambda f: cut(f / "model.safetensors"), "cannot be read back"),
    "no configuration": (lambda f: (f / "config.json").unlink(), "cannot be read back"),
}  # fmt: skip


@pytest.mark.parametrize("damage", NOT_AS_TRAINED)
def test_a_saved_model_that_is_not_what_was_trained_is_refused(damage, model_folder, tmp_path):
    do, message = NOT_AS_TRAINED[damage]
    network, tokenizer = save_again(model_folder(), tmp_path)
    do(tmp_path)
    with pytest.raises(UserError, match=f"the saved model .*{message}"):
        saved_model.read_back(tmp_path, network, tokenizer)


@pytest.mark.slow
@both_scripts
def test_a_run_ends_at_it_and_saves_it_again(script, commands, argv, tmp_path):
    """Its checkpoint stays, from which the same command goes on."""
    tests = str(Path(__file__).parent)
    damage = (
        f"import sys; sys.path.insert(0, {tests!r})\n"
        "from lowmem.training import saved_model\n"
        "plain = saved_model.save\n"
        "def save(folder, *args):\n"
        "    from support.damage import flip\n"
        "    plain(folder, *args)\n"
        "    flip(folder / 'model.safetensors', 0.9)\n"
        "saved_model.save = save"
    )
    flags = argv("x", "--max_steps", 3, "--epochs", 1)
    code, out, err = commands.run(script, *flags, first=damage)
    assert code == 2, out
    assert last_line(err).startswith("error: the saved model is not what was trained, ")
    assert last_line(err).endswith("the same command with --resume goes on from step 3")
    names = {file.name.partition(".")[0] for file in (tmp_path / "x").iterdir()}
    assert names == {"checkpoint", "config", "eval_epoch0", "eval_epoch1", "events", "metrics"}
    assert commands.run(script, *flags, "--resume")[0] == 0
    assert (tmp_path / "x" / "model" / "config.json").exists()


@pytest.mark.parametrize("architecture", ["llama-tied", "mixtral", "gpt2"])
def test_reading_back_takes_one_tensor_at_a_time(architecture, model_folder, tmp_path, monkeypatch):
    """What is in host memory at once, beside the model itself, seen at what was read and is still alive."""
    alive, most = weakref.WeakSet(), 0
    network, tokenizer, origin = loaded(model_folder(architecture), torch.float32)
    saved_model.save(tmp_path / "saved", network, tokenizer, origin)
    plain = accelerate.load_offloaded_parameter

    def load(found, name):
        nonlocal most
        tensor = plain(found, name)
        alive.add(tensor)
        most = max(most, len(alive))
        return tensor

    monkeypatch.setattr(accelerate, "load_offloaded_parameter", load)
    tensors, size = saved_model.read_back(tmp_path / "saved", network, tokenizer)
    assert tensors == len(weights(tmp_path / "saved"))
    assert size > memory.size_in_bytes(network.parameters())
    assert 1 <= most <= 2  # the last one lives until the next is there
    assert [f.name for f in tmp_path.iterdir()] == ["saved"]


def test_what_was_read_back_is_said_and_kept(run, capsys):
    summary, folder = run("finetune_lowmem", "x", "--epochs", 0)
    assert summary["model_read_back"]["tensors"] == 21
    assert "the saved model, 21 tensors, 0.00 GiB, was read back as trained in" in capsys.readouterr().out
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert run("finetune_lowmem", "y", "--epochs", 0, "--no_save_model")[0]["model_read_back"] is None


# ---------------------------------------------------------------------------------------------------------------------
# transformers 4 and 5 read the same


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LOCAL = {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5}, "sliding_attention": {"rope_type": "default", "rope_theta": 777.0}}  # fmt: skip
# {name: (configuration of transformers 5, the settings by the names of transformers 4)}
NAMES_OF_4 = {
    "llama": (lambda: transformers.LlamaConfig(**TINY, rope_parameters={"rope_type": "default", "rope_theta": 5e5}), {"rope_theta": 5e5, "rope_scaling": None}),
    "llama3": (lambda: transformers.LlamaConfig(**TINY, rope_parameters=LLAMA3 | {"rope_theta": 5e5}), {"rope_theta": 5e5, "rope_scaling": LLAMA3}),
    "yarn": (lambda: transformers.Qwen3Config(**TINY, head_dim=8, rope_parameters=YARN | {"rope_theta": 1e6}), {"rope_theta": 1e6, "rope_scaling": YARN}),
    "part": (lambda: transformers.PhiConfig(**TINY, partial_rotary_factor=0.25, rope_parameters={"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.25}), {"rope_theta": 1e6, "rope_scaling": None, "partial_rotary_factor": 0.25}),
    "neox": (lambda: transformers.GPTNeoXConfig(**TINY, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6, "partial_rotary_factor": 0.5}), {"rotary_emb_base": 1e6, "rotary_pct": 0.5, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    "gemma3": (lambda: transformers.Gemma3TextConfig(**TINY, head_dim=8, sliding_window=16, rope_parameters=LOCAL), {"rope_theta": 5e5, "rope_local_base_freq": 777.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
    "experts": (lambda: transformers.Qwen3MoeConfig(**TINY, **EXPERTS, head_dim=8, rope_parameters={"rope_type": "default", "rope_theta": 1e6}), {"rope_theta": 1e6, "num_experts": 4}),
}  # fmt: skip
OF_5 = {"backend": ..., "is_local": ..., "local_files_only": ...}  # settings of tokenizers that 4 does not write


def written_by(writer, name, folder):
    """A model of NAMES_OF_4 in a folder as transformers 4 or 5 writes it; its configuration."""
    (make, names), config_file = NAMES_OF_4[name], folder / "config.json"
    torch.manual_seed(0)
    config = make()
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    make_tokenizer(bos=True).save_pretrained(folder)
    if writer == 4:
        more = {"rope_parameters": ..., "dtype": ..., "torch_dtype": "float32", "transformers_version": "4.45.0"}
        change_json(config_file, **more | names | ({"num_local_experts": ...} if "num_experts" in names else {}))
        change_json(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast", **OF_5)
    return config


@pytest.mark.parametrize("writer", [4, 5])
@pytest.mark.parametrize("name", NAMES_OF_4)
def test_the_configuration_has_the_names_of_both(name, writer, tmp_path):
    config, saved, names = written_by(writer, name, tmp_path / "model"), tmp_path / "saved", NAMES_OF_4[name][1]
    save_again(tmp_path / "model", saved)
    content = json.loads((saved / "config.json").read_text())
    assert {key: content.get(key) for key in names} == names
    assert content["rope_parameters"] == config.rope_parameters
    assert content["dtype"] == content["torch_dtype"] == "bfloat16"
    assert transformers.AutoConfig.from_pretrained(saved).rope_parameters == config.rope_parameters
    tokenizer = json.loads((saved / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not OF_5.keys() & tokenizer.keys()


def test_what_5_reads_holds_against_other_names_in_the_source(model_folder, tmp_path):
    """As where a user changes one of two names, or leaves out what 5 takes for granted."""
    model, saved = tmp_path / "model", tmp_path / "saved"
    shutil.copytree(model_folder(), model)
    change_json(model / "config.json", rope_parameters={"rope_theta": 5e5}, rope_theta=7e5, compression_config={"x": 1})
    config, _ = source.read_config(str(model))
    tokenizer, _ = tokenizing.load(str(model))
    saved.mkdir()
    assert saved_model.save_settings(saved, config, tokenizer, saved_model.Origin.of(str(model)))
    content = json.loads((saved / "config.json").read_text())
    assert (content["rope_theta"], content["rope_scaling"]) == (5e5, None)
    assert "compression_config" not in content


OF_5_ALONE = "the saved model will be for transformers 5 alone"


@pytest.mark.parametrize(
    "wrong",
    [{"rope_scaling": {"rope_type": "linear", "factor": 3.0}}, {"rope_scaling": {"rope_type": "yarn"}, "rope_theta": "x"}],
    ids=["another model", "none"],
)  # fmt: skip
def test_names_of_4_that_would_make_5_read_another_model_are_left_out(
    wrong, model_folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(saved_model, "rope_of_4", lambda rope: wrong)
    save_again(model_folder(), tmp_path)
    assert OF_5_ALONE in capsys.readouterr().out
    assert "rope_scaling" not in json.loads((tmp_path / "config.json").read_text())


def test_a_model_that_only_transformers_5_knows_is_saved(tmp_path, capsys):
    """Gemma 4: a kind of RoPE and settings of layers by which no names of 4 can go."""
    small = {"head_dim": 8, "sliding_window": 16, "num_kv_shared_layers": 0, "vocab_size_per_layer_input": 400}
    config = transformers.Gemma4TextConfig(**TINY | small)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    save_again(tmp_path / "model", tmp_path / "saved", torch.float32)
    assert OF_5_ALONE in capsys.readouterr().out
    assert transformers.AutoConfig.from_pretrained(tmp_path / "saved").rope_parameters == config.rope_parameters


def test_of_a_source_with_pictures_too_the_text_s_part_is_taken():
    """As of Qwen3.5, whose text transformers loads alone."""
    config, text = transformers.LlamaConfig(**TINY), {"model_type": "llama", "rope_theta": 5e5, "house_style": "brick"}
    whole = {"model_type": "pictures and text", "image_size": 28, "text_config": text}
    both = saved_model.config_of_both(config, {"model_type": "llama", "dtype": "bfloat16"}, whole)
    assert both == text | {"dtype": "bfloat16", "torch_dtype": "bfloat16"}
    del text["model_type"]  # as older ones
    assert saved_model.config_of_both(config, {"model_type": "llama"}, text) == text | {"model_type": "llama"}


def metaspace_tokenizer(template=None):
    """As SentencePiece's: a space is part of the token behind it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    tokenizer.decoder = decoders.Metaspace()
    words = TEXT + " A man's 2 cats (x**2) sat.\nNaïve café, 東京 1234567\n"
    words += "".join(sorted({c for row in many_rows(60) for c in row["ctx"] + "".join(row["endings"])}))
    trainer = trainers.BpeTrainer(vocab_size=380, special_tokens=["<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator([words] * 9, trainer)
    if template:
        special_tokens = [("<s>", 0), ("</s>", 1)]
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=special_tokens)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def test_a_tokenizer_that_could_not_be_read_again_is_refused_before_training(run, tmp_path):
    """transformers 5 reads each tokenizer of a Qwen2 as Qwen's own, whatever it is."""
    make_model("qwen2").save_pretrained(tmp_path / "model")
    metaspace_tokenizer().save_pretrained(tmp_path / "model")
    message = "cannot be saved so that transformers reads its tokenizer again as it is: choose another model"
    with pytest.raises(UserError, match=message):
        run("finetune_base", "x", model=tmp_path / "model")
    assert not (tmp_path / "x").exists()
    run("finetune_base", "y", "--epochs", 0, "--eval_rows", 4, "--no_save_model", model=tmp_path / "model")


# Classes of transformers 4 change what they read, by these settings, which 5 does not heed
TOKENIZERS = {
    "llama, no key": (lambda: metaspace_tokenizer(), {"tokenizer_class": "LlamaTokenizerFast"}),
    "llama, BOS": (lambda: metaspace_tokenizer(), {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True}),
    "llama, no BOS": (lambda: metaspace_tokenizer("<s> $A"), {"tokenizer_class": "LlamaTokenizer", "add_bos_token": False}),
    "llama, EOS": (lambda: metaspace_tokenizer("<s> $A"), {"tokenizer_class": "LlamaTokenizerFast", "add_eos_token": True}),
    "gemma": (lambda: metaspace_tokenizer(), {"tokenizer_class": "GemmaTokenizer"}),
    "gpt2": (lambda: make_tokenizer(), {"tokenizer_class": "GPT2TokenizerFast", "add_prefix_space": True}),
    "plain": (lambda: make_tokenizer(), {"tokenizer_class": "PreTrainedTokenizerFast", "add_prefix_space": True}),
    "qwen": (lambda: make_tokenizer(), {"tokenizer_class": "Qwen2Tokenizer", "additional_special_tokens": ["<eos>"]}),
}  # fmt: skip


def with_tokenizer(name, folder, model):
    """A model in a folder, with a tokenizer of TOKENIZERS as transformers 4 writes it."""
    make, settings = TOKENIZERS[name]
    shutil.copytree(model, folder)
    make().save_pretrained(folder)
    change_json(folder / "tokenizer_config.json", **OF_5 | settings)
    return folder


@pytest.mark.parametrize("name", TOKENIZERS)
def test_no_setting_is_saved_by_which_4_would_change_a_tokenizer(name, model_folder, tmp_path):
    save_again(with_tokenizer(name, tmp_path / "model", model_folder()), tmp_path / "saved")
    content = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    assert content["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not {"add_bos_token", "add_eos_token"} & content.keys()
    assert content.get("additional_special_tokens") == TOKENIZERS[name][1].get("additional_special_tokens")


PROBE_OF_4 = """
import json, sys, torch, transformers
assert transformers.__version__.startswith("4."), transformers.__version__
transformers.logging.set_verbosity_error()
text, *folders = sys.argv[1:]
found = []
for folder in folders:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    read = transformers.AutoTokenizer.from_pretrained(folder)(text)
    with torch.no_grad():
        logits = model(**{name: torch.tensor([ids * 4]) for name, ids in read.items()}).logits
    found.append([read["input_ids"], logits.flatten().tolist()])
print(json.dumps(found))
"""


def read_by_4(*folders):
    """[(ids of TEXT, logits after them four times over)] of models, as transformers 4 itself reads them."""
    environment = os.environ | {"PYTHONPATH": os.environ["TRANSFORMERS_4"]}
    command = [sys.executable, "-W", "ignore", "-c", PROBE_OF_4, TEXT, *map(str, folders)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout)


needs_4 = pytest.mark.skipif(
    "TRANSFORMERS_4" not in os.environ, reason="TRANSFORMERS_4 names no folder with transformers 4"
)


@needs_4
@pytest.mark.slow
@pytest.mark.parametrize("writer", [4, 5])
def test_transformers_4_itself_reads_the_same_model_and_ids(writer, tmp_path):
    sources, saved, expected = ([tmp_path / kind / name for name in NAMES_OF_4] for kind in ("source", "saved", ""))
    for at, (name, source_folder, folder) in enumerate(zip(NAMES_OF_4, sources, saved, strict=True)):
        written_by(writer, name, source_folder)
        network, tokenizer = save_again(source_folder, folder, torch.float32)
        ids = tokenizer(TEXT)["input_ids"]
        with torch.no_grad():
            expected[at] = ids, network(input_ids=torch.tensor([ids * 4])).logits.flatten()
    for folders in (saved, sources) if writer == 4 else (saved,):  # 4 reads its own sources so, too
        for folder, (ids, logits), (read_ids, read) in zip(folders, expected, read_by_4(*folders), strict=True):
            assert read_ids == ids, folder
            assert torch.tensor(read).sub(logits).abs().max() < 1e-4, folder  # seen: 2e-6


@needs_4
@pytest.mark.slow
def test_transformers_4_itself_reads_the_ids_that_were_trained(model_folder, tmp_path):
    saved, expected = [tmp_path / "saved" / name for name in TOKENIZERS], []
    for name, folder in zip(TOKENIZERS, saved, strict=True):
        model = with_tokenizer(name, tmp_path / "source" / name, model_folder())
        expected.append(save_again(model, folder, torch.float32)[1](TEXT)["input_ids"])
    assert [ids for ids, _ in read_by_4(*saved)] == expected


# ---------------------------------------------------------------------------------------------------------------------
# What the saved folder takes from the source


def test_settings_and_files_of_the_source_are_kept_but_what_names_code(model_folder, tmp_path, capsys):
    model, saved = tmp_path / "model", tmp_path / "saved"
    shutil.copytree(model_folder(), model)
    auto = {"AutoConfig": "modeling_x.XConfig", "AutoModelForCausalLM": "modeling_x.XModel"}
    change_json(model / "config.json", auto_map=auto, custom_pipelines={"x": {}}, pretraining_tp=2, house_style="brick")
    change_json(
        model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["x.X", None]}, extra_special_tokens=["<bos>"]
    )
    change_json(model / "tokenizer_config.json", chat_template="{{ messages }}", house_style="brick")
    for kind in ("processor_config", "generation_config"):
        (model / f"{kind}.json").write_text("{")
    (model / "tokenizer.model").write_bytes(b"pieces")
    (model / "preprocessor_config.json").write_text('{"size": 28, "auto_map": {"AutoProcessor": "x.X"}}')
    save_again(model, saved)
    said = capsys.readouterr().out
    assert "the saved model will be without auto_map, custom_pipelines: no code is saved with it" in said
    config, tokenizer = (json.loads((saved / f"{kind}.json").read_text()) for kind in ("config", "tokenizer_config"))
    assert not {"auto_map", "custom_pipelines"} & (config.keys() | tokenizer.keys())
    assert (config["pretraining_tp"], config["house_style"]) == (2, "brick")
    assert tokenizer["additional_special_tokens"] == ["<bos>"]
    assert (tokenizer["house_style"], "extra_special_tokens" in tokenizer) == ("brick", False)
    for kind in ("processor_config", "generation_config"):
        assert f"{kind}.json of {model} is damaged: the saved model leaves it out" in said
    assert not (saved / "processor_config.json").exists()
    assert transformers.AutoTokenizer.from_pretrained(saved).chat_template == "{{ messages }}"
    assert (saved / "tokenizer.model").read_bytes() == b"pieces"
    assert json.loads((saved / "preprocessor_config.json").read_text()) == {"size": 28}
