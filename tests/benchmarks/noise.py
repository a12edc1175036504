"""What the noise costs that stochastic rounding adds up to: of the matrices, of the vectors, of both.

    python tests/benchmarks/noise.py --model MODEL_FOLDER --dataset DATASET_FOLDER    # the demo's; ten minutes on a CPU

Adds to each trained weight, in fp32, what its roundings would sum up to over a run of --steps at a rate that falls
linearly from --lr, if their noise were independent; and prints how much the right endings' NLL rises on the first --rows
held-out rows: of the model as it is, so without the training that would make up for some of it. A step d is rounded by
one bf16 ulp with probability |d| / ulp, so its variance is |d| ulp; steps of random gradients have a mean |d| of
sqrt(2 / pi) lr RMS(weights). The antithetic noise that matrices have now leaves sqrt(1/2) of that variance.
"""

import argparse
import json
import math
import sys
from contextlib import nullcontext
from pathlib import Path
from statistics import mean, stdev

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
import common
from lowmem.training import models, records, tokenizing

PARTS = {"vectors": lambda p: p.ndim == 1, "matrices": lambda p: p.ndim > 1, "both": lambda p: True}


def noise_deviation(weights, lr, steps):
    """Standard deviation, fp32, of what `steps` roundings of bf16 `weights` add up to, at a mean rate of lr."""
    ulp = torch.exp2(weights.abs().clamp(min=2**-126).log2().floor() - 7)
    return (ulp * steps * lr * math.sqrt(2 / math.pi) * weights.square().mean().sqrt()).sqrt()


@torch.no_grad()
def nll_of_right_endings(lm, data):
    """Mean over rows, nats."""
    total, right = 0.0, (data.scored[4 * at + row.label] for at, row in enumerate(data.rows))
    sequences = sorted(right, key=lambda s: len(s.ids))
    for start in range(0, len(sequences), 16):
        total -= lm.score_targets(data.batch(sequences[start : start + 16]))[:, 0].sum().item()
    return total / len(sequences)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--rows", type=int, default=256, dest="eval_rows")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--steps", type=int, default=3009)
    parser.add_argument("--draws", type=int, default=5)
    parser.set_defaults(train_rows=None)  # which load_rows asks for too
    args = parser.parse_args()
    tokenizer, max_tokens = tokenizing.load(args.model)
    lm = models.load(args.model, torch.float32, "layers", nullcontext)
    rows, scored = common.evaluation_rows(common.load_rows(args, "validation"), tokenizer, max_tokens)
    data = common.HellaSwag([], scored, max_tokens, rows=rows)
    start = {p: p.detach().clone() for p in lm.trained.values()}
    before = nll_of_right_endings(lm, data)
    print(f"no noise: {before:.3f} nats")
    rises = {}
    for part, has in PARTS.items():
        for draw in range(args.draws):
            generator = torch.Generator().manual_seed(draw)
            for p, weights in start.items():
                noise = noise_deviation(weights, args.lr / 2, args.steps) * torch.randn(p.shape, generator=generator)
                p.data.copy_(weights + noise * has(p))
            rises.setdefault(part, []).append(nll_of_right_endings(lm, data) - before)
        error = stdev(rises[part]) / args.draws**0.5
        print(f"noise in {part}: {mean(rises[part]):+.3f} +- {error:.3f} nats (standard error over {args.draws} draws)")
    settings = {"rows": len(rows), "lr": args.lr, "steps": args.steps, "draws": args.draws}
    print(
        json.dumps({**settings, "gold_nll": before, "rises": rises, "versions": records.versions(torch.device("cpu"))})
    )


if __name__ == "__main__":
    main()
