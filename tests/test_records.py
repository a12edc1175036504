"""What a run writes and prints: metrics, TensorBoard, the first screen, the closing table. python -m pytest tests/test_records.py"""

import json
import math
import re
import time

import torch
from support.runs import assert_same_run, both_scripts, lines
from support.tiny import make_model

import common
from lowmem.data import own
from lowmem.training import memory, records
from lowmem.training.batches import Sequence
from lowmem.training.data import Data


@both_scripts
def test_summary_and_metrics_hold_what_is_promised(run, script):
    summary, folder = run(script, "r", "--epochs", 1, "--batch_size", 4)
    assert summary == json.loads((folder / "summary.json").read_text())
    promised = "script run_name args trained_params total_params steps rows target_tokens eval train_seconds ranks"
    promised += (
        " seconds_to_first_step rows_per_second tokens_per_second memory_gib ledger_gib skipped_updates versions"
    )
    assert set(promised.split()) <= set(summary)
    assert summary["trained_params"] < summary["total_params"]
    for phase in ("load", "train", "eval"):
        assert summary["memory_gib"][phase]["allocated"] is summary["memory_gib"][phase]["reserved"] is None
        assert 0.05 < summary["memory_gib"][phase]["device"] < 20
    assert sum(summary["ledger_gib"].values()) == summary["memory_gib"]["train"]["device"]
    metrics, training = lines(folder / "metrics.jsonl"), []
    for line in metrics:
        if "train_loss" in line:
            training.append(line)
            assert {"lr", "memory_gib", "rows_per_second", "skipped_updates"} < set(line)
    assert [line["step"] for line in training] == list(range(2, 16, 2))
    scores = [{name: e[name] for name in ("acc", "acc_norm", "gold_nll")} for e in summary["eval"]]
    assert [{k: v for k, v in m.items() if k not in ("step", "epoch")} for m in metrics if "acc" in m] == scores
    assert json.loads((folder / "config.json").read_text())["batch_size"] == 4


def test_the_first_screen_says_how_much_is_trained_and_the_last_what_came_of_it(run, capsys):
    summary, folder = run("finetune_lowmem", "r", "--epochs", 1, "--max_steps", 3)
    first, _, last = capsys.readouterr().out.partition("\nfinetune_lowmem r: ")
    said = {what.strip(): text for what, text in re.findall(r"^  (\w.{12} )(\S.*)$", first, re.MULTILINE)}
    assert said["parameters"].startswith(f"{summary['trained_params']:,} of {summary['total_params']:,} trained (")
    assert (said["rows"], said["steps"]) == ("60 to train on, 16 held out", "3")
    assert re.match(r"3 steps, 2[0-4] rows, ", last)  # of 60 rows, in 8 batches of up to 8
    before, after = summary["eval"]
    for title, e in (("before", before), ("epoch 1", after)):
        assert re.search(rf"^{title} +{e['acc']:.2f} +{e['acc_norm']:.2f} +{e['gold_nll']:.3f}$", last, re.MULTILINE)
    assert re.search(r"^held-out rows: 16 +acc % +acc_norm % +gold NLL$", last, re.MULTILINE)
    assert re.search(r"^train +- +- +\d+\.\d\d$", last, re.MULTILINE)
    assert "of which in training: weights 0.00, optimizer state 0.00, largest gradient 0.00, the rest" in last
    assert str(folder) in last


def test_a_run_without_training_has_a_closing_table_too(run, capsys):
    summary, _ = run("finetune_lowmem", "r", "--epochs", 0)
    assert (summary["rows_per_second"], summary["seconds_to_first_step"]) == (None, None)
    said = capsys.readouterr().out
    assert "evaluation only" in said
    assert "0 steps, 0 rows, 0 s\n" in said


def test_the_table_names_skipped_updates_and_the_rank_that_took_most(capsys, tmp_path):
    peak = {"allocated": 1.0, "reserved": 2.0, "device": 3.0}
    summary = {
        "script": "s", "run_name": "r", "steps": 7, "rows": 56, "train_seconds": 2.0, "rows_per_second": 28.0, "tokens_per_second": 900.0,
        "seconds_to_first_step": 5.0, "skipped_updates": 4, "ranks": 2, "memory_of_rank": 1, "memory_gib": {"train": peak},
        "ledger_gib": {"weights": 0.5}, "eval": [{"epoch": 0, "rows": 16, "acc": 25.0, "acc_norm": 50.0, "gold_nll": 3.0}],
    }  # fmt: skip
    records.print_summary(summary, tmp_path / "r", common.HellaSwag.SCORES)
    said = capsys.readouterr().out
    assert "s r: 7 steps, 56 rows, 2 s, 28.0 rows/s, 900 tokens/s, first step done 5 s after the start" in said
    assert "4 updates skipped as not finite" in said
    assert re.search(r"^peak memory, GiB, rank 1 +allocated +reserved +device$", said, re.MULTILINE)
    assert re.search(r"^train +1.00 +2.00 +3.00$", said, re.MULTILINE)


def test_the_ledger_counts_each_weight_once(model_folder):
    model = make_model("llama-tied").bfloat16()
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    peak = {"allocated": 2.0, "reserved": 2.5, "device": 3.0}
    parts = records.ledger(model, optimizer, ("gradients", 2**29), peak, torch.device("cpu"))
    size = memory.size_in_bytes(model.parameters()) / memory.GIB
    buffers = memory.size_in_bytes(model.buffers()) / memory.GIB
    assert abs(parts["weights"] - size - buffers) < 1e-12
    assert parts["optimizer state"] == size
    assert parts["gradients"] == 0.5
    assert abs(sum(parts.values()) - 2.0) < 1e-12
    assert "the rest" not in records.ledger(model, optimizer, ("gradients", 0), None, torch.device("cpu"))


def test_records_have_no_gap_and_no_repeat_when_resumed_between_log_lines(run, tmp_path):
    """Twice, and once more when all is done but the summary."""
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

    flags = ("--epochs", 2, "--batch_size", 4, "--log_every", 10, "--save_every", 4)
    _, whole = run("finetune_lowmem", "whole", *flags)
    run("finetune_lowmem", "parts", *flags, "--max_steps", 12)
    for more in (("--max_steps", 13), (), ()):
        time.sleep(1)  # TensorBoard orders files by their second
        (tmp_path / "parts" / "summary.json").unlink()
        _, parts = run("finetune_lowmem", "parts", *flags, *more, "--resume")
    assert [m["step"] for m in lines(parts / "metrics.jsonl")] == [0, 10, 15, 20, 30, 30]
    assert_same_run(whole, parts)
    board = EventMultiplexer().AddRunsFromDirectory(str(tmp_path)).Reload()
    assert set(board.Runs()) == {"whole", "parts"}  # side by side
    tags = {"train/train_loss", "train/lr", "train/memory_gib", "train/rows_per_second", "train/skipped_updates"}
    tags |= {"eval/acc", "eval/acc_norm", "eval/gold_nll"}
    for name in ("whole", "parts"):
        assert set(board.Runs()[name]["scalars"]) == tags
        assert [event.step for event in board.Scalars(name, "train/train_loss")] == [10, 20, 30]
        assert [event.step for event in board.Scalars(name, "eval/acc")] == [0, 15, 30]


def test_columns_of_the_table_stay_apart(capsys, tmp_path):
    """A perplexity may have two hundred digits."""
    scores = {"nll": 500.0, "perplexity": math.exp(500), "token_accuracy": 1.5}
    summary = {
        "script": "s", "run_name": "r", "steps": 1, "rows": 0, "train_seconds": 2.0, "seconds_to_first_step": None, "skipped_updates": 0,
        "ranks": 1, "memory_gib": {}, "ledger_gib": {}, "eval": [{"epoch": 0, "rows": 16} | scores],
    }  # fmt: skip
    records.print_summary(summary, tmp_path / "r", own.OwnData.SCORES)
    assert f" 500.0000  {math.exp(500):.3f}  " in capsys.readouterr().out


def test_data_describe_themselves():
    row = Sequence.ending([1, 2], 1)
    assert Data([row] * 1200, [row], 9).describe() == "1,200 sequences to train on, 1 held out"
    assert common.HellaSwag([row] * 1200, [row] * 8, 9, rows=[0, 0]).describe() == "1,200 to train on, 2 held out"
