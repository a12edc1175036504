"""The README's pictures: memory on the card against speed, from gpu.py's and peers.py's results.

python tests/benchmarks/plot.py --gpu gpu.json --peers peers.json --shape 1B --out methods.png   # a point a method
python tests/benchmarks/plot.py --gpu gpu.json --shape 8B --out budgets.png                      # --memory_budget
"""

import argparse
import json
from pathlib import Path


def points(gpu, peers, shape):
    """[(name, GiB on the card at most, rows/s, ours or not)] of the results that succeeded."""
    found = [
        (case["case"].removesuffix(f" {shape}"), max(phase["device"] for phase in case["memory_gib"].values()), case["rows_per_second"], True)
        for case in gpu["cases"]
        if case["case"] in (f"low-memory {shape}", f"FP32 Adam {shape}") and "failed" not in case
    ]  # fmt: skip
    return found + [
        (peer["peer"], peer["device_gib"], peer["rows_per_second"], False)
        for peer in peers["peers"]
        if peer["shape"] == shape and "failed" not in peer
    ]


def budget_points(gpu, shape, batch):
    """[(GiB on the card at most, rows/s)] of the streamed cases of one batch size, by memory."""
    return sorted(
        (max(phase["device"] for phase in case["memory_gib"].values()), case["rows_per_second"])
        for case in gpu["cases"]
        if case["case"].startswith(f"{shape}, batch {batch}, ") and "failed" not in case
    )


# design references of the published script on an H100 (GiB on the card, rows/s), its own code, random weights
REFERENCE = {"1B": (4.19, 35), "8B": (18.75, 13.6)}


def plot_budgets(axes, gpu, shape):
    for batch, marker in ((8, "o"), (32, "s")):
        if found := budget_points(gpu, shape, batch):
            axes.plot(*zip(*found, strict=True), "tab:red", marker=marker, label=f"streamed, batch {batch}")
    for name, gib, speed, _ in points(gpu, {"peers": []}, shape)[:1]:
        axes.scatter(gib, speed, 80, "tab:red", marker="*", label=f"{name}, all layers on the GPU", zorder=3)
    axes.scatter(*REFERENCE[shape], 60, "tab:blue", marker="D", label="the reference script, batch 8")
    axes.set_title(f"Llama {shape} shapes, all decoder layers trained, one H100", fontsize=10)


def plot_methods(axes, gpu, peers, shape):
    for (name, gib, speed, ours), marker in zip(points(gpu, peers, shape), "o*v^<>sDPX", strict=False):
        axes.scatter(gib, speed, 60, "tab:red" if ours else "tab:blue", marker=marker, label=name, zorder=3)
    axes.set_title(f"Llama {shape} shapes, all decoder layers trained, one H100, batch 8 (FP32 Adam: 32)", fontsize=10)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", type=Path, required=True)
    parser.add_argument("--peers", type=Path, help="peers.py's results; left out: plot --memory_budget's cases")
    parser.add_argument("--shape", choices=["1B", "8B"], default="1B")
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    gpu = json.loads(args.gpu.read_text())
    if args.peers:
        plot_methods(axes, gpu, json.loads(args.peers.read_text()), args.shape)
    else:
        plot_budgets(axes, gpu, args.shape)
    axes.legend(fontsize=8)
    axes.set_xscale("log")
    for which in ("major", "minor"):
        axes.xaxis.set_tick_params(which=which, labelsize=8)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.set_xlabel("peak memory on the card, GiB (less is better)")
    axes.set_ylabel("rows per second (more is better)")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    figure.savefig(args.out, dpi=150)


if __name__ == "__main__":
    main()
