"""Errors that end a command in one line: what a user can mend, and what ran out or was interrupted."""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class UserError(Exception):
    """A mistake the user can mend: one line that says what is wrong and what to do."""


class Diverged(UserError):
    """A run whose numbers are no longer finite; its message says what to do instead of going on."""


class Interrupted(BaseException):
    """The signal `number` ended the command."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


def chain(error: BaseException) -> list[BaseException]:
    """The error and what led to it, the first cause last."""
    found = [error]
    while (cause := found[-1].__cause__ or found[-1].__context__) and cause not in found:
        found.append(cause)
    return found


def what_ran_out(error: BaseException) -> str | None:
    """The line for an error that says that the disk is full, or the GPU's or the host's memory; for others None."""
    text = str(error)
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # safetensors has an error of its own, with the system's words
    words = r"No space left on device|Not enough disk space|Disk quota exceeded|File too large \(os error"
    if getattr(error, "errno", None) in full or re.search(words, text):
        return "the disk is full: make room"
    of_cuda = r"CUDA.*out of memory|CU(BLAS|DNN)_STATUS_ALLOC_FAILED"  # the driver's, Triton's and the libraries' words
    if isinstance(error, torch.OutOfMemoryError) or re.search(of_cuda, text):
        size = r"([\d.]+ \w+)"
        words = (f"Tried to allocate {size}", f"of which {size} is free", f"{size} allowed")
        asked, free, allowed = (match and match[1] for match in (re.search(pattern, text) for pattern in words))
        missing = f"out of GPU memory: {asked or 'more'} asked, {free or 'less'} free"
        missing += f", {allowed} allowed" if allowed else ""
        advice = "take a smaller --batch_size or --max_length (and another --run-name), more GPUs, or (low-memory, on "
        advice += "one GPU) a smaller --memory_budget"
        return f"{missing}; {advice}"
    if isinstance(error, MemoryError) or re.search("can(no|')t (allocate memory|start new thread)", text, re.I):
        asked = re.search(r"tried to allocate (\d+) bytes|allocate ([\d.]+ \w+) for an array", text)
        asked = "more" if not asked else asked[2] or f"{int(asked[1]) / 2**30:.2f} GiB"
        return f"out of host memory: {asked} asked; close other programs"
    return None


@contextmanager
def refuse_what_fails(network: torch.nn.Module) -> Iterator[None]:
    """Turn what an unsupported architecture raises when it runs into a UserError."""
    try:
        yield
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        if what_ran_out(error):
            raise
        raise UserError(f"{type(network).__name__} is not supported: {' '.join(str(error).split())[:200]}") from error
