"""The README's picture: memory on the card against speed, one point a method, from gpu.py's and peers.py's results.

pip install matplotlib
python tests/benchmarks/plot.py --gpu gpu.json --peers peers.json --shape 1B --out picture.png
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


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", type=Path, required=True)
    parser.add_argument("--peers", type=Path, required=True)
    parser.add_argument("--shape", choices=["1B", "8B"], default="1B")
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    found = points(json.loads(args.gpu.read_text()), json.loads(args.peers.read_text()), args.shape)
    for (name, gib, speed, ours), marker in zip(found, "o*v^<>sDPX", strict=False):
        axes.scatter(gib, speed, 60, "tab:red" if ours else "tab:blue", marker=marker, label=name, zorder=3)
    axes.legend(fontsize=8)
    axes.set_xscale("log")
    for which in ("major", "minor"):
        axes.xaxis.set_tick_params(which=which, labelsize=8)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.set_xlabel("peak memory on the card, GiB (less is better)")
    axes.set_ylabel("rows per second (more is better)")
    axes.set_title(
        f"Llama {args.shape} shapes, all decoder layers trained, one H100, batch 8 (FP32 Adam: 32)", fontsize=10
    )
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    figure.savefig(args.out, dpi=150)


if __name__ == "__main__":
    main()
