"""What low memory costs in accuracy: both scripts on a real model, over learning rates and seeds.

    python tests/benchmarks/accuracy.py --model MODEL_FOLDER --dataset DATASET_FOLDER    # runs what is missing
    python tests/benchmarks/accuracy.py --model ... --dataset ... --only low-memory --lr 1e-4 --seed 42    # one cell again
    python tests/benchmarks/accuracy.py --report     # table and picture from the committed results; runs nothing

The folders are the demo's, in ~/.cache/lowmem_finetuning (run a --demo once). A cell is one whole run of a script, all
rows, three epochs: a method, a learning rate and a seed, which moves the order of the rows and the rounding. Rates fall
linearly to 0 unless the method says otherwise. Each method runs the same grid of rates with the first seed. Which is best
depends on the score: accuracy still rises at rates at which gold NLL rises again. So there are two: that of the lowest
gold NLL after the last epoch, and the one of the highest acc_norm, or rather that of the lowest gold NLL among those whose
acc_norm is within a standard error of the highest (the rule of one standard error, Breiman et al. 1984). Both are run
with the other seeds. Results are JSON lines, appended as runs end; what they hold is not run again.

The report has means and standard errors over seeds, and differences on the same held-out rows and seeds, with 95 %
intervals by bootstrap (Efron 1979): at each method's own rates, and at equal gold NLL, between two of its rates. Memory
and speed come from gpu.py, which runs each method alone on its card.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import pairwise, product
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
import gpu

ROOT, RESULTS = Path(__file__).parents[2], Path(__file__).parent / "results"
METHODS = {name: (script, [*flags, "--schedule", "linear"]) for name, (script, flags) in gpu.METHODS.items()}
METHODS |= {
    f"{name}, --schedule constant": (gpu.METHODS[name][0], ["--schedule", "constant"])
    for name in ("FP32 Adam, batch 32", "low-memory")
}
PLAIN = "low-memory, plain-rounding"  # neither antithetic nor compensated, as up to commit e49e0b5
RAN_BEFORE = (
    None  # in place of a script: changes of the source that commit 2d60635 can still run; their results are kept
)
METHODS[PLAIN] = (RAN_BEFORE, [])
GRID = [1e-5, 3e-5, 5e-5, 1e-4, 2e-4, 3e-4, 5e-4]
WIDER = {"low-memory, --nostround": [1e-3]}  # whose best rate by both scores would be the grid's last
SEEDS = [42, 43, 44]
YARDSTICK = "FP32 Adam, batch 32"
CLOSER = {  # rates between the grid's, all seeds, for the comparison at equal gold NLL alone: no method's best is theirs
    "FP32 Adafactor, batch 8": [1.25e-4, 2.5e-4],
    "low-memory": [1.25e-4, 1.5e-4, 2.5e-4],
}
UPDATE_RULES = [  # low-memory with another one
    f"low-memory, {change}"
    for change in ("unfactored", "unfactored-equal-steps", "equal-steps", "factored-adam", "clipping", "clipping-beta2")
]
MORE_SEEDS = {  # beyond SEEDS, or of an ablation beyond the first of them
    YARDSTICK: [45, 46],
    "FP32 Adafactor, batch 8": [45, 46],
    "low-memory": [45, 46],
    **{rule: [43, 44, 45, 46] for rule in UPDATE_RULES},
    PLAIN: [45, 46],
    "low-memory, independent-noise": [43, 44, 45, 46],
    "low-memory, master-weights": [43, 44, 45],
    **{f"FP32 Adam, batch {rows}, no-momentum": [43, 44] for rows in (8, 32)},
    "low-memory, --batch_size 32": [43, 44],
}
CONSTANT = [f"{method}, --schedule constant" for method in (YARDSTICK, "low-memory")]
# Where rounding to nearest loses most: of a weight as large as its tensor's RMS a step is at first 0.13 to 0.26 % of the
# distance between bf16 neighbours, which lie 2^-8 to 2^-7 of it apart
SMALL_RATE = 1e-5
EQUAL_NLL = [  # the first is compared with the second at the second's gold NLL too
    *((method, YARDSTICK) for method in ("FP32 Adafactor, batch 8", "low-memory", "FP32 Adam, batch 8")),
    *((f"FP32 Adam, batch {rows}, no-momentum", YARDSTICK) for rows in (8, 32)),
    *((rule, YARDSTICK) for rule in [*UPDATE_RULES, "low-memory, --batch_size 32"]),
    ("low-memory", "FP32 Adam, batch 8"),
]
PAIRS = [  # whose difference is printed beside each method's to the yardstick
    ("low-memory", "FP32 Adafactor, batch 8"),
    ("low-memory", "FP32 Adam, batch 8"),
    ("low-memory", "low-memory, --nostround"),
    ("low-memory", CONSTANT[0]),
    tuple(reversed(CONSTANT)),
    ("low-memory", CONSTANT[1]),
    ("low-memory", PLAIN),
    (PLAIN, "FP32 Adafactor, batch 8"),
]
AT_SMALL_RATE = ["FP32 Adafactor, batch 8", "low-memory", PLAIN, "low-memory, --nostround"]
ABLATIONS = (
    {  # name: (script, flags, rates), with the first seed and those of MORE_SEEDS
        f"{method}, {change}": (RAN_BEFORE, [], rates)
        for method, change, rates in [
            ("FP32 Adafactor, batch 8", "fp32-head", [SMALL_RATE, 1e-4]),
            ("FP32 Adam, batch 8", "no-momentum", [1e-5, 3e-5, 5e-5]),
            (YARDSTICK, "no-momentum", [3e-5, 5e-5, 1e-4]),
            ("low-memory", "equal-steps", [1e-5, 3e-5, 5e-5, 1e-4]),
            ("low-memory", "unfactored", [1e-4, 2e-4, 3e-4]),
            ("low-memory", "unfactored-equal-steps", [3e-5, 5e-5]),
            ("low-memory", "factored-adam", [3e-5, 5e-5]),
            ("low-memory", "clipping", [1e-4, 2e-4, 3e-4, 5e-4]),
            ("low-memory", "clipping-beta2", [1e-4, 2e-4, 3e-4, 5e-4]),
            ("low-memory", "beta2", [1e-4, 3e-4]),
            ("low-memory", "independent-noise", [1e-4, 2e-4, 3e-4]),
            ("low-memory", "master-weights", [1e-4, 3e-4]),
            ("low-memory", "slow-vectors", [1e-4, 3e-4]),
        ]
    }
    | {
        f"low-memory, --batch_size {rows}": (
            "finetune_lowmem",
            ["--batch_size", str(rows), *METHODS["low-memory"][1]],
            [1e-4, 2e-4, 3e-4, 5e-4],
        )
        for rows in (16, 32)
    }
    | {
        "low-memory, cut-cross-entropy": (
            "finetune_lowmem",
            ["--cross_entropy", "cut", *METHODS["low-memory"][1]],
            [1e-4],
        )
    }
)
COMPARED_WITH = {name: name.rpartition(", ")[0] for name in ABLATIONS} | {  # those whose rate is Adam's, with Adam's
    "low-memory, equal-steps": "FP32 Adam, batch 8, no-momentum",
    "low-memory, unfactored-equal-steps": "low-memory, equal-steps",
    "low-memory, factored-adam": "FP32 Adam, batch 8, no-momentum",
}
ROUNDINGS = [PLAIN, "low-memory, independent-noise", "low-memory", "low-memory, master-weights"]
SCORES = {"acc": "acc, %", "acc_norm": "acc_norm, %", "gold_nll": "gold NLL, nats"}
BEST = {"gold_nll": "lowest gold NLL", "acc_norm": "highest acc_norm within its error"}


# ---------------------------------------------------------------------------------------------------------------------
# Which cells


def cell_of(result):
    return result["method"], result["lr"], result["seed"]


def load(path):
    """Results by cell; of a cell that was run again the last."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {cell_of(result): result for result in map(json.loads, lines)}


def grid(method):
    return [*GRID, *WIDER.get(method, [])]


def last_scores(results, method, rates):
    """{rate: scores after the last epoch} of those of the method's rates that have run with the first seed."""
    runs = {rate: results.get((method, rate, SEEDS[0]), {}) for rate in rates}
    return {rate: run["eval"][-1] for rate, run in runs.items() if "eval" in run}


def best_rate(results, method, score):
    """Of the method's rates that have run with the first seed, the best by the score after the last epoch, or None."""
    found = last_scores(results, method, grid(method))
    if found and score == "acc_norm":
        top = max(found.values(), key=lambda last: last["acc_norm"])
        share = top["acc_norm"] / 100
        error = 100 * (share * (1 - share) / top["rows"]) ** 0.5
        found = {rate: last for rate, last in found.items() if last["acc_norm"] >= top["acc_norm"] - error}
    return min(found, key=lambda rate: found[rate]["gold_nll"], default=None)


def seeds_of(results, method, rate):
    return [r for cell, r in sorted(results.items()) if cell[:2] == (method, rate) and "eval" in r]


def mean_nll(runs):
    return mean(run["eval"][-1]["gold_nll"] for run in runs)


def rates_around(results, method, gold_nll, closer=()):
    """The two rates next to each other, above that of the lowest gold NLL, between whose NLLs it is; or None.

    closer: more rates to consider than the grid's.
    """
    best = best_rate(results, method, "gold_nll")
    rates = sorted(rate for rate in [*grid(method), *closer] if rate >= (best or 0))
    found = {rate: mean_nll(seeds_of(results, method, rate)) for rate in last_scores(results, method, rates)}
    return next(((a, b) for a, b in pairwise(found) if found[a] <= gold_nll <= found[b]), None)


def repeated_rates(results, method):
    """Which rates are run with all seeds, once all have run with the first."""
    rates = [best_rate(results, method, score) for score in BEST]
    for score, (first, second) in product(BEST, EQUAL_NLL):
        if first == method and (theirs := seeds_of(results, second, best_rate(results, second, score))):
            rates += rates_around(results, method, mean_nll(theirs)) or ()
    return filter(None, rates)


def missing_cells(results, methods):
    """The cells of the table that `results` lack, in the order in which they should run."""
    wanted = []
    for method in methods:
        if (METHODS | ABLATIONS)[method][0] is RAN_BEFORE:
            continue
        if method in ABLATIONS:
            seeds = [SEEDS[0], *MORE_SEEDS.get(method, [])]
            wanted += [(method, rate, seed) for seed in seeds for rate in ABLATIONS[method][2]]
            continue
        first = [(method, rate, SEEDS[0]) for rate in grid(method)]
        wanted += first
        if method in AT_SMALL_RATE:
            wanted += [(method, SMALL_RATE, seed) for seed in SEEDS]
        if all(cell in results for cell in first):
            seeds = [*SEEDS, *MORE_SEEDS.get(method, [])]
            rates = [*repeated_rates(results, method), *CLOSER.get(method, [])]
            wanted += [(method, rate, seed) for rate in rates for seed in seeds]
    return [cell for cell in dict.fromkeys(wanted) if cell not in results]


# ---------------------------------------------------------------------------------------------------------------------
# Running them


def visible_cards():
    """CUDA_VISIBLE_DEVICES of one card each; [None] without a GPU."""
    count = torch.cuda.device_count()
    return os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")[:count] or [None]


class CellRun:
    """The script at work on a cell, in a process and a temporary folder of its own."""

    def __init__(self, cell, card, args):
        method, rate, seed = self.cell = cell
        self.card, self.args, self.began = card, args, time.time()
        self.folder = tempfile.TemporaryDirectory()
        script, flags = (METHODS | ABLATIONS)[method][:2]
        self.command = [f"{script}.py", *flags, "--lr", f"{rate:g}", "--seed", str(seed)]
        where = ["--run-name", "cell", "--output_dir", self.folder.name, "--no_save_model"]
        where += ["--model", args.model, "--dataset", args.dataset]
        environment = os.environ | ({} if card is None else {"CUDA_VISIBLE_DEVICES": card})
        with open(f"{self.folder.name}/log", "w") as log:
            self.process = subprocess.Popen(
                [sys.executable, *self.command, *where], cwd=ROOT, env=environment, stdout=log, stderr=log
            )

    def ended(self):
        return self.process.poll() is not None

    def result(self):
        method, rate, seed = self.cell
        result = {"method": method, "lr": rate, "seed": seed, "command": " ".join(self.command)}
        result |= {"commit": self.args.commit, "wall_seconds": round(time.time() - self.began)}
        run = Path(self.folder.name)
        if code := self.process.returncode:
            said = (run / "log").read_text().strip().splitlines()
            return result | {"failed": said[-1][:300] if said else f"exit code {code}"}
        summary = json.loads((run / "cell" / "summary.json").read_text())
        last = run / "cell" / f"eval_epoch{summary['eval'][-1]['epoch']}.jsonl"
        result |= {name: summary[name] for name in ("steps", "eval", "train_seconds", "skipped_updates", "versions")}
        return result | {"at_once": self.args.at_once, "rows": row_scores(map(json.loads, last.open()))}


def row_scores(lines):
    """{score: one number a row} of an eval_epoch<k>.jsonl; of acc and acc_norm a text of 0 and 1 for wrong and right."""
    found = {name: [] for name in SCORES}
    for row in lines:
        scores, label = np.array(row["loglikelihoods"]), row["label"]
        found["acc"].append(np.argmax(scores) == label)
        found["acc_norm"].append(np.argmax(scores / row["chars"]) == label)
        found["gold_nll"].append(round(-scores[label], 2))
    return found | {name: "".join(str(int(right)) for right in found[name]) for name in ("acc", "acc_norm")}


def run_cells(cells_to_run, results, args):
    """Run the cells that `cells_to_run(results)` names, `at_once` on each card, until none is left or time is up.

    A run that has diverged is a result; one that failed otherwise is left out of the file, to be run another time.
    """
    running, began = [], time.time()
    free = args.at_once * visible_cards()
    try:
        while True:
            for run in [run for run in running if run.ended()]:
                results[run.cell] = result = run.result()
                failed = result.get("failed")
                if not failed or "diverged" in failed:
                    with args.results.open("a") as file:
                        file.write(json.dumps(result) + "\n")
                last = failed or ", ".join(f"{name} {result['eval'][-1][name]:.2f}" for name in SCORES)
                print(f"{time.time() - began:5.0f} s", *run.cell, f"({result['wall_seconds']} s):", last, flush=True)
                running.remove(run)
                free.append(run.card)
                run.folder.cleanup()
            for cell in cells_to_run(results):
                if free and cell not in [run.cell for run in running] and time.time() < began + 60 * args.minutes:
                    running.append(CellRun(cell, free.pop(0), args))
            if not running:
                return
            time.sleep(0.5)
    finally:
        for run in running:
            run.process.terminate()


# ---------------------------------------------------------------------------------------------------------------------
# The report


def by_row(runs, score):
    """[seeds, rows] of a score after the last epoch, accuracies in percent."""
    if score == "gold_nll" or not isinstance(runs[0]["rows"][score], str):
        return np.array([run["rows"][score] for run in runs])
    return np.array([[100.0 * (right == "1") for right in run["rows"][score]] for run in runs])


def difference(ours, theirs, draws=10_000, seed=0):
    """(mean, low, high) of the mean of ours minus that of theirs, both [seeds, rows], of the same seeds and rows.

    low, high: 95 % interval by percentiles of `draws` bootstrap samples of rows and of seeds. The resampled means of n
    seeds show (n - 1) / n of their variance, and are spread accordingly; of one seed there is no scatter to resample.
    """
    rng, (seeds, rows) = np.random.default_rng(seed), ours.shape
    by_row, by_seed = (ours - theirs).mean(0), (ours - theirs).mean(1) - (ours - theirs).mean()
    by_seed *= (seeds / max(1, seeds - 1)) ** 0.5
    samples = [
        by_row[rng.integers(rows, size=rows)].mean() + by_seed[rng.integers(seeds, size=seeds)].mean()
        for _ in range(draws)
    ]
    return by_row.mean(), *np.percentile(samples, [2.5, 97.5])


def difference_cells(ours, theirs):
    """[number of common seeds, difference by each score] of two lists of results, as cells of a table."""
    seeds = sorted({run["seed"] for run in ours} & {run["seed"] for run in theirs})
    pair = [[run for seed in seeds for run in runs if run["seed"] == seed] for runs in (ours, theirs)]
    found = [difference(*(by_row(runs, score) for runs in pair)) for score in SCORES]
    return [str(len(seeds)), *(f"{d:+.2f} ({low:+.2f} to {high:+.2f})" for d, low, high in found)]


def as_text(rate):
    digits, exponent = f"{rate:.2e}".split("e")
    return f"{float(digits):g}e{int(exponent)}"


def over_seeds(values, digits):
    error = f" ± {stdev(values) / len(values) ** 0.5:.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{error}"


def table(results, speed, score):
    """Lines of Markdown: each method at its rate that is best by the score."""
    best = {method: rate for method in METHODS if (rate := best_rate(results, method, score))}
    yield f"| each at its rate of the {BEST[score]} | lr | seeds | {' | '.join(SCORES.values())} | peak, GiB | rows/s |"
    yield "|---|---|---|---|---|---|---|---|"
    for name, methods in (("FP32", [YARDSTICK]), ("bf16", ["low-memory", PLAIN])):  # the same for each rate
        for method in [method for method in methods if method in best][:1]:
            before = seeds_of(results, method, best[method])[0]["eval"][0]
            yield f"| no fine-tuning, {name} weights | | | {' | '.join(f'{before[s]:.2f}' for s in SCORES)} | | |"
    for method, rate in best.items():
        runs, case = seeds_of(results, method, rate), speed.get(f"SmolLM2 not compiled: {method}")
        scores = [over_seeds([run["eval"][-1][score] for run in runs], 2) for score in SCORES]
        cost = ["not measured"] * 2
        if case:
            peak = max(phase["device"] for phase in case["memory_gib"].values())
            cost = [f"{peak:.2f}", f"{case['rows_per_second']:.0f}"]
        tried = sum((method, rate, SEEDS[0]) in results for rate in grid(method))
        lr = as_text(rate) + f", of {tried} rates so far" * (tried < len(grid(method)))
        yield f"| {method} | {lr} | {len(runs)} | {' | '.join([*scores, *cost])} |"
    yield ""
    yield "| | minus | seeds | acc, points | acc_norm, points | gold NLL, nats |"
    yield "|---|---|---|---|---|---|"
    for pair in [*((method, YARDSTICK) for method in METHODS if method != YARDSTICK), *PAIRS]:
        if all(map(best.get, pair)):
            runs = [seeds_of(results, method, best[method]) for method in pair]
            yield f"| {' | '.join([*pair, *difference_cells(*runs)])} |"


def at_gold_nll(results, method, rates, theirs):
    """The method's runs as they would be at a rate between two at which its mean gold NLL is theirs; of common seeds.

    Each row's scores are interpolated in a straight line in the mean NLL.
    """
    by_seed = [{run["seed"]: run for run in runs} for runs in (*(seeds_of(results, method, r) for r in rates), theirs)]
    seeds = sorted(set.intersection(*map(set, by_seed)))
    low, high, theirs = ([runs[seed] for seed in seeds] for runs in by_seed)
    low_nll, high_nll, gold_nll = (by_row(runs, "gold_nll").mean() for runs in (low, high, theirs))
    part = (gold_nll - low_nll) / (high_nll - low_nll)
    mixed = {score: (1 - part) * by_row(low, score) + part * by_row(high, score) for score in SCORES}
    return [{"seed": seed, "rows": {s: mixed[s][k] for s in SCORES}} for k, seed in enumerate(seeds)]


def equal_nll_table(results):
    """Lines of Markdown: differences to another method, at its two rates, where a method has the same gold NLL.

    Between rates of the grid, as for all methods, and between closer ones where there are any. Ablations of the
    low-memory script are compared with it too, both between rates of the grid.
    """
    yield "| at the same gold NLL | minus | NLL | between lr | seeds | acc, points | acc_norm, points | gold NLL |"
    yield "|---|---|---|---|---|---|---|---|"
    for score, (method, other) in product(BEST, EQUAL_NLL):
        if not (theirs := seeds_of(results, other, best_rate(results, other, score))):
            continue
        gold_nll = mean_nll(theirs)
        pairs = [rates_around(results, method, gold_nll, closer) for closer in ([], CLOSER.get(method, []))]
        for rates in filter(None, dict.fromkeys(pairs)):
            ours = at_gold_nll(results, method, rates, theirs)
            between = [f"{gold_nll:.2f}", " and ".join(map(as_text, rates))]
            yield f"| {' | '.join([method, other, *between, *difference_cells(ours, theirs)])} |"
            if method.startswith("low-memory, ") and (unchanged := rates_around(results, "low-memory", gold_nll)):
                cells = difference_cells(ours, at_gold_nll(results, "low-memory", unchanged, ours))
                yield f"| {' | '.join([method, 'low-memory', *between, *cells])} |"


def seeds_table(results):
    """Lines of Markdown: scores after the last epoch of whatever has run with several seeds."""
    yield f"| mean over seeds | lr | seeds | {' | '.join(SCORES.values())} |"
    yield "|---|---|---|---|---|---|"
    for method in [*METHODS, *ABLATIONS]:
        for rate in sorted({lr for name, lr, _ in results if name == method}):
            runs = seeds_of(results, method, rate)
            if len(runs) > 1:
                scores = [over_seeds([run["eval"][-1][score] for run in runs], 2) for score in SCORES]
                yield f"| {' | '.join([method, as_text(rate), str(len(runs)), *scores])} |"


def equal_rate_table(results):
    """Lines of Markdown: each ablation minus what it changes at the same rate, and each way of rounding minus FP32."""
    yield "| at the same rate | minus | lr | seeds | acc, points | acc_norm, points | gold NLL, nats |"
    yield "|---|---|---|---|---|---|---|"
    pairs = [((name, COMPARED_WITH[name]), rates) for name, (_, _, rates) in ABLATIONS.items()]
    pairs += [(("low-memory, independent-noise", PLAIN), [1e-4, 3e-4])]
    all_rates = sorted([1e-4, 2e-4, 3e-4, *CLOSER["FP32 Adafactor, batch 8"]])
    pairs += [((method, "FP32 Adafactor, batch 8"), all_rates) for method in ROUNDINGS]
    for pair, rates in pairs:
        for rate in rates:
            runs = [seeds_of(results, method, rate) for method in pair]
            if all(runs):
                yield f"| {' | '.join([*pair, as_text(rate), *difference_cells(*runs)])} |"


def grid_table(results):
    """Lines of Markdown: gold NLL and acc_norm after the last epoch over the rates, first seed."""
    rates = sorted({*GRID, *sum(WIDER.values(), [])})
    yield f"| gold NLL / acc_norm after the last epoch, seed {SEEDS[0]} | {' | '.join(map(as_text, rates))} |"
    yield "|---" * (len(rates) + 1) + "|"
    for method in dict.fromkeys([*METHODS, *ABLATIONS, *(method for method, *_ in results)]):
        cells = [results.get((method, rate, SEEDS[0]), {}) for rate in rates]
        last = [cell["eval"][-1] if "eval" in cell else None for cell in cells]
        texts = [
            f"{x['gold_nll']:.2f} / {x['acc_norm']:.1f}" if x else "diverged" * bool(c)
            for x, c in zip(last, cells, strict=True)
        ]
        if any(texts):
            yield f"| {method} | {' | '.join(texts)} |"


def small_rate_table(results):
    """Lines of Markdown: gold NLL after each epoch at the small rate."""
    runs = {method: found for method in AT_SMALL_RATE if (found := seeds_of(results, method, SMALL_RATE))}
    steps = [e["step"] for found in list(runs.values())[:1] for e in found[0]["eval"]]
    yield f"| gold NLL at --lr {as_text(SMALL_RATE)}, after steps | {' | '.join(map(str, steps))} |"
    yield "|---" * (len(steps) + 1) + "|"
    for method, found in runs.items():
        cells = [over_seeds([run["eval"][k]["gold_nll"] for run in found], 3) for k in range(len(steps))]
        yield f"| {method}, {len(found)} seed{'s' * (len(found) > 1)} | {' | '.join(cells)} |"


def plot(results, out):
    """Scores after each epoch and over the rates; bands: standard errors over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(11, 9), layout="constrained")
    panels = [  # (where, score, {method: rate}, title)
        (ax, score, {m: best_rate(results, m, score) for m in METHODS}, f"each at its rate of the {BEST[score]}")
        for ax, score in ((axes[0, 0], "gold_nll"), (axes[0, 1], "acc_norm"))
    ] + [(axes[1, 1], "gold_nll", dict.fromkeys(AT_SMALL_RATE, SMALL_RATE), f"all at --lr {as_text(SMALL_RATE)}")]
    looks = {m: {"ls": "--" if "FP32" in m else "-", "color": f"C{k}", "marker": "."} for k, m in enumerate(METHODS)}
    for ax, score, rates, title in panels:
        for method in METHODS:
            if runs := seeds_of(results, method, rates.get(method)):
                scores = np.array([[e[score] for e in run["eval"]] for run in runs])
                error, mean = scores.std(0) / max(1, len(runs) - 1) ** 0.5, scores.mean(0)
                ax.plot(mean, **looks[method])
                ax.fill_between(range(len(mean)), mean - error, mean + error, alpha=0.2, color=looks[method]["color"])
        ax.set(title=title, xlabel="epochs of the demo's 8,021 training rows", ylabel=f"held-out {SCORES[score]}")
        ax.set_xticks(range(4))
    axes[0, 0].set_ylim(78.2, top := 80.2)
    axes[0, 0].set_title(f"{panels[0][3]}; above {top} nats left out")
    for method in METHODS:
        runs = last_scores(results, method, grid(method)).values()
        axes[1, 0].plot(*([run[s] for run in runs] for s in ("gold_nll", "acc_norm")), label=method, **looks[method])
    axes[1, 0].set_xlim(78, 92)
    axes[1, 0].set(title=f"after three epochs, a dot a rate, seed {SEEDS[0]}; above 92 nats left out")
    axes[1, 0].set(xlabel="held-out gold NLL, nats", ylabel="held-out acc_norm, %")
    for ax in axes.flat:
        ax.grid(alpha=0.3)
        ax.title.set_fontsize(10)
    figure.legend(loc="outside lower center", ncols=3, fontsize=9)
    figure.savefig(out, dpi=130)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="the demo's model folder")
    parser.add_argument("--dataset", help="the demo's data set folder")
    parser.add_argument("--results", type=Path, default=RESULTS / "accuracy.jsonl")
    parser.add_argument(
        "--only", nargs="+", default=[*METHODS, *ABLATIONS], choices=[*METHODS, *ABLATIONS], metavar="METHOD"
    )
    parser.add_argument("--lr", type=float, help="with --seed: run this cell of each method, though results hold it")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--at_once", type=int, default=1, help="processes on each card")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no run after so many")
    parser.add_argument("--commit", default=gpu.commit(), help="recorded in the results; asked of git if left out")
    parser.add_argument("--report", action="store_true", help="print the tables and draw accuracy.png, run nothing")
    parser.add_argument(
        "--speed", type=Path, default=RESULTS / "gpu-smollm2.json", help="gpu.py's results, for --report"
    )
    args = parser.parse_args()
    results = load(args.results)
    if args.report:
        if not results:
            parser.error(f"{args.results} holds no results yet")
        cases = json.loads(args.speed.read_text())["cases"] if args.speed.exists() else []
        speed = {case["case"]: case for case in cases if "failed" not in case}
        tables = [table(results, speed, score) for score in BEST]
        more = [f(results) for f in (equal_nll_table, seeds_table, grid_table, small_rate_table, equal_rate_table)]
        for lines in [*tables, *more]:
            print(*lines, "", sep="\n")
        print(f"cells that have not run: {len(missing_cells(results, [*METHODS, *ABLATIONS]))} (best rates may change)")
        plot(results, args.results.with_suffix(".png"))
    elif not args.model or not args.dataset or (args.lr is None) != (args.seed is None):
        parser.error("--model and --dataset name the demo's folders; --lr and --seed go together")
    elif args.lr is not None:
        again = [(method, args.lr, args.seed) for method in args.only]
        run_cells(lambda done: [cell for cell in again if cell not in done], {}, args)
    else:
        run_cells(lambda done: missing_cells(done, args.only), results, args)


if __name__ == "__main__":
    main()
