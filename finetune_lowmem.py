"""Fine-tune all the weights of a causal LM on HellaSwag in little more memory than its bf16 weights.

    python finetune_lowmem.py --run-name X               # Llama-3.2-1B on one GPU
    python finetune_lowmem.py --run-name demo --demo     # SmolLM2-135M on a CPU, no account needed
    torchrun --nproc-per-node 2 finetune_lowmem.py --run-name X2  # on two GPUs, each with half of the weights

The five techniques, in the order of this file:
  1. linear cross entropy    no logits array: only target positions reach the head          `target_loss`
  2. update in backward      a gradient lives until its own update, not the step's end      `update_in_backward`
  3. bf16 weights            2 bytes a parameter, kept unbiased by stochastic rounding      `common.Adafactor`
  4. gradient checkpointing  the activations of one layer at a time                         `main`
  5. small batches           8 rows; Adafactor's state is a row and a column per matrix     `main`
Embeddings that are neither trained nor tied to the head stay in host memory (`keep_on_host`). With --memory_budget, or
where a GPU is too small, so do decoder layers: they stream through two slots (`StreamedLayers`), the frozen head in
pieces (`StreamedHead`), as many as do not fit (`choose_plan`). Under torchrun the GPUs share the layers instead
(`common.shard`) and the frozen head (`SharedHead`), nothing streams, and with --memory_budget the layers that fit are
gathered once a step, not twice (`gather_once`).

What a GPU also gets, so that CUDA takes little of it and the host never keeps it waiting: `shrink_context`,
`leave_out_masks`, `compile_layers`, `Graphs`.

In this order: the techniques, streaming, what keeps the GPU busy, checks, the run. For the techniques alone read the
first part and `main`.
"""

import ctypes
import gc
import math
import os
import statistics
from collections import Counter
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed as dist
import torch.nn.functional as F

import common

GRAPHS_PAY = 65  # steps, or 195 evaluation batches: of a 1B model they take 9 s on an H100, and save 0.14 s a step
COMPILING_PAYS = 8000  # steps: on an H100 it takes 34 s at the start, and saves 4.3 ms a step of a 1B model
PAD_TO = 32  # tokens: few lengths, few graphs
SLOTS = 2  # layers on the device of those that stream
GRAPH = 2**19  # bytes that CUDA takes for each decoder layer in a graph: on an H100 0.44 MiB, an evaluation's less
GRAPH_OF_RANKS = 3 * 2**20  # the same with the communication of several GPUs: on two H200s 1.5 to 2.8 MiB
GAPS = 2**26  # bytes that PyTorch's allocator cannot use, beyond those of the measured step: 0.03 to 0.06 GiB
# Smaller buffers and fewer thread blocks than NCCL's own: on two H200s 0.45 GiB less on each; 8B with 32 rows as fast.
# GRAPH_MIXING_SUPPORT 0: a step's communication is all in its graph, and none is launched outside while one runs.
NCCL = {"BUFFSIZE": 2**21, "LL_BUFFSIZE": 2**16, "LL128_BUFFSIZE": 2**17, "MAX_CTAS": 16, "GRAPH_MIXING_SUPPORT": 0}
PAGES = 512  # bytes of locked host memory for which the GPU keeps one of its own: 8 for each page of 4 KiB


def precision():
    """Context of each forward pass: bf16 as it is on a GPU, bf16 with fp32 products on a CPU."""
    return nullcontext() if torch.cuda.is_available() else common.Fp32Products()


# ---------------------------------------------------------------------------------------------------------------------
# The memory techniques


def target_loss(head, hidden, targets, weights):
    """fp32 scalar: cross entropy of targets [n] after hidden [n, width], summed with weights [n].

    No [n, vocabulary] array exists.
    """
    return -(LinearLogProbs.apply(hidden, targets, head.weight, head.bias, head) * weights).sum()


class LinearLogProbs(torch.autograd.Function):
    """fp32 [n]: log-probability of targets [n] after hidden [n, width], from a piece of the head's rows at a time.

    Logits are made in pieces and not kept, as in cut-cross-entropy (Wijmans et al. 2024), but all sums over the
    vocabulary are fp32 and in a fixed order. The softmax's running maximum and sum, rescaled from piece to piece
    (Milakov & Gimelshein 2018), carry the gradient by `hidden` with them: weights that stream are needed only once.
    A head that is trained makes its logits again in backward. weight, bias: the head's, for autograd to see.
    """

    @staticmethod
    def forward(ctx, hidden, targets, weight, bias, head):
        some = head.pieces(hidden, targets, rows=head.piece_rows)
        softmaxes = [RunningSoftmax(head, *pair, ctx.needs_input_grad[0]) for pair in zip(*some, strict=True)]
        for piece in head.weight_pieces():
            for softmax in softmaxes:
                softmax.add(*piece)
        ctx.head, ctx.dtype, saved = head, hidden.dtype, [None]
        if ctx.needs_input_grad[0]:
            saved = [torch.cat([softmax.gradient() for softmax in softmaxes])]
        if ctx.needs_input_grad[2]:
            saved += [hidden, targets, torch.cat([softmax.log_total() for softmax in softmaxes])]
        ctx.save_for_backward(*saved)
        return torch.cat([softmax.log_probs() for softmax in softmaxes])

    @staticmethod
    def backward(ctx, grad):
        by_hidden, *of_a_trained_head = ctx.saved_tensors
        by_hidden = (grad[:, None] * by_hidden).to(ctx.dtype) if ctx.needs_input_grad[0] else None
        by_head = head_gradients(ctx.head, grad, *of_a_trained_head) if of_a_trained_head else (None, None)
        return by_hidden, None, *by_head, None


class RunningSoftmax:
    """What the pieces of a head so far tell of the log-probabilities of targets [n] after hidden [n, width]."""

    def __init__(self, head, hidden, targets, needs_gradient):
        self.head, self.hidden, self.targets, self.needs_gradient = head, hidden, targets, needs_gradient
        self.top = hidden.new_full((len(targets), 1), -math.inf, dtype=torch.float32)
        self.total, self.of_target, self.mean, self.towards = 0.0, 0.0, 0.0, 0.0

    def add(self, part, weight, bias):
        logits = self.head.some_logits(self.hidden, weight, bias)
        at = (self.targets - part.start).clamp(0, len(weight) - 1)[:, None]
        here = ((self.targets >= part.start) & (self.targets < part.stop))[:, None]
        self.of_target = self.of_target + here * logits.gather(1, at)
        slope = softcap_slope(self.head, logits)
        new_top = torch.maximum(self.top, logits.amax(1, keepdim=True))
        shrink, e = (self.top - new_top).exp(), logits.sub_(new_top).exp_()
        self.top, self.total = new_top, self.total * shrink + e.sum(1, keepdim=True)
        if self.needs_gradient:
            self.mean = self.mean * shrink + _product(e if slope is None else e * slope, weight)
            slope = 1 if slope is None else slope.gather(1, at)
            self.towards = self.towards + here * slope * weight[at[:, 0]].float()

    def log_total(self):
        """fp32 [n]: logarithm of the sum of all exponentials."""
        return (self.top + self.total.log()).squeeze(1)

    def log_probs(self):
        return (self.of_target - self.top - self.total.log()).squeeze(1)

    def gradient(self):
        """fp32 [n, width]: of each log-probability by its hidden state."""
        return self.head.scale * (self.towards - self.mean / self.total)


def head_gradients(head, grad, hidden, targets, log_total):
    """Gradients by the head's weight and bias (None without one) of the log-probabilities times grad [n].

    hidden [n, width], targets [n]; log_total: fp32 [n], `RunningSoftmax.log_total`.
    """
    by_weight, by_bias = torch.empty_like(head.weight), None if head.bias is None else torch.empty_like(head.bias)
    positions = head.pieces(hidden, targets, log_total, grad, rows=head.piece_rows)
    for part, weight, bias in head.weight_pieces():
        vocabulary = torch.arange(part.start, part.stop, device=grad.device)
        weight_sum, bias_sum = 0.0, 0.0
        for h, t, total, g in zip(*positions, strict=True):
            logits = head.some_logits(h, weight, bias)
            slope = softcap_slope(head, logits)
            by_logits = ((t[:, None] == vocabulary).float() - logits.sub_(total[:, None]).exp_()).mul_(g[:, None])
            by_logits = by_logits if slope is None else by_logits * slope
            weight_sum = weight_sum + _product(by_logits.T, h * head.scale)
            bias_sum = bias_sum + by_logits.sum(0)
        by_weight[part] = weight_sum
        if bias is not None:
            by_bias[part] = bias_sum
    return by_weight, by_bias


def softcap_slope(head, logits):
    """Slope of the soft-capping where it gives these logits; None for a head without one."""
    return None if head.softcap is None else 1 - (logits / head.softcap).square()


def _product(x, y):
    """fp32 x [a, b] times y [b, c], by the device's fast way with fp32 sums."""
    if x.is_cuda and y.dtype != torch.float32:
        return torch.mm(x.to(y.dtype), y, out_dtype=torch.float32)
    return x @ y.float()


def training_loss(model, head, batch):
    """Mean cross entropy over the batch's target tokens, this rank's part, from the hidden states that predict them."""
    return target_loss(head, common.hidden_states(model, batch, precision), batch.targets, batch.weights)


def update_in_backward(optimizer, trained, after=lambda p: None):
    """Update each parameter as soon as backward has its whole gradient, release that gradient at once, call after(p).

    The hook runs once per backward pass and parameter, after all uses of a tied weight were summed. Returns handles.
    """

    def update(p):
        optimizer.update(p)
        p.grad = None
        after(p)

    return [p.register_post_accumulate_grad_hook(update) for p in trained.values()]


def keep_on_host(model, device, head=False):
    """Move all but the decoder layers to `device`, but let a GPU read untrained embeddings from host memory row by row.

    head: the head's weight is in host memory too, for `StreamedHead`. Otherwise embeddings tied to it go to the GPU, as
    do those where looking up is more than copying rows (Gemma scales them). Returns whether the embeddings stay.
    """
    embeddings, output = model.get_input_embeddings(), model.get_output_embeddings()
    tied, layers = embeddings.weight is output.weight, common.decoder_layers(model)
    on_host = device.type == "cuda" and can_stay_on_host(embeddings) and (head or not tied)
    staying = [*layers.parameters(), *layers.buffers(), *[embeddings.weight] * on_host, *[output.weight] * head]
    staying = {id(tensor) for tensor in staying}
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) not in staying and not common.is_sharded(tensor):
            tensor.data = tensor.data.to(device)
    vars(embeddings).pop("forward", None)
    if on_host:
        embeddings.weight.data = common.page_locked(embeddings.weight.data, device)
        embeddings.forward = lambda ids: common.rows_from_host(embeddings.weight, ids)
    return on_host


def can_stay_on_host(embeddings):
    return not embeddings.weight.requires_grad and type(embeddings) is torch.nn.Embedding


def shrink_context():
    """Make CUDA take less of the GPU for itself: on an H100 0.55 GiB instead of 0.76, graphs included."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:1")  # 4 MiB instead of 32, twice for each thread and stream
    if common.ranks() > 1 and os.environ["LOCAL_WORLD_SIZE"] == os.environ["WORLD_SIZE"]:  # within one machine
        for name, value in NCCL.items():
            os.environ.setdefault(f"NCCL_{name}", str(value))
    torch.autograd.set_multithreading_enabled(False)  # backward on this thread, with its workspace
    torch.cuda.set_stream(torch.cuda.Stream())  # graphs cannot be captured on the default stream: one other for all
    # Local memory is set aside for all threads that the GPU can hold, 2,048 x 132 on an H100, at 1,024 bytes each. CUDA
    # enlarges it by itself for a kernel that needs more than these 256.
    with suppress(OSError):
        ctypes.CDLL("libcuda.so.1").cuCtxSetLimit(0, ctypes.c_size_t(256))  # 0: CU_LIMIT_STACK_SIZE


# ---------------------------------------------------------------------------------------------------------------------
# Streaming from host memory


class Copies:
    """Copies between host and device memory that run beside the computation, on a stream for each direction."""

    def __init__(self, device):
        # torch.cpu's streams do nothing: copies are done at once
        self.backend = torch.cuda if device.type == "cuda" else torch.cpu
        self.fetching, self.sending = self.backend.Stream(), self.backend.Stream()
        self.arrived, self.busy = {}, set()

    def fetch(self, target, source, key, at_once=False):
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

    def send(self, target, source):
        """Copy to host memory once what has been launched is done."""
        self.sending.wait_stream(self.backend.current_stream())
        with self.backend.stream(self.sending):
            target.copy_(source, non_blocking=True)
        self.busy.add(self.sending)

    def wait(self, key):
        """Let what is launched from now on wait for the last fetch of `key`."""
        if key in self.arrived:
            self.backend.current_stream().wait_event(self.arrived[key])

    def settle(self):
        """Let what is launched from now on wait for all copies, as the end of a captured graph must."""
        for stream in self.busy:
            self.backend.current_stream().wait_stream(stream)
        self.arrived, self.busy = {}, set()


class StreamedLayers:
    """Decoder layers whose weights live in host memory and pass through a few slots on the device.

    Layer i, counted among these layers, always uses slot i % slots. What the forward pass leaves in the slots is then
    what the backward pass needs first, and what that leaves the next forward pass: nothing is copied twice. Parameters
    are views of their slot for good, so that whatever runs, updates or captures a layer need not know. In forward, the
    slot of a layer that has run is filled with the layer that is `slots` further on; in backward each parameter goes
    home as soon as it is updated, and its place is filled. The host waits for none of it.

    Where a slot does not hold what a layer needs, because another was skipped or a parameter had no gradient, it is
    fetched then, late but right.

    layers: more than `slots` modules, in the order of running, whose parameters have the same shapes and dtypes.
    """

    def __init__(self, layers, copies, device, slots=SLOTS):
        self.copies, self.recomputing, params = copies, False, [list(layer.parameters()) for layer in layers]
        self.parts, size = [], 0  # bytes of a slot: a part for each parameter, where wide loads like it
        for p in params[0] if params else []:
            self.parts.append(slice(size, size + p.nbytes))
            size += -(-p.nbytes // 256) * 256
        self.slots = torch.empty(slots, size, dtype=torch.uint8, device=device)
        self.place_of, self.home, self.at_home_as = {}, [], {}
        for i, layer in enumerate(params):
            buffer = common.host_memory(size, device)
            self.home.append(torch.frombuffer(buffer, dtype=torch.uint8))
            for k, (p, part) in enumerate(zip(layer, self.parts, strict=True)):
                # storages of their own: save_pretrained copies tensors that share one
                home = torch.frombuffer(buffer, dtype=p.dtype, count=p.numel(), offset=part.start).view(p.shape)
                self.place_of[p], self.at_home_as[p] = (i, k), home.copy_(p.data)
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
        for slot, home in zip(self.slots, self.home, strict=False):
            slot.copy_(home)
        self.holds = [[i] * len(self.parts) for i in range(len(self.slots))]  # of each slot's parts, whose layer's

    @contextmanager
    def at_home(self):
        """In this context the parameters are those in host memory, to be saved or loaded."""
        self.copies.settle()
        self.copies.backend.synchronize()
        for p, home in self.at_home_as.items():
            p.data = home
        try:
            yield
        finally:
            for p in self.at_home_as:
                p.data = self._in_slot(p)
            self._fill()

    @contextmanager
    def again(self, inner):
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
        if further < len(self.home):
            self._fetch(further)
        elif not torch.is_grad_enabled() and i >= len(self.slots):  # evaluation ends: back to what forward needs first
            self._fetch(i % len(self.slots))

    def _fetch(self, i, k=None, at_once=False):
        """Fetch layer i, or its part k alone."""
        bytes_, parts = (slice(None), range(len(self.parts))) if k is None else (self.parts[k], [k])
        self.copies.fetch(self._slot(i)[bytes_], self.home[i][bytes_], key=i, at_once=at_once)
        for part in parts:
            self.holds[i % len(self.slots)][part] = i

    def send_home(self, p):
        """Send the updated parameter home, and fetch what comes into its place; nothing if it is not streamed."""
        if p in self.place_of:
            i, k = self.place_of[p]
            self.copies.send(self.home[i][self.parts[k]], self._slot(i)[self.parts[k]])
            if i >= len(self.slots):
                self._fetch(i - len(self.slots), k, at_once=True)  # once it is sent


def seconds_of_copies(layers, head):
    """[forward, loss, backward]: what a step's copies on a GPU take at least, by a trial between steps."""
    forward, loss, backward = 0.0, 0.0, 0.0
    if layers.home:
        come = (layers.copies.fetching, layers.slots[0], layers.home[0])
        (alone,), (both, go) = _seconds(come), _seconds(come, (layers.copies.sending, layers.home[1], layers.slots[1]))
        fetched = len(layers.home) - len(layers.slots)
        forward, backward = fetched * alone, max(fetched * both, len(layers.home) * go)
    if isinstance(head, StreamedHead):
        loss = len(head.parts) * _seconds((head.copies.fetching, *head.piece(0)))[0]
    return [forward, loss, backward]


def _seconds(*copies):
    """Seconds that each (stream, target, source) takes when all run at once, the median of five trials."""
    trials = []
    for _ in range(5):
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in copies]
        torch.cuda.synchronize()
        for (stream, target, source), (start, end) in zip(copies, events, strict=True):
            with torch.cuda.stream(stream):
                start.record()
                target.copy_(source, non_blocking=True)
                end.record()
        torch.cuda.synchronize()
        trials.append([start.elapsed_time(end) / 1000 for start, end in events])
    return [statistics.median(times) for times in zip(*trials, strict=True)]


class PassingHead(common.Head):
    """A head that is not trained, of which a device sees a piece at a time: `weight_pieces`, of a subclass."""

    def __init__(self, model):
        super().__init__(model)
        self.layer.forward = lambda hidden: torch.cat(
            [F.linear(hidden, *part) for _, *part in self.weight_pieces()], -1
        )

    def logits(self, hidden):
        return torch.cat([self.some_logits(hidden, *part) for _, *part in self.weight_pieces()], -1)

    def log_probs(self, hidden, targets):
        return LinearLogProbs.apply(hidden, targets, self.weight, self.bias, self)


class StreamedHead(PassingHead):
    """A head whose weights stay in host memory and pass through the device in pieces.

    Pieces take two buffers by turns; their number is even, and at the end the buffers hold the first two again.
    """

    def __init__(self, model, copies, device, piece=common.PIECE):
        super().__init__(model)
        vocabulary, width = self.weight.shape
        pieces = 2 * -(-self.weight.nbytes // (2 * piece))
        bounds = [vocabulary * k // pieces for k in range(pieces + 1)]
        self.parts = [slice(*pair) for pair in pairwise(bounds)]
        self.copies, self.buffers = copies, self.weight.new_empty(2, -(-vocabulary // pieces), width, device=device)
        self.piece_rows = self.buffers.shape[1]
        self.weight.data = common.page_locked(self.weight.data, device)
        for k in range(2):
            self._fetch(k)

    def piece(self, k):
        """(where piece k is on the device when it has been fetched, where it is in host memory)."""
        return self.buffers[k % 2, : self.parts[k].stop - self.parts[k].start], self.weight.data[self.parts[k]]

    def _fetch(self, k):
        self.copies.fetch(*self.piece(k), key=("head", k % 2))

    def weight_pieces(self):
        """Yield (slice of the vocabulary, its weights on the device, its bias or None); each is used up by the next."""
        for k, part in enumerate(self.parts):
            self.copies.wait(("head", k % 2))
            yield part, self.piece(k)[0], None if self.bias is None else self.bias[part]
            self._fetch((k + 2) % len(self.parts))


class SharedHead(PassingHead):
    """A head whose weights are dealt out: each rank's device has its rows of each piece, and gathers the others'.

    The next piece comes while one is used. The whole weight stays in host memory, for the embeddings and to be saved.
    """

    def __init__(self, model, device, piece=common.PIECE):
        super().__init__(model)
        (vocabulary, width), ranks = self.weight.shape, common.ranks()
        each = -(-min(vocabulary, piece // (width * self.weight.itemsize)) // ranks)
        self.piece_rows = each * ranks
        own = self.weight.new_zeros(-(-vocabulary // self.piece_rows), each, width, device=device)
        for k, rows in enumerate(own):
            start = k * self.piece_rows + common.rank() * each
            there = self.weight.data[start : start + each]
            rows[: len(there)] = there
        self.layer.register_buffer("own_rows", own, persistent=False)
        self.buffers = own.new_empty(2, self.piece_rows, width)

    def _gather(self, k):
        all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before 2.13
        return all_gather(self.buffers[k % 2], self.layer.own_rows[k], async_op=True)

    def weight_pieces(self):
        """Yield (slice of the vocabulary, its weights on the device, its bias or None); each is used up by the next."""
        count, vocabulary = len(self.layer.own_rows), len(self.weight)
        coming = self._gather(0)
        for k in range(count):
            coming.wait()
            if k + 1 < count:
                coming = self._gather(k + 1)
            part = slice(k * self.piece_rows, min((k + 1) * self.piece_rows, vocabulary))
            weight = self.buffers[k % 2, : part.stop - part.start]
            yield part, weight, None if self.bias is None else self.bias[part]


@dataclass
class Plan:
    """How many decoder layers stream and whether the head does. Predicted on a GPU: `peak`, bytes of the card; `work`,
    seconds of [forward, loss, backward] in a step on the largest batch, no layer streamed, the head if it can.
    """

    streamed: int
    head_streams: bool
    peak: int | None = None
    work: list | None = None


@dataclass
class Placed:
    """What `place` made: the head, whether the embeddings stay on the host, the copies and the layers that stream."""

    head: common.Head
    embeddings_on_host: bool
    copies: Copies
    layers: StreamedLayers


def place(model, plan, device):
    """Put the weights where the plan says, streamed layers spread evenly over the depth.

    May be called again as long as no layer has streamed.
    """
    copies, layers, alike = Copies(device), common.decoder_layers(model), layers_alike(model)
    head = common.Head(model)
    vars(head.layer).pop("forward", None)  # of an earlier placement
    if plan.head_streams:
        head = StreamedHead(model, copies, device)
    embeddings_on_host = keep_on_host(model, device, head=plan.head_streams)
    # each in the middle of its stretch: a layer that stays costs time at either end, where no copy hides it
    streamed = [alike[len(alike) * (2 * k + 1) // (2 * plan.streamed)] for k in range(plan.streamed)]
    for layer in layers:
        for tensor in (*layer.buffers(), *([] if layer in streamed else layer.parameters())):
            tensor.data = tensor.data.to(device)
    return Placed(head, embeddings_on_host, copies, StreamedLayers(streamed, copies, device))


def place_shares(model, trained, device):
    """Deal the weights out to the devices of all ranks; return ({name: sharded parameter}, Placed).

    Each rank has its rows of what is trained, and of a frozen head. Embeddings stay on the host where they can.
    """
    trained = common.shard(model, trained, device, torch.bfloat16)
    for p in model.parameters():
        if not common.is_sharded(p):
            p.data = p.data.to(torch.bfloat16)
    passes = can_pass(model)
    on_host = keep_on_host(model, device, head=passes)
    for tensor in common.decoder_layers(model).buffers():
        tensor.data = tensor.data.to(device)
    head, copies = SharedHead(model, device) if passes else common.Head(model), Copies(device)
    return trained, Placed(head, on_host, copies, StreamedLayers([], copies, device))


def can_pass(model):
    """Whether the head's weights need not be on the device as a whole."""
    embeddings, output = model.get_input_embeddings(), common.Head(model).layer
    return (
        type(output) is torch.nn.Linear
        and not output.weight.requires_grad
        and (embeddings.weight is not output.weight or can_stay_on_host(embeddings))
    )


def layers_alike(model):
    """The decoder layers that can stream: the largest group with parameters alike, none of which another layer has too.

    Others, as a first layer without experts, stay.
    """
    layers = common.decoder_layers(model)
    uses = Counter(p for layer in layers for p in layer.parameters())
    shapes = [[(p.shape, p.dtype) for p in layer.parameters()] for layer in layers]
    group = max(shapes, key=lambda own: shapes.count(own) * sum(shape.numel() for shape, _ in own), default=None)
    return [
        layer
        for layer, own in zip(layers, shapes, strict=True)
        if own == group and all(uses[p] == 1 for p in layer.parameters())
    ]


def plan_within(budget, rest, layers, layer, head):
    """The plan that keeps most of `layers` decoder layers of `layer` bytes on the GPU, within `budget` bytes in all.

    head: bytes that a head takes more if it does not stream, None if it cannot stream. rest: bytes of all else, with a
    head that streams if it can. The head streams first: for the same bytes a layer is copied three times a step, the
    head once. Raises UserError with the least budget that works.
    """
    resident = rest + layers * layer
    least = min(resident, rest + SLOTS * layer + layers * layer // PAGES)
    if resident + (head or 0) <= budget:
        return Plan(0, False, resident + (head or 0))
    if resident <= budget:
        return Plan(0, True, resident)
    if least > budget:
        raise common.UserError(
            f"{budget / common.GIB:.2f} GiB of GPU memory are too few: at this --batch_size the model needs "
            f"{math.ceil(100 * least / common.GIB) / 100:.2f} with all streamed that can be (--memory_budget)"
        )
    more = (budget - least) // layer
    return Plan(layers - more, head is not None, least + more * layer)


def choose_plan(model, trained, batches, graphs, budget, memory, device):
    """The plan that fills the GPU up to `budget` bytes, CUDA's context and other programs' use included.

    What work needs beside weights is measured: a training step and an evaluation of `batches`, the largest that come,
    with the first layers only, up to the second that can stream, the others in host memory. CUDA takes more for
    `graphs` graphs. Then PyTorch is kept from taking more than is left to it.
    """
    if device.type != "cuda":
        return Plan(0, False)
    layers, alike, output = common.decoder_layers(model), layers_alike(model), model.get_output_embeddings()
    can_stream = can_pass(model) and output.weight.nbytes > 2 * common.PIECE
    with first_layers(model, 1 + max((list(layers).index(layer) for layer in alike[:SLOTS]), default=0)) as few:
        placed = place(model, Plan(0, can_stream), device)
        most, outside, (forward, loss, backward) = measure(model, placed, trained, batches, memory, device)
        rest = most - common.size_in_bytes([*few.parameters(), *few.buffers()])
        for p in few.parameters():
            p.data = p.data.cpu()  # as the others, or they would be there twice when they come to their places
    torch.cuda.empty_cache()
    outside += graphs * len(layers) * GRAPH
    layer = common.size_in_bytes(alike[0].parameters()) if alike else 0
    rest += outside + GAPS
    # what is not one of the layers that can stream: others, buffers, optimizer state, and each further layer's input
    rest += common.size_in_bytes([*layers.parameters(), *layers.buffers()]) - len(alike) * layer
    rest += sum(4 * sum(common._as_matrix(p).shape) for p in trained.values())
    width = model.config.get_text_config().hidden_size
    rest += (len(layers) - len(few)) * batches[0].ids.numel() * width * output.weight.itemsize
    more = output.weight.nbytes - placed.head.buffers.nbytes if can_stream else None
    plan = plan_within(budget, rest, len(alike), layer, more)
    deeper = len(layers) / len(few)
    plan.work = [deeper * forward, loss, deeper * backward]
    outside += plan.streamed * layer // PAGES
    torch.cuda.set_per_process_memory_fraction(min(1.0, (budget - outside) / memory.total))
    return plan


def gather_once(model, trained, placed, batches, graphs, budget, memory, device):
    """Of several GPUs: let the decoder layers that fit into `budget` bytes of each stay gathered for backward.

    What a step and an evaluation of `batches`, the largest of one GPU, need without that is measured, as for a plan.
    """
    layers = common.decoder_layers(model)
    most, outside, _ = measure(model, placed, trained, batches, memory, device)
    outside += graphs * len(layers) * GRAPH_OF_RANKS
    layer = max(common.size_in_bytes(layer.parameters()) for layer in layers)
    least = max(common.of_all_ranks(most + outside + GAPS))
    kept = gathered_within(budget, least, len(layers), layer)
    common.keep_gathered(model, kept)
    if kept:
        common.ending.save_memory = f"a smaller --memory_budget or {common.ending.save_memory}"
    torch.cuda.set_per_process_memory_fraction(min(1.0, (budget - outside) / memory.total))
    print(
        f"{kept} of {len(layers)} decoder layers stay gathered between forward and backward; "
        f"predicted peak {(least + kept * layer) / common.GIB:.2f} GiB of {budget / common.GIB:.2f} on each GPU"
    )


def gathered_within(budget, least, layers, layer):
    """How many of `layers` decoder layers, of `layer` bytes, can stay gathered in `budget` bytes where `least` are used
    without. Raises UserError if these are too many.
    """
    if least > budget:
        raise common.UserError(
            f"{budget / common.GIB:.2f} GiB of each GPU's memory are too few: at this --batch_size the model needs "
            f"{math.ceil(100 * least / common.GIB) / 100:.2f} (--memory_budget), on more GPUs less of each"
        )
    return min(layers, (budget - least) // layer)


def measure(model, placed, trained, batches, memory, device):
    """(bytes that PyTorch held at most, bytes of the GPU beside them, [forward, loss, backward] seconds) of work.

    The work, which moves no weights, is a training step and an evaluation of `batches`.
    """
    train, evaluation = batches
    optimizer = common.Adafactor([p for p in trained.values() if p.is_cuda], lr=0.0)  # moves nothing
    handles = update_in_backward(optimizer, {p: p for p in optimizer.group_of})
    memory.start("load")  # samples, then resets the allocator's peak
    with common.refuse_what_fails(model):
        seconds_of_work(model, placed.head, train.to(device))  # the first time kernels are loaded too
        seconds = seconds_of_work(model, placed.head, train.to(device))
        with torch.no_grad():
            common.target_log_probs(model, placed.head, evaluation.to(device), precision)
    placed.copies.settle()
    for handle in handles:
        handle.remove()
    memory.sample()
    free, total = torch.cuda.mem_get_info()
    return torch.cuda.max_memory_reserved(), total - free - torch.cuda.memory_reserved(), seconds


def seconds_of_work(model, head, batch):
    """[forward, loss, backward]: seconds that the GPU works on these parts of a step on the batch."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(4)]
    torch.cuda._sleep(2**28)  # 0.15 s, in which the host gets ahead: the GPU then never waits for it
    events[0].record()
    hidden = common.hidden_states(model, batch, precision)
    events[1].record()
    hidden.register_hook(lambda _: events[2].record())
    target_loss(head, hidden, batch.targets, batch.weights).backward()
    events[3].record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1000 for start, end in pairwise(events)]


def predicted_seconds(work, copies, share):
    """Seconds of a step: in each part the slower of the GPU's work, on `share` of the largest batch, and the copies."""
    return sum(max(share * a, b) for a, b in zip(work, copies, strict=True))


@contextmanager
def first_layers(model, count):
    """In this context the model has its first `count` decoder layers only; yields them."""
    layers = common.decoder_layers(model)
    owner, name = next(
        (module, name) for module in model.modules() for name, child in module.named_children() if child is layers
    )
    config, few = model.config.get_text_config(), torch.nn.ModuleList(list(layers)[:count])
    setattr(owner, name, few)
    config.num_hidden_layers = len(few)
    try:
        yield few
    finally:
        setattr(owner, name, layers)
        config.num_hidden_layers = len(layers)


def check_host_memory(name, budget):
    """Refuse, before anything is loaded, a model whose bf16 weights cannot be in the GPU's `budget` bytes and the host.

    Of the budget half a GiB, CUDA's context, and the slots hold none of the weights. Files in bf16 are read as they are
    needed; those of another type are converted first, all in host memory.
    """
    model, stored = common.empty_model(name, torch.bfloat16)
    size, free = common.size_in_bytes(model.parameters()), common.free_host_memory()
    if stored != torch.bfloat16:
        kind = f"not stored in bf16 but as {stored or 'an unknown type'}"
        common.need_host_memory(size, f"{name} is {kind}: to convert it")
        return
    slots = SLOTS * common.size_in_bytes(common.decoder_layers(model)[-1].parameters())
    if size - max(0, budget - 2**29 - slots) > free:
        raise common.UserError(
            f"{name} takes {size / common.GIB:.1f} GiB in bf16: {budget / common.GIB:.1f} GiB of the GPU and "
            f"{free / common.GIB:.1f} of free host memory are too little; close other programs, or take a smaller model"
        )


# ---------------------------------------------------------------------------------------------------------------------
# What keeps the GPU busy


def leave_out_masks(model, longest):
    """Let attention know by itself that it is causal: with the padding on the right no mask is needed.

    transformers makes a mask in each forward pass, and for it looks at the positions on the host: the GPU would wait. A
    model with a window of fewer than `longest` tokens gets them all, in one layout: transformers would leave out some
    and expand others, but not while a graph is captured, which would then need code that `warm_up` has not compiled.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    config = model.config.get_text_config()
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    if config._attn_implementation == "sdpa":
        name = "sdpa_without_mask" if all(w is None or w >= longest for w in windows) else "sdpa_with_mask"
        AttentionInterface.register(name, sdpa_attention_forward)
        if name == "sdpa_with_mask":
            AttentionMaskInterface.register(
                name, lambda **how: sdpa_mask(**how | {"allow_is_causal_skip": False}).contiguous()
            )
        model.set_attn_implementation(name)


def compile_layers(model, backend="inductor"):
    """Compile what lies between the matrix products of each decoder layer: norms, rotations, activation functions.

    The products stay out, so that each weight's gradient comes, is used and is released by itself. A layer compiled as
    a whole hands over all of its gradients together, 0.4 GiB in an 8B model.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(common.cache_folder() / "compiled"))  # survives a reboot
    for layer in common.decoder_layers(model):
        for module in layer.modules():
            if any(p.ndim > 1 for p in module.parameters(recurse=False)):
                module.forward = torch.compiler.disable(module.forward)
        layer.forward = torch.compile(layer.forward, dynamic=True, backend=backend)


class Graphs:
    """`function(batch)` -> tensor, replayed as CUDA graphs: one launch instead of thousands.

    One graph for each shape of ids, captured when its first batch comes; by then what `function` needs must be compiled
    and loaded (`warm_up`). A batch of fewer than `rows` rows is filled up. The list of targets is padded to a multiple
    of 128, of the most expected or seen so far, and a graph captured anew when a batch has more of them. All graphs
    share `pool`: one runs after the other, so that together they need no more memory than the largest.
    """

    def __init__(self, function, pool, rows=0):
        self.function, self.pool, self.rows, self.graphs, self.targets = function, pool, rows, {}, {}

    def expect(self, rows, length, targets):
        """Make room for a batch [rows, length] with so many targets; return the shape of its graph.

        To capture anew takes as long as two steps on two H200s. And the padding changes the last bits of the result: a
        run that goes on expects what it saw before.
        """
        shape = max(rows, self.rows), length
        self.targets[shape] = max(self.targets.get(shape, 0), -(-targets // 128) * 128)
        return shape

    def __call__(self, batch):
        count, shape = len(batch.targets), self.expect(*batch.ids.shape, len(batch.targets))
        if shape not in self.graphs or len(self.graphs[shape][1].targets) < self.targets[shape]:
            self.graphs.pop(shape, None)  # its memory first
            self.graphs[shape] = self._capture(common.pad_batch(batch, self.rows, self.targets[shape]))
        graph, inputs, result = self.graphs[shape]
        batch = common.pad_batch(batch, self.rows, len(inputs.targets))
        for name in ("ids", "positions", "targets", "weights"):
            getattr(inputs, name).copy_(getattr(batch, name))
        graph.replay()
        return result[:count].clone() if result.ndim else result.clone()  # the next graph overwrites the pool

    def _capture(self, inputs):
        graph = torch.cuda.CUDAGraph()
        gc.disable()  # objects of CUDA, or locked host memory, that are freed meanwhile can end the capture
        # thread_local: NCCL's own thread looks at the device meanwhile
        try:
            with (
                advise_no_compile(),
                torch.cuda.graph(
                    graph, pool=self.pool, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"
                ),
            ):
                return graph, inputs, self.function(inputs)
        finally:
            gc.enable()


@contextmanager
def advise_no_compile():
    """Turn what compiling and capturing raise, in many libraries, into a UserError that says how to do without."""
    try:
        yield
    except (torch.OutOfMemoryError, common.UserError):
        raise
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        if isinstance(error.__context__, torch.OutOfMemoryError):  # of a capture, whose end then fails too
            raise error.__context__ from None
        if "out of memory" in reason[0]:
            raise torch.OutOfMemoryError(reason[0]) from error
        raise common.UserError(
            f"a step of this model cannot be compiled or captured as a CUDA graph ({reason[0]}): run it with "
            "--no_compile (after a first checkpoint, with --resume --no_compile)"
        ) from error


@contextmanager
def learning_rate_zero(optimizer):
    """Steps in this context move nothing; at its end learning rates and state are as at the start of training."""
    rate = float(optimizer.param_groups[0]["lr"])
    common.set_learning_rate(optimizer, 0.0)
    try:
        yield
    finally:
        common.set_learning_rate(optimizer, rate)
        optimizer.reset()


def warm_up(step, optimizer, rows, lengths, device):
    """Compile and load what steps on batches [rows, length] need, by one of each at learning rate 0, the longest first.

    So a GPU that is too small for the longest batch says so here, before anything was trained.
    """
    with learning_rate_zero(optimizer), advise_no_compile():
        for length in sorted(lengths, reverse=True):
            ids = torch.zeros(rows, length, dtype=torch.int64)
            labels = torch.full_like(ids, common.IGNORE)
            labels[:, -1] = 0
            batch = common.Batch.of(ids, labels, tokens=ids.numel())
            # more than 128 targets, as most batches have
            step(common.pad_batch(batch, rows, max(256, -(-rows // 128) * 128)).to(device))


# ---------------------------------------------------------------------------------------------------------------------
# Checks


def rounds_stochastically(optimizer, device):
    """Whether the optimizer's update really rounds up and down: a step of 0.026 ulp moves some 105 of 4,096 weights."""
    weights = torch.nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16, device=device))
    weights.grad = torch.ones_like(weights)
    group = optimizer.param_groups[0]
    common.Adafactor([weights], 1e-4, group["beta2"], group["rounding"], fused=optimizer.fused).step()
    return 0 < (weights != 1).sum().item() < 500


def check_techniques(model, head, trained, optimizer, batch, on_host):
    """Refuse to train unless each technique is really active, by one step at learning rate 0; leaves all as it was.

    on_host: whether the input embeddings are to be in host memory.
    """
    problems, fired, forwards = [], dict.fromkeys(trained, 0), []

    def after_update(name, p):
        fired[name] += 1
        if p.grad is not None:
            problems.append(f"the gradient of {name} outlives its update")

    handles = [
        decoder_layer.register_forward_pre_hook(lambda *_: forwards.append(1))
        for decoder_layer in common.decoder_layers(model)[:1]
    ]
    handles += [
        p.register_post_accumulate_grad_hook(lambda p, name=name: after_update(name, p)) for name, p in trained.items()
    ]
    with common.refuse_what_fails(model), learning_rate_zero(optimizer):
        loss = training_loss(model, head, batch)
        loss.backward()
    for handle in handles:
        handle.remove()

    if rounds_stochastically(optimizer, loss.device) != (optimizer.param_groups[0]["rounding"] == "stochastic"):
        problems.append("stochastic rounding is off, or on in spite of --nostround")
    if len(forwards) != 2:
        problems.append(f"gradient checkpointing is off: a layer ran {len(forwards)} times instead of twice")
    if wrong := [name for name, count in fired.items() if count != 1]:
        problems.append(f"{wrong[0]} was updated {fired[wrong[0]]} times in one step instead of once")
    if wrong := [name for name, p in trained.items() if p.dtype != torch.bfloat16]:
        problems.append(f"{wrong[0]} is {trained[wrong[0]].dtype} instead of bf16")
    if wrong := [name for name, p in model.named_parameters() if p.grad is not None]:
        problems.append(f"{wrong[0]} keeps a gradient")
    if "LinearLogProbs" not in _names_in_graph(loss):
        problems.append("linear cross entropy is off")
    if on_host and model.get_input_embeddings().weight.is_cuda:
        problems.append("untrained embeddings are on the GPU")
    if wrong := [name for name, p in trained.items() if common.ranks() > 1 and not common.is_sharded(p)]:
        problems.append(f"{wrong[0]} is not sharded")
    if problems:
        raise common.UserError(f"{type(model).__name__} cannot be trained in low memory: {problems[0]}")


def _names_in_graph(loss):
    """Names of the autograd nodes of the loss and of the three steps before it."""
    nodes, names = [loss.grad_fn], []
    for _ in range(4):
        names += [node.name() for node in nodes]
        nodes = [parent for node in nodes for parent, _ in node.next_functions if parent is not None]
    return " ".join(names)


# ---------------------------------------------------------------------------------------------------------------------
# The run


def print_plan(plan, placed, depth, budget, share):
    """Print what was chosen for the GPU's memory, before the first step of a model with `depth` layers.

    share: tokens of a mean training batch in those of the largest; 0 if nothing is trained.
    """
    words = [f"{depth - plan.streamed} of {depth} decoder layers on the GPU"]
    if plan.streamed:
        words += [f"{plan.streamed} streamed through {SLOTS} slots"]
    if plan.head_streams:
        words += ["the head streamed"]
    words = [", ".join(words), f"predicted peak {plan.peak / common.GIB:.2f} GiB of {budget / common.GIB:.2f}"]
    if share:
        copies = seconds_of_copies(placed.layers, placed.head)
        words += [f"about {predicted_seconds(plan.work, copies, share):.3f} s of the GPU a step"]
        words[-1] += f", copies alone {sum(copies):.3f}" * (plan.streamed > 0)
    print("; ".join(words))


def parse(argv):
    parser = common.argument_parser(
        "finetune_lowmem", __doc__.splitlines()[0], batch_size=8, lr=1e-4, demo_lr=6e-4, log_every=400
    )
    parser.add("--nostround", action="store_true", help="round to nearest instead of stochastically: the ablation")
    parser.add("--no_compile", action="store_true", help="run the model as it is: no torch.compile, no CUDA graphs")
    parser.add(
        "--memory_budget",
        type=common.above_zero,
        metavar="GIB",
        help="memory of each GPU that may be in use in all, context and evaluation included; on one GPU what does not "
        "fit streams from host memory, None: 98 %% of the card, and never more; on several, layers that fit stay "
        "gathered between forward and backward, None: none of them",
    )
    return common.parse_arguments(parser, argv)


def load(args, data, limit, memory, device):
    """(bf16 model with its weights in their places, {name: trained parameter}, Placed, tokens to evaluate at once)."""
    budget = 0.98 * memory.total
    if args.memory_budget:
        budget = min(budget, args.memory_budget * common.GIB)
    if common.ranks() == 1:
        check_host_memory(args.model, budget if device.type == "cuda" else 0)
    model = common.load_model(args.model, torch.bfloat16)
    trained = common.choose_trained(model, args.trained)
    leave_out_masks(model, longest=common.longest_sequence(data))
    evaluated = [s for row in data[1] for s in row.sequences]
    rows = -(-args.batch_size // common.ranks())
    largest = common.largest_batch(data[0] or evaluated, rows, PAD_TO, limit)
    # Streamed or gathered from other GPUs, an evaluation batch costs a copy of the model: more tokens then, where
    # training keeps much more of each
    lengths = [common.padded_lengths(sequences, PAD_TO, limit) for sequences in (data[0], evaluated)]
    tokens = max(1024, 2 * largest.ids.numel(), max(lengths[1]))
    common.checkpoint_activations(model)
    scored = -(-(tokens * common.ranks() // max(lengths[1])) // common.ranks())  # sequences, by the rank that has most
    batches = largest, common.largest_batch(evaluated, scored, PAD_TO, limit)
    graphs = sum(map(len, lengths)) if not args.no_compile and graphs_pay(*common.planned_work(args, data, 1024)) else 0
    if common.ranks() > 1:
        trained, placed = place_shares(model, trained, device)
        if args.memory_budget:
            gather_once(model, trained, placed, batches, graphs, int(budget), memory, device)
        return model, trained, placed, tokens
    plan = choose_plan(model, trained, batches, graphs, int(budget), memory, device)
    placed = place(model, plan, device)
    if device.type == "cuda" and plan.streamed < len(layers_alike(model)):
        smaller = f"--memory_budget {0.9 * budget / common.GIB:.1f} (so that more layers stream)"
        common.ending.save_memory = f"{smaller} or {common.ending.save_memory}"
    if device.type == "cuda":
        padded = [max(common.padded_lengths([s], PAD_TO, limit)) for s in data[0]]
        share = statistics.mean(padded) / max(padded) if padded else 0
        print_plan(plan, placed, len(common.decoder_layers(model)), budget, share)
    return model, trained, placed, tokens if plan.streamed else 1024


def graphs_pay(steps, evaluations):
    return steps + evaluations / 3 >= GRAPHS_PAY


def as_graphs(step, log_probs_of, model, optimizer, args, data, limit, eval_tokens, device):
    """(step, log_probs_of) as CUDA graphs, the layers compiled, as far as that pays; None if it does not pay at all."""
    steps, evaluations = common.planned_work(args, data, eval_tokens * common.ranks())
    if not graphs_pay(steps, evaluations):
        print(f"{steps} steps and {evaluations} evaluation batches are too few for CUDA graphs to pay: as --no_compile")
        return None
    if steps >= COMPILING_PAYS:
        compile_layers(model)
        log_probs_of = torch.compiler.set_stance("force_eager")(log_probs_of)  # not worth a second compilation
    print(f"{steps} steps as CUDA graphs, decoder layers {'compiled' if steps >= COMPILING_PAYS else 'not compiled'}")
    rows = -(-min(args.batch_size, len(data[0])) // common.ranks())
    warm_up(step, optimizer, rows, common.padded_lengths(data[0], PAD_TO, limit), device)
    pool = torch.cuda.graph_pool_handle()
    step, log_probs_of = Graphs(step, pool, rows=rows), Graphs(log_probs_of, pool)
    for chosen in common.evaluation_order(data[1], eval_tokens * common.ranks(), PAD_TO):
        log_probs_of.expect(*common.batch_shape([data[1][r].sequences[e] for r, e in chosen], PAD_TO, limit))
    return step, log_probs_of


def main(argv=None):
    args = parse(argv)
    if args.memory_budget and not torch.cuda.is_available():
        raise common.UserError("--memory_budget is for a GPU, and there is none here: leave it out")
    device = common.set_up(args)
    on_gpu = device.type == "cuda"
    if on_gpu:
        shrink_context()
    memory = common.Memory(device)

    # Data and model, the weights in bf16
    tokenizer, limit = common.load_tokenizer(args.model)
    data = common.load_data(args, tokenizer, limit)
    model, trained, placed, eval_tokens = load(args, data, limit, memory, device)
    head, batch = placed.head, common.small_batch(data, limit).to(device)
    losses = {
        "evaluation": head.mean_nll,
        "linear cross entropy": lambda hidden, targets: target_loss(head, hidden, targets, batch.weights),
    }
    common.check_causal(model, data, batch, precision)
    common.check_head(model, head, batch, precision, losses)

    # Gradient checkpointing; layers run again in backward in the same precision
    random = common.draws_random_numbers(model, batch, precision)  # then layers must draw the same again in backward
    again = lambda: (nullcontext(), placed.layers.again(precision()))  # noqa: E731
    common.checkpoint_activations(model, context_fn=again, preserve_rng_state=random)

    # Adafactor with stochastic rounding, run inside backward
    optimizer = common.Adafactor(
        trained.values(), lr=args.lr, rounding="nearest" if args.nostround else "stochastic", seed=args.seed
    )
    update_in_backward(optimizer, trained, after=placed.layers.send_home)
    check_techniques(model, head, trained, optimizer, batch, placed.embeddings_on_host)
    placed.copies.settle()  # a captured graph cannot wait for them
    gradients = ("largest gradient", max(common.size_in_bytes([p]) for p in trained.values()))

    def step(batch):
        loss = training_loss(model, head, batch)
        loss.backward()  # updates the weights too
        placed.copies.settle()
        return common.sum_over_ranks(loss.detach())

    def log_probs_of(batch):
        log_probs = common.target_log_probs(model, head, batch, precision)
        placed.copies.settle()
        return log_probs

    # On a GPU, compiled and as CUDA graphs
    graphs = None
    if on_gpu and random:
        print("the model draws random numbers (dropout): no CUDA graphs")
    elif on_gpu and not args.no_compile:
        graphs = as_graphs(step, log_probs_of, model, optimizer, args, data, limit, eval_tokens, device)
    if graphs:
        step, log_probs_of = graphs

    # Train
    run = common.Run(
        args,
        model=model,
        tokenizer=tokenizer,
        trained=trained,
        optimizer=optimizer,
        gradients=gradients,
        data=data,
        limit=limit,
        log_probs_of=log_probs_of,
        memory=memory,
        pad_to=PAD_TO if graphs else 8,
        eval_tokens=eval_tokens,
        at_home=placed.layers.at_home,
    )
    for size in run.expected_batches() if graphs else ():
        step.expect(*size)
    run.evaluate(epoch=0)
    for epoch in run.epochs():
        for batch in run.batches(epoch):
            loss = step(batch)
            run.after_step(loss, batch)
        run.evaluate(epoch)
    return run.finish()


if __name__ == "__main__":
    common.run_command(main)
