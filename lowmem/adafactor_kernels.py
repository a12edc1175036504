"""The Adafactor update of lowmem/adafactor.py as Triton kernels (Tillet et al. 2019).

The gradient is read three times, for means, norms and step, the weights for the last two, and written once: 12 bytes an
element in bf16. What one kernel hands to the next are sums over tiles, in a fixed order, so that a seed gives the same
weights each time; nothing is as large as the tensor, nothing waits for the host.
"""

import functools
import inspect
import math
from collections.abc import Callable
from types import SimpleNamespace

import torch

from lowmem.training import parallel

try:
    import triton
    import triton.language as tl
except ImportError:  # comes with PyTorch's builds for GPUs, and only a GPU's kernels need it
    triton, tl = None, SimpleNamespace(constexpr=None)

FLOOR = 1e-30  # eps1 of the Adafactor paper, added to the squared gradient's means
LEAST_RMS = 1e-3  # eps2 of the Adafactor paper: weights count as at least so large

# Tiles, and how many of their programs a multiprocessor holds at a time (registers: 72, 128): the best on an H200
SUMS_TILE, NORMS_TILE, STEP_TILE = (64, 64), (16, 256), (1, 1024)
SUMS_AT_A_TIME, NORMS_AT_A_TIME = 7, 4

# numbers that differ from tensor to tensor: not worth a compilation each
_NOT_SPECIALIZED = {
    "strips", "row_blocks", "blocks", "tiles", "row_tiles", "col_tiles", "first", "tensor_index", "rank", "seed",
}  # fmt: skip


def kernel(function):
    """`function` as a Triton kernel; None without Triton."""
    if triton is None:
        return None
    names = inspect.signature(function).parameters
    return triton.jit(function, do_not_specialize=[name for name in names if name in _NOT_SPECIALIZED])


@kernel
def _square_sums(
    g, row_sums, col_sums, R, C, strips, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, DEPENDENT: tl.constexpr = False
):
    """Of g [R, C] squared, for each set of strips of HEIGHT rows and WIDTH columns: the sums along both.

    All programs' strips of one turn lie side by side, so that at the end the last rows are in the cache.
    """
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
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


@kernel
def _running_mean(sums, old, new, total, n, tiles, divisor, beta2_rest, tiny, block, BLOCK: tl.constexpr):
    """A block's new running means, from sums [tiles, n] of squares, and their total."""
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


@kernel
def _running_means(
    row_sums, col_sums, row, col, new_row, new_col, totals, update_index, R, C, rows_in_all, row_tiles, col_tiles,
    beta2_rest, tiny, first, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr = False,
):  # fmt: skip
    """The new running means of R rows and then of C columns over `rows_in_all` rows, and each block's total of them.

    A program for each block of means, those of the rows first; `first` is the block of program 0. Counts the update.
    """
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
    block, row_blocks = first + tl.program_id(0), tl.cdiv(R, BLOCK)
    if block == 0:
        tl.store(update_index, tl.load(update_index) + 1)
    if block < row_blocks:
        _running_mean(row_sums, row, new_row, totals + block, R, row_tiles, C, beta2_rest, tiny, block, BLOCK)
    else:
        block_of_cols = block - row_blocks
        _running_mean(
            col_sums, col, new_col, totals + block, C, col_tiles, rows_in_all, beta2_rest, tiny, block_of_cols, BLOCK
        )


@kernel
def _total(x, n):
    """Sum of the first n of x, in a fixed order."""
    total = tl.zeros([1024], tl.float32)
    for start in range(0, n, 1024):
        at = start + tl.arange(0, 1024)
        total += tl.load(x + at, mask=at < n, other=0.0)
    return tl.sum(total)


@kernel
def _norms(
    p, g, new_row, new_col, totals, u_squares, p_squares, R, C, rows_in_all, strips, row_blocks,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, DEPENDENT: tl.constexpr = False,
):  # fmt: skip
    """For each set of strips, the sums of squares of the update before its rescaling and of the weights.

    Backwards, from the rows that are in the cache.
    """
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
    i, j = tl.program_id(0), tl.program_id(1)
    cols = j * WIDTH + tl.arange(0, WIDTH)
    mean_row = _total(totals, row_blocks) / rows_in_all
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


@kernel
def _random_words(at, update_index, tensor_index, rank, seed):
    """128 random bits for each element of `at`, as 4 words (Philox 4x32-10, Salmon et al. 2011).

    Keyed by the seed and counted by place, update, tensor and which rank's rows of it: no two draws of a run share a
    counter.
    """
    zero = at * 0
    return tl.philox(seed, at, zero + update_index, zero + tensor_index, zero + rank)


@kernel
def _round_up_or_down(x, noise):
    """`stochastic_round` of fp32 x, with the last 16 bits of `noise`; still fp32."""
    rounded = ((x.to(tl.int32, bitcast=True) + (noise & 0xFFFF).to(tl.int32)) & -65536).to(tl.float32, bitcast=True)
    return tl.where(tl.abs(x) < float("inf"), rounded, x)


@kernel
def _scale(u_square, p_square, lr, least_norm, tiny):
    """What makes an update whose squares sum to u_square one of norm lr * max(sqrt(p_square), least_norm)."""
    norm = tl.load(lr) * tl.maximum(tl.sqrt(p_square), least_norm)
    return tl.where(u_square > tiny, norm / tl.sqrt(u_square), 0.0)


@kernel
def _step(
    p, g, row, col, new_row, new_col, totals, u_squares, p_squares, update_index, skipped, R, C, rows_in_all,
    row_blocks, blocks, tiles, lr, least_norm, tiny, tensor_index, rank, seed,
    STOCHASTIC: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, DEPENDENT: tl.constexpr = False,
):  # fmt: skip
    """Write weights and running means, if the update is finite, or else count it as skipped. Forwards again."""
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
    across = tl.cdiv(C, WIDTH)
    i, j = tl.program_id(0) // across, tl.program_id(0) % across
    cols = j * WIDTH + tl.arange(0, WIDTH)
    mean_row = _total(totals, row_blocks) / rows_in_all
    u_square, p_square = _total(u_squares, tiles), _total(p_squares, tiles)
    finite = tl.abs(u_square + p_square + _total(totals, blocks)) < float("inf")
    scale = _scale(u_square, p_square, lr, least_norm, tiny)
    if (i == 0) & (j == 0) & (finite == 0):
        tl.store(skipped, tl.load(skipped) + 1)
    if finite:
        new_col_here = tl.load(new_col + cols, mask=cols < C, other=1.0)
        if i == 0:
            tl.store(col + cols, new_col_here, mask=cols < C)
        col_factor = tl.rsqrt(new_col_here)
        if STOCHASTIC:  # one draw gives 16 bits to an element of each of the 8 strips, for two updates
            at = (i * HEIGHT + tl.arange(0, HEIGHT))[:, None] * C + cols[None, :]
            draw, flipped = tl.load(update_index) // 2, 0xFFFF * (tl.load(update_index) % 2)
            words = _random_words(at, draw, tensor_index, rank, seed)
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


@kernel
def _gradient_and_row(g, row, at, n, beta2_rest, tiny):
    """Of a vector, fp32: the gradient at `at`, 0 beyond n, and its new running mean, there not 0."""
    x_g = tl.load(g + at, mask=at < n, other=0.0).to(tl.float32)
    before = tl.load(row + at, mask=at < n, other=1.0)
    return x_g, before + beta2_rest * (x_g * x_g + tiny - before)


@kernel
def _vector_sums(p, g, row, sums, n, beta2_rest, tiny, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr = False):
    """Of a vector the sums of squares of gradient, update before its rescaling, and weights; by one program."""
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
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


@kernel
def _vector_step(
    p, g, row, col, compensation, sums, update_index, skipped, n, rows_in_all, lr, beta2_rest, least_norm, tiny,
    tensor_index, rank, seed,
    STOCHASTIC: tl.constexpr, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr = False,
):  # fmt: skip
    """The rest of a vector's update, by one program.

    A vector's col is the mean of its row, so that the two cancel in the factors: g / sqrt(row) has the same direction.
    """
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
    col_before, this_update = tl.load(col), tl.load(update_index) + 1
    u_square, p_square = tl.load(sums + 1), tl.load(sums + 2)
    new_col = col_before + beta2_rest * (tl.load(sums) / rows_in_all + tiny - col_before)
    scale = _scale(u_square, p_square, lr, least_norm, tiny)
    tl.store(update_index, this_update)
    if tl.abs(u_square + p_square + new_col) < float("inf"):
        tl.store(col, new_col)
        for start in range(0, n, BLOCK):
            at = start + tl.arange(0, BLOCK)
            x_g, new_row = _gradient_and_row(g, row, at, n, beta2_rest, tiny)
            x = tl.load(p + at, mask=at < n, other=0.0).to(tl.float32) - x_g * tl.rsqrt(new_row) * scale
            if STOCHASTIC:
                exact = x + tl.load(compensation + at, mask=at < n, other=0.0)
                x = _round_up_or_down(exact, _random_words(at, this_update, tensor_index, rank, seed)[0])
                tl.store(compensation + at, exact - x, mask=at < n)
            tl.store(p + at, x.to(p.dtype.element_ty), mask=at < n)
            tl.store(row + at, new_row, mask=at < n)
    else:
        tl.store(skipped, tl.load(skipped) + 1)


@functools.lru_cache
def _launching(device: torch.device) -> tuple[int, dict]:
    """Multiprocessors of a GPU and how a kernel is launched that waits for the one before; on a CPU, of an interpreter.

    From Hopper on a kernel is made ready while the one before it ends (programmatic dependent launch): 0.5 µs each.
    """
    if device.type == "cpu":
        return 1, {}
    gpu = torch.cuda.get_device_properties(device)
    dependent = torch.version.cuda is not None and gpu.major >= 9
    return gpu.multi_processor_count, {"DEPENDENT": True, "launch_pdl": True} if dependent else {}


def fused_vector_update(
    p: torch.Tensor,  # [R, 1], fp32 or bf16, contiguous, on a GPU
    g: torch.Tensor,  # like p
    row: torch.Tensor,  # fp32 [R]
    col: torch.Tensor,  # fp32 [1]
    lr: torch.Tensor,  # fp32 scalar
    beta2: float,
    *,
    update_index: torch.Tensor,
    tensor_index: int,
    seed: int,
    skipped: torch.Tensor,
    compensation: torch.Tensor | None,  # fp32 [R]; None where nothing is rounded stochastically
    rows_in_all: int,
    sum_all: Callable | None = None,
) -> None:
    """`adafactor_update` of a vector in two kernels; the rest as in `fused_adafactor_update`."""
    rows, stochastic = p.shape[0], compensation is not None  # or else no pointer to it is read
    block, sums = min(2**13, triton.next_power_of_2(max(1, rows))), torch.empty(3, dtype=torch.float32, device=p.device)
    _, launch = _launching(p.device)
    _vector_sums[(1,)](p, g, row, sums, rows, 1 - beta2, FLOOR, block, **launch)
    if sum_all:
        sum_all(sums)
    _vector_step[(1,)](
        p, g, row, col, compensation if stochastic else row, sums, update_index, skipped, rows, rows_in_all, lr,
        1 - beta2, LEAST_RMS * math.sqrt(rows_in_all), FLOOR, tensor_index, parallel.rank(), seed, stochastic, block,
        **launch,
    )  # fmt: skip


def _one_wave(rows: int, cols: int, tile: tuple[int, int], programs: int) -> tuple[tuple[int, int], int]:
    """Programs down and across a matrix, `programs` of them at most if it is not wider than those, and strips of each.

    Programs that a GPU holds at one time take as long as one: a few more would take as long as two.
    """
    tall, wide = parallel.ceil_div(rows, tile[0]), parallel.ceil_div(cols, tile[1])
    strips = parallel.ceil_div(tall, max(1, programs // wide))
    return (parallel.ceil_div(tall, strips), wide), strips


def fused_adafactor_update(
    p: torch.Tensor,  # [R, C], fp32 or bf16, contiguous, on a GPU
    g: torch.Tensor,  # like p
    row: torch.Tensor,  # fp32 [R]
    col: torch.Tensor,  # fp32 [C]
    lr: torch.Tensor,  # fp32 scalar
    beta2: float,
    rounding: str,
    *,
    update_index: torch.Tensor,
    tensor_index: int,
    seed: int,
    skipped: torch.Tensor,
    rows_in_all: int,
    sum_all: Callable | None = None,
) -> None:
    """`adafactor_update` of a matrix in four kernels. Equal inputs give equal bits.

    update_index: int32 scalar tensor, the updates of this tensor so far; tensor_index: which tensor it is. Both and
    `seed` key the rounding noise, of two updates at a time: the second has its complement.
    skipped: int64 scalar tensor, plus 1 where the update is not finite.
    rows_in_all, sum_all: as there; sum_all is None where p is not sharded. The sums that go over all ranks are all that
    a kernel needs of those of the one before.
    """
    rows, cols = p.shape
    stochastic = rounding == "stochastic" and p.dtype == torch.bfloat16
    multiprocessors, launch = _launching(p.device)
    (tall, wide), strips = _one_wave(rows, cols, SUMS_TILE, SUMS_AT_A_TIME * multiprocessors)
    norms, norms_strips = _one_wave(rows, cols, NORMS_TILE, NORMS_AT_A_TIME * multiprocessors)
    block = 32
    row_blocks, col_blocks, tiles = triton.cdiv(rows, block), triton.cdiv(cols, block), math.prod(norms)
    sizes = [wide * rows, tall * cols, rows, cols, row_blocks + col_blocks, tiles, tiles]
    sizes = [4 * parallel.ceil_div(n, 4) for n in sizes]  # 16 bytes, the alignment of wide loads
    scratch = torch.empty(sum(sizes), dtype=torch.float32, device=p.device).split(sizes)
    row_sums, col_sums, new_row, new_col, totals, u_squares, p_squares = scratch

    def running_means(first, blocks, col_sums, col_tiles):
        _running_means[(blocks,)](
            row_sums, col_sums, row, col, new_row, new_col, totals, update_index, rows, cols, rows_in_all, wide,
            col_tiles, 1 - beta2, FLOOR, first, block, **launch,
        )  # fmt: skip

    _square_sums[tall, wide](g, row_sums, col_sums, rows, cols, strips, *SUMS_TILE, **launch)
    if sum_all is None:
        running_means(0, row_blocks + col_blocks, col_sums, tall)
    else:
        running_means(0, row_blocks, col_sums, tall)
        here = col_sums[: tall * cols].view(tall, cols).sum(0)
        sums = sum_all(torch.cat([here, totals[:row_blocks].sum()[None]]))
        running_means(row_blocks, col_blocks, sums, 1)
        of_cols = totals[row_blocks : row_blocks + col_blocks].sum()
        totals, row_blocks, col_blocks = torch.stack([sums[-1], of_cols]), 1, 1
    _norms[norms](
        p, g, new_row, new_col, totals, u_squares, p_squares, rows, cols, rows_in_all, norms_strips, row_blocks,
        *NORMS_TILE, **launch,
    )  # fmt: skip
    if sum_all:
        sums = sum_all(torch.stack([u_squares[:tiles].sum(), p_squares[:tiles].sum()]))
        u_squares, p_squares, tiles = sums[:1], sums[1:], 1
    _step[(triton.cdiv(rows, 8 * STEP_TILE[0]) * triton.cdiv(cols, STEP_TILE[1]),)](
        p, g, row, col, new_row, new_col, totals, u_squares, p_squares, update_index, skipped, rows, cols, rows_in_all,
        row_blocks, row_blocks + col_blocks, tiles, lr, LEAST_RMS * math.sqrt(rows_in_all * cols), FLOOR, tensor_index,
        parallel.rank(), seed,
        stochastic, *STEP_TILE, **launch,
    )  # fmt: skip
