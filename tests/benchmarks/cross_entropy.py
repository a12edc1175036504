"""finetune_lowmem.py's linear cross entropy against cut-cross-entropy 25.1.1 (pip install cut-cross-entropy==25.1.1).

    python tests/benchmarks/cross_entropy.py    # error, time and memory of both, on a GPU

Of cut-cross-entropy every position's gradient is used (filter_eps=None). It adds up that of the hidden states in their
own type, bf16, one block of the vocabulary after the other, in the order in which the blocks come.
"""

import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[2]))
import common
import finetune_lowmem


def cut_cross_entropy_loss(head, hidden, targets, weights):
    """`finetune_lowmem.target_loss` by cut-cross-entropy's kernels."""
    from cut_cross_entropy.cce import CCEParams, linear_cross_entropy_apply

    params = CCEParams(targets, None, head.softcap, "none", filter_eps=None, shift=False, batch_shape=targets.shape)
    return (linear_cross_entropy_apply(hidden * head.scale, head.weight, params) * weights).sum()


def measure(loss, hidden, weight, targets, upstream, truth):
    """(relative error of the gradient by hidden, milliseconds of forward and backward, MiB that they take more)."""
    head = SimpleNamespace(get_output_embeddings=lambda: layer, base_model=None, config=SimpleNamespace())
    head.config.get_text_config = lambda: head.config
    layer = SimpleNamespace(weight=weight, bias=None)
    head, times = common.Head(head), []
    for _ in range(13):
        x = hidden.clone().requires_grad_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        start.record()
        loss(head, x, targets, upstream).backward()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
        more = torch.cuda.max_memory_allocated() - before
    error = ((x.grad - truth).norm() / truth.norm()).item()
    return error, statistics.median(times[3:]), more / 2**20


def compare():
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    losses = {"ours": finetune_lowmem.target_loss, "cut-cross-entropy": cut_cross_entropy_loss}
    for name, vocabulary, width in [("SmolLM2-135M", 49152, 576), ("1B", 128256, 2048), ("8B", 128256, 4096)]:
        torch.manual_seed(0)
        targets, upstream = torch.randint(vocabulary, (268,), device="cuda"), torch.full((268,), 1 / 268, device="cuda")
        weight = (torch.randn(vocabulary, width, device="cuda") * 2 / width**0.5).bfloat16()
        hidden = (torch.randn(268, width, device="cuda") + 3 * F.normalize(weight[targets].float())).bfloat16()
        slopes = (hidden.double() @ weight.double().T).softmax(1)
        slopes[torch.arange(268), targets] -= 1
        truth = slopes / 268 @ weight.double()
        del slopes
        for method, loss in losses.items():
            error, ms, mib = measure(loss, hidden, weight, targets, upstream, truth)
            print(f"{name:<14}{method:<19} gradient off by {100 * error:.2f} %  {ms:.2f} ms  {mib:.0f} MiB")


if __name__ == "__main__":
    compare()
