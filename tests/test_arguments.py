"""The flags: what is accepted, what is refused before anything is loaded. python -m pytest tests/test_arguments.py"""

import argparse
import os

import pytest
from support.runs import SCRIPTS, both_scripts

from lowmem.training import arguments, command, demo
from lowmem.training.errors import UserError


def parser():
    return arguments.parser("script", "What it does.", batch_size=32, lr=1e-6, demo_lr=2e-5, log_every=100)


def refused(call, message, capsys):
    """`call` as a command ends in one line and exit code 2."""
    with pytest.raises(SystemExit) as ended:
        command.start(call)
    assert ended.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last


@both_scripts
def test_every_flag_is_in_help_with_its_default(script, capsys):
    with pytest.raises(SystemExit) as ended:
        SCRIPTS[script].main(["--help"])
    assert ended.value.code == 0
    flags = "run-name model dataset batch_size lr epochs max_steps train_rows eval_rows train_text train_on max_length trained schedule seed log_every"
    flags += " warmup_steps save_every resume output_dir no_save_model demo "
    flags += {"finetune_base": "optimizer", "finetune_lowmem": "nostround no_compile memory_budget cross_entropy"}[
        script
    ]
    text = " ".join(capsys.readouterr().out.split())
    for flag in flags.split():
        for spelling in {flag, flag.replace("_", "-"), flag.replace("-", "_")}:
            assert f"--{spelling}" in text
    batch_size, lr, log_every = {"finetune_base": (32, "3e-06", 100), "finetune_lowmem": (8, "0.0001", 400)}[script]
    assert f"rows per step (default: {batch_size})" in text
    assert f"learning rate (default: {lr})" in text
    assert "(default: linear)" in text
    assert f"steps between log lines (default: {log_every})" in text
    assert text.count("(default: ") >= 17


def test_flags_are_accepted_with_both_dashes(tmp_path):
    argv = ["--output-dir", str(tmp_path), "--batch-size", "5", "--max-steps", "1", "--no-save-model"]
    for name in ("--run-name", "--run_name"):
        args = arguments.parse(parser(), [name, "x", *argv])
        assert (args.run_name, args.batch_size, args.max_steps, args.no_save_model) == ("x", 5, 1, True)


def test_demo_changes_the_defaults_and_flags_still_win(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    argv = ["--run-name", "x", "--output_dir", str(tmp_path)]
    args = arguments.parse(parser(), [*argv, "--demo", "--train_rows", "7"])
    assert (args.train_rows, args.batch_size, args.lr, args.epochs) == (7, 8, 2e-5, 1)
    assert (args.model, args.dataset) == (str(demo.folder("model")), str(demo.folder("dataset")))
    assert args.model.startswith(str(tmp_path))
    args = arguments.parse(parser(), argv)
    assert (args.train_rows, args.batch_size, args.lr, args.epochs) == (None, 32, 1e-6, 3)


BAD_ARGUMENTS = {
    "no run name": (None, "required: --run-name"),
    "run name outside": (["--run-name", "../x"], "'../x' is not a run name"),
    "output_dir is a file": (["--output_dir", __file__], "cannot be written"),
    "output_dir too long": (["--output_dir", "a" * 300], "cannot be written"),
    "output_dir of bytes that are no UTF-8": (["--output_dir", "\udcff"], "cannot be written"),
    "unknown flag": (["--batchsize", "3"], "unknown argument --batchsize"),
    "stray word": (["word"], "unknown argument word"),
    "abbreviated flag": (["--batch", "3"], "unknown argument --batch"),
    "zero batch": (["--batch_size", "0"], "'0' is not a whole number above 0"),
    "fractional batch": (["--batch_size", "2.5"], "'2.5' is not a whole number"),
    "zero lr": (["--lr", "0"], "'0' is not a number above 0"),
    "negative lr": (["--lr", "-0.1"], "'-0.1' is not a number above 0"),
    "nan lr": (["--lr", "nan"], "'nan' is not a number above 0"),
    "overflowing lr": (["--lr", "1e999"], "'1e999' is not a number above 0"),
    "word for lr": (["--lr", "fast"], "'fast' is not a number above 0"),
    "schedule": (["--schedule", "step"], "invalid choice: 'step'"),
    "negative warm-up": (["--warmup_steps", "-1"], "'-1' is not a whole number, 0 or more"),
    "negative epochs": (["--epochs", "-1"], "'-1' is not a whole number, 0 or more"),
    "zero budget": (["--memory_budget", "0"], "'0' is not a number above 0"),
    "zero steps": (["--max_steps", "0"], "'0' is not a whole number above 0"),
    "zero rows": (["--train_rows", "0"], "'0' is not a whole number above 0"),
    "negative rows": (["--eval_rows", "-1"], "'-1' is not a whole number above 0"),
    "zero log": (["--log_every", "0"], "'0' is not a whole number above 0"),
    "zero save": (["--save_every", "0"], "'0' is not a whole number above 0"),
    "huge seed": (["--seed", str(2**64)], "is not a whole number, 0 or more"),
    "train text": (["--train_text", "chat"], "invalid choice: 'chat'"),
    "trained": (["--trained", "head"], "invalid choice: 'head'"),
    "the baseline's flag": (["--optimizer", "Adam"], "unknown argument --optimizer"),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments_are_refused_before_anything_is_loaded(case, tmp_path, monkeypatch, capsys):
    argv, message = BAD_ARGUMENTS[case]
    monkeypatch.setattr(command, "set_up", lambda args: pytest.fail("went on with bad arguments"))
    given = ["--output_dir", str(tmp_path / "runs"), *([] if argv is None else ["--run-name", "x"]), *(argv or [])]
    refused(lambda: SCRIPTS["finetune_lowmem"].main(given), message, capsys)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("flags", [["--nostround"], ["--memory_budget", "4"], ["--no_compile"]])
def test_lowmem_s_flags_are_unknown_to_the_baseline(flags, tmp_path):
    with pytest.raises(UserError, match=f"unknown argument {flags[0]}"):
        SCRIPTS["finetune_base"].main(["--run-name", "x", "--output_dir", str(tmp_path), *flags])


@pytest.mark.parametrize(
    "name", ["..", "../x", "/tmp/x", "a/b", "a\\b", "a\0b", "~", "a b", "", "é", "x" * 101, "...", "."]
)
def test_a_run_name_cannot_leave_the_output_folder(name):
    with pytest.raises(argparse.ArgumentTypeError, match="is not a run name"):
        arguments.run_name(name)


def test_an_existing_run_folder_is_refused_and_kept(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "keep").write_text("me")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("x", "link"):
        with pytest.raises(UserError, match=f"{name} exists: take another --run-name"):
            arguments.parse(parser(), ["--run-name", name, "--output_dir", str(tmp_path)])
    with pytest.raises(UserError, match="link is no folder: take another --run-name"):
        arguments.parse(parser(), ["--run-name", "link", "--output_dir", str(tmp_path), "--resume"])
    assert (tmp_path / "x" / "keep").read_text() == "me"


def test_a_folder_that_may_not_be_written_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UserError, match="cannot be written: choose another --output_dir"):
        arguments.parse(parser(), ["--run-name", "x", "--output_dir", str(tmp_path)])


def test_a_memory_budget_needs_a_gpu(run):
    with pytest.raises(UserError, match="--memory_budget is for a GPU"):
        run("finetune_lowmem", "r", "--memory_budget", 4)
