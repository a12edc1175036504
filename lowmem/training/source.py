"""Where a model comes from: the files of its folder or hub repository, its configuration, what is wrong with them."""

from __future__ import annotations

import errno
import importlib.util
import inspect
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

import torch

from lowmem.training.errors import UserError, chain, what_ran_out

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

CODE = {"auto_map", "custom_pipelines"}  # settings that name Python files, which are neither run nor saved
QUANTIZATION = {"quantization_config", "compression_config"}  # of whole weights; only others read the second
VOCABULARY = "tokenizer.model"  # that converters read


@contextmanager
def explain_loading(what: str, name: str) -> Iterator[None]:
    """Turn what transformers, datasets and the hub client raise while loading into a UserError of one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of damaged files the libraries make OSError, ValueError, KeyError and their own
        causes, denied = chain(error), (errno.EACCES, errno.EPERM, errno.EROFS)
        if any(map(what_ran_out, causes)):
            raise
        if blocked := next((e for e in causes if isinstance(e, OSError) and e.errno in denied), None):
            raise UserError(f"{what} {name}: {blocked.strerror}: {blocked.filename}: change its mode") from error
        text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        if package := _missing_package(causes, name):
            advice = f"it needs a package that is not installed: pip install {quote(package)}"
        elif "trust_remote_code" in str(error):
            advice = f"it needs code of its own, which is never run here: choose a {what} that transformers knows"
        elif Path(name).exists():
            advice = "its files are damaged or of another kind: get it again (of --demo: delete the folder)"
        elif name.startswith(("/", ".", "~")) or name.count("/") > 1:  # no hub id
            advice = "there is no such file or folder"
        else:
            advice = (
                "no such file or folder here; check the name, the network, its licence on the hub and `hf auth login`"
            )
            advice += ", or try --demo, which needs no account"
        raise UserError(f"{what} {name} cannot be loaded: {advice} ({text})") from error


def _missing_package(chain, name):
    """What pip has to install, name and version, of the package that an error or what led to it misses; else None."""
    for error in chain:
        text = str(error)
        if "tiktoken" in text and not importlib.util.find_spec("sentencepiece") and file(name, VOCABULARY):
            return "sentencepiece"  # tried first, and silently
        if not isinstance(error, ImportError):
            continue
        if found := re.search(r"package for FlashAttention(\d)", text):
            return "flash-attn" if found[1] == "2" else f"flash-attn-{found[1]}"
        named = (
            r"pip install (?:-U |--upgrade )?[`'\"]?([\w.<>=!-]*\w)|requires the (\w+) library|No module named '(\w+)"
        )
        if found := re.search(named, text):
            return found[found.lastindex].lower()
    return None


def check_folder(name: str, weights: bool = True) -> None:
    """Refuse a local model folder without config, safetensors weights or tokenizer, before anything large is read.

    weights: whether they are needed.
    """
    folder = Path(name)
    if not name or folder.is_file():
        raise UserError(f"--model {name!r} is no folder: give the folder that holds the model's files")
    if not folder.is_dir():
        return
    if (folder / "metrics.jsonl").exists() and (folder / "model").is_dir():
        raise UserError(f"{folder} is the folder of a run: give its model, --model {folder / 'model'}")
    files_of_weights = [file for file in folder.glob("*.safetensors") if not file.name.startswith("adapter_")]
    if (folder / "adapter_config.json").exists() and not files_of_weights:
        raise UserError(
            f"the model folder {folder} holds LoRA weights alone: merge them into the model they belong to (PEFT's "
            "merge_and_unload), save that with its tokenizer, and give that folder"
        )
    for files, what in (
        ([folder / "config.json"], "config.json"),
        *([(files_of_weights, "weights (*.safetensors)")] if weights else []),
        ([*folder.glob("tokenizer*"), *folder.glob("vocab.*"), folder / "spiece.model"], "tokenizer"),
    ):
        if not any(file.exists() for file in files):
            raise UserError(
                f"the model folder {folder} has no {what}: save model and tokenizer there with save_pretrained"
            )


def say_adapters(name: str) -> None:
    """Say of LoRA weights beside full ones that they are not used. Raises UserError where they would be."""
    if file(name, "adapter_config.json"):
        if importlib.util.find_spec("peft"):  # with it transformers adds them to the model
            raise UserError(
                f"{name} holds LoRA weights (adapter_config.json) beside full ones, and cannot be trained with both: "
                "merge them, or take a folder without them"
            )
        print(f"the LoRA weights in {name} (adapter_config.json) are not used, only the full ones beside them")


def read_config(name: str) -> tuple[PreTrainedConfig, str | None]:
    """(configuration of `name`, hub id or folder; how its weights are quantised, or None).

    It has quantised weights loaded as whole ones, also where transformers would leave them as they are, on a GPU.
    Raises UserError if they cannot be.
    """
    from transformers import AutoConfig
    from transformers.quantizers import AutoQuantizationConfig
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    config, settings = AutoConfig.from_pretrained(name, trust_remote_code=False), None
    for owner in (config, config.get_text_config()):
        settings = settings or getattr(owner, "quantization_config", None)
        for setting in QUANTIZATION & vars(owner).keys():
            delattr(owner, setting)
    if not settings:
        return config, None
    by_bitsandbytes = settings.get("load_in_4bit") or settings.get("load_in_8bit")  # early files do not name it
    kind = "bitsandbytes" if by_bitsandbytes else settings.get("quant_method")
    known = AUTO_QUANTIZATION_CONFIG_MAPPING.get(kind)
    if known and "dequantize" in inspect.signature(known).parameters:
        settings = settings | {"dequantize": True}
    elif kind != "bitsandbytes":  # whose modules `PreTrainedModel.dequantize` replaces
        raise UserError(
            f"{name} is stored quantised as {kind}, which transformers cannot turn back into whole weights: choose the "
            "model that it was made from"
        )
    AutoQuantizationConfig.from_dict(settings)  # some need their package already here
    config.quantization_config = settings
    return config, kind


def empty_model(name: str, dtype: torch.dtype) -> tuple[torch.nn.Module, torch.dtype | str | None]:
    """(causal LM `name` of `dtype` on the meta device, how its files hold it), from its configuration alone.

    How they hold it: a dtype, or the name of a quantisation, or None if it is not said. Raises UserError.
    """
    from transformers import AutoModelForCausalLM

    with explain_loading("model", name), torch.device("meta"):
        config, quantized = read_config(name)
        stored = quantized or config.dtype  # which from_config changes
        if quantized:
            del config.quantization_config
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False), stored


def file(name: str, member: str) -> str | None:
    """Path of a file of the model `name`, hub id or folder; None if there is no such file, or it cannot be had."""
    from transformers.utils import cached_file

    with suppress(OSError):  # also of a cache that must not be written
        return cached_file(name, member)
    return None


def read_json(path: Path) -> object:
    """The content of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))
