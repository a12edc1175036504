"""A script as a command: its last line, its exit code, its streams. python -m pytest tests/test_command.py"""

import errno
import json
import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from datasets.exceptions import DatasetGenerationError
from support.commands import ROOT, after_each_step
from support.runs import assert_same_run, both_scripts, last_line
from support.runs import command as real_command

import finetune_lowmem
from lowmem.training import command
from lowmem.training.errors import Diverged, Interrupted, UserError


@pytest.fixture
def ended(capsys):
    """ended(error) -> (exit code, the one line on stderr) of a command whose main raises that."""

    def end(error):
        def main():
            raise error

        with pytest.raises(SystemExit) as stopped:
            command.start(main)
        (line,) = capsys.readouterr().err.strip().splitlines()
        return stopped.value.code, line

    return end


def with_advice(error):
    """As it leaves a Run."""
    error.go_on = "the same command with --resume goes on from step 5"
    return error


def because_of(error, cause):
    error.__cause__ = cause
    return error


# ---------------------------------------------------------------------------------------------------------------------
# Last lines and exit codes


AGAIN, RESUME = "start the same command again", "the same command with --resume goes on from step 5"
LAST_LINES = {
    "a mistake": (lambda: UserError("take another\n  folder"), 2, "error: take another folder"),
    "a mistake in a run": (lambda: with_advice(UserError("make room")), 2, f"error: make room; {RESUME}"),
    "a run that diverged": (lambda: Diverged("take a smaller --lr"), 2, "error: take a smaller --lr"),
    "Ctrl-C": (lambda: Interrupted(signal.SIGINT), 130, f"interrupted: {AGAIN}"),
    "SIGTERM in a run": (lambda: with_advice(Interrupted(signal.SIGTERM)), 143, f"interrupted: {RESUME}"),
    "a signal of which a library made an error": (lambda: because_of(RuntimeError("the end of a capture fails"), Interrupted(15)), 143, f"interrupted: {AGAIN}"),
    "a full disk of which a library made an error": (lambda: because_of(DatasetGenerationError("An error occurred"), OSError(errno.ENOSPC, "No space left on device")), 2, f"error: the disk is full: make room; {AGAIN}"),
    "a quota": (lambda: with_advice(OSError(errno.EDQUOT, "Disk quota exceeded")), 2, f"error: the disk is full: make room; {RESUME}"),
    "a disk that fails": (lambda: with_advice(OSError(errno.EIO, "Input/output error", "shard")), 2, f"error: Input/output error: shard; {RESUME}"),
    "no permission": (lambda: PermissionError(errno.EACCES, "Permission denied", "file"), 2, f"error: Permission denied: file; {AGAIN}"),
    "nobody reads": (lambda: BrokenPipeError(errno.EPIPE, "Broken pipe"), 2, f"error: nothing reads what the run prints any more; {AGAIN}"),
}  # fmt: skip


@pytest.mark.parametrize("case", LAST_LINES)
def test_the_last_line_says_what_to_do(case, ended):
    error, code, line = LAST_LINES[case]
    assert ended(error()) == (code, line)


def no_memory():
    """What torch raises where the host has no memory left."""
    try:
        torch.empty(2**44)
    except RuntimeError as error:
        return error


LESS = "take a smaller --batch_size or --max_length (and another --run-name), more GPUs, or (low-memory, on one GPU) "
LESS += "a smaller --memory_budget"
RAN_OUT = {
    "the GPU's, as torch says it": (
        lambda: torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 15.50 GiB of which 512.00 MiB "
            "is free.\nIncluding non-PyTorch memory, this process has 15.0 GiB memory in use. 14.20 GiB allowed; Of the "
            "allocated memory 1 GiB is allocated by PyTorch."
        ),
        f"out of GPU memory: 2.50 GiB asked, 512.00 MiB free, 14.20 GiB allowed; {LESS}",
    ),
    "the GPU's": (
        lambda: RuntimeError("CUDA error: out of memory"),
        f"out of GPU memory: more asked, less free; {LESS}",
    ),
    "Triton": (
        lambda: RuntimeError("Triton Error [CUDA]: out of memory"),
        "out of GPU memory: more asked, less free; ",
    ),
    "the driver": (
        lambda: RuntimeError("CUDA driver error: out of memory"),
        "out of GPU memory: more asked, less free; ",
    ),
    "cuBLAS": (
        lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"),
        "out of GPU memory: more ",
    ),
    "the host's": (no_memory, "out of host memory: 65536.00 GiB asked; close other programs; "),
    "Python": (MemoryError, "out of host memory: more asked; close other programs; "),
    "numpy": (
        lambda: MemoryError("Unable to allocate 3.00 GiB for an array with shape (3,) and data type float64"),
        "out of host memory: 3.00 GiB asked; ",
    ),
    "the system": (lambda: OSError(12, "Cannot allocate memory"), "out of host memory: more asked; "),
    "a thread": (lambda: RuntimeError("can't start new thread"), "out of host memory: more asked; "),
}


@pytest.mark.parametrize("case", RAN_OUT)
def test_what_was_asked_and_what_is_free_is_said(case, ended):
    error, said = RAN_OUT[case]
    code, line = ended(error())
    assert code == 2
    assert line.startswith(f"error: {said}")
    assert line.endswith(f"; {AGAIN}")


@pytest.mark.parametrize(
    "error", [RuntimeError("rate limit: quota exceeded"), ValueError("File too large for the hub"), KeyError("x")]
)
def test_what_a_user_cannot_mend_keeps_its_traceback(error):
    """What only sounds like a full disk is none. Nor is a connection that breaks a reader that has gone."""

    def main():
        raise because_of(error, BrokenPipeError(32, "Broken pipe"))

    with pytest.raises(type(error)) as raised:
        command.start(main)
    assert raised.value is error


def test_a_connection_that_breaks_is_another_process_s_end_under_torchrun_alone(monkeypatch):
    error = RuntimeError("Connection closed by peer [127.0.0.1]:4242")
    assert command._last_line(error) == (None, 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    line, code = command._last_line(error)
    assert (line, code) == (f"error: another process of this run has ended or cannot be reached; {AGAIN}", 2)


@pytest.mark.parametrize(
    ("error", "message"), [(UserError("no"), "^error: no$"), (KeyError("x"), "(?s)^Trace.*KeyError: 'x'")]
)
def test_torchrun_finds_the_last_line_in_its_file(error, message, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))

    def main():
        raise error

    with pytest.raises((SystemExit, KeyError)):
        command.start(main)
    found = json.loads((tmp_path / "error.json").read_text())
    assert re.search(message, found["message"])
    assert found["timestamp"] > 1.7e9


def test_once_main_is_over_signals_do_nothing_and_before_they_interrupt():
    seen = []

    def main():
        seen.extend(signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM))
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit) as stopped:
        command.start(main)
    assert stopped.value.code == 143
    assert seen == [command._interrupt] * 2
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == [signal.SIG_IGN] * 2


@pytest.mark.slow
@pytest.mark.parametrize(("main", "code"), [("int", 0), ("lambda: os.kill(os.getpid(), signal.SIGTERM)", 143)])
def test_signals_at_the_interpreter_s_end_print_nothing(main, code):
    """It takes a second, in which an exception would be printed."""
    program = "import atexit, os, signal; from lowmem.training import command\n"
    program += "atexit.register(lambda: [os.kill(os.getpid(), n) for n in (signal.SIGINT, signal.SIGTERM)])\n"
    done = subprocess.run(
        [sys.executable, "-c", f"{program}command.start({main})"], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.strip() == (f"interrupted: {AGAIN}" if code else "")


# ---------------------------------------------------------------------------------------------------------------------
# What it prints


def test_a_run_begins_with_what_it_will_do(capsys, tmp_path):
    flags = [
        "--run-name",
        "x",
        "--output_dir",
        str(tmp_path),
        "--lr",
        "0.0003",
        "--max_steps",
        "1500",
        "--warmup_steps",
    ]
    args = finetune_lowmem.parse([*flags, "7", "--trained", "all"])
    command.say_settings(args, "by hand", torch.device("cpu"))
    title, *table = capsys.readouterr().out.splitlines()
    assert title == "finetune_lowmem x"
    assert all(re.match(r"  \S.{12} \S", line) or len(line.split("  ")) > 2 for line in table)
    said = {line[:16].strip(): line[16:] for line in table}
    assert said["work"] == "3 epochs, at most 1,500 steps, batches of 8 rows, seed 42"
    assert said["learning rate"] == "0.0003, linear, after 7 steps of warm-up"
    assert said["model"] == "meta-llama/Llama-3.2-1B"
    assert said["trained"] == "all parameters"
    assert said["method"] == "by hand"
    assert said["results in"] == str(tmp_path / "x")


@pytest.mark.slow
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
    ]
    flags += ["--epochs", 1, "--max_steps", 2]
    code, out, err = real_command(script, *flags)
    assert code == 0, err
    assert out.startswith(f"{script} x\n  model ")
    for text in ("peak memory, GiB", "weights", "gradient", "acc_norm", "rows/s", "records in "):
        assert text in out
    assert re.search(r"epoch 1: +\d+%", err), "no progress bar"
    assert "evaluating" in err
    code, out, err = real_command(script, *flags)
    assert (code, out, err.strip().count("\n")) == (2, "", 0)
    assert "exists: take another --run-name" in err


@pytest.mark.slow
def test_a_terminal_of_ascii_alone_ends_no_run(model_folder, dataset_folder, commands, tmp_path):
    ascii_alone = "import io, sys; sys.stdout = io.TextIOWrapper(sys.stdout.buffer, encoding='ascii')"
    flags = ["--run-name", "r", "--output_dir", tmp_path / "Läufe", "--model", model_folder()]
    flags += ["--dataset", dataset_folder, "--epochs", 0]
    code, out, err = commands.run("finetune_lowmem", *flags, first=ascii_alone)
    assert code == 0, err
    assert "L\\xe4ufe" in out


# ---------------------------------------------------------------------------------------------------------------------
# Broken streams


class Broken:
    """A stream whose reader has gone."""

    encoding = "utf-8"

    def write(self, text):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    flush = write


def test_a_stderr_that_breaks_swallows_bars_and_moves_the_last_line(monkeypatch, capsys):
    duplicated = []
    monkeypatch.setattr(os, "dup2", lambda *descriptors: duplicated.append(descriptors[1]))
    monkeypatch.setattr(sys, "stderr", Broken())

    def main():
        assert sys.stderr.write("50 %") == 4
        assert sys.stderr.encoding == "utf-8"
        raise with_advice(Interrupted(signal.SIGINT))

    with pytest.raises(SystemExit) as stopped:
        command.start(main)
    assert stopped.value.code == 130
    assert capsys.readouterr().out == f"\ninterrupted: {RESUME}\n"
    assert set(duplicated) == {2}  # to /dev/null, for what libraries write by themselves


def test_streams_that_a_shell_has_closed_are_no_error(monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    ran = []
    command.start(lambda: (print("x"), ran.append(1)))
    assert ran


@pytest.mark.slow
@pytest.mark.parametrize("how", ["pipe", "full"])
def test_stderr_that_cannot_be_written_costs_no_step(how, argv, commands, tmp_path):
    """As when Ctrl-C ends the `tee` of `2>&1 | tee log` too: the step is saved, and stdout has the last line."""
    broken = {
        "pipe": "reader, writer = os.pipe(); os.close(reader)",
        "full": "writer = os.open('/dev/full', os.O_WRONLY)",
    }[how]
    kill = "os.dup2(writer, 2) if step == 5 else None; os.kill(os.getpid(), 2) if step == 9 else None"
    first = f"import os; {broken}; import common; common.os, common.writer = os, writer\n" + after_each_step(
        kill.replace("os.", "common.os.").replace("writer", "common.writer")
    )
    code, out, _ = commands.run("finetune_lowmem", *argv("parts", "--epochs", 2), first=first)
    assert code == 130
    assert out.rstrip().endswith("interrupted: the same command with --resume goes on from step 9")
    for name, more in (("parts", ["--resume"]), ("whole", [])):
        assert commands.run("finetune_lowmem", *argv(name, "--epochs", 2, *more))[0] == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
def test_a_closed_pipe_or_stdout_ends_in_one_line_or_not_at_all(argv, commands):
    closed = "import os, sys; reader, writer = os.pipe(); os.close(reader); os.dup2(writer, 1)"
    code, _, err = commands.run("finetune_lowmem", *argv("a", "--epochs", 1), first=closed)
    assert code == 2
    assert last_line(err) == "error: nothing reads what the run prints any more; start the same command again"
    code, _, err = commands.run("finetune_lowmem", *argv("b", "--epochs", 1), first="import sys; sys.stdout = None")
    assert code == 0, err


def test_a_rank_without_torchrun_silences_nothing(monkeypatch, capsys):
    """A scheduler may set RANK for reasons of its own."""
    monkeypatch.setenv("RANK", "1")

    def main():
        raise UserError("no")

    with pytest.raises(SystemExit) as ended:
        command.start(main)
    assert ended.value.code == 2
    assert capsys.readouterr().err.strip() == "error: no"
