"""Weights that live in host memory and pass through the GPU: decoder layers, a frozen head, embeddings."""

import ctypes
import mmap
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import pairwise

import torch

from lowmem.adafactor_kernels import kernel, tl, triton
from lowmem.linear_cross_entropy import HeadInPieces
from lowmem.training import memory
from lowmem.training.errors import UserError
from lowmem.training.heads import HEAD_PIECE_BYTES
from lowmem.training.parallel import ceil_div

SLOTS = 2  # layers on the device of those that stream


class CopyStreams:
    """Copies between host and device memory that run beside the computation, on a stream for each direction."""

    def __init__(self, device: torch.device):
        # torch.cpu's streams do nothing: copies are done at once
        self.backend = torch.cuda if device.type == "cuda" else torch.cpu
        self.fetching, self.sending = self.backend.Stream(), self.backend.Stream()
        self.arrived, self.busy = {}, set()

    def fetch(self, target: torch.Tensor, source: torch.Tensor, key: object, at_once: bool = False) -> None:
        """Copy to the device, after all that is being sent and, unless `at_once`, all else that has been launched;
        `wait(key)` waits for its arrival.
        """
        if self.sending in self.busy:  # a stream at rest is no part of a graph that is being captured
            self.fetching.wait_stream(self.sending)
        if not at_once:
            self.fetching.wait_stream(self.backend.current_stream())
        with self.backend.stream(self.fetching):
            target.copy_(source, non_blocking=True)
            self.arrived[key] = self.fetching.record_event()
        self.busy.add(self.fetching)

    def send(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy to host memory once what has been launched is done."""
        self.sending.wait_stream(self.backend.current_stream())
        with self.backend.stream(self.sending):
            target.copy_(source, non_blocking=True)
        self.busy.add(self.sending)

    def wait(self, key: object) -> None:
        """Let what is launched from now on wait for the last fetch of `key`."""
        if key in self.arrived:
            self.backend.current_stream().wait_event(self.arrived[key])

    def settle(self) -> None:
        """Let what is launched from now on wait for all copies, as the end of a captured graph must."""
        for stream in self.busy:
            self.backend.current_stream().wait_stream(stream)
        self.arrived, self.busy = {}, set()


class StreamedLayers:
    """Decoder layers whose weights live in host memory and pass through a few slots on the device.

    Layer i, counted among these layers, always uses slot i % slots. What the forward pass leaves in the slots is then
    what the backward pass needs first, and what that leaves the next forward pass: nothing is copied twice. Parameters
    are views of their slot for good, so that whatever runs, updates or captures a layer need not know. A step:

    1. before a layer runs, it waits for its own weights, and fetches what the slot does not hold;
    2. after it has run forward, its slot is filled with the layer that is `slots` further on;
    3. `recomputation` is the context in which gradient checkpointing runs layers again: nothing is fetched behind them;
    4. in backward `send_home` sends each parameter home as soon as it is updated, and fills its place;
    5. `copies.settle` ends the step: what follows waits for all copies. The host waits for none of it;
    6. `all_at_home` is the context in which weights are saved or loaded, between steps.

    Where a slot does not hold what a layer needs, because another was skipped or a parameter had no gradient, it is
    fetched then, late but right.

    layers: more than `slots` modules, in the order of running, whose parameters have the same shapes and dtypes.
    """

    def __init__(self, layers: list[torch.nn.Module], copies: CopyStreams, device: torch.device, slots: int = SLOTS):
        self.copies, self.recomputing, params = copies, False, [list(layer.parameters()) for layer in layers]
        self.parts, size = [], 0  # bytes of a slot: a part for each parameter, where wide loads like it
        for p in params[0] if params else []:
            self.parts.append(slice(size, size + p.nbytes))
            size += ceil_div(p.nbytes, 256) * 256
        self.slots = torch.empty(slots, size, dtype=torch.uint8, device=device)
        self.place_of, self.host_copies, self.host_copy_of = {}, [], {}  # of a layer's bytes; of a parameter
        for i, layer in enumerate(params):
            buffer = host_memory(size, device)
            self.host_copies.append(torch.frombuffer(buffer, dtype=torch.uint8))
            for k, (p, part) in enumerate(zip(layer, self.parts, strict=True)):
                # storages of their own: save_pretrained copies tensors that share one
                home = torch.frombuffer(buffer, dtype=p.dtype, count=p.numel(), offset=part.start).view(p.shape)
                self.place_of[p], self.host_copy_of[p] = (i, k), home.copy_(p.data)
                p.data = self._in_slot(p)  # its old memory is free before the next layer's is taken
        self._fill()
        for i, layer in enumerate(layers):
            layer.register_forward_pre_hook(lambda *_, i=i: self._before(i))
            layer.register_forward_hook(lambda *_, i=i: self._after(i))

    def _slot(self, i):
        return self.slots[i % len(self.slots)]

    def _in_slot(self, p):
        i, k = self.place_of[p]
        return self._slot(i)[self.parts[k]].view(p.dtype).view(p.shape)

    def _fill(self):
        for slot, home in zip(self.slots, self.host_copies, strict=False):
            slot.copy_(home)
        self.holds = [[i] * len(self.parts) for i in range(len(self.slots))]  # of each slot's parts, whose layer's

    @contextmanager
    def all_at_home(self) -> Iterator[None]:
        """In this context the parameters are those in host memory, to be saved or loaded."""
        self.copies.settle()
        self.copies.backend.synchronize()
        for p, home in self.host_copy_of.items():
            p.data = home
        try:
            yield
        finally:
            for p in self.host_copy_of:
                p.data = self._in_slot(p)
            self._fill()

    @contextmanager
    def recomputation(self, inner: AbstractContextManager) -> Iterator[None]:
        """The context in which gradient checkpointing runs layers again, within `inner`."""
        self.recomputing = True
        try:
            with inner:
                yield
        finally:
            self.recomputing = False

    def _before(self, i):
        holds = self.holds[i % len(self.slots)]
        for k in [k for k, layer in enumerate(holds) if layer != i]:
            self._fetch(i, k)
        self.copies.wait(i)

    def _after(self, i):
        further = i + len(self.slots)
        if self.recomputing:
            return  # `send_home` fetches
        if further < len(self.host_copies):
            self._fetch(further)
        elif not torch.is_grad_enabled() and i >= len(self.slots):  # evaluation ends: back to what forward needs first
            self._fetch(i % len(self.slots))

    def _fetch(self, i, k=None, at_once=False):
        """Fetch layer i, or its part k alone."""
        bytes_, parts = (slice(None), range(len(self.parts))) if k is None else (self.parts[k], [k])
        self.copies.fetch(self._slot(i)[bytes_], self.host_copies[i][bytes_], key=i, at_once=at_once)
        for part in parts:
            self.holds[i % len(self.slots)][part] = i

    def send_home(self, p: torch.nn.Parameter) -> None:
        """Send the updated parameter home, and fetch what comes into its place; nothing if it is not streamed."""
        if p in self.place_of:
            i, k = self.place_of[p]
            self.copies.send(self.host_copies[i][self.parts[k]], self._slot(i)[self.parts[k]])
            if i >= len(self.slots):
                self._fetch(i - len(self.slots), k, at_once=True)  # once it is sent


class StreamedHead(HeadInPieces):
    """A head whose weights stay in host memory and pass through the device in pieces.

    Pieces take two buffers by turns; their number is even, and at the end the buffers hold the first two again.
    """

    def __init__(
        self, network: torch.nn.Module, copies: CopyStreams, device: torch.device, piece_bytes: int = HEAD_PIECE_BYTES
    ):
        super().__init__(network)
        vocabulary, width = self.weight.shape
        count = 2 * ceil_div(self.weight.nbytes, 2 * piece_bytes)
        bounds = [vocabulary * k // count for k in range(count + 1)]
        self.pieces = [slice(*pair) for pair in pairwise(bounds)]
        self.copies, self.buffers = copies, self.weight.new_empty(2, ceil_div(vocabulary, count), width, device=device)
        self.piece_rows = self.buffers.shape[1]
        self.weight.data = page_locked(self.weight.data, device)
        for k in range(2):
            self._fetch(k)

    def _on_device(self, k):
        return self.buffers[k % 2, : self.pieces[k].stop - self.pieces[k].start]

    def _fetch(self, k):
        self.copies.fetch(self._on_device(k), self.weight.data[self.pieces[k]], key=("head", k % 2))

    def weight_pieces(self) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor | None]]:
        """Yield (slice of the vocabulary, its weights on the device, its bias or None); each is used up by the next."""
        for k, piece in enumerate(self.pieces):
            self.copies.wait(("head", k % 2))
            yield piece, self._on_device(k), None if self.bias is None else self.bias[piece]
            self._fetch((k + 2) % len(self.pieces))


def host_memory(size: int, device: torch.device) -> ctypes.Array:
    """A buffer of `size` bytes in host memory, page-locked if `device` is a GPU, which then copies by itself.

    For torch.frombuffer: each tensor made of it has a storage of its own. Registered where it is, because PyTorch's own
    pinned memory comes in powers of two. Raises UserError.
    """
    advice = f"no host memory for {size / memory.GIB:.2f} GiB more of the model's weights: close other programs, or "
    advice += "allow the run more of the GPU (--memory_budget)"
    if size > memory.free_host_memory():
        raise UserError(advice)
    try:
        buffer = (ctypes.c_char * size).from_buffer(mmap.mmap(-1, size))  # whole pages, shared with nothing else
    except OSError as error:
        raise UserError(advice) from error
    if device.type == "cuda":
        cudart, address = torch.cuda.cudart(), ctypes.addressof(buffer)
        if int(cudart.cudaHostRegister(address, size, 0)):
            raise UserError(f"{advice}; the GPU's driver refuses to lock it")
        weakref.finalize(buffer, cudart.cudaHostUnregister, address).atexit = False
    return buffer


def page_locked(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor as a copy in `host_memory`, or as it is if it is there already or `device` is no GPU."""
    if device.type != "cuda" or tensor.is_pinned():
        return tensor
    return torch.frombuffer(host_memory(tensor.nbytes, device), dtype=tensor.dtype).view(tensor.shape).copy_(tensor)


@kernel
def _copy_rows(table, ids, out, width, BLOCK: tl.constexpr):
    row, at = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(table + tl.load(ids + row) * width + at, mask=at < width)
    tl.store(out + row.to(tl.int64) * width + at, values, mask=at < width)


def rows_from_host(table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """table[ids] on the GPU of ids, int64 of any shape, while table [n, width] stays in pinned host memory."""
    out = torch.empty(*ids.shape, table.shape[1], dtype=table.dtype, device=ids.device)
    _copy_rows[ids.numel(), triton.cdiv(table.shape[1], 1024)](table, ids.contiguous(), out, table.shape[1], 1024)
    return out


def can_stay_on_host(embeddings: torch.nn.Module) -> bool:
    """Whether a GPU may read these embeddings from host memory: untrained, and looking up is no more than that."""
    return not embeddings.weight.requires_grad and type(embeddings) is torch.nn.Embedding
