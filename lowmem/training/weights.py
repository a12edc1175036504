"""The weights of a model: loaded as they are stored, converted, quantised ones made whole; its generation settings."""

import os
from pathlib import Path

import torch

from lowmem.training import memory, parallel, source
from lowmem.training.errors import UserError


def load(name: str, dtype: torch.dtype) -> torch.nn.Module:
    """The causal LM `name` (hub id or folder) with weights of `dtype`, in host memory. Raises UserError.

    Of several ranks each has the weights as they are stored: mapped, not read, except that transformers merges the
    matrices of experts into one, and quantised ones are made whole. `fsdp.shard` reads and converts its part.
    """
    from transformers import AutoModelForCausalLM

    if parallel.world_size() > 1:
        _check_conversions(name, dtype)
    with source.explain_loading("model", name):
        config, quantized = source.read_config(name)
        as_stored = parallel.world_size() > 1 and not quantized
        if as_stored:
            config.dtype = None  # what it says need not be what the files hold, and "auto" means it if it is there
        model, report = AutoModelForCausalLM.from_pretrained(
            name,
            config=config,
            dtype="auto" if as_stored else dtype,
            device_map={"": "cpu"} if quantized else None,  # bitsandbytes would take the GPU
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            generation_config=_generation_config(name),
        )
        if quantized:
            _check_scales(name)
            model = _whole(model, dtype)
        elif as_stored:
            _compute_buffers(model, dtype)
    model.config.dtype = dtype
    if missing := sorted(report["missing_keys"]):
        raise UserError(
            f"the weights of {name} lack {len(missing)} tensors of the model, {missing[0]} first: they would be random"
        )
    if unused := sorted(report["unexpected_keys"]):
        used = {parameter.rpartition(".")[0] for parameter, _ in model.named_parameters()}
        if beside := [tensor for tensor in unused if tensor.rpartition(".")[0] in used]:
            raise UserError(
                f"{name} holds {beside[0]}, which {type(model).__name__} does not know, beside weights that it uses: "
                "a scale or a bias, without which they may mean something else; choose a model that transformers knows"
            )
        print(f"the model does not use {len(unused)} tensors of {name}, {unused[0]} first")
    if quantized:
        print(f"the weights of {name} are stored as {quantized}; trained and saved are whole ones, {dtype}")
    if model.generation_config is not None:  # older models have its settings in config.json
        model.generation_config = _mended(model.generation_config.to_diff_dict()) or model.generation_config
    return model


def stand_in(name: str, dtype: torch.dtype) -> torch.nn.Module:
    """The causal LM `name` without its weights: they have their places in host memory, of which none is taken yet."""
    network, _ = source.empty_model(name, dtype)
    network.to_empty(device="cpu")
    network.tie_weights()
    _compute_buffers(network, dtype)
    return network


@torch.no_grad()
def randomise(network: torch.nn.Module) -> None:
    """Give all parameters random values that make finite numbers in a forward pass, drawn on a GPU if there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for p in network.parameters():
        p.copy_(torch.randn(p.shape, dtype=p.dtype, device=device) * 0.02 if p.ndim > 1 else torch.ones_like(p))


def _check_conversions(name, dtype):
    """Refuse a model of which what each rank makes in host memory of its own does not fit there: merged experts, or
    all weights where they are quantised.
    """
    model, stored = source.empty_model(name, dtype)
    quantized = isinstance(stored, str)
    made = sum(p.numel() for p in model.parameters() if p.ndim > 2 or quantized)
    size = made * (dtype if quantized else stored or dtype).itemsize
    count = int(os.environ["LOCAL_WORLD_SIZE"])
    what = "weights each of {} processes makes whole," if quantized else "experts each of {} processes merges,"
    memory.require_host_memory(count * size, f"{name}, whose {what.format(count)}")
    parallel.wait_for_all()  # before one takes of what another still has to find free


def _check_scales(name):
    """Refuse quantised weights without a scale: transformers takes what is stored of FP8 for the weight itself.

    To be called within `source.explain_loading`.
    """
    if whole := source.file(name, "model.safetensors"):  # which transformers takes first
        files = [whole]
    else:
        index = source.read_json(Path(source.file(name, "model.safetensors.index.json")))
        files = [source.file(name, file) for file in set(index["weight_map"].values())]
    types = {tensor: kind for file in files for tensor, kind in stored_types(file).items()}
    scaled = {tensor.rpartition(".")[0] for tensor in types if "scale" in tensor.rpartition(".")[2]}
    for tensor, kind in types.items():
        if "float8" in str(kind) and "scale" not in tensor and tensor.rpartition(".")[0] not in scaled:
            raise UserError(f"{name} is damaged: {tensor} is stored in FP8 without a scale; get it again")


def stored_types(file: str | Path) -> dict[str, torch.dtype]:
    """{name: dtype} of the tensors in a safetensors file, which are mapped, not read."""
    from safetensors import safe_open

    with safe_open(file, "pt") as tensors:
        return {name: tensors.get_tensor(name).dtype for name in tensors.keys()}  # noqa: SIM118 (it is no dict)


def _whole(model, dtype):
    """The weights of a model that was quantised, as `dtype` in one that never was. Raises UserError.

    The one that was keeps of it what would be saved with it: conversions, scales, modules. What transformers loads in
    fp32 whatever the dtype, as DeepSeek-V3's e_score_correction_bias, stays so. To be called within
    `source.explain_loading`.
    """
    if model.is_quantized:
        model = model.dequantize(dtype)
    whole, weights, made = _without_weights(model.config, dtype), model.state_dict(), {}
    for name, tensor in whole.state_dict().items():
        found = weights.get(name)
        if found is None or found.shape != tensor.shape or not found.is_floating_point() or found.itemsize < 2:
            kind = "missing" if found is None else f"{found.dtype} {tuple(found.shape)}"
            raise UserError(f"{type(model).__name__} cannot be trained: dequantised, its {name} is {kind}")
        made[name] = found.to(torch.promote_types(found.dtype, dtype))
    whole.load_state_dict(made, assign=True)
    whole.tie_weights()
    whole.generation_config = model.generation_config
    return whole.eval()


def _without_weights(config, dtype):
    """The model of a configuration as `dtype`, its parameters on the meta device, its buffers computed."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)


def _compute_buffers(model, dtype):
    """Make the buffers that are computed, not stored, as Gemma's embedding scale, those of a model built as `dtype`."""
    stored = model.state_dict(keep_vars=True)
    for name, buffer in _without_weights(model.config, dtype).named_buffers():
        if name not in stored:
            owner, _, own_name = name.rpartition(".")
            setattr(model.get_submodule(owner), own_name, buffer)


def _generation_config(name):
    """The mended GenerationConfig of `name`'s generation_config.json; None if nothing is to mend, or it is damaged."""
    file = source.file(name, "generation_config.json")
    try:
        return _mended(dict(source.read_json(Path(file)))) if file else None
    except (ValueError, TypeError):  # is said where settings are saved
        return None


def _mended(settings: dict):
    """The GenerationConfig of `settings` without what names code or contradicts; None if all can stay.

    Says what was set and what contradicts. What takes sampling (a temperature) is meant to be sampled with, unless
    do_sample says no.
    """
    from transformers import GenerationConfig

    given, settings = settings, {name: value for name, value in settings.items() if name not in source.CODE}
    if _can_be_saved(settings):
        return None if settings == given else GenerationConfig(**settings)
    if "do_sample" not in settings and any(
        _can_be_saved({name: value, "do_sample": True}) > _can_be_saved({name: value})
        for name, value in settings.items()
    ):
        settings["do_sample"] = True
    kept = {}
    for name in sorted(settings, key=lambda name: name not in ("do_sample", "num_beams")):  # what others need first
        if _can_be_saved(kept | {name: settings[name]}):
            kept[name] = settings[name]
    left_out = ", ".join(sorted(settings.keys() - kept.keys()))
    print(
        "the model's generation_config.json contradicts itself, and is saved"
        + " with do_sample true" * ("do_sample" in kept and "do_sample" not in given)
        + f" without {left_out}" * bool(left_out)
    )
    return GenerationConfig(**kept)


def _can_be_saved(settings):
    from transformers import GenerationConfig

    try:
        GenerationConfig(**settings).validate(strict=True)
    except (ValueError, TypeError, AttributeError):  # of a value of another type
        return False
    return True
