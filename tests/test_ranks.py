"""Several ranks, on a CPU with gloo: the same runs as one process, and how they end. python -m pytest tests/test_ranks.py"""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from select import select
from types import SimpleNamespace

import psutil
import pytest
import torch
from commands import ROOT, after_each_step
from conftest import make_model
from safetensors import safe_open
from test_adafactor import truth
from test_cli import lines, weights
from test_faults import has_lines, timeless, wait_until
from test_saved_model import QUANTIZED, quantized_pair
from transformers import LlamaConfig, LlamaForCausalLM

import common
import finetune_base
import finetune_lowmem

both_scripts = pytest.mark.parametrize("script", ["finetune_base", "finetune_lowmem"])


@pytest.fixture
def run(tmp_path, model_folder, dataset_folder, commands):
    """run(ranks, script, name, *flags) -> its folder; all ranks end well, and those above 0 say nothing."""

    def go(ranks, script, name, *flags, architecture="llama", first=""):
        argv = ["--run-name", name, "--output_dir", tmp_path, "--model", model_folder(architecture)]
        argv += ["--dataset", dataset_folder, "--batch_size", 8, "--log_every", 1, "--lr", "1e-3", *flags]
        if ranks == 1:
            ended = [commands.run(script, *argv, first=first)]
        else:
            ended = commands.run_ranks(ranks, script, *argv, first=first)
        assert [code for code, _, _ in ended] == [0] * ranks, "\n".join(err[-2000:] for _, _, err in ended)
        assert ended[1:] == [(0, "", "")] * (ranks - 1)
        return tmp_path / name

    return go


def difference(a, b):
    """Largest over the saved tensors: norm of the difference over norm, in fp64."""
    a, b = weights(a / "model"), weights(b / "model")
    assert a.keys() == b.keys()
    assert all(a[name].dtype == b[name].dtype for name in a)
    return max(((a[name].double() - b[name].double()).norm() / a[name].double().norm()).item() for name in a)


def scores(folder, epoch):
    return torch.tensor([row["loglikelihoods"] for row in lines(folder / f"eval_epoch{epoch}.jsonl")])


# ---------------------------------------------------------------------------------------------------------------------
# The update of sharded tensors


def as_ranks(count, work, monkeypatch):
    """[work(rank) for each rank], in threads of which one runs at a time; sums over ranks are common's no more."""
    turn, ready, own = threading.Lock(), threading.Barrier(count), threading.local()
    sums, results, failed = {}, [None] * count, []

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
                results[rank] = work(rank)
            except BaseException as error:
                failed.append(error)
                ready.abort()
                raise

    monkeypatch.setattr(common, "sum_over_ranks", sum_over_ranks)
    monkeypatch.setattr(common, "rank", lambda: own.rank)
    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed
    return results


def update_kernels(p, state, g, lr, whole, dtype):
    """One update by the kernels of p [R, C], a rank's rows of `whole`, in place."""
    where = {"count": state["count"], "number": 0, "seed": 0, "skipped": state["skipped"], "whole": whole}
    args = [p, g, state["row"], state["col"], torch.tensor(lr), 0.99]
    if p.shape[1] == 1:
        common.fused_vector_update(
            *args, **where, compensation=state["compensation"] if dtype != torch.float32 else None
        )
    else:
        common.fused_adafactor_update(*args, "stochastic", **where)


def shards(x, count):
    each = -(-len(x) // count)
    return [x[k * each : (k + 1) * each].clone() for k in range(count)]


@pytest.mark.parametrize("bad", [False, True])
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("shape", [(40, 30), (9, 700), (130, 5), (4, 30), (41, 1), (4, 1)], ids=str)
def test_kernels_on_shards_equal_fp64_truth(shape, count, bad, monkeypatch):
    """Interpreted on a CPU. bad: one rank's gradient is not finite at the last step, which then moves nothing anywhere.

    Of 4 rows on 3 ranks the last has none.
    """
    pytest.importorskip("triton")
    torch.manual_seed(0)
    start, gradients = torch.randn(shape), [torch.randn(shape) * torch.rand(shape) for _ in range(3)]
    expected, state = start.double(), {}
    for g in gradients[: 2 if bad else 3]:
        if shape[1] == 1:  # the truth has vectors unfactored
            expected = truth(expected[:, 0], g[:, 0], state, lr=1e-2)[:, None]
        else:
            expected = truth(expected, g, state, lr=1e-2)
    if bad:
        gradients[2][-1, -1] = math.nan  # the last row's, which the last rank with any has

    def work(rank):
        p, state = shards(start, count)[rank], {"skipped": torch.zeros((), dtype=torch.int64)}
        state |= {"row": torch.zeros(len(p)), "col": torch.zeros(shape[1]), "count": torch.zeros((), dtype=torch.int32)}
        for g in gradients:
            update_kernels(p, state, shards(g, count)[rank], 1e-2, len(start), torch.float32)
        return p, state

    results = as_ranks(count, work, monkeypatch)
    found = torch.cat([p for p, _ in results])
    assert (found.double() - expected).abs().max() < 2e-5  # as for a whole tensor, in test_adafactor.py
    assert all(state["skipped"] == bad and state["count"] == 3 for _, state in results)
    col = results[0][1]["col"]
    by_kernels = [len(p) > 0 or shape[1] == 1 for p, _ in results]
    assert all(torch.equal(state["col"], col) for (_, state), same in zip(results, by_kernels, strict=True) if same)
    assert all(torch.allclose(state["col"], col, rtol=1e-6) for _, state in results)


@pytest.mark.parametrize("shape", [(40, 30), (41, 1)], ids=str)
def test_the_floor_of_a_step_is_that_of_the_whole_tensor(shape, monkeypatch):
    """Weights of 0, whose norm counts as 1e-3 sqrt(n) of all n."""
    pytest.importorskip("triton")
    g = torch.randn(shape)

    def work(rank):
        p, state = shards(torch.zeros(shape), 2)[rank], {"skipped": torch.zeros((), dtype=torch.int64)}
        state |= {"row": torch.zeros(len(p)), "col": torch.zeros(shape[1]), "count": torch.zeros((), dtype=torch.int32)}
        update_kernels(p, state, shards(g, 2)[rank], 1e-2, len(g), torch.float32)
        return p

    moved = torch.cat(as_ranks(2, work, monkeypatch)).norm().item()
    assert moved == pytest.approx(1e-2 * 1e-3 * math.sqrt(g.numel()), rel=1e-5)


@pytest.mark.parametrize("shape", [(32, 64), (64, 1)], ids=str)
def test_shards_of_equal_weights_round_differently(shape, monkeypatch):
    """Two ranks whose parts are equal: with common noise the updated parts would be equal too."""
    pytest.importorskip("triton")
    p, g = (torch.ones(shape, dtype=torch.bfloat16) for _ in range(2))

    def work(rank):
        part, state = shards(p, 2)[rank], {"skipped": torch.zeros((), dtype=torch.int64)}
        state |= {name: torch.zeros(n) for name, n in zip(("row", "col"), part.shape, strict=True)}
        state |= {"compensation": torch.zeros(len(part)), "count": torch.zeros((), dtype=torch.int32)}
        update_kernels(part, state, shards(g, 2)[rank], 2e-3, len(p), torch.bfloat16)  # half an ulp of 2^-8 below 1
        return part

    first, second = as_ranks(2, work, monkeypatch)
    # a half; 0.3 is 3.4 standard deviations of the 32 draws of a vector, 19 of the matrix's 1,024
    assert 0.2 < (first != second).float().mean() < 0.8
    assert {*first.flatten().tolist(), *second.flatten().tolist()} == {1.0, 1 - 2**-8}


@pytest.mark.parametrize("count", [2, 3])
def test_the_eager_update_of_shards_is_that_of_the_whole(count, commands):
    """To fp32's error: before rounding, of tensors of all kinds, with fewer rows than ranks, with one bad gradient."""
    (code, out, err), *others = commands.run_ranks(count, "tests/update_of_shards")
    assert code == 0, err + "".join(e for _, _, e in others)
    errors = json.loads(out.splitlines()[-1])
    assert len(errors) == 8 * 2 * 2
    assert max(errors.values()) < 5e-5, errors  # seen: 2.4e-5 of the largest step, a few ulp of the weights


# ---------------------------------------------------------------------------------------------------------------------
# What is gathered, and when


@pytest.fixture(scope="module")
def gathers(commands):
    """{layers that stay gathered: what tests/gathers_of_ranks.py prints of them}"""
    (code, out, err), *others = commands.run_ranks(2, "tests/gathers_of_ranks")
    assert code == 0, err + "".join(e for _, _, e in others)
    return {int(kept): found for kept, found in json.loads(out.splitlines()[-1]).items()}


@pytest.mark.parametrize("kept", [0, 1, 3])
def test_backward_gathers_each_part_once_before_it_is_needed(kept, gathers):
    """All parts of the layer that comes next are asked for while the one before is still at work; none twice."""
    parts = lambda k: [f"layers.{k}{part}" for part in ("", ".mlp.gate_proj", ".mlp.up_proj", ".mlp.down_proj")]  # noqa: E731
    assert gathers[kept]["forward"] == [part for k in range(3) for part in parts(k)]
    last_first = [(parts(k)[3], *parts(k)[:3]) for k in reversed(range(3 - kept))]
    assert sorted(gathers[kept]["backward"]) == sorted(part for layer in last_first for part in layer)
    if not kept:  # from the second layer in backward on; nobody is before the first
        assert gathers[0]["backward"][4:] == [part for layer in last_first[1:] for part in layer]


def test_layers_that_stay_gathered_are_let_go_by_reshard(gathers):
    assert gathers[0]["after forward"] == []
    assert gathers[1]["after forward"] == [2]
    assert gathers[3]["after forward"] == [0, 1, 2]
    for found in gathers.values():
        assert found["after reshard"] == found["after backward"] == []


def test_layers_that_stay_gathered_change_no_result(run):
    """Bit for bit, with an evaluation between the epochs; in a run with --memory_budget on GPUs the same call."""
    keep = (
        "import common\nplain = common.shard\n"
        "def shard(model, *args):\n"
        "    sharded = plain(model, *args)\n"
        "    common.keep_gathered(model, 2)\n"
        "    return sharded\n"
        "common.shard = shard"
    )
    plain = run(2, "finetune_lowmem", "plain", "--epochs", 2, "--eval_rows", 8)
    kept = run(2, "finetune_lowmem", "kept", "--epochs", 2, "--eval_rows", 8, first=keep)
    assert difference(plain, kept) == 0
    assert (scores(plain, 2) == scores(kept, 2)).all()


def test_how_many_layers_stay_gathered_within_a_budget():
    within = lambda budget: finetune_lowmem.gathered_within(budget, least=100, layers=4, layer=10)  # noqa: E731
    assert [within(budget) for budget in (100, 109, 110, 139, 140, 1000)] == [0, 0, 1, 3, 4, 4]
    with pytest.raises(common.UserError, match="--memory_budget"):
        within(99)


def test_a_budget_is_that_of_the_rank_that_needs_most(monkeypatch, capsys):
    """Of sizes in bytes: what PyTorch and others were measured to take, 2 graphs of 3 layers, and the gaps."""
    size = {"hidden_size": 16, "intermediate_size": 48, "num_attention_heads": 2, "vocab_size": 32}
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=3, **size))
    layer, kept, limits = common.size_in_bytes(model.model.layers[0].parameters()), [], []
    monkeypatch.setattr(finetune_lowmem, "measure", lambda *args: (1000, 200, None))
    monkeypatch.setattr(finetune_lowmem, "GRAPH_OF_RANKS", 10)
    monkeypatch.setattr(finetune_lowmem, "GAPS", 100)
    monkeypatch.setattr(common, "of_all_ranks", lambda need: [need, need + 50])
    monkeypatch.setattr(common, "keep_gathered", lambda model, count: kept.append(count))
    monkeypatch.setattr(common.ending, "save_memory", "less")
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", limits.append)
    least, total = 1000 + 200 + 2 * 3 * 10 + 100 + 50, 10 * layer
    for budget in (least, least + 2 * layer):
        finetune_lowmem.gather_once(model, {}, None, None, 2, budget, SimpleNamespace(total=total), None)
    assert kept == [0, 2]
    assert limits == [(budget - 260) / total for budget in (least, least + 2 * layer)]
    assert common.ending.save_memory == "a smaller --memory_budget or less"
    assert "2 of 3 decoder layers stay gathered" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# Batches and evaluation


@pytest.mark.parametrize(("rows", "ranks"), [(8, 2), (7, 2), (5, 3), (1, 2), (2, 3), (8, 1)])
def test_a_batch_is_dealt_out_once_and_evenly(rows, ranks, monkeypatch):
    sequences = [common.Sequence(list(range(1, 5 + 3 * k)), targets=2 + k) for k in range(rows)]
    batch = common.collate(sequences, limit=100)
    monkeypatch.setattr(common, "ranks", lambda: ranks)
    seen, total, shapes = [], 0.0, set()
    for rank in range(ranks):
        monkeypatch.setattr(common, "rank", lambda rank=rank: rank)
        share = batch.share()
        assert (share.rows, share.tokens, share.target_tokens) == (batch.rows, batch.tokens, batch.target_tokens)
        shapes.add((*share.ids.shape, len(share.targets)))
        real = share.weights > 0
        assert torch.equal(share.weights[real], torch.full((real.sum(),), 1 / batch.target_tokens))
        assert torch.equal(share.ids.flatten()[share.positions] != 0, real | (share.ids[0, 0] != 0))
        total += share.weights.sum().item()
        seen += [tuple(row) for row in share.ids.tolist() if any(row)]
    assert total == pytest.approx(1)
    assert sorted(seen) == sorted(tuple(row) for row in batch.ids.tolist())
    assert shapes == {common.batch_shape(sequences, 8, 100)}


@both_scripts
@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "gemma2", "phi"])
def test_evaluation_scores_each_row_as_one_process_does(script, architecture, run):
    one, three = (run(n, script, f"{n}", "--epochs", 0, architecture=architecture) for n in (1, 3))
    for a, b in zip(lines(one / "eval_epoch0.jsonl"), lines(three / "eval_epoch0.jsonl"), strict=True):
        assert (a["ind"], a["label"], a["chars"]) == (b["ind"], b["label"], b["chars"])
    assert (scores(one, 0) - scores(three, 0)).abs().max() < 1e-4


# ---------------------------------------------------------------------------------------------------------------------
# Whole runs


@pytest.mark.parametrize("trained", ["layers", "all"])
@pytest.mark.parametrize(
    ("architecture", "optimizer"), [("llama", "Adam"), ("llama-tied", "Adafactor"), ("gemma2", "SGD")]
)
def test_the_baseline_is_that_of_one_process(architecture, optimizer, trained, run):
    """To fp32's error, over 10 steps, an uneven last batch of 4 rows and an epoch's end among them."""
    flags = ["--max_steps", 10, "--optimizer", optimizer, "--trained", trained]
    one, two = (run(n, "finetune_base", f"{n}", *flags, architecture=architecture) for n in (1, 2))
    assert difference(one, two) < 1e-6  # seen: 3e-7; 10 steps of Adam move 1e-2
    for a, b in zip(lines(one / "metrics.jsonl"), lines(two / "metrics.jsonl"), strict=True):
        assert a.keys() == b.keys()
        if "train_loss" in a:
            assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-5)
    a, b = (json.loads((folder / "summary.json").read_text()) for folder in (one, two))
    for name in ("trained_params", "total_params", "steps", "rows", "target_tokens"):
        assert a[name] == b[name]
    assert (a["ranks"], b["ranks"]) == (1, 2)
    assert b["memory_of_rank"] in (0, 1)
    assert b["ledger_gib"]["gradients"] == pytest.approx(a["ledger_gib"]["gradients"] / 2, rel=1e-3)


@pytest.mark.parametrize(
    ("architecture", "trained"),
    [
        ("llama", "layers"),
        ("llama", "all"),
        ("llama-tied", "layers"),
        ("llama-tied", "all"),
        ("gemma2", "layers"),
        ("mixtral", "layers"),
    ],
)
def test_low_memory_is_that_of_one_process_within_rounding_noise(architecture, trained, run):
    """As far from it as one process is from another that rounds with other noise; the first steps' losses agree."""
    flags = ["--max_steps", 10, "--trained", trained]
    other = "import common\nplain = common.Adafactor\ncommon.Adafactor = lambda *a, **k: plain(*a, **k | {'seed': 7})"
    one, two = (run(n, "finetune_lowmem", f"{n}", *flags, architecture=architecture) for n in (1, 2))
    noise = difference(one, run(1, "finetune_lowmem", "other", *flags, architecture=architecture, first=other))
    assert 0 < difference(one, two) < 1.5 * noise
    a, b = (
        [line["train_loss"] for line in lines(folder / "metrics.jsonl") if "train_loss" in line]
        for folder in (one, two)
    )
    assert a[0] == pytest.approx(b[0], rel=1e-3)  # bf16, of which two ranks add up halves
    assert a == pytest.approx(b, rel=2e-2)


def test_a_step_of_several_gpus_communicates_in_its_graph_alone(run):
    """While a graph runs, NCCL_GRAPH_MIXING_SUPPORT=0 allows no other communication: none in `after_step`."""
    watch = """
import torch, torch.distributed as dist
import common
plain_after, plain_sum = common.Run.after_step, dist.all_reduce
def after_step(*args):
    def all_reduce(tensor, *args, async_op=False):
        assert async_op and tensor.dtype == torch.int64, "not the signal's, which is in host memory"
        return plain_sum(tensor, *args, async_op=True)
    dist.all_reduce = all_reduce
    plain_after(*args)
    dist.all_reduce = plain_sum
common.Run.after_step = after_step
"""
    run(2, "finetune_lowmem", "r", "--max_steps", 3, first=watch)


def test_weights_are_read_as_they_are_stored(run, model_folder, tmp_path):
    """Where config.json speaks of bf16 and the files hold fp32."""
    folder = shutil.copytree(model_folder(), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    one, two = (run(n, "finetune_base", f"{n}", "--max_steps", 2, "--model", folder) for n in (1, 2))
    assert difference(one, two) < 1e-6


def test_what_is_computed_is_not_of_the_precision_in_which_weights_are_stored(run, tokenizer, tmp_path):
    """Gemma's embedding scale, sqrt(48): 6.928, and 6.938 in bf16."""
    folder = tmp_path / "model"
    make_model("gemma2", hidden_size=48).bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    one, two = (run(n, "finetune_base", f"{n}", "--max_steps", 2, "--model", folder) for n in (1, 2))
    assert (scores(one, 0) - scores(two, 0)).abs().max() < 1e-4
    assert difference(one, two) < 1e-6


def test_quantized_weights_are_made_whole_by_each_rank(run, tmp_path):
    """The baseline's, whose gradients' other order of summing is all that may differ; untrained both scripts' bits."""
    make, quantize, settings = QUANTIZED["fp8, experts"]
    quantized, _ = quantized_pair(tmp_path, make(), quantize, settings)
    one, two = (run(n, "finetune_base", f"{n}", "--max_steps", 3, "--model", quantized) for n in (1, 2))
    assert difference(one, two) < 1e-6  # seen: 2e-8
    one, two = (run(n, "finetune_lowmem", f"lowmem{n}", "--epochs", 0, "--model", quantized) for n in (1, 2))
    assert difference(one, two) == 0


def test_experts_that_do_not_fit_the_host_are_refused(model_folder, monkeypatch):
    """Each of two processes merges 2 layers of 4 experts of 3 x 32 x 64, fp32: 393,216 bytes in all."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(common, "ranks", lambda: 2)
    monkeypatch.setattr(common, "wait_for_all", lambda: None)
    folder = model_folder("mixtral")
    monkeypatch.setattr(common, "free_host_memory", lambda: 393_215)
    with pytest.raises(
        common.UserError, match="whose experts each of 2 processes merges, takes 0.0 GiB of host memory"
    ):
        common.load_model(folder, torch.float32)
    monkeypatch.setattr(common, "free_host_memory", lambda: 393_216)
    assert common.load_model(folder, torch.float32).dtype == torch.float32


@pytest.mark.parametrize("ranks", [1, 2])
def test_autocast_keeps_no_weights_of_several_ranks(ranks, monkeypatch):
    """Its bf16 copies would outlive the gathered weights that they are of, until forward ends."""
    monkeypatch.setattr(common, "ranks", lambda: ranks)
    with finetune_base.precision():
        assert torch.is_autocast_cache_enabled() == (ranks == 1)


@both_scripts
def test_more_ranks_than_rows(script, run):
    flags = ["--batch_size", 1, "--train_rows", 3, "--epochs", 1, "--eval_rows", 1, "--nostround"]
    flags = flags[: -1 if script == "finetune_base" else None]
    one, three = (run(n, script, f"{n}", *flags) for n in (1, 3))
    assert difference(one, three) < (1e-6 if script == "finetune_base" else 5e-3)


def test_the_run_folder_is_that_of_one_process(run):
    one, two = (run(n, "finetune_lowmem", f"{n}", "--max_steps", 3) for n in (1, 2))
    names = [sorted(f.name for f in folder.iterdir() if not f.name.startswith("events")) for folder in (one, two)]
    assert names[0] == names[1]
    saved = [sorted(f.name for f in (folder / "model").iterdir()) for folder in (one, two)]
    assert saved[0] == saved[1]
    assert (one / "model" / "config.json").read_text() == (two / "model" / "config.json").read_text()


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def test_embeddings_and_head_go_on_too(run):
    flags = ["--schedule", "constant", "--trained", "all"]
    straight = run(2, "finetune_base", "straight", *flags, "--max_steps", 4)
    run(2, "finetune_base", "parts", *flags, "--max_steps", 2)
    parts = run(2, "finetune_base", "parts", *flags, "--max_steps", 4, "--resume")
    assert difference(straight, parts) == 0
    assert timeless(straight) == timeless(parts)


@pytest.mark.parametrize(
    ("script", "before", "after"),
    [(script, *ranks) for script in ("finetune_base", "finetune_lowmem") for ranks in [(2, 1), (1, 2)]]
    + [("finetune_base", 2, 3), ("finetune_lowmem", 2, 2)],
)
def test_a_checkpoint_goes_on_with_another_number_of_ranks(script, before, after, run):
    flags = ["--schedule", "constant", "--save_every", 3]
    straight = run(after, script, "straight", *flags, "--max_steps", 10)
    parts = run(before, script, "parts", *flags, "--max_steps", 5)
    files = sorted(f.name for f in (parts / "checkpoint" / "step-5").glob("*.safetensors"))
    if before == 2:  # each rank's part of each matrix is a half
        for file in files:
            with safe_open(parts / "checkpoint" / "step-5" / file, "pt") as tensors:
                name = next(name for name in tensors.keys() if name.endswith("down_proj.weight"))  # noqa: SIM118
                assert tensors.get_slice(name).get_shape() == [16, 64]
        assert len(files) == 2
    run(after, script, "parts", *flags, "--max_steps", 10, "--resume")
    if before == after:
        assert timeless(straight) == timeless(parts)
        assert difference(straight, parts) == 0
    else:
        assert difference(straight, parts) < (1e-6 if script == "finetune_base" else 2e-2)
        assert [line["step"] for line in timeless(straight)] == [line["step"] for line in timeless(parts)]


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_experts_go_on_with_another_number_of_ranks(before, after, run):
    """Their weights have three dimensions."""
    flags = ["--schedule", "constant", "--optimizer", "Adafactor"]
    straight = run(after, "finetune_base", "straight", *flags, "--max_steps", 4, architecture="mixtral")
    run(before, "finetune_base", "parts", *flags, "--max_steps", 2, architecture="mixtral")
    parts = run(after, "finetune_base", "parts", *flags, "--max_steps", 4, "--resume", architecture="mixtral")
    assert difference(straight, parts) < 1e-6


def test_what_differs_between_ranks(run, tmp_path):
    """Their random numbers, at the start and after --resume; the largest memory, which is reported."""
    code = "import os, common, torch; plain_sample = common.Memory.sample\n"
    code += "def sample(memory):\n    found = plain_sample(memory)\n"
    code += "    memory.peaks[memory.phase]['device'] += os.environ['RANK'] == '1'\n    return found\n"
    code += "common.Memory.sample = sample\n"
    code += after_each_step(f"open({str(tmp_path)!r} + f'/{{common.rank()}}', 'a').write(f'{{torch.rand(())}} ')")
    folder = run(2, "finetune_lowmem", "r", "--max_steps", 2, "--schedule", "constant", first=code)
    run(2, "finetune_lowmem", "r", "--max_steps", 4, "--schedule", "constant", "--resume", first=code)
    drawn = [(tmp_path / str(rank)).read_text().split() for rank in range(2)]
    assert len({*drawn[0], *drawn[1]}) == 8
    assert json.loads((folder / "summary.json").read_text())["memory_of_rank"] == 1


def test_skipped_updates_go_on_being_counted(run):
    fault = after_each_step("step == 1 and run.optimizer.skipped.add_(5)")
    run(2, "finetune_lowmem", "r", "--max_steps", 3, "--schedule", "constant", first=fault)
    folder = run(1, "finetune_lowmem", "r", "--max_steps", 4, "--schedule", "constant", "--resume")
    assert json.loads((folder / "summary.json").read_text())["skipped_updates"] == 5


# ---------------------------------------------------------------------------------------------------------------------
# How jobs end, under torchrun itself


@pytest.fixture
def torchrun(tmp_path, model_folder, dataset_folder):
    """torchrun(script, *flags, first="", ranks=2) -> Popen of torchrun, in a session of its own."""
    started = []

    def go(script, *flags, first="", ranks=2):
        code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{first}\nimport common, {script}\n"
        code += f"common.run_command({script}.main)"
        argv = ["--model", model_folder(), "--dataset", dataset_folder, "--output_dir", tmp_path, "--run-name", "r"]
        argv += ["--batch_size", 8, "--log_every", 1, "--lr", "1e-3", "--epochs", 10**6, *flags]
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", ranks, "--master-port", 0]
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--no-python"]
        command += [sys.executable, "-c", code, *argv]
        variables = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        variables.pop("TRITON_INTERPRET", None)
        started.append(
            subprocess.Popen(
                list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=variables,
                start_new_session=True,
            )
        )  # fmt: skip
        return started[-1]

    yield go
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def ended(process, seconds=60):
    """(its own error lines, all of stderr) of a job that must end within `seconds`."""
    _, err = process.communicate(timeout=seconds)
    assert process.returncode == 1
    return [line for line in err.splitlines() if re.match("(error|interrupted): ", line)], err


def ranks_of(process):
    """{rank: pid} of the processes that this torchrun has started."""
    children = psutil.Process(process.pid).children()
    return {int(child.environ()["RANK"]): child.pid for child in children if "RANK" in child.environ()}


def after_a_signal(process, number, folder):
    """(the one line of a job whose rank 1 gets the signal in the middle, the step that it says is saved, and that is)."""
    assert wait_until(has_lines(folder, 5), Running(process), 120)
    os.kill(ranks_of(process)[1], number)
    said, err = ended(process)
    assert len(said) == 1, err
    saved = int(re.search(r"the same command with --resume goes on from step (\d+)$", said[0])[1])
    assert common.last_checkpoint(folder).name == f"step-{saved}"
    return said[0], saved


class Running:
    """What `wait_until` asks."""

    def __init__(self, process):
        self.running = lambda: process.poll() is None


def test_a_killed_rank_ends_the_job_and_it_goes_on(torchrun, tmp_path, run):
    flags = ["--save_every", 2, "--schedule", "constant"]
    line, saved = after_a_signal(torchrun("finetune_lowmem", *flags), signal.SIGKILL, tmp_path / "r")
    assert line.startswith(("error: another process of this run has ended", "interrupted: "))
    run(1, "finetune_lowmem", "r", *flags, "--resume", "--epochs", saved, "--max_steps", saved + 1)
    assert [line["step"] for line in lines(tmp_path / "r" / "metrics.jsonl") if "lr" in line] == [*range(1, saved + 2)]


@pytest.mark.parametrize(
    ("state", "why"),
    [
        ("nullcontext", "it waits for another process, which may have ended; "),
        ("common.ending.saving", "it is still saving; if torchrun ends that before it is done, "),
    ],
)
def test_a_process_that_does_not_end_says_why(state, why):
    """As one whose GPU waits for that of a killed process: it is not in Python, and no handler of a signal runs."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import common, ctypes; common.STUCK = 0.1\n"
    code += "from contextlib import nullcontext\n"
    code += f"with common.ending.listening(), {state}():\n    common.say_when_stuck()\n"
    code += "    ctypes.CDLL(None).system(b'echo; read end_of_stdin')"  # waits in C from before its line to the end
    pipes = dict.fromkeys(["stdin", "stdout", "stderr"], subprocess.PIPE)
    process = subprocess.Popen([sys.executable, "-c", code], **pipes, text=True)
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    in_time = select([process.stderr], [], [], 60)[0]
    process.kill()
    _, err = process.communicate()
    assert in_time
    assert err.startswith(f"\ninterrupted: {why}start the same command again")


def test_a_signal_to_one_rank_while_it_loads_leaves_no_traceback(run, commands, model_folder, dataset_folder, tmp_path):
    run(2, "finetune_lowmem", "r", "--max_steps", 2, "--schedule", "constant")
    first = "import os, signal; from torch.distributed.checkpoint import HuggingFaceStorageReader as Reader\n"
    first += "plain = Reader.read_data\ndef read_data(*args):\n    if os.environ['RANK'] == '1':\n"
    first += "        os.kill(os.getpid(), signal.SIGINT)\n    return plain(*args)\nReader.read_data = read_data"
    argv = ["--run-name", "r", "--output_dir", tmp_path, "--model", model_folder(), "--dataset", dataset_folder]
    argv += ["--batch_size", 8, "--log_every", 1, "--lr", "1e-3", "--schedule", "constant"]
    argv += ["--max_steps", 4, "--resume"]
    ended = commands.run_ranks(2, "finetune_lowmem", *argv, first=first)
    assert {code for code, _, _ in ended} == {128 + signal.SIGINT, 128 + signal.SIGTERM}
    assert not any("Traceback" in err for _, _, err in ended)
    assert any("--resume goes on from its last checkpoint" in err for _, _, err in ended)


def test_an_error_of_one_rank_is_the_jobs(torchrun, tmp_path):
    """Also where TensorBoard's thread still writes to what is removed then."""
    board = "import threading\nfrom itertools import count\nfrom pathlib import Path\ndef write(folder):\n"
    board += "    for number in count():\n        Path(folder, f'events{number}').touch()\n"
    fault = "if step == 3 and common.rank() == 1: "
    fault += "threading.Thread(target=write, args=[common.scratch.folder], daemon=True).start(); "
    fault = board + after_each_step(fault + "raise common.UserError('rank 1 fails')")
    said, err = ended(torchrun("finetune_lowmem", first=fault), 120)
    assert said == ["error: rank 1 fails"], err
    assert err.count("Traceback") == 1  # torchrun's own


def test_an_error_of_all_ranks_is_said_once(torchrun, tmp_path):
    (tmp_path / "r").mkdir()
    said, err = ended(torchrun("finetune_lowmem"), 120)
    assert len(said) == 1, err
    assert "exists: take another --run-name" in said[0]


def test_a_signal_to_one_rank_ends_all_after_the_same_step(torchrun, tmp_path):
    line, saved = after_a_signal(torchrun("finetune_base"), signal.SIGTERM, tmp_path / "r")
    assert line == f"interrupted: the same command with --resume goes on from step {saved}"


def test_a_run_folder_that_machines_do_not_share_is_refused(tmp_path):
    common.wait_for_folder(tmp_path)
    with pytest.raises(common.UserError, match="a file system that all machines share"):
        common.wait_for_folder(tmp_path / "elsewhere", seconds=0.2)
