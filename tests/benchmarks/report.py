"""Fills the tables and figures of README.md and docs/ from the committed results.

    python tests/benchmarks/report.py --check    # exit code 1, naming them, if blocks or generated files would change
    python tests/benchmarks/report.py --write    # write those

A block stands between <!-- results: NAME --> and <!-- end -->, on lines of its own or in a sentence (not at a line's
start, where Markdown would take the line for HTML). NAME is that of a function below, which returns lines or words.
What is too long for a page is a whole file, results/accuracy-grids.md.
"""

import argparse
import functools
import json
import re
import sys
from itertools import product
from pathlib import Path
from statistics import mean, stdev

import accuracy
import gpu
import numpy as np
import ranks

ROOT, RESULTS = Path(__file__).parents[2], Path(__file__).parent / "results"
GRIDS = RESULTS / "accuracy-grids.md"
MARKED = re.compile(r"(<!-- results: (\S+) -->)(.*?)(<!-- end -->)", re.DOTALL)
BLOCKS = {}  # {name: function that returns the block's lines or words}
# gpu.py's results; of a table's cases the first that has them all counts
NEWEST = ["headline-h200.json", "gpu-h200.json", "gpu-h100.json"]
LOW, ADAM, ADAM_8, ADAFACTOR = "low-memory", accuracy.YARDSTICK, "FP32 Adam, batch 8", "FP32 Adafactor, batch 8"


def block(function):
    BLOCKS[function.__name__] = function
    return function


# ---------------------------------------------------------------------------------------------------------------------
# Reading results, writing Markdown


@functools.cache
def load(file):
    return json.loads((RESULTS / file).read_text())


def cases(file):
    """{name: case} of gpu.py's or ranks.py's results."""
    return {case["case"]: case for case in load(file)["cases"] if "failed" not in case}


def newest(names):
    """(file, the cases of those names) of the newest results that have them all."""
    file = next((f for f in NEWEST if (RESULTS / f).exists() and set(names) <= cases(f).keys()), None)
    return file, [cases(file)[name] for name in names] if file else []


def table(head, rows):
    """Lines of Markdown."""
    return [f"| {' | '.join(map(str, line))} |" for line in [head, ["---"] * len(head), *rows]]


def cards(found):
    return ", ".join(dict.fromkeys(case["versions"]["device"].removesuffix(" 80GB HBM3") for case in found))


def measured(file, found):
    """On which card and at which commits the cases of a table were measured, and where that is written."""
    commits = list(dict.fromkeys(case["commit"][:7] for case in found))
    return f"{cards(found)}, commit{'s' * (len(commits) > 1)} {', '.join(commits)}, `tests/benchmarks/results/{file}`"


def source(file, found):
    """The same as lines below a table."""
    return ["", f"{measured(file, found)}."]


def peak(case):
    """GiB in use on the card at most, in all phases of the run; of a peer in training."""
    return f"{ranks.peak_gib(case) if 'memory_gib' in case else case['device_gib']:.2f}"


def rows_per_second(case):
    return f"{case['rows_per_second']:.3g}"


def mean_and_error(values):
    return f"{mean(values):.2f} ± {stdev(values) / len(values) ** 0.5:.2f}"


# ---------------------------------------------------------------------------------------------------------------------
# Memory and speed on one GPU


@block
def headline():
    what = {
        "FP32 Adam 1B": "Llama-3.2-1B, FP32 Adam (`finetune_base.py`), batch 32",
        "low-memory 1B": "**Llama-3.2-1B, `finetune_lowmem.py`**, batch 8",
        "low-memory 8B": "**Llama-3.1-8B, `finetune_lowmem.py`**, batch 8",
        "8B, batch 8, 3 GiB": "the same with `--memory_budget 3`, streamed from host memory",
    }
    file, found = newest(what)
    rows = [[what[case["case"]], f"{peak(case)} GiB", rows_per_second(case)] for case in found]
    return table([measured(file, found), "peak memory on the card", "rows/s"], rows)


@block
def acc_norm_at_equal_loss():
    ours, theirs, _ = at_equal_loss(ADAM, "gold_nll")
    low, adam = (f"{accuracy.by_row(runs, 'acc_norm').mean():.2f} %" for runs in (ours, theirs))
    return f"{low}, FP32 Adam {adam}; a difference of {difference_cells(ours, theirs)[2]}"


@block
def streaming():
    file, found = newest(gpu.BUDGETS)
    rows = []
    for name, case in zip(gpu.BUDGETS, found, strict=True):
        shape, batch, budget = name.split(", ")
        layers = f"{case['layers_on_gpu']} of {gpu.SHAPES[shape]['num_hidden_layers']}"
        predicted = f"{case['predicted_gib']:.2f}"
        rows.append([shape, budget, batch.removeprefix("batch "), layers, predicted, peak(case), rows_per_second(case)])
    head = ["Llama", "`--memory_budget`", "batch", "layers on the GPU", "predicted peak, GiB", "peak, GiB", "rows/s"]
    return table(head, rows) + source(file, found)


@block
def streaming_short():
    file, found = newest([f"8B, batch 8, {gib} GiB" for gib in (6, 12)])
    texts = (f"{peak(case)} GiB at {rows_per_second(case)} rows/s with {case['card_gib']}" for case in found)
    return f"{' and '.join(texts)} ({cards(found)})"


@block
def memory_and_speed():
    """Every resident case of the Llama shapes, each from the newest file that has it."""
    names = [name for name in gpu.CASES if "again" not in name and "noise" not in name]
    found, rows = {name: newest([name]) for name in names if newest([name])[0]}, []
    for name, (_, (case,)) in found.items():
        speeds = [rows_per_second(case), f"{case['ms_per_step']:.1f}", f"{case['busy_ms_per_step']:.1f}"]
        where = f"{case['versions']['device'].split()[1]}, {case['commit'][:7]}"
        rows.append([name, case["batch_size"], peak(case), *speeds, f"{case['seconds_to_first_step']:.0f}", where])
    head = ["", "batch", "peak, GiB", "rows/s", "ms a step", "GPU busy, ms", "first step, s", "card, commit"]
    files = ", ".join(dict.fromkeys(f"`tests/benchmarks/results/{file}`" for file, _ in found.values()))
    return [*table(head, rows), "", f"{files}."]


@block
def without_padding():
    """The same cases with rows padded to one length, as they were before, and in one line."""
    before, now, rows = cases("padded-h200.json"), cases("headline-h200.json"), []
    now = {name: now[name] for name in before}
    for name, old in before.items():
        new = now[name]
        figures = [(peak(c), f"{c['rows_per_second']:.1f}", f"{c['tokens_per_second']:,.0f}") for c in (old, new)]
        times = f"{new['tokens_per_second'] / old['tokens_per_second']:.2f}"
        rows.append([name, *(x for pair in zip(*figures, strict=True) for x in pair), times])
    head = [f"{what}, {how}" for what in ("peak, GiB", "rows/s", "tokens/s") for how in ("padded", "in a line")]
    files = measured("padded-h200.json", before.values()), measured("headline-h200.json", now.values())
    return [*table(["", *head, "times"], rows), "", f"Padded: {files[0]}; in a line: {files[1]}."]


@block
def where_the_memory_is():
    file, found = newest(["low-memory 1B", "low-memory 8B"])
    parts = [part for part in found[0]["ledger_gib"] if "share" not in part]
    rows = [[part, *(f"{case['ledger_gib'][part]:.3f}" for case in found)] for part in parts]
    rows.append(["in use on the card", *(f"{case['memory_gib']['train']['device']:.3f}" for case in found)])
    return table(["GiB", "1B", "8B"], rows) + source(file, found)


@block
def eager_differences():
    found = cases("gpu-h100.json")
    pairs, rows = [pair for pair in gpu.YARDSTICKS.items() if set(pair) <= found.keys()], []
    for pair in pairs:
        losses = zip(*(found[name]["losses"] for name in pair), strict=False)  # some runs are shorter
        differences = [a - b for a, b in losses]
        rows.append([*pair, len(differences), f"{mean(differences):+.4f}", f"{max(map(abs, differences)):.3f}"])
    used = [found[name] for pair in pairs for name in pair]
    return table(["loss of", "minus", "steps", "mean, nats", "largest"], rows) + source("gpu-h100.json", used)


@block
def update_in_a_step():
    _, found = newest(["low-memory 1B", "low-memory 8B"])
    texts = (
        f"at {case['shape']} in {case['update_ms_per_step']:.1f} of {case['busy_ms_per_step']:.1f} ms, "
        f"{case['update_tb_per_s']:.1f} TB/s"
        for case in found
    )
    return "; ".join(texts)


@block
def cross_entropy():
    """From what cross_entropy.py prints; times of graphs where it has them."""
    card, rows = (RESULTS / "cross-entropy-h200.txt").read_text().split("\n", 1)
    pattern = r"(\S+) +(\S+) +gradient off by (\S+) %  (\S+) ms, as a graph (\S+) ms  (\d+) MiB"
    rows = [
        [shape, f"`{flag}`", f"{off} %", graph, ms, f"{mib} MiB"]
        for shape, flag, off, ms, graph, mib in re.findall(pattern, rows)
    ]
    head = ["268 targets", "`--cross_entropy`", "gradient off by", "ms as a graph", "ms launched one by one"]
    head.append("memory beside the inputs")
    return [*table(head, rows), "", f"{card}: `tests/benchmarks/results/cross-entropy-h200.txt`."]


@block
def peers():
    ours = cases("gpu-h100.json")
    known = {(peer["peer"], peer["shape"]): peer for peer in load("peers-h100.json")["peers"] if "failed" not in peer}
    cells = {("`finetune_lowmem.py`", shape): ours[f"low-memory {shape}"] for shape in ("1B", "8B", "SmolLM2")}
    rows = []
    for name in ["`finetune_lowmem.py`", *sorted({n for n, _ in known}, key=lambda n: known[n, "1B"]["device_gib"])]:
        cases_of = [(known | cells).get((name, shape)) for shape in ("1B", "8B", "SmolLM2")]
        row = [f"{name} ({known[name, '1B']['package']})" if (name, "1B") in known else name]
        for case in cases_of[:2]:
            row += [peak(case), rows_per_second(case)] if case else ["not run", ""]
        gold_nll = cases_of[2]["eval"][-1]["gold_nll"] if "eval" in cases_of[2] else cases_of[2]["gold_nll"]
        rows.append([*row, f"{gold_nll:.2f}"])
    head = ["", "1B: peak, GiB", "rows/s", "8B: peak, GiB", "rows/s", "gold NLL"]
    commits = ", ".join(sorted({peer["commit"][:7] for peer in known.values()}))
    return [*table(head, rows), "", f"One H100, commits {commits}: `tests/benchmarks/results/peers-h100.json`."]


@block
def soak():
    rows = [
        [case["case"], *(f"{case[k]:+} bytes" for k in ("allocated_delta", "reserved_delta")),
         f"{case['host_delta_percent']:+.2f} %", f"{case['speed_drift_percent']:+.1f} %"]
        for case in load("soak-h100.json")
    ]  # fmt: skip
    head = ["1B, step 100 to 2,200", "allocated", "reserved", "host memory", "rows/s"]
    return table(head, rows) + source("soak-h100.json", load("soak-h100.json"))


@block
def reading_back():
    found = load("read-back-h200.json")
    heads = {
        "model": "", "gib": "GiB", "save_seconds": "save, s", "read_back_seconds": "read back, s",
        "host_gib": "host memory for that, GiB", "disk_gib_per_second": "the disk alone, GiB/s",
    }  # fmt: skip
    rows = [[case[key] for key in heads] for case in found["cases"]]
    where = f"{found['machine']['card']}, commit ec96961: `tests/benchmarks/results/read-back-h200.json`."
    return [*table(heads.values(), rows), "", where]


@block
def rounding():
    names, found = {"cuda": "H100", "cpu": "CPU"}, load("rounding.json")
    rows = [[names[run["device"]], *(f"{ratio:.4f} ± {error:.4f}" for _, ratio, error in run["rows"])] for run in found]
    return table(["step, bf16 ulp", *(step for step, *_ in found[0]["rows"])], rows)


@block
def harness():
    found = load("harness.json")
    ours, theirs = (f"{found[who]['acc']:.1f} and {found[who]['acc_norm']:.1f} %" for who in ("ours", "harness"))
    same = f"{ours} in both" if ours == theirs else f"{ours} here, {theirs} there"
    return f"{found['largest_difference_nats']:.1e} nats at most; acc and acc_norm {same}"


# ---------------------------------------------------------------------------------------------------------------------
# Own data


@block
def conversations():
    what = {
        "low-memory 8B, not compiled, whole card": "`finetune_lowmem.py`",
        "8B, batch 8, 6 GiB": "`finetune_lowmem.py --memory_budget 6`",
        "TRL, padded, 8 rows": "TRL, 8 padded rows a step",
        "TRL, packed": "TRL, packed to 4,096 tokens a step",
    }
    found = cases("chat-h200.json")
    speeds = ("rows_per_second", "tokens_per_second", "target_tokens_per_second")
    rows = [
        [name, f"{found[case]['memory_gib']['train']['device']:.2f}", f"{found[case][speeds[0]]:.1f}"]
        + [f"{found[case][speed]:,.0f}" for speed in speeds[1:]]
        for case, name in what.items()
    ]
    head = ["8B", "peak in training, GiB", "rows/s", "tokens/s", "target tokens/s"]
    return table(head, rows) + source("chat-h200.json", [found[case] for case in what])


@block
def dry_runs():
    whole, within = (cases("chat-h200.json")[case] for case in ("dry run", "dry run, 6 GiB"))
    where = f"{whole['machine']['card']}, commit {whole['commit'][:7]}, `tests/benchmarks/results/chat-h200.json`"
    return f"{whole['seconds']:.0f} s, with `--memory_budget 6` {within['seconds']:.0f} s ({where})"


@block
def questions_and_answers():
    """Held-out NLL a token over each script's rates, and over seeds at its best one."""
    runs = [json.loads(line) for line in (RESULTS / "own-data-cpu.jsonl").read_text().splitlines()]
    best_of, rows = {}, []
    for method in (LOW, ADAM_8):
        of_rate = {}
        own = sorted((run for run in runs if run["method"] == method), key=lambda run: (run["lr"], run["seed"]))
        for run in own:
            of_rate.setdefault(run["lr"], []).append(run["eval"][-1]["nll"])
        after = best_of[method] = min(of_rate.values(), key=lambda found: found[0])
        grid = ", ".join(f"{accuracy.as_text(rate)}: {found[0]:.3f}" for rate, found in of_rate.items())
        rows.append([method, f"{own[0]['eval'][0]['nll']:.3f}", grid, f"{mean(after):.3f}", f"{stdev(after):.3f}"])
    apart = mean(best_of[LOW]) - mean(best_of[ADAM_8])
    error = sum(stdev(after) ** 2 / len(after) for after in best_of.values()) ** 0.5
    head = [
        "",
        "before",
        "after, by `--lr`, one seed",
        f"at the best, mean of {len(after)} seeds",
        "standard deviation",
    ]
    where = f"{runs[0]['versions']['device']}, commit {runs[0]['commit'][:7]}, `tests/benchmarks/results/own-data-cpu.jsonl`"
    return [
        *table(head, rows),
        "",
        f"Low-memory minus FP32 Adam: {apart:+.3f} ± {error:.3f} (standard error). {where}.",
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Several GPUs


FOUR_GPUS = "four-gpus-h200.json"


def several_of(gpus, batch, model="8B"):
    """The case of FOUR_GPUS on "one" GPU, "two" or "four"."""
    return cases(FOUR_GPUS)[f"{model}, {gpus} GPU{'s' * (gpus != 'one')}, batch {batch}"]


@block
def several_gpus_short():
    one, two, four = several_of("one", 16), several_of("two", 32), several_of("four", 64)
    times = [f"{case['rows_per_second'] / one['rows_per_second']:.2f} times" for case in (two, four)]
    large = several_of("four", 8, "70B")
    return (
        f"8B, 16 rows a card: two cards do {times[0]} the rows/s of one, four {times[1]}; 70B on four takes "
        f"{peak(large)} GiB of a card at most ({cards([one, two, four, large])})"
    )


@block
def several_gpus():
    rows, found = [], [case for name, case in cases(FOUR_GPUS).items() if "NCCL" not in name]
    for case in found:
        train, load_ = case["memory_gib"]["train"], case["memory_gib"]["load"]
        context = load_["device"] - load_["reserved"]
        gib = [train["reserved"], train["allocated"], context, train["device"] - train["reserved"] - context]
        share, waiting = ranks.share_of_linear(case, found), ranks.share_of_communication(case)
        waits = f"{100 * waiting:.0f} %" if waiting else ""
        speeds = [rows_per_second(case), f"{case['ms_per_step']:.0f}", waits, f"{share:.2f}" if share else ""]
        what = [case["case"].split(",")[0], case["batch_size"], case["gpus"], peak(case)]
        rows.append([*what, *(f"{x:.2f}" for x in gib), *speeds])
    gib = ["peak on the fullest card, GiB", "reserved", "allocated", "CUDA, NCCL", "graphs"]
    head = ["", "batch", "GPUs", *gib, "rows/s", "ms a step", "only communication", "of linear"]
    return table(head, rows) + source(FOUR_GPUS, found)


@block
def several_gpus_losses():
    fell = []
    for batch in (8, 32, 128):
        before, after = ranks.losses(several_of("four", batch, "70B"))
        fell.append(f"{before:.2f} to {after:.2f} with {batch} rows a step")
    return f"{', '.join(fell)} (means of steps 1 to 5 and 26 to 30)"


@block
def several_gpus_time():
    one, four = several_of("one", 16), several_of("four", 64)
    products, copies = "matrix products", "FSDP2's copies"
    return (
        f"{four['ms_per_step']:.0f} ms on four cards instead of {one['ms_per_step']:.0f}. For "
        f"{four['only_communication_ms']:.0f} ms only communication runs. Beside it {products} take "
        f"{four['kernel_ms'][products]:.0f} ms instead of {one['kernel_ms'][products]:.0f}, and {copies} "
        f"{four['kernel_ms'][copies]:.0f}"
    )


@block
def several_gpus_reckoned():
    gib, moved, rate, seconds = ranks.reckon(several_of("four", 8, "70B"), 8)
    return (
        f"{gib:.1f} GiB of each of eight cards; a step moves {moved:.0f} GiB to each, in at least {seconds:.1f} s at the "
        f"{rate:.0f} GB/s of four"
    )


@block
def two_gpus():
    rows, used, file = [], [], "ranks-h200.json"
    for name in ("1B, two GPUs", "8B, two GPUs", "8B, two GPUs, batch 32", "8B, two GPUs, batch 128"):
        two = cases(file)[name]
        one = ranks.of_one_gpu(two, cases(file).values(), two["batch_size"])
        used += [one, two]
        times = f"{two['rows_per_second'] / one['rows_per_second']:.2f}"
        speeds = [rows_per_second(one), rows_per_second(two), times]
        rows.append([name.split(",")[0], two["batch_size"], peak(one), peak(two), *speeds])
    head = ["", "batch", "one: GiB", "two: GiB on each", "one: rows/s", "two: rows/s", "times one"]
    return table(head, rows) + source(file, used)


# ---------------------------------------------------------------------------------------------------------------------
# Accuracy


@functools.cache
def runs_by_cell():
    return accuracy.load(RESULTS / "accuracy.jsonl")


@functools.cache
def resampled(rows, seeds, draws=10_000):
    """(uint8 [draws, rows], [draws, seeds]): how often each bootstrap sample has a row, and which seeds it has.

    The same draws as accuracy.difference's, made once for all pairs of so many rows and seeds.
    """
    rng = np.random.default_rng(0)
    drawn = [(rng.integers(rows, size=rows), rng.integers(seeds, size=seeds)) for _ in range(draws)]
    counts = [np.bincount(of_rows, minlength=rows).astype(np.uint8) for of_rows, _ in drawn]
    return np.array(counts), np.array([of_seeds for _, of_seeds in drawn])


def difference_cells(ours, theirs):
    """As accuracy.difference_cells, in a tenth of its time: all scores of all pairs by the same samples."""
    seeds = sorted({run["seed"] for run in ours} & {run["seed"] for run in theirs})
    pair = [[run for seed in seeds for run in runs if run["seed"] == seed] for runs in (ours, theirs)]
    difference = np.stack([accuracy.by_row(pair[0], s) - accuracy.by_row(pair[1], s) for s in accuracy.SCORES])
    by_row, by_seed = difference.mean(1), difference.mean(2)  # [scores, rows], [scores, seeds]
    scatter = (by_seed - by_seed.mean(1, keepdims=True)) * (len(seeds) / max(1, len(seeds) - 1)) ** 0.5
    row_counts, seed_draws = resampled(by_row.shape[1], len(seeds))
    means = np.concatenate([part @ by_row.T / by_row.shape[1] for part in np.array_split(row_counts, 10)])
    samples = means + scatter.T[seed_draws].mean(1)  # [draws, scores]
    found = zip(by_row.mean(1), *np.percentile(samples, [2.5, 97.5], axis=0), strict=True)
    return [str(len(seeds)), *(f"{d:+.2f} ({low:+.2f} to {high:+.2f})" for d, low, high in found)]


accuracy.difference_cells = difference_cells


def best(method, score):
    """(rate, runs of all seeds) of a method at its best rate by the score."""
    rate = accuracy.best_rate(runs_by_cell(), method, score)
    return rate, accuracy.seeds_of(runs_by_cell(), method, rate)


def at_equal_loss(other, score):
    """(low-memory's runs as they would be at the other's gold NLL, the other's at its best rate, low-memory's rates)."""
    theirs = best(other, score)[1]
    rates = accuracy.rates_around(runs_by_cell(), LOW, accuracy.mean_nll(theirs), accuracy.CLOSER[LOW])
    return accuracy.at_gold_nll(runs_by_cell(), LOW, rates, theirs), theirs, rates


@block
def accuracy_of_all():
    speeds, rows = cases("gpu-smollm2.json"), []
    for name, method in (("FP32", ADAM), ("bf16", LOW)):
        before = best(method, "gold_nll")[1][0]["eval"][0]
        scores = [f"{before[score]:.2f}" for score in ("acc_norm", "gold_nll")]
        rows.append([f"untrained, {name} weights", "", "", "", *scores, "", "", ""])
    for method in accuracy.METHODS:
        case = speeds.get(f"SmolLM2 not compiled: {method}")
        row = [f"**{method}**" if method == LOW else method]
        row += [peak(case), f"{case['rows_per_second']:.0f}"] if case else ["", ""]
        for score in accuracy.BEST:
            rate, runs = best(method, score)
            values = [[run["eval"][-1][name] for run in runs] for name in ("acc_norm", "gold_nll")]
            row += [accuracy.as_text(rate), *map(mean_and_error, values)]
        if method != accuracy.PLAIN:
            rows.append(row)
    head = ["", "peak, GiB", "rows/s", "lowest NLL: `--lr`", "acc_norm, %", "NLL, nats"]
    return table([*head, "by acc_norm: `--lr`", *head[-2:]], rows)


HOW = {"gold_nll": "each at its lowest NLL", "acc_norm": "each by acc_norm"}
DIFFERENCES = ["low-memory minus", "compared", "`--lr` of both", "seeds", "acc_norm, points", "NLL, nats"]


def difference_row(name, how, ours, theirs, rates=None):
    """A row of DIFFERENCES; ours, theirs: (rate, runs); rates: low-memory's, if its runs lie between two."""
    between = " to ".join(map(accuracy.as_text, rates or [ours[0]]))
    seeds, _, acc_norm, nll = difference_cells(ours[1], theirs[1])
    return [name, how, f"{between}, {accuracy.as_text(theirs[0])}", seeds, acc_norm, "0" if rates else nll]


@block
def accuracy_differences():
    rows = []
    for other, score in product((ADAM, ADAM_8), accuracy.BEST):
        rows.append(difference_row(other, HOW[score], best(LOW, score), best(other, score)))
        ours, theirs, rates = at_equal_loss(other, score)
        how = f"at equal NLL, {accuracy.mean_nll(theirs):.2f}"
        rows.append(difference_row(other, how, (None, ours), best(other, score), rates))
    for rate in (1e-4, 3e-4):
        pair = [(rate, accuracy.seeds_of(runs_by_cell(), method, rate)) for method in (LOW, ADAFACTOR)]
        rows.append(difference_row(ADAFACTOR, "at the same rate", *pair))
    return table(DIFFERENCES, rows)


@block
def cost_of_rounding():
    what = {
        accuracy.PLAIN: "plain stochastic rounding",
        "low-memory, independent-noise": "norms and biases compensated",
        LOW: "**low-memory**: antithetic noise too",
        "low-memory, master-weights": "fp32 master weights, 4 bytes each",
    }
    rates, rows = (1e-4, 2e-4, 3e-4), []
    for method, name in what.items():
        cells = [name]
        for rate in rates:
            pair = [accuracy.seeds_of(runs_by_cell(), m, rate) for m in (method, ADAFACTOR)]
            seeds, _, _, nll = difference_cells(*pair) if all(pair) else ("", "", "", "not run")
            cells.append(nll + {"1": ", one seed", "4": ", four seeds"}.get(seeds, ""))
        rows.append(cells)
    return table(["NLL above FP32 Adafactor's, nats", *(f"`--lr {accuracy.as_text(rate)}`" for rate in rates)], rows)


@block
def noise():
    rises = load("noise.json")["rises"]
    parts = (f"{mean_and_error(rises[part])} in the {part}" for part in ("vectors", "matrices"))
    return f"{' and by '.join(parts)}, {mean_and_error(rises['both'])} from both"


@block
def settings():
    """What low-memory gains by its defaults."""
    rows = [
        difference_row(f"`{flag}`", HOW[score], best(LOW, score), best(f"{LOW}, {flag}", score))
        for flag in ("--nostround", "--schedule constant", "--train_text raw")
        for score in accuracy.BEST
    ]
    return table(DIFFERENCES, rows)


@block
def small_rate():
    return list(accuracy.small_rate_table(runs_by_cell()))


@block
def ablations():
    """acc_norm of other update rules at equal gold NLL, that of FP32 Adam at its two rates."""
    what = {
        "unfactored": "a second moment for each weight",
        "equal-steps": "steps of one size for all tensors, as Adam's",
        "unfactored-equal-steps": "both of these",
        "factored-adam": "Adam's steps, second moment factored",
        "clipping": "update clipped to RMS 1, not rescaled",
        "clipping-beta2": "the same, second moment over 1,000 steps",
        "--batch_size 32": "batches of 32",
    }
    pairs = [(f"{LOW}, {change}", LOW, name) for change, name in what.items()]
    pairs += [(f"FP32 Adam, batch {n}, no-momentum", ADAM, f"Adam without momentum, batch {n}") for n in (8, 32)]
    results, golds, rows = runs_by_cell(), [best(ADAM, score)[1] for score in accuracy.BEST], []
    for method, other, name in pairs:
        row = [name, other]
        for theirs in golds:
            gold_nll, ours = accuracy.mean_nll(theirs), None
            if rates := accuracy.rates_around(results, method, gold_nll):
                ours = accuracy.at_gold_nll(results, method, rates, theirs)
            if ours and other == LOW:  # both between rates of the grid
                theirs = accuracy.at_gold_nll(results, LOW, accuracy.rates_around(results, LOW, gold_nll), ours)
            row += [difference_cells(ours, theirs)[2] if ours else "no rate ends there"]
        rows.append(row)
    heads = [f"acc_norm at NLL {accuracy.mean_nll(theirs):.2f}" for theirs in golds]
    return table(["changed", "minus", *heads], rows)


def grids():
    """Lines of the generated file."""
    results, speeds = runs_by_cell(), cases("gpu-smollm2.json")
    yield "# Accuracy: all figures"
    yield ""
    yield "What [docs/accuracy.md](../../../docs/accuracy.md) tells in short. Differences are on the same rows and seeds;"
    yield 'in brackets 95 % intervals. "Plain-rounding" is the low-memory script up to commit e49e0b5,'
    yield '"independent-noise" that of commit da2ddf0; the other names are explained in [docs/log.md](../../../docs/log.md).'
    for title, lines in (
        ("All rates, seed 42", accuracy.grid_table(results)),
        ("Each method at its lowest NLL", accuracy.table(results, speeds, "gold_nll")),
        ("Each method by acc_norm", accuracy.table(results, speeds, "acc_norm")),
        ("Means over seeds", accuracy.seeds_table(results)),
        ("At equal NLL", accuracy.equal_nll_table(results)),
        ("At the same rate", accuracy.equal_rate_table(results)),
        ("A small rate on a CPU", small_rate_on_a_cpu()),
        ("The loss, before there was our own", loss_ablation()),
    ):
        yield from ("", f"## {title}", "", *lines)


def small_rate_on_a_cpu():
    found = load("small-rate-cpu.json")
    first, rows = found[0]["gold_nll_by_row"], []
    for run in found:
        before, after = (f"{e['gold_nll']:.2f}" for e in run["eval"])
        less = np.array(run["gold_nll_by_row"]["after"]) - run["gold_nll_by_row"]["before"]
        less = less - np.array(first["after"]) + first["before"]
        cells = "" if run is found[0] else f"{less.mean():.2f} ± {less.std(ddof=1) / len(less) ** 0.5:.2f}"
        rows.append([run["name"], run["commit"], before, after, cells])
    return table(["gold NLL at 1e-5", "commit", "0 steps", "400 steps", "falls less than in FP32 by"], rows)


def loss_ablation():
    rows = []
    for run in map(json.loads, (RESULTS / "ablation-h100.jsonl").read_text().splitlines()):
        name = f"{run['script']}, {run.get('optimizer', run['changed'])}, batch {run['batch_size']}"
        nll = [f"{e['gold_nll']:.2f}" for e in run["eval"][1:]]
        nll += [""] * (3 - len(nll))
        rows.append([name, accuracy.as_text(run["lr"]), run["schedule"], *nll, f"{run['eval'][-1]['acc_norm']:.1f}"])
    head = ["1,000 rows, one H100, commit ef4d86c", "`--lr`", "schedule", "NLL after 1", "2", "3 epochs", "acc_norm, %"]
    return table(head, rows)


# ---------------------------------------------------------------------------------------------------------------------
# The pages


def pages():
    return [ROOT / "README.md", Path(__file__).with_name("README.md"), *sorted((ROOT / "docs").glob("*.md"))]


def filled(text):
    """(the text with its blocks filled, names of those that changed). Raises ValueError for a marker without its pair."""
    changed = []

    def fill(found):
        start, name, old, end = found.groups()
        made = BLOCKS[name.replace("-", "_")]()
        if isinstance(made, str) and not text[: found.start()].rpartition("\n")[2].strip():
            raise ValueError(f"{name} stands at a line's start, where Markdown takes the line for HTML")
        new = made if isinstance(made, str) else "\n" + "\n".join(made) + "\n"
        changed.extend([name] * (new != old))
        return start + new + end

    new_text, number = MARKED.subn(fill, text)
    if not number == text.count("<!-- results:") == text.count("<!-- end -->"):
        raise ValueError("a marker of results has no end, or an end no marker")
    return new_text, changed


def changes(files=True):
    """{path: (its text as it should be, what of it differs)} of the pages and, with `files`, of the generated file."""
    found = {page: filled(page.read_text()) for page in pages()}
    if files:
        text = "\n".join([*grids(), ""])
        found[GRIDS] = text, ["all"] * (not GRIDS.exists() or GRIDS.read_text() != text)
    return {path: change for path, change in found.items() if change[1]}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--check", action="store_true", help="exit code 1 if anything would change")
    group.add_argument("--write", action="store_true", help="write what would change")
    args = parser.parse_args()
    found = changes()
    for path, (text, names) in found.items():
        print(f"{path.relative_to(ROOT)}: {', '.join(names)}")
        if args.write:
            path.write_text(text)
    sys.exit(1 if found and args.check else 0)


if __name__ == "__main__":
    main()
