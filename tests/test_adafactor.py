"""Stochastic rounding and the Adafactor update, in PyTorch and as kernels, against fp64 truth.

python -m pytest tests/test_adafactor.py
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny import make_model
from support.training import as_lm, make_batch, truth
from torch.utils._python_dispatch import TorchDispatchMode

import finetune_lowmem
from lowmem import adafactor
from lowmem.adafactor import Adafactor, stochastic_round

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# (device, whether the update is the kernels'): on a CPU Triton's interpreter runs them
UPDATES = [
    pytest.param("cpu", False, id="cpu"),
    pytest.param("cpu", True, id="kernels-interpreted"),
    pytest.param("cuda", False, id="gpu-eager", marks=pytest.mark.gpu),
    pytest.param("cuda", True, id="gpu-kernels", marks=pytest.mark.gpu),
]


@pytest.fixture(autouse=True)
def _triton_where_kernels_run(request):
    if "fused" in request.fixturenames and request.getfixturevalue("fused"):
        pytest.importorskip("triton")


def generator(device, seed=0):
    return torch.Generator(device).manual_seed(seed)


def neighbours(x):
    """The bf16 values next to fp32 x, toward zero and away from it, as fp32."""
    toward = (x.view(torch.int32) & -(2**16)).view(torch.float32)
    return toward, (toward.view(torch.int32) + 2**16).view(torch.float32)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("ulps", [0.2, 0.05, 0.02, 0.01, 0.005, 0.001])
@pytest.mark.parametrize("sign", [1, -1])
def test_rounding_is_unbiased(device, ulps, sign):
    """Of n draws a share ulps moves one bf16 ulp. Bound: 5 standard deviations of a binomial (1 in 1.7 million runs)."""
    n, ulp = 10**6, 2.0**-7
    x = torch.full((n,), sign * (1 + ulps * ulp), dtype=torch.float32, device=device)
    exact = (x[0].item() * sign - 1) / ulp  # ulps after rounding to fp32, a grid of 2^-16 ulp
    moved = (stochastic_round(x, generator(device)).double() * sign - 1).mean().item() / ulp
    assert abs(moved - exact) < 5 * math.sqrt(exact * (1 - exact) / n)


@pytest.mark.parametrize("device", DEVICES)
def test_rounding_yields_only_the_two_neighbours_with_the_right_share(device):
    x = torch.randn(4000, device=device).mul(torch.logspace(-30, 30, 4000, device=device))
    toward, away = neighbours(x)
    draws = torch.stack([stochastic_round(x, generator(device, seed)).float() for seed in range(400)])
    assert ((draws == toward) | (draws == away)).all()
    share = (draws == away).double().mean(0)
    p = (x.view(torch.int32) & 0xFFFF).double() / 2**16
    z = (share - p) / (p * (1 - p) / 400).clamp(min=1e-9).sqrt()
    # sum of squares of 4,000 standard normals: 4000 ± 5 * sqrt(8000), a little more as binomials have other tails
    assert 4000 - 500 < z.square().sum().item() < 4000 + 500


@pytest.mark.parametrize("device", DEVICES)
def test_rounding_keeps_exact_values_nan_and_inf(device):
    exact = torch.randn(10000, device=device).bfloat16().float()
    assert torch.equal(stochastic_round(exact, generator(device)).float(), exact)
    bits = torch.tensor(
        [0x7F800000, 0xFF800000, 0x7FC00000, 0x7FFFFFFF, 0x7F800001, 0xFFFFFFFF, 0, 0x80000000], device=device
    )
    special = bits.to(torch.int32).view(torch.float32)
    for seed in range(50):
        result = stochastic_round(special, generator(device, seed)).float()
        assert result[:2].tolist() == [math.inf, -math.inf]
        assert result[2:6].isnan().all()
        assert result[6:].tolist() == [0, 0]
        assert math.copysign(1, result[7].item()) == -1


@given(st.floats(width=32, allow_nan=False, allow_infinity=False), st.integers(0, 2**32))
@settings(max_examples=300, deadline=None)
def test_rounding_of_any_float(value, seed):
    x = torch.tensor([value], dtype=torch.float32)
    toward, away = neighbours(x)
    assert stochastic_round(x, generator("cpu", seed)).float().item() in (toward.item(), away.item())


def test_rounding_is_seeded_takes_any_shape_and_refuses_other_types():
    x = torch.randn(3, 5, 7)
    first = stochastic_round(x, generator("cpu", 1))
    assert first.shape == x.shape
    assert first.dtype == torch.bfloat16
    assert torch.equal(first, stochastic_round(x, generator("cpu", 1)))
    assert not torch.equal(first, stochastic_round(x, generator("cpu", 2)))
    assert stochastic_round(x.transpose(0, 2)).shape == (7, 5, 3)
    assert stochastic_round(torch.zeros(0)).numel() == 0
    with pytest.raises(TypeError, match="fp32"):
        stochastic_round(x.double())


SHAPES = [(40, 30), (1, 50), (50, 1), (60,), (3, 8, 10), (70, 600), (17000,)]


@pytest.mark.parametrize(("device", "fused"), UPDATES)
@pytest.mark.parametrize(
    ("shape", "scale", "block"),
    [
        *((shape, 1e-3, 2**22) for shape in SHAPES),
        *((shape, scale, 2**22) for shape in [(40, 30), (60,)] for scale in (1e-8, 1e4)),
        *((shape, 1e-3, 64) for shape in SHAPES),
    ],
    ids=str,
)
def test_fp32_update_equals_fp64_truth(device, fused, shape, scale, block, monkeypatch):
    if fused and block != 2**22:
        pytest.skip("the kernels have tiles of their own")
    monkeypatch.setattr(adafactor, "UPDATE_BLOCK", max(block, math.prod(shape) // 50))
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(shape, device=device))
    expected, state = p.detach().double(), {}
    optimizer = Adafactor([p], lr=1e-2, fused=fused)
    for _ in range(5):
        p.grad = scale * torch.randn_like(p) * torch.rand_like(p)
        expected = truth(expected, p.grad, state, lr=1e-2)
        optimizer.step()
    # seen: 6e-6; a step is 1e-2
    assert (p.detach().double() - expected).abs().max() < 2e-5


@pytest.mark.parametrize(("device", "fused"), [u for u in UPDATES if u.id != "kernels-interpreted"])  # 0.2 s a draw
def test_bf16_update_has_the_truth_as_its_mean(device, fused):
    """Weights whose step is a small part of a bf16 ulp. Bound: 5 standard deviations of the mean, plus fp32 error."""
    torch.manual_seed(0)
    start, g = torch.randn(64, 32, device=device).bfloat16(), torch.randn(64, 32, device=device).bfloat16()
    expected = truth(start, g, {}, lr=1e-4) - start.double()
    p, total, draws = torch.nn.Parameter(start.clone()), torch.zeros_like(expected), 2000
    optimizer = Adafactor([p], lr=1e-4, fused=fused)
    for _ in range(draws):
        for name in ("row", "col"):
            optimizer.state[p][name].zero_()
        p.data.copy_(start)
        p.grad = g
        optimizer.step()
        total += p.detach().double() - start.double()
    toward, away = (x.double() for x in neighbours(start.float()))
    ulp = (away - toward).abs()
    sigma = (
        expected.abs() * ulp / draws
    ).sqrt()  # variance of a move of one ulp with probability |step| / ulp, at most
    assert ((total / draws - expected).abs() < 5 * sigma + 1e-3 * expected.abs() + 1e-8).all()


@pytest.mark.parametrize(("device", "fused"), UPDATES)
def test_small_steps_move_the_weights_only_with_stochastic_rounding(device, fused):
    """20 or 200 steps of 1e-4 relative, all one way: nearest rounding leaves every weight where it was."""
    moved = {}
    interpreted = fused and device == "cpu"  # whose cast from fp32 to bf16 truncates: nearest cannot be tried there
    steps = 20 if interpreted else 200
    for rounding in ("stochastic",) if interpreted else ("stochastic", "nearest"):
        p = torch.nn.Parameter(torch.full((8, 512), 1.0, dtype=torch.bfloat16, device=device))
        optimizer = Adafactor([p], lr=1e-4, rounding=rounding, fused=fused)
        for _ in range(steps):
            p.grad = torch.ones_like(p)
            optimizer.step()
        moved[rounding] = 1 - p.float().mean().item()
    assert moved.get("nearest", 0) == 0
    # a weight's path is ~0.5 or 5 moves of 2^-8 (below 1); standard deviation of the mean of 4,096: 4.4e-5 or 1.4e-4
    assert moved["stochastic"] == pytest.approx(1 - (1 - 1e-4) ** steps, abs=2e-4 if interpreted else 5e-4)


@pytest.mark.parametrize(("device", "fused"), UPDATES)
@pytest.mark.parametrize("shape", [(60,), (9000,)], ids=str)
def test_bf16_vectors_are_compensated(device, fused, shape):
    """100 steps (interpreted 30) of some 0.02 ulp: weights and what rounding left out of them are together the fp64 truth.

    The weights alone are that rounded stochastically: neighbours of it (noise does not add up), and in the mean equal
    to it. Bound: 5 standard deviations of a mean of draws with one of at most half an ulp, 2^-8 above 0.5.
    """
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.rand(shape, device=device).mul(0.4).add(0.55).bfloat16())
    expected, state = p.detach().double(), {}
    optimizer = Adafactor([p], lr=1e-4, fused=fused)
    for _ in range(30 if fused and device == "cpu" else 100):
        p.grad = torch.randn_like(p) + 0.3
        p.grad[p.grad == 0] = 1  # the truth has no floor
        expected = truth(expected, p.grad, state, lr=1e-4)
        optimizer.step()
    exact = p.detach().double() + optimizer.state[p]["compensation"].double().view(shape)
    assert (exact - expected).abs().max() < 2e-5  # seen: 6e-6, of ways up to 7e-3; a step's norm is the bf16 weights'
    toward, away = (x.double() for x in neighbours(exact.float()))
    assert torch.minimum((p.detach() - toward).abs(), (away - p.detach()).abs()).max() == 0
    assert abs((p.detach() - exact).mean()) < 5 * 2**-9 / math.sqrt(p.numel())


@pytest.mark.parametrize(("device", "fused"), UPDATES)
@pytest.mark.parametrize("bad", [math.nan, -math.inf, 1e30])
@pytest.mark.parametrize(
    ("dtype", "shape"), [(torch.float32, (20, 10)), (torch.bfloat16, (20, 10)), (torch.bfloat16, (20,))], ids=str
)
def test_a_non_finite_update_changes_nothing_and_is_counted(device, fused, bad, dtype, shape):
    torch.manual_seed(0)
    p, other = (torch.nn.Parameter(torch.randn(shape, device=device).to(dtype)) for _ in range(2))
    optimizer = Adafactor([p, other], lr=1e-2, fused=fused)
    for q in (p, other):
        q.grad = torch.randn_like(q)
    optimizer.step()
    weights, state, other_before = (
        p.detach().clone(),
        {k: v.clone() for k, v in optimizer.state[p].items()},
        other.detach().clone(),
    )
    p.grad.view(-1)[7] = bad
    optimizer.step()
    assert torch.equal(p, weights)
    assert all(torch.equal(optimizer.state[p][k], state[k]) for k in state if k != "count")
    assert not torch.equal(other, other_before)
    assert optimizer.skipped.item() == 1
    p.grad = torch.randn_like(p)
    optimizer.step()
    assert not torch.equal(p, weights)
    assert optimizer.skipped.item() == 1


@pytest.mark.parametrize(("device", "fused"), UPDATES)
def test_an_overflow_in_a_column_sum_alone_is_caught(device, fused):
    p = torch.nn.Parameter(torch.randn(400, 2, device=device))
    optimizer = Adafactor([p], lr=1e-2, fused=fused)
    # each square is finite in fp32, and so is each row's mean; a column's sum is not
    p.grad = torch.full((400, 2), 1e18, device=device)
    before = p.detach().clone()
    optimizer.step()
    assert torch.equal(p, before)
    assert optimizer.state[p]["col"].isfinite().all()
    assert optimizer.skipped.item() == 1


@pytest.mark.parametrize(("device", "fused"), UPDATES)
def test_zero_gradients_and_zero_weights(device, fused):
    p = torch.nn.Parameter(torch.randn(8, 8, device=device))
    before = p.detach().clone()
    optimizer = Adafactor([p], lr=1e-2, fused=fused)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.equal(p, before)
    assert optimizer.skipped.item() == 0
    zero = torch.nn.Parameter(torch.zeros(8, 8, device=device))
    optimizer = Adafactor([zero], lr=1e-2, fused=fused)
    zero.grad = torch.randn(8, 8, device=device)
    optimizer.step()
    assert zero.norm().item() == pytest.approx(1e-2 * 1e-3 * 8, rel=1e-5)
    for first, second in ((1.0, 1e-25), (1e-3, 1e-28)):  # a square that fp32 cannot hold once blew the weights up
        small = torch.nn.Parameter(torch.randn(64, 64, device=device))
        optimizer = Adafactor([small], lr=1e-4, fused=fused)
        for size in (first, second):
            before_small = small.detach().clone()
            small.grad = size * torch.randn(64, 64, device=device)
            optimizer.step()
            assert (small - before_small).norm() <= 1.001e-4 * before_small.norm()
    p.grad = torch.randn(8, 8, device=device)
    p.grad[3] = 0  # a row without gradient stays where it is
    before = p.detach().clone()
    Adafactor([p], lr=1e-2, fused=fused).step()
    assert not torch.equal(p, before)
    assert p.isfinite().all()


@pytest.mark.parametrize(("device", "fused"), UPDATES)
def test_state_is_fp32_rows_and_columns(device, fused):
    sizes = {"row": (30,), "col": (20,)}, {"row": (90,), "col": (1,), "compensation": (90,)}
    for shape, expected in zip([(30, 20), (90,)], sizes, strict=True):
        p = torch.nn.Parameter(torch.randn(shape, device=device).bfloat16())
        optimizer = Adafactor([p], lr=1e-2, fused=fused)
        p.grad = torch.randn_like(p)
        optimizer.step()
        state = dict(optimizer.state[p])
        assert state.pop("count").dtype == torch.int32  # of updates, which keys the rounding noise
        assert {k: tuple(v.shape) for k, v in state.items()} == expected
        assert all(v.dtype == torch.float32 and v.any() for v in state.values())
    vector = torch.ones(5, device=device)
    for rounding, dtype in (("nearest", torch.bfloat16), ("stochastic", torch.float32)):
        p = torch.nn.Parameter(vector.to(dtype))
        assert "compensation" not in Adafactor([p], lr=1e-2, rounding=rounding, fused=fused).state[p]


@pytest.mark.parametrize(("device", "fused"), UPDATES)
def test_rounding_noise_repeats_for_a_seed_and_for_nothing_else(device, fused):
    """Two like tensors, two steps, equal gradients: which of 1,280 weights move (some 33 each time)."""

    def moves(seed):
        params = [torch.nn.Parameter(torch.ones(16, 80, device=device).bfloat16()) for _ in range(2)]
        params += [torch.nn.Parameter(torch.ones(1280, device=device).bfloat16()) for _ in range(2)]
        optimizer, seen = Adafactor(params, lr=1e-4, seed=seed, fused=fused), []
        for _ in range(2):
            for p in params:
                p.data.fill_(1)
                p.grad = torch.ones_like(p)
            optimizer.step()
            seen += [(p != 1).flatten().tolist() for p in params]
        return seen

    first = moves(1)
    assert all(any(place) for place in first)
    assert all(a != b for number, a in enumerate(first) for b in first[:number])
    assert moves(1) == first
    assert all(a != b for a, b in zip(moves(2), first, strict=True))


@pytest.mark.parametrize(("device", "fused"), UPDATES)
def test_noise_of_two_updates_is_antithetic(device, fused):
    """Steps of s = 0.0256 ulp, all of one size: there and back is no move at all, for each of 16,384 weights.

    And of 8 steps of random signs the squared error of each weight's way is 8 s (1 - s) square ulps if roundings are
    independent; of a pair it is 2 s (1 - 2 s) where the signs agree and 0 where not: here 4 s (1 - 2 s) in the mean.
    Bound: 5 standard deviations of a mean of squares that are nearly all 0 or 1.
    """
    p = torch.nn.Parameter(torch.full((32, 512), 1.5, dtype=torch.bfloat16, device=device))
    s, ulp, start = 0.0256, 2.0**-7, p.detach().clone()
    optimizer = Adafactor([p], lr=s * ulp / 1.5, beta2=0.0, fused=fused)

    def way(*signs):
        p.data.copy_(start)
        for sign in signs:
            p.grad = sign.to(torch.bfloat16)
            optimizer.step()
        return (p.detach().double() - start.double()) / ulp

    torch.manual_seed(0)
    signs = torch.randint(0, 2, (8, 32, 512), device=device) * 2 - 1
    assert way(signs[0]).any()  # the first update has no other half
    assert not way(signs[1], -signs[1]).any()
    error = (way(*signs) + s * signs.double().sum(0)).square().mean().item()
    expected = 4 * s * (1 - 2 * s)
    assert abs(error - expected) < 5 * math.sqrt(expected / p.numel())


@pytest.mark.parametrize(("device", "fused"), UPDATES)
def test_no_two_rows_share_their_noise(device, fused):
    """64 rows of 512 equal weights, some 130 of each row moving: no two rows alike, nor two columns."""
    p = torch.nn.Parameter(torch.ones(64, 512, device=device).bfloat16())
    p.grad = torch.ones_like(p)
    Adafactor([p], lr=1e-3, fused=fused).step()
    moved = (p != 1).int()
    assert len(moved.unique(dim=0)) == 64
    assert len(moved.unique(dim=1).T) == 512


@pytest.mark.parametrize("fused", [False, True])
def test_odd_parameters(fused):
    with pytest.raises(ValueError, match="contiguous"):
        Adafactor([torch.nn.Parameter(torch.randn(4, 6).T)], lr=1e-2, fused=fused)
    empty = torch.nn.Parameter(torch.zeros(0))
    empty.grad = torch.zeros(0)
    Adafactor([empty], lr=1e-2, fused=fused).step()


def test_a_learning_rate_scheduler_works():
    p = torch.nn.Parameter(torch.ones(4, 4))
    optimizer = Adafactor([p], lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    for expected in (1e-2, 5e-3):
        before = p.detach().clone()
        p.grad = torch.randn(4, 4)
        optimizer.step()
        scheduler.step()
        assert ((p - before).norm() / before.norm()).item() == pytest.approx(expected, rel=1e-4)


def test_unknown_rounding_is_refused():
    with pytest.raises(ValueError, match="stocastic"):
        Adafactor([torch.nn.Parameter(torch.ones(2))], lr=1.0, rounding="stocastic")


class LargestTensor(TorchDispatchMode):
    """Bytes of the largest tensor that an operation has made."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        storages = [a.untyped_storage().data_ptr() for a in args if torch.is_tensor(a)]
        if torch.is_tensor(out) and out.untyped_storage().data_ptr() not in storages:
            self.bytes = max(self.bytes, out.numel() * out.element_size())
        return out


@pytest.mark.parametrize(("fused", "rows", "columns"), [(False, 14000, 7), (False, 100, 1000), (True, 100, 100)])
def test_no_temporary_is_as_large_as_the_tensor(fused, rows, columns, monkeypatch):
    """In PyTorch blocks; of kernels one sum for 64 rows or 64 columns, and the new means."""
    if fused:
        pytest.importorskip("triton")
    monkeypatch.setattr(adafactor, "UPDATE_BLOCK", 2000)
    p = torch.nn.Parameter(torch.randn(rows, columns).bfloat16())
    p.grad = torch.randn_like(p)
    optimizer = Adafactor([p], lr=1e-2, fused=fused)
    with LargestTensor() as largest:
        optimizer.step()
    sums = rows * (columns // 64 + 4) + columns * (rows // 64 + 4)
    assert 0 < largest.bytes <= 4 * (sums if fused else max(2000, rows)) < p.nbytes


# ---------------------------------------------------------------------------------------------------------------------
# In backward


@pytest.mark.parametrize("architecture", ["llama", "llama-tied"])
def test_update_in_backward_equals_the_plain_loop(architecture):
    """fp32 weights, so that nothing is rounded: hooks against backward-then-step, weights and state, tied ones included."""
    results = []
    for in_backward in (True, False):
        lm = as_lm(make_model(architecture), "all")
        optimizer = Adafactor(lm.trained.values(), lr=1e-2)
        if in_backward:
            finetune_lowmem.update_in_backward(optimizer, lm.trained)
        for step in range(5):
            finetune_lowmem.training_loss(lm, make_batch(step)).backward()
            if not in_backward:
                optimizer.step()
                optimizer.zero_grad()
            assert all(p.grad is None for p in lm.network.parameters())
        results.append((dict(lm.network.named_parameters()), {n: optimizer.state[p] for n, p in lm.trained.items()}))
    for name, p in results[0][0].items():
        assert torch.equal(p, results[1][0][name]), name
        assert all(torch.equal(v, results[1][1][name][k]) for k, v in results[0][1][name].items())


def test_a_tied_weight_is_updated_once_and_stays_tied():
    lm = as_lm(make_model("llama-tied"), "all")
    embeddings, updates = lm.network.get_input_embeddings(), []
    assert sum(p is embeddings.weight for p in lm.trained.values()) == 1
    optimizer = Adafactor(lm.trained.values(), lr=1e-2)
    optimizer.update, plain = lambda p: (updates.append(p), plain(p)), optimizer.update
    finetune_lowmem.update_in_backward(optimizer, lm.trained)
    finetune_lowmem.training_loss(lm, make_batch()).backward()
    assert sum(p is embeddings.weight for p in updates) == 1
    assert embeddings.weight is lm.network.get_output_embeddings().weight
