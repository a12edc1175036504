"""The two choices of --cross_entropy: ours (fp32) and cut-cross-entropy's (cut).

    python tests/benchmarks/cross_entropy.py    # error, time and memory of both, on a GPU

Of cut-cross-entropy every position's gradient is used. It adds up that of the hidden states in their own type, bf16, one
block of the vocabulary after the other, in the order in which the blocks come.
"""

import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[2]))
from finetune_lowmem import CROSS_ENTROPY
from lowmem.training.heads import Head


def milliseconds(function):
    """Median of ten runs after three."""
    times = []
    for _ in range(13):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[3:])


def measure(loss, hidden, weight, targets, upstream, truth):
    """(relative error of the gradient by hidden, milliseconds of forward and backward launched one by one and as a graph,
    MiB that they take more).
    """
    layer = SimpleNamespace(weight=weight, bias=None)
    model = SimpleNamespace(get_output_embeddings=lambda: layer, base_model=None, config=SimpleNamespace())
    model.config.get_text_config = lambda: model.config
    head = Head(model)

    def run():
        x.grad = None
        loss(head, x, targets, upstream).backward()

    torch.cuda.synchronize()  # the inputs come from another stream
    with torch.cuda.stream(torch.cuda.Stream()):
        x = hidden.clone().requires_grad_()
        eager = milliseconds(run)
        x.grad = None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        more, error = torch.cuda.max_memory_allocated() - before, (x.grad - truth).norm() / truth.norm()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            run()
        return error.item(), eager, milliseconds(graph.replay), more / 2**20


def compare():
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    for name, vocabulary, width in [("SmolLM2-135M", 49152, 576), ("1B", 128256, 2048), ("8B", 128256, 4096)]:
        torch.manual_seed(0)
        targets, upstream = torch.randint(vocabulary, (268,), device="cuda"), torch.full((268,), 1 / 268, device="cuda")
        weight = (torch.randn(vocabulary, width, device="cuda") * 2 / width**0.5).bfloat16()
        hidden = (torch.randn(268, width, device="cuda") + 3 * F.normalize(weight[targets].float())).bfloat16()
        slopes = (hidden.double() @ weight.double().T).softmax(1)
        slopes[torch.arange(268), targets] -= 1
        truth = slopes / 268 @ weight.double()
        del slopes
        for method, loss in CROSS_ENTROPY.items():
            error, eager, graph, mib = measure(loss, hidden, weight, targets, upstream, truth)
            print(
                f"{name:<14}{method:<6} gradient off by {100 * error:.2f} %  {eager:.2f} ms, as a graph {graph:.2f} ms  "
                f"{mib:.0f} MiB"
            )


if __name__ == "__main__":
    compare()
