"""No training unless each technique is really active. python -m pytest tests/test_checks.py"""

import pytest
import torch
import torch.nn.functional as F
from support.tiny import ARCHITECTURES, make_model
from support.training import CPU, as_lm, checkpointed, make_batch

import finetune_lowmem
from lowmem import adafactor, checks, placement
from lowmem.adafactor import Adafactor
from lowmem.training.batches import Sequence
from lowmem.training.data import Data
from lowmem.training.errors import UserError

DATA = Data([Sequence.ending(list(range(5 + row, 30 + 3 * row)), 4 + row) for row in range(2)], [], max_tokens=128)


def start(architecture, trained="layers", rounding="stochastic"):
    """(CausalLM in bf16, optimizer, placement) as the script has them before its first step."""
    lm = as_lm(make_model(architecture).bfloat16(), trained, finetune_lowmem.precision)
    placed = placement.place_within(lm, placement.Plan(0, False), CPU)
    checkpointed(lm.network)
    optimizer = Adafactor(lm.trained.values(), lr=2e-2, rounding=rounding)
    finetune_lowmem.update_in_backward(optimizer, lm.trained)
    return lm, optimizer, placed


@pytest.mark.parametrize(
    ("architecture", "trained"),
    [*((architecture, "all") for architecture in ARCHITECTURES), ("llama", "layers"), ("llama-tied", "layers")],
)
def test_start_up_checks_pass_and_training_learns(architecture, trained):
    lm, optimizer, placed = start(architecture, trained)
    batch, before = make_batch(), {name: p.detach().clone() for name, p in lm.network.named_parameters()}
    assert (lm.trained.keys() < before.keys()) == (trained == "layers")
    lm.check(DATA, finetune_lowmem.linear_cross_entropy)
    checks.techniques_are_active(lm, finetune_lowmem.training_loss, optimizer, DATA, placed)
    assert all(torch.equal(p, before[name]) for name, p in lm.trained.items()), "the check moved a weight"
    assert not any(v.any() for state in optimizer.state.values() for v in state.values()), "the check left state"
    history = []
    for _ in range(12):
        loss = finetune_lowmem.training_loss(lm, batch)
        loss.backward()
        history.append(loss.item())
    assert history[-1] < history[0] - 0.2
    for name, p in lm.network.named_parameters():
        assert torch.equal(p, before[name]) == (name not in lm.trained), name
    assert optimizer.skipped.item() == 0


def test_nearest_rounding_passes_where_it_is_asked_for():
    lm, optimizer, placed = start("llama", rounding="nearest")
    checks.techniques_are_active(lm, finetune_lowmem.training_loss, optimizer, DATA, placed)


def break_checkpointing(lm):
    lm.layers[0].eval()


def break_dtype(lm):
    projection = lm.layers[1].mlp.up_proj.float()
    projection.register_forward_pre_hook(lambda module, args: (args[0].float(),))
    projection.register_forward_hook(lambda module, args, output: output.bfloat16())


def break_release(lm):
    lm.layers[0].mlp.up_proj.weight.register_post_accumulate_grad_hook(
        lambda p: setattr(p, "grad", torch.zeros_like(p))
    )


def break_use(lm):
    lm.layers[1].post_attention_layernorm.forward = lambda x: x


def break_freezing(lm):
    lm.network.base_model.norm.weight.requires_grad_(True)


def cross_entropy_of_logits(lm, batch):
    logits = lm.head.logits(lm.hidden_states(batch))
    return F.cross_entropy(logits, batch.targets, reduction="none") @ batch.weights


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (break_checkpointing, "gradient checkpointing is off: a layer ran 1 times"),
        (break_dtype, "up_proj.weight is torch.float32 instead of bf16"),
        (break_release, "outlives its update"),
        (break_use, "updated 0 times"),
        (break_freezing, "model.norm.weight keeps a gradient"),
        (None, "stochastic rounding is off"),
        (None, "linear cross entropy is off"),
    ],
)
def test_an_inactive_technique_is_refused(broken, message, monkeypatch):
    lm, optimizer, placed = start("llama")
    loss = cross_entropy_of_logits if message.startswith("linear") else finetune_lowmem.training_loss
    if message.startswith("stochastic"):
        monkeypatch.setattr(adafactor, "stochastic_round", lambda x, *_: x.bfloat16())
    if broken:
        broken(lm)
    with pytest.raises(UserError, match=f"LlamaForCausalLM cannot be trained in low memory: .*{message}"):
        checks.techniques_are_active(lm, loss, optimizer, DATA, placed)
