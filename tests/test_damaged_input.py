"""Damaged models, data sets and checkpoints end in one line; nothing unsafe is run. python -m pytest tests/test_damaged_input.py"""

import gzip
import hashlib
import json
import os
import re
import shutil
import zipfile
from types import SimpleNamespace

import datasets
import hypothesis.strategies as st
import pytest
import torch
from conftest import make_model, make_row, make_tokenizer, many_rows, write_jsonl
from hypothesis import given, settings
from safetensors.torch import load_file, save_file
from test_cli import SCRIPTS, both_scripts

import common


def cut(file, share=0.5):
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])


def flip(file, at=0.5):
    """Flip one bit."""
    content = bytearray(file.read_bytes())
    content[int(at * len(content))] ^= 4
    file.write_bytes(content)


def change_json(file, **changes):
    content = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in (content | changes).items() if v is not ...}))


def change_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def split_weights(folder):
    make_model().save_pretrained(folder, max_shard_size="40KB")
    (folder / "model.safetensors").unlink()
    return folder / "model.safetensors.index.json"


MODEL = {
    "weights cut in two": (lambda f: cut(f / "model.safetensors"), "cannot be loaded: its files are damaged"),
    "weights cut in their header": (lambda f: cut(f / "model.safetensors", 0.001), "cannot be loaded: its files"),
    "weights empty": (lambda f: (f / "model.safetensors").write_bytes(b""), "cannot be loaded: its files are damaged"),
    "weights of zeros": (lambda f: (f / "model.safetensors").write_bytes(bytes(9999)), "cannot be loaded: its files"),
    "weights of text": (lambda f: (f / "model.safetensors").write_text("<html>404</html>"), "cannot be loaded: its files"),
    "a flipped bit in the header's length": (lambda f: flip(f / "model.safetensors", 0), "cannot be loaded: its files"),
    "a flipped bit in the header": (lambda f: flip(f / "model.safetensors", 0.002), "cannot be loaded: its files"),
    "a header of 2^60 bytes": (lambda f: (f / "model.safetensors").write_bytes(b"\0" * 7 + b"\x10{}"), "cannot be loaded"),
    "NaN in the weights": (lambda f: change_weights(f, lambda w: w["model.layers.0.mlp.up_proj.weight"].fill_(torch.nan)), "weights are damaged"),
    "a tensor missing": (lambda f: change_weights(f, lambda w: w.pop("model.layers.1.mlp.up_proj.weight")), "lack 1 tensors of the model"),
    "a tensor of another shape": (lambda f: change_weights(f, lambda w: w.update({"model.layers.1.mlp.up_proj.weight": torch.zeros(8, 8)})), "cannot be loaded: its files"),
    "a shard missing": (lambda f: [split_weights(f), next(f.glob("model-00002*")).unlink()], "cannot be loaded: its files"),
    "a shard cut": (lambda f: [split_weights(f), cut(next(f.glob("model-00002*")))], "cannot be loaded: its files"),
    "the index cut": (lambda f: cut(split_weights(f)), "cannot be loaded: its files"),
    "the index without a map": (lambda f: split_weights(f).write_text("{}"), "cannot be loaded: its files"),
    "config empty": (lambda f: (f / "config.json").write_text(""), "cannot be loaded: its files"),
    "config cut": (lambda f: cut(f / "config.json"), "cannot be loaded: its files"),
    "config not UTF-8": (lambda f: (f / "config.json").write_bytes(b'{"model_type": "\xff\xfe"}'), "cannot be loaded: its files"),
    "config a list": (lambda f: (f / "config.json").write_text("[1, 2]"), "cannot be loaded: its files"),
    "config without a kind": (lambda f: change_json(f / "config.json", model_type=...), "cannot be loaded: its files"),
    "config of an unknown kind": (lambda f: change_json(f / "config.json", model_type="llama9"), "cannot be loaded: its files"),
    "config with text for a number": (lambda f: change_json(f / "config.json", hidden_size="wide"), "cannot be loaded: its files"),
    "config with a negative size": (lambda f: change_json(f / "config.json", hidden_size=-32), "cannot be loaded: its files"),
    "config of another size": (lambda f: change_json(f / "config.json", intermediate_size=96), "cannot be loaded: its files"),
    "config with more layers": (lambda f: change_json(f / "config.json", num_hidden_layers=3), "lack 9 tensors of the model"),
    "tokenizer empty": (lambda f: (f / "tokenizer.json").write_text(""), "cannot be loaded: its files"),
    "tokenizer cut": (lambda f: cut(f / "tokenizer.json"), "cannot be loaded: its files"),
    "tokenizer not UTF-8": (lambda f: (f / "tokenizer.json").write_bytes(b"\xff\xfe{}"), "cannot be loaded: its files"),
    "tokenizer of another kind": (lambda f: (f / "tokenizer.json").write_text('{"model": {"type": "?"}}'), "cannot be loaded: its files"),
    "tokenizer_config cut": (lambda f: cut(f / "tokenizer_config.json"), "cannot be loaded: its files"),
    "tokenizer without EOS": (lambda f: [change_json(f / "tokenizer_config.json", eos_token=...), (f / "special_tokens_map.json").unlink(missing_ok=True)], "has no EOS token"),
    "tokenizer of a larger vocabulary": (lambda f: make_model(vocab_size=100).save_pretrained(f), "they do not belong together"),
    "text for a scale": (lambda f: change_json(f / "config.json", logits_scaling="x"), "logits_scaling is 'x', not a number"),
    "no layers": (lambda f: make_model(num_hidden_layers=0).save_pretrained(f), "there is nothing to train"),
    "dropout of 5": (lambda f: change_json(f / "config.json", attention_dropout=5.0), "is not supported: dropout probability"),
    "text for a length": (lambda f: [change_json(f / "config.json", max_position_embeddings=...), change_json(f / "tokenizer_config.json", model_max_length="x")], "cannot be loaded: its files"),
    "a negative length": (lambda f: change_json(f / "config.json", max_position_embeddings=-5), "-5 is no number of tokens"),
    "code of its own": (lambda f: own_code(f), "needs code of its own, which is never run here"),
}  # fmt: skip


def own_code(folder, marker="ran"):
    """A model whose config and tokenizer ask for the Python files beside them, as some on the hub do."""
    (folder / "own.py").write_text(
        f"open({str(folder.parent / marker)!r}, 'w')\n"
        "from transformers import LlamaConfig as OwnConfig, LlamaForCausalLM as OwnModel\n"
    )
    auto = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    change_json(folder / "config.json", model_type="own", auto_map=auto)
    change_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.OwnTokenizer", None]})


def row_with(**changes):
    return lambda f: write_jsonl(f / "train.jsonl", [*many_rows(5), make_row(5, 0) | changes])


def save_to_disk(folder):
    rows = {name: datasets.Dataset.from_list(many_rows(20)) for name in ("train", "validation")}
    datasets.DatasetDict(rows).save_to_disk(str(folder))
    return folder


def parquet(folder):
    (folder / "train.jsonl").unlink()
    datasets.Dataset.from_list(many_rows(20)).to_parquet(str(folder / "train.parquet"))
    return folder / "train.parquet"


def gzipped(folder):
    content = (folder / "train.jsonl").read_bytes()
    (folder / "train.jsonl").unlink()
    (folder / "train.jsonl.gz").write_bytes(gzip.compress(content))
    return folder / "train.jsonl.gz"


ARROW = "data-00000-of-00001.arrow"
DATA = {
    "a line cut": (lambda f: cut(f / "train.jsonl", 0.9), "line 54, is not JSON"),
    "an empty file": (lambda f: (f / "train.jsonl").write_text(""), "split train is empty"),
    "blank lines alone": (lambda f: (f / "train.jsonl").write_text("\n\n\n"), "split train is empty"),
    "not UTF-8": (lambda f: (f / "train.jsonl").write_bytes((f / "train.jsonl").read_bytes().replace(b"takes", b"t\xffkes", 1)), "cannot be loaded: its files"),
    "UTF-16": (lambda f: (f / "train.jsonl").write_bytes((f / "train.jsonl").read_text().encode("utf-16")), "cannot be loaded: its files"),
    "NUL bytes": (lambda f: (f / "train.jsonl").write_bytes((f / "train.jsonl").read_bytes().replace(b"takes", b"t\0kes", 1)), "line 1, is not JSON"),
    "a hole of NUL bytes at the end": (lambda f: (f / "train.jsonl").write_bytes((f / "train.jsonl").read_bytes() + bytes(4096)), "line 61, is not JSON"),
    "an escaped NUL": (row_with(ctx_a="a\0b"), "row 5 contains a NUL character"),
    "an escaped NUL in an ending": (row_with(endings=["a", "b", "c\0", "d"]), "row 5 contains a NUL character"),
    "HTML": (lambda f: (f / "train.jsonl").write_text("<html>404</html>"), "line 1, is not JSON"),
    "null for a row": (lambda f: (f / "train.jsonl").write_text("null\n" + (f / "train.jsonl").read_text()), "line 1, is not a row, which is a JSON object"),
    "a list for a row": (lambda f: (f / "train.jsonl").write_text("[1]\n"), "line 1, is not a row, which is a JSON object"),
    "a row without anything": (lambda f: write_jsonl(f / "train.jsonl", [make_row(0, 0), {}]), "row 1: activity_label, ctx_a, ctx_b and ctx must be strings"),
    "lists in lists, 100,000 deep": (lambda f: (f / "train.jsonl").write_text("[" * 100_000 + "]" * 100_000), "line 1, is not JSON"),
    "half of a surrogate pair": (row_with(ctx_a="a\ud800b"), "row 5 contains a NUL character or half of a surrogate pair"),
    "a number of 10,000 digits": (lambda f: (f / "train.jsonl").write_text('{"label": ' + "9" * 10_000 + "}"), "line 1, is not JSON"),
    "numbers for text": (lambda f: write_jsonl(f / "train.jsonl", [make_row(0, 0) | {"ctx_a": 5}]), "must be strings"),
    "a number among texts": (row_with(ctx_a=5), "row 5: activity_label, ctx_a, ctx_b and ctx must be strings"),
    "null for text": (row_with(ctx_b=None), "row 5: activity_label, ctx_a, ctx_b and ctx must be strings"),
    "a list for text": (row_with(ctx=["a"]), "row 5: activity_label, ctx_a, ctx_b and ctx must be strings"),
    "three endings": (row_with(endings=["a", "b", "c"]), "row 5: endings must be four strings"),
    "five endings": (row_with(endings=["a"] * 5), "row 5: endings must be four strings"),
    "no endings": (row_with(endings=[]), "row 5: endings must be four strings"),
    "null for endings": (row_with(endings=None), "row 5: endings must be four strings"),
    "a null ending": (row_with(endings=["a", "b", None, "d"]), "row 5: endings must be four strings"),
    "text for endings": (row_with(endings="a b c d"), "row 5: endings must be four strings"),
    "missing endings": (lambda f: write_jsonl(f / "train.jsonl", [{k: v for k, v in make_row(0, 0).items() if k != "endings"}]), "lacks the HellaSwag columns endings"),
    "endings missing in one row": (lambda f: write_jsonl(f / "train.jsonl", [make_row(0, 0), {k: v for k, v in make_row(1, 0).items() if k != "endings"}]), "row 1: endings must be four strings"),
    "label 4": (row_with(label="4"), "row 5: label '4' is not 0, 1, 2 or 3"),
    "label null": (row_with(label=None), "row 5: label 'None' is not 0, 1, 2 or 3"),
    "label a megabyte": (row_with(label="9" * 10**6), "row 5: label '9999999999999999999999999999999999999999' is not"),
    "no rows": (lambda f: write_jsonl(f / "validation.jsonl", []), "split validation is empty"),
    "an ending of markers alone": (lambda f: write_jsonl(f / "validation.jsonl", [make_row(0, 0, endings=["a", "b", "c", "[step]"])]), "row 0 (ind 0), ending 3, ''"),
    "an ending longer than the model": (lambda f: write_jsonl(f / "validation.jsonl", [make_row(0, 0, endings=["a", "b", "c", "word " * 200])]), "1 validation endings cannot be scored: each ending needs between 1 and 128 tokens, and these have others: row 0 (ind 0), ending 3, 'word word word word word word word word ': 200 tokens; take their rows out"),
    "a folder for a file": (lambda f: [(f / "train.jsonl").unlink(), (f / "train.jsonl").mkdir()], "cannot be loaded: its files"),
    "two files for a split": (lambda f: shutil.copy(f / "train.jsonl", f / "train.parquet"), "and has train.jsonl, train.parquet"),
    "a part missing": (lambda f: (f / "train.jsonl").rename(f / "train-00001-of-00002.jsonl"), "and has train-00001-of-00002.jsonl"),
    "parts of two wholes": (lambda f: [shutil.copy(f / "train.jsonl", f / "train-00000-of-00001.jsonl"), (f / "train.jsonl").rename(f / "train-00001-of-00002.jsonl")], "and has train-00000-of-00001.jsonl, train-00001-of-00002.jsonl"),
    "a whole and its part": (lambda f: shutil.copy(f / "train.jsonl", f / "train-00000-of-00001.jsonl"), "and has train-00000-of-00001.jsonl, train.jsonl"),
    "a whole beside parts in data/": (lambda f: [(f / "data").mkdir(), shutil.copy(f / "train.jsonl", f / "data" / "train-00000-of-00001.jsonl")], "and has data/train-00000-of-00001.jsonl, train.jsonl"),
    "no file for a split": (lambda f: (f / "train.jsonl").unlink(), "and has none"),
    "gzip cut": (lambda f: cut(gzipped(f)), "cannot be loaded: its files"),
    "gzip of nothing": (lambda f: gzipped(f).write_bytes(b""), "split train is empty"),
    "text named gzip": (lambda f: (f / "train.jsonl").rename(f / "train.jsonl.gz"), "cannot be loaded: its files"),
    "parquet cut": (lambda f: cut(parquet(f)), "cannot be loaded: its files"),
    "parquet empty": (lambda f: parquet(f).write_bytes(b""), "cannot be loaded: its files"),
    "parquet a zip": (lambda f: zipfile.ZipFile(parquet(f), "w").close(), "cannot be loaded: its files"),
    "arrow cut": (lambda f: cut(save_to_disk(f) / "train" / ARROW), "cannot be loaded: its files"),
    "arrow missing": (lambda f: (save_to_disk(f) / "train" / ARROW).unlink(), "cannot be loaded: its files"),
    "arrow empty": (lambda f: (save_to_disk(f) / "train" / ARROW).write_bytes(b""), "cannot be loaded: its files"),
    "dataset_dict cut": (lambda f: cut(save_to_disk(f) / "dataset_dict.json"), "cannot be loaded: its files"),
    "dataset_info cut": (lambda f: cut(save_to_disk(f) / "train" / "dataset_info.json"), "cannot be loaded: its files"),
    "a split missing": (lambda f: shutil.rmtree(save_to_disk(f) / "validation"), "cannot be loaded: its files"),
}  # fmt: skip


def step_folder(run):
    return common.last_checkpoint(run)


def rewritten(run, **changes):
    """state.json with changes, and sums that fit it, as another version of the program would have left it."""
    folder = step_folder(run)
    change_json(folder / "state.json", **changes)
    (folder / common.SUMS).write_text(common._sums(folder))


CHECKPOINT = {
    "a flipped bit in the weights": (lambda r: flip(step_folder(r) / "weights-00000.safetensors"), "is damaged"),
    "a flipped bit in the weights' header": (lambda r: flip(step_folder(r) / "weights-00000.safetensors", 0.01), "is damaged"),
    "a flipped bit in the optimizer's state": (lambda r: flip(step_folder(r) / "optimizer-00000.safetensors", 0.9), "is damaged"),
    "a flipped bit in the random states": (lambda r: flip(step_folder(r) / "random-00000.safetensors"), "is damaged"),
    "a flipped bit in the state": (lambda r: flip(step_folder(r) / "state.json"), "is damaged"),
    "a flipped bit in the metrics": (lambda r: flip(step_folder(r) / "metrics.jsonl"), "is damaged"),
    "a flipped bit in the sums": (lambda r: flip(step_folder(r) / common.SUMS), "is damaged"),
    "weights cut": (lambda r: cut(step_folder(r) / "weights-00000.safetensors"), "is damaged"),
    "weights missing": (lambda r: (step_folder(r) / "weights-00000.safetensors").unlink(), "is damaged, weights-00000.safetensors is not as saved"),
    "weights that are a pipe": (lambda r: [(step_folder(r) / "weights-00000.safetensors").unlink(), os.mkfifo(step_folder(r) / "weights-00000.safetensors")], "is damaged, weights-00000.safetensors is not as saved"),
    "state missing": (lambda r: (step_folder(r) / "state.json").unlink(), "is damaged"),
    "sums missing": (lambda r: (step_folder(r) / common.SUMS).unlink(), "is damaged"),
    "state empty": (lambda r: (step_folder(r) / "state.json").write_text(""), "is damaged"),
    "an empty folder": (lambda r: [f.unlink() for f in step_folder(r).iterdir()], "is damaged"),
    "a file too many": (lambda r: (step_folder(r) / "weights-00001.safetensors").write_bytes(b"x"), "is damaged, weights-00001.safetensors is not as saved"),
    "two files swapped": (lambda r: [(step_folder(r) / "state.json").write_bytes((step_folder(r) / "metrics.jsonl").read_bytes()), (step_folder(r) / "metrics.jsonl").write_text("")], "is damaged, metrics.jsonl, state.json are not as saved"),
    "a link to nowhere": (lambda r: [shutil.rmtree(r / "checkpoint"), (r / "checkpoint").symlink_to(r / "nowhere")], "No such file or directory: "),
    "another version's": (lambda r: rewritten(r, format=99), f"has format 99 where this version reads {common.FORMAT}"),
    "a state without its parts": (lambda r: rewritten(r, progress={}), "is damaged"),
    "another script's": (lambda r: rewritten(r, args=json.loads((step_folder(r) / "state.json").read_text())["args"] | {"script": "other"}), "was started with other.py: go on with that"),
    "no checkpoint of a finished run": (lambda r: shutil.rmtree(r / "checkpoint"), "has no checkpoint and is not a run that ended before its first one"),
    "a model folder": (lambda r: [shutil.rmtree(r / "checkpoint"), (r / "summary.json").unlink(), shutil.rmtree(r / "model"), (r / "config.json").write_text('{"model_type": "llama"}')], "has no checkpoint and is not a run"),
    "no checkpoint, other settings": (lambda r: [shutil.rmtree(r / "checkpoint"), (r / "summary.json").unlink(), shutil.rmtree(r / "model"), change_json(r / "config.json", seed=7)], "was started with other settings: --seed 7 is now 42"),
}  # fmt: skip


CONSTANT = ["--schedule", "constant"]  # the rate: then a run may go on to another length


@pytest.fixture(scope="module")
def sound(tmp_path_factory, commands, model_folder, dataset_folder):
    """{"model", "data"}: sound folders; {script: run folder} with a checkpoint at step 4."""
    folder, made = tmp_path_factory.mktemp("sound"), {"model": model_folder(), "data": dataset_folder}
    for script in SCRIPTS:
        flags = ["--model", made["model"], "--dataset", made["data"], "--output_dir", folder, *CONSTANT]
        assert commands.run(script, "--run-name", script, *flags, "--max_steps", 4)[0] == 0
        made[script] = folder / script
    return made


def contents(folder):
    """{path: sha256} of all files below."""
    return {
        str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.rglob("*") if f.is_file()
    }


def refused(commands, script, *flags):
    """The one line of a command that ends with exit code 2 and prints nothing else but progress bars."""
    code, out, err = commands.run(script, *flags)
    said = [line for line in err.splitlines() if line.strip() and not re.search(r"\d+%\|| examples \[", line)]
    assert code == 2, (out, err)
    assert len(said) == 1, said
    assert said[0].startswith("error: ")
    assert len(said[0]) < 800
    return said[0]


CASES = [("model", name) for name in MODEL] + [("data", name) for name in DATA]


@both_scripts
@pytest.mark.parametrize(("kind", "name"), CASES, ids=[f"{kind}: {name}" for kind, name in CASES])
def test_damaged_input_is_refused(script, kind, name, sound, commands, tmp_path):
    damage, message = {"model": MODEL, "data": DATA}[kind][name]
    shutil.copytree(sound[kind], tmp_path / kind)
    damage(tmp_path / kind)
    before = contents(tmp_path)
    flags = {
        "model": sound["model"],
        "dataset": sound["data"],
        {"model": "model", "data": "dataset"}[kind]: tmp_path / kind,
    }
    flags = [f for flag, value in flags.items() for f in (f"--{flag}", value)]
    assert message in refused(commands, script, "--run-name", "x", "--output_dir", tmp_path / "runs", *flags)
    assert contents(tmp_path) == before
    assert not (tmp_path / "ran").exists()


@both_scripts
@pytest.mark.parametrize("name", CHECKPOINT)
def test_damaged_checkpoints_are_refused(script, name, sound, commands, tmp_path):
    damage, message = CHECKPOINT[name]
    shutil.copytree(sound[script], tmp_path / script)
    flags = ["--model", sound["model"], "--dataset", sound["data"], "--output_dir", tmp_path, *CONSTANT, "--resume"]
    damage(tmp_path / script)
    before = contents(tmp_path)
    assert message in refused(commands, script, "--run-name", script, *flags)
    assert contents(tmp_path) == before


SAME_NAME = {
    "labels": ("data", lambda d: write_jsonl(d / "validation.jsonl", [r | {"label": str((int(r["label"]) + 1) % 4)} for r in (json.loads(line) for line in (d / "validation.jsonl").read_text().splitlines())]), "--dataset"),
    "a training row": ("data", lambda d: write_jsonl(d / "train.jsonl", many_rows(60, seed=9)), "--dataset"),
    "heads": ("model", lambda m: change_json(m / "config.json", num_attention_heads=8, num_key_value_heads=4, head_dim=4), "--model"),
    "the activation function": ("model", lambda m: change_json(m / "config.json", hidden_act="relu"), "--model"),
    "the order of frozen rows": ("model", lambda m: change_weights(m, lambda w: w.update({"model.embed_tokens.weight": w["model.embed_tokens.weight"].flip(0).contiguous()})), "--model"),
    "the order of frozen columns": ("model", lambda m: change_weights(m, lambda w: w.update({"lm_head.weight": w["lm_head.weight"].flip(1).contiguous()})), "--model"),
}  # fmt: skip


@both_scripts
@pytest.mark.parametrize("name", SAME_NAME)
def test_other_content_behind_the_same_name_is_refused(script, name, sound, commands, tmp_path):
    kind, change, flag = SAME_NAME[name]
    for part in ("model", "data"):
        shutil.copytree(sound[part], tmp_path / part)
    flags = ["--model", tmp_path / "model", "--dataset", tmp_path / "data", "--output_dir", tmp_path / "runs"]
    flags += CONSTANT
    assert commands.run(script, "--run-name", "x", *flags, "--max_steps", 2)[0] == 0
    assert commands.run(script, "--run-name", "x", *flags, "--max_steps", 3, "--resume")[0] == 0
    change(tmp_path / kind)
    before = contents(tmp_path)
    said = refused(commands, script, "--run-name", "x", *flags, "--resume")
    assert f"{flag} {tmp_path / kind} no longer holds what" in said
    assert contents(tmp_path) == before


def test_all_of_the_frozen_weights_is_looked_at(monkeypatch):
    """Piece by piece, whatever their size and type."""
    monkeypatch.setattr(common, "HASHED", 1000)
    for dtype in (torch.float32, torch.bfloat16):
        model, found = make_model().to(dtype), set()
        trained = common.choose_trained(model, "layers")
        for name, p in model.named_parameters():
            for at in (0, p.numel() // 2, p.numel() - 1) if name not in trained else ():
                before = p.view(-1)[at].clone()
                p.data.view(-1)[at] += 1
                found.add(common.fingerprints(model, trained, ([], []))["model"])
                p.data.view(-1)[at] = before
        assert len(found) == 3 * 3
        assert common.fingerprints(model, trained, ([], []))["model"] not in found


# ---------------------------------------------------------------------------------------------------------------------
# What is odd but sound trains


def test_a_file_system_s_own_files_in_a_checkpoint_do_no_harm(sound, commands, tmp_path):
    shutil.copytree(sound["finetune_lowmem"], tmp_path / "finetune_lowmem")
    (step_folder(tmp_path / "finetune_lowmem") / ".nfs0001").touch()
    (step_folder(tmp_path / "finetune_lowmem") / "@eaDir").mkdir()
    flags = ["--model", sound["model"], "--dataset", sound["data"], "--output_dir", tmp_path, *CONSTANT, "--resume"]
    code, _, err = commands.run("finetune_lowmem", "--run-name", "finetune_lowmem", *flags, "--max_steps", 6)
    assert code == 0, err


def test_rows_of_a_folder_with_an_odd_name_and_of_a_file_with_a_byte_order_mark(tmp_path):
    """datasets would take the name for a pattern."""
    folder = tmp_path / "[a]*$HOME"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", many_rows(5))
    (folder / "train.jsonl").write_bytes(
        b"\xef\xbb\xbf" + (folder / "train.jsonl").read_bytes().replace(b"\n", b"\r\n\n")
    )
    datasets.Dataset.from_list(many_rows(5)).to_parquet(str(folder / "validation.parquet"))
    args = SimpleNamespace(dataset=str(folder), train_rows=4, eval_rows=None)
    assert common.load_rows(args, "train") == common.load_rows(args, "validation")[:4]
    assert len(common.load_rows(args, "validation")) == 5


@pytest.mark.parametrize(("where", "behind"), [("", ""), ("data", ""), ("data", "-0123456789abcdef")])
def test_rows_in_the_hub_s_layout(where, behind, tmp_path):
    """In parts, as parquet or compressed, in data/ as in a clone, or not; of what else lies there nothing is taken."""
    rows, folder = [common.check_row(row, number, "") for number, row in enumerate(many_rows(12))], tmp_path / where
    folder.mkdir(exist_ok=True)
    datasets.Dataset.from_list(rows[:5]).to_parquet(str(folder / f"train-00000-of-00002{behind}.parquet"))
    datasets.Dataset.from_list(rows[5:]).to_parquet(str(folder / f"train-00001-of-00002{behind}.parquet"))
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    name = f"validation-00000-of-00001{behind}" if where else "validation.v2"
    (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    for other in ("test-00000-of-00001.parquet", "training-00000-of-00001.parquet", "train.csv"):
        (folder / other).touch()
    for limit in (None, 4, 5, 7):
        args = SimpleNamespace(dataset=str(tmp_path), train_rows=limit, eval_rows=limit)
        assert common.load_rows(args, "train") == common.load_rows(args, "validation") == rows[:limit]


def test_what_must_not_be_read_or_written_is_no_damage(sound, commands, tmp_path):
    for path in (tmp_path / "cache", sound["model"] / "config.json"):
        fault = "import errno, common, transformers\n"
        fault += f"def fail(*_, **__):\n    raise PermissionError(errno.EACCES, 'Permission denied', {str(path)!r})\n"
        fault += "transformers.AutoConfig.from_pretrained = fail"
        flags = ["--model", sound["model"], "--dataset", sound["data"], "--output_dir", tmp_path]
        code, _, err = commands.run("finetune_lowmem", "--run-name", "x", *flags, first=fault)
        assert code == 2
        assert f"error: model {sound['model']}: Permission denied: {path}: let it be read" in err
    model = tmp_path / "model"
    shutil.copytree(sound["model"], model)
    (model / "model.safetensors").chmod(0)
    # root may read anything: capset(2) with _LINUX_CAPABILITY_VERSION_3 and no capability takes that from the process
    as_user = "from ctypes import CDLL, c_uint32; CDLL(None).capset((c_uint32 * 2)(0x20080522), (c_uint32 * 6)())"
    flags = ["--model", model, "--dataset", sound["data"], "--output_dir", tmp_path]
    code, _, err = commands.run("finetune_lowmem", "--run-name", "x", *flags, first=as_user)
    assert code == 2
    assert f"error: model {model}: Permission denied: {model / 'model.safetensors'}: let it be read" in err
    shutil.copytree(sound["finetune_lowmem"], tmp_path / "finetune_lowmem")
    closed = next((tmp_path / "finetune_lowmem" / "checkpoint").glob("step-*/weights-*"))
    closed.chmod(0)
    flags = ["--model", sound["model"], "--dataset", sound["data"], "--output_dir", tmp_path, *CONSTANT, "--resume"]
    code, _, err = commands.run("finetune_lowmem", "--run-name", "finetune_lowmem", *flags, first=as_user)
    assert code == 2
    assert f"error: Permission denied: {closed}; " in err


def test_tensors_that_the_model_does_not_use_are_named(sound, commands, tmp_path):
    shutil.copytree(sound["model"], tmp_path / "model")
    change_json(tmp_path / "model" / "config.json", num_hidden_layers=1)
    flags = ["--model", tmp_path / "model", "--dataset", sound["data"], "--output_dir", tmp_path, "--epochs", 0]
    _, out, _ = commands.run("finetune_lowmem", "--run-name", "x", *flags)
    assert "the model does not use 9 tensors of" in out


def test_a_model_that_is_a_link_is_replaced_and_what_it_leads_to_is_kept(sound, commands, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "keep").touch()
    shutil.copytree(sound["finetune_lowmem"], tmp_path / "finetune_lowmem")
    shutil.rmtree(tmp_path / "finetune_lowmem" / "model")
    (tmp_path / "finetune_lowmem" / "model").symlink_to(tmp_path / "mine")
    flags = ["--model", sound["model"], "--dataset", sound["data"], "--output_dir", tmp_path, *CONSTANT, "--resume"]
    assert commands.run("finetune_lowmem", "--run-name", "finetune_lowmem", *flags, "--max_steps", 4)[0] == 0
    assert (tmp_path / "finetune_lowmem" / "model" / "config.json").exists()
    assert [f.name for f in (tmp_path / "mine").iterdir()] == ["keep"]


def test_a_run_made_meanwhile_is_kept(sound, commands, tmp_path):
    """Two commands of one name, both before they make the folder; the other one has ended when this one comes to it."""
    other = "import common; from pathlib import Path; plain = common.load_model\n"
    other += f"common.load_model = lambda *a: (Path({str(tmp_path / 'x')!r}).mkdir(), plain(*a))[1]"
    flags = ["--model", sound["model"], "--dataset", sound["data"], "--output_dir", tmp_path]
    code, _, err = commands.run("finetune_lowmem", "--run-name", "x", *flags, first=other)
    assert code == 2
    assert "x was made meanwhile by another process: take another --run-name" in err
    assert not list((tmp_path / "x").iterdir())


@pytest.mark.parametrize("flag", ["--model", "--dataset"])
def test_a_file_or_nothing_for_a_folder_is_refused(flag, sound, commands, tmp_path):
    flags = {"--model": sound["model"], "--dataset": sound["data"], "--output_dir": tmp_path / "runs"}
    for value in ("", next(sound[{"--model": "model", "--dataset": "data"}[flag]].iterdir())):
        given = [x for pair in (flags | {flag: value}).items() for x in pair]
        assert f"error: {flag} '{value}' is no folder" in refused(
            commands, "finetune_lowmem", "--run-name", "x", *given
        )


@both_scripts
def test_a_context_of_a_megabyte_is_cut_on_the_left_and_says_so(script, sound, commands, tmp_path):
    shutil.copytree(sound["data"], tmp_path / "data")
    for split in ("train", "validation"):
        write_jsonl(tmp_path / "data" / f"{split}.jsonl", [*many_rows(5), make_row(5, 0, ctx_a="word " * 200_000)])
    flags = ["--output_dir", tmp_path, "--model", sound["model"], "--dataset", tmp_path / "data", "--epochs", 1]
    code, out, err = commands.run(script, "--run-name", "x", *flags)
    assert code == 0, err
    assert "1 of 6 sequences to train on are longer than the model's 128 tokens: cut on the left" in out
    assert "4 of 24 sequences to evaluate on are longer than the model's 128 tokens: cut on the left" in out


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("a\0"),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
names = ("activity_label", "ctx_a", "ctx_b", "ctx")
sound_row = st.fixed_dictionaries(
    dict.fromkeys(names, text)
    | {"endings": st.lists(text, min_size=4, max_size=4), "label": st.sampled_from(["0", "3", 1])}
)
odd_row = st.fixed_dictionaries(
    dict.fromkeys(names, text | anything)
    | {"endings": st.lists(text, min_size=3, max_size=5) | anything, "label": st.sampled_from("0123") | anything}
)
TOKENIZER = make_tokenizer()


@given(
    st.lists(sound_row | odd_row, min_size=1, max_size=3),
    st.sampled_from(["harness", "raw"]),
    st.integers(1, 40),
    st.integers(1, 16),
)
@settings(max_examples=400, deadline=None)
def test_any_rows_are_refused_or_become_sound_batches(rows, text, limit, multiple):
    """Of any types at all: UserError, or batches whose targets are the right ending's ids, in order, and EOS.

    Rows whose right ending is empty are left out.
    """
    problem = None
    try:
        rows = [common.check_row(row, number, "train") for number, row in enumerate(rows)]
    except common.UserError as error:
        problem = str(error)
    if problem:
        assert re.match(r"train, row \d+", problem)
        return
    ending_of = {
        id(row): (common.harness_text(row)[1] if text == "harness" else row["endings"])[row["label"]] for row in rows
    }
    kept_rows = [row for row in rows if ending_of[id(row)].strip()]
    if not kept_rows:
        with pytest.raises(common.UserError, match="have a right ending without a token of its own"):
            common.training_sequences(rows, TOKENIZER, text, limit)
        return
    sequences, rows = common.training_sequences(rows, TOKENIZER, text, limit), kept_rows
    batch = common.collate(sequences, limit, multiple)
    assert batch.ids.shape == batch.labels.shape == (len(rows), max(common.padded_lengths(sequences, multiple, limit)))
    assert batch.ids.shape[1] <= limit
    assert batch.weights.sum().item() == pytest.approx(1)
    for row, sequence, ids, labels in zip(rows, sequences, batch.ids, batch.labels, strict=True):
        kept = labels[labels != common.IGNORE].tolist()
        assert kept == sequence.ids[-sequence.targets :]
        assert kept[-1] == TOKENIZER.eos_token_id
        end = len(sequence.ids) - 1
        assert ids[:end].tolist() == sequence.ids[:-1]
        assert not ids[end:].any()
        decoded = TOKENIZER.decode(kept[:-1], clean_up_tokenization_spaces=False)
        if len(sequence.ids) <= limit and row["ctx" if text == "raw" else "activity_label"].strip():
            assert decoded.endswith(ending_of[id(row)])


sequence = st.integers(2, 50).flatmap(
    lambda n: st.builds(common.Sequence, st.lists(st.integers(0, 399), min_size=n, max_size=n), st.integers(1, n - 1))
)


@given(st.lists(sequence, min_size=1, max_size=6), st.integers(1, 33), st.integers(0, 3), st.integers(0, 200))
@settings(max_examples=300, deadline=None)
def test_any_sequences_collate_and_pad(sequences, multiple, more_rows, more_targets):
    batch = common.collate(sequences, 50, multiple)
    padded = common.pad_batch(batch, len(sequences) + more_rows, len(batch.targets) + more_targets)
    count = sum(s.targets for s in sequences)
    for one in (batch, padded):
        assert torch.equal(one.labels.flatten()[one.positions[:count]], one.targets[:count])
        assert (one.labels != common.IGNORE).sum() == count == one.target_tokens
        assert one.weights.sum().item() == pytest.approx(1)
        assert not one.weights[count:].any()
    assert batch.tokens == sum(len(s.ids) - 1 for s in sequences)
    assert torch.equal(padded.ids[: len(sequences)], batch.ids)


# ---------------------------------------------------------------------------------------------------------------------
# Safety


@both_scripts
def test_a_whole_run_and_its_resumption_load_no_pickle(script, sound, commands, tmp_path):
    """Python tells its auditors of each class or function that a pickle asks for."""
    watch = "import os, sys, traceback\n"
    watch += "def audit(event, arguments):\n"
    watch += "    if event == 'pickle.find_class':\n"
    watch += "        traceback.print_stack(); os._exit(99)\n"
    watch += "sys.addaudithook(audit)\n"
    flags = ["--output_dir", tmp_path, "--model", sound["model"], "--dataset", sound["data"], "--epochs", 1, *CONSTANT]
    for more in (["--max_steps", 3], ["--resume"]):
        code, _, err = commands.run(script, "--run-name", "x", *flags, *more, first=watch)
        assert code == 0, err
    caught = commands.run(script, "--help", first=watch + "import pickle; pickle.loads(b'cos\\nsystem\\n.')")[0]
    assert caught == 99


def test_pickled_weights_are_not_loaded(sound, commands, tmp_path):
    shutil.copytree(sound["model"], tmp_path / "model")
    torch.save(load_file(tmp_path / "model" / "model.safetensors"), tmp_path / "model" / "pytorch_model.bin")
    (tmp_path / "model" / "model.safetensors").unlink()
    flags = ["--output_dir", tmp_path / "runs", "--model", tmp_path / "model", "--dataset", sound["data"]]
    assert "has not weights (*.safetensors)" in refused(commands, "finetune_lowmem", "--run-name", "x", *flags)


def test_nothing_but_checkpoints_is_removed(sound, commands, tmp_path):
    """checkpoint/ may be a link to a larger disk, where other things are."""
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(sound["finetune_lowmem"], tmp_path / "finetune_lowmem")
    shutil.move(tmp_path / "finetune_lowmem" / "checkpoint", elsewhere)
    (tmp_path / "finetune_lowmem" / "checkpoint").symlink_to(elsewhere)
    (elsewhere / "step-4 of mine").mkdir()
    (elsewhere / "step-notes").write_text("mine")
    (elsewhere / "notes.txt").write_text("mine")
    flags = ["--model", sound["model"], "--dataset", sound["data"], "--output_dir", tmp_path, *CONSTANT, "--resume"]
    assert commands.run("finetune_lowmem", "--run-name", "finetune_lowmem", *flags, "--max_steps", 6)[0] == 0
    assert {f.name for f in elsewhere.iterdir()} == {"step-4 of mine", "step-notes", "notes.txt", "step-6"}


@pytest.mark.parametrize("name", ["..", "../x", "/tmp/x", "a/b", "a\\b", "a\0b", "~", "a b", "", "é", "x" * 101, "..."])
def test_a_run_name_cannot_leave_the_output_folder(name):
    with pytest.raises(common.argparse.ArgumentTypeError):
        common._run_name(name)
