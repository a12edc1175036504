"""What of a model stays on the GPU and what streams from host memory, within a budget."""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass

import torch

from lowmem import streaming
from lowmem.adafactor import Adafactor, as_matrix
from lowmem.sharding import ShardedHead
from lowmem.training import attention, fsdp, memory, models, parallel, records, source
from lowmem.training.batches import Batch
from lowmem.training.data import Data
from lowmem.training.errors import UserError, refuse_what_fails
from lowmem.training.heads import HEAD_PIECE_BYTES, Head
from lowmem.training.models import CausalLM

CONTEXT_BYTES = 2**29  # CUDA's own part of a GPU
GRAPH_BYTES_PER_LAYER = 2**19  # that CUDA takes for a decoder layer in a graph: on an H100 0.44 MiB, less to evaluate
# that PyTorch's allocator cannot use, beyond those of the measured step: 0.03 to 0.06 GiB
ALLOCATOR_GAP_BYTES = 2**26
BYTES_PER_PAGE_ENTRY = 512  # of locked host memory, for which the GPU keeps one of its own: 8 for each page of 4 KiB


@dataclass
class Plan:
    """How many decoder layers stream and whether the head does; `peak`: predicted bytes of the GPU in use, or None."""

    streamed: int
    head_streams: bool
    peak: int | None = None


class Placement:
    """Where the weights of a model are, and what a script has to do about it; where nothing streams, nothing.

    `recomputation` is for gradient checkpointing, `send_home` for each updated parameter, `settled()` around what runs
    the model, or on a function that does, `all_at_home` for saving: the protocol of `StreamedLayers`.
    """

    def __init__(self, lm: CausalLM, layers: streaming.StreamedLayers, embeddings_on_host: bool):
        self.precision, self.layers, self.embeddings_on_host = lm.precision, layers, embeddings_on_host
        self.send_home, self.all_at_home = layers.send_home, layers.all_at_home

    def recomputation(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        """The contexts of a layer's forward pass and of its repetition in backward, for torch.utils.checkpoint."""
        return nullcontext(), self.layers.recomputation(self.precision())

    @contextmanager
    def settled(self) -> Iterator[None]:
        """At the end of this context all copies of streamed weights are done: a captured graph must not end before."""
        yield
        self.layers.copies.settle()


def require_one_gpu() -> None:
    """Raise UserError unless --memory_budget means something here."""
    if not torch.cuda.is_available():
        raise UserError("--memory_budget is for a GPU, and there is none here: leave it out")
    if parallel.world_size() > 1:
        raise UserError("--memory_budget is for one GPU: several share the model instead; leave it out")


def budget_bytes(memory_budget: float | None, device: torch.device) -> int:
    """Bytes of the GPU that the run may use in all: those of --memory_budget in GiB, at most 98 % of the card."""
    if device.type != "cuda":
        return 0
    card = int(0.98 * torch.cuda.mem_get_info()[1])
    return min(card, int(memory_budget * memory.GIB)) if memory_budget else card


def require_room(name: str, budget: int) -> None:
    """Refuse, before anything is loaded, a model whose bf16 weights cannot be in the GPU's `budget` bytes and the host.

    Of the budget CUDA's context and the slots hold none of the weights. Files in bf16 are read as they are needed;
    those of another type are converted first, all in host memory. Raises UserError.
    """
    if parallel.world_size() > 1:  # each reads and converts its part
        return
    network, stored = source.empty_model(name, torch.bfloat16)
    size, free = memory.size_in_bytes(network.parameters()), memory.free_host_memory()
    if stored != torch.bfloat16:
        kind = f"not stored in bf16 but as {stored or 'an unknown type'}"
        memory.require_host_memory(size, f"{name} is {kind}: to convert it")
        return
    slots = streaming.SLOTS * memory.size_in_bytes(models.decoder_layers(network)[-1].parameters())
    if size - max(0, budget - CONTEXT_BYTES - slots) > free:
        raise UserError(
            f"{name} takes {size / memory.GIB:.1f} GiB in bf16: {budget / memory.GIB:.1f} GiB of the GPU and "
            f"{free / memory.GIB:.1f} of free host memory are too little; close other programs, or take a smaller model"
        )


def make_plan(lm: CausalLM, data: Data, device: torch.device, budget: int, graphs: bool, measure: Callable) -> Plan:
    """What stays on the GPU: as much as fits into `budget` bytes. Without a GPU, and on several, nothing is planned.

    graphs: whether steps will be CUDA graphs. measure: `measure_one_step` with the run's loss and update.
    Raises UserError with the least budget that works.
    """
    models.checkpoint_activations(lm.network)  # or more would be measured; the script says how layers run again
    if device.type != "cuda" or parallel.world_size() > 1:
        size = memory.size_in_bytes(lm.network.parameters())
        records.say("weights", f"{size / memory.GIB:.2f} GiB in bf16")
        return Plan(0, False)
    plan = plan_placement(lm, data, graphs, budget, measure)
    where = [f"{len(lm.layers) - plan.streamed} of {len(lm.layers)} decoder layers on the GPU"]
    if plan.streamed:
        where.append(f"{plan.streamed} streamed through {streaming.SLOTS} slots")
    if plan.head_streams:
        where.append("the head streamed")
    records.say("weights", ", ".join(where))
    records.say("GPU memory", f"predicted peak {plan.peak / memory.GIB:.2f} GiB of {budget / memory.GIB:.2f}")
    return plan


def place(lm: CausalLM, data: Data, device: torch.device, plan: Plan) -> Placement:
    """The placement of the model's weights, as planned. Sets data.layout and data.eval_tokens."""
    alone = parallel.world_size() == 1
    placed = place_within(lm, plan, device) if alone else place_shards(lm, device)
    if plan.peak is None:  # else it was chosen when the plan was made
        attention.choose_layout(lm, data)
    if plan.streamed or not alone:
        data.eval_tokens = few_evaluations(data)
    return placed


def place_within(lm: CausalLM, plan: Plan, device: torch.device) -> Placement:
    """Put the weights where the plan says, streamed layers spread evenly over the depth, and set lm.head.

    May be called again as long as no layer has streamed.
    """
    copies, alike = streaming.CopyStreams(device), models.streamable_layers(lm.network)
    lm.head = Head(lm.network)
    vars(lm.head.layer).pop("forward", None)  # of an earlier placement
    if plan.head_streams:
        lm.head = streaming.StreamedHead(lm.network, copies, device)
    on_host = keep_on_host(lm.network, device, head=plan.head_streams)
    # each in the middle of its stretch: a layer that stays costs time at either end, where no copy hides it
    streamed = [alike[len(alike) * (2 * k + 1) // (2 * plan.streamed)] for k in range(plan.streamed)]
    for layer in lm.layers:
        for tensor in (*layer.buffers(), *([] if layer in streamed else layer.parameters())):
            tensor.data = tensor.data.to(device)
    return Placement(lm, streaming.StreamedLayers(streamed, copies, device), on_host)


def place_shards(lm: CausalLM, device: torch.device) -> Placement:
    """Deal the weights out to the devices of all ranks, and set lm.head and lm.trained.

    Each rank has its rows of what is trained, and of a frozen head. Embeddings stay on the host where they can.
    """
    fsdp.shard(lm, device, torch.bfloat16)
    for p in lm.network.parameters():
        if not parallel.is_sharded(p):
            p.data = p.data.to(torch.bfloat16)
    in_pieces = head_can_leave_gpu(lm)
    on_host = keep_on_host(lm.network, device, head=in_pieces)
    for tensor in lm.layers.buffers():
        tensor.data = tensor.data.to(device)
    lm.head = ShardedHead(lm.network, device) if in_pieces else Head(lm.network)
    return Placement(lm, streaming.StreamedLayers([], streaming.CopyStreams(device), device), on_host)


def keep_on_host(network: torch.nn.Module, device: torch.device, head: bool = False) -> bool:
    """Whether the embeddings stay in host memory, where a GPU reads them row by row; moves all else to `device`, but
    for the decoder layers.

    head: the head's weight is in host memory too. Otherwise embeddings tied to it go to the GPU, as do those where
    looking up is more than copying rows (Gemma scales them).
    """
    embeddings, output = network.get_input_embeddings(), network.get_output_embeddings()
    tied, layers = embeddings.weight is output.weight, models.decoder_layers(network)
    on_host = device.type == "cuda" and streaming.can_stay_on_host(embeddings) and (head or not tied)
    staying = {*layers.parameters(), *layers.buffers()}
    staying |= {embeddings.weight} if on_host else set()
    staying |= {output.weight} if head else set()
    for tensor in (*network.parameters(), *network.buffers()):
        if tensor not in staying and not parallel.is_sharded(tensor):
            tensor.data = tensor.data.to(device)
    vars(embeddings).pop("forward", None)
    if on_host:
        embeddings.weight.data = streaming.page_locked(embeddings.weight.data, device)
        embeddings.forward = lambda ids: streaming.rows_from_host(embeddings.weight, ids)
    return on_host


def few_evaluations(data: Data) -> int:
    """Tokens to evaluate at a time where each batch costs a copy of the model, streamed or gathered from other GPUs.

    More than otherwise: training keeps much more of each token.
    """
    if not data.train:
        return data.eval_tokens
    return max(data.eval_tokens, 2 * max(shape.rows * shape.length for shape in data.training_shapes()))


def head_can_leave_gpu(lm: CausalLM) -> bool:
    """Whether the head's weights need not be on the device as a whole."""
    embeddings, output = lm.network.get_input_embeddings(), Head(lm.network).layer
    return (
        not lm.head_stays
        and type(output) is torch.nn.Linear
        and not output.weight.requires_grad
        and (embeddings.weight is not output.weight or streaming.can_stay_on_host(embeddings))
    )


def fit_to_budget(budget: int, rest: int, layers: int, layer: int, head: int | None) -> Plan:
    """The plan that keeps most of `layers` decoder layers of `layer` bytes on the GPU, within `budget` bytes in all.

    head: bytes that a head takes more if it does not stream, None if it cannot stream. rest: bytes of all else, with a
    head that streams if it can. The head streams first: for the same bytes a layer is copied three times a step, the
    head once. Raises UserError with the least budget that works.
    """
    resident = rest + layers * layer
    least = min(resident, rest + streaming.SLOTS * layer + layers * layer // BYTES_PER_PAGE_ENTRY)
    if resident + (head or 0) <= budget:
        return Plan(0, False, resident + (head or 0))
    if resident <= budget:
        return Plan(0, True, resident)
    if least > budget:
        raise UserError(
            f"{budget / memory.GIB:.2f} GiB of GPU memory are too few: at this --batch_size and --max_length the model "
            f"needs {math.ceil(100 * least / memory.GIB) / 100:.2f} with all streamed that can be (--memory_budget)"
        )
    more = (budget - least) // layer
    return Plan(layers - more, head is not None, least + more * layer)


def plan_placement(lm: CausalLM, data: Data, graphs: bool, budget: int, measure: Callable) -> Plan:
    """The plan that fills the GPU up to `budget` bytes, CUDA's context and other programs' use included.

    What work needs beside weights is measured: a training step and an evaluation of the largest batches that come, with
    the first layers only, up to the second that can stream and one of each kind, the others in host memory. CUDA takes
    more for each graph. Then PyTorch is kept from taking more than is left to it. Sets data.layout.
    """
    network, layers, alike = lm.network, lm.layers, models.streamable_layers(lm.network)
    output = network.get_output_embeddings()
    can_stream = head_can_leave_gpu(lm) and output.weight.nbytes > 2 * HEAD_PIECE_BYTES
    count = models.layers_to_measure(network)
    with models.first_layers(network, count) as few:
        placed = place_within(lm, Plan(0, can_stream), torch.device("cuda"))
        attention.choose_layout(lm, data)
        batches = largest_batches(data)
        measured, outside = measure(lm, placed, batches)
        rest = measured - memory.size_in_bytes([*few.parameters(), *few.buffers()])
        for p in few.parameters():
            p.data = p.data.cpu()  # as the others, or they would be there twice when they come to their places
    torch.cuda.empty_cache()
    if graphs:
        lengths = len(data.training_shapes()) + len(data.evaluation_shapes())
        outside += lengths * len(layers) * GRAPH_BYTES_PER_LAYER
    layer = memory.size_in_bytes(alike[0].parameters()) if alike else 0
    rest += outside + ALLOCATOR_GAP_BYTES
    # what is not one of the layers that can stream: others, buffers, optimizer state, and each further layer's input
    rest += memory.size_in_bytes([*layers.parameters(), *layers.buffers()]) - len(alike) * layer
    rest += sum(4 * sum(as_matrix(p).shape) for p in lm.trained.values())
    width = network.config.get_text_config().hidden_size
    rest += (len(layers) - count) * batches[0].ids.numel() * width * output.weight.itemsize
    head = output.weight.nbytes - lm.head.buffers.nbytes if can_stream else None
    plan = fit_to_budget(budget, rest, len(alike), layer, head)
    outside += plan.streamed * layer // BYTES_PER_PAGE_ENTRY
    torch.cuda.set_per_process_memory_fraction(min(1.0, (budget - outside) / torch.cuda.mem_get_info()[1]))
    return plan


def measure_one_step(
    lm: CausalLM, placed: Placement, batches: tuple[Batch, Batch], training_loss: Callable, update_in_backward: Callable
) -> tuple[int, int]:
    """(bytes that PyTorch held at most, bytes of the GPU beside them) in a step and an evaluation of `batches`.

    training_loss: function (lm, batch) -> loss. update_in_backward: the script's. The step moves no weights.
    """
    train, evaluation = (batch.to("cuda") for batch in batches)
    optimizer = Adafactor([p for p in lm.trained.values() if p.is_cuda], lr=0.0)  # moves nothing
    handles = update_in_backward(optimizer, dict(enumerate(optimizer.group_of)))
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    with placed.settled(), refuse_what_fails(lm.network):
        for _ in range(2):  # the first time kernels are loaded too
            training_loss(lm, train).backward()
        with torch.no_grad():
            lm.score_targets(evaluation)
    for handle in handles:
        handle.remove()
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return torch.cuda.max_memory_reserved(), total - free - torch.cuda.memory_reserved()


def largest_batches(data: Data) -> tuple[Batch, Batch]:
    """The largest training batch and the largest evaluation batch, of a run that streams, as zeros.

    Where nothing is trained, the start-up checks' step is all that there is of training.
    """
    evaluated = copy(data)
    evaluated.eval_tokens = few_evaluations(data)
    evaluation = evaluated.largest(evaluated.evaluation_shapes())
    if not data.train:
        return data.small(), evaluation
    return data.largest(data.training_shapes()), evaluation
