"""What stays on the GPU and what streams: the plan, and what it is made from. python -m pytest tests/test_placement.py"""

import pytest
import torch
from support.runs import refused
from support.tiny import ARCHITECTURES, make_model
from support.training import CPU, as_lm, make_batch

from lowmem import placement
from lowmem.training import memory, models
from lowmem.training.batches import Sequence
from lowmem.training.data import Data
from lowmem.training.errors import UserError

GIB = memory.GIB


@pytest.mark.parametrize(
    ("budget", "head", "expected"),
    [
        (20, 1, (0, False, 12)),
        (12, 1, (0, False, 12)),
        (11.9, 1, (0, True, 11)),
        (10.9, 1, (3, True, 10 + 1 / 64)),
        (6.5, 1, (7, True, 6 + 1 / 64)),
        (5 + 1 / 64, 1, (8, True, 5 + 1 / 64)),
        (10.9, None, (3, False, 10 + 1 / 64)),
    ],
)
def test_a_plan_keeps_most_within_the_budget(budget, head, expected):
    """Eight layers and a head of 1 GiB each, 3 GiB of other things; two slots and 16 MiB of page tables to stream."""
    plan = placement.fit_to_budget(int(budget * GIB), 3 * GIB, 8, GIB, head and head * GIB)
    assert plan == placement.Plan(*expected[:2], expected[2] * GIB)


def test_a_plan_of_so_few_layers_that_none_streams():
    for layers in (0, 2):
        assert placement.fit_to_budget(100, 50, layers, 10, 60) == placement.Plan(0, True, 50 + 10 * layers)


def test_a_budget_too_small_names_the_least_that_works():
    with pytest.raises(UserError, match=r"4\.90 GiB of GPU memory are too few: .* needs 5\.02 with all streamed"):
        placement.fit_to_budget(int(4.9 * GIB), 3 * GIB, 8, GIB, GIB)


def test_a_budget_is_at_most_the_cards_and_of_one_gpu_alone(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10 * GIB, 16 * GIB))
    assert placement.budget_bytes(None, cuda) == placement.budget_bytes(20, cuda) == int(0.98 * 16 * GIB)
    assert placement.budget_bytes(2.5, cuda) == 2.5 * GIB
    assert placement.budget_bytes(None, CPU) == 0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    placement.require_one_gpu()
    monkeypatch.setattr(placement.parallel, "world_size", lambda: 2)
    with pytest.raises(UserError, match="--memory_budget is for one GPU: .* leave it out"):
        placement.require_one_gpu()


def test_a_budget_without_a_gpu_is_refused(commands, argv):
    said = refused(commands, "finetune_lowmem", *argv("r", "--memory_budget", 4))
    assert "--memory_budget is for a GPU, and there is none here: leave it out" in said


def test_a_run_that_only_evaluates_has_no_large_training_batch():
    held_out = [Sequence.ending([1] * 33, 8)] * 20
    train, evaluation = placement.largest_batches(Data([], held_out, 64, eval_tokens=320))
    assert (train.ids.numel(), evaluation.ids.numel()) == (2 * 32, 10 * 32)
    train, _ = placement.largest_batches(Data(held_out, held_out, 64, batch_size=5))
    assert train.ids.numel() == 5 * 32


def test_layers_unlike_the_others_or_with_a_shared_weight_never_stream():
    network = make_model("llama", num_hidden_layers=5)
    layers = models.decoder_layers(network)
    layers[0].mlp.up_proj = torch.nn.Linear(32, 96, bias=False)
    assert models.streamable_layers(network) == list(layers)[1:]
    layers[4].mlp.up_proj = torch.nn.Linear(32, 96, bias=False)
    assert models.streamable_layers(network) == list(layers)[1:4]  # the most, not those like the last
    layers[4].mlp.up_proj = torch.nn.Linear(32, 64, bias=False)
    layers[2].mlp.up_proj.weight = layers[4].mlp.up_proj.weight
    assert models.streamable_layers(network) == [layers[1], layers[3]]


@pytest.mark.parametrize(
    ("streamed", "expected"), [(0, []), (3, [1, 4, 6]), (4, [1, 3, 5, 7]), (7, [0, 1, 2, 4, 5, 6, 7])]
)
def test_layers_that_stream_are_spread_over_the_depth(streamed, expected):
    lm = as_lm(make_model("llama", num_hidden_layers=8).bfloat16())
    placed = placement.place_within(lm, placement.Plan(streamed, False), CPU)
    streaming = {id(p) for p in placed.layers.host_copy_of}
    assert [k for k, layer in enumerate(lm.layers) if id(next(layer.parameters())) in streaming] == expected


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_first_layers_make_a_model_too(architecture):
    network, batch = make_model(architecture, num_hidden_layers=5), make_batch()
    whole = network(input_ids=batch.ids).logits
    with models.first_layers(network, 2) as few:
        assert len(few) == len(models.decoder_layers(network)) == 2
        assert not torch.equal(network(input_ids=batch.ids).logits, whole)
    assert torch.equal(network(input_ids=batch.ids).logits, whole)


def test_a_batch_size_above_the_number_of_rows_means_all_of_them(run):
    whole, _ = run("finetune_lowmem", "whole", "--batch_size", 10**12, "--epochs", 1)
    assert whole["steps"] == 1


def test_host_memory_is_checked_before_anything_is_loaded(tmp_path, monkeypatch):
    network = make_model("llama").bfloat16()
    size = memory.size_in_bytes(network.parameters())
    for dtype in (torch.bfloat16, torch.float16):
        network.to(dtype).save_pretrained(tmp_path / str(dtype))
    bf16, fp16 = (str(tmp_path / f"torch.{name}") for name in ("bfloat16", "float16"))
    monkeypatch.setattr(memory, "free_host_memory", lambda: size - 1)
    slots = placement.streaming.SLOTS * memory.size_in_bytes(models.decoder_layers(network)[0].parameters())
    placement.require_room(bf16, placement.CONTEXT_BYTES + slots + 1)  # that byte on the GPU
    with pytest.raises(UserError, match="of free host memory are too little"):
        placement.require_room(bf16, placement.CONTEXT_BYTES + slots)
    with pytest.raises(UserError, match=r"but as torch\.float16: to convert it takes"):
        placement.require_room(fp16, 10 * size)
    monkeypatch.setattr(memory, "free_host_memory", lambda: size)
    for name in (bf16, fp16):
        placement.require_room(name, size - 1)
    monkeypatch.setattr(memory, "free_host_memory", lambda: 0)
    monkeypatch.setattr(placement.parallel, "world_size", lambda: 2)
    placement.require_room(bf16, 0)  # of several ranks each reads its part


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("architecture", "trained", "on_host"),
    [("llama", "layers", True), ("llama-tied", "layers", False), ("llama", "all", False)],
)
def test_embeddings_stay_on_the_host_when_untied_and_untrained(architecture, trained, on_host):
    lm = as_lm(make_model(architecture).bfloat16(), trained)
    placed = placement.place_within(lm, placement.Plan(0, False), torch.device("cuda"))
    staying = [name for name, p in lm.network.named_parameters() if not p.is_cuda]
    assert staying == (["model.embed_tokens.weight"] if on_host else [])
    assert placed.embeddings_on_host == on_host
