"""The eager update on sharded tensors (DTensors), by several gloo ranks; run by test_fsdp.py, prints JSON on rank 0.

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

sys.path.insert(0, str(Path(__file__).parents[2]))
from lowmem import adafactor
from lowmem.training import parallel

moved = []  # weights before they are rounded
plain = adafactor.stochastic_round
adafactor.stochastic_round = lambda x, *how: (moved.append(x.clone()), plain(x, *how))[1]


def steps(p, gradients, dtype):
    """The weights [R, C] after each step, before rounding; how many updates were left out."""
    optimizer, found = adafactor.Adafactor([p], lr=1e-2, seed=3), []
    for g in gradients:
        p.grad = g
        moved.clear()
        optimizer.step()
        found.append(torch.cat(moved) if moved else adafactor.as_matrix(parallel.own_rows(p)).float().clone())
        if dtype == torch.bfloat16:  # each step from the same weights, which rounding noise would part
            optimizer.state[p].get("compensation", torch.zeros(1)).zero_()
            with torch.no_grad():
                own = parallel.rows_of_rank(len(START)) if parallel.is_sharded(p) else slice(None)
                parallel.own_rows(p).copy_(START[own])
    return found, optimizer.skipped.item()


dist.init_process_group("gloo")
mesh, errors = init_device_mesh("cpu", (parallel.world_size(),)), {}
for shape in [(40, 30), (1, 50), (50, 1), (7,), (1,), (3, 8, 10), (70, 600), (17000,)]:
    for dtype in (torch.float32, torch.bfloat16):
        for bad in (False, True):
            torch.manual_seed(0)
            START = torch.randn(shape).to(dtype)
            gradients = [(torch.randn(shape) * torch.rand(shape)).to(dtype) for _ in range(4)]
            if bad:
                gradients[1].view(-1)[-1] = torch.inf  # on one rank alone
            whole, skipped = steps(torch.nn.Parameter(START.clone()), gradients, dtype)
            dealt = [distribute_tensor(g, mesh, [Shard(0)]) for g in gradients]
            own, own_skipped = steps(
                torch.nn.Parameter(distribute_tensor(START.clone(), mesh, [Shard(0)])), dealt, dtype
            )
            assert skipped == own_skipped == bad
            largest, step = 0.0, max((w.flatten() - START.float().flatten()).abs().max().item() for w in whole)
            for w, o in zip(whole, own, strict=True):
                expected = w.view(shape)[parallel.rows_of_rank(len(START))]
                largest = max([largest, *(expected.flatten() - o.flatten()).abs().tolist()])
            errors[f"{shape} {dtype} {'one bad' if bad else ''}"] = max(parallel.gather_objects(largest)) / step

# Shards that are equal, with equal gradients, are rounded differently: a step of half an ulp of 2^-8 below 1
ones = distribute_tensor(torch.ones(32 * parallel.world_size(), 32, dtype=torch.bfloat16), mesh, [Shard(0)])
p = torch.nn.Parameter(ones.clone())
p.grad = ones
adafactor.Adafactor([p], lr=2e-3).step()
rounded = parallel.gather_objects(parallel.own_rows(p).float())
assert all(0.4 < (x != y).float().mean() < 0.6 for x, y in itertools.combinations(rounded, 2))  # of 1,024: 6 deviations

if parallel.rank() == 0:
    print(json.dumps(errors))
parallel.wait_for_all()
