"""Runs of the scripts, and what they leave."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

import finetune_base
import finetune_lowmem

ROOT = Path(__file__).parents[2]
SCRIPTS = {"finetune_base": finetune_base, "finetune_lowmem": finetune_lowmem}
both_scripts = pytest.mark.parametrize("script", SCRIPTS)


def command(script, *argv, env=None):
    """The real command line: (exit code, stdout, stderr)."""
    result = subprocess.run(
        [sys.executable, str(ROOT / f"{script}.py"), *map(str, argv)],
        capture_output=True, text=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""} | (env or {}),
    )  # fmt: skip
    return result.returncode, result.stdout, result.stderr


def weights(folder):
    found = {name: t for file in sorted(Path(folder).glob("*.safetensors")) for name, t in load_file(file).items()}
    assert found, f"{folder} holds no tensors"
    return found


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def timeless(folder):
    """metrics.jsonl without what differs from run to run."""
    untimed = ("memory_gib", "rows_per_second")
    return [{k: v for k, v in line.items() if k not in untimed} for line in lines(folder / "metrics.jsonl")]


def assert_same_run(a, b):
    assert timeless(a) == timeless(b)
    first, second = weights(a / "model"), weights(b / "model")
    assert first.keys() == second.keys()
    assert all(torch.equal(t, second[name]) for name, t in first.items())
    last = [json.loads((folder / "summary.json").read_text()) for folder in (a, b)]
    assert last[0]["eval"] == last[1]["eval"]


def wait_until(condition, command, seconds=60):
    """True once condition() holds, False if the command ends before."""
    end = time.monotonic() + seconds
    while not condition():
        if not command.running():
            return False
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.001)
    return True


def has_lines(folder, count):
    file = folder / "metrics.jsonl"
    return lambda: file.exists() and file.read_text().count("\n") >= count


def last_line(text):
    assert "Traceback" not in text
    return text.strip().splitlines()[-1]


def refused(commands, script, *flags):
    """The one line of a command that ends with exit code 2 and prints nothing else but progress bars."""
    code, out, err = commands.run(script, *flags)
    said = [line for line in err.splitlines() if line.strip() and not re.search(r"\d+%\|| examples \[", line)]
    assert code == 2, (out, err)
    assert len(said) == 1, said
    assert said[0].startswith("error: ")
    assert len(said[0]) < 800
    return said[0]


def ranks_of(process):
    """{rank: pid} of the processes that this torchrun has started."""
    children = psutil.Process(process.pid).children()
    return {int(child.environ()["RANK"]): child.pid for child in children if "RANK" in child.environ()}


def difference(a, b):
    """Largest over the saved tensors of two runs: norm of the difference over norm, in fp64."""
    a, b = weights(a / "model"), weights(b / "model")
    assert a.keys() == b.keys()
    assert all(a[name].dtype == b[name].dtype for name in a)
    return max(((a[name].double() - b[name].double()).norm() / a[name].double().norm()).item() for name in a)


def log_likelihoods(folder, epoch):
    """[rows, 4] of an evaluation, as recorded."""
    return torch.tensor([row["loglikelihoods"] for row in lines(folder / f"eval_epoch{epoch}.jsonl")])
