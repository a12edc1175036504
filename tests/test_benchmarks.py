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

import common


def result(method, lr, seed, gold_nll=80.0, rows=None):
    scores = {"acc": 30.0, "acc_norm": 40.0, "gold_nll": gold_nll}
    before = scores | {"epoch": 0, "step": 0, "gold_nll": 88.0}
    return {"method": method, "lr": lr, "seed": seed, "eval": [before, scores | {"epoch": 1, "step": 9}], "rows": rows}


def as_results(*found):
    return {accuracy.cell_of(r): r for r in found}


def test_the_best_rate_of_the_grid_is_run_with_the_other_seeds():
    method, grid = "FP32 Adam, batch 8", [(lr, abs(lr - 5e-5)) for lr in accuracy.GRID]
    assert accuracy.missing_cells({}, [method]) == [(method, lr, 42) for lr in accuracy.GRID]
    found = as_results(*(result(method, lr, 42, loss) for lr, loss in grid[:-1]))
    assert accuracy.best_rate(found, method) is None
    assert accuracy.missing_cells(found, [method]) == [(method, accuracy.GRID[-1], 42)]
    failed = {"method": method, "lr": accuracy.GRID[-1], "seed": 42, "failed": "error: the run has diverged"}
    found |= as_results(failed)
    assert accuracy.best_rate(found, method) == 5e-5
    assert accuracy.missing_cells(found, [method]) == [(method, 5e-5, 43), (method, 5e-5, 44)]


def test_every_cell_is_wanted_once():
    found = {}
    for _ in range(2):  # the grids, then the seeds
        cells = accuracy.missing_cells(found, [*accuracy.METHODS, *accuracy.ABLATIONS])
        assert len(cells) == len(set(cells)) > 0
        found |= as_results(*(result(*cell, gold_nll=abs(cell[1] - 1e-4)) for cell in cells))
    assert not accuracy.missing_cells(found, [*accuracy.METHODS, *accuracy.ABLATIONS])
    seeds = {
        method: len(accuracy.seeds_of(found, method, accuracy.best_rate(found, method))) for method in accuracy.METHODS
    }
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
    text = "\n".join(accuracy.table(found, {f"SmolLM2 not compiled: {m}": speed for m in accuracy.METHODS}))
    assert "| low-memory | 1e-05 | 3 | 30.00 ± 0.00 | 40.00 ± 0.00 | 80.00 ± 0.00 | 1.50 | 321 |" in text
    none = "+0.00 (+0.00 to +0.00)"
    assert f"| low-memory | FP32 Adam, batch 32 | {none} | {none} | {none} |" in text
    assert f"| low-memory | FP32 Adafactor, batch 8 | {none} | {none} | {none} |" in text
    assert "| low-memory | 80.00 / 40.0 | 80.00 / 40.0 |" in "\n".join(accuracy.grid_table(found))
    assert "| low-memory, 3 seeds | 88.000 ± 0.000 | 80.000 ± 0.000 |" in "\n".join(accuracy.small_rate_table(found))


def test_tables_of_results_that_are_not_complete():
    found = as_results(result("low-memory", 1e-4, 42))
    assert list(accuracy.table(found, {})) == ["the grids of FP32 Adam, batch 32 and low-memory are not complete yet"]
    assert "| low-memory |  |  |  | 80.00 / 40.0 |  |" in list(accuracy.grid_table(found))
    assert len(list(accuracy.small_rate_table(found))) == 2


def test_a_cell_runs_the_real_script_and_is_run_again_when_asked_for(model_folder, tmp_path):
    for split, count in (("train", 8), ("validation", 4)):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(make_row(k, k % 4)) + "\n" for k in range(count)))
    out = tmp_path / "results.jsonl"
    command = [sys.executable, accuracy.__file__, "--model", model_folder(), "--dataset", tmp_path, "--results", out]
    command += ["--only", "low-memory, --schedule constant", "--lr", "1e-3", "--seed", "7", "--commit", "abc"]
    for times in (1, 2):
        done = subprocess.run(
            list(map(str, command)), capture_output=True, text=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}
        )
        assert done.returncode == 0, done.stderr
        lines = [json.loads(line) for line in out.read_text().splitlines()]
        assert len(lines) == times
    assert lines[0]["command"] == "finetune_lowmem.py --schedule constant --lr 0.001 --seed 7"
    assert (lines[0]["commit"], lines[0]["steps"]) == ("abc", 3)
    assert [e["epoch"] for e in lines[0]["eval"]] == [0, 1, 2, 3]
    assert lines[0]["rows"] == lines[1]["rows"]
    assert np.mean(lines[0]["rows"]["gold_nll"]) == pytest.approx(lines[0]["eval"][-1]["gold_nll"], abs=0.01)
