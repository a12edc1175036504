"""Fixtures and marks. What tests share beside them is in tests/support/."""

import os
import signal
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # a test that would reach for the hub fails at once
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # the GPU's kernels, run on the CPU; read when triton is imported

from support.commands import Commands
from support.runs import SCRIPTS
from support.tiny import ODD_ROWS, make_model, make_tokenizer, many_rows, write_jsonl

torch.set_num_threads(1)  # tensors are tiny: a second thread would wait longer than it works


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, tokenizer):
    """{architecture: folder with a saved tiny model and tokenizer}, made when first asked for."""
    made = {}

    def get(architecture="llama"):
        if architecture not in made:
            made[architecture] = tmp_path_factory.mktemp(architecture)
            make_model(architecture).save_pretrained(made[architecture])
            tokenizer.save_pretrained(made[architecture])
        return made[architecture]

    return get


@pytest.fixture(scope="session")
def dataset_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dataset")
    write_jsonl(folder / "train.jsonl", many_rows(60, seed=1))
    write_jsonl(folder / "validation.jsonl", many_rows(12, seed=2) + ODD_ROWS[:4])
    return folder


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


@pytest.fixture
def argv(tmp_path, model_folder, dataset_folder):
    """argv(name, *flags): arguments of a run of 15 steps an epoch on a tiny model, each step logged.

    At a constant rate, so that a run may go on to another length.
    """

    def make(name, *flags):
        where = ["--run-name", name, "--output_dir", tmp_path, "--model", model_folder(), "--dataset", dataset_folder]
        return [*where, "--batch_size", 4, "--log_every", 1, "--lr", "1e-2", "--schedule", "constant", *flags]

    return make


@pytest.fixture(autouse=True)
def signals():
    """Ctrl-C ends the tests, though `command.start` ignores it once its command is over."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def commands(tmp_path_factory):
    """See tests/support/commands.py."""
    started = Commands(tmp_path_factory.mktemp("streams"))
    yield started
    started.close()


def pytest_configure(config):
    if not config.option.markexpr:
        config.option.markexpr = "not slow"
    config.addinivalue_line("markers", "gpu: needs a GPU; skips itself where there is none")
    config.addinivalue_line("markers", "slow: takes long: python -m pytest leaves it out, -m slow runs it")


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture
def run_ranks(tmp_path, model_folder, dataset_folder, commands):
    """run_ranks(count, script, run_name, *flags) -> run folder: all ranks end well, and those above 0 say nothing."""

    def go(count, script, name, *flags, architecture="llama", first=""):
        argv = ["--run-name", name, "--output_dir", tmp_path, "--model", model_folder(architecture)]
        argv += ["--dataset", dataset_folder, "--batch_size", 8, "--log_every", 1, "--lr", "1e-3", *flags]
        if count == 1:
            ended = [commands.run(script, *argv, first=first)]
        else:
            ended = commands.run_ranks(count, script, *argv, first=first)
        assert [code for code, _, _ in ended] == [0] * count, "\n".join(err[-2000:] for _, _, err in ended)
        assert ended[1:] == [(0, "", "")] * (count - 1)
        return tmp_path / name

    return go
