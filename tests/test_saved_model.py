"""What is saved is what was trained, for transformers 4 and 5, and read back. python -m pytest tests/test_saved_model.py

The checks against the real transformers 4 need a folder that it is installed in, and skip themselves without:

    pip install --no-deps --target FOLDER "transformers==4.57.*" "tokenizers==0.22.*" "huggingface-hub==0.36.*"
    TRANSFORMERS_4=FOLDER python -m pytest tests/test_saved_model.py
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from conftest import TINY, make_model, make_tokenizer, many_rows
from safetensors.torch import load_file, save_file
from test_cli import both_scripts, weights
from test_damaged_input import change_json, change_weights, refused
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import common
import finetune_lowmem

MXFP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [16, 16]}


@pytest.fixture
def flags(dataset_folder, tmp_path):
    """flags(model) -> those of a short run."""

    def of(model):
        return [
            "--model", model, "--dataset", dataset_folder, "--output_dir", tmp_path / "runs", "--batch_size", 4,
            "--max_steps", 3, "--epochs", 1, "--lr", "1e-2",
        ]  # fmt: skip

    return of


def gold_nll(run):
    return [e["gold_nll"] for e in json.loads((run / "summary.json").read_text())["eval"]]


# ---------------------------------------------------------------------------------------------------------------------
# Quantised weights: trained and saved as whole ones. (folder with them, folder with the same as fp32)


def fp8(weight, rows, columns):
    """(e4m3 weight, fp32 scale of each block, fp32 weight that they mean) for blocks of rows x columns."""
    blocks = weight.float().unflatten(0, (-1, rows)).unflatten(2, (-1, columns))
    scale = blocks.abs().amax((1, 3), keepdim=True) / 448
    stored = (blocks / scale).to(torch.float8_e4m3fn)
    meant = (stored.float() * scale).flatten(2).flatten(0, 1)
    return stored.flatten(2).flatten(0, 1), scale[:, 0, :, 0], meant


def quantized_pair(folder, model, quantize, settings):
    """Save `model` to folder/plain and, as `quantize` stores a tensor, to folder/quantized.

    quantize: function(name, fp32 tensor) -> ({name: tensor} to store, fp32 tensor that they mean).
    """
    plain, quantized = folder / "plain", folder / "quantized"
    for where in (plain, quantized):
        model.save_pretrained(where)
        make_tokenizer().save_pretrained(where)
    stored, meant = {}, {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        some, meant[name] = quantize(name, tensor)
        stored |= some
    save_file({name: t.contiguous() for name, t in meant.items()}, plain / "model.safetensors", {"format": "pt"})
    save_file({name: t.contiguous() for name, t in stored.items()}, quantized / "model.safetensors", {"format": "pt"})
    change_json(quantized / "config.json", quantization_config=settings)
    return quantized, plain


def as_fp8_blocks(name, tensor, rows=16, columns=16):
    if "_proj" not in name or not name.endswith("weight"):
        return {name: tensor.bfloat16()}, tensor.bfloat16().float()
    stored, scale, meant = fp8(tensor, rows, columns)
    return {name: stored, name + "_scale_inv": scale}, meant


def as_fp8_tensors(name, tensor):
    """As Ministral 3: a scale for each tensor, and one of activations."""
    stored, meant = as_fp8_blocks(name, tensor, *tensor.shape)
    if len(stored) == 2:
        stored[name + "_scale_inv"] = stored[name + "_scale_inv"].squeeze()
        stored[name.replace("weight", "activation_scale")] = torch.tensor(1.0)
    return stored, meant


def as_mxfp4(name, tensor):
    """As gpt-oss: the experts' matrices in blocks of 32 of 4 bits, which have an exponent in common, over their rows."""
    if "experts" not in name or name.endswith("bias"):
        return {name: tensor.bfloat16()}, tensor.bfloat16().float()
    blocks = tensor.transpose(1, 2).unflatten(2, (-1, 32))  # [experts, out, blocks, 32]
    exponent = (blocks.abs().amax(3, keepdim=True) / 6).log2().ceil()
    codes = (blocks * (-exponent).exp2()).unsqueeze(-1).sub(MXFP4).abs().argmin(-1)
    meant = (MXFP4[codes] * exponent.exp2()).flatten(2).transpose(1, 2)
    packed = (codes[..., 0::2] + 16 * codes[..., 1::2]).to(torch.uint8)
    return {name + "_blocks": packed, name + "_scales": (exponent[..., 0] + 127).to(torch.uint8)}, meant


def tiny(config_class, **changes):
    torch.manual_seed(0)
    config = config_class(**(TINY | {"head_dim": 8} | changes))
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 4, "moe_intermediate_size": 32}
DEEPSEEK = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16,
    "num_key_value_heads": 4, "head_dim": 16,
}  # fmt: skip
OSS = {"num_local_experts": 4, "num_experts_per_tok": 4, "sliding_window": 16}
QUANTIZED = {
    "fp8, blocks": (lambda: make_model("qwen3"), as_fp8_blocks, FP8),
    "fp8, tensors": (lambda: make_model("llama-tied"), as_fp8_tensors, FP8 | {"activation_scheme": "static", "weight_block_size": None}),
    "fp8, experts": (lambda: tiny(transformers.Qwen3MoeConfig, **EXPERTS), as_fp8_blocks, FP8),
    "fp8, a bias kept in fp32": (lambda: tiny(transformers.DeepseekV3Config, **DEEPSEEK), as_fp8_blocks, FP8),
    "mxfp4, experts": (lambda: tiny(transformers.GptOssConfig, **OSS), as_mxfp4, {"quant_method": "mxfp4"}),
}  # fmt: skip


def saved_dtype(name, dtype):
    """That of a tensor in a saved model of `dtype`."""
    return torch.float32 if name.endswith("e_score_correction_bias") else dtype


@both_scripts
@pytest.mark.parametrize("kind", QUANTIZED)
def test_quantized_weights_train_and_are_saved_as_the_whole_ones_that_they_mean(
    kind, script, commands, flags, tmp_path
):
    """Bit for bit, also what is saved, as a model that was never quantised."""
    make, quantize, settings = QUANTIZED[kind]
    quantized, plain = quantized_pair(tmp_path, make(), quantize, settings)
    said = {}
    for model in (quantized, plain):
        code, said[model], err = commands.run(script, "--run-name", model.name, *flags(model))
        assert code == 0, err
    dtype = torch.float32 if script == "finetune_base" else torch.bfloat16
    assert f"are stored as {settings['quant_method']}; trained and saved are whole ones, {dtype}" in said[quantized]
    runs = tmp_path / "runs"
    saved, expected = weights(runs / "quantized" / "model"), weights(runs / "plain" / "model")
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in saved)
    assert all(tensor.dtype == saved_dtype(name, dtype) for name, tensor in saved.items())
    assert gold_nll(runs / "quantized") == gold_nll(runs / "plain")
    assert not common.QUANTIZATION & json.loads((runs / "quantized" / "model" / "config.json").read_text()).keys()
    assert commands.run(script, "--run-name", "again", *flags(runs / "quantized" / "model"), "--epochs", 0)[0] == 0
    assert gold_nll(runs / "again")[0] == gold_nll(runs / "quantized")[-1]


def by_bitsandbytes(plain, folder, bits):
    settings = transformers.BitsAndBytesConfig(**{f"load_in_{bits}bit": True}, bnb_4bit_quant_type="nf4")
    transformers.AutoModelForCausalLM.from_pretrained(
        plain, quantization_config=settings, dtype=torch.bfloat16, device_map={"": "cpu"}
    ).save_pretrained(folder)


def by_compressed_tensors(plain, folder, bits):
    from compressed_tensors import quantization
    from compressed_tensors.compressors import ModelCompressor

    kind = {"group_size": 32, "strategy": "group"} if bits == 4 else {"strategy": "channel"}
    weights = quantization.QuantizationArgs(num_bits=bits, type="int", symmetric=True, **kind)
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=weights)
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


@both_scripts
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("quantize", [by_bitsandbytes, by_compressed_tensors])
def test_what_other_packages_quantized_is_made_whole(quantize, bits, script, commands, flags, tmp_path):
    model, plain = tmp_path / "model", tmp_path / "plain"
    make_model(hidden_size=128, intermediate_size=256).save_pretrained(plain)
    quantize(plain, model, bits)
    make_tokenizer().save_pretrained(model)
    code, out, err = commands.run(script, "--run-name", "x", *flags(model), "--epochs", 0)
    assert code == 0, err
    assert (
        f"are stored as {quantize.__name__.removeprefix('by_').replace('_', '-')}; trained and saved are whole" in out
    )
    saved, before = weights(tmp_path / "runs" / "x" / "model"), weights(plain)
    assert saved.keys() == before.keys()
    assert {t.dtype for t in saved.values()} == {torch.float32 if script == "finetune_base" else torch.bfloat16}
    errors = {n: ((saved[n].float() - t).norm() / t.norm()).item() for n, t in before.items() if "proj" in n}
    assert all(0 < error < {4: 0.2, 8: 0.02}[bits] for error in errors.values())  # seen: 0.10 and 0.008 at most
    assert not common.QUANTIZATION & json.loads((tmp_path / "runs" / "x" / "model" / "config.json").read_text()).keys()
    assert commands.run(script, "--run-name", "y", *flags(model))[0] == 0


NO_WAY_BACK = {
    "gptq": ({"quant_method": "gptq", "bits": 4}, "is stored quantised as gptq, which transformers cannot turn back"),
    "awq": ({"quant_method": "awq", "bits": 4}, "is stored quantised as awq, which transformers cannot turn back"),
    "torchao": (
        {"quant_method": "torchao", "quant_type": "int4_weight_only"},
        "is stored quantised as torchao, which transformers cannot turn back",
    ),
    "unknown": ({"quant_method": "int3000"}, "is stored quantised as int3000, which transformers cannot turn back"),
    "unnamed": ({"bits": 4}, "is stored quantised as None, which transformers cannot turn back"),
}


@both_scripts
@pytest.mark.parametrize("kind", NO_WAY_BACK)
def test_weights_that_cannot_be_made_whole_are_refused_by_name(kind, script, commands, flags, model_folder, tmp_path):
    settings, message = NO_WAY_BACK[kind]
    shutil.copytree(model_folder(), tmp_path / "model")
    change_json(tmp_path / "model" / "config.json", quantization_config=settings)
    assert message in refused(commands, script, "--run-name", "x", *flags(tmp_path / "model"))


@both_scripts
def test_a_scale_that_is_missing_or_not_announced_is_refused(script, commands, flags, tmp_path):
    """Without it a weight would mean something else, silently."""
    name = "model.layers.1.mlp.up_proj.weight"
    quantized, _ = quantized_pair(tmp_path, make_model(), as_fp8_blocks, FP8)
    change_weights(quantized, lambda w: w.pop(name + "_scale_inv"))
    (quantized / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "not-there.safetensors"}}'
    )  # not read
    said = refused(commands, script, "--run-name", "x", *flags(quantized))
    assert f"is damaged: {name} is stored in FP8 without a scale" in said
    change_json(quantized / "config.json", quantization_config=...)
    said = refused(commands, script, "--run-name", "x", *flags(quantized))
    assert "proj.weight_scale_inv, which LlamaForCausalLM does not know, beside weights that it uses" in said


def test_host_memory_for_making_weights_whole_is_checked_before(tmp_path, monkeypatch):
    quantized, _ = quantized_pair(tmp_path, make_model(), as_fp8_blocks, FP8)
    monkeypatch.setattr(common, "free_host_memory", lambda: 1000)
    with pytest.raises(common.UserError, match="is not stored in bf16 but as fp8: to convert it takes 0.0 GiB of host"):
        finetune_lowmem.check_host_memory(quantized, budget=2**40)


# ---------------------------------------------------------------------------------------------------------------------
# Read back


def in_saved_model(code):
    """Code for `first`: `code`, one line, runs on the `folder` of the saved model before that is read back."""
    return (
        "import common, json, sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "plain = common.save_model\n"
        "def save_model(folder, *args):\n"
        "    from test_damaged_input import change_json, change_weights, cut, flip\n"
        "    plain(folder, *args)\n"
        f"    {code}\n"
        "common.save_model = save_model"
    )


UP = "model.layers.1.mlp.up_proj.weight"
NOT_AS_TRAINED = {
    "a flipped bit": ("flip(folder / 'model.safetensors', 0.9)", "differs"),
    "a value": (f"change_weights(folder, lambda w: w['{UP}'][0, 0].add_(1))", f"{UP} differs"),
    "two layers swapped": (f"change_weights(folder, lambda w: w.update({{'{UP}': w['{UP}'.replace('1', '0')].clone()}}))", f"{UP} differs"),
    "a tensor missing": (f"change_weights(folder, lambda w: w.pop('{UP}'))", "the names of its tensors differs"),
    "a tensor too many": (f"change_weights(folder, lambda w: w.update({{'more': w['{UP}'].clone()}}))", "the names of its tensors differs"),
    "another shape": (f"change_weights(folder, lambda w: w.update({{'{UP}': w['{UP}'][:32].clone()}}))", "the shape of"),
    "another type": (f"change_weights(folder, lambda w: w.update({{'{UP}': w['{UP}'].double()}}))", f"the type of {UP} differs"),
    "another configuration": ("change_json(folder / 'config.json', rms_norm_eps=1e-3)", "rms_norm_eps of its configuration differs"),
    "another tokenizer": ("from conftest import make_tokenizer; make_tokenizer(bos=True).save_pretrained(folder)", "its tokenizer differs"),
    "a file cut": ("cut(folder / 'model.safetensors')", "cannot be read back"),
    "no configuration": ("(folder / 'config.json').unlink()", "cannot be read back"),
}  # fmt: skip


@both_scripts
@pytest.mark.parametrize("damage", NOT_AS_TRAINED)
def test_a_saved_model_that_is_not_what_was_trained_ends_the_run(
    damage, script, commands, flags, model_folder, tmp_path
):
    """Its checkpoint stays, from which the same command saves it again."""
    code, message = NOT_AS_TRAINED[damage]
    argv = ["--run-name", "x", *flags(model_folder())]
    rc, out, err = commands.run(script, *argv, first=in_saved_model(code))
    assert rc == 2, out
    last = err.strip().splitlines()[-1]
    assert last.startswith("error: the saved model ")
    assert message in last
    assert last.endswith("the same command with --resume goes on from step 3")
    names = {file.name.partition(".")[0] for file in (tmp_path / "runs" / "x").iterdir()}
    assert names == {"checkpoint", "config", "eval_epoch0", "eval_epoch1", "events", "metrics"}
    assert commands.run(script, *argv, "--resume")[0] == 0
    assert (tmp_path / "runs" / "x" / "model" / "config.json").exists()


@pytest.mark.parametrize("architecture", ["llama-tied", "mixtral", "gpt2"])
def test_reading_back_takes_one_tensor_at_a_time(architecture, model_folder, tmp_path, monkeypatch):
    """What is in host memory at once, beside the model itself, seen at what was read and is still alive."""
    import weakref

    from transformers.integrations import accelerate

    folder, alive, most = model_folder(architecture), weakref.WeakSet(), 0
    model, (tokenizer, _) = common.load_model(folder, torch.float32), common.load_tokenizer(folder)
    common.save_model(tmp_path / "saved", model, tokenizer, common.Source.of(folder))
    plain = accelerate.load_offloaded_parameter

    def load(found, name):
        nonlocal most
        tensor = plain(found, name)
        alive.add(tensor)
        most = max(most, len(alive))
        return tensor

    monkeypatch.setattr(accelerate, "load_offloaded_parameter", load)
    tensors, size = common.read_back(tmp_path / "saved", model, tokenizer)
    assert tensors == len(weights(tmp_path / "saved"))
    assert size > common.size_in_bytes(model.parameters())
    assert 1 <= most <= 2  # the last one lives until the next is there
    assert [f.name for f in tmp_path.iterdir()] == ["saved"]


@both_scripts
def test_what_was_read_back_is_said_and_kept(script, commands, flags, model_folder, tmp_path):
    _, out, _ = commands.run(script, "--run-name", "x", *flags(model_folder()))
    summary = json.loads((tmp_path / "runs" / "x" / "summary.json").read_text())
    assert summary["model_read_back"]["tensors"] == 21
    assert "the saved model, 21 tensors, 0.00 GiB, was read back as trained in" in out
    commands.run(script, "--run-name", "y", *flags(model_folder()), "--no_save_model")
    assert json.loads((tmp_path / "runs" / "y" / "summary.json").read_text())["model_read_back"] is None


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


def as_4_writes(folder, names):
    """Turn a folder that transformers 5 wrote into one of transformers 4."""
    more = {"rope_parameters": ..., "dtype": ..., "torch_dtype": "float32", "transformers_version": "4.45.0"}
    change_json(folder / "config.json", **more | names | ({"num_local_experts": ...} if "num_experts" in names else {}))
    of_5 = {"backend": ..., "is_local": ..., "local_files_only": ...}
    change_json(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast", **of_5)


@pytest.mark.parametrize("writer", [4, 5])
@pytest.mark.parametrize("name", NAMES_OF_4)
def test_the_configuration_has_the_names_of_both(name, writer, commands, flags, tmp_path):
    make, names = NAMES_OF_4[name]
    torch.manual_seed(0)
    model, config = tmp_path / "model", make()
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(model)
    make_tokenizer(bos=True).save_pretrained(model)
    if writer == 4:
        as_4_writes(model, names)
    assert commands.run("finetune_lowmem", "--run-name", "x", *flags(model))[0] == 0
    saved = tmp_path / "runs" / "x" / "model"
    content = json.loads((saved / "config.json").read_text())
    assert {key: content.get(key) for key in names} == names
    assert content["rope_parameters"] == config.rope_parameters
    assert content["dtype"] == content["torch_dtype"] == "bfloat16"
    assert transformers.AutoConfig.from_pretrained(saved).rope_parameters == config.rope_parameters
    tokenizer = json.loads((saved / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not {"backend", "is_local", "local_files_only"} & tokenizer.keys()


def test_what_5_reads_holds_against_other_names_in_the_source(model_folder, tmp_path):
    """As where a user changes one of two names, or leaves out what 5 takes for granted."""
    model, saved = tmp_path / "model", tmp_path / "saved"
    shutil.copytree(model_folder(), model)
    change_json(model / "config.json", rope_parameters={"rope_theta": 5e5}, rope_theta=7e5, compression_config={"x": 1})
    config, _ = common.read_config(str(model))
    tokenizer, _ = common.load_tokenizer(str(model))
    saved.mkdir()
    assert common.save_settings(saved, config, tokenizer, common.Source.of(str(model)))
    content = json.loads((saved / "config.json").read_text())
    assert (content["rope_theta"], content["rope_scaling"]) == (5e5, None)
    assert "compression_config" not in content


@pytest.mark.parametrize(
    "wrong",
    ["{'rope_scaling': {'rope_type': 'linear', 'factor': 3.0}}", "{'rope_scaling': {'rope_type': 'yarn'}, 'rope_theta': 'x'}"],
    ids=["another model", "none"],
)  # fmt: skip
def test_names_of_4_that_would_make_5_read_another_model_are_left_out(wrong, commands, flags, model_folder, tmp_path):
    first = f"import common; common.rope_of_4 = lambda rope: {wrong}"
    code, out, err = commands.run("finetune_lowmem", "--run-name", "x", *flags(model_folder()), first=first)
    assert code == 0, err
    assert "the saved model will be for transformers 5 alone" in out
    assert "rope_scaling" not in json.loads((tmp_path / "runs" / "x" / "model" / "config.json").read_text())


def test_a_model_that_only_transformers_5_knows_is_saved(commands, flags, tmp_path):
    """Gemma 4: a kind of RoPE and settings of layers by which no names of 4 can go."""
    config = transformers.Gemma4TextConfig(**TINY | {"head_dim": 8, "sliding_window": 16, "num_kv_shared_layers": 0})
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    code, out, err = commands.run("finetune_base", "--run-name", "x", *flags(tmp_path / "model"))
    assert code == 0, err
    assert "the saved model will be for transformers 5 alone" in out
    assert (
        transformers.AutoConfig.from_pretrained(tmp_path / "runs" / "x" / "model").rope_parameters
        == config.rope_parameters
    )


def test_of_a_source_with_pictures_too_the_text_s_part_is_taken():
    """As of Qwen3.5, whose text transformers loads alone."""
    config, text = transformers.LlamaConfig(**TINY), {"model_type": "llama", "rope_theta": 5e5, "house_style": "brick"}
    source = {"model_type": "pictures and text", "image_size": 28, "text_config": text}
    assert common.config_of_both(config, {"model_type": "llama", "dtype": "bfloat16"}, source) == text | {
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
    }
    del text["model_type"]  # as older ones
    assert common.config_of_both(config, {"model_type": "llama"}, text) == text | {"model_type": "llama"}


def metaspace_tokenizer(template=None):
    """As SentencePiece's: a space is part of the token behind it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    tokenizer.decoder = decoders.Metaspace()
    words = "Someone sees it. he takes the drum home. A man's 2 cats (x**2) sat.\nNaïve café, 東京 1234567\n"
    words += "".join(sorted({c for row in many_rows(60) for c in row["ctx"] + "".join(row["endings"])}))
    trainer = trainers.BpeTrainer(vocab_size=380, special_tokens=["<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator([words] * 9, trainer)
    if template:
        special_tokens = [("<s>", 0), ("</s>", 1)]
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=special_tokens)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@both_scripts
def test_a_tokenizer_that_could_not_be_read_again_is_refused_before_training(script, commands, flags, tmp_path):
    """transformers 5 reads each tokenizer of a Qwen2 as Qwen's own, whatever it is."""
    make_model("qwen2").save_pretrained(tmp_path / "model")
    metaspace_tokenizer().save_pretrained(tmp_path / "model")
    code, _, err = commands.run(script, "--run-name", "x", *flags(tmp_path / "model"))
    assert code == 2
    assert "cannot be saved so that transformers reads its tokenizer again as it is: choose another model" in err
    assert not (tmp_path / "runs").exists()
    assert commands.run(script, "--run-name", "y", *flags(tmp_path / "model"), "--no_save_model")[0] == 0


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
PROBE_OF_4 = """
import json, sys, torch, transformers
assert transformers.__version__.startswith("4."), transformers.__version__
transformers.logging.set_verbosity_error()
found = []
for folder in sys.argv[1:]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    read = transformers.AutoTokenizer.from_pretrained(folder)("Someone sees it. he takes the drum home.")
    with torch.no_grad():
        logits = model(**{name: torch.tensor([ids * 4]) for name, ids in read.items()}).logits
    found.append([read["input_ids"], logits.flatten().tolist()])
print(json.dumps(found))
"""


def read_by_4(*folders):
    environment = os.environ | {"PYTHONPATH": os.environ["TRANSFORMERS_4"]}
    command = [sys.executable, "-W", "ignore", "-c", PROBE_OF_4, *map(str, folders)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout)


@pytest.mark.skipif("TRANSFORMERS_4" not in os.environ, reason="TRANSFORMERS_4 names no folder with transformers 4")
@pytest.mark.parametrize("writer", [4, 5])
def test_transformers_4_itself_reads_the_same_model_and_ids(writer, tmp_path):
    saved, expected = [], []
    for name, (make, names) in NAMES_OF_4.items():
        torch.manual_seed(0)
        source = tmp_path / "source" / name
        transformers.AutoModelForCausalLM.from_config(make()).save_pretrained(source)
        make_tokenizer(bos=True).save_pretrained(source)
        if writer == 4:
            as_4_writes(source, names)
        model, (tokenizer, _) = common.load_model(source, torch.float32), common.load_tokenizer(source)
        saved.append(tmp_path / "saved" / name)
        common.save_model(saved[-1], model, tokenizer, common.Source.of(source))
        ids = tokenizer("Someone sees it. he takes the drum home.")["input_ids"]
        with torch.no_grad():
            expected.append((ids, model(input_ids=torch.tensor([ids * 4])).logits.flatten()))
    for folder, (ids, logits), (read_ids, read) in zip(saved, expected, read_by_4(*saved), strict=True):
        assert read_ids == ids, folder
        assert torch.tensor(read).sub(logits).abs().max() < 1e-4, folder  # seen: 2e-6
    if writer == 4:  # which reads the sources so, too
        for (read_ids, read), (ids, logits) in zip(
            read_by_4(*(tmp_path / "source" / n for n in NAMES_OF_4)), expected, strict=True
        ):
            assert (read_ids, torch.tensor(read).sub(logits).abs().max() < 1e-4) == (ids, True)


def test_transformers_4_itself_reads_the_ids_that_were_trained(tmp_path):
    if "TRANSFORMERS_4" not in os.environ:
        pytest.skip("TRANSFORMERS_4 names no folder with transformers 4")
    saved, expected, text = [], [], "Someone sees it. he takes the drum home."
    for name, (make, settings) in TOKENIZERS.items():
        source = tmp_path / "source" / name
        make_model().save_pretrained(source)
        make().save_pretrained(source)
        of_5 = {"backend": ..., "is_local": ..., "local_files_only": ...}
        change_json(source / "tokenizer_config.json", **of_5 | settings)
        model, (tokenizer, _) = common.load_model(source, torch.float32), common.load_tokenizer(source)
        saved.append(tmp_path / "saved" / name)
        common.save_model(saved[-1], model, tokenizer, common.Source.of(source))
        common.read_back(saved[-1], model, tokenizer)
        expected.append(tokenizer(text)["input_ids"])
    assert [ids for ids, _ in read_by_4(*saved)] == expected


# ---------------------------------------------------------------------------------------------------------------------
# What the saved folder takes from the source


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
def test_a_generation_config_keeps_what_is_valid(case, commands, flags, model_folder, tmp_path):
    given, kept, message = GENERATION[case]
    shutil.copytree(model_folder(), tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(given))
    code, out, err = commands.run("finetune_lowmem", "--run-name", "x", *flags(tmp_path / "model"))
    assert code == 0, err
    saved = json.loads((tmp_path / "runs" / "x" / "model" / "generation_config.json").read_text())
    assert {name: saved.get(name) for name in given | kept} == dict.fromkeys(given) | kept
    assert message in out if message else "contradicts" not in out


def test_settings_and_files_of_the_source_are_kept_but_what_names_code(commands, flags, model_folder, tmp_path):
    model = tmp_path / "model"
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
    code, out, err = commands.run("finetune_lowmem", "--run-name", "x", *flags(model))
    assert code == 0, err
    assert "the saved model will be without auto_map, custom_pipelines: no code is saved with it" in out
    saved = tmp_path / "runs" / "x" / "model"
    config, tokenizer = (json.loads((saved / f"{kind}.json").read_text()) for kind in ("config", "tokenizer_config"))
    assert not {"auto_map", "custom_pipelines"} & (config.keys() | tokenizer.keys())
    assert (config["pretraining_tp"], config["house_style"]) == (2, "brick")
    assert tokenizer["additional_special_tokens"] == ["<bos>"]
    assert (tokenizer["house_style"], "extra_special_tokens" in tokenizer) == ("brick", False)
    for kind in ("processor_config", "generation_config"):
        assert f"{kind}.json of {model} is damaged: the saved model leaves it out" in out
    assert not (saved / "processor_config.json").exists()
    assert transformers.AutoTokenizer.from_pretrained(saved).chat_template == "{{ messages }}"
    assert (saved / "tokenizer.model").read_bytes() == b"pieces"
    assert json.loads((saved / "preprocessor_config.json").read_text()) == {"size": 28}


MISREAD = {  # name in tokenizer_config.json: (class of transformers 5, tokenizer)
    "LlamaTokenizerFast": ("LlamaTokenizer", make_tokenizer),
    "GPT2TokenizerFast": ("GPT2Tokenizer", lambda: make_tokenizer(merge_across_words=True)),
}


@pytest.mark.parametrize("name", MISREAD)
def test_a_tokenizer_whose_class_misreads_its_file_is_read_as_the_file_says(name, commands, flags, tmp_path):
    """As DeepSeek's distilled Llamas, which lose all spaces so, and GPT-4o's, whose ids alone are others."""
    model, text = tmp_path / "model", "Someone sees it. he takes the drum home."
    read_as, make = MISREAD[name]
    make_model().save_pretrained(model)
    make().save_pretrained(model)
    change_json(model / "tokenizer_config.json", tokenizer_class=name)
    ids = Tokenizer.from_file(str(model / "tokenizer.json")).encode(text).ids
    assert transformers.AutoTokenizer.from_pretrained(model)(text, add_special_tokens=False)["input_ids"] != ids
    code, out, err = commands.run("finetune_lowmem", "--run-name", "x", *flags(model))
    assert code == 0, err
    assert f"the tokenizer of {model} is read as its tokenizer.json says, unlike {read_as} does" in out
    saved = transformers.AutoTokenizer.from_pretrained(tmp_path / "runs" / "x" / "model")
    assert saved(text)["input_ids"] == ids


def test_a_space_before_the_text_is_a_setting_not_a_misreading(model_folder, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(model_folder(), model)
    change_json(model / "tokenizer_config.json", tokenizer_class="GPT2TokenizerFast", add_prefix_space=True)
    tokenizer, _ = common.load_tokenizer(str(model))
    assert tokenizer("He")["input_ids"] == tokenizer(" He")["input_ids"]
    assert type(tokenizer).__name__ == "GPT2Tokenizer"
    assert not capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# What is missing, and what lies beside


def test_a_missing_package_is_named(commands, flags, model_folder, tmp_path):
    """And is no damage. Each as transformers says it where the package is not there."""
    model = tmp_path / "model"
    shutil.copytree(model_folder(), model)
    (model / "tokenizer.model").write_bytes(b"pieces")
    said = {
        "sentencepiece": "ValueError('`tiktoken` is required to read a `tiktoken` file. Install it with `pip install tiktoken`.')",
        "'bitsandbytes>=0.46.1'": "ImportError('Using `bitsandbytes` 4-bit quantization requires bitsandbytes: `pip install -U bitsandbytes>=0.46.1`')",
        "'compressed-tensors>=0.15.0'": "ImportError('requires compressed-tensors>=0.15.0: `pip install compressed-tensors>=0.15.0`')",
        "compressed_tensors": "ModuleNotFoundError(\"No module named 'compressed_tensors'\", name='compressed_tensors')",
        "flash-attn": "ImportError(\"FlashAttention2 has been toggled on, but it cannot be used due to the following error: the package for FlashAttention2 doesn't seem to be installed.\")",
        "flash-attn-4": "ImportError(\"FlashAttention4 has been toggled on, but it cannot be used due to the following error: the package for FlashAttention4 doesn't seem to be installed.\")",
        "kernels==0.16.0": "ImportError('`kernels` is either not installed or uses an incompatible version. Please install a compatible version (0.16.0 <= version < 0.17.0), e.g. `pip install kernels==0.16.0`')",
        "protobuf": "ImportError('X requires the protobuf library but it was not found in your environment.')",
    }  # fmt: skip
    for package, error in said.items():
        first = "import importlib.util, transformers\n"
        first += "find = importlib.util.find_spec\n"
        first += "importlib.util.find_spec = lambda name, *a: None if name == 'sentencepiece' else find(name, *a)\n"
        first += f"def fail(*_, **__):\n    raise {error}\n"
        first += "transformers.AutoTokenizer.from_pretrained = fail"
        code, _, err = commands.run("finetune_lowmem", "--run-name", "x", *flags(model), first=first)
        assert code == 2
        line = err.strip().splitlines()[-1]
        assert line == f"error: model {model} needs a package that is not installed: pip install {package}"
    (model / "tokenizer.model").unlink()
    first = first.replace(error, said["sentencepiece"])
    _, _, err = commands.run("finetune_lowmem", "--run-name", "x", *flags(model), first=first)
    assert "its files are damaged" in err  # the tokenizer is not there: no package helps


def test_a_missing_package_is_named_by_the_real_libraries_too(commands, flags, model_folder, tmp_path):
    """Those that requirements.txt does not have; what is installed here all the same is not asked for."""
    from importlib.util import find_spec

    model = tmp_path / "model"
    shutil.copytree(model_folder(), model)
    config = (model / "config.json").read_text()
    cases = {
        "compressed_tensors": {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": {}}},
        "bitsandbytes": {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        "flash_attn": {"attn_implementation": "flash_attention_2"},
        "kernels": {"attn_implementation": "kernels-community/flash-attn3"},
    }
    cases = {package: changes for package, changes in cases.items() if not find_spec(package)}
    assert cases, "none of the packages is missing here"
    for package, changes in cases.items():
        (model / "config.json").write_text(config)
        change_json(model / "config.json", **changes)
        line = refused(commands, "finetune_lowmem", "--run-name", "x", *flags(model))
        assert "needs a package that is not installed: pip install " in line
        assert package in line.replace("-", "_")


def test_lora_weights_beside_full_ones_are_not_used_and_that_is_said(commands, flags, model_folder, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(model_folder(), model)
    (model / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8}')
    save_file({"base_model.model.x.lora_A.weight": torch.zeros(8, 8)}, model / "adapter_model.safetensors")
    without_peft = "import importlib.util\nfind = importlib.util.find_spec\n"
    without_peft += "importlib.util.find_spec = lambda name, *a: {} if name == 'peft' else find(name, *a)"
    code, out, _ = commands.run("finetune_lowmem", "--run-name", "x", *flags(model), first=without_peft.format(None))
    assert code == 0
    said = f"the LoRA weights in {model} (adapter_config.json) are not used, only the full ones beside them"
    assert said in out
    code, _, err = commands.run(
        "finetune_lowmem", "--run-name", "y", *flags(model), first=without_peft.format("object()")
    )
    assert code == 2
    assert f"{model} holds LoRA weights (adapter_config.json) beside full ones, and cannot be trained with both" in err
    hub = tmp_path / "hub" / "models--me--lora"  # as a cache has a model of the hub
    shutil.copytree(model, hub / "snapshots" / "1")
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("1")
    first = f"import huggingface_hub.constants as c; c.HF_HUB_CACHE = {str(hub.parent)!r}\n" + without_peft.format(None)
    code, out, err = commands.run("finetune_lowmem", "--run-name", "h", *flags("me/lora"), first=first)
    assert code == 0, err
    assert said.replace(str(model), "me/lora") in out
    (model / "model.safetensors").unlink()
    assert "holds LoRA weights alone: merge them" in refused(
        commands, "finetune_lowmem", "--run-name", "z", *flags(model)
    )


# ---------------------------------------------------------------------------------------------------------------------
# The layers of the text


def pictures_and_text(folder):
    """A Gemma 3 with a vision tower of as many layers as the text has."""
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28, "patch_size": 14}  # fmt: skip
    text = TINY | {"head_dim": 8, "sliding_window": 16}
    tokens = {"mm_tokens_per_image": 4, "image_token_index": 5, "boi_token_index": 3, "eoi_token_index": 4}
    torch.manual_seed(0)
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, **tokens)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@both_scripts
@pytest.mark.parametrize("trained", ["layers", "all"])
def test_of_a_model_of_pictures_and_text_the_text_is_trained(trained, script, commands, flags, tmp_path):
    model = pictures_and_text(tmp_path / "model")
    code, _, err = commands.run(script, "--run-name", "x", *flags(model), "--trained", trained)
    assert code == 0, err
    before, after = weights(model), weights(tmp_path / "runs" / "x" / "model")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name].to(after[name].dtype), after[name])}
    text = {name for name in before if "language_model" in name}
    layers = {name for name in text if ".layers." in name}
    assert changed == layers if trained == "layers" else layers < changed <= text
    nll = gold_nll(tmp_path / "runs" / "x")
    assert nll[1] < nll[0]


@both_scripts
def test_layers_that_may_be_skipped_are_refused_by_name(script, commands, flags, tmp_path):
    opt = {"ffn_dim": 64, "word_embed_proj_dim": 32, "do_layer_norm_before": True, "layerdrop": 0.5}
    bart = {
        "d_model": 32,
        "decoder_layers": 2,
        "decoder_ffn_dim": 64,
        "decoder_attention_heads": 4,
        "decoder_layerdrop": 0.1,
        "encoder_layerdrop": 0.1,  # of no encoder that is here
    }
    for config in (transformers.OPTConfig(**TINY | opt), transformers.BartConfig(**TINY | bart)):
        model, name = tmp_path / config.model_type, "layerdrop" if config.model_type == "opt" else "decoder_layerdrop"
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(model)
        make_tokenizer().save_pretrained(model)
        line = refused(commands, script, "--run-name", "x", *flags(model))
        assert f"is not supported while it skips layers at random: set {name} to 0 in its config.json" in line
    change_json(tmp_path / "opt" / "config.json", layerdrop=0.0)
    assert commands.run(script, "--run-name", "y", *flags(tmp_path / "opt"))[0] == 0


@both_scripts
def test_layers_that_do_not_run_are_refused_by_name(script, commands, flags, model_folder):
    """Whatever else is taken for the decoder's layers."""
    first = "import common, torch\n"
    first += "plain = common.load_model\n"
    first += "def load_model(*args):\n"
    first += "    model = plain(*args)\n"
    first += "    model.base_model.get_decoder = lambda: other\n"
    first += "    other = model.base_model.tower = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(2))\n"
    first += "    return model\n"
    first += "common.load_model = load_model"
    code, _, err = commands.run(script, "--run-name", "x", *flags(model_folder()), first=first)
    assert code == 2
    assert "what is taken for its decoder layers does not all run on text" in err
