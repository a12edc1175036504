"""Bytes: of tensors, of the host, and the peaks of each phase of a run."""

import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import psutil
import torch

from lowmem.training.errors import UserError

GIB = 2**30
CONTROL_GROUPS, OWN_CONTROL_GROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def size_in_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the tensors; a sharded one counts whole."""
    return sum(t.numel() * t.element_size() for t in tensors)


class Memory:
    """Peak memory of each phase (load, train, eval) in GiB: {phase: {allocated, reserved, device}}.

    On a GPU: allocated and reserved are the caching allocator's peaks; device is all that is in use on the card, CUDA
    context and other processes included, at the allocator's peak; the rest is sampled at log lines and at the end of
    each phase. On a CPU: device is the process's peak resident size so far, the others None.
    """

    def __init__(self, device: torch.device):
        """Begin with the phase "load", which counts from the last reset of the allocator's peaks, before, on."""
        self.on_gpu, self.phase, self.peaks = device.type == "cuda", "load", {}

    def start(self, phase: str) -> None:
        """End the phase in progress and begin `phase`."""
        self.sample()
        self.phase = phase
        if self.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def sample(self) -> float:
        """Update the phase's peaks; return its device peak in GiB."""
        peak = self.peaks.setdefault(self.phase, {"allocated": None, "reserved": None, "device": 0.0})
        if self.on_gpu:
            free, total = torch.cuda.mem_get_info()
            now = {
                "allocated": torch.cuda.max_memory_allocated(),
                "reserved": torch.cuda.max_memory_reserved(),
                # with what the allocator had reserved at most and has given back since
                "device": total - free + torch.cuda.max_memory_reserved() - torch.cuda.memory_reserved(),
            }
        else:
            import resource

            unit = 1 if sys.platform == "darwin" else 1024
            now = {"device": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
        for name, value in now.items():
            peak[name] = max(peak[name] or 0.0, value / GIB)
        return peak["device"]


def free_host_memory() -> int:
    """Bytes of host memory that this process may take, within the limits of its control groups (v2) and containers."""
    free, group = psutil.virtual_memory().available, CONTROL_GROUPS
    with suppress(OSError, IndexError):
        group /= OWN_CONTROL_GROUP.read_text().split("0::/")[1].strip()  # a container sees its own as the root
    for folder in [group, *group.parents]:
        with suppress(OSError, ValueError):  # no such files, or "max": no limit
            limit, used = (int((folder / f"memory.{name}").read_text()) for name in ("max", "current"))
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            cached = int(stat["inactive_file"]) + int(stat["active_file"])  # given up when memory is needed
            free = min(free, limit - used + cached)
    return free


def require_host_memory(size: int, what: str) -> None:
    """Raise UserError if `size` bytes for `what` are not free in host memory."""
    free = free_host_memory()
    if size > free:
        raise UserError(
            f"{what} takes {size / GIB:.1f} GiB of host memory, and {free / GIB:.1f} are free: close other programs, "
            "or take a smaller model"
        )
