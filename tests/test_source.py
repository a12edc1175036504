"""Damaged or missing models, and what is said of them. python -m pytest tests/test_source.py"""

import errno
import importlib.util
import re
import shutil
from contextlib import nullcontext
from unittest.mock import MagicMock

import huggingface_hub.constants
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.damage import change_json, change_weights, contents, cut, flip
from support.runs import last_line, refused
from support.tiny import make_model, many_rows

import common
from lowmem.training import models, source, tokenizing
from lowmem.training.errors import UserError


def load(name):
    """Load and check the model `name` as the scripts do."""
    tokenizer, max_tokens = tokenizing.load(str(name))
    rows = [common.check_row(row, number, "rows") for number, row in enumerate(many_rows(3))]
    data = common.HellaSwag(common.training_sequences(rows, tokenizer, "harness", max_tokens), [], max_tokens)
    models.require_room(str(name), torch.float32)
    lm = models.load(str(name), torch.float32, "layers", nullcontext)
    models.check_ids(lm, data)
    lm.check(data)
    return lm


def split_weights(folder):
    make_model().save_pretrained(folder, max_shard_size="40KB")
    (folder / "model.safetensors").unlink()
    return folder / "model.safetensors.index.json"


def remove(pattern):
    return lambda folder: [file.unlink() for file in folder.glob(pattern)]


def pickled(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def own_code(folder):
    """A model whose config and tokenizer ask for the Python files beside them, as some on the hub do."""
    (folder / "own.py").write_text(
        f"open({str(folder.parent / 'ran')!r}, 'w')\n"
        "from transformers import LlamaConfig as OwnConfig, LlamaForCausalLM as OwnModel\n"
    )
    auto = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    change_json(folder / "config.json", model_type="own", auto_map=auto)
    change_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.OwnTokenizer", None]})


AGAIN = "get it again"
UP = "model.layers.1.mlp.up_proj.weight"
DAMAGE = {
    "no weights": (remove("*.safetensors"), "has no weights (*.safetensors): save model and tokenizer there"),
    "pickled weights": (pickled, "has no weights (*.safetensors)"),
    "no tokenizer": (remove("tokenizer*"), "has no tokenizer"),
    "a run's folder": (lambda f: [(f / "model").mkdir(), (f / "metrics.jsonl").touch()], "is the folder of a run: give its model, --model"),
    "no config": (remove("config.json"), "has no config.json"),
    "weights cut in two": (lambda f: cut(f / "model.safetensors"), AGAIN),
    "weights cut in their header": (lambda f: cut(f / "model.safetensors", 0.001), AGAIN),
    "weights empty": (lambda f: (f / "model.safetensors").write_bytes(b""), AGAIN),
    "weights of zeros": (lambda f: (f / "model.safetensors").write_bytes(bytes(9999)), AGAIN),
    "weights of text": (lambda f: (f / "model.safetensors").write_text("<html>404</html>"), AGAIN),
    "a flipped bit in the header's length": (lambda f: flip(f / "model.safetensors", 0), AGAIN),
    "a flipped bit in the header": (lambda f: flip(f / "model.safetensors", 0.002), AGAIN),
    "a header of 2^60 bytes": (lambda f: (f / "model.safetensors").write_bytes(b"\0" * 7 + b"\x10{}"), AGAIN),
    "NaN in the weights": (lambda f: change_weights(f, lambda w: w[UP].fill_(torch.nan)), AGAIN),
    "a tensor missing": (lambda f: change_weights(f, lambda w: w.pop(UP)), f"lack 1 tensors of the model, {UP} first"),
    "a tensor of another shape": (lambda f: change_weights(f, lambda w: w.update({UP: torch.zeros(8, 8)})), AGAIN),
    "a shard missing": (lambda f: [split_weights(f), next(f.glob("model-00002*")).unlink()], AGAIN),
    "a shard cut": (lambda f: [split_weights(f), cut(next(f.glob("model-00002*")))], AGAIN),
    "the index cut": (lambda f: cut(split_weights(f)), AGAIN),
    "the index without a map": (lambda f: split_weights(f).write_text("{}"), AGAIN),
    "config empty": (lambda f: (f / "config.json").write_text(""), AGAIN),
    "config cut": (lambda f: cut(f / "config.json"), AGAIN),
    "config not UTF-8": (lambda f: (f / "config.json").write_bytes(b'{"model_type": "\xff\xfe"}'), AGAIN),
    "config a list": (lambda f: (f / "config.json").write_text("[1, 2]"), AGAIN),
    "config without a kind": (lambda f: change_json(f / "config.json", model_type=...), AGAIN),
    "config of an unknown kind": (lambda f: change_json(f / "config.json", model_type="llama9"), AGAIN),
    "config with text for a number": (lambda f: change_json(f / "config.json", hidden_size="wide"), AGAIN),
    "config with a negative size": (lambda f: change_json(f / "config.json", hidden_size=-32), AGAIN),
    "config of another size": (lambda f: change_json(f / "config.json", intermediate_size=96), AGAIN),
    "config with more layers": (lambda f: change_json(f / "config.json", num_hidden_layers=3), "lack 9 tensors of the model"),
    "tokenizer empty": (lambda f: (f / "tokenizer.json").write_text(""), AGAIN),
    "tokenizer cut": (lambda f: cut(f / "tokenizer.json"), AGAIN),
    "tokenizer not UTF-8": (lambda f: (f / "tokenizer.json").write_bytes(b"\xff\xfe{}"), AGAIN),
    "tokenizer of another kind": (lambda f: (f / "tokenizer.json").write_text('{"model": {"type": "?"}}'), AGAIN),
    "tokenizer_config cut": (lambda f: cut(f / "tokenizer_config.json"), AGAIN),
    "tokenizer without EOS": (lambda f: [change_json(f / "tokenizer_config.json", eos_token=...), (f / "special_tokens_map.json").unlink(missing_ok=True)], "has no EOS token"),
    "tokenizer of a larger vocabulary": (lambda f: make_model(vocab_size=100).save_pretrained(f), "they do not belong together"),
    "text for a scale": (lambda f: change_json(f / "config.json", logits_scaling="x"), "logits_scaling is 'x', not a number"),
    "no layers": (lambda f: make_model(num_hidden_layers=0).save_pretrained(f), "there is nothing to train"),
    "dropout of 5": (lambda f: change_json(f / "config.json", attention_dropout=5.0), "is not supported: dropout probability"),
    "text for a length": (lambda f: [change_json(f / "config.json", max_position_embeddings=...), change_json(f / "tokenizer_config.json", model_max_length="x")], AGAIN),
    "a negative length": (lambda f: change_json(f / "config.json", max_position_embeddings=-5), "-5 is no number of tokens"),
    "code of its own": (own_code, "needs code of its own, which is never run here"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_model_is_refused(name, model_folder, tmp_path):
    damage, message = DAMAGE[name]
    shutil.copytree(model_folder(), tmp_path / "model")
    damage(tmp_path / "model")
    before = contents(tmp_path)
    with pytest.raises(UserError) as refused:
        load(tmp_path / "model")
    said = str(refused.value)
    assert message in said
    assert len(said) < 800
    assert "\n" not in said
    assert contents(tmp_path) == before  # nor has code run


@pytest.mark.slow
@pytest.mark.parametrize("name", ["weights cut in two", "code of its own"])
def test_a_damaged_model_ends_the_command_in_one_line(name, commands, model_folder, dataset_folder, tmp_path):
    damage, message = DAMAGE[name]
    shutil.copytree(model_folder(), tmp_path / "model")
    damage(tmp_path / "model")
    before = contents(tmp_path)
    flags = ["--model", tmp_path / "model", "--dataset", dataset_folder, "--output_dir", tmp_path / "runs"]
    assert message in refused(commands, "finetune_lowmem", "--run-name", "x", *flags)
    assert contents(tmp_path) == before
    assert not (tmp_path / "runs").exists()


def test_a_sound_model_loads(model_folder):
    assert load(model_folder()).trained_parameters > 0


def test_what_is_no_folder_is_refused(model_folder):
    for value in ("", str(model_folder() / "config.json")):
        with pytest.raises(UserError, match=re.escape(f"--model {value!r} is no folder")):
            load(value)


def test_a_repository_that_cannot_be_had_is_explained(monkeypatch):
    """Gated, missing, or without a network: what to check, and the way without an account."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    name = "meta-llama/Llama-3.2-1B"
    advice = "the network, its licence on the hub and `hf auth login`, or try --demo, which needs no account"
    with pytest.raises(UserError, match=advice):  # HF_HUB_OFFLINE is set
        load(name)
    for path in ("/no/where", "./nowhere", "no/such/folder"):  # no hub id
        with pytest.raises(UserError, match=f"model {path} cannot be loaded: there is no such file or folder"):
            load(path)
    response = MagicMock(status_code=403)  # of the HTTP library that the hub's client happens to have
    for kind in (GatedRepoError, RepositoryNotFoundError):

        def fail(*args, kind=kind, **kwargs):
            raise OSError("cannot load") from kind("no", response=response)

        monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", fail)
        with pytest.raises(UserError, match=f"{name} cannot be loaded: .*{advice}"):
            load(name)


def test_what_must_not_be_read_or_written_is_no_damage(model_folder, monkeypatch, tmp_path):
    for path in (tmp_path / "cache", model_folder() / "config.json"):

        def fail(*_, path=path, **__):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))

        monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", fail)
        with pytest.raises(UserError, match=re.escape(f"model {model_folder()}: Permission denied: {path}: ")):
            load(model_folder())


@pytest.mark.slow
def test_weights_that_must_not_be_read_are_named(commands, model_folder, dataset_folder, tmp_path):
    shutil.copytree(model_folder(), tmp_path / "model")
    closed = tmp_path / "model" / "model.safetensors"
    closed.chmod(0)
    # root may read anything: capset(2) with _LINUX_CAPABILITY_VERSION_3 and no capability takes that from the process
    as_user = "from ctypes import CDLL, c_uint32; CDLL(None).capset((c_uint32 * 2)(0x20080522), (c_uint32 * 6)())"
    flags = ["--model", tmp_path / "model", "--dataset", dataset_folder, "--output_dir", tmp_path]
    code, _, err = commands.run("finetune_lowmem", "--run-name", "x", *flags, first=as_user)
    assert code == 2
    assert str(closed) in last_line(err)  # which safetensors says is not there


def test_what_ran_out_is_no_damage():
    """Such an error passes as it is: the command has a line for it."""
    for error in (OSError(errno.ENOSPC, "No space left on device"), MemoryError()):
        with pytest.raises(type(error)), source.explain_loading("model", "x"):
            raise error


def test_a_missing_package_is_named():
    for error, package in (
        (ModuleNotFoundError("No module named 'sentencepiece'"), "sentencepiece"),
        (
            ImportError("Using bitsandbytes requires it: pip install -U `bitsandbytes>=0.46.1`"),
            "'bitsandbytes>=0.46.1'",
        ),
        (ImportError("T requires the protobuf library but it was not found"), "protobuf"),
    ):
        with (
            pytest.raises(UserError, match=f"not installed: pip install {package} "),
            source.explain_loading("model", "x"),
        ):
            raise error


def test_tensors_that_the_model_does_not_use_are_named(model_folder, tmp_path, capsys):
    shutil.copytree(model_folder(), tmp_path / "model")
    change_json(tmp_path / "model" / "config.json", num_hidden_layers=1)
    load(tmp_path / "model")
    assert "the model does not use 9 tensors of" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# What is missing, and what lies beside


# As transformers says it where the package is not there
MISSING = {
    "sentencepiece": ValueError("`tiktoken` is required to read a `tiktoken` file. Install it with `pip install tiktoken`."),
    "'bitsandbytes>=0.46.1'": ImportError("Using `bitsandbytes` 4-bit quantization requires bitsandbytes: `pip install -U bitsandbytes>=0.46.1`"),
    "'compressed-tensors>=0.15.0'": ImportError("requires compressed-tensors>=0.15.0: `pip install compressed-tensors>=0.15.0`"),
    "compressed_tensors": ModuleNotFoundError("No module named 'compressed_tensors'", name="compressed_tensors"),
    "flash-attn": ImportError("FlashAttention2 has been toggled on, but it cannot be used due to the following error: the package for FlashAttention2 doesn't seem to be installed."),
    "flash-attn-4": ImportError("FlashAttention4 has been toggled on, but it cannot be used due to the following error: the package for FlashAttention4 doesn't seem to be installed."),
    "kernels==0.16.0": ImportError("`kernels` is either not installed or uses an incompatible version. Please install a compatible version (0.16.0 <= version < 0.17.0), e.g. `pip install kernels==0.16.0`"),
    "protobuf": ImportError("X requires the protobuf library but it was not found in your environment."),
}  # fmt: skip


def with_packages(monkeypatch, **there):
    """Packages that are there, or not, whatever is installed."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *a: (object() if there[name] else None) if name in there else find(name, *a),
    )


def test_each_missing_package_is_named(model_folder, monkeypatch, tmp_path):
    """And is no damage."""
    model = tmp_path / "model"
    shutil.copytree(model_folder(), model)
    (model / "tokenizer.model").write_bytes(b"pieces")
    with_packages(monkeypatch, sentencepiece=False)
    for package, error in MISSING.items():

        def fail(*_, error=error, **__):
            raise error

        monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", fail)
        with pytest.raises(UserError) as refused:
            load(model)
        assert f"needs a package that is not installed: pip install {package} (" in str(refused.value)
    (model / "tokenizer.model").unlink()

    def fail_without_it(*_, **__):
        raise MISSING["sentencepiece"]

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", fail_without_it)
    with pytest.raises(UserError, match="its files are damaged"):  # the tokenizer is not there: no package helps
        load(model)


def test_a_missing_package_is_named_by_the_real_libraries_too(model_folder, tmp_path):
    """Those that requirements.txt does not have; what is installed here all the same is not asked for."""
    model = tmp_path / "model"
    shutil.copytree(model_folder(), model)
    config = (model / "config.json").read_text()
    cases = {
        "compressed_tensors": {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": {}}},
        "bitsandbytes": {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        "flash_attn": {"attn_implementation": "flash_attention_2"},
        "kernels": {"attn_implementation": "kernels-community/flash-attn3"},
    }
    cases = {package: changes for package, changes in cases.items() if not importlib.util.find_spec(package)}
    assert cases, "none of the packages is missing here"
    for package, changes in cases.items():
        (model / "config.json").write_text(config)
        change_json(model / "config.json", **changes)
        with pytest.raises(UserError, match="needs a package that is not installed: pip install ") as refused:
            load(model)
        assert package in str(refused.value).partition("pip install ")[2].partition(" ")[0].replace("-", "_")


def test_lora_weights_beside_full_ones_are_not_used_and_that_is_said(model_folder, monkeypatch, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(model_folder(), model)
    (model / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8}')
    save_file({"base_model.model.x.lora_A.weight": torch.zeros(8, 8)}, model / "adapter_model.safetensors")
    with_packages(monkeypatch, peft=False)
    weights = load(model).network.state_dict()
    said = f"the LoRA weights in {model} (adapter_config.json) are not used, only the full ones beside them"
    assert said in capsys.readouterr().out
    full = load(model_folder()).network.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in full.items())
    hub = tmp_path / "hub" / "models--me--lora"  # as a cache has a model of the hub
    shutil.copytree(model, hub / "snapshots" / "1")
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("1")
    with monkeypatch.context() as patched:
        patched.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub.parent))
        load("me/lora")
    assert said.replace(str(model), "me/lora") in capsys.readouterr().out
    with_packages(monkeypatch, peft=True)  # with which transformers would add them to the model
    with pytest.raises(UserError, match="beside full ones, and cannot be trained with both"):
        load(model)
    (model / "model.safetensors").unlink()
    with pytest.raises(UserError, match="holds LoRA weights alone: merge them"):
        load(model)
