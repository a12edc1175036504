"""Stochastic rounding, and Adafactor with a relative step, in PyTorch; as Triton kernels in adafactor_kernels.py."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch

from lowmem import adafactor_kernels as kernels
from lowmem.adafactor_kernels import FLOOR, LEAST_RMS
from lowmem.training import parallel

UPDATE_BLOCK = 2**22  # elements: the update's temporaries are fp32 blocks of 16 MiB, never whole tensors


def stochastic_round(
    x: torch.Tensor, generator: torch.Generator | None = None, complement: bool = False
) -> torch.Tensor:
    """x, fp32, rounded to bf16 without bias: up or down with the probability that makes the mean equal x.

    A uniform 16-bit integer is added to the fp32 bit pattern and the low 16 bits are cleared, so that the magnitude
    rounds up with probability (low bits) / 2^16. Exact bf16 values never change; NaN and inf stay what they are.
    `generator` is of x's device. `complement`: add 2^16 - 1 less that integer, the other half of an antithetic pair
    (see `Adafactor`). Raises TypeError unless x is fp32.
    """
    if x.dtype != torch.float32:
        raise TypeError(f"stochastic_round takes an fp32 tensor, not {x.dtype}")
    # Four 16-bit numbers from each 64-bit draw: 2.5 times as fast as torch.randint on a CPU.
    noise = torch.empty(parallel.ceil_div(x.numel(), 4), dtype=torch.int64, device=x.device).random_(
        -(2**63), None, generator=generator
    )
    noise = noise.view(torch.int16)[: x.numel()].view(x.shape)
    noise = (noise.bitwise_not_() if complement else noise).int().add_(2**15)
    rounded = noise.add_(x.view(torch.int32)).bitwise_and_(-(2**16)).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).to(torch.bfloat16)  # NaN + noise could become inf or -0


def adafactor_update(
    p: torch.Tensor,  # [R, C], fp32 or bf16
    g: torch.Tensor,  # [R, C]
    row: torch.Tensor,  # fp32 [R]
    col: torch.Tensor,  # fp32 [C]
    lr: torch.Tensor | float,
    beta2: float,
    rounding: str,
    generator: torch.Generator | None = None,
    complement: bool = False,
    compensation: torch.Tensor | None = None,  # fp32 [R]
    rows_in_all: int | None = None,
    sum_all: Callable[[torch.Tensor], torch.Tensor] = lambda sums: sums,
) -> torch.Tensor:
    """One Adafactor step on weights p in place, with gradient g; all arithmetic in fp32. Whether it was finite: a bool
    tensor; where not, all stay as they were.

    row, col: running means of g² over columns and rows, updated in place (Shazeer & Stern 2018, eq. 4-6). The update
    g / sqrt(row ⊗ col / mean(row)) is rescaled to the norm lr * max(‖p‖, 1e-3 sqrt(n)), as LARS does (You et al. 2017),
    so that each step moves the tensor by a relative lr. rounding: "stochastic" or "nearest", for bf16 p; generator and
    complement are those of `stochastic_round`.
    compensation, of a bf16 vector (C = 1): what rounding has left out of p, updated in place. The step is taken from
    p + compensation, so that errors never add up (Kahan summation, for weights: Zamirai et al. 2020).
    rows_in_all, sum_all: where p is this rank's rows of a sharded tensor, how many that has, and the sum over ranks.
    """
    (here, cols), step = p.shape, max(1, UPDATE_BLOCK // p.shape[1])
    blocks, rows = [slice(start, start + step) for start in range(0, here, step)], rows_in_all or here

    row_mean, col_sum = torch.empty_like(row), torch.zeros_like(col)
    for block in blocks:
        square = g[block].float().square()
        row_mean[block] = square.mean(1)
        col_sum += square.sum(0)
    new_row = torch.lerp(row, row_mean + FLOOR, 1 - beta2)
    col_sum, row_total = sum_all(torch.cat([col_sum, new_row.sum()[None]])).split([cols, 1])
    new_col = torch.lerp(col, col_sum / rows + FLOOR, 1 - beta2)
    row_factor = (new_row / (row_total / rows)).rsqrt()[:, None]
    col_factor = new_col.rsqrt()

    def update(block):
        return (g[block].float() * row_factor[block]).mul_(col_factor)

    squares = p.new_zeros(2, dtype=torch.float32)
    for block in blocks:
        squares += torch.stack([update(block).square_().sum(), p[block].float().square().sum()])
    u_square, p_square = sum_all(squares)
    finite = (u_square + p_square + row_total[0] + new_col.sum()).isfinite()
    norm = p_square.sqrt().clamp(min=LEAST_RMS * math.sqrt(rows * cols))
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


class Adafactor(torch.optim.Optimizer):
    """`adafactor_update` as a torch optimizer for fp32 or bf16 weights of one device, or sharded by rows (FSDP2).

    `step()` updates every parameter with a gradient; `update(p)` one of them, for use inside the backward pass. Of more
    than two dimensions, all but the last count as rows. A vector counts as [n, 1], for which the factored mean *is* the
    unfactored one. With "stochastic" rounding

    - bf16 vectors are compensated, so that its noise does not add up in them: they are few numbers, and noise in a
      norm's gain does as much harm as noise in each weight behind it;
    - the noise of other bf16 tensors is antithetic (Hammersley & Morton 1956): of a tensor's updates each two in a row
      draw complements. Each by itself is rounded without bias, but steps of equal size and opposite sign are rounded
      alike and undo each other.

    `fused`: run the update as Triton kernels; None: on a GPU where Triton is there. `skipped`: int64 tensor on the
    device, the updates left out because they were not finite. Each group's "lr" becomes an fp32 scalar tensor on the
    device, so that schedules reach captured graphs: torch's write into it.
    """

    NUMBER_A_ROW = ("row", "compensation")  # state that is sharded as the rows of its parameter

    def __init__(
        self,
        params: Iterable[torch.nn.Parameter],
        lr: float,
        beta2: float = 0.99,
        rounding: str = "stochastic",
        seed: int = 0,
        fused: bool | None = None,
    ):
        if rounding not in ("stochastic", "nearest"):
            raise ValueError(f"rounding is 'stochastic' or 'nearest', not {rounding!r}")
        super().__init__(params, {"lr": lr, "beta2": beta2, "rounding": rounding})
        self.seed, device = seed, self.param_groups[0]["params"][0].device
        self.fused = kernels.triton is not None and device.type == "cuda" if fused is None else fused
        if not all(parallel.own_rows(p).is_contiguous() for group in self.param_groups for p in group["params"]):
            raise ValueError("Adafactor takes contiguous parameters")
        for group in self.param_groups:
            group["lr"] = torch.tensor(group["lr"], dtype=torch.float32, device=device)
        self.generator = torch.Generator(device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self.group_of = {p: group for group in self.param_groups for p in group["params"]}
        self.index_of = {p: index for index, p in enumerate(self.group_of)}
        self.reset()

    def reset(self) -> None:
        """Forget all state, and so start the rounding noise anew."""
        for p, group in self.group_of.items():
            own = parallel.own_rows(p)
            rows, cols = as_matrix(own).shape
            sizes = {"row": rows, "col": cols}
            if cols == 1 and p.dtype == torch.bfloat16 and group["rounding"] == "stochastic":
                sizes["compensation"] = rows
            self.state[p] = {name: own.new_zeros(n, dtype=torch.float32) for name, n in sizes.items()}
            self.state[p]["count"] = torch.zeros((), dtype=torch.int32, device=p.device if self.fused else "cpu")
        self.skipped.zero_()

    @torch.no_grad()
    def update(self, p: torch.nn.Parameter) -> None:
        """Update p with p.grad, without waiting for the device."""
        if p.numel() == 0:
            return
        group, state, index = self.group_of[p], self.state[p], self.index_of[p]
        own, grad = as_matrix(parallel.own_rows(p)), as_matrix(parallel.own_rows(p.grad).contiguous())
        args = [own, grad, state["row"], state["col"], group["lr"], group["beta2"]]
        shards = {"rows_in_all": p.numel() // own.shape[1]}
        if parallel.is_sharded(p):
            shards["sum_all"] = parallel.sum_over_ranks
        compensation, rounding = state.get("compensation"), group["rounding"]
        noise = {"update_index": state["count"], "tensor_index": index, "seed": self.seed, "skipped": self.skipped}
        if not self.fused:
            count = state["count"].add_(1).item()
            draw, complement = divmod(count, 2) if compensation is None else (count, False)
            key = (self.seed, index, draw, *([parallel.rank()] if parallel.rank() else []))
            self.generator.manual_seed(hash(key))  # of ints, the same in each process
            self.skipped += ~adafactor_update(*args, rounding, self.generator, bool(complement), compensation, **shards)
        elif own.shape[1] == 1:
            kernels.fused_vector_update(*args, **noise, compensation=compensation, **shards)
        elif own.numel():
            kernels.fused_adafactor_update(*args, rounding, **noise, **shards)
        else:  # of fewer rows than ranks this one has none, but joins in the sums
            state["count"] += 1
            self.skipped += ~adafactor_update(*args, "nearest", **shards)

    def step(self, closure: None = None) -> None:
        """Update every parameter that has a gradient."""
        if closure is not None:
            raise ValueError("Adafactor.step takes no closure")
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p)


def as_matrix(x: torch.Tensor) -> torch.Tensor:
    """x as [rows, its last dimension], or a vector as [n, 1]."""
    return x.view(-1, x.shape[-1] if x.ndim > 1 else 1)


@contextmanager
def learning_rate_zero(optimizer: Adafactor) -> Iterator[None]:
    """Steps in this context move nothing; at its end learning rates and state are as at the start of training."""
    rates = [group["lr"].clone() for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"].zero_()
    try:
        yield
    finally:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"].copy_(rate)
        optimizer.reset()
