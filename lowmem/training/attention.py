"""Attention within each row of a line, and whether a model can be trained on lines at all."""

import inspect
from contextlib import ExitStack
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch.nn.attention import varlen

from lowmem.training import models, parallel, records
from lowmem.training.data import Data
from lowmem.training.errors import what_ran_out
from lowmem.training.layouts import Lines
from lowmem.training.models import CausalLM

NAME = "within_rows"  # under which transformers knows `attend_within_rows`


def gqa_of(signature: inspect.Signature) -> dict[str, bool]:
    """What `varlen_attn` of that signature is to be told of fewer key heads; torch 2.11 takes them untold."""
    return {"enable_gqa": True} if "enable_gqa" in signature.parameters else {}


GQA = gqa_of(inspect.signature(varlen.varlen_attn))  # asked once, not by each layer of each step
KEPT_APART = 0.01  # of a hidden state's length; 0 where rows are kept apart: the same kernels on the same numbers
IN_PLACE = 0.05  # of its length, by each layer: room for bf16's rounding by other kernels, which adds up over layers


def attend_within_rows(
    module: torch.nn.Module,
    query: torch.Tensor,  # [1, heads, length, width]
    key: torch.Tensor,  # [1, key heads, length, width]
    value: torch.Tensor,  # [1, key heads, length, width]
    attention_mask: None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,  # int32: `Batch.row_starts`
    max_length_q: int = 0,  # `Batch.longest`
    **others,
) -> tuple[torch.Tensor, None]:
    """([1, length, heads, width], None): causal attention of each token to its own row, of a model of transformers.

    On a GPU by FlashAttention (Dao 2023), through torch's varlen_attn. Raises NotImplementedError for what that lacks.
    """
    softcap, sinks = (others.get(name) is not None for name in ("softcap", "s_aux"))
    lacking = {"an attention mask": attention_mask is not None, "dropout in attention": dropout > 0}
    lacking |= {"soft-capping in attention": softcap, "attention sinks": sinks}
    lacking |= {"attention that is not told where rows start": cu_seq_lens_q is None}
    if wanted := [what for what, asked in lacking.items() if asked]:
        raise NotImplementedError(wanted[0])
    attend = _attend_on_gpu if query.is_cuda else _attend_on_cpu
    return attend(query, key, value, scaling, sliding_window, cu_seq_lens_q, max_length_q), None


def _attend_on_gpu(query, key, value, scale, window, row_starts, longest):
    if torch.is_autocast_enabled("cuda"):
        query, key, value = (x.to(torch.get_autocast_dtype("cuda")) for x in (query, key, value))
    query, key, value = (x.transpose(1, 2).squeeze(0) for x in (query, key, value))
    window = (-1 if window is None else window - 1, 0)  # to the left of a token, to its right
    out = varlen.varlen_attn(
        query, key, value, row_starts, row_starts, longest, longest, scale=scale, window_size=window, **GQA
    )
    return out[None]


def _attend_on_cpu(query, key, value, scale, window, row_starts, longest):
    rows = []
    for start, end in pairwise(row_starts.tolist()):
        q, k, v = (x[:, :, start:end] for x in (query, key, value))
        mask, length = None, end - start
        if window is not None and window < length:
            mask = torch.ones(length, length, dtype=torch.bool).tril().triu(1 - window)
        rows.append(
            F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
            )
        )
    return torch.cat(rows, 2).transpose(1, 2)


def choose_layout(lm: CausalLM, data: Data) -> None:
    """Set data.layout to `Lines` if the model's layers keep rows apart in a line; otherwise rows stay padded.

    Tried out with the layers that there are: the first ones are enough, if each kind is among them. Raises UserError if
    rows change each other in either.
    """
    models.require_one_rotation(lm.network, data.longest())
    padded, before = data.layout, lm.network.config.get_text_config()._attn_implementation
    why_not = "attention is not PyTorch's" if not before.startswith("sdpa") else _why_no_lines(lm, data)
    why_not = next(filter(None, parallel.gather_objects(why_not)), None)  # all ranks alike
    parallel.reshard(lm.network)
    if why_not:
        data.layout = padded
        lm.network.set_attn_implementation(before)
    records.say("batches", f"{data.layout.NAME}: {why_not}" if why_not else f"{data.layout.NAME}, without padding")


def _why_no_lines(lm, data):
    """Why the model cannot take lines, or None; leaves data.layout and the model's attention set to them."""
    from transformers import AttentionInterface

    used, windows = set(), set()

    def record(module, *args, sliding_window=None, **kwargs):
        used.add(module)
        windows.add(sliding_window)
        return attend_within_rows(module, *args, sliding_window=sliding_window, **kwargs)

    padded, _ = _hidden_states(lm, data.small())
    data.layout = Lines(**vars(data.layout))
    batch = data.small()
    AttentionInterface.register(NAME, record)
    lm.network.set_attn_implementation(NAME)
    try:
        in_line, before = _hidden_states(lm, batch)
        changed, same = models.change_first_row(batch, lm.network)
        _, after = _hidden_states(lm, changed)
        _hidden_states(lm, batch, training=True)  # where there may be dropout
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        if what_ran_out(error):
            raise
        return " ".join(str(error).split())[:100]
    finally:
        AttentionInterface.register(NAME, attend_within_rows)
    if not all(used.intersection(layer.modules()) for layer in lm.layers):
        return "not every layer is plain attention"
    if not (_apart(before[same], after[same]) <= KEPT_APART).all():
        return "a layer sees across rows"
    apart = torch.stack([_apart(*states) for states in zip(padded, in_line, strict=True)])
    if not (apart.diff(dim=0, prepend=torch.zeros_like(apart[:1])) <= IN_PLACE).all():
        return "a row's place in a line changes it"
    if missing := models.windows_below(lm.network, data.longest()) - windows:
        return f"attention does not say its window of {missing.pop()} tokens"
    return None


@torch.no_grad()
def _hidden_states(lm, batch, training=False):
    """(those of the batch's targets behind each layer and behind all, [fp32 [n, width]]; all at the end, fp32 [rows *
    length, width]).

    Layers in the order of running; without those whose states are not [rows, length, width] (Gemma 3n's).
    """
    batch, of_targets = batch.to(lm.device), []

    def keep(layer, args, out):
        out = out[0] if isinstance(out, tuple) else out
        if torch.is_tensor(out) and out.shape[:-1] == batch.ids.shape:
            of_targets.append(out.flatten(0, 1)[batch.indices].float())

    with models.mode(lm.network, training), lm.precision(), ExitStack() as hooks:
        for layer in dict.fromkeys(lm.layers):
            hooks.enter_context(layer.register_forward_hook(keep))
        states = lm.network.base_model(**batch.inputs(), use_cache=False).last_hidden_state.flatten(0, 1).float()
    return [*of_targets, states[batch.indices]], states


def _apart(a, b):
    """fp32 [n]: how far a row of b [n, width] is from that of a, as a part of its length."""
    return (a - b).norm(dim=1) / a.norm(dim=1).clamp_min(torch.finfo().tiny)
