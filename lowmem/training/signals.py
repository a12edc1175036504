"""What SIGINT and SIGTERM do while a run is under way: no step, its checkpoint included, is cut in two."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
import torch.distributed as dist

from lowmem.training import parallel
from lowmem.training.errors import Interrupted

NUMBERS = (signal.SIGINT, signal.SIGTERM)
# `timeout` sends its signal to the process and to its group, a scheduler to all processes, of which torchrun passes its
# own on: within so many seconds nobody is asking twice
GRACE_SECONDS = 3


class Signals:
    """In this context the first signal raises Interrupted at once or, within `hold()`, at its end.

    A second one, after the grace period, ends the process on the spot. `number`: the signal that has come, or None.
    """

    def __init__(self):
        self.number, self.held, self.asked = None, False, None

    def __enter__(self):
        alone = threading.current_thread() is threading.main_thread()  # no other may handle signals
        self.before = {number: signal.signal(number, self._received) for number in (NUMBERS if alone else ())}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _received(self, number, frame):
        if self.number:
            if time.monotonic() > self.time + GRACE_SECONDS:
                os._exit(128 + number)
            return
        self.number, self.time = number, time.monotonic()
        if not self.held:
            raise Interrupted(number)
        if parallel.rank() == 0:
            with suppress(OSError):  # print may be what it cut short
                again = f"a second signal, after {GRACE_SECONDS} s, stops at once"
                os.write(2, f"\nstopping after this step, once it is saved; {again}\n".encode())

    @contextmanager
    def hold(self) -> Iterator[None]:
        """In this context a signal waits for the end, where it raises Interrupted."""
        self.held = True
        try:
            yield
        finally:
            self.held = False
        if self.number:
            raise Interrupted(self.number)

    def on_any_rank(self) -> bool:
        """Whether a signal has come to any rank, with one answer for all: asked at one call, answered at the next."""
        if parallel.world_size() == 1:
            return self.number is not None
        if self.asked:
            work, found = self.asked
            work.wait()
            if found.item():
                self.number, self.time = self.number or found.item(), time.monotonic()
                return True
        found = torch.tensor(self.number or 0)
        self.asked = dist.all_reduce(found, dist.ReduceOp.MAX, async_op=True), found
        return False
