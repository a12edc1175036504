"""A frozen head that is dealt out to several ranks, and NCCL's settings. python -m pytest tests/test_sharding.py"""

import os
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from support.runs import difference, log_likelihoods
from support.tiny import make_model
from support.training import CPU

from lowmem import sharding
from lowmem.linear_cross_entropy import LinearCrossEntropy
from lowmem.training import heads, parallel


@pytest.fixture
def sharded_heads(monkeypatch):
    """sharded_heads(architecture, ranks) -> [each rank's head, of pieces of 30 rows], which gather from each other.

    What is gathered comes as late as may be: when it is waited for.
    """

    def make(architecture, ranks):
        made = []
        monkeypatch.setattr(parallel, "world_size", lambda: ranks)

        def gather(head, k):
            into = head.buffers[k % 2]
            return SimpleNamespace(wait=lambda: into.copy_(torch.cat([other.layer.own_rows[k] for other in made])))

        monkeypatch.setattr(sharding.ShardedHead, "_gather", gather)
        for rank in range(ranks):
            monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
            network = make_model(architecture).requires_grad_(False)
            made.append(sharding.ShardedHead(network, CPU, piece_bytes=30 * 32 * 4))
        return made

    return make


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "granite", "phi"])
def test_a_sharded_heads_log_probs_and_gradient(architecture, ranks, sharded_heads, monkeypatch):
    """Against fp64, on the rank that holds the first rows and on the last; of 400 rows the last piece is not full."""
    monkeypatch.setattr(heads, "MAX_LOGITS", 300)
    plain = heads.Head(make_model(architecture))
    hidden, targets, upstream = torch.randn(40, 32) * 8, torch.randint(400, (40,)), torch.randn(40)
    x = hidden.double().requires_grad_()
    true = x * plain.scale @ plain.weight.detach().double().T
    true = true + (0 if plain.bias is None else plain.bias.detach().double())
    if plain.softcap:
        true = plain.softcap * torch.tanh(true / plain.softcap)
    targets[::3] = true[::3].argmax(-1)
    truth = true.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    (truth * upstream).sum().backward()
    for head in sharded_heads(architecture, ranks)[:: ranks - 1]:
        assert head.layer.own_rows.shape == (14, 30 // ranks, 32)
        y = hidden.clone().requires_grad_()
        found = LinearCrossEntropy.apply(y, targets, head.weight, head.bias, head)
        (found * upstream).sum().backward()
        with torch.no_grad():
            scores = head.score_targets(y, targets)
        assert torch.equal(scores[:, 0], found)
        assert torch.equal(scores[:, 1], (true.argmax(-1) == targets).float())
        assert (found - truth).abs().max() < 1e-4
        assert (y.grad - x.grad).norm() < 1e-5 * x.grad.norm()
        assert F.mse_loss(head.logits(hidden).double(), true) < 1e-8
        own = F.linear(hidden, plain.weight, plain.bias)  # what the model's own head gives
        assert (head.layer(hidden) - own).abs().max() < 1e-4


@pytest.mark.parametrize("of_one_machine", [True, False])
def test_nccl_takes_less_among_the_gpus_of_one_machine(of_one_machine, monkeypatch):
    for name in sharding.NCCL_SETTINGS:
        monkeypatch.setenv(f"NCCL_{name}", "")  # so that it is taken out again afterwards
        monkeypatch.delenv(f"NCCL_{name}")
    monkeypatch.setenv("NCCL_MAX_CTAS", "4")
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8" if of_one_machine else "4")
    sharding.shrink_nccl()
    assert "NCCL_BUFFSIZE" not in os.environ  # of one process
    monkeypatch.setattr(parallel, "world_size", lambda: 8)
    sharding.shrink_nccl()
    assert os.environ["NCCL_MAX_CTAS"] == "4"  # a user's own setting stays
    assert os.environ.get("NCCL_BUFFSIZE") == ("2097152" if of_one_machine else None)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama-tied", "phi"])
def test_a_run_s_evaluation_by_several_ranks_is_that_of_one(architecture, run_ranks):
    one, three = (run_ranks(n, "finetune_lowmem", f"{n}", "--epochs", 0, architecture=architecture) for n in (1, 3))
    assert (log_likelihoods(one, 0) - log_likelihoods(three, 0)).abs().max() < 1e-4
    assert difference(one, three) == 0
