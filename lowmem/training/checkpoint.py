"""A run's state on the disk: <run>/checkpoint/step-<n>/, complete as soon as it has that name."""

import fcntl
import functools
import hashlib
import io
import json
import os
import random
import re
import shutil
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from lowmem.training import memory, parallel, source
from lowmem.training.data import Data
from lowmem.training.errors import UserError
from lowmem.training.models import CausalLM

REST_BYTES = 2**20  # beside tensors and metrics: names, sums, what the file system needs
FORMAT = 8  # of a checkpoint; one of another format is refused
FILE_BYTES = 2**27  # of a checkpoint's file; two copies of it, from a GPU three, are in host memory while it is written
HASHED_BYTES = 2**25  # in host memory at a time, of files and weights that are hashed
SUMS = "SHA256SUMS"  # as the command sha256sum writes and checks
SETTINGS_FREE_TO_CHANGE = {
    "run_name", "output_dir", "resume", "epochs", "max_steps", "log_every", "save_every", "no_save_model", "no_compile",
    "memory_budget", "dry_run",
}  # fmt: skip


def last(run_dir: Path) -> Path | None:
    """The newest complete checkpoint folder of a run, or None."""
    folder = run_dir / "checkpoint"
    if not os.path.lexists(folder):
        return None
    # raises OSError where there may be one that cannot be seen: not readable, or a link to a disk that is not there
    found = [f for f in folder.iterdir() if re.fullmatch("step-[0-9]+", f.name) and f.is_dir()]
    return max(found, key=step_of, default=None)


def step_of(folder: Path) -> int:
    """The step after which a checkpoint was made."""
    return int(folder.name.removeprefix("step-"))


def keep_only(checkpoint: Path | None, run_dir: Path) -> None:
    """Remove all other checkpoints, whole or not, from a run's checkpoint folder, and nothing else."""
    for other in (run_dir / "checkpoint").glob("*"):
        named_so = re.fullmatch(r"step-[0-9]+|partial", other.name)
        if named_so and other != checkpoint and other.is_dir() and not other.is_symlink():
            shutil.rmtree(other, ignore_errors=True)  # NFS keeps what another process reads; the next save comes back


@contextmanager
def lock(run_dir: Path) -> Iterator[None]:
    """In this context no other process works on the run, if it has a metrics.jsonl. Raises UserError if one does."""
    if not (run_dir / "metrics.jsonl").is_file():
        yield
        return
    with open(run_dir / "metrics.jsonl", "r+") as file:  # to be written, or NFS has no exclusive lock for it
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"another process is at work on {run_dir}: let it end, or take another --run-name"
            ) from error
        except OSError:
            pass  # a file system without locks
        yield


def check_resume(args, run_dir: Path) -> None:
    """Refuse to go on with a folder that is no run, a checkpoint that is damaged or of another format, or settings that
    change what is trained. Raises UserError.
    """
    if is_finished(args, run_dir):
        saved = source.read_json(run_dir / "summary.json")["args"]
    elif folder := last(run_dir):
        state = read_state(folder)
        saved, epoch = state["args"], state["progress"]["epoch"]
        if args.epochs < epoch:
            raise UserError(f"--resume: {run_dir} is in epoch {epoch} already: --epochs must be at least that")
    else:
        saved = _settings_at_start(run_dir) or vars(args)
    if saved.get("script") != args.script:
        raise UserError(f"--resume: {run_dir} was started with {saved.get('script')}.py: go on with that")
    falls = saved.get("schedule", "constant") != "constant"  # to 0 at the run's end, which then stays where it is
    free = SETTINGS_FREE_TO_CHANGE - ({"epochs", "max_steps"} if falls else set())
    differing = [
        f"--{k} {saved.get(k)} is now {v}" for k, v in vars(args).items() if k not in free and saved.get(k) != v
    ]
    if differing:
        why = ""
        if falls and any(setting.startswith(("--epochs", "--max_steps")) for setting in differing):
            new = f"keep its length, or train on in a new run with --model {run_dir / 'model'} once that is finished"
            why = f" (--schedule {saved['schedule']} ends with the run: {new})"
        raise UserError(
            f"--resume: {run_dir} was started with other settings: {'; '.join(differing)}{why}: give those it was "
            "started with, or take another --run-name"
        )


def is_finished(args, run_dir: Path) -> bool:
    """Whether the run has left the summary of its last start, which was as long, and its model if that is saved."""
    try:
        done, begun = (source.read_json(run_dir / f"{name}.json") for name in ("summary", "config"))
        same = all(done["args"][name] == getattr(args, name) for name in ("epochs", "max_steps", "no_save_model"))
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return same and done["args"] == begun and (args.no_save_model or (run_dir / "model").is_dir())


def _settings_at_start(run_dir):
    """The arguments of a run without a checkpoint, which had none yet or only evaluates; None of an empty folder.

    Raises UserError.
    """
    names = {f.name for f in run_dir.iterdir()} - {"config.partial", "metrics.jsonl"}  # which come before config.json
    try:
        saved = source.read_json(run_dir / "config.json")
    except (OSError, ValueError):
        saved = None
    ours = isinstance(saved, dict) and {"script", "run_name"} <= saved.keys()
    if names and not ours or "summary.json" in names and saved.get("epochs"):
        raise UserError(
            f"--resume: {run_dir} has no checkpoint and is not a run that ended before its first one: take another "
            "--run-name"
        )
    return saved if ours else None


def read_state(folder: Path) -> dict:
    """state.json of a checkpoint whose files are all as they were saved. Raises UserError."""

    def damaged(what):
        return UserError(
            f"--resume: {folder} is damaged, {what} not as saved: mend that, or start again with another --run-name"
        )

    try:
        found = {file.name: _sha256(file) for file in folder.iterdir() if file.is_file() and file.name[0] != "."}
        found.pop(SUMS, None)
        lines = [line.split("  ", 1) for line in (folder / SUMS).read_text().splitlines()]
        differing = sorted({name for name, _ in found.items() ^ {(name, sha256) for sha256, name in lines}})
        if differing:
            raise damaged(f"{', '.join(differing)[:200]} {'is' if len(differing) == 1 else 'are'}")
        state = source.read_json(folder / "state.json")
        if state["format"] != FORMAT:
            raise UserError(
                f"--resume: {folder} has format {state['format']} where this version reads {FORMAT}: go on with the "
                "version that wrote it, or start again with another --run-name"
            )
        _ = state["args"]["script"], state["progress"]["epoch"], state["fingerprints"]["model"]
    except PermissionError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise damaged("its files are") from error
    return state


def require_same_inputs(args, folder: Path, found: dict[str, str], layout: str) -> None:
    """Refuse to go on from a checkpoint with a model or data set whose `fingerprints` are not `found`, or another
    `Layout.NAME`, which deals an epoch's rows otherwise. Raises UserError.
    """
    state = source.read_json(folder / "state.json")
    if state["layout"] != layout:
        raise UserError(
            f"--resume: {folder.parents[1]} was started with {state['layout']}, and this would be {layout}: go on with "
            "the same versions of PyTorch and transformers, or start again with another --run-name"
        )
    before = state["fingerprints"]
    if changed := [f"--{name} {getattr(args, name)}" for name in before if before[name] != found[name]]:
        raise UserError(
            f"--resume: {' and '.join(changed)} no longer holds what {folder.parents[1]} was started with: put that "
            "back, or start again with another --run-name"
        )


def fingerprints(lm: CausalLM, data: Data) -> dict[str, str]:
    """{"model": ..., "dataset": ...}: what a resumed run must find again behind the same names, as short texts.

    Of the model its configuration, names, shapes, and the weights that no checkpoint holds; of the data its `content`.
    """
    model_hash, data_hash = hashlib.sha256(), hashlib.sha256()
    config = lm.network.config.to_diff_dict()
    config = {k: v for k, v in config.items() if k not in ("transformers_version", "_name_or_path")}
    model_hash.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, p in lm.network.named_parameters():
        model_hash.update(repr((name, tuple(p.shape))).encode())
        if name not in lm.trained:
            for block in p.detach().flatten().view(torch.uint8).split(HASHED_BYTES):
                model_hash.update(block.cpu().numpy())
    for content in data.content():
        data_hash.update(content)
    return {"model": model_hash.hexdigest()[:16], "dataset": data_hash.hexdigest()[:16]}


def existing(path: Path) -> Path:
    """The path, links followed, or the nearest folder above it that is there."""
    path = path.resolve()
    return next(p for p in [path, *path.parents] if p.exists())


def require_disk(folder: Path, size: int, what: str) -> None:
    """Raise UserError if `size` bytes for `what` do not fit on the disk of `folder`, which need not be there yet."""
    folder = existing(folder)
    free = shutil.disk_usage(folder).free
    if size > free:
        raise UserError(
            f"the disk is too full: {what} takes {size / 2**20:,.1f} MiB, and {free / 2**20:,.1f} are free for "
            f"{folder}: make room"
        )


def wait_for_folder(folder: Path, seconds: float = 60) -> None:
    """Raise UserError unless this rank sees the folder that rank 0 has made; NFS may show it after up to a minute."""
    end = time.monotonic() + seconds
    while not folder.is_dir():
        if time.monotonic() > end:
            raise UserError(
                f"{folder} is not on this machine: choose an --output_dir on a file system that all machines share, "
                "since each writes its part of a checkpoint there"
            )
        time.sleep(0.1)


def bytes_needed(trained: dict, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of a checkpoint."""
    weights = memory.size_in_bytes(trained.values())
    state = memory.size_in_bytes(x for tensors in optimizer.state.values() for x in tensors.values())
    if isinstance(optimizer, torch.optim.Adam) and not state:  # made in the first step
        state = 2 * weights
    return weights + state + REST_BYTES


def save(run_dir: Path, state: dict, metrics: bytes, trained: dict, optimizer: torch.optim.Optimizer) -> None:
    """Write weights, optimizer state, random states, metrics and `state` beside the old checkpoint, then remove that.

    At every instant one is whole and on the disk. Each rank writes what it holds.
    """
    final = run_dir / "checkpoint" / f"step-{state['progress']['step']}"
    partial = final.with_name("partial")
    try:
        partial.mkdir(parents=True, exist_ok=parallel.world_size() > 1)
        sums = _write_tensors(partial, trained | _optimizer_state(trained, optimizer) | _random_states())
        if parallel.rank() == 0:
            state = {"format": FORMAT, **state, "python_random": random.getstate()}
            (partial / "state.json").write_text(json.dumps(state))
            (partial / "metrics.jsonl").write_bytes(metrics)
            sums |= {name: _sha256(partial / name) for name in ("state.json", "metrics.jsonl")}
            (partial / SUMS).write_text("".join(f"{sha256}  {name}\n" for name, sha256 in sorted(sums.items())))
            flush_all(partial)
            partial.rename(final)
    except BaseException:
        if parallel.rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)  # the room may be all that is missing
        raise
    if parallel.rank() == 0:
        flush(final.parent)
        flush(run_dir)
        keep_only(final, run_dir)
    parallel.wait_for_all()


def _write_tensors(folder, named):
    """{file: sha256} of the safetensors files that all ranks write: what each holds, and where that belongs."""
    from torch.distributed.checkpoint import DefaultSavePlanner, HuggingFaceStorageWriter
    from torch.distributed.checkpoint import save as save_distributed

    file_of, size = {}, 0
    for name, tensor in named.items():
        file_of[name] = 1 + size // FILE_BYTES
        size += memory.size_in_bytes([tensor]) // parallel.world_size()
    writer = HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=file_of, save_distributed=True)
    files = {}
    writer.fs.create_stream = functools.partial(_HashedFile, files)
    with _first_failure(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that one process is taken for all, and so it is
        save_distributed(
            {name: tensor.detach() for name, tensor in named.items()},
            storage_writer=writer,
            planner=DefaultSavePlanner(dedup_save_to_lowest_rank=True),  # what all hold alike, rank 0 writes
            no_dist=parallel.world_size() == 1,
        )
    own = {name: file.sha256.hexdigest() for name, file in files.items()}
    return {name: sha256 for sums in parallel.gather_objects(own) for name, sha256 in sums.items()}


class _HashedFile(io.BufferedWriter):
    """A file whose bytes are hashed on their way; it puts itself into `files`, {its name: itself}."""

    def __init__(self, files, path, mode):
        super().__init__(io.FileIO(path, mode))
        self.sha256 = hashlib.sha256()
        files[Path(path).name] = self

    def write(self, data):
        self.sha256.update(data)
        return super().write(data)


def load(folder: Path, trained: dict, optimizer: torch.optim.Optimizer) -> tuple[dict, bytes]:
    """(state, metrics) that `save` wrote, on whatever number of ranks; restores all tensors and random states in place.

    All is copied to where it is, which for the state of a streamed parameter is not where that is now; each rank reads
    what it holds.
    """
    from torch.distributed.checkpoint import HuggingFaceStorageReader
    from torch.distributed.checkpoint import load as load_distributed

    reader = HuggingFaceStorageReader(str(folder))
    saved = reader.read_metadata().state_dict_metadata
    if any("/" in name for name in saved) and not optimizer.state:  # else it was saved before the first step
        for p in trained.values():  # torch's optimizers make it in a step; what this one moves is read below
            p.grad = torch.zeros_like(p)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    found = trained | _optimizer_state(trained, optimizer) | _random_states()
    if "cuda" not in saved:  # it was saved on a CPU
        found.pop("cuda", None)
    if missing := found.keys() - saved.keys():
        raise UserError(f"--resume: {folder} lacks {', '.join(sorted(missing))[:200]}: start again")
    found = {name: tensor.detach() for name, tensor in found.items()}
    with _first_failure(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as above
        load_distributed(found, storage_reader=reader, no_dist=parallel.world_size() == 1)
    torch.set_rng_state(found["torch"])
    if "cuda" in found:
        torch.cuda.set_rng_state(found["cuda"])
    state = source.read_json(folder / "state.json")
    if parallel.rank():  # what is saved is rank 0's
        torch.manual_seed(hash((state["args"]["seed"], state["progress"]["step"], parallel.rank())))
    kind, numbers, rest = state["python_random"]
    random.setstate((kind, tuple(numbers), rest))
    return state, (folder / "metrics.jsonl").read_bytes()


def _optimizer_state(trained, optimizer):
    """{name/key: tensor} of the optimizer's state; what has a number for each row of a tensor has the shape of its rows
    and, if that is sharded, its shards.
    """
    found = {"skipped": optimizer.skipped} if hasattr(optimizer, "skipped") else {}
    for name, p in trained.items():
        for key, value in optimizer.state.get(p, {}).items():
            found[f"{name}/{key}"] = _of_rows(p, value) if key in getattr(optimizer, "NUMBER_A_ROW", ()) else value
    return found


def _of_rows(p, value):
    """`value`, a number for each row of p [..., columns], or of a vector p, that this rank has, as [...], sharded."""
    shape = p.shape[:-1] if p.ndim > 1 else p.shape
    value = value.view(parallel.own_rows(p).shape[: len(shape)])
    if not parallel.is_sharded(p):
        return value
    from torch.distributed.tensor import DTensor

    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(value, p.device_mesh, p.placements, run_check=False, shape=shape, stride=stride)


def _random_states():
    states = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


@contextmanager
def _first_failure():
    """Raise the first rank's error where torch.distributed.checkpoint makes one, no Exception, of all ranks'."""
    from torch.distributed.checkpoint import CheckpointException

    try:
        yield
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from error


def _sha256(path):
    sha256 = hashlib.sha256()
    with open(path, "rb") as content:
        while block := content.read(HASHED_BYTES):
            sha256.update(block)
    return sha256.hexdigest()


def flush_all(folder: Path) -> None:
    """Wait until a folder's files and their names are on the disk."""
    for path in [*folder.iterdir(), folder]:
        flush(path)


def flush(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
