"""What a run writes and prints: metrics.jsonl, TensorBoard, whole files, the first lines and the closing table."""

import json
import platform
from importlib.metadata import version
from pathlib import Path

import torch

from lowmem.training import memory, parallel
from lowmem.training.checkpoint import flush


def say(what: str, text: object) -> None:
    """Print a line of the table that a run begins with."""
    print(f"  {what:<14}{text}")


class Records:
    """The records in a run's folder: whole files, metrics.jsonl, and TensorBoard's events. Only rank 0 has any."""

    def __init__(self, folder: Path):
        self.folder, self.written = folder, parallel.rank() == 0
        self.metrics = self.board = None

    def open(self, metrics: str, step: int | None) -> None:
        """Open metrics.jsonl, with the text `metrics`, and TensorBoard's events as they were after `step`.

        step: of the checkpoint from which the run goes on, None if it starts.
        """
        if not self.written:
            return
        from torch.utils.tensorboard import SummaryWriter

        self.metrics = open(self.folder / "metrics.jsonl", "r+")  # noqa: SIM115 (closed by `close`)
        self.metrics.truncate(0)
        self.metrics.write(metrics)
        self.metrics.flush()
        self.board = SummaryWriter(str(self.folder), purge_step=step)
        for line in metrics.splitlines():  # purging takes the last kept step's points too: they are written again
            values = json.loads(line)
            if values.pop("step") == step:
                values.pop("epoch")
                self._to_board(step, values)

    def log(self, step: int, epoch: int, values: dict[str, float | None]) -> None:
        """Add a line to metrics.jsonl, and its values to TensorBoard."""
        if self.written:
            self.metrics.write(json.dumps({"step": step, "epoch": epoch, **values}) + "\n")
            self.metrics.flush()
            self._to_board(step, values)

    def _to_board(self, step, values):
        group = "train" if "train_loss" in values else "eval"
        for name, value in values.items():
            if value is not None:
                self.board.add_scalar(f"{group}/{name}", value, step)

    def kept(self) -> bytes:
        """What metrics.jsonl holds, once all is on its way to the disk."""
        if not self.written:
            return b""
        self.board.flush()  # written by a thread of its own: a kill would leave a gap
        return (self.folder / "metrics.jsonl").read_bytes()

    def write(self, name: str, text: str) -> None:
        """Write a file that is at every instant the old one or the new one."""
        if self.written:
            partial = (self.folder / name).with_suffix(".partial")
            partial.write_text(text)
            flush(partial)
            partial.replace(self.folder / name)

    def close(self) -> None:
        """Close what is open."""
        for file in filter(None, (self.board, self.metrics)):
            file.close()


def ledger(
    network: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    gradients: tuple[str, int],
    peak: dict[str, float | None] | None,
    device: torch.device,
) -> dict[str, float]:
    """{part: GiB} of the training phase's peak; on a GPU of the allocated bytes, on a CPU of the resident ones.

    gradients: name and bytes of that part. peak: see `memory.Memory`; None if nothing was trained.
    """
    here = map(parallel.own_rows, (*network.parameters(), *network.buffers()))
    storages = {  # a slot counts once, however many layers pass through it
        x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in here if x.device == device
    }
    state = (v for tensors in optimizer.state.values() for v in tensors.values() if torch.is_tensor(v))
    parts = {
        "weights": sum(storages.values()),
        "optimizer state": memory.size_in_bytes(map(parallel.own_rows, state)),
        gradients[0]: gradients[1],
    }
    parts = {name: size / memory.GIB for name, size in parts.items()}
    if peak:
        parts["the rest"] = (peak["allocated"] or peak["device"]) - sum(parts.values())
    return parts


def versions(device: torch.device) -> dict[str, str]:
    """What a figure depends on: the packages and the processor."""
    found = {name: version(name) for name in ("torch", "transformers", "datasets")}
    return {"python": platform.python_version(), **found, "device": device_name(device)}


def device_name(device: torch.device) -> str:
    """The GPU's or the CPU's."""
    return torch.cuda.get_device_name() if device.type == "cuda" else platform.machine() + " CPU"


def print_summary(summary: dict, folder: Path, scores: dict[str, tuple[str, str, str]]) -> None:
    """Print the closing table: scores before and after, speed, memory.

    scores: {name of a score: (what it is called, its unit, its format)}.
    """
    work = f"{summary['steps']} steps, {summary['rows']} rows, {summary['train_seconds']:.0f} s"
    if summary["rows"]:
        work += f", {summary['rows_per_second']:.1f} rows/s, {summary['tokens_per_second']:.0f} tokens/s"
    if summary["seconds_to_first_step"]:
        work += f", first step done {summary['seconds_to_first_step']:.0f} s after the start"
    if summary["skipped_updates"]:
        work += f", {summary['skipped_updates']} updates skipped as not finite"
    print(f"\n{summary['script']} {summary['run_name']}: {work}")

    headings = [f"{what} {unit}".strip() for what, unit, _ in scores.values()]
    width = max(12, *(len(heading) + 2 for heading in headings))

    def line(title, *cells):
        print(f"{title:<24}" + "".join(f"  {cell:>{width - 2}}" for cell in cells))

    line(f"held-out rows: {summary['eval'][0]['rows']}", *headings)
    for e in summary["eval"]:
        title = f"epoch {e['epoch']}" if e["epoch"] else "before"
        line(title, *(format(e[name], form) for name, (_, _, form) in scores.items()))
    most = "" if summary["ranks"] == 1 else f", rank {summary['memory_of_rank']}"  # the largest
    line(f"peak memory, GiB{most}", "allocated", "reserved", "device")
    for phase, peak in summary["memory_gib"].items():
        line(phase, *("-" if value is None else f"{value:.2f}" for value in peak.values()))
    parts = ", ".join(f"{name} {value:.2f}" for name, value in summary["ledger_gib"].items())
    print(f"of which in training: {parts}")
    print(f"records in {folder}; compare runs with: tensorboard --logdir {folder.parent}")
