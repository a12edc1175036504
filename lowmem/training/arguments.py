"""The flags that both scripts have, and what can be refused before anything is loaded."""

import argparse
import datetime
import math
import os
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from lowmem.training import checkpoint, demo, parallel, source
from lowmem.training.errors import UserError
from lowmem.training.run import SCHEDULES


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are UserErrors, and whose flags may be written with `_` and with `-`."""

    def error(self, message):
        raise UserError(f"{message} (see --help)")

    def add(self, flag: str, **options) -> None:
        """`add_argument`, with the flag in both spellings."""
        names = dict.fromkeys([flag, "--" + flag[2:].replace("-", "_"), "--" + flag[2:].replace("_", "-")])
        self.add_argument(*names, **options)


def number(kind: type, low: float, high: float, what: str) -> Callable[[str], float]:
    """The argparse type of a number between low and high, neither of them."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low < value < high):  # nan fails too
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
        return value

    return parse


count = number(int, 0, 2**63, "a whole number above 0")  # torch's seeds and Python's ranges end at 2^63
count_or_zero = number(int, -1, 2**63, "a whole number, 0 or more")
above_zero = number(float, 0, math.inf, "a number above 0")


def run_name(text: str) -> str:
    """The text, if a folder can have it as its name on any system."""
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,100}", text) or set(text) == {"."}:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a run name: use up to 100 letters, digits, '.', '_' and '-' only"
        )
    return text


def parser(script: str, description: str, batch_size: int, lr: float, demo_lr: float, log_every: int) -> Parser:
    """The parser of `script`, with the flags that both scripts have; a script adds its own and then calls `parse`."""
    made = Parser(
        description=description.splitlines()[0],
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    made.set_defaults(script=script)
    made.demo_defaults = demo.DEFAULTS | {"lr": demo_lr}
    add, demo_flags = made.add, " ".join(f"--{k} {v}" for k, v in made.demo_defaults.items())
    # What to train, on what
    add("--run-name", required=True, type=run_name, metavar="NAME",
        help="folder under --output_dir; letters, digits, '.', '_', '-'")  # fmt: skip
    add("--model", default="meta-llama/Llama-3.2-1B", help="hub id or local folder of a Hugging Face causal LM")
    add("--dataset", default="Rowan/hellaswag",
        help="HellaSwag, or rows of messages, of prompt and completion, of instruction and output, or of text: hub id; "
        "or folder written by save_to_disk; or folder with train and validation, test or eval as jsonl, jsonl.gz, "
        "json, csv or parquet, whole or in the hub's parts (train-00000-of-00001.parquet); or one file")  # fmt: skip
    add("--train_rows", type=count, metavar="N", help="rows: read the first N of the train split; None: all")
    add("--eval_rows", type=count, metavar="N",
        help="rows: evaluate on the first N of the held-out split; None: all. Without such a split: on N of the train "
        "split, at most a tenth of it; None: 200")  # fmt: skip
    add("--train_text", choices=["harness", "raw"], default="harness",
        help="HellaSwag: harness: train on the text that is evaluated; raw: ctx + ' ' + ending")  # fmt: skip
    add("--train_on", choices=["answers", "all"], default="answers",
        help="of other rows: answers: the assistant's turns, completions and outputs; all: every token")  # fmt: skip
    add("--max_length", type=count, metavar="N",
        help="tokens of a row; longer ones are cut at their ends, HellaSwag's at their starts; None: what the model "
        "takes")  # fmt: skip
    add("--trained", choices=["layers", "all"], default="layers",
        help="layers: the decoder layers; all: embeddings, head and final norm too")  # fmt: skip
    add("--demo", action="store_true",
        help="SmolLM2-135M and real HellaSwag rows from Python packages, no account needed; changes the defaults to "
        + demo_flags)  # fmt: skip
    add("--dry_run", action="store_true",
        help="without the weights: say what would be trained, how the model sees it, what memory it takes")  # fmt: skip
    # How
    add("--batch_size", type=count, default=batch_size, metavar="N", help="rows per step")
    add("--lr", type=above_zero, default=lr, help="learning rate")
    add("--schedule", choices=list(SCHEDULES), default="linear",
        help="learning rate after the warm-up: constant, or falling towards 0 after the run's last step, in a straight "
        "line or half a cosine wave; --resume must then keep --epochs and --max_steps")  # fmt: skip
    add("--warmup_steps", type=count_or_zero, default=0, metavar="N",
        help="first steps, in which the learning rate rises in a straight line")  # fmt: skip
    add("--epochs", type=count_or_zero, default=3, metavar="N", help="passes over the training rows; 0 only evaluates")
    add("--max_steps", type=count, metavar="N",
        help="end after this many steps in all, --schedule with them; None: no limit")  # fmt: skip
    add("--seed", type=count_or_zero, default=42, help="seeds data order, torch and rounding")
    # What is kept
    add("--output_dir", default="runs_hell", metavar="DIR", help="folder that holds the runs")
    add("--log_every", type=count, default=log_every, metavar="N", help="steps between log lines")
    add("--save_every", type=count, metavar="N", help="steps between checkpoints; None: at the end of each epoch")
    add("--resume", action="store_true",
        help="go on from the last checkpoint of --run-name, or start it; a finished run is left alone")  # fmt: skip
    add("--no_save_model", action="store_true", help="do not save the fine-tuned model at the end")
    return made


def parse(made: Parser, argv: list[str] | None = None) -> argparse.Namespace:
    """The arguments, after all was refused that can be before anything is loaded. Raises UserError.

    Ends the process, with exit code 0, if --resume finds the run finished.
    """
    args, unknown = made.parse_known_args(argv)
    if unknown:
        raise UserError(f"unknown argument {unknown[0]}: see --help for what {made.prog} takes")
    if args.demo:
        made.set_defaults(model=str(demo.folder("model")), dataset=str(demo.folder("dataset")), **made.demo_defaults)
        args = made.parse_args(argv)
    run_dir = Path(args.output_dir) / args.run_name
    if args.dry_run and (args.resume or parallel.under_torchrun()):
        raise UserError("--dry_run is for one process and from the beginning: leave --resume and torchrun out")
    if args.resume and not os.path.lexists(run_dir):  # so that a scheduler can repeat one command line
        print(f"--resume: there is no run {run_dir} yet: starting it")
        args.resume = False
    if args.resume and not os.path.isdir(run_dir):
        raise UserError(f"--resume: {run_dir} is no folder: take another --run-name")
    if not (args.resume or args.dry_run) and os.path.lexists(run_dir):  # a link to nowhere counts
        raise UserError(f"{run_dir} exists: take another --run-name, or, if it is a run, go on with it with --resume")
    try:
        existing = checkpoint.existing(run_dir)
        writable = existing.is_dir() and os.access(existing, os.W_OK) and bool(str(run_dir).encode())
    except (OSError, RuntimeError, UnicodeError):  # a name too long, links in a circle, bytes that are no UTF-8
        writable = False
    if not (writable or args.dry_run):
        name = str(run_dir)[:200].encode(errors="backslashreplace").decode()
        raise UserError(f"{name} cannot be written: choose another --output_dir")
    args.date = parallel.gather_objects(day_of_run(run_dir if args.resume else None))[0]
    if args.resume and parallel.rank() == 0:
        with checkpoint.lock(run_dir):
            checkpoint.check_resume(args, run_dir)
    if parallel.gather_objects(args.resume and checkpoint.is_finished(args, run_dir))[0]:  # all have looked
        model = "" if args.no_save_model else ", its model in model/"
        print(f"{run_dir} is finished: its scores are in summary.json{model}")
        sys.exit(0)
    return args


def day_of_run(run_dir: Path | None) -> str | None:
    """The day on which the run began, which chat templates may name, as ISO text; None of a run that kept none.

    run_dir: folder of a run that goes on: its checkpoint says it, or its config.json. Without them it is today.
    """
    if run_dir is None:
        return datetime.date.today().isoformat()
    with suppress(OSError, ValueError, TypeError, KeyError):
        if found := checkpoint.last(run_dir):
            return source.read_json(found / "state.json")["args"].get("date")
    with suppress(OSError, ValueError, TypeError, AttributeError):
        if date := source.read_json(run_dir / "config.json").get("date"):
            return datetime.date.fromisoformat(date).isoformat()
    return datetime.date.today().isoformat()
