"""Applied over intended step of stochastic rounding, for steps of a small part of a bf16 ulp.

    python tests/benchmarks/rounding.py [--device cuda] [--draws 20000000]

Subtracts the step from weights spread over a binade (and of both signs) in fp32, as the update does, and rounds. Intended
is the step itself, so fp32's own rounding of weight - step counts as error. The +- is one standard error of the ratio.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from lowmem.adafactor import stochastic_round
from lowmem.training import records


def ratio(ulps, draws, device, seed=0):
    """(applied / intended, its standard error) of `draws` steps of `ulps` bf16 ulps."""
    generator = torch.Generator(device).manual_seed(seed)
    ulp, total, squares, chunk = 2.0**-7, 0.0, 0.0, min(draws, 2**21)
    for _ in range(-(-draws // chunk)):
        weights = 1 + torch.randint(1, 128, (chunk,), generator=generator, device=device).float() * ulp  # [1, 2) but 1
        weights *= 1 - 2 * torch.randint(2, (chunk,), generator=generator, device=device).float()
        moved = (weights - stochastic_round(weights - ulps * ulp, generator).float()).double() / ulp
        total, squares = total + moved.sum().item(), squares + moved.square().sum().item()
    n = chunk * -(-draws // chunk)
    mean = total / n
    return mean / ulps, ((squares / n - mean**2) / n) ** 0.5 / ulps


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--draws", type=int, default=20_000_000)
    args = parser.parse_args()
    rows = [(ulps, *ratio(ulps, args.draws, args.device)) for ulps in (0.2, 0.05, 0.02, 0.01, 0.005, 0.001)]
    for ulps, value, error in rows:
        print(f"{ulps:6} ulp: {value:.4f} +- {error:.4f}")
    result = {
        "device": args.device,
        "draws": args.draws,
        "rows": rows,
        "versions": records.versions(torch.device(args.device)),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
