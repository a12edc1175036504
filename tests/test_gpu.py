"""Whole runs of the low-memory script on a GPU, or two, in processes of their own. python -m pytest -m gpu tests/test_gpu.py"""

import json
import random
import re
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from support.commands import Commands, after_each_step
from support.quantized import QUANTIZED, quantized_pair, saved_dtype
from support.runs import ROOT, assert_same_run, has_lines, lines, ranks_of, wait_until, weights
from support.tiny import make_model, many_rows, write_jsonl

from lowmem.training import checkpoint

pytestmark = pytest.mark.gpu
GPUS = torch.cuda.device_count()
two_gpus = pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")


@pytest.fixture(scope="module")
def gpu_commands(tmp_path_factory):
    """See tests/support/commands.py."""
    started = Commands(tmp_path_factory.mktemp("streams"), gpu=True)
    yield started
    started.close()


@pytest.fixture
def run(tmp_path, model_folder, dataset_folder, gpu_commands):
    """run(name, *flags, compiled=False) -> (summary, terminal), or the last line of a run that ends with exit code `ends`.
    The summary of a dry run is None.

    15 steps an epoch on tiny models, at a constant rate, so that a run may go on to another length. first: Python code
    that runs before. meanwhile: function of the command, called once it has started. ranks: processes, each with a GPU.
    """

    def go(
        name, *flags, compiled=False, architecture="llama", model=None, ends=0, first="", meanwhile=None, ranks=1,
        script="finetune_lowmem",
    ):  # fmt: skip
        code = "from lowmem import cuda_graphs\n"
        code += (
            f"cuda_graphs.GRAPHS_PAY_STEPS, cuda_graphs.COMPILING_PAYS_STEPS = 0, {0 if compiled else 10**9}\n{first}"
        )
        argv = ["--run-name", name, "--output_dir", tmp_path, "--model", model or model_folder(architecture)]
        argv += ["--dataset", dataset_folder, "--batch_size", 4, "--lr", "1e-2", "--schedule", "constant"]
        argv += ["--log_every", 2, *flags]
        if ranks > 1:
            ended = gpu_commands.run_ranks(ranks, script, *argv, first=code)
        else:
            command = gpu_commands.start(script, *argv, first=code)
            if meanwhile:
                meanwhile(command)
            ended = [command.wait()]
        assert [code for code, _, _ in ended] == [ends] * ranks, "\n".join(err[-3000:] for _, _, err in ended)
        _, out, err = ended[0]
        if ends:
            return (err.strip().splitlines() or [""])[-1]
        summary = None if "--dry_run" in flags else json.loads((tmp_path / name / "summary.json").read_text())
        return summary, out

    return go


def stop_after(folder, count, number):
    """A function for `meanwhile`: send the signal once the run's metrics.jsonl has so many lines."""

    def stop(command):
        assert wait_until(has_lines(folder, count), command, seconds=300)  # which compiles and captures first
        command.send(number)

    return stop


def test_compiled_and_graphed_runs_follow_the_plain_one(run):
    """The same start to bf16's accuracy, the same learning; the noise of rounding lies between."""
    plain, said = run("plain", "--no_compile", "--epochs", 2)
    assert "CUDA graphs" not in said
    start, end = (plain["eval"][at]["gold_nll"] for at in (0, -1))
    assert end < 0.85 * start
    for name, compiled in (("graphs", False), ("compiled", True)):
        summary, said = run(name, "--epochs", 2, compiled=compiled)
        assert f"as CUDA graphs, decoder layers {'compiled' if compiled else 'not compiled'}" in said
        assert "rows end to end in one line" in said
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


def test_the_baseline_learns_with_each_optimizer(run):
    """torch's own, fused."""
    for optimizer, lr in (("Adam", "1e-3"), ("SGD", "1e-2"), ("Adafactor", "1e-2")):
        flags = ["--optimizer", optimizer, "--lr", lr, "--epochs", 1]
        summary, _ = run(optimizer, *flags, script="finetune_base")
        assert summary["eval"][-1]["gold_nll"] < summary["eval"][0]["gold_nll"]


@pytest.mark.parametrize("architecture", ["gemma3", "phi", "qwen3", "gpt2"])
def test_other_architectures_run_as_graphs(run, architecture):
    """A window, a head with a bias, norms of queries and keys, Conv1D layers."""
    summary, said = run("r", "--epochs", 2, architecture=architecture)
    assert "CUDA graphs" in said
    assert summary["eval"][-1]["gold_nll"] < summary["eval"][0]["gold_nll"]


def test_cut_cross_entropy_trains_as_graphs(run):
    pytest.importorskip("cut_cross_entropy")
    ours, _ = run("fp32", "--epochs", 2)
    theirs, said = run("cut", "--epochs", 2, "--cross_entropy", "cut")
    assert "CUDA graphs" in said
    assert theirs["eval"][-1]["gold_nll"] == pytest.approx(ours["eval"][-1]["gold_nll"], rel=0.1)
    assert "head with a bias" in run("biased", "--cross_entropy", "cut", architecture="phi", ends=2)


@pytest.mark.parametrize(
    ("script", "kind"), [*(("finetune_lowmem", kind) for kind in QUANTIZED), ("finetune_base", "mxfp4, experts")]
)
def test_quantized_weights_are_made_whole_on_a_gpu_too(script, kind, run, tmp_path):
    """transformers would keep them as they are there. Untrained they are saved as what they mean, bit for bit."""
    make, quantize, settings = QUANTIZED[kind]
    quantized, plain = quantized_pair(tmp_path, make(), quantize, settings)
    no_graphs = ["--no_compile"] if (script, kind) == ("finetune_lowmem", "mxfp4, experts") else []  # gpt-oss has none
    run("untrained", "--epochs", 0, *no_graphs, model=quantized, script=script)
    expected, saved = weights(plain), weights(tmp_path / "untrained" / "model")
    assert saved.keys() == expected.keys()
    dtype = torch.float32 if script == "finetune_base" else torch.bfloat16
    assert all(torch.equal(saved[name], tensor.to(saved_dtype(name, dtype))) for name, tensor in expected.items())
    summary, said = run("trained", "--epochs", 1, *no_graphs, model=quantized, script=script)
    assert "was read back as trained in" in said
    assert summary["eval"][-1]["gold_nll"] < summary["eval"][0]["gold_nll"]


def test_all_parameters_train_as_graphs(run):
    summary, _ = run("r", "--epochs", 2, "--trained", "all", architecture="llama-tied")
    assert summary["eval"][-1]["gold_nll"] < 0.85 * summary["eval"][0]["gold_nll"]


@pytest.mark.parametrize(("compiled", "architecture"), [(False, "phi"), (True, "llama")])
def test_a_killed_and_interrupted_run_goes_on_bit_for_bit(compiled, architecture, run, tmp_path, dataset_folder):
    """Batches have 126 or 132 targets, of 21 or 22 rows: more and less than the 128 that graphs count in."""
    shutil.copytree(dataset_folder, tmp_path / "rows")
    write_jsonl(tmp_path / "rows/train.jsonl", many_rows(64, seed=1))
    flags = ["--dataset", tmp_path / "rows", "--epochs", 40, "--save_every", 10, "--batch_size", 22]
    flags += ["--schedule", "linear"]
    how = {"compiled": compiled, "architecture": architecture}
    whole, _ = run("whole", *flags, **how)
    parts = tmp_path / "parts"
    run("parts", *flags, **how, ends=-signal.SIGKILL, meanwhile=stop_after(parts, 12, signal.SIGKILL))
    killed_after = lines(checkpoint.last(parts) / "metrics.jsonl")[-1]["step"]
    assert killed_after >= 10
    stop = stop_after(parts, 30, signal.SIGTERM)
    said = run("parts", *flags, "--resume", **how, ends=128 + signal.SIGTERM, meanwhile=stop)
    step = int(re.fullmatch(r"interrupted: the same command with --resume goes on from step (\d+)", said)[1])
    assert killed_after < step < 120
    summary, said = run("parts", *flags, "--resume", **how)
    assert f"resuming after step {step}\n" in said
    assert summary["eval"] == whole["eval"]
    assert_same_run(tmp_path / "whole", parts)


def test_a_step_that_cannot_be_captured_ends_in_one_line(run):
    """One that waits for the host."""
    waits = (
        "from lowmem.training.models import CausalLM\n"
        "plain = CausalLM.hidden_states\n"
        "CausalLM.hidden_states = lambda lm, batch: plain(lm, batch) * bool(batch.weights.sum().item())"
    )
    said = run("r", "--epochs", 1, first=waits, ends=2)
    assert re.match(
        r"error: a step of this model cannot be compiled or captured as a CUDA graph \(.*--no_compile", said
    )
    run("plain", "--epochs", 1, "--no_compile", first=waits)


def test_memory_that_runs_out_ends_in_one_line(run, tmp_path):
    fault = after_each_step("step == 7 and torch.empty(2**40, dtype=torch.uint8, device='cuda')")
    said = run("r", "--epochs", 1, "--save_every", 5, first=fault, ends=2)
    expected = r"error: out of GPU memory: 1024.00 GiB asked, [\d.]+ [GM]iB free, [\d.]+ GiB allowed; take a smaller"
    assert re.match(expected, said)
    assert said.endswith("the same command with --resume goes on from step 5")
    run("r", "--epochs", 1, "--save_every", 5, "--resume")


def test_twenty_bad_steps_end_a_run_of_graphs(run, tmp_path):
    """The host looks without waiting for the device: it may see the twentieth some steps late."""
    fault = after_each_step("run.optimizer.skipped.add_(step >= 12)")  # seen with step 13
    said = run("r", "--epochs", 9, "--save_every", 5, first=fault, ends=2)
    count, step = map(int, re.search(r"(\d+) steps in a row, up to step (\d+), had losses", said).groups())
    assert 20 <= count == step - 12 <= 68
    assert "--resume" not in said


def test_a_budget_that_is_too_small_names_one_that_works(run):
    """The tiny model takes less than CUDA's context; what the budget then leaves is enough, and is kept."""
    said = run("small", "--memory_budget", 0.2, ends=2)
    least = float(re.search(r"0\.20 GiB of GPU memory are too few: .* needs ([\d.]+) with all", said)[1])
    assert 0.3 < least < 2
    summary, said = run("least", "--memory_budget", least, "--epochs", 1)
    assert f"of {least:.2f}" in said
    assert peak(summary) <= least


@pytest.fixture
def run_wide(run, tmp_path, tokenizer):
    """run_wide(name, *flags, ends=0): `run` on a model of six layers of 32 MiB (phi: 22)."""
    wide = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 6}
    for architecture, more in (("llama", {"head_dim": 256}), ("phi", {})):
        make_model(architecture, **wide, **more).bfloat16().save_pretrained(tmp_path / architecture)
        tokenizer.save_pretrained(tmp_path / architecture)
    return lambda *flags, architecture="llama", **how: run(*flags, "--lr", "1e-3", model=tmp_path / architecture, **how)


def least_budget(run_wide, *flags, **how):
    said = run_wide("small", "--memory_budget", 0.2, *flags, ends=2, **how)
    return float(re.search(r"needs ([\d.]+) with all", said)[1])


def test_a_streamed_run_keeps_its_budget_and_learns(run_wide):
    """Some layers stream, then others after a new start, then all for an evaluation alone.

    Resident runs on a CPU that differ in the rounding's seed alone end at 29, 32 and 37 nats, from 59.
    """
    least = least_budget(run_wide)
    resident, said = run_wide("resident", "--epochs", 2)
    assert "6 of 6 decoder layers on the GPU\n" in said
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
        assert peak(summary) <= predicted_peak(said) + 0.005 <= budget + 0.01
        if "--resume" in flags:
            assert summary["steps"] == 30
            assert summary["eval"][-1]["gold_nll"] < 0.8 * start
        assert summary["eval"][0]["gold_nll"] == pytest.approx(start, rel=0.01)


def test_a_streamed_run_goes_on_bit_for_bit(run_wide, tmp_path):
    """Phi, for its head's bias."""
    how = {"architecture": "phi"}
    flags = ["--memory_budget", round(least_budget(run_wide, **how) + 0.04, 2), "--epochs", 2]
    _, said = run_wide("whole", *flags, **how)
    assert "streamed through 2 slots" in said
    stop = stop_after(tmp_path / "parts", 6, signal.SIGTERM)
    run_wide("parts", *flags, **how, ends=128 + signal.SIGTERM, meanwhile=stop)
    run_wide("parts", *flags, "--resume", **how)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_all_parameters_train_streamed(run_wide):
    least = least_budget(run_wide, "--trained", "all")
    summary, said = run_wide("all", "--trained", "all", "--epochs", 2, "--memory_budget", least)
    assert "0 of 6 decoder layers on the GPU, 6 streamed through 2 slots\n" in said  # not the head, which is trained
    assert peak(summary) <= predicted_peak(said) + 0.005 <= least + 0.01
    assert summary["eval"][-1]["gold_nll"] < 0.8 * summary["eval"][0]["gold_nll"]


@pytest.fixture
def own_rows(tmp_path):
    """A file of prompts of 1 to 60 words, each with a completion that repeats its last word."""
    rng, words = random.Random(0), ["apple", "bridge", "candle", "drum", "eagle", "flute"]
    prompts = [rng.choices(words, k=min(60, int(rng.lognormvariate(2, 1)) + 1)) for _ in range(300)]
    rows = [{"prompt": " ".join(prompt), "completion": f" and the {prompt[-1]}"} for prompt in prompts]
    write_jsonl(tmp_path / "own.jsonl", rows)
    return tmp_path / "own.jsonl"


def assert_learned_own_rows(summary, said):
    """All but the prompt's last word is the same in each row, and a random model knows none of it."""
    assert "rows end to end in one line" in said
    assert "as CUDA graphs" in said
    before, after = (summary["eval"][at]["nll"] for at in (0, -1))
    assert after < 0.5 * before


def test_own_rows_train_within_a_budget_and_with_cut(run_wide, own_rows):
    pytest.importorskip("cut_cross_entropy")
    flags = ["--dataset", own_rows, "--epochs", 2]
    budget = round(least_budget(run_wide, *flags) + 0.04, 2)
    resident, said = run_wide("resident", *flags)
    assert_learned_own_rows(resident, said)
    for name, more in (("cut", ["--cross_entropy", "cut"]), ("streamed", ["--memory_budget", budget])):
        summary, said = run_wide(name, *flags, *more)
        assert_learned_own_rows(summary, said)
        assert summary["eval"][0]["nll"] == pytest.approx(resident["eval"][0]["nll"], rel=0.01)
    assert "1 of 6 decoder layers on the GPU, 5 streamed through 2 slots" in said
    assert peak(summary) <= predicted_peak(said) + 0.005 <= budget + 0.01


@pytest.mark.parametrize("epochs", [0, 2])
def test_a_dry_run_of_the_baseline_predicts_its_peak(epochs, run_wide):
    """Layers beyond the measured ones are counted."""
    how = {"script": "finetune_base"}
    _, dry = run_wide("dry", "--dry_run", "--epochs", epochs, **how)
    summary, _ = run_wide("real", "--epochs", epochs, **how)
    assert peak(summary) == pytest.approx(predicted_peak(dry), rel=0.15)


def test_a_dry_run_says_what_a_run_within_a_budget_does(run_wide):
    least = least_budget(run_wide)
    assert least_budget(run_wide, "--dry_run") == pytest.approx(least, abs=0.03)
    flags = ["--epochs", 2, "--memory_budget", round(least + 0.1, 2)]
    _, dry = run_wide("dry", "--dry_run", *flags)
    _, said = run_wide("real", *flags)
    layers = re.compile(r"\d of 6 decoder layers on the GPU, \d streamed through 2 slots")
    assert layers.search(dry)[0] == layers.search(said)[0]
    assert predicted_peak(dry) == pytest.approx(predicted_peak(said), abs=0.03)


def peak(summary):
    return max(phase["device"] for phase in summary["memory_gib"].values())


def predicted_peak(said):
    return float(re.search(r"predicted peak ([\d.]+)", said)[1])


# ---------------------------------------------------------------------------------------------------------------------
# Two GPUs


@two_gpus
def test_gpus_train_as_one_and_go_on_after_a_killed_rank(run, tmp_path, model_folder, dataset_folder):
    """With as many bit for bit, with one or half of them within the noise of rounding. torchrun ends those left."""
    flags = ["--epochs", 40, "--save_every", 10, "--batch_size", 22]
    one, _ = run("one", *flags)
    several, said = run("several", *flags, ranks=GPUS)
    assert "as CUDA graphs" in said
    assert several["eval"][0]["gold_nll"] == pytest.approx(one["eval"][0]["gold_nll"], rel=0.01)
    assert several["eval"][-1]["gold_nll"] == pytest.approx(one["eval"][-1]["gold_nll"], rel=0.1)
    assert several["eval"][-1]["gold_nll"] < 0.85 * several["eval"][0]["gold_nll"]

    argv = ["--run-name", "parts", "--output_dir", tmp_path, "--model", model_folder(), "--dataset", dataset_folder]
    argv += ["--lr", "1e-2", "--schedule", "constant", "--log_every", 2, *flags]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", GPUS]
    start = map(str, [*torchrun, ROOT / "finetune_lowmem.py", *argv])
    process = subprocess.Popen([*start], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    running = SimpleNamespace(running=lambda: process.poll() is None)
    assert wait_until(has_lines(tmp_path / "parts", 12), running, seconds=120)
    subprocess.run(["kill", "-9", str(ranks_of(process)[1])], check=True)
    said, _ = process.communicate(timeout=90)
    assert process.returncode == 1
    assert "exitcode  : -9" in said
    for fewer in {1, GPUS // 2}:
        shutil.copytree(tmp_path / "parts", tmp_path / f"on-{fewer}")
        summary, _ = run(f"on-{fewer}", *flags, "--resume", ranks=fewer)
        assert summary["steps"] == 120
        assert summary["eval"][-1]["gold_nll"] == pytest.approx(several["eval"][-1]["gold_nll"], rel=0.1)
    run("parts", *flags, "--resume", ranks=GPUS)
    assert_same_run(tmp_path / "several", tmp_path / "parts")


@two_gpus
def test_own_rows_train_on_two_gpus(run, own_rows):
    one, _ = run("one", "--dataset", own_rows, "--epochs", 4)
    two, said = run("two", "--dataset", own_rows, "--epochs", 4, ranks=2)
    assert_learned_own_rows(two, said)
    assert two["eval"][0]["nll"] == pytest.approx(one["eval"][0]["nll"], rel=0.01)


@two_gpus
def test_all_parameters_train_on_two_gpus(run):
    summary, _ = run("r", "--epochs", 2, "--trained", "all", architecture="llama-tied", ranks=2)
    assert summary["eval"][-1]["gold_nll"] < 0.85 * summary["eval"][0]["gold_nll"]
