"""A script as a command: its set-up, its signals, its last line and exit code."""

import json
import logging
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext, redirect_stderr
from pathlib import Path

import torch

from lowmem.training import demo, parallel, records, run, signals
from lowmem.training.errors import Interrupted, UserError, chain, what_ran_out

# Batches differ in length; without this the allocator keeps a block of each size. Read when CUDA starts
ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


def set_up(args, method: str) -> torch.device:
    """The device to train on; says what will be done, fetches the demo's files if asked for, seeds everything.

    method: how it will be trained, for the reader.
    """
    os.environ.setdefault(*ALLOCATOR)
    if torch.cuda.is_available() and parallel.under_torchrun():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    say_settings(args, method, device)
    import datasets
    import huggingface_hub
    import transformers

    huggingface_hub.logging.set_verbosity_error()  # our own errors are one line
    transformers.logging.set_verbosity_error()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    if args.demo:
        if not parallel.under_torchrun() or os.environ["LOCAL_RANK"] == "0":  # one for each machine
            demo.prepare()
        parallel.wait_for_all()
    records.say("now", "reading rows and weights, and checking the model")
    run.seed_everything(args.seed)
    return device


def say_settings(args, method: str, device: torch.device) -> None:
    """Print what will be trained, on what, with what; all settings are in the run's config.json."""
    where = records.device_name(device)
    if device.type != "cuda":
        where += f", {os.cpu_count()} cores"
    if parallel.world_size() > 1:
        where = f"{parallel.world_size()} x {where}"
    work = f"{args.epochs} epoch{'s' if args.epochs > 1 else ''}" if args.epochs else "evaluation only"
    if args.max_steps:
        work += f", at most {args.max_steps:,} steps"
    rate = f"{args.lr:g}, {args.schedule}"
    if args.warmup_steps:
        rate += f", after {args.warmup_steps:,} steps of warm-up"
    print(f"{args.script} {args.run_name}")
    records.say("model", args.model)
    records.say("dataset", args.dataset)
    records.say("device", where)
    records.say("work", f"{work}, batches of {args.batch_size} rows, seed {args.seed}")
    records.say("learning rate", rate)
    records.say("trained", "all parameters" if args.trained == "all" else "the decoder layers")
    records.say("method", method)
    records.say("results in", Path(args.output_dir) / args.run_name)


def start(main: Callable[[], object]) -> None:
    """Run `main()` as a command: what a user can mend ends in one line on stderr and exit code 2.

    SIGINT and SIGTERM end in one line and exit codes 130 and 143. Once `main` is over they do nothing.
    """
    if sys.stdout:  # none where a shell closed it. In order with the progress bars, in a log file and in ASCII too
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    _on_signals(_interrupt)
    with redirect_stderr(_Unbroken(sys.stderr)) if sys.stderr else nullcontext():
        try:
            with parallel.processes():
                main()
        except (Interrupted, Exception) as error:
            _on_signals(signal.SIG_IGN)  # as torchrun's, which comes when another process has ended
            line, code = _last_line(error)
            _tell_torchrun(line or "".join(traceback.format_exception(error)), error)
            if line is None and not parallel.under_torchrun():
                raise
            if not parallel.under_torchrun() or os.environ["RANK"] == "0":
                _print_last(line) if line else traceback.print_exception(error)
            if parallel.under_torchrun():
                os._exit(code)  # what is under way between GPUs would wait for this process
            sys.exit(code)
        finally:  # what is left, the interpreter's end, takes a second and is best not cut short
            _on_signals(signal.SIG_IGN)


def _on_signals(handler):
    for number in signals.NUMBERS:
        signal.signal(number, handler)


def _interrupt(number, frame):
    raise Interrupted(number)


def _last_line(error):
    """(the line that ends the command, None for an error that a user cannot mend; its exit code)."""
    causes = chain(error)
    advised = next((e.go_on for e in causes if hasattr(e, "go_on")), None)
    go_on = advised or "start the same command again"
    if interrupted := next((e for e in causes if isinstance(e, Interrupted)), None):
        return f"interrupted: {go_on}", 128 + interrupted.number  # a library may have made another error of it
    if isinstance(error, UserError):
        return f"error: {error}; {advised}" if advised else f"error: {error}", 2
    line = next(filter(None, map(what_ran_out, causes)), None)
    if isinstance(error, BrokenPipeError):
        line = "nothing reads what the run prints any more"
    if line is None and isinstance(error, OSError) and error.errno:  # no permission, a disk that fails
        line = f"{error.strerror}: {error.filename or 'while writing'}"
    if line is None and parallel.under_torchrun() and any(map(_is_of_a_connection, causes)):
        line = "another process of this run has ended or cannot be reached"
    return (None, 1) if line is None else (f"error: {line}; {go_on}", 2)


def _is_of_a_connection(error):
    """Whether gloo or NCCL has lost another process."""
    words = r"Connection (closed|reset|refused)|timed out|ncclRemoteError|remote process (has )?(exited|terminated)"
    return isinstance(error, RuntimeError) and re.search(words, str(error), re.I)


def _tell_torchrun(line, error):
    """Write the last line where torchrun looks for it: of all processes it names the one that failed first."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        # torchrun compares whole seconds: what failed for want of another process comes after it
        seconds = int(time.time()) + (2 if any(map(_is_of_a_connection, chain(error))) else 0)
        Path(file).write_text(json.dumps({"message": line, "timestamp": seconds}))


def _print_last(line):
    line = "\n" + " ".join(line.split())
    print(line, file=sys.stderr)
    if getattr(sys.stderr, "broken", False):
        try:
            print(line)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or the interpreter's end fails once more


class _Unbroken:
    """stderr whose reader may go away, as Ctrl-C ends a `2>&1 | tee` too: bars then go nowhere; the step is saved."""

    broken = False

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        self._try(self.stream.write, text)
        return len(text)

    def flush(self):
        self._try(self.stream.flush)

    def _try(self, call, *args):
        try:
            call(*args)
        except OSError:
            self.broken = True
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
