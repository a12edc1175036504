"""What keeps the GPU busy: steps as CUDA graphs, compiled layers, no attention masks; and a small CUDA context."""

import ctypes
import gc
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress

import torch

from lowmem import sharding
from lowmem.adafactor import Adafactor, learning_rate_zero
from lowmem.training import demo, models, parallel, records
from lowmem.training.batches import IGNORE, Batch, Data, pad_batch
from lowmem.training.errors import UserError
from lowmem.training.models import CausalLM
from lowmem.training.parallel import ceil_div

GRAPHS_PAY_STEPS = 65  # or 195 evaluation batches: graphs of a 1B model take 9 s on an H100, and save 0.14 s a step
COMPILING_PAYS_STEPS = 8000  # on an H100 it takes 34 s at the start, and saves 4.3 ms a step of a 1B model
LENGTH_MULTIPLE = 32  # tokens: few lengths, few graphs
TARGETS_MULTIPLE = 128
STACK_BYTES = 256  # of a GPU's thread


def prepare_process(device: torch.device) -> None:
    """Make CUDA take less of the GPU for itself, for the whole process: 0.55 GiB of an H100 instead of 0.76."""
    if device.type != "cuda":
        return
    sharding.shrink_nccl()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:1")  # 4 MiB instead of 32, twice for each thread and stream
    torch.autograd.set_multithreading_enabled(False)  # backward on this thread, with its workspace
    torch.cuda.set_stream(torch.cuda.Stream())  # graphs cannot be captured on the default stream: one other for all
    # Local memory is set aside for all threads that the GPU can hold, 2,048 x 132 on an H100, at 1,024 bytes each. CUDA
    # enlarges it by itself for a kernel that needs more.
    with suppress(OSError):
        ctypes.CDLL("libcuda.so.1").cuCtxSetLimit(0, ctypes.c_size_t(STACK_BYTES))  # 0: CU_LIMIT_STACK_SIZE


def leave_out_masks(network: torch.nn.Module, longest: int) -> None:
    """Let attention know by itself that it is causal: with the padding on the right no mask is needed.

    transformers makes a mask in each forward pass, and for it looks at the positions on the host: the GPU would wait. A
    model with a window of fewer than `longest` tokens gets them all, in one layout: transformers would leave out some
    and expand others, but not while a graph is captured, which would then need code that `warm_up` has not compiled.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    config = network.config.get_text_config()
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    if config._attn_implementation == "sdpa":
        name = "sdpa_without_mask" if all(w is None or w >= longest for w in windows) else "sdpa_with_mask"
        AttentionInterface.register(name, AttentionInterface()["sdpa"])
        if name == "sdpa_with_mask":
            mask = AttentionMaskInterface()["sdpa"]
            AttentionMaskInterface.register(
                name, lambda **how: mask(**how | {"allow_is_causal_skip": False}).contiguous()
            )
        network.set_attn_implementation(name)


def compile_layers(network: torch.nn.Module, backend: str = "inductor") -> None:
    """Compile what lies between the matrix products of each decoder layer: norms, rotations, activation functions.

    The products stay out, so that each weight's gradient comes, is used and is released by itself. A layer compiled as
    a whole hands over all of its gradients together, 0.4 GiB in an 8B model.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(demo.cache_folder() / "compiled"))  # survives a reboot
    for layer in models.decoder_layers(network):
        for module in layer.modules():
            if any(p.ndim > 1 for p in module.parameters(recurse=False)):
                module.forward = torch.compiler.disable(module.forward)
        layer.forward = torch.compile(layer.forward, dynamic=True, backend=backend)


def choose_kernels(args, data: Data, device: torch.device) -> tuple[int, bool]:
    """(how many CUDA graphs the run captures, 0 where kernels are launched one by one; whether layers are compiled).

    Chooses what pays at the run's length, and sets data.multiple where that is graphs, so that lengths are few. A
    resumed run counts what is done too: it makes the same choice again, and goes on with the same kernels.
    """
    if device.type != "cuda":
        return 0, False
    steps = data.planned_steps(args)
    evaluated = (args.epochs + 1) * sum(len(s.ids) for s in data.scored)  # tokens
    evaluations = evaluated // (data.eval_tokens * parallel.world_size())
    if args.no_compile or steps + evaluations / 3 < GRAPHS_PAY_STEPS:
        records.say("kernels", "one by one" if args.no_compile else "one by one: too few steps for CUDA graphs to pay")
        return 0, False
    data.multiple, compiled = LENGTH_MULTIPLE, steps >= COMPILING_PAYS_STEPS
    records.say("kernels", f"as CUDA graphs, decoder layers {'compiled' if compiled else 'not compiled'}")
    return len(data.lengths(data.train)) + len(data.lengths(data.scored)), compiled


def no_graphs(data: Data) -> int:
    """0 graphs after all, where the model draws random numbers: each replay would draw the same."""
    data.multiple = Data.multiple
    records.say("kernels", "one by one: the model draws random numbers (dropout)")
    return 0


def as_graphs(
    step: Callable, log_probs: Callable, lm: CausalLM, optimizer: Adafactor, compiled: bool, data: Data
) -> tuple["Graphs", "Graphs"]:
    """(step, log_probs), functions of a `Batch`, as CUDA graphs."""
    if compiled:
        compile_layers(lm.network)
        log_probs = torch.compiler.set_stance("force_eager")(log_probs)  # not worth a second compilation
    warm_up(step, optimizer, data.rows_per_rank, data.lengths(data.train))
    pool = torch.cuda.graph_pool_handle()
    step, log_probs = Graphs(step, pool, rows=data.rows_per_rank), Graphs(log_probs, pool)
    for chosen in data.evaluation_order():
        log_probs.reserve(*data.shape([data.scored[at] for at in chosen]))
    return step, log_probs


class Graphs:
    """`function(batch)` -> tensor, replayed as CUDA graphs: one launch instead of thousands.

    One graph for each shape of ids, captured when its first batch comes; by then what `function` needs must be compiled
    and loaded (`warm_up`). A batch of fewer than `rows` rows is filled up. The list of targets is padded to a multiple
    of 128, of the most reserved or seen so far, and a graph captured anew when a batch has more of them. All graphs
    share `pool`: one runs after the other, so that together they need no more memory than the largest.
    """

    def __init__(self, function: Callable[[Batch], torch.Tensor], pool: tuple, rows: int = 0):
        self.function, self.pool, self.rows, self.graphs, self.targets = function, pool, rows, {}, {}

    def reserve(self, rows: int, length: int, targets: int) -> tuple[int, int]:
        """The shape of the graph for a batch [rows, length] with so many targets, for which room is made.

        To capture anew takes as long as two steps on two H200s. And the padding changes the last bits of the result: a
        run that goes on reserves what it saw before.
        """
        shape = max(rows, self.rows), length
        self.targets[shape] = max(self.targets.get(shape, 0), ceil_div(targets, TARGETS_MULTIPLE) * TARGETS_MULTIPLE)
        return shape

    def __call__(self, batch: Batch) -> torch.Tensor:
        count, shape = len(batch.targets), self.reserve(*batch.ids.shape, len(batch.targets))
        if shape not in self.graphs or len(self.graphs[shape][1].targets) < self.targets[shape]:
            self.graphs.pop(shape, None)  # its memory first
            self.graphs[shape] = self._capture(pad_batch(batch, self.rows, self.targets[shape]))
        graph, inputs, result = self.graphs[shape]
        for name in ("ids", "positions", "targets", "weights"):
            place, given = getattr(inputs, name), getattr(batch, name)
            place[: len(given)] = given
            place[len(given) :] = 0  # as `pad_batch` fills up
        graph.replay()
        return result[:count].clone() if result.ndim else result.clone()  # the next graph overwrites the pool

    def _capture(self, inputs):
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        # thread_local: NCCL's own thread looks at the device meanwhile
        capture = torch.cuda.graph(graph, pool=self.pool, stream=stream, capture_error_mode="thread_local")
        gc.disable()  # objects of CUDA, or locked host memory, that are freed meanwhile can end the capture
        try:
            with advise_no_compile(), capture:
                return graph, inputs, self.function(inputs)
        finally:
            gc.enable()


@contextmanager
def advise_no_compile() -> Iterator[None]:
    """Turn what compiling and capturing raise, in many libraries, into a UserError that says how to do without."""
    try:
        yield
    except (torch.OutOfMemoryError, UserError):
        raise
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        if isinstance(error.__context__, torch.OutOfMemoryError):  # of a capture, whose end then fails too
            raise error.__context__ from None
        if "out of memory" in reason[0]:
            raise torch.OutOfMemoryError(reason[0]) from error
        raise UserError(
            f"a step of this model cannot be compiled or captured as a CUDA graph ({reason[0]}): take --no_compile"
        ) from error


def warm_up(step: Callable, optimizer: Adafactor, rows: int, lengths: Iterable[int]) -> None:
    """Compile and load what steps on batches [rows, length] need, by one of each at learning rate 0, the longest first.

    So a GPU that is too small for the longest batch says so here, before anything was trained.
    """
    with learning_rate_zero(optimizer), advise_no_compile():
        for length in sorted(lengths, reverse=True):
            ids = torch.zeros(rows, length, dtype=torch.int64)
            labels = torch.full_like(ids, IGNORE)
            labels[:, -1] = 0
            batch = Batch.of(ids, labels, tokens=ids.numel())
            # more than 128 targets, as most batches have
            targets = max(2 * TARGETS_MULTIPLE, ceil_div(rows, TARGETS_MULTIPLE) * TARGETS_MULTIPLE)
            step(pad_batch(batch, rows, targets).to("cuda"))
