"""Quantised checkpoints: a folder with them, and a folder with the same as whole weights."""

import torch
import transformers
from safetensors.torch import load_file, save_file

from support.damage import change_json
from support.tiny import TINY, make_model, make_tokenizer

MXFP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [16, 16]}


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
