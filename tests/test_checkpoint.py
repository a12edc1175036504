"""A run's state on the disk: whole at every instant, refused where it is damaged. python -m pytest tests/test_checkpoint.py"""

import errno
import gc
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from support.commands import after_each_step
from support.damage import change_json, change_weights, contents, cut, flip
from support.runs import SCRIPTS, assert_same_run, last_line, refused, wait_until
from support.tiny import make_model, many_rows, write_jsonl
from support.training import as_lm, make_batch, make_run
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer
from torch.distributed.checkpoint import HuggingFaceStorageReader

import common
from lowmem.adafactor import Adafactor
from lowmem.training import checkpoint, models, tokenizing
from lowmem.training.errors import Interrupted, UserError
from lowmem.training.layouts import Lines, PaddedRows


def make_state(step, **more):
    args = {"script": "finetune_lowmem", "seed": 1}
    return {"args": args, "progress": {"step": step, "epoch": 1}, "fingerprints": {"model": "m", "dataset": "d"}} | more


def make_trained(kind=Adafactor, seed=0):
    """({name: parameter}, its optimizer): two matrices and a vector."""
    torch.manual_seed(seed)
    trained = {
        name: torch.nn.Parameter(torch.randn(shape)) for name, shape in {"a": (8, 4), "b": (3, 5), "c": 6}.items()
    }
    return trained, kind(trained.values(), lr=0.1)


def step(trained, optimizer, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for p in trained.values():
        p.grad = torch.randn(p.shape, generator=generator)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def copies(trained):
    return {name: p.detach().clone() for name, p in trained.items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def rewrite_sums(folder):
    """Sums that fit, as another version of the program would have left them."""
    files = sorted(file for file in folder.iterdir() if file.name != checkpoint.SUMS)
    (folder / checkpoint.SUMS).write_text("".join(f"{checkpoint._sha256(f)}  {f.name}\n" for f in files))


# ---------------------------------------------------------------------------------------------------------------------
# What is saved comes back


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.SGD, Adafactor])
@pytest.mark.parametrize("steps", [0, 3])
def test_training_goes_on_as_if_nothing_had_been(kind, steps, tmp_path):
    """With steps 0 Adam has no state yet, and none must be made: its first step would count as the second."""
    trained, optimizer = make_trained(kind)
    for seed in range(steps):
        step(trained, optimizer, seed)
    checkpoint.save(tmp_path, make_state(steps), b"metrics", trained, optimizer)
    drawn = torch.rand(3), random.random()
    step(trained, optimizer, 9)
    again, optimizer_again = make_trained(kind, seed=5)
    state, metrics = checkpoint.load(checkpoint.last(tmp_path), again, optimizer_again)
    assert (state["progress"]["step"], metrics) == (steps, b"metrics")
    assert (torch.rand(3).tolist(), random.random()) == (drawn[0].tolist(), drawn[1])
    assert optimizer_again.param_groups[0]["lr"] == pytest.approx(0.1)
    step(again, optimizer_again, 9)
    assert same(copies(trained), copies(again))
    for name in trained:
        before, after = optimizer.state[trained[name]], optimizer_again.state[again[name]]
        assert same(before, after)


def test_the_count_of_skipped_updates_is_restored(tmp_path):
    trained, optimizer = make_trained()
    optimizer.skipped.fill_(7)
    checkpoint.save(tmp_path, make_state(1), b"", trained, optimizer)
    optimizer.skipped.zero_()
    checkpoint.load(checkpoint.last(tmp_path), trained, optimizer)
    assert optimizer.skipped == 7


def test_large_checkpoints_are_split(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FILE_BYTES", 100)
    trained, optimizer = make_trained()
    step(trained, optimizer)
    checkpoint.save(tmp_path, make_state(1), b"", trained, optimizer)
    folder = tmp_path / "checkpoint" / "step-1"
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert checkpoint.read_state(folder)["progress"]["step"] == 1
    again, optimizer_again = make_trained(seed=5)
    checkpoint.load(folder, again, optimizer_again)
    assert same(copies(trained), copies(again))


def test_the_sums_are_those_of_the_command_sha256sum(tmp_path, monkeypatch):
    """And made of the bytes on their way to the disk: no tensor is read again."""
    monkeypatch.setattr(checkpoint, "FILE_BYTES", 100)
    trained, optimizer = make_trained()
    read, plain = [], checkpoint._sha256
    monkeypatch.setattr(checkpoint, "_sha256", lambda path: (read.append(path.name), plain(path))[1])
    checkpoint.save(tmp_path, make_state(1), b"{}\n", trained, optimizer)
    assert read == ["state.json", "metrics.jsonl"]
    folder = tmp_path / "checkpoint" / "step-1"
    named = {line.split("  ")[1] for line in (folder / checkpoint.SUMS).read_text().splitlines()}
    assert named == {file.name for file in folder.iterdir()} - {checkpoint.SUMS}
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--check", "--strict", "--quiet", checkpoint.SUMS], cwd=folder, check=True)
    assert named == {
        name for name in named if checkpoint._sha256(folder / name) in (folder / checkpoint.SUMS).read_text()
    }


def test_saving_holds_copies_of_one_file_in_host_memory(tmp_path, monkeypatch):
    """With weights on another device, whose copies are counted as long as they live, and files' bytes."""
    live, peak = 0, 0

    def counted(size, owner):
        nonlocal live, peak
        live += size
        peak = max(peak, live)
        weakref.finalize(owner, release, size)
        return owner

    def release(size):
        nonlocal live
        live -= size

    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: counted(tensor.nbytes, tensor.clone()))
    monkeypatch.setattr(checkpoint, "FILE_BYTES", 10_000)
    tensors = {f"w{i}": torch.randn(300 + 100 * (i % 3)) for i in range(40)}
    sums = checkpoint._write_tensors(tmp_path, tensors)
    largest = max(t.nbytes for t in tensors.values())
    assert 9_000 < peak <= 10_000 + largest
    assert len(sums) == len(list(tmp_path.iterdir())) == 7
    assert max(file.stat().st_size for file in tmp_path.iterdir()) < 10_000 + largest + 3_000  # its header
    saved = {name: value for file in tmp_path.iterdir() for name, value in load_file(file).items()}
    assert same(saved, tensors)


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc/self/clear_refs")
def test_the_process_grows_by_two_copies_of_one_file(tmp_path, monkeypatch):
    """By its resident size: 160 MiB of tensors in files of 16 MiB."""

    def resident(which):
        return int(re.search(rf"{which}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 2**10

    monkeypatch.setattr(checkpoint, "FILE_BYTES", 2**24)
    tensors = {f"w{i}": torch.ones(2**20) for i in range(40)}
    checkpoint._write_tensors(tmp_path, {"w": torch.ones(2**22)})  # imports
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is taken now
    before = resident("VmRSS")
    checkpoint._write_tensors(tmp_path, tensors)
    grown = (resident("VmHWM") - before) / checkpoint.FILE_BYTES
    assert grown < 2.5, grown


def test_streamed_weights_are_not_copied_to_be_saved(tmp_path, monkeypatch):
    """torch's writer clones tensors that share a storage: at home each has its own."""
    made = make_run("llama", range(5))
    made.step(make_batch())
    written = made.weights()
    with made.stack.all_at_home():
        monkeypatch.setattr(torch.Tensor, "clone", lambda *_: pytest.fail("a weight was copied"))
        checkpoint._write_tensors(tmp_path, made.lm.trained)
        monkeypatch.undo()
    saved = {name: value for file in tmp_path.iterdir() for name, value in load_file(file).items()}
    names = [name for name, _ in made.lm.network.named_parameters()]
    assert saved.keys() == made.lm.trained.keys()
    assert all(torch.equal(saved[name], w) for name, w in zip(names, written, strict=True) if name in saved)


# ---------------------------------------------------------------------------------------------------------------------
# Whole at every instant


def killed_at(event, work):
    """Whether `work`, run in a process of its own, got to its end before its `event`-th file was opened, made, moved,
    removed or flushed, just before which it is killed.
    """
    pid = os.fork()
    if pid:
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert status in (0, -signal.SIGKILL)
        return status == 0
    try:
        count, plain = 0, os.fsync

        def audit(name, arguments):
            nonlocal count
            if name in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "fsync"):
                count += 1
                if count == event:
                    os.kill(os.getpid(), signal.SIGKILL)

        os.fsync = lambda descriptor: (audit("fsync", ()), plain(descriptor))
        sys.addaudithook(audit)
        work()
        os._exit(0)
    finally:
        os._exit(1)


def test_a_kill_at_any_point_of_a_save_leaves_a_whole_checkpoint(tmp_path, monkeypatch):
    """The old one or, from some point on, the new one; the next save comes to its end and leaves nothing else."""
    monkeypatch.setattr(checkpoint, "FILE_BYTES", 200)
    trained, optimizer = make_trained()
    checkpoint.save(tmp_path / "start", make_state(1), b"", trained, optimizer)
    truth = {1: copies(trained)}
    step(trained, optimizer)
    truth[2] = copies(trained)
    event, newest, done = 0, 1, False
    while not done:
        event += 1
        run_dir = tmp_path / str(event)
        shutil.copytree(tmp_path / "start", run_dir)
        done = killed_at(event, lambda d=run_dir: checkpoint.save(d, make_state(2), b"", trained, optimizer))
        found = checkpoint.last(run_dir)
        state = checkpoint.read_state(found)
        assert state["progress"]["step"] >= newest
        newest = state["progress"]["step"]
        again, optimizer_again = make_trained(seed=5)
        checkpoint.load(found, again, optimizer_again)
        assert same(copies(again), truth[newest])
        checkpoint.keep_only(found, run_dir)
        assert os.listdir(run_dir / "checkpoint") == [found.name]
        checkpoint.save(run_dir, make_state(3), b"", trained, optimizer)
        assert os.listdir(run_dir / "checkpoint") == ["step-3"]
    assert newest == 2
    assert event > 30  # seen: 50


def test_all_is_flushed_before_it_is_renamed(run, monkeypatch):
    """With all files in it; and an old checkpoint goes only when the names of the new one are on the disk too."""
    names, removed, flushed = [], [], set()
    fsync, rmtree, rename, replace = os.fsync, shutil.rmtree, Path.rename, Path.replace

    def flush(descriptor):
        flushed.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def move(path):
        assert {str(path), *(map(str, path.iterdir()) if path.is_dir() else ())} <= flushed
        names.append(path.name)
        flushed.clear()

    def remove(path, **how):
        if Path(path).name.startswith("step-"):
            assert {str(path.parent), str(path.parents[1])} <= flushed
            removed.append(path.name)
        rmtree(path, **how)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(Path, "rename", lambda a, b: (move(a), rename(a, b)))
    monkeypatch.setattr(Path, "replace", lambda a, b: (move(a), replace(a, b)))
    monkeypatch.setattr(shutil, "rmtree", remove)
    run("finetune_lowmem", "r", "--epochs", 1, "--save_every", 5)
    moved = "config.partial eval_epoch0.partial partial partial eval_epoch1.partial model.partial summary.partial"
    assert names == moved.split()
    assert removed == ["step-5"]


FAULTS = {
    "full while tensors are written": (checkpoint._HashedFile, "write", OSError(errno.ENOSPC, "No space left")),
    "over the quota while it is flushed": (os, "fsync", OSError(errno.EDQUOT, "Disk quota exceeded")),
    "a disk that fails": (checkpoint, "flush", OSError(errno.EIO, "Input/output error", "shard")),
    "interrupted": (checkpoint, "flush", Interrupted(2)),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_failed_save_leaves_the_old_checkpoint_and_no_half_one(case, tmp_path, monkeypatch):
    """It would take the room that is missing. The error is the system's own, and once there is room saving works."""
    owner, name, error = FAULTS[case]
    trained, optimizer = make_trained()
    checkpoint.save(tmp_path, make_state(1), b"", trained, optimizer)
    before = contents(tmp_path)

    def fail(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail)
        with pytest.raises(type(error)) as raised:
            checkpoint.save(tmp_path, make_state(2), b"", trained, optimizer)
    assert raised.value is error
    assert contents(tmp_path) == before
    assert os.listdir(tmp_path / "checkpoint") == ["step-1"]
    checkpoint.save(tmp_path, make_state(2), b"", trained, optimizer)
    assert os.listdir(tmp_path / "checkpoint") == ["step-2"]


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error", "shard"), Interrupted(2)])
def test_what_happens_while_a_checkpoint_is_read_is_raised_as_it_is(error, tmp_path, monkeypatch):
    """torch.distributed.checkpoint makes an error of its own of each, a signal's included."""
    trained, optimizer = make_trained()
    checkpoint.save(tmp_path, make_state(1), b"", trained, optimizer)

    def fail(*_):
        raise error

    monkeypatch.setattr(HuggingFaceStorageReader, "read_data", fail)
    with pytest.raises(type(error)) as raised:
        checkpoint.load(checkpoint.last(tmp_path), trained, optimizer)
    assert raised.value is error


def test_an_old_checkpoint_that_cannot_be_removed_ends_nothing(tmp_path, monkeypatch):
    """As on NFS, where what another process reads leaves a file behind. What comes next removes it."""
    plain, (trained, optimizer) = os.rmdir, make_trained()

    def rmdir(path, **how):
        if Path(path).name == "step-1":
            raise OSError(errno.ENOTEMPTY, "Directory not empty", path)
        plain(path, **how)

    checkpoint.save(tmp_path, make_state(1), b"", trained, optimizer)
    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", rmdir)
        checkpoint.save(tmp_path, make_state(2), b"", trained, optimizer)
    assert {f.name for f in (tmp_path / "checkpoint").iterdir()} == {"step-1", "step-2"}
    assert checkpoint.last(tmp_path).name == "step-2"
    checkpoint.save(tmp_path, make_state(10), b"", trained, optimizer)
    assert {f.name for f in (tmp_path / "checkpoint").iterdir()} == {"step-10"}


def test_nothing_but_checkpoints_is_removed(tmp_path):
    """checkpoint/ may be a link to a larger disk, where other things are."""
    elsewhere, run_dir = tmp_path / "elsewhere", tmp_path / "run"
    trained, optimizer = make_trained()
    checkpoint.save(run_dir, make_state(4), b"", trained, optimizer)
    shutil.move(run_dir / "checkpoint", elsewhere)
    (run_dir / "checkpoint").symlink_to(elsewhere)
    for name in ("step-4 of mine", "partial", "step-2"):
        (elsewhere / name).mkdir()
    for name in ("step-notes", "notes.txt", "step-7"):
        (elsewhere / name).write_text("mine")
    (elsewhere / "step-1").symlink_to(elsewhere / "step-4 of mine")
    assert checkpoint.last(run_dir).name == "step-4"
    checkpoint.keep_only(checkpoint.last(run_dir), run_dir)
    checkpoint.save(run_dir, make_state(6), b"", trained, optimizer)
    kept = {"step-4 of mine", "step-notes", "notes.txt", "step-7", "step-1", "step-6"}
    assert {f.name for f in elsewhere.iterdir()} == kept


def test_two_processes_do_not_work_on_one_run(tmp_path):
    run_dir = tmp_path / "r"
    run_dir.mkdir()
    with checkpoint.lock(run_dir), checkpoint.lock(run_dir):
        pass  # no run yet
    (run_dir / "metrics.jsonl").touch()
    refused = pytest.raises(UserError, match="r: let it end, or take another --run-name")
    with checkpoint.lock(run_dir), refused, checkpoint.lock(run_dir):
        pass
    with checkpoint.lock(run_dir):
        pass


def test_a_disk_that_is_too_small_is_refused(tmp_path, monkeypatch):
    """Adam's two states count, before they are there."""
    trained, optimizer = make_trained(torch.optim.Adam)
    weights, rest = 4 * (32 + 15 + 6), checkpoint.REST_BYTES
    assert checkpoint.bytes_needed(trained, optimizer) == 3 * weights + rest
    step(trained, optimizer)
    assert checkpoint.bytes_needed(trained, optimizer) == 3 * weights + 3 * 4 + rest
    assert checkpoint.bytes_needed(*make_trained(torch.optim.SGD)) == weights + rest
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**20 if path == tmp_path else 0))
    checkpoint.require_disk(tmp_path / "not" / "there", 2**20, "this")
    with pytest.raises(
        UserError, match=r"the disk is too full: this takes 1.0 MiB, and 1.0 are free for .*: make room"
    ):
        checkpoint.require_disk(tmp_path / "not" / "there", 2**20 + 1, "this")


# ---------------------------------------------------------------------------------------------------------------------
# Damaged checkpoints, other settings, other content


def step_folder(run_dir):
    return checkpoint.last(run_dir)


def tensors_of(run_dir):
    (file,) = step_folder(run_dir).glob("*.safetensors")
    return file


def rewritten(run_dir, **changes):
    """state.json with changes, and sums that fit it."""
    folder = step_folder(run_dir)
    change_json(folder / "state.json", **changes)
    rewrite_sums(folder)


def of_format_4(run_dir):
    """As the version before left it: files of weights, optimizer state and random states."""
    folder = step_folder(run_dir)
    tensors_of(run_dir).rename(folder / "weights-00000.safetensors")
    for name in ("optimizer", "random"):
        shutil.copy(folder / "weights-00000.safetensors", folder / f"{name}-00000.safetensors")
    rewritten(run_dir, format=4)


def args_of(run_dir):
    return json.loads((step_folder(run_dir) / "state.json").read_text())["args"]


DAMAGED = {
    "a flipped bit in the tensors": (lambda r: flip(tensors_of(r)), "is damaged, shard-.*safetensors is not as saved"),
    "a flipped bit in the header's length": (lambda r: flip(tensors_of(r), 0), "is damaged"),
    "a flipped bit in the header": (lambda r: flip(tensors_of(r), 0.01), "is damaged"),
    "a flipped bit in the last tensor": (lambda r: flip(tensors_of(r), 0.9999), "is damaged"),
    "a flipped bit in the state": (lambda r: flip(step_folder(r) / "state.json"), "is damaged, state.json is not"),
    "a flipped bit in the metrics": (lambda r: flip(step_folder(r) / "metrics.jsonl"), "is damaged, metrics.jsonl is"),
    "a flipped bit in the sums": (lambda r: flip(step_folder(r) / checkpoint.SUMS), "is damaged"),
    "tensors cut": (lambda r: cut(tensors_of(r)), "is damaged"),
    "tensors missing": (lambda r: tensors_of(r).unlink(), "is damaged, shard-.*safetensors is not as saved"),
    "tensors that are a pipe": (lambda r: [f := tensors_of(r), f.unlink(), os.mkfifo(f)], "is damaged, shard-.*safetensors is not as saved"),
    "state missing": (lambda r: (step_folder(r) / "state.json").unlink(), "is damaged"),
    "sums missing": (lambda r: (step_folder(r) / checkpoint.SUMS).unlink(), "is damaged"),
    "sums of text": (lambda r: (step_folder(r) / checkpoint.SUMS).write_text("text\n"), "is damaged"),
    "state empty": (lambda r: (step_folder(r) / "state.json").write_text(""), "is damaged"),
    "an empty folder": (lambda r: [f.unlink() for f in step_folder(r).iterdir()], "is damaged"),
    "a file too many": (lambda r: (step_folder(r) / "more.safetensors").write_bytes(b"x"), "is damaged, more.safetensors is not as saved"),
    "two files swapped": (lambda r: [(step_folder(r) / "state.json").write_bytes((step_folder(r) / "metrics.jsonl").read_bytes()), (step_folder(r) / "metrics.jsonl").write_text("")], "is damaged, metrics.jsonl, state.json are not as saved"),
    "a later version's": (lambda r: rewritten(r, format=99), f"has format 99 where this version reads {checkpoint.FORMAT}: go on with the version that wrote it"),
    "the version's before": (of_format_4, f"has format 4 where this version reads {checkpoint.FORMAT}: go on with the version that wrote it"),
    "a state without its parts": (lambda r: rewritten(r, progress={}), "is damaged"),
    "a state that is a list": (lambda r: [(step_folder(r) / "state.json").write_text("[1]"), rewrite_sums(step_folder(r))], "is damaged"),
    "another script's": (lambda r: rewritten(r, args=args_of(r) | {"script": "other"}), "was started with other.py: go on with that"),
    "fewer epochs than done": (lambda r: rewritten(r, progress={"epoch": 4}), "is in epoch 4 already: --epochs must be at least that"),
    "no checkpoint of a finished run": (lambda r: shutil.rmtree(r / "checkpoint"), "has no checkpoint and is not a run that ended before its first one"),
    "a model folder": (lambda r: [shutil.rmtree(r / "checkpoint"), (r / "summary.json").unlink(), (r / "config.json").write_text('{"model_type": "llama"}')], "has no checkpoint and is not a run"),
    "no checkpoint, other settings": (lambda r: [shutil.rmtree(r / "checkpoint"), (r / "summary.json").unlink(), change_json(r / "config.json", seed=7)], "was started with other settings: --seed 7 is now 42"),
}  # fmt: skip

NAMES = {"finetune_lowmem": "lowmem", "finetune_base": "base"}


@pytest.fixture(scope="module")
def sound(tmp_path_factory, model_folder, dataset_folder):
    """(folder with a run of each script that stopped after a step, {script: its flags without name and folder})."""
    folder, flags = tmp_path_factory.mktemp("sound"), {}
    for script, name in NAMES.items():
        flags[script] = ["--model", str(model_folder()), "--dataset", str(dataset_folder), "--schedule", "constant"]
        flags[script] += ["--eval_rows", "2", "--no_save_model"]
        argv = ["--run-name", name, "--output_dir", str(folder), *flags[script], "--max_steps", "1"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: False)
            SCRIPTS[script].main(argv)
    return folder, flags


@pytest.fixture
def resume(sound, tmp_path):
    """resume(script, *flags): what the script does first of all, on a copy of the sound runs in tmp_path."""
    folder, own = sound
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)

    def parse(script, *flags):
        argv = ["--run-name", NAMES[script], "--output_dir", str(tmp_path), *own[script], "--resume", *map(str, flags)]
        return SCRIPTS[script].parse(argv)

    return parse


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_checkpoints_are_refused(name, resume, tmp_path):
    damage, message = DAMAGED[name]
    damage(tmp_path / "lowmem")
    before = contents(tmp_path)
    with pytest.raises(UserError, match=message):
        resume("finetune_lowmem")
    assert contents(tmp_path) == before


@pytest.mark.slow
@pytest.mark.parametrize("script", NAMES)
def test_damage_ends_a_command_in_one_line(script, resume, sound, commands, tmp_path):
    flags = ["--run-name", NAMES[script], "--output_dir", tmp_path, *sound[1][script], "--resume"]
    flip(tensors_of(tmp_path / NAMES[script]))
    before = contents(tmp_path)
    assert "is damaged, shard-00001-model-00001-of-00001.safetensors is not as saved" in refused(
        commands, script, *flags
    )
    shutil.rmtree(tmp_path / NAMES[script] / "checkpoint")
    (tmp_path / NAMES[script] / "checkpoint").symlink_to(tmp_path / "nowhere")
    assert "No such file or directory: " in refused(commands, script, *flags)
    before = {
        path: content for path, content in before.items() if "checkpoint/" not in path or NAMES[script] not in path
    }
    assert contents(tmp_path) == before


def test_a_checkpoint_that_must_not_be_read_is_no_damage(resume, tmp_path, monkeypatch):
    closed = tensors_of(tmp_path / "lowmem")

    def denied(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(checkpoint, "_sha256", denied)
    with pytest.raises(PermissionError):
        resume("finetune_lowmem")
    assert closed.exists()


def test_a_file_system_s_own_files_in_a_checkpoint_do_no_harm(resume, tmp_path):
    folder = step_folder(tmp_path / "lowmem")
    (folder / ".nfs0001").touch()
    (folder / "@eaDir").mkdir()
    resume("finetune_lowmem")
    made = make_trained()
    checkpoint.save(tmp_path / "other", make_state(1), b"", *made)
    for name in (".nfs0001", "@eaDir"):
        (tmp_path / "other" / "checkpoint" / "step-1" / name).mkdir()
    checkpoint.load(checkpoint.last(tmp_path / "other"), *made)


def test_a_checkpoint_that_lacks_a_tensor_is_refused(tmp_path):
    """Of weights or of the optimizer's state: what was not saved would stay what it is by chance."""
    trained, optimizer = make_trained(torch.optim.Adam)
    step(trained, optimizer)
    del optimizer.state[trained["b"]]["exp_avg"]
    fewer = {name: p for name, p in trained.items() if name != "a"}
    checkpoint.save(tmp_path, make_state(1), b"", fewer, optimizer)
    again, optimizer_again = make_trained(torch.optim.Adam, seed=5)
    before = copies(again)
    said = r"step-1 lacks a, a/exp_avg, a/exp_avg_sq, a/step, b/exp_avg: start again"
    with pytest.raises(UserError, match=said):
        checkpoint.load(checkpoint.last(tmp_path), again, optimizer_again)
    assert same(copies(again), before)


OTHER_SETTINGS = [
    ("--model", "elsewhere"), ("--dataset", "elsewhere"), ("--train_rows", 50), ("--eval_rows", 9), ("--train_text", "raw"), ("--trained", "all"),
    ("--batch_size", 5), ("--lr", "0.5"), ("--seed", 7), ("--schedule", "cosine"), ("--warmup_steps", 3),
    ("--train_on", "all"), ("--max_length", 9),
]  # fmt: skip
OWN_SETTINGS = {
    "finetune_lowmem": [("--nostround",), ("--cross_entropy", "cut")],
    "finetune_base": [("--optimizer", "SGD")],
}


def test_resume_with_other_settings_is_refused_by_name(resume):
    """Each by itself, and several at once; the others may change."""
    for script, own in OWN_SETTINGS.items():
        for flag, *value in OTHER_SETTINGS + own:
            said = f"other settings: {flag} [^;]+ is now {value[0] if value else True}: give those it was started with"
            with pytest.raises(UserError, match=said):
                resume(script, flag, *value)
        fixed = vars(resume(script)).keys() - checkpoint.SETTINGS_FREE_TO_CHANGE - {"script", "demo", "date"}
        assert {f"--{name}" for name in fixed} == {flag for flag, *_ in OTHER_SETTINGS + own}
    with pytest.raises(UserError, match=r"--batch_size 8 is now 4; --seed 42 is now 7"):
        resume("finetune_lowmem", "--batch_size", 4, "--seed", 7)
    args = resume("finetune_lowmem", "--epochs", 9, "--max_steps", 5, "--save_every", 3, "--no_compile")
    assert (args.epochs, args.max_steps, args.save_every, args.no_compile) == (9, 5, 3, True)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_run_whose_rate_falls_must_keep_its_length(schedule, resume, tmp_path):
    rewritten(tmp_path / "lowmem", args=args_of(tmp_path / "lowmem") | {"schedule": schedule})
    (tmp_path / "lowmem" / "summary.json").unlink()  # or the run is finished
    assert resume("finetune_lowmem", "--schedule", schedule, "--max_steps", 1).max_steps == 1
    for flag, value in (("--epochs", 9), ("--max_steps", 20)):
        said = rf"other settings: .*{flag} \S+ is now {value} .*{schedule} ends with the run: .* --model .*lowmem/model"
        with pytest.raises(UserError, match=said):
            resume("finetune_lowmem", "--schedule", schedule, "--max_steps", 1, flag, value)


OTHER_CONTENT = {
    "labels": ("dataset", lambda d: write_jsonl(d / "validation.jsonl", [r | {"label": str((int(r["label"]) + 1) % 4)} for r in map(json.loads, (d / "validation.jsonl").read_text().splitlines())])),
    "a training row": ("dataset", lambda d: write_jsonl(d / "train.jsonl", many_rows(60, seed=9))),
    "heads": ("model", lambda m: change_json(m / "config.json", num_attention_heads=8, num_key_value_heads=4, head_dim=4)),
    "the activation function": ("model", lambda m: change_json(m / "config.json", hidden_act="relu")),
    "the order of frozen rows": ("model", lambda m: change_weights(m, lambda w: w.update({"model.embed_tokens.weight": w["model.embed_tokens.weight"].flip(0).contiguous()}))),
    "the order of frozen columns": ("model", lambda m: change_weights(m, lambda w: w.update({"lm_head.weight": w["lm_head.weight"].flip(1).contiguous()}))),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER_CONTENT)
def test_other_content_behind_the_same_name_is_refused(name, resume, tmp_path):
    args = resume("finetune_lowmem")
    for part in ("model", "dataset"):
        shutil.copytree(getattr(args, part), tmp_path / part)
        setattr(args, part, str(tmp_path / part))

    def found():
        data = common.load_hellaswag(args, *tokenizing.load(args.model))
        lm = models.load(args.model, torch.bfloat16, "layers", SCRIPTS["finetune_lowmem"].precision)
        return checkpoint.fingerprints(lm, data)

    folder = step_folder(tmp_path / "lowmem")
    checkpoint.require_same_inputs(args, folder, found(), Lines.NAME)
    with pytest.raises(UserError, match="was started with rows end to end in one line, and this would be padded rows"):
        checkpoint.require_same_inputs(args, folder, found(), PaddedRows.NAME)
    kind, change = OTHER_CONTENT[name]
    change(tmp_path / kind)
    with pytest.raises(UserError, match=f"--{kind} {tmp_path / kind} no longer holds what .*lowmem was started with"):
        checkpoint.require_same_inputs(args, folder, found(), Lines.NAME)


def test_all_of_the_frozen_weights_is_looked_at(monkeypatch):
    """Piece by piece, whatever their size and type."""
    monkeypatch.setattr(checkpoint, "HASHED_BYTES", 1000)
    data = SimpleNamespace(content=lambda: [])
    for dtype in (torch.float32, torch.bfloat16):
        lm, found = as_lm(make_model().to(dtype)), set()
        for name, p in lm.network.named_parameters():
            for at in (0, p.numel() // 2, p.numel() - 1) if name not in lm.trained else ():
                before = p.view(-1)[at].clone()
                p.data.view(-1)[at] += 1
                found.add(checkpoint.fingerprints(lm, data)["model"])
                p.data.view(-1)[at] = before
        assert len(found) == 3 * 3
        assert checkpoint.fingerprints(lm, data)["model"] not in found


# ---------------------------------------------------------------------------------------------------------------------
# In commands


def before_each_point(condition, code):
    """Code for `first` that runs `code` before TensorBoard's thread writes a point, if `condition` holds of the count."""
    return (
        "from tensorboard.summary.writer.record_writer import RecordWriter\n"
        "count, writes = [], RecordWriter.write\n"
        "def write(self, data):\n"
        "    count.append(1)\n"
        f"    if {condition}:\n"
        f"        {code}\n"
        "    writes(self, data)\n"
        "RecordWriter.write = write\n"
    )


@pytest.mark.slow
@pytest.mark.parametrize(("script", "times"), [("finetune_base", 5), ("finetune_lowmem", 20)], ids=["base", "lowmem"])
def test_a_run_killed_at_random_moments_loses_nothing(script, times, argv, commands, tmp_path):
    """Half of the kills while a checkpoint is being written. After each there is a whole checkpoint, as new as any that
    was seen, and the run goes on from it; at its end weights, metrics and scores are those of an uninterrupted one.
    """
    seed, flags, folder = random.randrange(10**6), ["--epochs", 10**6, "--save_every", 1], tmp_path / "parts"
    rng, newest, while_saving, kills, patience = random.Random(seed), None, 0, 0, 1.0
    print("seed", seed)
    saving = lambda: (folder / "checkpoint" / "partial").exists()  # noqa: E731
    lag = before_each_point("True", "__import__('time').sleep(0.01)")  # as on a busy disk
    while kills < times or not while_saving:
        command = commands.start(script, *argv("parts", *flags, *["--resume"] * folder.exists()), first=lag)
        if kills % 2 and wait_until(saving, command):
            time.sleep(rng.uniform(0, rng.choice([0.001, 0.005])))
        else:
            time.sleep(patience * rng.uniform(0.05, 0.8))
        command.send(signal.SIGKILL)
        code, out, err = command.wait()
        assert code == -signal.SIGKILL, err
        kills += 1
        if "resuming after" in out:
            assert f"resuming after step {newest}\n" in out
        while_saving += saving()
        found = checkpoint.last(folder)
        if found:
            state = checkpoint.read_state(found)
            assert state["progress"]["step"] >= (newest or 0)
            patience = 1.0 if state["progress"]["step"] != newest else min(30.0, 1.5 * patience)  # on a slow machine
            newest = state["progress"]["step"]
            assert len(list((folder / "checkpoint").iterdir())) <= 2
        else:
            assert newest is None
            patience = min(30.0, 1.5 * patience)
    flags = ["--epochs", 10**6, "--max_steps", newest + 20]
    code, out, _ = commands.run(script, *argv("parts", *flags, "--resume"))
    assert code == 0
    assert f"resuming after step {newest}\n" in out
    assert commands.run(script, *argv("whole", *flags))[0] == 0
    assert_same_run(tmp_path / "whole", folder)
    board = EventMultiplexer().AddRunsFromDirectory(str(tmp_path)).Reload()
    for tag in ("train/train_loss", "eval/acc"):
        points = [[(p.step, p.value) for p in board.Scalars(name, tag)] for name in ("parts", "whole")]
        assert points[0] == points[1]
    print(f"{kills} kills survived, {while_saving} of them while saving, {newest} steps")


@pytest.mark.slow
def test_a_second_command_touches_nothing_of_the_first(argv, commands, tmp_path):
    """It finds out before it removes what the first one is saving."""
    waits = "from lowmem.training import checkpoint; import time; plain = checkpoint._write_tensors\n"
    waits += (
        "def slow(*a):\n    sums = plain(*a)\n    print('saving', flush=True)\n    time.sleep(1)\n    return sums\n"
    )
    waits += "checkpoint._write_tensors = slow"
    command = commands.start("finetune_lowmem", *argv("r", "--epochs", 1), first=waits)
    assert wait_until(lambda: "saving" in command.out.read_text(), command)
    code, out, err = commands.run("finetune_lowmem", *argv("r", "--epochs", 1, "--resume"))
    assert (code, out) == (2, "")
    assert "r: let it end, or take another --run-name" in last_line(err)
    assert command.wait()[0] == 0
    assert commands.run("finetune_lowmem", *argv("whole", "--epochs", 1))[0] == 0
    assert_same_run(tmp_path / "whole", tmp_path / "r")


@pytest.mark.slow
def test_a_full_disk_ends_in_one_line(argv, commands, tmp_path):
    """For real: no file may grow beyond 20 kB from step 12 on. Once there is room the run goes on to the same end."""
    fault = "import resource\n"
    fault += after_each_step(
        "step == 12 and resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))"
    )
    flags = ["--epochs", 2, "--save_every", 5]
    code, _, err = commands.run("finetune_lowmem", *argv("parts", *flags), first=fault)
    said = "error: the disk is full: make room; the same command with --resume goes on from step 10"
    assert (code, last_line(err)) == (2, said)
    assert os.listdir(tmp_path / "parts" / "checkpoint") == ["step-10"]
    for name, more in (("parts", ["--resume"]), ("whole", [])):
        assert commands.run("finetune_lowmem", *argv(name, *flags, *more))[0] == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
def test_a_disk_full_for_tensorboard_alone_ends_the_run_too(argv, commands):
    fault = before_each_point("len(count) > 70", "raise OSError(28, 'No space left on device')")
    code, _, err = commands.run("finetune_lowmem", *argv("r", "--epochs", 2, "--save_every", 4), first=fault)
    assert code == 2
    last = err.strip().splitlines()[-1]
    assert re.match("error: the disk is full: make room; the same command with --resume goes on from ", last)


@pytest.mark.slow
@pytest.mark.parametrize("script", NAMES)
def test_a_resumed_run_lets_go_of_the_checkpoint_that_it_came_from(script, argv, commands):
    """safetensors maps the file into memory: removed, it would still take its room on the disk."""
    held = "step == 5 and print('HELD', [x for x in open('/proc/self/maps') if 'safetensors (deleted)' in x])"
    assert commands.run(script, *argv("r", "--epochs", 1, "--max_steps", 2))[0] == 0
    more = ["--epochs", 1, "--save_every", 3, "--max_steps", 6, "--resume"]
    assert "HELD []" in commands.run(script, *argv("r", *more), first=after_each_step(held))[1]


@pytest.mark.slow
@pytest.mark.parametrize("script", NAMES)
def test_a_whole_run_and_its_resumption_load_no_pickle(script, argv, commands):
    """Python tells its auditors of each class or function that a pickle asks for."""
    watch = "import os, sys, traceback\n"
    watch += "def audit(event, arguments):\n"
    watch += "    if event == 'pickle.find_class':\n"
    watch += "        traceback.print_stack(); os._exit(99)\n"
    watch += "sys.addaudithook(audit)\n"
    for more in (["--max_steps", 3], ["--resume"]):
        code, _, err = commands.run(script, *argv("x", "--epochs", 1, *more), first=watch)
        assert code == 0, err
    caught = commands.run(script, "--help", first=watch + "import pickle; pickle.loads(b'cos\\nsystem\\n.')")[0]
    assert caught == 99
