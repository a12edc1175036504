"""What a run of either script does and leaves, end to end, on tiny models. python -m pytest tests/test_scripts.py"""

import pytest
import torch
from safetensors.torch import load_file
from support.runs import assert_same_run, both_scripts, lines, weights
from support.tiny import ODD_ROWS, write_jsonl

from lowmem.training import saved_model


@both_scripts
def test_a_run_learns_and_leaves_what_is_promised(run, script):
    summary, folder = run(script, "r", "--epochs", 3, "--batch_size", 4)
    evals = summary["eval"]
    assert [(e["epoch"], e["step"], e["rows"]) for e in evals] == [(0, 0, 16), (1, 15, 16), (2, 30, 16), (3, 45, 16)]
    assert evals[-1]["gold_nll"] < 0.8 * evals[0]["gold_nll"]  # seen: 0.70
    assert (summary["steps"], summary["rows"], summary["skipped_updates"]) == (45, 180, 0)
    left = {file.name for file in folder.iterdir() if not file.name.startswith("events.out.tfevents")}
    of_epochs = {f"eval_epoch{epoch}.jsonl" for epoch in range(4)}
    assert left == {"config.json", "metrics.jsonl", "summary.json", "checkpoint", "model", *of_epochs}
    assert [f.name for f in (folder / "checkpoint").iterdir()] == ["step-45"]
    for e in evals:
        rows = lines(folder / f"eval_epoch{e['epoch']}.jsonl")
        assert [set(row) for row in rows] == [{"ind", "label", "loglikelihoods", "chars"}] * 16
        correct = [row["loglikelihoods"].index(max(row["loglikelihoods"])) == row["label"] for row in rows]
        assert 100 * sum(correct) / 16 == e["acc"]


@pytest.mark.parametrize(
    ("script", "architecture"),
    [("finetune_base", "llama"), ("finetune_lowmem", "llama-tied"), pytest.param("finetune_base", "llama-tied", marks=pytest.mark.slow)],
)  # fmt: skip
def test_the_saved_model_scores_what_the_run_reported(run, script, model_folder, architecture):
    from transformers import AutoModelForCausalLM

    summary, folder = run(script, "r", "--epochs", 1, "--trained", "all", model=model_folder(architecture))
    again, second = run(script, "again", "--epochs", 0, model=folder / "model")
    assert lines(folder / "eval_epoch1.jsonl") == lines(second / "eval_epoch0.jsonl")
    assert again["eval"][0] == summary["eval"][1] | {"epoch": 0, "step": 0}
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert model.config.use_cache
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied == (architecture == "llama-tied")
    assert model.dtype == (torch.bfloat16 if script == "finetune_lowmem" else torch.float32)


def test_a_large_model_is_saved_in_several_files(run, model_folder, monkeypatch):
    """Together they are the model."""
    whole, one = run("finetune_lowmem", "one", "--max_steps", 1)
    monkeypatch.setattr(saved_model, "FILE_BYTES", 20_000)
    _, several = run("finetune_lowmem", "several", "--max_steps", 1)
    assert len(list((several / "model").glob("*.safetensors"))) > 1
    found, expected = weights(several / "model"), weights(one / "model")
    assert found.keys() == expected.keys()
    assert all(torch.equal(t, found[name]) for name, t in expected.items())
    again, _ = run("finetune_lowmem", "again", "--epochs", 0, model=several / "model")
    assert again["eval"][0]["gold_nll"] == whole["eval"][-1]["gold_nll"]


# ---------------------------------------------------------------------------------------------------------------------
# Flags


@pytest.mark.parametrize(
    ("script", "trained", "architecture"),
    [
        ("finetune_base", "layers", "llama"),
        ("finetune_base", "all", "llama-tied"),
        ("finetune_lowmem", "layers", "llama-tied"),
        ("finetune_lowmem", "all", "llama"),
        ("finetune_lowmem", "all", "llama-tied"),
    ],
)
def test_trained_weights_move_and_the_others_do_not(run, script, trained, model_folder, architecture):
    few = ("--epochs", 1, "--max_steps", 4, "--eval_rows", 1)
    summary, folder = run(script, "r", *few, "--trained", trained, model=model_folder(architecture))
    before, after = weights(model_folder(architecture)), weights(folder / "model")
    dtype = next(iter(after.values())).dtype
    moved = {name for name, t in after.items() if not torch.equal(t, before[name].to(dtype))}
    assert moved == {name for name in after if trained == "all" or ".layers." in name}
    count, total = (sum(t.numel() for n, t in after.items() if n in names) for names in (moved, set(after)))
    assert (summary["trained_params"], summary["total_params"]) == (count, total)


def test_train_text_changes_what_is_trained(run):
    few = ("--epochs", 1, "--max_steps", 4)
    a, b = (run("finetune_lowmem", text, "--train_text", text, *few)[0] for text in ("harness", "raw"))
    assert a["eval"][0] == b["eval"][0]
    assert a["eval"][1]["gold_nll"] != b["eval"][1]["gold_nll"]


@pytest.mark.parametrize(
    ("optimizer", "rate", "state"),
    [("Adam", 1e-3, {"step", "exp_avg", "exp_avg_sq"}), ("Adafactor", 1e-2, {"row", "col", "count"}), ("SGD", 1e-1, set())],
)  # fmt: skip
def test_base_optimizers(run, optimizer, rate, state):
    summary, folder = run(
        "finetune_base", "r", "--optimizer", optimizer, "--epochs", 2, "--batch_size", 4, "--lr", rate
    )
    assert summary["eval"][-1]["gold_nll"] < summary["eval"][0]["gold_nll"] - 1
    assert summary["skipped_updates"] == 0
    saved = [name for file in (folder / "checkpoint" / "step-30").glob("*.safetensors") for name in load_file(file)]
    assert {name.split("/")[1] for name in saved if "/" in name} == state


def test_base_and_lowmem_adafactor_follow_each_other(run):
    """The same update in fp32 and in bf16 with stochastic rounding: same rows, same order, losses within bf16 noise."""
    flags = ("--epochs", 1, "--batch_size", 4, "--lr", "3e-3", "--log_every", 1)
    losses = []
    for script, more in (("finetune_base", ("--optimizer", "Adafactor")), ("finetune_lowmem", ())):
        _, folder = run(script, script, *flags, *more)
        losses.append(torch.tensor([m["train_loss"] for m in lines(folder / "metrics.jsonl") if "train_loss" in m]))
    assert losses[0][-1] < losses[0][0] - 0.3
    assert (losses[0] - losses[1]).abs().max() < 0.1  # seen: 0.03


def test_nostround_loses_small_steps(run, model_folder):
    """At a relative step of 1e-5 nearest rounding moves next to nothing; stochastic rounding moves the weights."""
    changed = {}
    for name, more in (("stochastic", ()), ("nearest", ("--nostround",))):
        _, folder = run("finetune_lowmem", name, "--epochs", 1, "--lr", "1e-5", "--eval_rows", 1, *more)
        before, after = weights(model_folder()), weights(folder / "model")
        pairs = [(before[n].to(torch.bfloat16), t) for n, t in after.items() if "layers" in n and t.ndim == 2]
        changed[name] = sum((a != b).sum().item() for a, b in pairs) / sum(t.numel() for _, t in pairs)
    assert changed["stochastic"] > 0
    assert changed["nearest"] < 0.1 * changed["stochastic"]


def test_no_compile_changes_nothing_on_a_cpu(run, capsys):
    few = ("--epochs", 1, "--max_steps", 4)
    first, _ = run("finetune_lowmem", "a", *few)
    second, _ = run("finetune_lowmem", "b", *few, "--no_compile")
    assert first["eval"] == second["eval"]
    assert "CUDA graphs" not in capsys.readouterr().out


@both_scripts
def test_odd_rows_train_and_score(run, tmp_path, script):
    for split in ("train", "validation"):
        write_jsonl(tmp_path / f"{split}.jsonl", ODD_ROWS)
    summary, folder = run(script, script, "--dataset", tmp_path, "--epochs", 1, "--batch_size", 3)
    assert (summary["rows"], summary["eval"][1]["rows"]) == (8, 8)
    assert [row["ind"] for row in lines(folder / "eval_epoch1.jsonl")] == [row["ind"] for row in ODD_ROWS]


def test_a_run_folder_may_be_moved_and_renamed(run, tmp_path):
    """It goes on where it is then, to the same end."""
    flags = ("--epochs", 2, "--batch_size", 30, "--eval_rows", 2)
    _, whole = run("finetune_base", "whole", *flags)
    run("finetune_base", "r", *flags, "--max_steps", 3)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "r").rename(tmp_path / "elsewhere" / "s")
    run("finetune_base", "s", *flags, "--resume", "--output_dir", tmp_path / "elsewhere")
    assert_same_run(whole, tmp_path / "elsewhere" / "s")
