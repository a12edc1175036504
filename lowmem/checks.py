"""Refuse to train unless each technique is really active."""

from collections.abc import Callable
from functools import partial

import torch

from lowmem.adafactor import Adafactor, learning_rate_zero
from lowmem.placement import Placement
from lowmem.training import parallel
from lowmem.training.data import Data
from lowmem.training.errors import UserError, refuse_what_fails
from lowmem.training.models import CausalLM


def rounds_stochastically(optimizer: Adafactor, device: torch.device) -> bool:
    """Whether the optimizer's update really rounds up and down: a step of 0.026 ulp moves some 105 of 4,096 weights."""
    weights = torch.nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16, device=device))
    weights.grad = torch.ones_like(weights)
    group = optimizer.param_groups[0]
    Adafactor([weights], 1e-4, group["beta2"], group["rounding"], fused=optimizer.fused).step()
    return 0 < (weights != 1).sum().item() < 500


def techniques_are_active(
    lm: CausalLM, training_loss: Callable, optimizer: Adafactor, data: Data, placed: Placement
) -> None:
    """Raise UserError unless one step at learning rate 0 shows each technique at work; leaves all as it was."""
    network, trained, problems, fired, forwards = lm.network, lm.trained, [], dict.fromkeys(lm.trained, 0), []
    batch = data.small().to(lm.device)

    def after_update(name, p):
        fired[name] += 1
        if p.grad is not None:
            problems.append(f"the gradient of {name} outlives its update")

    handles = [layer.register_forward_pre_hook(lambda *_: forwards.append(1)) for layer in lm.layers[:1]]
    handles += [p.register_post_accumulate_grad_hook(partial(after_update, name)) for name, p in trained.items()]
    with placed.settled(), refuse_what_fails(network), learning_rate_zero(optimizer):
        loss = training_loss(lm, batch)
        loss.backward()
    for handle in handles:
        handle.remove()

    if rounds_stochastically(optimizer, loss.device) != (optimizer.param_groups[0]["rounding"] == "stochastic"):
        problems.append("stochastic rounding is off, or on in spite of --nostround")
    if len(forwards) != 2:
        problems.append(f"gradient checkpointing is off: a layer ran {len(forwards)} times instead of twice")
    if wrong := [name for name, count in fired.items() if count != 1]:
        problems.append(f"{wrong[0]} was updated {fired[wrong[0]]} times in one step instead of once")
    if wrong := [name for name, p in trained.items() if p.dtype != torch.bfloat16]:
        problems.append(f"{wrong[0]} is {trained[wrong[0]].dtype} instead of bf16")
    if wrong := [name for name, p in network.named_parameters() if p.grad is not None]:
        problems.append(f"{wrong[0]} keeps a gradient")
    if "LinearCrossEntropy" not in _names_in_graph(loss):
        problems.append("linear cross entropy is off")
    if placed.embeddings_on_host and network.get_input_embeddings().weight.is_cuda:
        problems.append("untrained embeddings are on the GPU")
    if wrong := [name for name, p in trained.items() if parallel.world_size() > 1 and not parallel.is_sharded(p)]:
        problems.append(f"{wrong[0]} is not sharded")
    if problems:
        raise UserError(f"{lm.name} cannot be trained in low memory: {problems[0]}")


def _names_in_graph(loss):
    """Names of the autograd nodes of the loss and of the three steps before it."""
    nodes, names = [loss.grad_fn], []
    for _ in range(4):
        names += [node.name() for node in nodes]
        nodes = [parent for node in nodes for parent, _ in node.next_functions if parent is not None]
    return " ".join(names)
