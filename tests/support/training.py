"""Training without a script: batches, models, steps, and the update in fp64."""

import math
from contextlib import nullcontext
from types import SimpleNamespace

import torch
import torch.nn.functional as F

import finetune_lowmem
from lowmem import placement
from lowmem.adafactor import Adafactor
from lowmem.streaming import CopyStreams, StreamedHead, StreamedLayers
from lowmem.training import models
from lowmem.training.batches import IGNORE, Batch
from lowmem.training.heads import Head
from support.tiny import make_model

CPU = torch.device("cpu")


def make_batch(seed=0, rows=4, length=24):
    torch.manual_seed(seed)
    ids = torch.randint(2, 400, (rows, length))
    labels = torch.full_like(ids, IGNORE)
    for row in range(rows):
        skip = 10 + row % 5
        labels[row, skip:-4] = torch.randint(2, 400, (length - 4 - skip,))
    return Batch.of(ids, labels)


def own_loss(model, batch):
    """Mean cross entropy from the model's own logits, by the definition."""
    logits = model(input_ids=batch.ids).logits.double()
    return F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORE)


def as_lm(model, trained="layers", precision=nullcontext):
    """The CausalLM of a model."""
    chosen = models.choose_trained(model, trained)
    return models.CausalLM(model, Head(model), chosen, precision)


def checkpointed(model, recomputation=lambda inner: inner):
    models.checkpoint_activations(model, context_fn=lambda: (nullcontext(), recomputation(finetune_lowmem.precision())))
    return model


def make_run(architecture, streamed, slots=2, trained="layers", layers=5, device=CPU, copies=None, **shape):
    """A bf16 model of five layers with step, score and weights; `streamed` of them stream, the head too if it can."""
    lm = as_lm(
        make_model(architecture, num_hidden_layers=layers, **shape).bfloat16(), trained, finetune_lowmem.precision
    )
    copies = copies or CopyStreams(device)
    if trained == "layers":
        lm.head = StreamedHead(lm.network, copies, device, piece_bytes=8192)
    placement.keep_on_host(lm.network, device, head=trained == "layers")
    for i, layer in enumerate(lm.layers):
        if i not in streamed:
            layer.to(device)
    stack = StreamedLayers([lm.layers[i] for i in streamed], copies, device, slots)
    checkpointed(lm.network, stack.recomputation)
    optimizer = Adafactor(lm.trained.values(), lr=1e-2, seed=3)
    finetune_lowmem.update_in_backward(optimizer, lm.trained, when_updated=stack.send_home)

    def step(batch):
        loss = finetune_lowmem.training_loss(lm, batch)
        loss.backward()
        copies.settle()
        return loss.detach()

    @torch.no_grad()
    def score(batch):
        scores = lm.score_targets(batch)
        copies.settle()
        return scores

    def weights():
        with stack.all_at_home():
            return [p.detach().clone() for p in lm.network.parameters()]

    return SimpleNamespace(lm=lm, stack=stack, step=step, score=score, weights=weights, optimizer=optimizer)


def truth(p, g, state, lr, beta2=0.99):
    """The update of design section 5 in fp64, written from its formula: factored for matrices, unfactored for vectors."""
    p, g = p.double(), g.double()
    if p.ndim > 1:
        p2, g2 = p.reshape(-1, p.shape[-1]), g.reshape(-1, p.shape[-1])
        state["vr"] = beta2 * state.get("vr", 0) + (1 - beta2) * g2.square().mean(1)
        state["vc"] = beta2 * state.get("vc", 0) + (1 - beta2) * g2.square().mean(0)
        v = torch.outer(state["vr"], state["vc"]) / state["vr"].mean()
    else:
        p2, g2 = p, g
        v = state["v"] = beta2 * state.get("v", 0) + (1 - beta2) * g2.square()
    u = g2 / v.sqrt()
    u = u * lr * max(p2.norm().item(), 1e-3 * math.sqrt(p2.numel())) / u.norm()
    return (p2 - u).reshape(p.shape)
