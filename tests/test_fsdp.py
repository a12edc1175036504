"""Weights dealt out to several ranks, on a CPU with gloo: updates, what is gathered, whole runs that are those of one
process. python -m pytest tests/test_fsdp.py
"""

import json
import math
import signal
import threading

import pytest
import torch
from safetensors import safe_open
from support import runs
from support.commands import after_each_step
from support.damage import change_json
from support.quantized import QUANTIZED, quantized_pair
from support.runs import assert_same_run, both_scripts, difference, last_line, lines, log_likelihoods, timeless
from support.tiny import make_model
from support.training import truth

import finetune_base
from lowmem.adafactor import Adafactor
from lowmem.training import memory, parallel, weights
from lowmem.training.errors import UserError

# ---------------------------------------------------------------------------------------------------------------------
# The update of sharded tensors


def assert_same_in_fp32(a, b):
    """Two runs whose sums ran in another order saved the same weights; 10 steps of Adam move a tensor by 1e-2.

    Of 1,000 weights one may have gradients as small as Adam's eps, which turn rounding into steps: 1.2e-6 of a tensor's
    norm were seen with it, 3e-8 without.
    """
    assert difference(a, b) < 5e-6
    a, b = runs.weights(a / "model"), runs.weights(b / "model")
    for name, tensor in a.items():
        apart = (tensor.double() - b[name].double()).abs().flatten().sort().values
        others = apart[: len(apart) - math.ceil(len(apart) / 1000)]
        assert others.norm() < 1e-6 * tensor.double().norm(), name


@pytest.fixture
def as_ranks(monkeypatch):
    """as_ranks(count, work) -> [work() for each rank], in threads of which one runs at a time.

    There each tensor counts as sharded: a rank reads and writes its own rows alone.
    """

    def go(count, work):
        turn, ready, own = threading.Lock(), threading.Barrier(count), threading.local()
        sums, results, failed = {}, [None] * count, []

        def own_rows(tensor):
            return tensor.detach()[parallel.rows_of_rank(len(tensor))]

        def sum_over_ranks(tensor):
            sums[own.rank] = tensor.clone()
            turn.release()
            ready.wait()
            with turn:
                tensor.copy_(sum(sums[k] for k in range(count)))
            ready.wait()  # until all have read
            turn.acquire()
            return tensor

        def one(rank):
            own.rank = rank
            with turn:
                try:
                    results[rank] = work()
                except BaseException as error:
                    failed.append(error)
                    ready.abort()

        monkeypatch.setattr(parallel, "world_size", lambda: count)
        monkeypatch.setattr(parallel, "rank", lambda: own.rank)
        monkeypatch.setattr(parallel, "is_sharded", lambda _: True)
        monkeypatch.setattr(parallel, "own_rows", own_rows)
        monkeypatch.setattr(parallel, "sum_over_ranks", sum_over_ranks)
        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed, failed
        return results

    return go


def updated(start, gradients, lr):
    """(weights, state, skipped updates) after the kernels' updates of `start`, whose values stay; on ranks, this one's
    rows.
    """
    pytest.importorskip("triton")
    p = torch.nn.Parameter(start.clone())
    optimizer = Adafactor([p], lr=lr, fused=True)
    for p.grad in gradients:
        optimizer.update(p)
    return parallel.own_rows(p), optimizer.state[p], optimizer.skipped.item()


@pytest.mark.parametrize(
    ("shape", "count", "bad"),
    [((40, 30), 2, True), ((9, 700), 3, False), ((130, 5), 2, False), ((4, 30), 3, True), ((3, 8, 10), 2, False),
     ((41,), 3, False), ((4,), 3, True), ((1,), 2, False)],
    ids=str,
)  # fmt: skip
def test_kernels_on_shards_equal_fp64_truth(shape, count, bad, as_ranks):
    """Interpreted on a CPU. bad: one rank's gradient is not finite at the last step, which then moves nothing anywhere.

    Of 4 rows on 3 ranks the last has none.
    """
    torch.manual_seed(0)
    start, gradients = torch.randn(shape), [torch.randn(shape) * torch.rand(shape) for _ in range(3)]
    expected, state = start.double(), {}
    for g in gradients[: 2 if bad else 3]:
        expected = truth(expected, g, state, lr=1e-2)
    if bad:
        gradients[2].view(-1)[-1] = math.nan  # the last row's, which the last rank with any has
    results = as_ranks(count, lambda: updated(start, gradients, lr=1e-2))
    found = torch.cat([p for p, _, _ in results])
    assert (found.double() - expected).abs().max() < 2e-5  # as for a whole tensor
    assert all(skipped == bad and state["count"] == 3 for _, state, skipped in results)
    col = results[0][1]["col"]
    assert all(torch.equal(state["col"], col) for p, state, _ in results if len(p))
    assert all(torch.allclose(state["col"], col, rtol=1e-6) for _, state, _ in results)


@pytest.mark.parametrize("shape", [(40, 30), (41,)], ids=str)
def test_the_floor_of_a_step_is_that_of_the_whole_tensor(shape, as_ranks):
    """Weights of 0, whose norm counts as 1e-3 sqrt(n) of all n."""
    g = torch.randn(shape)
    moved = torch.cat([p for p, _, _ in as_ranks(2, lambda: updated(torch.zeros(shape), [g], lr=1e-2))])
    assert moved.norm().item() == pytest.approx(1e-2 * 1e-3 * math.sqrt(g.numel()), rel=1e-5)


@pytest.mark.parametrize("shape", [(32, 64), (64,)], ids=str)
def test_shards_of_equal_weights_round_differently(shape, as_ranks):
    """Two ranks whose shards are equal: with common noise the updated shards would be equal too."""
    ones = torch.ones(shape, dtype=torch.bfloat16)
    results = as_ranks(2, lambda: updated(ones, [ones], lr=2e-3))  # half an ulp of 2^-8 below 1
    first, second = (p for p, _, _ in results)
    # a half; 0.3 is 3.4 standard deviations of the 32 draws of a vector, 19 of the matrix's 1,024
    assert 0.2 < (first != second).float().mean() < 0.8
    assert {*first.flatten().tolist(), *second.flatten().tolist()} == {1.0, 1 - 2**-8}


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_the_eager_update_of_shards_is_that_of_the_whole(count, commands):
    """To fp32's error: before rounding, of tensors of all kinds, with fewer rows than ranks, with one bad gradient."""
    (code, out, err), *others = commands.run_ranks(count, "tests/support/update_of_shards")
    assert code == 0, err + "".join(e for _, _, e in others)
    errors = json.loads(out.splitlines()[-1])
    assert len(errors) == 8 * 2 * 2
    assert max(errors.values()) < 5e-5, errors  # seen: 2.4e-5 of the largest step, a few ulp of the weights


# ---------------------------------------------------------------------------------------------------------------------
# What is gathered, and when


def test_backward_gathers_each_part_once_before_it_is_needed(commands):
    """All parts of the layer that comes next are asked for while the one before is still at work; none stays."""
    (code, out, err), *others = commands.run_ranks(2, "tests/support/gathers_of_ranks")
    assert code == 0, err + "".join(e for _, _, e in others)
    found = json.loads(out.splitlines()[-1])

    def parts(k):
        return [f"layers.{k}{part}" for part in ("", ".mlp.gate_proj", ".mlp.up_proj", ".mlp.down_proj")]

    assert found["forward"] == [part for k in range(3) for part in parts(k)]
    first, *others = [(parts(k)[3], *parts(k)[:3]) for k in (2, 1, 0)]
    assert sorted(found["backward"][:4]) == sorted(first)  # nobody is before it
    assert found["backward"][4:] == [part for layer in others for part in layer]
    assert found["after forward"] == found["after backward"] == found["after reshard"] == []


@pytest.mark.parametrize("ranks", [1, 2])
def test_autocast_keeps_no_weights_of_several_ranks(ranks, monkeypatch):
    """Its bf16 copies would outlive the gathered weights that they are of, until forward ends."""
    monkeypatch.setattr(parallel, "world_size", lambda: ranks)
    with finetune_base.precision():
        assert torch.is_autocast_cache_enabled() == (ranks == 1)


# ---------------------------------------------------------------------------------------------------------------------
# What each rank loads


@pytest.fixture
def two_ranks(monkeypatch):
    """In this process, as one of two that need not wait for each other."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(parallel, "world_size", lambda: 2)
    monkeypatch.setattr(parallel, "wait_for_all", lambda: None)


def loaded(name):
    """{name: tensor} of a model's parameters and buffers, loaded for the baseline."""
    network = weights.load(str(name), torch.float32)
    assert network.dtype == torch.float32 or parallel.world_size() == 2
    return dict(network.named_parameters()), dict(network.named_buffers())


@pytest.mark.parametrize(("stored", "said"), [("float32", "bfloat16"), ("bfloat16", "bfloat16")])
def test_weights_are_loaded_as_they_are_stored_and_buffers_as_they_are_computed_with(stored, said, request, tmp_path):
    """Gemma's embedding scale, sqrt(48), is 6.928, and 6.938 in bf16. config.json may speak of another type."""
    dtype = getattr(torch, stored)
    make_model("gemma2", hidden_size=48).to(dtype).save_pretrained(tmp_path)
    change_json(tmp_path / "config.json", dtype=said)
    alone, buffers = loaded(tmp_path)
    request.getfixturevalue("two_ranks")
    mapped, computed = loaded(tmp_path)
    assert all(p.dtype == dtype and torch.equal(p.float(), alone[name]) for name, p in mapped.items())
    assert mapped.keys() == alone.keys()
    assert any("embed_scale" in name for name in buffers)
    assert buffers.keys() == computed.keys()
    assert all(torch.equal(buffer, computed[name]) for name, buffer in buffers.items())


def test_quantized_weights_are_made_whole_by_each_rank(request, tmp_path):
    make, quantize, settings = QUANTIZED["fp8, experts"]
    quantized, _ = quantized_pair(tmp_path, make(), quantize, settings)
    alone, _ = loaded(quantized)
    request.getfixturevalue("two_ranks")
    whole, _ = loaded(quantized)
    assert whole.keys() == alone.keys()
    assert all(torch.equal(p, alone[name]) for name, p in whole.items())


def test_experts_that_do_not_fit_the_host_are_refused(model_folder, two_ranks, monkeypatch):
    """Each of two processes merges 2 layers of 4 experts of 3 x 32 x 64, fp32: 393,216 bytes in all."""
    folder = model_folder("mixtral")
    monkeypatch.setattr(memory, "free_host_memory", lambda: 393_215)
    with pytest.raises(UserError, match="whose experts each of 2 processes merges, takes 0.0 GiB of host memory"):
        weights.load(folder, torch.float32)
    monkeypatch.setattr(memory, "free_host_memory", lambda: 393_216)
    assert weights.load(folder, torch.float32).dtype == torch.float32


# ---------------------------------------------------------------------------------------------------------------------
# Whole runs


def slow(*case):
    return pytest.param(*case, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("architecture", "optimizer", "trained"),
    [("llama", "Adam", "layers"), slow("llama-tied", "Adafactor", "all"), slow("gemma2", "SGD", "all")],
)
def test_the_baseline_is_that_of_one_process(architecture, optimizer, trained, run_ranks):
    """To fp32's error, over 10 steps, an uneven last batch of 4 rows and an epoch's end among them."""
    flags = ["--max_steps", 10, "--optimizer", optimizer, "--trained", trained]
    one, two = (run_ranks(n, "finetune_base", f"{n}", *flags, architecture=architecture) for n in (1, 2))
    assert_same_in_fp32(one, two)
    for a, b in zip(lines(one / "metrics.jsonl"), lines(two / "metrics.jsonl"), strict=True):
        assert a.keys() == b.keys()
        if "train_loss" in a:
            assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-5)
    for a, b in zip(lines(one / "eval_epoch0.jsonl"), lines(two / "eval_epoch0.jsonl"), strict=True):
        assert (a["ind"], a["label"], a["chars"]) == (b["ind"], b["label"], b["chars"])
    assert (log_likelihoods(one, 0) - log_likelihoods(two, 0)).abs().max() < 1e-4
    a, b = (json.loads((folder / "summary.json").read_text()) for folder in (one, two))
    for name in ("trained_params", "total_params", "steps", "rows", "target_tokens"):
        assert a[name] == b[name]
    assert (a["ranks"], b["ranks"]) == (1, 2)
    assert b["memory_of_rank"] in (0, 1)
    assert b["ledger_gib"]["gradients"] == pytest.approx(a["ledger_gib"]["gradients"] / 2, rel=1e-3)


# While a graph runs, NCCL_GRAPH_MIXING_SUPPORT=0 allows no communication outside of it: none in `after_step`
ALONE_IN_ITS_STEP = """
import torch.distributed as dist
from lowmem.training.run import Run
plain_after, plain_sum = Run.after_step, dist.all_reduce
def all_reduce(*args, **kwargs):
    raise AssertionError("communication beside a step's own")
def after_step(*args):
    dist.all_reduce = all_reduce
    plain_after(*args)
    dist.all_reduce = plain_sum
Run.after_step = after_step
"""
OTHER_NOISE = """
from lowmem import adafactor
plain = adafactor.Adafactor
adafactor.Adafactor = lambda *args, **how: plain(*args, **how | {"seed": 7})
"""


@pytest.mark.parametrize(
    ("architecture", "trained"),
    [("llama", "layers"), slow("llama-tied", "layers"), slow("llama-tied", "all"), slow("gemma2", "layers"),
     slow("mixtral", "layers")],
)  # fmt: skip
def test_low_memory_is_that_of_one_process_within_rounding_noise(architecture, trained, run_ranks):
    """As far from it as one process is from another that rounds with other noise; the first steps' losses agree.

    What a run leaves is the same, and a step's communication is all in what a graph would capture.
    """
    flags, how = ["--max_steps", 10, "--trained", trained], {"architecture": architecture}
    one = run_ranks(1, "finetune_lowmem", "1", *flags, **how)
    two = run_ranks(2, "finetune_lowmem", "2", *flags, **how, first=ALONE_IN_ITS_STEP)
    noise = difference(one, run_ranks(1, "finetune_lowmem", "other", *flags, **how, first=OTHER_NOISE))
    assert 0 < difference(one, two) < 1.5 * noise
    a, b = (
        [line["train_loss"] for line in lines(folder / "metrics.jsonl") if "train_loss" in line]
        for folder in (one, two)
    )
    assert a[0] == pytest.approx(b[0], rel=1e-3)  # bf16, of which two ranks add up halves
    assert a == pytest.approx(b, rel=2e-2)
    for part in (".", "model"):
        names = [{f.name for f in (folder / part).iterdir() if "events" not in f.name} for folder in (one, two)]
        assert names[0] == names[1]
    assert (one / "model" / "config.json").read_text() == (two / "model" / "config.json").read_text()


@pytest.mark.slow
def test_weights_of_another_type_are_converted_as_they_are_dealt_out(run_ranks, tokenizer, tmp_path):
    """And what is computed, as Gemma's embedding scale, is that of one process."""
    folder = tmp_path / "in bf16"
    make_model("gemma2", hidden_size=48).bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    one, two = (run_ranks(n, "finetune_base", f"{n}", "--max_steps", 2, "--model", folder) for n in (1, 2))
    assert (log_likelihoods(one, 0) - log_likelihoods(two, 0)).abs().max() < 1e-4
    assert_same_in_fp32(one, two)


@pytest.mark.slow
@both_scripts
def test_more_ranks_than_rows(script, run_ranks):
    flags = ["--batch_size", 1, "--train_rows", 3, "--epochs", 1, "--eval_rows", 1]
    flags += ["--nostround"] if script == "finetune_lowmem" else []
    one, three = (run_ranks(n, script, f"{n}", *flags) for n in (1, 3))
    if script == "finetune_base":
        assert_same_in_fp32(one, three)
    else:
        assert difference(one, three) < 5e-3
    assert (log_likelihoods(one, 0) - log_likelihoods(three, 0)).abs().max() < 1e-4


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


@pytest.mark.slow
def test_embeddings_and_head_go_on_too(run_ranks):
    flags = ["--schedule", "constant", "--trained", "all"]
    straight = run_ranks(2, "finetune_base", "straight", *flags, "--max_steps", 4)
    run_ranks(2, "finetune_base", "parts", *flags, "--max_steps", 2)
    parts = run_ranks(2, "finetune_base", "parts", *flags, "--max_steps", 4, "--resume")
    assert_same_run(straight, parts)


def assert_same_but_for_noise(straight, parts, other_noise):
    """A low-memory run that went on is no farther from a straight one than that is from one with other noise."""
    assert difference(straight, parts) < 1.5 * difference(straight, other_noise)
    losses = [[line["train_loss"] for line in timeless(run) if "train_loss" in line] for run in (straight, parts)]
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)


@pytest.mark.parametrize(
    ("script", "before", "after"),
    [("finetune_base", 2, 1), slow("finetune_base", 1, 2), slow("finetune_base", 2, 3), slow("finetune_lowmem", 2, 1),
     slow("finetune_lowmem", 1, 2), slow("finetune_lowmem", 2, 2)],
)  # fmt: skip
def test_a_checkpoint_goes_on_with_another_number_of_ranks(script, before, after, run_ranks):
    flags = ["--schedule", "constant", "--save_every", 3, *(["--lr", "1e-2"] if script == "finetune_lowmem" else [])]
    straight = run_ranks(after, script, "straight", *flags, "--max_steps", 10)
    parts = run_ranks(before, script, "parts", *flags, "--max_steps", 5)
    files = sorted((parts / "checkpoint" / "step-5").glob("*.safetensors"))
    assert len(files) == before
    for file in files:  # each rank's shard of each matrix is a half
        with safe_open(file, "pt") as tensors:
            name = next(name for name in tensors.keys() if name.endswith("down_proj.weight"))  # noqa: SIM118
            assert tensors.get_slice(name).get_shape() == [32 // before, 64]
    run_ranks(after, script, "parts", *flags, "--max_steps", 10, "--resume")
    if before == after:
        assert_same_run(straight, parts)
    elif script == "finetune_base":
        assert_same_in_fp32(straight, parts)
    else:
        other = run_ranks(after, script, "other", *flags, "--max_steps", 10, first=OTHER_NOISE)
        assert_same_but_for_noise(straight, parts, other)
    if before != after:
        assert [line["step"] for line in timeless(straight)] == [line["step"] for line in timeless(parts)]


KILLED_IN_STEP_8 = f"""
import os, signal
from lowmem.adafactor import Adafactor
from lowmem.training import parallel
plain_update = Adafactor.update
def update(optimizer, p):
    plain_update(optimizer, p)
    optimizer.left = getattr(optimizer, "left", -1) - 1
    if parallel.rank() == 5 and optimizer.left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
Adafactor.update = update
{after_each_step("run.optimizer.left = 5 if step == 7 else -1")}
"""


@pytest.mark.slow
def test_of_eight_ranks_one_is_killed_within_a_step_and_four_go_on(run_ranks, commands, argv, tmp_path):
    """After five updates of step 8, of which nothing is saved. One line says what has happened."""
    flags = ["--batch_size", 8, "--max_steps", 12, "--save_every", 5, "--lr", "1e-2", "--schedule", "constant"]
    ended = commands.run_ranks(8, "finetune_lowmem", *argv("parts", *flags), first=KILLED_IN_STEP_8)
    assert [code for code, _, _ in ended] == [2] * 5 + [-signal.SIGKILL] + [2] * 2
    said = "error: another process of this run has ended or cannot be reached; the same command with --resume goes on"
    assert last_line(ended[0][2]) == f"{said} from step 5"
    assert [(out, err) for _, out, err in ended[1:]] == [("", "")] * 7
    assert lines(tmp_path / "parts" / "metrics.jsonl")[-1]["step"] == 7
    parts = run_ranks(4, "finetune_lowmem", "parts", *flags, "--resume")
    straight = run_ranks(4, "finetune_lowmem", "straight", *flags)
    assert [line["step"] for line in timeless(straight)] == [line["step"] for line in timeless(parts)]
    assert_same_but_for_noise(straight, parts, run_ranks(4, "finetune_lowmem", "o", *flags, first=OTHER_NOISE))


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_experts_go_on_with_another_number_of_ranks(before, after, run_ranks):
    """Their weights have three dimensions."""
    flags, how = ["--schedule", "constant", "--optimizer", "Adafactor"], {"architecture": "mixtral"}
    straight = run_ranks(after, "finetune_base", "straight", *flags, "--max_steps", 4, **how)
    run_ranks(before, "finetune_base", "parts", *flags, "--max_steps", 2, **how)
    parts = run_ranks(after, "finetune_base", "parts", *flags, "--max_steps", 4, "--resume", **how)
    assert_same_in_fp32(straight, parts)


@pytest.mark.slow
def test_what_differs_between_ranks(run_ranks, tmp_path):
    """Their random numbers, at the start and after --resume; the largest memory, which is reported."""
    code = "import os\nfrom lowmem.training import memory, parallel\nplain_sample = memory.Memory.sample\n"
    code += "def sample(taken):\n    found = plain_sample(taken)\n"
    code += "    taken.peaks[taken.phase]['device'] += os.environ['RANK'] == '1'\n    return found\n"
    code += "memory.Memory.sample = sample\n"
    code += after_each_step(f"open({str(tmp_path)!r} + f'/{{parallel.rank()}}', 'a').write(f'{{torch.rand(())}} ')")
    flags = ["--schedule", "constant"]
    folder = run_ranks(2, "finetune_lowmem", "r", *flags, "--max_steps", 2, first=code)
    run_ranks(2, "finetune_lowmem", "r", *flags, "--max_steps", 4, "--resume", first=code)
    drawn = [(tmp_path / str(rank)).read_text().split() for rank in range(2)]
    assert len({*drawn[0], *drawn[1]}) == 8
    assert json.loads((folder / "summary.json").read_text())["memory_of_rank"] == 1


@pytest.mark.slow
def test_skipped_updates_go_on_being_counted(run_ranks):
    fault = after_each_step("step == 1 and run.optimizer.skipped.add_(5)")
    run_ranks(2, "finetune_lowmem", "r", "--max_steps", 3, "--schedule", "constant", first=fault)
    folder = run_ranks(1, "finetune_lowmem", "r", "--max_steps", 4, "--schedule", "constant", "--resume")
    assert json.loads((folder / "summary.json").read_text())["skipped_updates"] == 5
