"""The saved model: a folder that transformers 4.57 and 5 read alike, read back before it counts."""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from lowmem.training import source, tokenizing
from lowmem.training import weights as stored_weights
from lowmem.training.errors import UserError, chain, what_ran_out

FILE_BYTES = 2**30  # of a file of weights
OF_THE_SAVED = {"architectures", "dtype", "torch_dtype", "transformers_version"}  # whatever the source says
GPT_NEOX_ROPE = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}
# Of the source: what prepares pictures and prompts
OTHER_SETTINGS = ("preprocessor_config", "video_preprocessor_config", "processor_config", "chat_template")


@dataclass
class Origin:
    """What a saved model takes from the one it was trained from: {name: content} of its json files, and the bytes of
    its `tokenizer.model` or None.
    """

    settings: dict
    vocabulary: bytes | None

    @classmethod
    def of(cls, name: str) -> "Origin":
        """That of the model `name`, hub id or folder. A file that is damaged is left out and named."""
        from transformers import PreTrainedConfig

        settings = {"config": PreTrainedConfig.get_config_dict(name)[0]}
        for kind in ("tokenizer_config", "generation_config", *OTHER_SETTINGS):
            if file := source.file(name, f"{kind}.json"):
                try:
                    settings[kind] = dict(source.read_json(Path(file)))
                except (ValueError, TypeError):
                    print(f"{kind}.json of {name} is damaged: the saved model leaves it out")
        vocabulary = source.file(name, source.VOCABULARY)
        return cls(settings, Path(vocabulary).read_bytes() if vocabulary else None)


def save(folder: Path, model, tokenizer, origin: Origin, weights: dict | None = None) -> None:
    """Write model and tokenizer so that transformers 4.57 and 5 read the same: see `save_settings`.

    origin: the `Origin` of both. weights: {name: whole tensor}; None: the model's own.
    """
    model.save_pretrained(folder, max_shard_size=FILE_BYTES, state_dict=weights and dict(weights))  # which it empties
    save_settings(folder, model.config, tokenizer, origin)


def save_settings(folder: Path, config, tokenizer, origin: Origin) -> bool:
    """Write configuration and tokenizer; return whether the configuration has the names of transformers 4 too.

    Not if 5 would then read another one, or none.
    """
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if origin.vocabulary is not None:
        (folder / source.VOCABULARY).write_bytes(origin.vocabulary)
    for kind in OTHER_SETTINGS:
        if kind in origin.settings:
            _write_json(folder / f"{kind}.json", origin.settings[kind])
    file = folder / "tokenizer_config.json"
    of_origin = origin.settings.get("tokenizer_config", {})
    _write_json(file, tokenizer_config_of_both(tokenizer, source.read_json(file), of_origin))
    file = folder / "config.json"
    written = source.read_json(file)
    _write_json(file, config_of_both(config, written, origin.settings["config"]))
    if not _other_setting(folder, config):
        return True
    _write_json(file, written)
    return False


def check_settings(name: str, config, tokenizer, origin: Origin) -> None:
    """Say what of the source cannot be saved, before anything is trained.

    Raises UserError if configuration or tokenizer would not be read back as they are.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if not save_settings(folder, config, tokenizer, origin):
            print("the saved model will be for transformers 5 alone: with the names of 4 it would read another one")
        if code := {setting for content in origin.settings.values() for setting in source.CODE & content.keys()}:
            print(f"the saved model will be without {', '.join(sorted(code))}: no code is saved with it")
        if other := _other_setting(folder, config) or _other_reading(folder, tokenizer):
            raise UserError(
                f"{name} cannot be saved so that transformers reads {other} again as it is: choose another model, or "
                "train with --no_save_model"
            )


def config_of_both(config, written: dict, original: dict) -> dict:
    """config.json's content for transformers 4.57 and 5: `written`, 5's own, with all that `original` has.

    config: the configuration, which was read from `original`. 5 writes RoPE as rope_parameters, which 4 does not read,
    and other settings, as Qwen3-MoE's num_experts, by other names. If `original` has the names of 4 alone, they hold in
    both; if 5 wrote it, they are made of what 5 reads.
    """
    if original.get("model_type", config.model_type) != config.model_type:  # the text's part of a model with pictures
        parts = [part for part in original.values() if isinstance(part, dict)]
        original = next((part for part in parts if part.get("model_type") == config.model_type), {})
    old = {}
    if "rope_parameters" in original:  # 5 wrote it
        old = {name: written.get(new, original[new]) for name, new in config.attribute_map.items() if new in original}
        names = GPT_NEOX_ROPE if config.model_type.startswith("gpt_neox") else {}
        old |= {names.get(name, name): value for name, value in rope_of_4(config.rope_parameters or {}).items()}
    content = written | {k: v for k, v in original.items() if k not in OF_THE_SAVED and not k.startswith("_")} | old
    for name in config.sub_configs:
        if isinstance(written.get(name), dict) and isinstance(original.get(name), dict):
            content[name] = config_of_both(getattr(config, name), written[name], original[name])
    if "dtype" in written:
        content["torch_dtype"] = written["dtype"]
    return {name: value for name, value in content.items() if name not in source.QUANTIZATION | source.CODE}


def rope_of_4(rope: dict) -> dict:
    """{rope_theta, rope_scaling, ...}, as transformers 4 reads them, of the rope_parameters of 5."""
    local = rope.get("sliding_attention")  # Gemma 3 has other frequencies in layers with a window
    rope = rope.get("full_attention") or rope
    if "rope_theta" not in rope:
        return {}
    found = {name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope}
    scaling = {name: value for name, value in rope.items() if name not in found}
    found["rope_scaling"] = None if scaling.get("rope_type") == "default" else scaling
    return found | ({"rope_local_base_freq": local["rope_theta"]} if local else {})


def tokenizer_config_of_both(tokenizer, written: dict, original: dict) -> dict:
    """tokenizer_config.json's content for transformers 4.57 and 5: `written`, 5's own, with all that `original` has.

    Both are to read tokenizer.json as it is, and so it was used. Classes of 4 would change it, by the settings that are
    left out, which 5 does not heed. Nor does 4 know 5's list of extra special tokens.
    """
    left_out = source.CODE | {"backend", "is_local", "local_files_only"}
    if tokenizer.is_fast:
        left_out |= {"add_bos_token", "add_eos_token"}
    content = {name: value for name, value in (written | original).items() if name not in left_out}
    if isinstance(content.get("extra_special_tokens"), list):
        extra = content.pop("extra_special_tokens")
        content.setdefault("additional_special_tokens", extra)
    if tokenizer.is_fast:
        content["tokenizer_class"] = "PreTrainedTokenizerFast"
        # What 4's class would make of the names of the inputs and of a space before the text, if nothing was said
        content["model_input_names"] = tokenizer.model_input_names
        content["add_prefix_space"] = getattr(tokenizer.backend_tokenizer.pre_tokenizer, "add_prefix_space", False)
    return content


def read_back(folder: Path, model, tokenizer, weights: dict | None = None) -> tuple[int, int]:
    """(tensors, bytes) in the files of the model saved in `folder`, after all was loaded again and found as in `model`.

    Each tensor's name, shape, type and bytes are compared, one at a time in host memory: transformers leaves them on
    the disk, in the folder's files, or, where it merges some (experts), in files of its own for this while. So are
    configuration and tokenizer. weights: see `save`. Raises UserError at the first difference.
    """
    try:
        return _compare(folder, model, tokenizer, weights)
    except Exception as error:
        if isinstance(error, UserError) or any(map(what_ran_out, chain(error))):
            raise
        text = " ".join(f"{type(error).__name__} {error}".split())[:200]
        raise UserError(f"the saved model cannot be read back ({text})") from error


def _compare(folder, model, tokenizer, weights):
    from transformers import AutoModelForCausalLM
    from transformers.integrations.accelerate import load_offloaded_parameter

    def check(same, what):
        if not same:
            raise UserError(f"the saved model is not what was trained, {what} differs")

    own = weights or model.state_dict()
    with tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as merged:  # NFS keeps what is mapped
        found, report = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", device_map={"": "disk"}, offload_folder=merged, output_loading_info=True
        )
        there = found.state_dict()
        check(not any(report.values()) and there.keys() == own.keys(), "the names of its tensors")
        for name, tensor in own.items():
            again = load_offloaded_parameter(found, name) if there[name].is_meta else there[name]
            check(again.shape == tensor.shape, f"the shape of {name}")
            check(again.dtype in (tensor.dtype, torch.float32), f"the type of {name}")  # fp32: see `models.load`
            check(torch.equal(_bytes(again.to(tensor.dtype)), _bytes(tensor.cpu())), name)
    types, files = {tensor.dtype for tensor in own.values()}, list(folder.glob("*.safetensors"))
    stored = {name: kind for file in files for name, kind in stored_weights.stored_types(file).items()}
    for name, kind in stored.items():  # what was loaded was converted to the type that the configuration names
        check(kind in types, f"the type of {name}")
    other = _other_setting(folder, model.config) or _other_reading(folder, tokenizer)
    check(not other, other)
    return len(stored), sum(file.stat().st_size for file in files)


def _other_setting(folder, config):
    """What of `config` the folder's config.json does not give, for the reader; None if it gives all."""
    from transformers import AutoConfig

    apart = source.CODE | {"_name_or_path", "transformers_version"}
    try:
        again = AutoConfig.from_pretrained(folder).to_dict()
    except Exception as error:  # of settings that contradict, transformers makes errors of any kind
        return f"its configuration ({' '.join(str(error).split())[:100]})"
    names = (name for name, value in config.to_dict().items() if name not in apart and again.get(name) != value)
    return next((f"{name} of its configuration" for name in names), None)


def _other_reading(folder, tokenizer):
    """What the folder's tokenizer reads otherwise than `tokenizer`, for the reader; None if nothing."""
    from transformers import AutoTokenizer

    again = AutoTokenizer.from_pretrained(folder)
    same = tokenizing.probed(again.encode) == tokenizing.probed(tokenizer.encode)
    same &= again.special_tokens_map == tokenizer.special_tokens_map and again.chat_template == tokenizer.chat_template
    return None if same else "its tokenizer"


def _write_json(file, content):
    """Write settings, but for those that name code."""
    content = {name: value for name, value in content.items() if name not in source.CODE}
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _bytes(tensor):
    return tensor.reshape(-1).view(torch.uint8)
