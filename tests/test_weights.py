"""Weights as the files of a model mean them, and its generation settings. python -m pytest tests/test_weights.py"""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.damage import change_json, change_weights
from support.quantized import FP8, QUANTIZED, as_fp8_blocks, quantized_pair, saved_dtype
from support.runs import weights as saved_weights
from support.saving import save_again
from support.tiny import make_model, make_tokenizer

from lowmem import placement
from lowmem.training import memory, source, weights
from lowmem.training.errors import UserError

UP = "model.layers.1.mlp.up_proj.weight"


def has_no_quantization(folder):
    return not source.QUANTIZATION & json.loads((folder / "config.json").read_text()).keys()


# ---------------------------------------------------------------------------------------------------------------------
# Quantised weights: trained and saved as whole ones


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", QUANTIZED)
def test_quantized_weights_are_loaded_and_saved_as_the_whole_ones_that_they_mean(kind, dtype, tmp_path, capsys):
    """Bit for bit, in a model of the same modules and buffers as one that was never quantised."""
    make, quantize, settings = QUANTIZED[kind]
    quantized, plain = quantized_pair(tmp_path, make(), quantize, settings)
    (found, _), said = save_again(quantized, tmp_path / "saved", dtype), capsys.readouterr().out
    assert f"are stored as {settings['quant_method']}; trained and saved are whole ones, {dtype}" in said
    (expected, _), said = save_again(plain, tmp_path / "expected", dtype), capsys.readouterr().out
    assert "are stored as" not in said
    for kept in ("named_parameters", "named_buffers"):
        own, whole = (dict(getattr(network, kept)()) for network in (found, expected))
        assert own.keys() == whole.keys()
        assert all(torch.equal(own[name], whole[name]) for name in whole)
        assert all(own[name].dtype == whole[name].dtype for name in whole)
    assert [type(module) for module in found.modules()] == [type(module) for module in expected.modules()]
    saved, meant = (saved_weights(tmp_path / folder) for folder in ("saved", "plain"))
    assert saved.keys() == meant.keys()
    assert all(torch.equal(saved[name], meant[name].to(saved_dtype(name, dtype))) for name in meant)
    assert has_no_quantization(tmp_path / "saved")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "script"), [("fp8, tensors", "finetune_base"), ("mxfp4, experts", "finetune_lowmem")]
)  # a tied head; merged experts
def test_quantized_weights_train_as_the_whole_ones_do(kind, script, run, tmp_path):
    """Bit for bit, and what is saved scores again what the run says."""
    make, quantize, settings = QUANTIZED[kind]
    flags = "--batch_size", 4, "--max_steps", 3, "--epochs", 1, "--eval_rows", 8
    (one, first), (other, second) = (
        run(script, f"from-{model.name}", *flags, model=model)
        for model in quantized_pair(tmp_path, make(), quantize, settings)
    )
    assert one["eval"] == other["eval"]
    saved, expected = saved_weights(first / "model"), saved_weights(second / "model")
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in saved)
    again, _ = run(script, "again", *flags, "--epochs", 0, model=first / "model")
    assert again["eval"][0]["gold_nll"] == one["eval"][-1]["gold_nll"]


def by_bitsandbytes(plain, folder, bits):
    settings = transformers.BitsAndBytesConfig(**{f"load_in_{bits}bit": True}, bnb_4bit_quant_type="nf4")
    transformers.AutoModelForCausalLM.from_pretrained(
        plain, quantization_config=settings, dtype=torch.bfloat16, device_map={"": "cpu"}
    ).save_pretrained(folder)


def by_compressed_tensors(plain, folder, bits):
    from compressed_tensors import quantization
    from compressed_tensors.compressors import ModelCompressor

    kind = {"group_size": 32, "strategy": "group"} if bits == 4 else {"strategy": "channel"}
    arguments = quantization.QuantizationArgs(num_bits=bits, type="int", symmetric=True, **kind)
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=arguments)
    layout = "pack-quantized" if bits == 4 else "int-quantized"
    settings = quantization.QuantizationConfig(
        config_groups={"all": scheme}, ignore=["lm_head"], format=layout, quantization_status="compressed"
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(plain, dtype=torch.bfloat16)
    quantization.apply_quantization_config(model, settings)
    for module in model.modules():
        if hasattr(module, "quantization_scheme"):
            blocks = module.weight.float().unflatten(1, (-1, 32) if bits == 4 else (1, -1))
            module.weight_scale.data = (blocks.abs().amax(2) / (2 ** (bits - 1) - 1)).bfloat16()
            module.quantization_status = quantization.QuantizationStatus.FROZEN
    compressor = ModelCompressor.from_pretrained_model(model, quantization_format=layout)
    compressor.compress_model(model)
    model.config.save_pretrained(folder)
    save_file(
        {k: v.contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors", {"format": "pt"}
    )
    kept = compressor.quantization_config.model_dump(mode="json") | {"quant_method": "compressed-tensors"}
    change_json(folder / "config.json", quantization_config=kept)


def quantized_by(quantize, bits, folder):
    """A model in folder/plain, and in folder/quantized as `quantize` stores it."""
    make_model(hidden_size=128, intermediate_size=256).save_pretrained(folder / "plain")
    quantize(folder / "plain", folder / "quantized", bits)
    make_tokenizer().save_pretrained(folder / "quantized")
    return folder / "quantized", folder / "plain"


by_others = pytest.mark.parametrize("quantize", [by_bitsandbytes, by_compressed_tensors])


@by_others
@pytest.mark.parametrize("bits", [4, 8])
def test_what_other_packages_quantized_is_made_whole(quantize, bits, tmp_path, capsys):
    model, plain = quantized_by(quantize, bits, tmp_path)
    save_again(model, tmp_path / "saved")
    kind = quantize.__name__.removeprefix("by_").replace("_", "-")
    assert f"are stored as {kind}; trained and saved are whole ones, torch.bfloat16" in capsys.readouterr().out
    saved, before = saved_weights(tmp_path / "saved"), saved_weights(plain)
    assert saved.keys() == before.keys()
    assert {t.dtype for t in saved.values()} == {torch.bfloat16}
    errors = {n: ((saved[n].float() - t).norm() / t.norm()).item() for n, t in before.items() if "proj" in n}
    assert all(0 < error < {4: 0.2, 8: 0.02}[bits] for error in errors.values())  # seen: 0.10 and 0.008 at most
    assert has_no_quantization(tmp_path / "saved")


@by_others
@pytest.mark.slow
def test_what_other_packages_quantized_trains(quantize, run, tmp_path):
    model, _ = quantized_by(quantize, 4, tmp_path)
    few = ["--train_rows", 32, "--eval_rows", 8, "--batch_size", 4, "--epochs", 1]
    summary, folder = run("finetune_base", "x", *few, model=model)
    assert summary["eval"][-1]["gold_nll"] < summary["eval"][0]["gold_nll"]
    assert {t.dtype for t in saved_weights(folder / "model").values()} == {torch.float32}


@pytest.mark.parametrize("settings", [{"quant_method": "gptq", "bits": 4}, {"quant_method": "int3000"}, {"bits": 4}])
def test_weights_that_cannot_be_made_whole_are_refused_by_name(settings, model_folder, tmp_path):
    shutil.copytree(model_folder(), tmp_path / "model")
    change_json(tmp_path / "model" / "config.json", quantization_config=settings)
    kind = settings.get("quant_method")
    with pytest.raises(UserError, match=f"is stored quantised as {kind}, which transformers cannot turn back"):
        weights.load(str(tmp_path / "model"), torch.bfloat16)


def test_a_scale_that_is_missing_or_not_announced_is_refused(tmp_path):
    """Without it a weight would mean something else, silently."""
    quantized, _ = quantized_pair(tmp_path, make_model(), as_fp8_blocks, FP8)
    change_weights(quantized, lambda w: w.pop(UP + "_scale_inv"))
    index = quantized / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "not-there.safetensors"}}')  # not read beside the file of all weights
    without_scale = f"is damaged: {UP} is stored in FP8 without a scale"
    with pytest.raises(UserError, match=without_scale):
        weights.load(str(quantized), torch.bfloat16)
    all_weights = load_file(quantized / "model.safetensors")
    (quantized / "model.safetensors").unlink()
    parts = {name: f"model-{number % 2}.safetensors" for number, name in enumerate(sorted(all_weights))}
    index.write_text(json.dumps({"metadata": {}, "weight_map": parts}))
    for file in set(parts.values()):
        save_file({n: t for n, t in all_weights.items() if parts[n] == file}, quantized / file, {"format": "pt"})
    with pytest.raises(UserError, match=without_scale):
        weights.load(str(quantized), torch.bfloat16)
    change_json(quantized / "config.json", quantization_config=...)
    message = "proj.weight_scale_inv, which LlamaForCausalLM does not know, beside weights that it uses"
    with pytest.raises(UserError, match=message):
        weights.load(str(quantized), torch.bfloat16)


def test_host_memory_for_making_weights_whole_is_checked_before(tmp_path, monkeypatch):
    quantized, _ = quantized_pair(tmp_path, make_model(), as_fp8_blocks, FP8)
    monkeypatch.setattr(memory, "free_host_memory", lambda: 1000)
    with pytest.raises(UserError, match="is not stored in bf16 but as fp8: to convert it takes 0.0 GiB of host memory"):
        placement.require_room(str(quantized), budget=2**40)


# ---------------------------------------------------------------------------------------------------------------------
# Tensors that are missing, or that the model does not use


def test_a_missing_tensor_is_refused_by_name(model_folder, tmp_path):
    """transformers would fill it with random numbers."""
    shutil.copytree(model_folder(), tmp_path / "model")
    change_weights(tmp_path / "model", lambda w: w.pop(UP))
    with pytest.raises(UserError, match=f"lack 1 tensors of the model, {UP} first"):
        weights.load(str(tmp_path / "model"), torch.bfloat16)


def test_tensors_that_the_model_does_not_use_are_named(model_folder, tmp_path, capsys):
    shutil.copytree(model_folder(), tmp_path / "model")
    change_json(tmp_path / "model" / "config.json", num_hidden_layers=1)
    network = weights.load(str(tmp_path / "model"), torch.bfloat16)
    assert f"the model does not use 9 tensors of {tmp_path / 'model'}, model.layers.1." in capsys.readouterr().out
    stored = saved_weights(model_folder())
    assert all(torch.equal(p, stored[name].bfloat16()) for name, p in network.state_dict().items())


# ---------------------------------------------------------------------------------------------------------------------
# Generation settings


GENERATION = {
    "temperature, nothing of sampling": (
        {"eos_token_id": [1, 2], "pad_token_id": 1, "temperature": 0.6, "top_p": 0.9, "max_length": 4096},
        {"eos_token_id": [1, 2], "pad_token_id": 1, "temperature": 0.6, "top_p": 0.9, "max_length": 4096, "do_sample": True},
        "contradicts itself, and is saved with do_sample true\n",
    ),
    "temperature, no sampling": (
        {"eos_token_id": [1, 2], "do_sample": False, "temperature": 0.6, "top_k": 20, "repetition_penalty": 1.1},
        {"eos_token_id": [1, 2], "do_sample": False, "repetition_penalty": 1.1},
        "contradicts itself, and is saved without temperature, top_k\n",
    ),
    "beams and sampling": (
        {"eos_token_id": 1, "temperature": 0.6, "early_stopping": True},
        {"eos_token_id": 1, "temperature": 0.6, "do_sample": True},
        "contradicts itself, and is saved with do_sample true without early_stopping\n",
    ),
    "what no setting would allow": (
        {"eos_token_id": [1, 2], "max_new_tokens": -1, "compile_config": {"fullgraph": True}},
        {"eos_token_id": [1, 2]},
        "contradicts itself, and is saved without compile_config, max_new_tokens\n",
    ),
    "code": ({"eos_token_id": [1, 2], "auto_map": {"x": "y.Z"}}, {"eos_token_id": [1, 2]}, None),
    "sound": ({"eos_token_id": [1, 2], "do_sample": True, "temperature": 0.6}, {"eos_token_id": [1, 2], "do_sample": True, "temperature": 0.6}, None),
}  # fmt: skip


@pytest.mark.parametrize("case", GENERATION)
def test_a_generation_config_keeps_what_is_valid(case, model_folder, tmp_path, capsys):
    given, kept, message = GENERATION[case]
    shutil.copytree(model_folder(), tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(given))
    save_again(tmp_path / "model", tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert {name: saved.get(name) for name in given | kept} == dict.fromkeys(given) | kept
    said = capsys.readouterr().out
    assert message in said if message else "contradicts" not in said
