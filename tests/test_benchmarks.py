"""The accuracy benchmark's choices, statistics and bookkeeping; what it measures needs a GPU and an hour."""

import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_row

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
import accuracy
import noise
import ranks
import read_back
import variant

import common

ROOT = Path(__file__).parents[1]


def result(method, lr, seed, gold_nll=80.0, acc_norm=40.0, rows=None):
    scores = {"acc": 30.0, "acc_norm": acc_norm, "gold_nll": gold_nll}
    before = scores | {"epoch": 0, "step": 0, "gold_nll": 88.0}
    last = scores | {"epoch": 1, "step": 9, "rows": 2000}
    return {"method": method, "lr": lr, "seed": seed, "eval": [before, last], "rows": rows}


def as_results(*found):
    return {accuracy.cell_of(r): r for r in found}


def test_the_best_rates_of_the_grid_are_run_with_the_other_seeds():
    """The standard error of an acc_norm of 40 % of 2,000 rows is 1.1 points."""
    method = "FP32 Adafactor, batch 8"
    grid = [(lr, abs(lr - 5e-5), 40 + k) for k, lr in enumerate(accuracy.GRID)]  # the highest acc_norm: at 5e-4
    small = [(method, 1e-5, seed) for seed in (43, 44)]  # beside the grid
    assert accuracy.best_rate({}, method, "gold_nll") is None
    assert accuracy.missing_cells({}, [method]) == [(method, lr, 42) for lr in accuracy.GRID] + small
    found = as_results(*(result(method, lr, 42, *scores) for lr, *scores in grid[1:]))
    assert accuracy.best_rate(found, method, "gold_nll") == 5e-5
    assert accuracy.best_rate(found, method, "acc_norm") == 3e-4  # 1 point below, of a lower gold NLL
    assert accuracy.missing_cells(found, [method]) == [(method, 1e-5, 42), *small]
    diverged = {"method": method, "lr": 1e-5, "seed": 42, "failed": "error: the run has diverged"}
    found |= as_results(diverged)
    wanted = [(method, lr, seed) for lr in (5e-5, 3e-4) for seed in (43, 44, 45, 46)]
    closer = [(method, lr, seed) for lr in accuracy.CLOSER[method] for seed in (42, 43, 44, 45, 46)]
    assert accuracy.missing_cells(found, [method]) == small + wanted + closer


def test_every_cell_is_wanted_once():
    found = {}
    for _ in range(2):  # the grids, then the seeds
        cells = accuracy.missing_cells(found, [*accuracy.METHODS, *accuracy.ABLATIONS])
        assert len(cells) == len(set(cells)) > 0
        found |= as_results(*(result(*cell, gold_nll=abs(cell[1] - 1e-4), acc_norm=1e5 * cell[1]) for cell in cells))
    assert not accuracy.missing_cells(found, [*accuracy.METHODS, *accuracy.ABLATIONS])
    best = {method: accuracy.best_rate(found, method, "gold_nll") for method in accuracy.METHODS}
    seeds = {method: len(accuracy.seeds_of(found, method, rate)) for method, rate in best.items()}
    five = ("low-memory", accuracy.PLAIN, accuracy.YARDSTICK, "FP32 Adafactor, batch 8")
    assert seeds == {method: 5 if method in five else 3 for method in seeds}
    for method in accuracy.AT_SMALL_RATE:
        assert len(accuracy.seeds_of(found, method, accuracy.SMALL_RATE)) == 3


def test_row_scores_are_those_of_the_script():
    scores = [[-3.0, -2.0, -9.0, -9.0], [-5.0, -4.0, -9.0, -1.0], [-1.0, -2.0, -3.0, -4.0], [-7.0, -7.0, -7.5, -8.0]]
    rows = [common.EvalRow(k, k % 2, [], [10, 3, 9, 2]) for k in range(4)]
    lines = [
        {"ind": row.ind, "label": row.label, "loglikelihoods": s, "chars": row.chars}
        for row, s in zip(rows, scores, strict=True)
    ]
    found = accuracy.row_scores(lines)
    assert found["acc"] == "0010"
    assert found["acc_norm"] == "1010"
    assert found["gold_nll"] == [3.0, 4.0, 1.0, 7.0]
    expected = common.accuracy(rows, scores)
    for score in accuracy.SCORES:
        by_row = accuracy.by_row([{"rows": found}], score)
        assert by_row.shape == (1, 4)
        assert by_row.mean() == pytest.approx(expected[score])


@pytest.mark.parametrize("seeds", [3, 8])
def test_intervals_hold_the_truth_as_often_as_they_say(seeds):
    """400 draws of rows that are as hard for both, rows that are harder for one, and seeds that scatter.

    Their mean width is that of 1.96 standard errors to either side, within 10 %; 95 % hold the difference, within 3.5
    errors of that share, and with three seeds, whose scatter is badly known, up to 5 points less.
    """
    rng, truth, held, widths = np.random.default_rng(0), 0.3, 0, []
    for trial in range(400):
        hard, harder = rng.normal(0, 5, 100), rng.normal(0, 1, 100)
        ours, theirs = (hard + rng.normal(0, 0.1, (seeds, 1)) + rng.normal(0, 0.5, (seeds, 100)) for _ in range(2))
        middle, low, high = accuracy.difference(truth + harder + ours, theirs, draws=200, seed=trial)
        assert low < middle < high
        held += low <= truth <= high
        widths.append(high - low)
    error = ((1 + 2 * 0.5**2 / seeds) / 100 + 2 * 0.1**2 / seeds) ** 0.5
    assert np.mean(widths) == pytest.approx(2 * 1.96 * error, rel=0.1)
    slack = 3.5 * (0.95 * 0.05 / 400) ** 0.5
    assert 0.95 - slack - (0.05 if seeds == 3 else 0) <= held / 400 <= 0.95 + slack


def test_the_interval_of_one_seed_is_that_of_its_rows():
    ours = np.random.default_rng(0).normal(0, 1, (1, 400))
    middle, low, high = accuracy.difference(ours, np.zeros((1, 400)))
    assert middle == pytest.approx(ours.mean())
    assert high - low == pytest.approx(2 * 1.96 * ours.std() / 20, rel=0.05)


def test_differences_are_between_common_seeds():
    rows = [{"acc": a, "acc_norm": "11", "gold_nll": [80.0, 80.0]} for a in ("11", "00", "10")]
    ours = [result("low-memory", 1e-4, seed, rows=rows[k]) for k, seed in enumerate((42, 43, 44))]
    theirs = [result("other", 1e-4, seed, rows=rows[1]) for seed in (43, 42, 45)]
    seeds, acc, acc_norm, gold_nll = accuracy.difference_cells(ours, theirs)
    assert (seeds, gold_nll) == ("2", "+0.00 (+0.00 to +0.00)")
    assert acc.startswith("+50.00 ")


@pytest.fixture
def few_draws(monkeypatch):
    monkeypatch.setattr(accuracy, "difference", functools.partial(accuracy.difference, draws=500))


def test_the_tables_print_what_the_results_hold(few_draws):
    rows = {"acc": "10", "acc_norm": "11", "gold_nll": [79.0, 81.0]}
    cells = accuracy.missing_cells({}, list(accuracy.METHODS))
    found = as_results(*(result(*cell, gold_nll=80 + cell[1], rows=rows) for cell in cells))
    speed = {"memory_gib": {"train": {"device": 1.5}, "eval": {"device": 1.25}}, "rows_per_second": 321.0}
    costs = {f"SmolLM2 not compiled: {m}": speed for m in accuracy.METHODS}
    text = "\n".join(accuracy.table(found, costs, "gold_nll"))
    assert "| low-memory | 1e-5 | 3 | 30.00 ± 0.00 | 40.00 ± 0.00 | 80.00 ± 0.00 | 1.50 | 321 |" in text
    none = "+0.00 (+0.00 to +0.00)"
    assert f"| low-memory | FP32 Adam, batch 32 | 1 | {none} | {none} | {none} |" in text
    assert f"| low-memory | FP32 Adafactor, batch 8 | 3 | {none} | {none} | {none} |" in text
    assert "| low-memory | 80.00 / 40.0 | 80.00 / 40.0 |" in "\n".join(accuracy.grid_table(found))
    assert "| low-memory, 3 seeds | 88.000 ± 0.000 | 80.000 ± 0.000 |" in "\n".join(accuracy.small_rate_table(found))


def test_tables_and_picture_of_results_that_are_not_complete(tmp_path):
    rows = {"acc": "10", "acc_norm": "11", "gold_nll": [79.0, 81.0]}
    found = as_results(result("low-memory", 1e-4, 42, rows=rows))
    for method in ("low-memory", "FP32 Adam, batch 8"):
        found |= as_results({"method": method, "lr": 3e-4, "seed": 42, "failed": "error: the run has diverged"})
    alone = list(accuracy.table(found, {}, "acc_norm"))
    assert [line.split(" | ")[0] for line in alone[2:4]] == ["| no fine-tuning, bf16 weights", "| low-memory"]
    assert alone[-1] == "|---|---|---|---|---|---|"  # no differences without a yardstick
    assert "| low-memory |  |  |  | 80.00 / 40.0 |  | diverged |  |  |" in list(accuracy.grid_table(found))
    assert len(list(accuracy.small_rate_table(found))) == 2
    found |= as_results(result("FP32 Adam, batch 32", 1e-4, 42, rows=rows))
    text = "\n".join(accuracy.table(found, {}, "acc_norm"))
    assert "| low-memory | 1e-4, of 2 rates so far | 1 | 30.00 | 40.00 | 80.00 | not measured | not measured |" in text
    assert "FP32 Adam, batch 8" not in text
    assert "| low-memory | FP32 Adam, batch 32 | 1 | +0.00 (+0.00 to +0.00) |" in text
    found |= as_results(result("low-memory, clipping", 1e-4, 42, rows=rows))
    line = "| low-memory, clipping | low-memory | 1e-4 | 1 | +0.00"
    assert list(accuracy.equal_rate_table(found))[2].startswith(line)
    accuracy.plot(found, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_rates_beyond_the_grid_are_a_methods_own():
    method, (more,) = next(iter(accuracy.WIDER.items()))
    assert (method, more, 42) in accuracy.missing_cells({}, [method])
    found = as_results(*(result(method, rate, 42, gold_nll=80 - 100 * rate) for rate in accuracy.grid(method)))
    assert accuracy.best_rate(found, method, "gold_nll") == more
    assert more not in accuracy.grid("low-memory")


def test_methods_are_compared_at_equal_gold_nll_too(few_draws):
    """Between 1e-4 and 2e-4, where the low-memory script's gold NLL is 79 and 81: at 79.5 a quarter of the way."""
    rows = [{"acc": a, "acc_norm": "11", "gold_nll": [nll, nll + 2]} for a, nll in (("10", 78.0), ("11", 80.0))]
    rates = {rate: 80.0 + abs(k - 3) for k, rate in enumerate(accuracy.GRID)} | {1e-4: 79.0, 2e-4: 81.0}
    found = as_results(
        *(result("low-memory", rate, 42, gold_nll, rows=rows[rate > 1e-4]) for rate, gold_nll in rates.items()),
        result("FP32 Adam, batch 32", 5e-5, 42, 79.5, rows={"acc": "11", "acc_norm": "10", "gold_nll": [79.5, 79.5]}),
    )
    assert accuracy.rates_around(found, "low-memory", 79.5) == (1e-4, 2e-4)
    assert accuracy.rates_around(found, "low-memory", 78.9) is None
    assert accuracy.rates_around(found, "low-memory", 99.0) is None
    assert set(accuracy.repeated_rates(found, "low-memory")) == {1e-4, 2e-4}
    assert list(accuracy.repeated_rates(found, "FP32 Adam, batch 32")) == [5e-5, 5e-5]
    theirs = accuracy.seeds_of(found, accuracy.YARDSTICK, 5e-5)
    (mixed,) = accuracy.at_gold_nll(found, "low-memory", (1e-4, 2e-4), theirs)
    assert mixed["rows"]["acc"].tolist() == [100, 25]
    assert mixed["rows"]["gold_nll"].tolist() == [78.5, 80.5]
    assert len(list(accuracy.equal_nll_table(found))) == 2 + len(accuracy.BEST)
    line = list(accuracy.equal_nll_table(found))[2]
    assert line.startswith("| low-memory | FP32 Adam, batch 32 | 79.50 | 1e-4 and 2e-4 | 1 | -37.50 ")
    assert " | +50.00 (" in line
    assert line.endswith("+0.00 (-1.00 to +1.00) |")
    rule, apart = "low-memory, clipping", {"acc": "11", "acc_norm": "11", "gold_nll": [78.5, 80.5]}
    found |= as_results(*(result(rule, lr, 42, nll, rows=apart) for lr, nll in ((1e-4, 79.25), (2e-4, 79.75))))
    found[rule, 2e-4, 42]["rows"] = apart | {"gold_nll": [79.5, 81.5]}
    line = list(accuracy.equal_nll_table(found))[4]
    assert line.startswith(f"| {rule} | low-memory | 79.50 | 1e-4 and 2e-4 | 1 | +37.50 ")
    assert line.endswith(" | +0.00 (+0.00 to +0.00) | +0.00 (+0.00 to +0.00) |")


def test_rates_between_the_grids_bring_equal_gold_nll_closer_but_are_nobodys_best():
    """In the end between 1.25e-4 and 1.5e-4, of gold NLL 79.2 and 79.6: at 79.5 three quarters of the way."""

    def rows(nll, acc="10"):
        return {"acc": acc, "acc_norm": "11", "gold_nll": [nll - 2, nll + 2]}

    rates = {rate: 80.0 + abs(k - 3) for k, rate in enumerate(accuracy.GRID)} | {1e-4: 79.0, 2e-4: 81.0}
    grid_alone = as_results(*(result("low-memory", rate, 42, nll, rows=rows(nll)) for rate, nll in rates.items()))
    closer = [(1.25e-4, 79.2, "00"), (1.5e-4, 79.6, "11")]
    found = grid_alone | as_results(
        *(result("low-memory", lr, s, nll, 99.0, rows(nll, acc)) for lr, nll, acc in closer for s in (42, 43))
    )
    assert accuracy.rates_around(found, "low-memory", 79.5) == (1e-4, 2e-4)
    assert accuracy.rates_around(found, "low-memory", 79.5, accuracy.CLOSER["low-memory"]) == (1.25e-4, 1.5e-4)
    theirs = [result(accuracy.YARDSTICK, 5e-5, s, 79.5, rows=rows(79.5)) for s in (42, 43, 44)]
    mixed = accuracy.at_gold_nll(found, "low-memory", (1.25e-4, 1.5e-4), theirs)
    assert [run["seed"] for run in mixed] == [42, 43]
    assert mixed[0]["rows"]["acc"] == pytest.approx([75, 75])
    for score in accuracy.BEST:
        assert accuracy.best_rate(found, "low-memory", score) == accuracy.best_rate(grid_alone, "low-memory", score)
    assert "| low-memory | 1.25e-4 | 2 | 30.00 ± 0.00 | 99.00 ± 0.00 | 79.20 ± 0.00 |" in accuracy.seeds_table(found)
    assert len(list(accuracy.seeds_table(grid_alone))) == 2
    found |= as_results(*theirs)
    between = [line.split(" | ")[3] for line in list(accuracy.equal_nll_table(found))[2:]]
    assert between == ["1e-4 and 2e-4", "1.25e-4 and 1.5e-4"] * len(accuracy.BEST)
    assert set(accuracy.repeated_rates(found, "low-memory")) == {1e-4, 2e-4}


def test_ways_of_rounding_are_compared_with_fp32_at_every_common_rate():
    base, rows = "FP32 Adafactor, batch 8", {"acc": "10", "acc_norm": "11", "gold_nll": [78.0, 82.0]}
    cells = [(base, 1.25e-4), ("low-memory", 1.25e-4), (base, 3e-4), ("low-memory, master-weights", 3e-4)]
    lines = list(accuracy.equal_rate_table(as_results(*(result(*cell, 42, rows=rows) for cell in cells))))
    assert [line.split(" | ")[:4] for line in lines[2:]] == [
        ["| low-memory", base, "1.25e-4", "1"],
        ["| low-memory, master-weights", base, "3e-4", "1"],
    ]


@pytest.mark.parametrize(("variable", "cards"), [(None, ["0", "1", "2"]), ("5,7", ["5", "7"]), ("GPU-a", ["GPU-a"])])
def test_each_run_gets_a_card_that_the_command_may_see(variable, cards, monkeypatch):
    monkeypatch.setattr(accuracy.torch.cuda, "device_count", lambda: len(cards))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if variable:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    assert accuracy.visible_cards() == cards


@pytest.mark.parametrize(("said", "kept"), [("error: the run has diverged", True), ("", False), ("CUDA error", False)])
def test_a_run_that_failed_is_kept_only_if_it_diverged(said, kept, tmp_path, monkeypatch):
    class Failed(accuracy.CellRun):
        def __init__(self, cell, card, args):
            self.cell, self.card, self.args, self.began, self.command = cell, card, args, 0, []
            self.folder = SimpleNamespace(name=tmp_path, cleanup=lambda: None)
            (tmp_path / "log").write_text(said)
            self.process = SimpleNamespace(poll=lambda: 2, returncode=2)

    monkeypatch.setattr(accuracy, "CellRun", Failed)
    args = SimpleNamespace(results=tmp_path / "results.jsonl", at_once=1, minutes=1, commit="abc")
    cells = [("low-memory", 1e-4, 42), ("low-memory", 3e-4, 42)]
    accuracy.run_cells(lambda done: [cell for cell in cells if cell not in done], {}, args)  # comes to an end
    assert len(accuracy.load(args.results)) == (2 if kept else 0)


@pytest.fixture
def run_cells(model_folder, tmp_path):
    """run_cells(*methods) -> all results so far; each method at a rate of 0.03 with seed 7, on a CPU."""
    for split, count in (("train", 8), ("validation", 4)):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(make_row(k, k % 4)) + "\n" for k in range(count)))
    out = tmp_path / "results.jsonl"
    command = [sys.executable, accuracy.__file__, "--model", model_folder(), "--dataset", tmp_path, "--results", out]
    command += ["--lr", "0.03", "--seed", "7", "--commit", "abc", "--at_once", 2, "--only"]

    def go(*methods):
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run([*map(str, command), *methods], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in out.read_text().splitlines()]

    return go


def test_a_cell_runs_the_real_script_and_is_run_again_when_asked_for(run_cells):
    method = "low-memory, --schedule constant"
    assert len(run_cells(method)) == 1
    first, second = run_cells(method)
    assert first["command"] == "finetune_lowmem.py --schedule constant --lr 0.03 --seed 7"
    assert (first["commit"], first["steps"]) == ("abc", 3)
    assert [e["epoch"] for e in first["eval"]] == [0, 1, 2, 3]
    assert first["rows"] == second["rows"]
    assert np.mean(first["rows"]["gold_nll"]) == pytest.approx(first["eval"][-1]["gold_nll"], abs=0.01)


def test_ablations_run_the_script_with_their_change(run_cells):
    """On a CPU the baseline's head is fp32 in any case."""
    base, low = "FP32 Adafactor, batch 8", "low-memory"
    found = {r["method"]: r for r in run_cells(base, f"{base}, fp32-head", low, f"{low}, beta2")}
    losses = {method: r["eval"][-1]["gold_nll"] for method, r in found.items()}
    assert losses[f"{base}, fp32-head"] == pytest.approx(losses[base], abs=1e-3)
    assert losses[f"{low}, beta2"] != losses[low]


@pytest.mark.parametrize("name", variant.VARIANTS)
def test_what_an_ablation_changes_is_there_to_be_changed(name, tmp_path):
    script = variant.make(name, tmp_path)
    changed = [f.name for f in tmp_path.glob("*.py") if f.read_text() != (variant.ROOT / f.name).read_text()]
    assert set(changed) == {file for file, *_ in variant.VARIANTS[name][1]}
    for file in [*changed, f"{script}.py"]:
        compile((tmp_path / file).read_text(), file, "exec")


def test_an_unknown_ablation_is_refused(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["variant.py", "nope", "--run-name", "x"])
    with pytest.raises(SystemExit, match="2"):
        variant.main()
    assert "invalid choice: 'nope'" in capsys.readouterr().err


def fp64_steps(name, weights, gradients, lr):
    """What an ablation of the update rule does, in fp64, written down from its description."""
    p, long = weights.double(), name in ("factored-adam", "clipping-beta2")
    beta2, full, row, col = (0.999 if long else 0.99), 0.0, 0.0, 0.0
    for step, gradient in enumerate(gradients, 1):
        g = gradient.double()
        square = g.square() + common.FLOOR
        full = beta2 * full + (1 - beta2) * square
        second = full
        if p.ndim == 2 and not name.startswith("unfactored"):
            row = beta2 * row + (1 - beta2) * square.mean(1, keepdim=True)
            col = beta2 * col + (1 - beta2) * square.mean(0, keepdim=True)
            second = row * col / row.mean()
        u = g / (second / (1 - beta2**step if long else 1)).sqrt()
        rms, size = u.square().mean().sqrt(), p.square().mean().sqrt()
        if name == "factored-adam":
            p = p - lr * u
        elif name.startswith("clipping"):
            p = p - lr * size * u / rms.clamp(min=1)
        else:
            p = p - lr * (1 if name.endswith("equal-steps") else size) * u / rms
    return p


def changed_common(name, folder):
    """common.py as the ablation has it."""
    variant.make(name, folder)
    spec = importlib.util.spec_from_file_location("changed", folder / "common.py")
    spec.loader.exec_module(changed := importlib.util.module_from_spec(spec))
    return changed


@pytest.mark.parametrize("shape", [(40, 24), (17,)])
def test_master_weights_are_exact_and_the_models_are_the_nearest(shape, tmp_path):
    """Steps of some 1e-3, which nearest rounding by itself drops from weights above 0.5: neighbours are 0.004 apart there."""
    pytest.importorskip("triton")
    changed, device = changed_common("master-weights", tmp_path), "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    start, *gradients = (torch.randn(shape).bfloat16().to(device) for _ in range(9))
    rounded, exact, naive = map(torch.nn.Parameter, (start.clone(), start.float(), start.clone()))
    optimizers = [
        changed.Adafactor([rounded], lr=1e-3, fused=True),
        common.Adafactor([exact], lr=1e-3, fused=True),
        common.Adafactor([naive], lr=1e-3, rounding="nearest", fused=True),
    ]
    for gradient in gradients:
        rounded.grad, exact.grad, naive.grad = gradient, gradient.float(), gradient
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(rounded, exact.bfloat16())
    assert (naive != rounded).float().mean() > 0.3


def test_the_script_trains_with_master_weights(model_folder, dataset_folder, tmp_path):
    """In spite of its check that rounding is stochastic; the kernels in Triton's interpreter."""
    pytest.importorskip("triton")
    script, common_py = variant.make("master-weights", tmp_path), tmp_path / "common.py"
    for_gpus = 'triton is not None and device.type == "cuda" if fused is None else fused'
    assert for_gpus in common_py.read_text()
    common_py.write_text(common_py.read_text().replace(for_gpus, "True"))
    command = [sys.executable, tmp_path / f"{script}.py", "--run-name", "x", "--output_dir", tmp_path]
    command += ["--model", model_folder(), "--dataset", dataset_folder, "--max_steps", "1", "--no_save_model"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("shape", [(40, 24), (17,)])
@pytest.mark.parametrize("name", [name.removeprefix("low-memory, ") for name in accuracy.UPDATE_RULES])
def test_ablations_of_the_update_rule_do_what_they_say(name, shape, tmp_path):
    """The kernels, of fp32 weights, on the GPU or in Triton's interpreter; gradients shrink, so that not all is clipped.

    In fp32 the kernels' 1 - 0.999^t is off by up to 6e-5 of itself, steps of 0.1 by half of that.
    """
    pytest.importorskip("triton")
    changed = changed_common(name, tmp_path)
    generator, device = torch.Generator().manual_seed(0), "cuda" if torch.cuda.is_available() else "cpu"
    weights, *gradients = (scale * torch.randn(shape, generator=generator) for scale in (0.3, 3.0, 1.0, 0.3, 0.1))
    p = torch.nn.Parameter(weights.clone().to(device))
    optimizer = changed.Adafactor([p], lr=0.1, fused=True)
    for gradient in gradients:
        p.grad = gradient.to(device)
        optimizer.step()
    torch.testing.assert_close(p.detach().cpu().double(), fp64_steps(name, weights, gradients, 0.1), rtol=0, atol=1e-5)


def test_the_noise_reckoned_is_that_of_the_updates():
    """30 steps of random gradients on 256 x 256 weights: the variance of what rounding added.

    What fp32 weights do with the same gradients is the truth. Reckoned is independent noise, of which antithetic noise
    leaves sqrt(1/2) in the 14 pairs, 0.73 in all. Of six seeds the ratios are 0.69 to 0.71, and of small weights, with a
    small ulp, 0.63 to 0.64: a step's variance is |d| (ulp - |d|), a little less than is reckoned.
    """
    torch.manual_seed(0)
    start = torch.randn(256, 256).bfloat16()
    rounded, exact = (torch.nn.Parameter(start.to(dtype)) for dtype in (torch.bfloat16, torch.float32))
    optimizers = [common.Adafactor([p], lr=1e-4, beta2=0.0) for p in (rounded, exact)]
    for _ in range(30):
        g = torch.randn(256, 256)
        rounded.grad, exact.grad = g.bfloat16(), g
        for optimizer in optimizers:
            optimizer.step()
    added = (rounded.detach().float() - exact.detach()).square()
    reckoned = noise.noise_deviation(start.float(), 1e-4, 30).square()
    assert (added.mean() / reckoned.mean()).item() == pytest.approx(0.70, abs=0.04)
    small = start.float().abs() < 0.5
    assert (added[small].mean() / reckoned[small].mean()).item() == pytest.approx(0.635, abs=0.04)


def test_the_speed_of_one_and_of_two_gpus_is_compared_at_one_commit_only():
    one = {"case": "8B, one GPU", "commit": "a", "rows_per_second": 10.0}
    two = {"case": "8B, two GPUs", "commit": "a", "rows_per_second": 15.0}
    assert list(ranks.compare([one, two])) == ["8B, two GPUs: 1.50 times the rows/s of 8B, one GPU"]
    assert list(ranks.compare([one, two | {"commit": "b"}])) == []


def test_the_readme_has_what_reading_back_costs():
    cases = json.loads((ROOT / "tests/benchmarks/results/read-back-h200.json").read_text())["cases"]
    benchmarks, readme = ((ROOT / file).read_text() for file in ("tests/benchmarks/README.md", "README.md"))
    assert read_back.report(cases) in benchmarks
    seconds = next(case["read_back_seconds"] for case in cases if case["model"] == "8B")
    assert f"[{seconds:.0f} s for 8B](tests/benchmarks/README.md#reading-back)" in readme


def test_the_readme_has_the_results_of_two_gpus(capsys):
    """In its table and the benchmarks', memory and speed of the cases that they name; below it, what `ranks.py --reckon` prints."""
    cases = json.loads((ROOT / "tests/benchmarks/results/ranks-h200.json").read_text())["cases"]
    readme, benchmarks = (
        (ROOT / file).read_text().split("\n## Several GPUs\n")[1].split("\n## ")[0]
        for file in ("README.md", "tests/benchmarks/README.md")
    )
    for case in cases:
        gpus, batch, speed = str(case["gpus"]), str(case["batch_size"]), f"{case['rows_per_second']:.3g}"
        allocated, reserved, device = (
            f"{case['memory_gib']['train'][k]:.2f}" for k in ("allocated", "reserved", "device")
        )
        if not any(other in case["case"] for other in ("1B", "batch 16", "NCCL")):
            cells = [batch, gpus, device, reserved, allocated, speed]
            assert f"| {' | '.join(cells)} |" in readme, case["case"]
        if "other rounding noise" not in case["case"]:
            load, ms = f"{case['memory_gib']['load']['device']:.2f}", f"{case['ms_per_step']:.1f}"
            cells = [gpus, batch, allocated, reserved, device, load, speed, ms]
            assert f"| {' | '.join(cells)} |" in benchmarks, case["case"]
    ranks.print_reckoning(cases)
    printed = "\n".join([*ranks.compare(cases), capsys.readouterr().out])
    for pattern, sentence in [
        ("8B, two GPUs: (.*) times", "two are {} times as fast as one with 8 rows"),
        ("8B, two GPUs, batch 32: (.*) times", "{} times with 32 ("),
        ("8B, two GPUs, batch 32, --memory_budget 40: (.*) times", "({} times where all layers stay gathered)"),
        ("8B, two GPUs, batch 128: (.*) times", "{} times with 128."),
        ("a step takes (.*) times that of batch 16", "would be {} times as fast"),
        ("8B on 2 GPUs.* graphs (.*), CUDA and NCCL (.*), a card", "its communication {} (8B; "),
        ("8B on 2 GPUs.* CUDA and NCCL (.*), a card", "CUDA and NCCL take {} GiB"),
        ("1B, two GPUs minus one GPU.* 200 steps (.*), of the last", "differ from those of one by {} nats in the mean"),
        ("1B, other rounding noise .* 200 steps (.*), of the last", "other rounding noise by {}."),
        ("70B on 8 GPUs.* a card (.*), moved", "70B on 8 GPUs takes {} GiB of each with graphs"),
        ("70B on 8 GPUs.*\n  without graphs (.*);", "{} with `--no_compile`"),
        ("70B on 16 GPUs.* a card (.*), moved", "On two machines of 8, {} GiB"),
        ("70B on 8 GPUs.* in a step (.*)\\.", "A step moves {} GiB to each card"),
        ("70B on 8 GPUs.*\n.* at least (.*) at 200 GB/s,", "at least {} at 200 GB/s"),
        ("70B on 8 GPUs.*\n.* GB/s, (.*) at 20 GB/s,", "and {} at 20 GB/s (PCIe 4.0)"),
        ("70B on 16 GPUs.* in a step (.*)\\.", "on two machines {} GiB"),
        ("70B on 16 GPUs.*\n.*, (.*) at 10 GB/s", "{} at 10 GB/s (a machine's network)"),
    ]:
        assert sentence.format(re.search(pattern, printed)[1]) in " ".join(readme.split()), pattern
