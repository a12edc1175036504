"""SIGINT and SIGTERM: no step is cut in two, and the run goes on from where it stopped. python -m pytest tests/test_signals.py"""

import os
import re
import signal
import threading
import time

import pytest
from support.commands import after_each_step
from support.runs import assert_same_run, has_lines, last_line, lines, wait_until

from lowmem.training import checkpoint, signals
from lowmem.training.errors import Interrupted
from lowmem.training.records import Records
from lowmem.training.run import Run


@pytest.fixture
def ended(monkeypatch):
    """Exit codes with which the process would have ended on the spot."""
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    return codes


@pytest.fixture
def grace(monkeypatch):
    """grace(): the grace period is over."""
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def over():
        clock[0] += signals.GRACE_SECONDS + 0.1

    return over


# ---------------------------------------------------------------------------------------------------------------------
# By themselves


@pytest.mark.parametrize("number", signals.NUMBERS)
def test_a_signal_is_raised_at_once_or_at_the_end_of_what_holds_it(number, capfd):
    with signals.Signals() as received:
        with received.hold():
            pass
        with pytest.raises(Interrupted) as raised:
            os.kill(os.getpid(), number)
        assert raised.value.number == number
    with signals.Signals() as received, pytest.raises(Interrupted) as raised, received.hold():  # noqa: PT012
        os.kill(os.getpid(), number)
        assert received.number == number
        said = "\nstopping after this step, once it is saved; a second signal, after 3 s, stops at once\n"
        assert capfd.readouterr().err == said
    assert raised.value.number == number


def test_after_it_signals_are_what_they_were():
    def own(number, frame):
        pass

    signal.signal(signal.SIGTERM, own)
    with signals.Signals():
        assert signal.getsignal(signal.SIGTERM) is not own
    assert signal.getsignal(signal.SIGTERM) is own


@pytest.mark.parametrize("held", [False, True])
def test_a_second_signal_ends_the_process_once_the_grace_period_is_over(held, ended, grace):
    """`timeout` sends its signal twice, a scheduler and torchrun both pass one on: that is meant once."""
    with signals.Signals() as received:
        received.held = held
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except Interrupted:
            assert not held
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
            assert (received.number, ended) == (signal.SIGTERM, [])
        grace()
        os.kill(os.getpid(), signal.SIGINT)
        assert ended == [128 + signal.SIGINT]


# ---------------------------------------------------------------------------------------------------------------------
# In a run


@pytest.mark.parametrize("while_saving", [False, True])
def test_a_signal_waits_for_its_step_and_its_checkpoint(while_saving, run, monkeypatch, tmp_path):
    """Nothing is cut in two, and no step follows."""
    owner, name = (checkpoint, "flush_all") if while_saving else (Run, "_log_training")
    plain = getattr(owner, name)

    def then_killed(*args):
        plain(*args)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(owner, name, then_killed)
    flags = ("--save_every", 4, "--log_every", 3, "--eval_rows", 2)
    with pytest.raises(Interrupted) as raised:
        run("finetune_lowmem", "r", *flags)
    step = 4 if while_saving else 3
    assert raised.value.go_on == f"the same command with --resume goes on from step {step}"
    assert checkpoint.read_state(checkpoint.last(tmp_path / "r"))["progress"]["step"] == step
    assert [m["step"] for m in lines(tmp_path / "r" / "metrics.jsonl")] == [0, 3]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "number"),
    [("finetune_base", signal.SIGINT), ("finetune_lowmem", signal.SIGTERM)],
    ids=["base", "lowmem"],
)
def test_a_signal_ends_a_run_after_its_step_and_it_goes_on(script, number, argv, commands, tmp_path):
    flags = ["--epochs", 10**6]
    command = commands.start(script, *argv("parts", *flags))
    assert wait_until(has_lines(tmp_path / "parts", 8), command)
    command.send(number)
    code, _, err = command.wait()
    assert code == 128 + number
    said = re.fullmatch(r"interrupted: the same command with --resume goes on from step (\d+)", last_line(err))
    assert "stopping after this step, once it is saved" in err
    assert checkpoint.last(tmp_path / "parts").name == f"step-{said[1]}"
    assert lines(tmp_path / "parts" / "metrics.jsonl")[-1]["step"] == int(said[1]) >= 7  # no step was cut in two
    flags += ["--max_steps", int(said[1]) + 20]
    code, out, _ = commands.run(script, *argv("parts", *flags, "--resume"))
    assert code == 0
    assert f"resuming after step {said[1]}\n" in out
    assert commands.run(script, *argv("whole", *flags))[0] == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
def test_a_signal_that_is_sent_twice_but_meant_once_still_saves(argv, commands):
    kill = "step == 9 and [(os.kill(os.getpid(), 15), time.sleep(0.7)) for _ in range(2)]"
    first = "import os, time\n" + after_each_step(kill)
    code, _, err = commands.run("finetune_lowmem", *argv("r", "--epochs", 2), first=first)
    assert (code, last_line(err)) == (143, "interrupted: the same command with --resume goes on from step 9")


@pytest.mark.slow
def test_a_second_signal_ends_at_once(argv, commands, tmp_path):
    never = "import time; from lowmem.training import checkpoint; checkpoint.save = lambda *_: time.sleep(60)"
    start, command = time.monotonic(), commands.start("finetune_lowmem", *argv("r", "--epochs", 20), first=never)
    assert wait_until(has_lines(tmp_path / "r", 3), command)
    command.send(signal.SIGTERM)
    time.sleep(signals.GRACE_SECONDS + 0.2)
    assert command.running()
    command.send(signal.SIGINT)
    assert command.wait()[0] == 130
    assert time.monotonic() - start < 50


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "said", "left"),
    [
        ("models.load", "start the same command again", False),
        ("evaluation.evaluate", "the same command with --resume starts from the beginning", True),
    ],
)
def test_a_signal_between_steps_ends_at_once(where, said, left, argv, commands, tmp_path):
    waits = "import time; from lowmem.training import evaluation, models\n"
    waits += f"{where} = lambda *_, **__: (print('waiting', flush=True), time.sleep(60))"
    command = commands.start("finetune_lowmem", *argv("r"), first=waits)
    assert wait_until(lambda: "waiting" in command.out.read_text(), command)
    command.send(signal.SIGTERM)
    code, _, err = command.wait()
    assert (code, last_line(err)) == (143, f"interrupted: {said}")
    assert (tmp_path / "r").exists() == left
    assert commands.run("finetune_lowmem", *argv("r", "--epochs", 1, *["--resume"] * left))[0] == 0


def test_a_signal_while_a_fresh_run_opens_its_records_says_how_it_goes_on(run, monkeypatch, tmp_path):
    """Its folder is there by then: the same command alone would be refused."""

    def interrupted(*_):
        raise Interrupted(signal.SIGINT)

    monkeypatch.setattr(Records, "open", interrupted)
    with pytest.raises(Interrupted) as caught:
        run("finetune_lowmem", "r")
    assert caught.value.go_on == "the same command with --resume starts from the beginning"


def test_a_run_in_another_thread_than_the_main_one_leaves_signals_alone():
    before = signal.getsignal(signal.SIGTERM)
    failed = []

    def enter():
        try:
            with signals.Signals():
                assert signal.getsignal(signal.SIGTERM) is before
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert not failed
