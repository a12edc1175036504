"""The two commands as a user runs them, on tiny models, without a hub. python -m pytest tests/test_cli.py"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ODD_ROWS, make_model, make_row, many_rows, write_jsonl
from safetensors.torch import load_file

import common
import finetune_base
import finetune_lowmem

ROOT = Path(__file__).parents[1]
SCRIPTS = {"finetune_base": finetune_base, "finetune_lowmem": finetune_lowmem}
both_scripts = pytest.mark.parametrize("script", SCRIPTS)


@pytest.fixture
def run(tmp_path, model_folder, dataset_folder, monkeypatch):
    """run(script, run_name, *flags) -> (summary, run folder), in this process; model and data are tiny.

    At a constant rate, so that a run may go on to another length.
    """
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def go(script, name, *flags, model=None):
        argv = ["--run-name", name, "--output_dir", str(tmp_path), "--model", str(model or model_folder())]
        argv += ["--dataset", str(dataset_folder), "--log_every", "2", "--lr", "1e-2"]
        argv += ["--schedule", "constant", *map(str, flags)]
        return SCRIPTS[script].main(argv), tmp_path / name

    return go


def command(script, *argv, env=None):
    """The real command line: (exit code, stdout, stderr)."""
    result = subprocess.run(
        [sys.executable, str(ROOT / f"{script}.py"), *map(str, argv)],
        capture_output=True, text=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""} | (env or {}),
    )  # fmt: skip
    return result.returncode, result.stdout, result.stderr


def weights(folder):
    return {name: t for file in sorted(Path(folder).glob("*.safetensors")) for name, t in load_file(file).items()}


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


# ---------------------------------------------------------------------------------------------------------------------
# What a run does and leaves


@both_scripts
def test_a_run_learns_and_leaves_what_is_promised(run, script):
    summary, folder = run(script, "r", "--epochs", 3, "--batch_size", 4, "--lr", "1e-2")
    evals = summary["eval"]
    assert [(e["epoch"], e["step"], e["rows"]) for e in evals] == [(0, 0, 16), (1, 15, 16), (2, 30, 16), (3, 45, 16)]
    assert evals[-1]["gold_nll"] < 0.8 * evals[0]["gold_nll"]  # seen: 0.70
    assert summary["steps"] == 45
    assert summary["rows"] == 180
    assert summary == json.loads((folder / "summary.json").read_text())
    promised = (
        "script run_name args trained_params total_params steps rows target_tokens eval train_seconds rows_per_second"
    )
    promised += " tokens_per_second memory_gib skipped_updates versions"
    assert set(promised.split()) <= set(summary)
    assert summary["trained_params"] < summary["total_params"]
    for phase in ("load", "train", "eval"):
        assert summary["memory_gib"][phase]["allocated"] is summary["memory_gib"][phase]["reserved"] is None
        assert 0.05 < summary["memory_gib"][phase]["device"] < 20
    for epoch in range(4):
        rows = lines(folder / f"eval_epoch{epoch}.jsonl")
        assert [set(row) for row in rows] == [{"ind", "label", "loglikelihoods", "chars"}] * 16
        correct = [row["loglikelihoods"].index(max(row["loglikelihoods"])) == row["label"] for row in rows]
        assert 100 * sum(correct) / 16 == evals[epoch]["acc"]
    metrics = lines(folder / "metrics.jsonl")
    assert [m["step"] for m in metrics if "train_loss" in m] == list(range(2, 46, 2))
    assert {"train_loss", "lr", "memory_gib", "rows_per_second"} < set(next(m for m in metrics if "train_loss" in m))
    assert [m["acc"] for m in metrics if "acc" in m] == [e["acc"] for e in evals]
    assert json.loads((folder / "config.json").read_text())["batch_size"] == 4


def test_tensorboard_shows_two_runs_side_by_side(run, tmp_path):
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

    for name in ("a", "b"):
        run("finetune_lowmem", name, "--epochs", 1, "--max_steps", 4)
    board = EventMultiplexer().AddRunsFromDirectory(str(tmp_path)).Reload()
    assert set(board.Runs()) == {"a", "b"}
    for name in ("a", "b"):
        assert [event.step for event in board.Scalars(name, "train/train_loss")] == [2, 4]
        assert [event.step for event in board.Scalars(name, "eval/acc_norm")] == [0, 4]
        assert {"train/lr", "train/memory_gib", "train/rows_per_second", "eval/acc", "eval/gold_nll"} <= set(
            board.Runs()[name]["scalars"]
        )


@both_scripts
@pytest.mark.parametrize("architecture", ["llama", "llama-tied"])
def test_the_saved_model_scores_what_the_run_reported(run, script, model_folder, architecture):
    from transformers import AutoModelForCausalLM

    summary, folder = run(script, "r", "--epochs", 1, "--trained", "all", model=model_folder(architecture))
    again, second = run(script, "again", "--epochs", 0, model=folder / "model")
    assert lines(folder / "eval_epoch1.jsonl") == lines(second / "eval_epoch0.jsonl")
    assert {k: again["eval"][0][k] for k in ("acc", "acc_norm", "gold_nll")} == {
        k: summary["eval"][1][k] for k in ("acc", "acc_norm", "gold_nll")
    }
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert model.config.use_cache
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == (
        architecture == "llama-tied"
    )
    assert model.dtype == (torch.bfloat16 if script == "finetune_lowmem" else torch.float32)


@both_scripts
def test_same_seed_same_run_other_seed_other_run(run, script):
    a, b, c = (run(script, name, "--epochs", 1, "--seed", seed)[1] for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert all(torch.equal(t, weights(b / "model")[n]) for n, t in weights(a / "model").items())
    assert not all(torch.equal(t, weights(c / "model")[n]) for n, t in weights(a / "model").items())


# ---------------------------------------------------------------------------------------------------------------------
# Every flag does what it says


@both_scripts
def test_every_flag_is_in_help_with_its_default(script):
    code, out, err = command(script, "--help")
    assert code == 0
    flags = "run-name model dataset batch_size lr epochs max_steps train_rows eval_rows train_text trained schedule seed log_every"
    flags += " warmup_steps save_every resume output_dir no_save_model demo " + (
        "optimizer" if script == "finetune_base" else "nostround"
    )
    text = " ".join(out.split())
    for flag in flags.split():
        for spelling in {flag, flag.replace("_", "-"), flag.replace("-", "_")}:
            assert f"--{spelling}" in text
    batch_size, lr, log_every = {"finetune_base": (32, "3e-06", 100), "finetune_lowmem": (8, "0.0001", 400)}[script]
    assert f"rows per step (default: {batch_size})" in text
    assert f"learning rate (default: {lr})" in text
    assert "(default: linear)" in text
    assert f"steps between log lines (default: {log_every})" in text
    assert text.count("(default: ") >= 17


@both_scripts
def test_flags_are_accepted_with_both_dashes(run, script):
    summary, _ = run(
        script, "r", "--epochs", 1, "--batch-size", 5, "--max-steps", 1, "--no-save-model", "--eval-rows", 2
    )
    assert summary["rows"] == 5
    args = common.parse_arguments(common.argument_parser("script", "", 1, 1.0, 1.0, 1), ["--run_name", "x"])
    assert args.run_name == "x"


@both_scripts
def test_rows_epochs_and_steps_are_limited(run, script):
    summary, folder = run(
        script, "r", "--train_rows", 10, "--eval_rows", 3, "--batch_size", 4, "--epochs", 2, "--no_save_model"
    )
    assert (summary["steps"], summary["rows"], summary["eval"][0]["rows"]) == (6, 20, 3)
    assert not (folder / "model").exists()
    summary, folder = run(script, "s", "--batch_size", 4, "--epochs", 2, "--max_steps", 5)
    assert (summary["steps"], [e["step"] for e in summary["eval"]]) == (5, [0, 5])
    assert (folder / "model" / "config.json").exists()
    summary, folder = run(script, "t", "--epochs", 0)
    assert (summary["steps"], len(summary["eval"])) == (0, 1)
    summary, _ = run(script, "u", "--train_rows", 3, "--batch_size", 50, "--epochs", 1)
    assert (summary["steps"], summary["rows"]) == (1, 3)


@both_scripts
@pytest.mark.parametrize("trained", ["layers", "all"])
@pytest.mark.parametrize("architecture", ["llama", "llama-tied"])
def test_trained_weights_move_and_the_others_do_not(run, script, trained, model_folder, architecture, capsys):
    summary, folder = run(script, "r", "--epochs", 1, "--trained", trained, model=model_folder(architecture))
    before, after = weights(model_folder(architecture)), weights(folder / "model")
    dtype = next(iter(after.values())).dtype
    moved = {name for name, t in after.items() if not torch.equal(t, before[name].to(dtype))}
    assert moved == {name for name in after if trained == "all" or ".layers." in name}
    count, total = (sum(t.numel() for n, t in after.items() if n in names) for names in (moved, set(after)))
    assert (summary["trained_params"], summary["total_params"]) == (count, total)
    assert f"training {count:,} of {total:,} parameters" in capsys.readouterr().out


def test_train_text_changes_what_is_trained(run):
    a, b = (run("finetune_lowmem", text, "--train_text", text, "--epochs", 1)[0] for text in ("harness", "raw"))
    assert a["eval"][0] == b["eval"][0]
    assert a["eval"][1]["gold_nll"] != b["eval"][1]["gold_nll"]


@pytest.mark.parametrize("optimizer", ["Adam", "Adafactor", "SGD"])
def test_base_optimizers(run, optimizer):
    rate = {"Adam": 1e-3, "Adafactor": 1e-2, "SGD": 1e-1}[optimizer]
    summary, folder = run(
        "finetune_base", "r", "--optimizer", optimizer, "--epochs", 2, "--batch_size", 4, "--lr", rate
    )
    assert summary["eval"][-1]["gold_nll"] < summary["eval"][0]["gold_nll"] - 1
    assert summary["skipped_updates"] == 0
    state = list(load_file(folder / "checkpoint" / "step-30" / "optimizer-00000.safetensors"))
    assert {name.split("/")[-1] for name in state} == {
        "Adam": {"step", "exp_avg", "exp_avg_sq"},
        "Adafactor": {"row", "col", "count"},
        "SGD": set(),
    }[optimizer]


def test_base_and_lowmem_adafactor_follow_each_other(run):
    """The same update in fp32 and in bf16 with stochastic rounding: same rows, same order, losses within bf16 noise."""
    flags = ("--epochs", 1, "--batch_size", 4, "--lr", "3e-3", "--log_every", 1)
    losses = []
    for script, more in (("finetune_base", ("--optimizer", "Adafactor")), ("finetune_lowmem", ())):
        _, folder = run(script, script, *flags, *more)
        losses.append(torch.tensor([m["train_loss"] for m in lines(folder / "metrics.jsonl") if "train_loss" in m]))
    assert losses[0][-1] < losses[0][0] - 0.3
    assert (losses[0] - losses[1]).abs().max() < 0.1  # seen: 0.03


def test_a_large_model_is_saved_in_several_files(run, model_folder, monkeypatch):
    """One at a time is copied from the GPU; together they are the model."""
    whole, one = run("finetune_lowmem", "one", "--max_steps", 1)
    monkeypatch.setattr(common, "SHARD", 20_000)
    _, several = run("finetune_lowmem", "several", "--max_steps", 1)
    assert len(list((several / "model").glob("*.safetensors"))) > 1
    assert weights(one / "model").keys() == weights(several / "model").keys()
    again, _ = run("finetune_lowmem", "again", "--epochs", 0, model=several / "model")
    assert again["eval"][0]["gold_nll"] == whole["eval"][-1]["gold_nll"]


def test_nostround_loses_small_steps(run, model_folder):
    """At a relative step of 1e-5 nearest rounding moves next to nothing; stochastic rounding moves the weights."""
    changed = {}
    for name, more in (("stochastic", ()), ("nearest", ("--nostround",))):
        _, folder = run("finetune_lowmem", name, "--epochs", 1, "--lr", "1e-5", *more)
        before, after = weights(model_folder()), weights(folder / "model")
        pairs = [(before[n].to(torch.bfloat16), t) for n, t in after.items() if "layers" in n and t.ndim == 2]
        changed[name] = sum((a != b).sum().item() for a, b in pairs) / sum(t.numel() for _, t in pairs)
    assert changed["nearest"] < 0.1 * changed["stochastic"]


@pytest.mark.parametrize("form", ["save_to_disk", "parquet", "jsonl"])
def test_dataset_forms(run, form, tmp_path):
    import datasets

    splits = {"train": many_rows(8), "validation": many_rows(4, seed=1)}
    folder = tmp_path / "data"
    folder.mkdir()
    data = datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in splits.items()})
    if form == "save_to_disk":
        data.save_to_disk(str(folder))
    for name, rows in splits.items():
        if form == "parquet":
            data[name].to_parquet(str(folder / f"{name}.parquet"))
        if form == "jsonl":
            write_jsonl(folder / f"{name}.jsonl", rows)
    summary, run_folder = run("finetune_lowmem", "r", "--dataset", folder, "--epochs", 1)
    assert (summary["rows"], summary["eval"][0]["rows"]) == (8, 4)
    assert [row["ind"] for row in lines(run_folder / "eval_epoch0.jsonl")] == [0, 1, 2, 3]


SCHEDULE_TRUTH = {  # of 10 steps at a rate of 1, the first 4 warming up
    "constant": [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1],
    "linear": [0.25, 0.5, 0.75, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6],
    "cosine": [0.25, 0.5, 0.75, 1, 1, 0.933013, 0.75, 0.5, 0.25, 0.066987],
}


@pytest.mark.parametrize("schedule", SCHEDULE_TRUTH)
@pytest.mark.parametrize(
    ("script", "flags"), [("finetune_base", ("--optimizer", "Adafactor")), ("finetune_lowmem", ())]
)
def test_steps_are_as_long_as_the_schedule_says(run, script, flags, schedule, monkeypatch):
    """Adafactor moves each tensor by its norm times the rate: within 2 %, and 5e-4 (rounding to bf16 moves it by 2e-3)."""
    moved, plain, last = [], common.Run.after_step, {}

    def after_step(run, *args):
        name, p = next((n, p) for n, p in run.trained.items() if p.ndim == 2)
        now = p.detach().double().clone()
        moved.append((now - last[name]).norm() / last[name].norm() if last else None)
        last[name] = now
        plain(run, *args)

    monkeypatch.setattr(common.Run, "after_step", after_step)
    more = ("--batch_size", 4, "--schedule", schedule, "--warmup_steps", 4, "--max_steps", 10, "--lr", 0.1)
    _, folder = run(script, "r", *flags, *more, "--log_every", 1)
    truth = torch.tensor(SCHEDULE_TRUTH[schedule])
    logged = torch.tensor([m["lr"] for m in lines(folder / "metrics.jsonl") if "lr" in m])
    torch.testing.assert_close(logged, 0.1 * truth, rtol=1e-5, atol=0)
    torch.testing.assert_close(torch.tensor(moved[1:]).float(), 0.1 * truth[1:], rtol=0.02, atol=5e-4)


@pytest.mark.parametrize("optimizer", ["Adam", "SGD"])
def test_torch_optimizers_follow_the_schedule(run, optimizer, monkeypatch):
    seen, plain = [], common.Run.after_step
    monkeypatch.setattr(
        common.Run,
        "after_step",
        lambda run, *args: (seen.append(run.optimizer.param_groups[0]["lr"]), plain(run, *args)),
    )
    flags = ("--batch_size", 4, "--schedule", "linear", "--warmup_steps", 4, "--max_steps", 10, "--lr", 1e-3)
    run("finetune_base", "r", "--optimizer", optimizer, *flags)
    assert seen == pytest.approx([1e-3 * part for part in SCHEDULE_TRUTH["linear"]])


@both_scripts
def test_a_warm_up_longer_than_the_run_is_refused(run, script):
    with pytest.raises(common.UserError, match="--warmup_steps 10 is not less than the run's 10 steps: take fewer"):
        run(script, "r", "--batch_size", 4, "--max_steps", 10, "--warmup_steps", 10)
    run(script, "evaluation", "--epochs", 0, "--warmup_steps", 10)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


@pytest.mark.parametrize(
    ("script", "flags"),
    [("finetune_base", ("--optimizer", o)) for o in ("Adam", "Adafactor", "SGD")]
    + [("finetune_lowmem", ()), ("finetune_lowmem", ("--nostround", "--trained", "all"))],
)
@pytest.mark.parametrize("stop", [7, 15, 20])
def test_a_resumed_run_equals_an_uninterrupted_one(run, script, flags, stop):
    flags = (*flags, "--epochs", 2, "--batch_size", 4, "--save_every", 3)
    _, whole = run(script, "whole", *flags)
    run(script, "parts", *flags, "--max_steps", stop)
    summary, parts = run(script, "parts", *flags, "--resume")
    assert summary["steps"] == 30
    assert all(torch.equal(t, weights(parts / "model")[n]) for n, t in weights(whole / "model").items())
    timeless = [
        [{k: v for k, v in m.items() if k not in ("memory_gib", "rows_per_second")} for m in lines(f / "metrics.jsonl")]
        for f in (whole, parts)
    ]
    assert timeless[0] == timeless[1]
    assert [f.name for f in (parts / "checkpoint").iterdir()] == ["step-30"]


@both_scripts
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_resumed_run_goes_on_with_its_schedule(run, script, schedule, monkeypatch):
    flags = ("--epochs", 2, "--batch_size", 4, "--save_every", 3, "--schedule", schedule, "--warmup_steps", 5)
    _, whole = run(script, "whole", *flags)
    with monkeypatch.context() as patch:
        plain = common.Run.after_step

        def killed(run, *args):
            plain(run, *args)
            if run.progress["step"] == 14:
                raise RuntimeError("killed")

        patch.setattr(common.Run, "after_step", killed)
        with pytest.raises(RuntimeError, match="killed"):
            run(script, "parts", *flags)
    for changed in (("--epochs", 3), ("--max_steps", 20)):
        with pytest.raises(
            common.UserError,
            match=f"started with other settings: {changed[0]} .* is now {changed[1]} .*{schedule} ends",
        ):
            run(script, "parts", *flags, *changed, "--resume")
    summary, parts = run(script, "parts", *flags, "--resume")
    assert summary["steps"] == 30
    assert all(torch.equal(t, weights(parts / "model")[n]) for n, t in weights(whole / "model").items())


def test_save_every_writes_checkpoints_in_between(run, monkeypatch):
    saved = []
    plain = common.save_checkpoint
    monkeypatch.setattr(
        common,
        "save_checkpoint",
        lambda folder, state, *rest: (saved.append(state["progress"]["step"]), plain(folder, state, *rest)),
    )
    run("finetune_lowmem", "r", "--epochs", 2, "--batch_size", 6, "--save_every", 4)
    assert saved == [4, 8, 10, 12, 16, 20]


@both_scripts
def test_resume_of_a_run_that_is_not_there_yet_says_so_and_starts_it(run, script, capsys):
    """So that a scheduler can repeat one command line, from the first time on."""
    first, folder = run(script, "r", "--max_steps", 2, "--resume")
    assert f"--resume: there is no run {folder} yet: starting it" in capsys.readouterr().out
    assert first["eval"] == run(script, "s", "--max_steps", 2)[0]["eval"]
    second, _ = run(script, "r", "--max_steps", 3, "--resume")
    said = capsys.readouterr().out
    assert "resuming after step 2" in said
    assert "there is no run" not in said
    assert second["steps"] == 3


def test_resume_before_the_first_checkpoint_starts_over(run, monkeypatch, capsys):
    def fail(*args):
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(common, "save_checkpoint", fail)
        with pytest.raises(RuntimeError, match="killed"):
            run("finetune_lowmem", "r", "--epochs", 1)
    summary, folder = run("finetune_lowmem", "r", "--epochs", 1, "--resume")
    assert "there is no checkpoint yet" in capsys.readouterr().out
    assert [m["step"] for m in lines(folder / "metrics.jsonl")] == [0, 2, 4, 6, 8, 8]


OTHER_SETTINGS = [
    (script, *setting)
    for script in SCRIPTS
    for setting in [
        ("--model", "elsewhere"), ("--dataset", "elsewhere"), ("--train_rows", 50), ("--eval_rows", 9), ("--train_text", "raw"),
        ("--trained", "all"), ("--batch_size", 5), ("--lr", "0.5"), ("--seed", 7), ("--schedule", "cosine"), ("--warmup_steps", 3),
    ]
] + [("finetune_lowmem", "--nostround"), ("finetune_base", "--optimizer", "SGD")]  # fmt: skip


def test_resume_with_other_settings_is_refused_by_name(run):
    """Each by itself, and several at once."""
    for script in SCRIPTS:
        run(script, script, "--epochs", 1, "--max_steps", 2)
    for script, flag, *value in OTHER_SETTINGS:
        with pytest.raises(
            common.UserError, match=f"other settings: {flag} [^;]+ is now {value[0] if value else True}$"
        ):
            run(script, script, "--epochs", 1, "--resume", flag, *value)
    with pytest.raises(common.UserError, match=r"--batch_size 8 is now 4; --seed 42 is now 7"):
        run("finetune_lowmem", "finetune_lowmem", "--epochs", 1, "--resume", "--batch_size", 4, "--seed", 7)


def test_a_run_killed_while_its_first_file_is_written_starts_over(run, tmp_path):
    """config.json, that is; and without training there is no checkpoint, so that it may be killed at the end too."""
    (tmp_path / "r").mkdir()
    for name in ("config.partial", "metrics.jsonl"):
        (tmp_path / "r" / name).touch()
    _, folder = run("finetune_lowmem", "r", "--epochs", 0, "--resume")
    (folder / "summary.json").unlink()
    run("finetune_lowmem", "r", "--epochs", 0, "--resume")
    kept = {f.name for f in folder.iterdir() if not f.name.startswith("events")}
    assert kept == {"config.json", "eval_epoch0.jsonl", "metrics.jsonl", "model", "summary.json"}


def test_a_run_expects_the_batches_of_its_first_epoch_and_those_before_a_break(run, monkeypatch):
    """Their padded sizes, by which graphs are captured, are those that are trained on."""
    seen, runs, plain = [], [], common.Run.after_step

    def after_step(run, loss, batch):
        seen.append((*batch.ids.shape, len(batch.targets)))
        plain(run, loss, batch)

    monkeypatch.setattr(common.Run, "after_step", after_step)
    plain_init = common.Run.__init__
    monkeypatch.setattr(
        common.Run, "__init__", lambda one, *a, **how: (runs.append(one), plain_init(one, *a, **how))[1]
    )
    run("finetune_lowmem", "one", "--epochs", 2, "--max_steps", 1)
    first = list(runs[0].expected_batches())
    assert first[:1] == seen
    seen.clear()
    run("finetune_lowmem", "r", "--epochs", 3, "--max_steps", 11)
    assert len(first) < 11 < 3 * len(first)
    assert seen[: len(first)] == first
    assert list(runs[1].expected_batches()) == seen
    run("finetune_lowmem", "r", "--epochs", 4, "--max_steps", 13, "--resume")
    assert list(runs[2].expected_batches()) == seen
    assert len(set(first)) > 1


def test_metrics_have_no_gap_when_resumed_twice_between_log_lines(run):
    flags = ("--epochs", 2, "--batch_size", 4, "--log_every", 10, "--save_every", 4)
    _, whole = run("finetune_lowmem", "whole", *flags)
    for stop in (12, 13, 14):
        run("finetune_lowmem", "parts", *flags, "--max_steps", stop, *(("--resume",) if stop > 12 else ()))
    _, parts = run("finetune_lowmem", "parts", *flags, "--resume")
    assert [m["step"] for m in lines(parts / "metrics.jsonl")] == [0, 10, 15, 20, 30, 30]
    losses = [[m.get("train_loss") for m in lines(folder / "metrics.jsonl")] for folder in (whole, parts)]
    assert losses[0] == losses[1]


def test_tensorboard_has_no_gap_and_no_repeat_when_resumed(run, tmp_path):
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

    flags = ("--epochs", 2, "--batch_size", 4)
    run("finetune_lowmem", "whole", *flags)
    run("finetune_lowmem", "parts", *flags, "--max_steps", 4)
    run("finetune_lowmem", "parts", *flags, "--resume")
    run("finetune_lowmem", "parts", *flags, "--resume")
    board = EventMultiplexer().AddRunsFromDirectory(str(tmp_path)).Reload()
    for tag in ("eval/acc", "train/train_loss"):
        assert [event.step for event in board.Scalars("parts", tag)] == [
            event.step for event in board.Scalars("whole", tag)
        ]


def test_resume_with_fewer_epochs_than_done_is_refused(run):
    run("finetune_lowmem", "r", "--epochs", 2, "--batch_size", 30)
    with pytest.raises(common.UserError, match="is in epoch 2 already"):
        run("finetune_lowmem", "r", "--epochs", 1, "--batch_size", 30, "--resume")


def test_a_diverged_run_says_so(run, tmp_path):
    with pytest.raises(common.UserError, match="has diverged; start again with a smaller --lr"):
        run("finetune_base", "r", "--optimizer", "SGD", "--epochs", 1, "--lr", 1e18)
    assert not list(tmp_path.glob("r/eval_epoch1.jsonl"))


def test_large_checkpoints_are_split(run, monkeypatch):
    monkeypatch.setattr(common, "SHARD", 10_000)
    _, whole = run("finetune_lowmem", "whole", "--epochs", 1)
    assert len(list((whole / "checkpoint" / "step-8").glob("weights-*.safetensors"))) > 2
    run("finetune_lowmem", "parts", "--epochs", 1, "--max_steps", 3)
    _, parts = run("finetune_lowmem", "parts", "--epochs", 1, "--resume")
    assert all(torch.equal(t, weights(parts / "model")[n]) for n, t in weights(whole / "model").items())


# ---------------------------------------------------------------------------------------------------------------------
# What each bad input gets: one line, exit code 2, no traceback, no run folder


def bad_model(tmp_path, model_folder, without):
    folder = tmp_path / "model"
    shutil.copytree(model_folder(), folder)
    for file in [f for pattern in without for f in folder.glob(pattern)]:
        file.unlink()
    return folder


def bad_dataset(tmp_path, rows, split="validation"):
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("train", "validation"):
        write_jsonl(folder / f"{name}.jsonl", rows if name == split else many_rows(4))
    return folder


def without(row, *names):
    return {k: v for k, v in row.items() if k not in names}


BAD_ARGUMENTS = {
    "no run name": (None, "required: --run-name"),
    "run name outside": (["--run-name", "../x"], "'../x' is not a run name"),
    "run name empty": (["--run-name", ""], "'' is not a run name"),
    "run name dots": (["--run-name", ".."], "'..' is not a run name"),
    "run name too long": (["--run-name", "a" * 300], "is not a run name"),
    "output_dir is a file": (["--output_dir", __file__], "cannot be written"),
    "output_dir too long": (["--output_dir", "a" * 300], "cannot be written"),
    "output_dir of bytes that are no UTF-8": (["--output_dir", "\udcff"], "cannot be written"),
    "run name spaces": (["--run-name", "a b"], "'a b' is not a run name"),
    "unknown flag": (["--batchsize", "3"], "unknown argument --batchsize"),
    "stray word": (["word"], "unknown argument word"),
    "abbreviated flag": (["--batch", "3"], "unknown argument --batch"),
    "zero batch": (["--batch_size", "0"], "'0' is not a whole number above 0"),
    "negative batch": (["--batch_size", "-4"], "'-4' is not a whole number above 0"),
    "fractional batch": (["--batch_size", "2.5"], "'2.5' is not a whole number"),
    "zero lr": (["--lr", "0"], "'0' is not a number above 0"),
    "negative lr": (["--lr", "-0.1"], "'-0.1' is not a number above 0"),
    "nan lr": (["--lr", "nan"], "'nan' is not a number above 0"),
    "infinite lr": (["--lr", "inf"], "'inf' is not a number above 0"),
    "overflowing lr": (["--lr", "1e999"], "'1e999' is not a number above 0"),
    "word for lr": (["--lr", "fast"], "'fast' is not a number above 0"),
    "schedule": (["--schedule", "step"], "invalid choice: 'step'"),
    "negative warm-up": (["--warmup_steps", "-1"], "'-1' is not a whole number, 0 or more"),
    "negative epochs": (["--epochs", "-1"], "'-1' is not a whole number, 0 or more"),
    "zero budget": (["--memory_budget", "0"], "--memory_budget"),
    "zero steps": (["--max_steps", "0"], "'0' is not a whole number above 0"),
    "zero rows": (["--train_rows", "0"], "'0' is not a whole number above 0"),
    "negative rows": (["--eval_rows", "-1"], "'-1' is not a whole number above 0"),
    "zero log": (["--log_every", "0"], "'0' is not a whole number above 0"),
    "zero save": (["--save_every", "0"], "'0' is not a whole number above 0"),
    "negative seed": (["--seed", "-1"], "'-1' is not a whole number, 0 or more"),
    "huge seed": (["--seed", str(2**64)], "is not a whole number, 0 or more"),
    "train text": (["--train_text", "chat"], "invalid choice: 'chat'"),
    "trained": (["--trained", "head"], "invalid choice: 'head'"),
}


@both_scripts
@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments_are_refused_before_anything_is_loaded(script, case, tmp_path, monkeypatch, capsys):
    argv, message = BAD_ARGUMENTS[case]
    monkeypatch.setattr(common, "set_up", lambda args: pytest.fail("went on with bad arguments"))
    refused(
        lambda: SCRIPTS[script].main(
            ["--output_dir", str(tmp_path / "runs"), *([] if argv is None else ["--run-name", "x"]), *(argv or [])]
        ),
        message,
        capsys,
    )
    assert not (tmp_path / "runs").exists()


def refused(call, message, capsys):
    with pytest.raises(SystemExit) as ended:
        common.run_command(call)
    assert ended.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last


def test_nostround_in_the_baseline_and_optimizer_in_lowmem_are_unknown(tmp_path, capsys):
    for script, flags in (("finetune_base", ["--nostround"]), ("finetune_lowmem", ["--optimizer", "Adam"])):
        refused(
            lambda s=script, f=flags: SCRIPTS[s].main(["--run-name", "x", "--output_dir", str(tmp_path), *f]),
            f"unknown argument {flags[0]}",
            capsys,
        )


@both_scripts
def test_an_existing_run_folder_is_refused_and_kept(script, tmp_path, capsys):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "keep").write_text("me")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    refused(
        lambda: SCRIPTS[script].main(["--run-name", "link", "--output_dir", str(tmp_path)]),
        "exists: take another --run-name",
        capsys,
    )
    refused(
        lambda: SCRIPTS[script].main(["--run-name", "x", "--output_dir", str(tmp_path)]),
        "exists: take another --run-name",
        capsys,
    )
    assert (tmp_path / "x" / "keep").read_text() == "me"


BAD_INPUTS = {
    "model without weights": lambda tmp, model: (["--model", bad_model(tmp, model, ["*.safetensors"])], "has not weights"),
    "model without tokenizer": lambda tmp, model: (["--model", bad_model(tmp, model, ["tokenizer*"])], "has not a tokenizer"),
    "model without config": lambda tmp, model: (["--model", bad_model(tmp, model, ["config.json"])], "has not a config.json"),
    "hub id without network": lambda tmp, model: (["--model", "meta-llama/Llama-3.2-1B"], "the hub cannot be reached"),
    "dataset id without network": lambda tmp, model: (["--dataset", "Rowan/hellaswag"], "the hub cannot be reached"),
    "dataset folder without splits": lambda tmp, model: (["--dataset", tmp], "needs one file train.jsonl, .jsonl.gz or .parquet, or all parts"),
    "dataset without columns": lambda tmp, model: (["--dataset", bad_dataset(tmp, [without(r, "ctx_a", "endings") for r in many_rows(3)])], "lacks the HellaSwag columns ctx_a, endings"),
    "empty validation": lambda tmp, model: (["--dataset", bad_dataset(tmp, [])], "split validation is empty"),
    "empty train": lambda tmp, model: (["--dataset", bad_dataset(tmp, [], "train")], "split train is empty"),
    "label 4": lambda tmp, model: (["--dataset", bad_dataset(tmp, [make_row(0, 4)])], "label '4' is not 0, 1, 2 or 3"),
    "empty label": lambda tmp, model: (["--dataset", bad_dataset(tmp, [make_row(0, "")], "train")], "HellaSwag's test split has none"),
    "three endings": lambda tmp, model: (["--dataset", bad_dataset(tmp, [make_row(0, 0, endings=["a", "b", "c"])])], "endings must be four strings"),
    "number for text": lambda tmp, model: (["--dataset", bad_dataset(tmp, [make_row(0, 0) | {"ctx_a": 5}])], "must be strings"),
    "empty ending": lambda tmp, model: (["--dataset", bad_dataset(tmp, [make_row(0, 0, endings=["a", "b", "c", "[step]"])])], "cannot be scored"),
    "not JSON": lambda tmp, model: (["--dataset", broken_jsonl(tmp)], "is not JSON"),
}  # fmt: skip


def broken_jsonl(tmp_path):
    folder = bad_dataset(tmp_path, many_rows(2))
    (folder / "train.jsonl").write_text('{"ind": 0, "activity_la')
    return folder


@both_scripts
@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_inputs_are_refused(script, case, tmp_path, model_folder, dataset_folder, capsys):
    flags, message = BAD_INPUTS[case](tmp_path, model_folder)
    argv = [
        "--run-name",
        "x",
        "--output_dir",
        tmp_path / "runs",
        "--model",
        model_folder(),
        "--dataset",
        dataset_folder,
        *flags,
    ]
    refused(lambda: SCRIPTS[script].main([str(a) for a in argv]), message, capsys)
    assert not (tmp_path / "runs").exists()


def test_weights_that_do_not_fill_the_model_are_refused(run, tmp_path, tokenizer):
    from safetensors.torch import save_file

    model, folder = make_model(), tmp_path / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(common.UserError, match="lack 1 tensors of the model, model.layers.1.mlp.up_proj.weight first"):
        run("finetune_lowmem", "r", model=folder)


def test_a_gated_or_missing_repository_is_explained(monkeypatch):
    import httpx
    import transformers
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    response = httpx.Response(403, request=httpx.Request("GET", "https://hub.invalid"))
    for kind, message in (
        (GatedRepoError, "is gated: accept its licence .* `hf auth login`; without an account, try --demo"),
        (RepositoryNotFoundError, "no such public repository .* try --demo"),
    ):

        def fail(*args, kind=kind, **kwargs):
            raise OSError("cannot load") from kind("no", response=response)

        monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", fail)
        with pytest.raises(common.UserError, match=message):
            common.load_tokenizer("meta-llama/Llama-3.2-1B")


@both_scripts
def test_the_real_command_line(script, tmp_path, model_folder, dataset_folder):
    """Exit codes, streams and the closing table, in a process of its own."""
    flags = [
        "--run-name",
        "x",
        "--output_dir",
        tmp_path / "runs",
        "--model",
        model_folder(),
        "--dataset",
        dataset_folder,
        "--epochs",
        1,
        "--max_steps",
        2,
    ]
    code, out, err = command(script, *flags)
    assert code == 0, err
    for text in (
        "configuration: run_name=x",
        "parameters (",
        "peak memory, GiB",
        "weights",
        "gradient",
        "acc_norm",
        "rows/s",
    ):
        assert text in out
    assert re.search(r"epoch 1: +\d+%", err), "no progress bar"
    assert "evaluating" in err
    code, out, err = command(script, *flags)
    assert (code, err.strip().count("\n")) == (2, 0)
    assert "exists: take another --run-name" in err
    assert "Traceback" not in err


def test_no_compile_changes_nothing_on_a_cpu(run, capsys):
    first, _ = run("finetune_lowmem", "a", "--epochs", 1)
    second, _ = run("finetune_lowmem", "b", "--epochs", 1, "--no_compile")
    assert first["eval"] == second["eval"]
    assert "CUDA graphs" not in capsys.readouterr().out


def test_a_memory_budget_needs_a_gpu(run):
    with pytest.raises(common.UserError, match="--memory_budget is for a GPU"):
        run("finetune_lowmem", "r", "--memory_budget", 4)


def test_importing_the_scripts_does_nothing():
    code = "import sys, common, finetune_base, finetune_lowmem; assert not {'transformers', 'datasets', 'cut_cross_entropy'} & set(sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_odd_rows_train_and_score(run, tmp_path):
    folder = bad_dataset(tmp_path, ODD_ROWS)
    write_jsonl(folder / "train.jsonl", ODD_ROWS)
    for script in SCRIPTS:
        summary, _ = run(script, script, "--dataset", folder, "--epochs", 1, "--batch_size", 3)
        assert (summary["rows"], summary["eval"][1]["rows"]) == (8, 8)


def test_planned_work_is_that_of_the_whole_run(run, tmp_path):
    """60 rows by 4 are 15 steps an epoch; 100 tokens a sequence make 40 evaluation batches of 10 rows.

    A resumed run plans as the whole one, or its kernels and so its bits might be others.
    """
    data = (
        [common.Sequence([0] * 9, 1)] * 60,
        [common.EvalRow(0, 0, [common.Sequence([0] * 100, 1)] * 4, [1] * 4)] * 10,
    )
    args = SimpleNamespace(epochs=2, batch_size=4, max_steps=None, resume=False, output_dir=str(tmp_path), run_name="r")
    assert common.planned_work(args, data, tokens_per_batch=100) == (30, 120)
    args.max_steps = 20
    assert common.planned_work(args, data, tokens_per_batch=100) == (20, 120)
    run("finetune_lowmem", "r", "--epochs", 2, "--max_steps", 4)
    args.resume = True
    assert common.planned_work(args, data, tokens_per_batch=100) == (20, 120)
    args.epochs = 0
    assert common.planned_work(args, ([], data[1]), tokens_per_batch=100)[1] == 40
