"""CUDA graphs, compiled layers, no masks: as far as a CPU goes, and on a GPU. python -m pytest tests/test_cuda_graphs.py"""

import copy
import functools
import gc
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import transformers
from support.tiny import ARCHITECTURES, make_model
from support.training import as_lm, checkpointed, make_batch
from torch._dynamo.testing import CompileCounter

import finetune_lowmem
from lowmem import cuda_graphs, placement
from lowmem.adafactor import Adafactor
from lowmem.training import models
from lowmem.training.batches import Sequence, Shape, pad_batch
from lowmem.training.data import Data
from lowmem.training.errors import UserError
from lowmem.training.layouts import Lines

# ---------------------------------------------------------------------------------------------------------------------
# Whether graphs pay


@pytest.mark.parametrize(
    ("steps", "scored", "no_compile", "expected"),
    [
        (65, 0, False, (True, False)),
        (64, 0, False, (False, False)),
        (64, 1, False, (False, False)),
        (64, 2, False, (True, False)),  # and two batches of evaluation, twice: three of them count as a step
        (8000, 0, False, (True, True)),
        (7999, 0, False, (True, False)),
        (8000, 0, True, (False, False)),
    ],
)
def test_graphs_and_compiling_come_where_they_pay(steps, scored, no_compile, expected):
    """On a GPU: then the lengths of batches are few."""
    train = [Sequence.ending([5] * (2 + 32 * (k % 7)), 1) for k in range(steps)]
    data = Data(train, [Sequence.ending([5] * 1024, 1)] * scored, max_tokens=1024, batch_size=1)
    args = SimpleNamespace(epochs=1, max_steps=None, no_compile=no_compile)
    assert cuda_graphs.choose_kernels(args, data, torch.device("cpu")) == (False, False)
    found = cuda_graphs.choose_kernels(args, data, torch.device("cuda"))
    assert found == expected
    assert data.layout.few_lengths == found[0]


# ---------------------------------------------------------------------------------------------------------------------
# Masks and compiled layers


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_leaving_out_masks_changes_nothing_and_keeps_short_windows(architecture):
    """Sequences longer than the window of 16 that some of these models have."""
    batch, model = make_batch(length=40), make_model(architecture)
    if model.config._attn_implementation == "eager":
        pytest.skip("its attention needs masks")  # Gemma 2's, from transformers 5.21 on
    before = model.base_model(input_ids=batch.ids).last_hidden_state
    cuda_graphs.leave_out_masks(model, longest=40)
    windowed = getattr(model.config, "sliding_window", None) is not None
    assert model.config._attn_implementation == ("sdpa_with_mask" if windowed else "sdpa_without_mask")
    masks = []
    for layer in models.decoder_layers(model):
        layer.register_forward_pre_hook(
            lambda _, args, kwargs: masks.append(
                any(torch.is_tensor(x) and x.ndim == 4 for x in (*args, *kwargs.values()))
            ),
            with_kwargs=True,
        )  # by whatever name, or by position: nothing else has four dimensions
    assert (model.base_model(input_ids=batch.ids).last_hidden_state - before).abs().max() < 1e-5
    assert masks == [windowed] * len(models.decoder_layers(model))
    model = make_model(architecture)
    cuda_graphs.leave_out_masks(model, longest=16)
    assert model.config._attn_implementation == "sdpa_without_mask"
    first = before[:, :16]
    assert (model.base_model(input_ids=batch.ids[:, :16]).last_hidden_state - first).abs().max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_a_capture_needs_nothing_that_a_warm_up_has_not_compiled(architecture, monkeypatch):
    """transformers makes masks otherwise where it believes that a graph is captured."""
    torch._dynamo.reset()
    compiled = CompileCounter()
    model = make_model(architecture)
    cuda_graphs.leave_out_masks(model, longest=40)
    cuda_graphs.compile_layers(model, backend=compiled)
    batches = [make_batch(rows=6, length=length) for length in (40, 24)]
    for batch in batches:
        model.base_model(input_ids=batch.ids, use_cache=False)
    after_warm_up = compiled.frame_count
    assert after_warm_up > 0
    monkeypatch.setattr(transformers.masking_utils, "is_tracing", lambda *_: True)
    for batch in batches:
        model.base_model(input_ids=batch.ids, use_cache=False)
    assert compiled.frame_count == after_warm_up


@pytest.mark.slow
def test_activations_are_compiled_for_one_width_and_any_length():
    """Or else kernels found in the cache may be those of a model of another width, with blocks of its size."""
    torch._dynamo.reset()
    shapes, rotations = [], []

    def backend(graph, _):
        inputs = {node.name: node.meta.get("example_value") for node in graph.graph.nodes if node.op == "placeholder"}
        found = {name: value.shape for name, value in inputs.items() if isinstance(value, torch.Tensor)}
        if any("silu" in str(node.target) for node in graph.graph.nodes):
            shapes.extend(found.values())
        rotations.extend(shape for name, shape in found.items() if "position_embeddings" in name)
        return graph.forward

    model = make_model("llama")
    cuda_graphs.compile_layers(model, backend=backend)
    for length in (40, 24):
        model.base_model(input_ids=make_batch(rows=1, length=length).ids, use_cache=False)
    assert [shape[-1] for shape in shapes] == [model.config.intermediate_size]
    assert isinstance(shapes[0][-1], int)
    assert not isinstance(shapes[0][-2], int)
    assert [shape[-1] for shape in rotations] == [model.config.head_dim] * 2, "cosines and sines"
    assert all(isinstance(shape[-1], int) and not isinstance(shape[-2], int) for shape in rotations)


@pytest.mark.slow
def test_compiled_layers_hand_over_one_gradient_at_a_time():
    """Traced but not compiled (backend "aot_eager"): same gradients as plain layers, and at most one alive in each hook."""
    batch, plain = make_batch(), as_lm(make_model("llama"))
    compiled = copy.deepcopy(plain)
    torch._dynamo.utils.counters.clear()
    cuda_graphs.compile_layers(compiled.network, backend="aot_eager")
    for lm in (plain, compiled):
        checkpointed(lm.network)
        finetune_lowmem.training_loss(lm, batch).backward()
    for name, p in plain.trained.items():
        torch.testing.assert_close(compiled.trained[name].grad, p.grad)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 3, "nothing was compiled"
    matrices, alive = [p for p in compiled.trained.values() if p.ndim > 1], []
    compiled.network.zero_grad()

    def update(p):
        alive.append(sum(q.grad is not None for q in matrices))
        p.grad = None

    for p in matrices:
        p.register_post_accumulate_grad_hook(update)
    finetune_lowmem.training_loss(compiled, batch).backward()
    assert alive == [1] * len(matrices)


# ---------------------------------------------------------------------------------------------------------------------
# Captures, which a CPU has not


def test_the_lengths_of_graphs_are_said(no_captures, monkeypatch, capsys):
    """One to train, two to evaluate."""
    train, scored = ([Sequence.ending([1] * (n + 1), 4)] for n in (200, 500))
    lm, data = as_lm(make_model()), Data(train * 8, scored + train * 20, 512, batch_size=8, eval_tokens=512)
    data.layout = Lines(500, 512, few_lengths=True)
    monkeypatch.setattr(cuda_graphs, "warm_up", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    cuda_graphs.as_graphs(None, None, lm, None, False, data)
    lengths = sorted({data.shape(batch).length for batch in data.evaluation_batches()})
    assert len(lengths) == 2
    said = f"graphs        to train 1,664 tokens, to evaluate 2 lengths, {lengths[0]:,} to {lengths[1]:,} tokens"
    assert said in capsys.readouterr().out


@pytest.fixture
def no_captures(monkeypatch):
    """On a CPU nothing is captured: `Graphs` runs its function once for each graph."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None))
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)


def test_graphs_of_a_run_that_goes_on_have_the_same_shapes(no_captures):
    """The padding of the targets changes the last bits: it must not go by what this process alone has seen."""
    batches = [make_batch(rows=rows, length=64) for rows in (4, 30, 16, 3)]
    padded = []
    for start in range(len(batches)):
        graphs = cuda_graphs.Graphs(lambda batch: torch.zeros(()), None)
        for batch in batches[:start]:
            graphs.reserve(batch.shape)
        padded.append([None] * start)
        for batch in batches[start:]:
            graphs(batch)
            padded[-1].append(graphs.graphs[64][1].shape)
    whole = padded[0]
    assert whole[0].targets < whole[1].targets
    assert whole[1] == whole[2] == whole[3]
    assert all(counts[start:] == whole[start:] for start, counts in enumerate(padded))


def test_a_replay_has_its_batch_filled_up(no_captures):
    rows = [
        [Sequence.ending(range(1, n), 3) for n in lengths] for lengths in ([20] * 8, [30] * 5, [40, 50, 44], [90, 30])
    ]
    in_a_line = Data(rows[0], rows[1], 64)
    in_a_line.layout = Lines(64, 64, few_lengths=True)
    for batches in ([make_batch(rows=rows, length=64) for rows in (8, 5, 7)], [in_a_line.batch(r) for r in rows]):
        graphs = cuda_graphs.Graphs(lambda batch: torch.zeros(()), None)
        graphs.reserve(functools.reduce(Shape.with_room_for, (batch.shape for batch in batches)))
        for batch in batches:
            graphs(batch)
            inputs = graphs.graphs[batch.ids.shape[1]][1]
            filled = pad_batch(batch, inputs.shape).tensors()
            assert len(filled) >= 5
            for name in filled.keys() - {"labels"}:
                assert torch.equal(getattr(inputs, name), filled[name]), name


def test_a_capture_for_each_shape_and_no_garbage_collected_within(no_captures):
    """Freeing CUDA's objects or unlocking host memory can end a capture."""
    captured = []

    def function(batch):
        captured.append((*batch.ids.shape, len(batch.targets), gc.isenabled()))
        if len(captured) == 4:
            raise ValueError("not to be captured")
        return torch.zeros(())

    graphs = cuda_graphs.Graphs(function, None)
    for rows, length in [(8, 64), (5, 64), (8, 32), (300, 32)]:  # a batch of fewer rows is filled up
        graphs(make_batch(rows=rows, length=length))
    assert [c[:2] for c in captured] == [(8, 64), (8, 32), (300, 32)]
    assert all(c[2] % 128 == 0 for c in captured)
    assert gc.isenabled()
    with pytest.raises(UserError, match="not to be captured.*--no_compile"):
        graphs(make_batch(rows=8, length=96))
    assert gc.isenabled()
    assert not any(c[3] for c in captured)


def test_memory_that_ends_in_a_capture_is_reported_as_such():
    """Ending the capture fails too, and that error hides the first."""

    @cuda_graphs.advise_no_compile()
    def capture():
        try:
            raise torch.OutOfMemoryError("tried to allocate")
        finally:
            raise RuntimeError("capturing stream has unjoined work")

    with pytest.raises(torch.OutOfMemoryError, match="tried to allocate"):
        capture()


# ---------------------------------------------------------------------------------------------------------------------
# On a GPU


@pytest.fixture
def small_context():
    cuda_graphs.prepare_process(torch.device("cuda"))
    yield
    torch.cuda.set_stream(torch.cuda.default_stream())
    torch.autograd.set_multithreading_enabled(True)


def gpu_steps(architecture, graphs, compiled=False):
    """(losses, weights) after twenty steps on batches of two lengths and ten numbers of targets."""
    lm = as_lm(make_model(architecture, hidden_size=64, intermediate_size=128).bfloat16())
    placement.place_within(lm, placement.Plan(0, False), torch.device("cuda"))
    cuda_graphs.leave_out_masks(lm.network, longest=64)
    models.checkpoint_activations(lm.network, preserve_rng_state=False)
    optimizer = Adafactor(lm.trained.values(), lr=1e-2)
    finetune_lowmem.update_in_backward(optimizer, lm.trained)
    if compiled:
        cuda_graphs.compile_layers(lm.network)

    def step(batch):
        loss = finetune_lowmem.training_loss(lm, batch)
        loss.backward()
        return loss.detach()

    if graphs:
        of_length = [[Sequence.ending([1] * (length + 1), length - 14)] * 6 for length in (32, 48)]
        data = Data(sum(of_length, []), [], 64, batch_size=6)
        cuda_graphs.warm_up(step, optimizer, data)
        step = cuda_graphs.Graphs(step, torch.cuda.graph_pool_handle())
        for shape in data.shapes(of_length):
            step.reserve(shape)
    losses = [step(make_batch(k, rows=4 + k // 2 % 3, length=32 + 16 * (k % 2)).to("cuda")) for k in range(20)]
    if graphs:
        assert len(step.graphs) == 2
    return torch.stack(losses).tolist(), {name: p.detach().clone() for name, p in lm.trained.items()}


@pytest.mark.gpu
@pytest.mark.parametrize("architecture", ["llama", "phi"])
def test_graphs_follow_plain_steps_and_repeat_to_the_bit(architecture, small_context):
    """Phi's head has a bias."""
    losses, weights = gpu_steps(architecture, graphs=False)
    losses_of_graphs, weights_of_graphs = gpu_steps(architecture, graphs=True)
    # padding the list of targets changes the shape of the head's products, and so their last bits
    assert losses_of_graphs == pytest.approx(losses, rel=2e-3)
    moved = [(weights[n].float() - p.float()).norm() / p.float().norm() for n, p in weights_of_graphs.items()]
    assert max(moved) < 0.02  # 20 steps of 0.01 move a tensor by some 0.05
    again = gpu_steps(architecture, graphs=True)
    assert again[0] == losses_of_graphs
    assert all(torch.equal(again[1][name], p) for name, p in weights_of_graphs.items())


@pytest.mark.gpu
def test_compiled_graphs_learn_as_plain_steps_do(small_context):
    """Gemma 2 has most to compile: norms before and behind, soft-capping, a window."""
    losses, _ = gpu_steps("gemma2", graphs=False)
    assert gpu_steps("gemma2", graphs=True, compiled=True)[0] == pytest.approx(losses, rel=0.02)
