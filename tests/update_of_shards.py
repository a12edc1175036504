"""The eager update on sharded tensors (DTensors), by several gloo ranks; run by test_ranks.py, prints JSON on rank 0.

{case: largest difference from the same update of the whole tensor in one process, before rounding, in units of the
largest step}.
"""

import itertools
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
import common

moved = []  # weights before they are rounded
plain = common.stochastic_round
common.stochastic_round = lambda x, *how: (moved.append(x.clone()), plain(x, *how))[1]


def steps(p, gradients, dtype):
    """The weights [R, C] after each step, before rounding; how many updates were left out."""
    optimizer, found = common.Adafactor([p], lr=1e-2, seed=3), []
    for g in gradients:
        p.grad = g
        moved.clear()
        optimizer.step()
        found.append(torch.cat(moved) if moved else common._as_matrix(common.local(p)).float().clone())
        if dtype == torch.bfloat16:  # each step from the same weights, which rounding noise would part
            optimizer.state[p].get("compensation", torch.zeros(1)).zero_()
            with torch.no_grad():
                common.local(p).copy_(START[common.rows_of_rank(len(START))] if common.is_sharded(p) else START)
    return found, optimizer.skipped.item()


dist.init_process_group("gloo")
mesh, errors = init_device_mesh("cpu", (common.ranks(),)), {}
for shape in [(40, 30), (1, 50), (50, 1), (7,), (1,), (3, 8, 10), (70, 600), (17000,)]:
    for dtype in (torch.float32, torch.bfloat16):
        for bad in (False, True):
            torch.manual_seed(0)
            START = torch.randn(shape).to(dtype)
            gradients = [(torch.randn(shape) * torch.rand(shape)).to(dtype) for _ in range(4)]
            if bad:
                gradients[1].view(-1)[-1] = torch.inf  # on one rank alone
            whole, skipped = steps(torch.nn.Parameter(START.clone()), gradients, dtype)
            deal = [distribute_tensor(g, mesh, [Shard(0)]) for g in gradients]
            own, own_skipped = steps(
                torch.nn.Parameter(distribute_tensor(START.clone(), mesh, [Shard(0)])), deal, dtype
            )
            assert skipped == own_skipped == bad
            largest, step = 0.0, max((w.flatten() - START.float().flatten()).abs().max().item() for w in whole)
            for w, o in zip(whole, own, strict=True):
                rest = w.numel() // len(START)
                part = w.flatten()[
                    slice(*(rest * at for at in common.rows_of_rank(len(START)).indices(len(START))[:2]))
                ]
                largest = max([largest, *(part - o.flatten()).abs().tolist()])
            found = common.of_all_ranks(largest)
            errors[f"{shape} {dtype} {'one bad' if bad else ''}"] = max(found) / step

# Parts that are equal, with equal gradients, are rounded differently: a step of half an ulp of 2^-8 below 1
ones = distribute_tensor(torch.ones(32 * common.ranks(), 32, dtype=torch.bfloat16), mesh, [Shard(0)])
p = torch.nn.Parameter(ones.clone())
p.grad = ones
common.Adafactor([p], lr=2e-3).step()
rounded = common.of_all_ranks(common.local(p).float())
assert all(0.4 < (x != y).float().mean() < 0.6 for x, y in itertools.combinations(rounded, 2))  # of 1,024: 6 deviations

# torch's own optimizers leave out what is not finite on any rank
p, q = (torch.nn.Parameter(ones.float()) for _ in range(2))
optimizer = common.guarded(torch.optim.Adam)([p, q], lr=0.1)
gradient = torch.ones(ones.shape)
gradient[-1, -1] = torch.nan  # the last rank's
p.grad, q.grad = distribute_tensor(gradient, mesh, [Shard(0)]), ones.float()
optimizer.step()
assert optimizer.skipped == 1
assert (common.local(p) == 1).all()
assert (common.local(q) != 1).all()

if common.rank() == 0:
    print(json.dumps(errors))
common.wait_for_all()
