"""What keeps the GPU busy: steps as CUDA graphs, compiled layers, no attention masks; and a small CUDA context."""

import ctypes
import functools
import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch

from lowmem import sharding
from lowmem.adafactor import Adafactor, learning_rate_zero
from lowmem.training import demo, models, parallel, records
from lowmem.training.batches import Batch, Shape, pad_batch
from lowmem.training.data import Data
from lowmem.training.errors import UserError
from lowmem.training.models import CausalLM
from lowmem.training.parallel import ceil_div

GRAPHS_PAY_STEPS = 65  # or 195 evaluation batches: graphs of a 1B model take 9 s on an H100, and save 0.14 s a step
COMPILING_PAYS_STEPS = 8000  # on an H100 it takes 34 s at the start, and saves 4.3 ms a step of a 1B model
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
    """Let attention know by itself that it is causal: rows that are padded on the right need no mask.

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
                module.forward = _not_compiled(module)
        layer.forward = _of_one_head_width(torch.compile(layer.forward, dynamic=True, backend=backend))


def _of_one_head_width(forward):
    """A compiled layer's `forward` that takes the rotations' width, a head's, as a constant: see `_not_compiled`."""

    @functools.wraps(forward)
    def call(*args, **kwargs):
        rotations = kwargs.get("position_embeddings")
        for rotation in rotations if isinstance(rotations, tuple) else ():
            torch._dynamo.mark_static(rotation, rotation.ndim - 1)
        return forward(*args, **kwargs)

    return call


def _not_compiled(module):
    """`module.forward` as a function that the compiler leaves alone, and after which it takes the width as a constant.

    Of a width that could be any it makes slower kernels, an 8B model's silu of 18 µs instead of 10 on an H200, and the
    cache hands them to models of other widths, with blocks for the first one's size.
    """
    forward, widths = module.forward, {n for p in module.parameters(recurse=False) for n in p.shape}

    @torch.compiler.disable
    @functools.wraps(forward)
    def call(*args, **kwargs):
        out = forward(*args, **kwargs)
        if isinstance(out, torch.Tensor) and out.shape[-1] in widths:  # a convolution's is a length
            torch._dynamo.mark_static(out, out.ndim - 1)
        return out

    return call


def choose_kernels(args, data: Data, device: torch.device) -> tuple[bool, bool]:
    """(whether steps run as CUDA graphs instead of kernels launched one by one; whether layers are compiled).

    Chooses what pays at the run's length, and has data.layout make few lengths where that is graphs. A resumed run
    counts what is done too: of the same length it makes the same choice again.
    """
    if device.type != "cuda":
        return False, False
    steps = data.planned_steps()
    evaluated = (args.epochs + 1) * sum(len(s.ids) for s in data.scored)  # tokens
    evaluations = evaluated // (data.eval_tokens * parallel.world_size())
    if args.no_compile or steps + evaluations / 3 < GRAPHS_PAY_STEPS:
        records.say("kernels", "one by one" if args.no_compile else "one by one: too few steps for CUDA graphs to pay")
        return False, False
    data.layout.few_lengths, compiled = True, steps >= COMPILING_PAYS_STEPS
    records.say("kernels", f"as CUDA graphs, decoder layers {'compiled' if compiled else 'not compiled'}")
    return True, compiled


def no_graphs(data: Data) -> bool:
    """False, after all, where the model draws random numbers: each replay of a graph would draw the same."""
    data.layout.few_lengths = False
    records.say("kernels", "one by one: the model draws random numbers (dropout)")
    return False


def as_graphs(
    step: Callable, score_targets: Callable, lm: CausalLM, optimizer: Adafactor, compiled: bool, data: Data
) -> tuple["Graphs", "Graphs"]:
    """(step, score_targets), functions of a `Batch`, as CUDA graphs."""
    if compiled:
        compile_layers(lm.network)
        score_targets = torch.compiler.set_stance("force_eager")(score_targets)  # not worth a second compilation
    train, evaluate = _lengths(data.training_shapes()), _lengths(data.evaluation_shapes())
    records.say("graphs", f"to train {train}, to evaluate {evaluate}")
    warm_up(step, optimizer, data)
    pool = torch.cuda.graph_pool_handle()
    step, score_targets = Graphs(step, pool), Graphs(score_targets, pool)
    for batch in data.evaluation_batches():
        score_targets.reserve(data.shape(batch))
    return step, score_targets


def _lengths(shapes):
    if len(shapes) < 2:
        return f"{shapes[0].length:,} tokens" if shapes else "none"
    return f"{len(shapes)} lengths, {shapes[-1].length:,} to {shapes[0].length:,} tokens"


class Graphs:
    """`function(batch)` -> tensor, replayed as CUDA graphs: one launch instead of thousands.

    One graph for each length, captured when its first batch comes; by then what `function` needs must be compiled and
    loaded (`warm_up`). Batches are filled up to the most rows, targets and row starts that were reserved for the length
    or seen so far, targets to a multiple of 128; a graph is captured anew when a batch has more. All graphs share
    `pool`: one runs after the other, so that together they need no more memory than the largest.
    """

    def __init__(self, function: Callable[[Batch], torch.Tensor], pool: tuple):
        self.function, self.pool, self.graphs, self.shapes = function, pool, {}, {}

    def reserve(self, shape: Shape) -> Shape:
        """The shape of the graph for such a batch, for which room is made.

        To capture anew takes as long as two steps on two H200s. And the padding changes the last bits of the result: a
        run that goes on reserves what it saw before.
        """
        shape = shape._replace(targets=ceil_div(shape.targets, TARGETS_MULTIPLE) * TARGETS_MULTIPLE)
        self.shapes[shape.length] = shape.with_room_for(self.shapes.get(shape.length, shape))
        return self.shapes[shape.length]

    def __call__(self, batch: Batch) -> torch.Tensor:
        count, shape = len(batch.targets), self.reserve(batch.shape)
        if shape.length not in self.graphs or self.graphs[shape.length][1].shape != shape:
            self.graphs.pop(shape.length, None)  # its memory first
            self.graphs[shape.length] = self._capture(pad_batch(batch, shape))
        graph, inputs, result = self.graphs[shape.length]
        places = inputs.tensors()
        del places["labels"]  # what a graph reads are `targets`
        for name, place in places.items():
            given = getattr(batch, name)
            place[: len(given)] = given
            place[len(given) :] = given[-1] if name == "row_starts" else 0  # as `pad_batch` fills up
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


def warm_up(step: Callable, optimizer: Adafactor, data: Data) -> None:
    """Compile and load what training steps need, by one of each length at learning rate 0, the longest first.

    So a GPU that is too small for the longest batch says so here, before anything was trained.
    """
    with learning_rate_zero(optimizer), advise_no_compile():
        for shape in data.training_shapes():
            # more than 128 targets, as most batches have
            targets = max(2 * TARGETS_MULTIPLE, ceil_div(shape.targets, TARGETS_MULTIPLE) * TARGETS_MULTIPLE)
            step(pad_batch(data.layout.blank(shape), shape._replace(targets=targets)).to("cuda"))
