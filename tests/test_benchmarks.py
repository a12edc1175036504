"""The accuracy benchmark's choices, statistics and bookkeeping; what it measures needs a GPU and an hour."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import make_row

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
import accuracy
import variant

import common


def result(method, lr, seed, gold_nll=80.0, acc_norm=40.0, rows=None):
    scores = {"acc": 30.0, "acc_norm": acc_norm, "gold_nll": gold_nll}
    before = scores | {"epoch": 0, "step": 0, "gold_nll": 88.0}
    return {"method": method, "lr": lr, "seed": seed, "eval": [before, scores | {"epoch": 1, "step": 9}], "rows": rows}


def as_results(*found):
    return {accuracy.cell_of(r): r for r in found}


def test_the_best_rates_of_the_grid_are_run_with_the_other_seeds():
    method, grid = "FP32 Adafactor, batch 8", [(lr, abs(lr - 5e-5), 1e5 * lr) for lr in accuracy.GRID]
    small = [(method, 1e-5, seed) for seed in (43, 44)]  # beside the grid
    assert accuracy.best_rate({}, method, "gold_nll") is None
    assert accuracy.missing_cells({}, [method]) == [(method, lr, 42) for lr in accuracy.GRID] + small
    found = as_results(*(result(method, lr, 42, loss, acc_norm) for lr, loss, acc_norm in grid[:-1]))
    assert accuracy.best_rate(found, method, "gold_nll") == 5e-5
    assert accuracy.missing_cells(found, [method]) == [(method, accuracy.GRID[-1], 42), *small]
    failed = {"method": method, "lr": accuracy.GRID[-1], "seed": 42, "failed": "error: the run has diverged"}
    found |= as_results(failed)
    assert accuracy.best_rate(found, method, "gold_nll") == 5e-5
    assert accuracy.best_rate(found, method, "acc_norm") == 3e-4
    wanted = [(method, lr, seed) for lr in (5e-5, 3e-4) for seed in (43, 44)]
    assert accuracy.missing_cells(found, [method]) == small + wanted


def test_every_cell_is_wanted_once():
    found = {}
    for _ in range(2):  # the grids, then the seeds
        cells = accuracy.missing_cells(found, [*accuracy.METHODS, *accuracy.ABLATIONS])
        assert len(cells) == len(set(cells)) > 0
        found |= as_results(*(result(*cell, gold_nll=abs(cell[1] - 1e-4), acc_norm=1e5 * cell[1]) for cell in cells))
    assert not accuracy.missing_cells(found, [*accuracy.METHODS, *accuracy.ABLATIONS])
    best = {method: accuracy.best_rate(found, method, "gold_nll") for method in accuracy.METHODS}
    seeds = {method: len(accuracy.seeds_of(found, method, rate)) for method, rate in best.items()}
    assert seeds == {method: 5 if method in ("low-memory", accuracy.YARDSTICK) else 3 for method in seeds}
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


def test_intervals_hold_the_truth_as_often_as_they_say():
    """Rows that are as hard for both and seeds that scatter: of 200 draws 95 % hold the difference, within 3 errors.

    With eight seeds: bootstrap over n of them shows (n - 1) / n of their variance, and so a little less than 95 %.
    """
    rng, held, truth = np.random.default_rng(0), 0, 0.3
    for trial in range(200):
        hard = rng.normal(0, 5, 100)
        theirs = hard + rng.normal(0, 0.2, (8, 1)) + rng.normal(0, 0.5, (8, 100))
        ours = truth + hard + rng.normal(0, 0.2, (8, 1)) + rng.normal(0, 0.5, (8, 100))
        middle, low, high = accuracy.difference(ours, theirs, draws=200, seed=trial)
        assert low < middle < high < low + 1  # rows are paired: their own scatter of 5 would give 2
        held += low <= truth <= high
    assert 0.95 - 3 * (0.95 * 0.05 / 200) ** 0.5 - 0.02 <= held / 200 <= 1


def test_the_tables_print_what_the_results_hold():
    rows = {"acc": "10", "acc_norm": "11", "gold_nll": [79.0, 81.0]}
    cells = accuracy.missing_cells({}, list(accuracy.METHODS))
    found = as_results(*(result(*cell, gold_nll=80 + cell[1], rows=rows) for cell in cells))
    speed = {"memory_gib": {"train": {"device": 1.5}, "eval": {"device": 1.25}}, "rows_per_second": 321.0}
    text = "\n".join(accuracy.table(found, {f"SmolLM2 not compiled: {m}": speed for m in accuracy.METHODS}, "gold_nll"))
    assert "| low-memory | 1e-5 | 3 | 30.00 ± 0.00 | 40.00 ± 0.00 | 80.00 ± 0.00 | 1.50 | 321 |" in text
    none = "+0.00 (+0.00 to +0.00)"
    assert f"| low-memory | FP32 Adam, batch 32 | {none} | {none} | {none} |" in text
    assert f"| low-memory | FP32 Adafactor, batch 8 | {none} | {none} | {none} |" in text
    assert "| low-memory | 80.00 / 40.0 | 80.00 / 40.0 |" in "\n".join(accuracy.grid_table(found))
    assert "| low-memory, 3 seeds | 88.000 ± 0.000 | 80.000 ± 0.000 |" in "\n".join(accuracy.small_rate_table(found))


def test_tables_of_results_that_are_not_complete():
    found = as_results(result("low-memory", 1e-4, 42))
    assert list(accuracy.table(found, {}, "acc_norm")) == ["FP32 Adam, batch 32 and low-memory have not run yet"]
    assert "| low-memory |  |  |  | 80.00 / 40.0 |  |  |  |" in list(accuracy.grid_table(found))
    assert len(list(accuracy.small_rate_table(found))) == 2


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
    """On a CPU the baseline's logits are fp32 in any case."""
    base, low = "FP32 Adafactor, batch 8", "low-memory"
    found = {r["method"]: r for r in run_cells(base, f"{base}, fp32-logits", low, f"{low}, beta2")}
    losses = {method: r["eval"][-1]["gold_nll"] for method, r in found.items()}
    assert losses[f"{base}, fp32-logits"] == pytest.approx(losses[base], abs=1e-3)
    assert losses[f"{low}, beta2"] != losses[low]


@pytest.mark.parametrize("name", variant.VARIANTS)
def test_what_an_ablation_changes_is_there_to_be_changed(name, tmp_path):
    script = variant.make(name, tmp_path)
    changed = [f.name for f in tmp_path.glob("*.py") if f.read_text() != (variant.ROOT / f.name).read_text()]
    assert set(changed) == {file for file, *_ in variant.VARIANTS[name][1]}
    for file in [*changed, f"{script}.py"]:
        compile((tmp_path / file).read_text(), file, "exec")
