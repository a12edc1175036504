"""Whole runs of the low-memory script on a GPU, in processes of their own. python -m pytest tests/test_gpu.py"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import make_model

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.gpu


@pytest.fixture
def run(tmp_path, model_folder, dataset_folder):
    """run(name, *flags, compiled=False) -> (summary, terminal), or the last line of a run that ends with exit code `ends`.

    15 steps an epoch on tiny models.
    """

    def go(name, *flags, compiled=False, architecture="llama", model=None, ends=0):
        code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import common, finetune_lowmem; "
        code += f"finetune_lowmem.GRAPHS_PAY, finetune_lowmem.COMPILING_PAYS = 0, {0 if compiled else 10**9}; "
        code += "common.run_command(finetune_lowmem.main)"
        argv = [
            "--run-name",
            name,
            "--output_dir",
            tmp_path,
            "--model",
            model or model_folder(architecture),
            "--dataset",
            dataset_folder,
        ]
        argv += ["--batch_size", 4, "--lr", "1e-2", "--log_every", 2, *flags]
        done = subprocess.run([sys.executable, "-c", code, *map(str, argv)], capture_output=True, text=True)
        assert done.returncode == ends, done.stderr[-3000:]
        if ends:
            return done.stderr.strip().splitlines()[-1]
        return json.loads((tmp_path / name / "summary.json").read_text()), done.stdout

    return go


def test_compiled_and_graphed_runs_follow_the_plain_one(run):
    """The same start to bf16's accuracy, the same learning; the noise of rounding and cut-cross-entropy lies between."""
    plain, said = run("plain", "--no_compile", "--epochs", 2)
    assert "CUDA graphs" not in said
    start, end = (plain["eval"][at]["gold_nll"] for at in (0, -1))
    assert end < 0.85 * start
    for name, compiled in (("graphs", False), ("compiled", True)):
        summary, said = run(name, "--epochs", 2, compiled=compiled)
        assert f"30 steps as CUDA graphs, decoder layers {'compiled' if compiled else 'not compiled'}" in said
        assert summary["eval"][0]["gold_nll"] == pytest.approx(start, rel=0.01)
        assert summary["eval"][-1]["gold_nll"] == pytest.approx(end, rel=0.1)
        assert summary["steps"] == 30
        assert summary["skipped_updates"] == 0
        for phase in ("load", "train", "eval"):
            peak = summary["memory_gib"][phase]
            assert 0 < peak["allocated"] <= peak["reserved"] < peak["device"]
        # to 2 MiB: this model's training takes 4
        assert summary["memory_gib"]["eval"]["allocated"] <= summary["memory_gib"]["train"]["allocated"] + 2 / 1024
        assert summary["seconds_to_first_step"] > 0


@pytest.mark.parametrize("architecture", ["gemma3", "phi", "qwen3", "gpt2"])
def test_other_architectures_run_as_graphs(run, architecture):
    """A window, a head with a bias, norms of queries and keys, Conv1D layers."""
    summary, said = run("r", "--epochs", 2, architecture=architecture)
    assert "CUDA graphs" in said
    assert summary["eval"][-1]["gold_nll"] < summary["eval"][0]["gold_nll"]


def test_all_parameters_train_as_graphs(run):
    summary, _ = run("r", "--epochs", 2, "--trained", "all", architecture="llama-tied")
    assert summary["eval"][-1]["gold_nll"] < 0.85 * summary["eval"][0]["gold_nll"]


def test_a_run_goes_on_from_its_checkpoint(run):
    whole, _ = run("whole", "--epochs", 2)
    run("parts", "--epochs", 2, "--max_steps", 20)
    parts, said = run("parts", "--epochs", 2, "--resume")
    assert "resuming after step 20" in said
    assert parts["steps"] == 30
    assert parts["eval"][-1]["gold_nll"] == pytest.approx(whole["eval"][-1]["gold_nll"], rel=0.05)


def test_a_budget_that_is_too_small_names_one_that_works(run):
    """The tiny model takes less than CUDA's context; what the budget then leaves is enough, and is kept."""
    said = run("small", "--memory_budget", 0.2, ends=2)
    least = float(re.search(r"0\.20 GiB of GPU memory are too few: .* needs ([\d.]+) with all", said)[1])
    assert 0.3 < least < 2
    summary, said = run("least", "--memory_budget", least, "--epochs", 1)
    assert f"of {least:.2f}" in said
    assert max(phase["device"] for phase in summary["memory_gib"].values()) <= least


@pytest.fixture
def run_wide(run, tmp_path, tokenizer):
    """run_wide(name, *flags, ends=0): `run` on a model of six layers of 32 MiB."""
    model = tmp_path / "wide"
    wide = {"hidden_size": 1024, "intermediate_size": 4096, "head_dim": 256, "num_hidden_layers": 6}
    make_model("llama", **wide).bfloat16().save_pretrained(model)
    tokenizer.save_pretrained(model)
    return lambda *flags, **how: run(*flags, "--lr", "1e-3", model=model, **how)


def least_budget(run_wide, *flags):
    return float(re.search(r"needs ([\d.]+) with all", run_wide("small", "--memory_budget", 0.2, *flags, ends=2))[1])


def test_a_streamed_run_keeps_its_budget_and_learns(run_wide):
    """Some layers stream, then others after a new start, then all for an evaluation alone.

    Resident runs on a CPU that differ in the rounding's seed alone end at 29, 32 and 37 nats, from 59.
    """
    least = least_budget(run_wide)
    resident, said = run_wide("resident", "--epochs", 2)
    assert "6 of 6 decoder layers on the GPU; predicted" in said
    start, end = (resident["eval"][at]["gold_nll"] for at in (0, -1))
    assert end < 0.8 * start
    for name, flags, more, on_gpu in [
        ("parts", ["--epochs", 2, "--max_steps", 20], 0.1, 3),
        ("parts", ["--epochs", 2, "--resume"], 0.04, 1),
        ("evaluated", ["--epochs", 0], 0, 0),
    ]:
        budget = round(least + more, 2)
        summary, said = run_wide(name, "--memory_budget", budget, *flags)
        assert f"{on_gpu} of 6 decoder layers on the GPU, {6 - on_gpu} streamed through 2 slots" in said
        assert ("s of the GPU a step, copies alone" in said) == (0 not in flags)
        assert peak(summary) <= predicted_peak(said) + 0.005 <= budget + 0.01
        if "--resume" in flags:
            assert summary["steps"] == 30
            assert summary["eval"][-1]["gold_nll"] < 0.8 * start
        assert summary["eval"][0]["gold_nll"] == pytest.approx(start, rel=0.01)


def test_all_parameters_train_streamed(run_wide):
    least = least_budget(run_wide, "--trained", "all")
    summary, said = run_wide("all", "--trained", "all", "--epochs", 2, "--memory_budget", least)
    assert "0 of 6 decoder layers on the GPU, 6 streamed through 2 slots" in said
    assert "head" not in said.split("predicted")[0]
    assert peak(summary) <= predicted_peak(said) + 0.005 <= least + 0.01
    assert summary["eval"][-1]["gold_nll"] < 0.8 * summary["eval"][0]["gold_nll"]


def peak(summary):
    return max(phase["device"] for phase in summary["memory_gib"].values())


def predicted_peak(said):
    return float(re.search(r"predicted peak ([\d.]+)", said)[1])
