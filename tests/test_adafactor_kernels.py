"""What the update has as kernels alone: real sizes on a GPU, captured graphs, GPUs that we have not.

Against fp64 truth the kernels are tested with the update in PyTorch, in test_adafactor.py.
"""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lowmem import adafactor_kernels
from lowmem.adafactor import Adafactor
from lowmem.training import run


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape", [(512, 2048), (8192, 2048), (2048, 8192), (14336, 4096), (9001, 1031), (2048,), (9000,)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_equal_the_eager_update_at_real_sizes(shape, dtype):
    """Three steps, each from the same weights, rounded to nearest.

    In bf16 the two may fall on either side of a tie: at most 1 in 10,000, by one ulp.
    """
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, device="cuda").to(dtype)) for _ in range(2)]
    params[1].data.copy_(params[0])
    optimizers = [Adafactor([p], 1e-2, rounding="nearest", fused=f) for p, f in zip(params, (True, False), strict=True)]
    for _ in range(3):
        g = torch.randn_like(params[0])
        for p, optimizer in zip(params, optimizers, strict=True):
            p.grad = g
            optimizer.step()
        a, b = (p.detach().float() for p in params)
        assert ((a - b).abs() <= 2**-7 * b.abs() + 1e-6).all()
        assert (a - b).norm() < 1e-6 * b.norm() if dtype == torch.float32 else (a != b).double().mean() < 1e-4
        params[1].data.copy_(params[0])
    for name in ("row", "col"):
        torch.testing.assert_close(optimizers[0].state[params[0]][name], optimizers[1].state[params[1]][name])


@pytest.mark.gpu
def test_kernels_round_without_bias():
    """4 million weights whose step is 0.0256 ulp: the share that moves, within 5 standard deviations."""
    p = torch.nn.Parameter(torch.ones(2048, 2048, device="cuda").bfloat16())
    p.grad = torch.ones_like(p)
    Adafactor([p], lr=1e-4).step()
    share, expected = (p != 1).double().mean().item(), round(1e-4 * 2**24) / 2**16  # below 1, fp32's grid is 2^-24
    assert abs(share - expected) < 5 * math.sqrt(expected / p.numel())
    assert set(p.unique().tolist()) == {1.0, 1 - 2.0**-8}


@pytest.mark.gpu
def test_kernels_neither_wait_for_the_host_nor_depend_on_it():
    """Captured once, replayed at five learning rates: the same weights and state, to the bit, as five calls."""
    results = []
    for captured in (True, False):
        torch.manual_seed(0)
        with torch.cuda.stream(torch.cuda.Stream()):
            p = torch.nn.Parameter(torch.randn(2048, 512, device="cuda").bfloat16())
            g, optimizer = torch.randn_like(p), Adafactor([p], lr=1e-3)
            p.grad = g
            optimizer.step()
            graph = torch.cuda.CUDAGraph()
            if captured:
                with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
                    optimizer.step()
            for lr in (1e-3, 3e-3, 1e-2, 0.0, 1e-4):
                run.set_learning_rate(optimizer, lr)
                graph.replay() if captured else optimizer.step()
            results.append([p.detach().clone(), *(v.clone() for v in optimizer.state[p].values())])
            torch.cuda.synchronize()  # what compares them runs on another stream
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.gpu
def test_kernels_made_ready_early_change_no_bit(monkeypatch):
    """Programmatic dependent launches against plain ones: twenty steps of matrices of several sizes, in one graph."""
    count, launch = adafactor_kernels._launching(torch.device("cuda", torch.cuda.current_device()))
    if not launch:
        pytest.skip("this GPU has none")
    results = []
    for how in (launch, {}):
        monkeypatch.setattr(adafactor_kernels, "_launching", lambda device, how=how: (count, how))
        torch.manual_seed(0)
        shapes = (512, 2048), (4096, 1024), (64, 64), (2048,), (3072, 3072), (1, 5000)
        params = [torch.nn.Parameter(torch.randn(shape, device="cuda").bfloat16()) for shape in shapes]
        optimizer = Adafactor(params, lr=1e-2)
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(4):
                optimizer.step()
        for _ in range(5):
            graph.replay()
        results.append([*params, *(v for p in params for v in optimizer.state[p].values())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("programs", [1, 7, 924])
@pytest.mark.parametrize("shape", [(1, 1), (64, 64), (65, 63), (512, 2048), (4096, 14336), (128256, 2048), (3, 70000)])
def test_programs_take_all_of_a_matrix_in_one_wave(shape, programs):
    (tall, wide), strips = adafactor_kernels._one_wave(*shape, (64, 64), programs)
    assert 64 * wide >= shape[1] > 64 * (wide - 1)
    assert 64 * tall * strips >= shape[0] > 64 * strips * (tall - 1)
    assert tall * wide <= programs or tall == 1


@pytest.mark.slow
def test_the_kernels_compile_for_other_gpus(tmp_path):
    """For sm_80, 86, 89 and 90 (A100, RTX 30, RTX 40, Hopper), with none of them here: all code, within their memory."""
    pytest.importorskip("triton")
    variables = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, Path(__file__).parent / "support" / "compile_kernels.py"]
    options = {"env": variables, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    started = [subprocess.Popen([*command, gpu], **options) for gpu in ("80", "86", "89", "90")]
    for process in started:
        out, err = process.communicate()
        assert process.returncode == 0, err[-3000:]
        assert len(out.splitlines()) == 7
        assert max(int(line.split()[2]) for line in out.splitlines()) <= 48 * 1024  # what any program may have
