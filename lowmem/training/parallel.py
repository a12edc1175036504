"""The processes of torchrun: which this is, sums over all, tensors that are sharded over them."""

import gc
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from datetime import timedelta

import torch
import torch.distributed as dist

from lowmem.training.errors import UserError


def under_torchrun() -> bool:
    """Whether torchrun started this process, and others with it."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def world_size() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is; 0 is the one that prints and writes."""
    return dist.get_rank() if world_size() > 1 else 0


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether the tensor is a DTensor, of which each rank has its rows."""
    return hasattr(tensor, "to_local")


def own_rows(tensor: torch.Tensor) -> torch.Tensor:
    """Of a sharded tensor the rows of this rank, of another itself; detached."""
    tensor = tensor.detach()
    return tensor.to_local() if is_sharded(tensor) else tensor


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def rows_of_rank(count: int) -> slice:
    """The rows that this rank holds of a sharded tensor's `count`, as torch.chunk deals them."""
    each = ceil_div(count, world_size())
    return slice(min(rank() * each, count), min((rank() + 1) * each, count))


def deal_to_ranks(rows: list | torch.Tensor) -> list:
    """[each rank's rows]: every `world_size()`-th."""
    return [rows[k :: world_size()] for k in range(world_size())]


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, which becomes the sum of all ranks'. Waits for nothing on a GPU."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def wait_for_all() -> None:
    """Wait until all ranks have come here. Through host memory: CUDA need not have started."""
    sum_over_ranks(torch.zeros(()))


def gather_objects(value: object) -> list:
    """[each rank's value], of any type that pickle takes."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def gathered(tensor: torch.Tensor) -> torch.Tensor | None:
    """The whole tensor, in host memory, on rank 0; None on others. A tensor that is not sharded is whole."""
    whole = tensor.full_tensor() if is_sharded(tensor) else tensor
    return whole.detach().cpu() if rank() == 0 else None


def sharded_modules(network: torch.nn.Module) -> list:
    """The modules of FSDP2, each of which gathers its parameters by itself."""
    from torch.distributed.fsdp import FSDPModule

    return [module for module in network.modules() if isinstance(module, FSDPModule)]


def reshard(network: torch.nn.Module) -> None:
    """Let go of what a forward pass that no backward pass follows leaves gathered.

    What is gathered is a copy: a weight that is loaded or updated meanwhile would not reach it.
    """
    if world_size() > 1:
        for module in sharded_modules(network):
            module.reshard()


@contextmanager
def processes() -> Iterator[None]:
    """In this context the processes that torchrun started are one group; only rank 0 prints. Raises UserError."""
    if not under_torchrun():
        yield
        return
    on_gpu, place = torch.cuda.is_available(), int(os.environ["LOCAL_RANK"])
    if on_gpu and place >= (gpus := torch.cuda.device_count()):
        raise UserError(
            f"torchrun started {os.environ['LOCAL_WORLD_SIZE']} processes on this machine, which has {gpus} GPUs: "
            f"--nproc-per-node {gpus}"
        )
    # Two hours: others wait as long as rank 0 saves the model. torchrun ends them when one dies
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=timedelta(hours=2))
    with ExitStack() as silence:
        if rank():
            nowhere = silence.enter_context(open(os.devnull, "w"))
            silence.enter_context(redirect_stdout(nowhere))
            silence.enter_context(redirect_stderr(nowhere))
        print(f"{world_size()} processes, each with its part of what is trained")
        try:
            yield
        except SystemExit as ended:  # of all alike: --help, a run that is finished
            if ended.code:
                raise
    wait_for_all()
    gc.collect()  # graphs, which hold what they have captured of NCCL
    dist.destroy_process_group()
