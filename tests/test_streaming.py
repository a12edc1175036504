"""Streaming from host memory: the mechanism, and whole runs, on the CPU. python -m pytest tests/test_streaming.py"""

import weakref
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from support.runs import assert_same_run, weights
from support.tiny import ARCHITECTURES, make_model
from support.training import CPU, make_batch, make_run

from lowmem import cuda_graphs, placement, streaming
from lowmem.linear_cross_entropy import LinearCrossEntropy
from lowmem.training import heads, models


def assert_same_weights(*runs):
    first, second = (one.weights() for one in runs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(("slots", "streamed"), [(2, range(5)), (2, [1, 2, 3, 4]), (1, [0, 1, 3, 4]), (3, range(5))])
def test_streamed_layers_train_as_resident_ones_do(slots, streamed):
    """Bit for bit, evaluations and saving between the steps included."""
    runs = [make_run("llama", layers, slots) for layers in ([], streamed)]
    for seed in range(9):
        batch = make_batch(seed)
        assert torch.equal(*(one.step(batch) for one in runs))
        if seed % 3 == 0:
            assert torch.equal(*(one.score(batch) for one in runs))
        if seed % 4 == 0:
            assert_same_weights(*runs)


class LateCopies(streaming.CopyStreams):
    """Copies that are done as late as what waits for them allows; those of the base class, on a CPU, are done at once."""

    def __init__(self):
        super().__init__(CPU)
        self.fetches, self.sends = [], []

    def fetch(self, target, source, key, at_once=False):
        self.fetches.append((target, source, key))

    def send(self, target, source):
        self.sends.append((target, source))

    def wait(self, key):
        while any(key == late for *_, late in self.fetches):  # a stream works in order
            target, source, _ = self.fetches.pop(0)
            self.send_all()
            target.copy_(source)

    def send_all(self):
        for target, source in self.sends:
            target.copy_(source)
        self.sends = []

    def settle(self):
        while self.fetches:
            self.wait(self.fetches[-1][2])
        self.send_all()


class CountedCopies(streaming.CopyStreams):
    """Copies that note the layer and the bytes of each."""

    def __init__(self):
        super().__init__(CPU)
        self.fetched, self.sent = Counter(), 0

    def fetch(self, target, source, key, at_once=False):
        self.fetched[key] += source.nbytes
        super().fetch(target, source, key, at_once)

    def send(self, target, source):
        self.sent += source.nbytes
        super().send(target, source)


@pytest.mark.parametrize("slots", [2, 1, 3])
def test_nothing_is_copied_twice_and_all_of_it_early(slots):
    """A step fetches what its slots do not hold, once in forward and once in backward, before a layer asks for it."""
    copies = CountedCopies()
    one = make_run("llama", range(6), slots, trained="all", layers=6, copies=copies)  # such a head does not stream
    size = len(one.stack.host_copies[0])
    of_weights = sum(part.stop - part.start for part in one.stack.parts)
    late, before = [], one.stack._before
    one.stack._before = lambda i: (
        late.extend([i] * any(layer != i for layer in one.stack.holds[i % slots])) or before(i)
    )
    for _ in range(3):
        copies.fetched, copies.sent = Counter(), 0
        one.step(make_batch())
        assert copies.sent == 6 * of_weights
        assert copies.fetched == {i: (i >= slots) * size + (i < 6 - slots) * of_weights for i in range(6)}
        copies.fetched, copies.sent = Counter(), 0
        one.score(make_batch())
        assert copies.fetched == dict.fromkeys(range(6), size)
        assert copies.sent == 0
    assert not late


@pytest.mark.parametrize("streamed", [range(5), [0, 1, 3, 4]])
def test_what_runs_waits_for_its_copies(streamed):
    """With copies done as late as may be, as a busy bus would, the weights are still the resident run's."""
    plain, late = make_run("llama", []), make_run("llama", streamed, copies=LateCopies())
    for seed in range(6):
        assert torch.equal(plain.step(make_batch(seed)), late.step(make_batch(seed)))
        assert torch.equal(plain.score(make_batch(seed)), late.score(make_batch(seed)))
    assert_same_weights(plain, late)


@pytest.mark.parametrize(
    ("architecture", "trained"), [*((name, "layers") for name in ARCHITECTURES), ("llama-tied", "all")]
)
def test_every_architecture_streams(architecture, trained):
    runs = [make_run(architecture, layers, trained=trained) for layers in ([], range(5))]
    for seed in range(3):
        assert torch.equal(*(one.step(make_batch(seed)) for one in runs))
    assert_same_weights(*runs)


@pytest.mark.parametrize("late", [False, True])
def test_a_step_without_a_layer_or_a_gradient_costs_time_not_weights(late):
    """Layers that are skipped (as layerdrop does) and weights without a gradient (as an idle expert's)."""
    plain = make_run("llama", [], layers=6)
    moved = make_run("llama", range(6), layers=6, copies=LateCopies() if late else None)
    for seed in range(8):
        for one in (plain, moved):
            layers, network = one.lm.layers, one.lm.network
            network.model.layers = torch.nn.ModuleList(layer for i, layer in enumerate(layers) if i != seed % 7)
            idle = layers[seed * 5 % 6].mlp.down_proj.weight.requires_grad_(False)
            one.loss = one.step(make_batch(seed))
            network.model.layers = layers
            idle.requires_grad_(True)
            one.scores = one.score(make_batch(seed))
        assert torch.equal(plain.loss, moved.loss)
        assert torch.equal(plain.scores, moved.scores)
    assert_same_weights(plain, moved)


@pytest.mark.parametrize("max_logits", [heads.MAX_LOGITS, 300])
@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "gemma2", "granite", "phi"])
def test_a_streamed_heads_log_probs_and_gradient(architecture, max_logits, monkeypatch):
    """Against fp64, with logits large enough that a soft-capping and a running maximum matter; at once or in blocks."""
    monkeypatch.setattr(heads, "MAX_LOGITS", max_logits)
    network, batch = make_model(architecture), make_batch()
    network.requires_grad_(False)
    plain = heads.Head(network)
    hidden = torch.randn(40, 32) * 8
    targets = torch.randint(400, (40,))
    upstream = torch.randn(40)
    x = hidden.double().requires_grad_()
    true = x * plain.scale @ plain.weight.double().T + (0 if plain.bias is None else plain.bias.double())
    if plain.softcap:
        true = plain.softcap * torch.tanh(true / plain.softcap)
    targets[::3] = true[::3].argmax(-1)
    truth = true.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    (truth * upstream).sum().backward()
    own = network(input_ids=batch.ids).logits
    head = streaming.StreamedHead(network, streaming.CopyStreams(CPU), CPU, piece_bytes=4096)
    assert len(head.pieces) == 14
    for _ in range(2):  # the buffers hold the right pieces for a second pass
        y = hidden.clone().requires_grad_()
        found = LinearCrossEntropy.apply(y, targets, head.weight, head.bias, head)
        (found * upstream).sum().backward()
        with torch.no_grad():
            scores = head.score_targets(y, targets)
        assert torch.equal(scores[:, 0], found)
        assert torch.equal(scores[:, 1], (true.argmax(-1) == targets).float())
        assert (found - truth).abs().max() < 1e-4
        assert (y.grad - x.grad).norm() < 1e-5 * x.grad.norm()
    assert (network(input_ids=batch.ids).logits - own).abs().max() < 1e-5
    assert F.mse_loss(head.logits(hidden).double(), true) < 1e-8


def test_saving_copies_no_streamed_weights(tmp_path, monkeypatch):
    """save_pretrained clones tensors that share a storage: at home each has its own."""
    network = make_model("llama", num_hidden_layers=5).bfloat16()
    stack = streaming.StreamedLayers(list(models.decoder_layers(network)), streaming.CopyStreams(CPU), CPU)
    with stack.all_at_home():
        places = [p.untyped_storage().data_ptr() for p in stack.host_copy_of]
        monkeypatch.setattr(torch.Tensor, "clone", lambda *_: pytest.fail("a weight was copied"))
        network.save_pretrained(tmp_path)
    assert len(set(places)) == len(places) == 5 * 9


def test_streaming_frees_each_layer_before_it_takes_the_next(monkeypatch):
    """So that loading never holds the model twice."""
    layers = models.decoder_layers(make_model("llama", num_hidden_layers=5).bfloat16())
    old = [[weakref.ref(p.untyped_storage()) for p in layer.parameters()] for layer in layers]
    plain, alive = streaming.host_memory, []

    def host_memory(*args):
        alive.append(sum(any(storage() is not None for storage in layer) for layer in old))
        return plain(*args)

    monkeypatch.setattr(streaming, "host_memory", host_memory)
    streaming.StreamedLayers(list(layers), streaming.CopyStreams(CPU), CPU)
    assert alive == [5, 4, 3, 2, 1]


def test_host_memory_that_is_not_free_is_refused(monkeypatch):
    monkeypatch.setattr(streaming.memory, "free_host_memory", lambda: 4096)
    assert len(streaming.host_memory(4096, CPU)) == 4096
    with pytest.raises(
        streaming.UserError, match=r"close other programs, or allow .* more of the GPU \(--memory_budget"
    ):
        streaming.host_memory(4097, CPU)


# ---------------------------------------------------------------------------------------------------------------------
# Whole runs


@pytest.fixture
def run_streamed(run, tmp_path, tokenizer, monkeypatch):
    """run_streamed(streamed, name, *flags): the script on a model of five layers, on the CPU; the head streams too.

    Copies are done as late as what the script waits for allows.
    """
    monkeypatch.setattr(placement.streaming, "CopyStreams", lambda device: LateCopies())
    plain, folder = placement.place_within, tmp_path / "five"
    make_model("llama-tied", num_hidden_layers=5).save_pretrained(folder)
    tokenizer.save_pretrained(folder)

    def go(streamed, name, *flags):
        plan = placement.Plan(streamed, True)
        monkeypatch.setattr(placement, "place_within", lambda lm, _, device: plain(lm, plan, device))
        return run("finetune_lowmem", name, "--batch_size", 4, "--epochs", 2, *flags, model=folder)

    return go


def test_a_streamed_run_is_the_resident_one_also_across_new_starts(run_streamed):
    """Bit for bit: what it saves and scores, with other numbers of layers that stream after each --resume."""
    summary, whole = run_streamed(0, "whole")
    assert summary["eval"][-1]["gold_nll"] < 0.8 * summary["eval"][0]["gold_nll"]
    run_streamed(5, "parts", "--max_steps", 4)
    run_streamed(0, "parts", "--max_steps", 7, "--resume")
    _, parts = run_streamed(4, "parts", "--save_every", 4, "--resume")
    assert_same_run(whole, parts)
    saved, expected = (weights(folder / "checkpoint" / "step-30") for folder in (parts, whole))
    assert saved.keys() == expected.keys()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in expected.items())


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("trained", ["layers", "all"])
def test_streamed_layers_train_as_resident_ones_do_on_a_gpu(graphs, trained):
    """Bit for bit over 20 steps, the same kernels, where copies really run beside the computation."""
    device = torch.device("cuda")
    shape = {"hidden_size": 256, "intermediate_size": 1024, "head_dim": 64, "layers": 6, "max_position_embeddings": 256}
    torch.use_deterministic_algorithms(True)
    stream = torch.cuda.Stream()
    try:
        with torch.cuda.stream(stream), torch.autograd.set_multithreading_enabled(False):
            found = []
            for streamed in ([], range(6), [0, 2, 3, 5]):
                made = make_run("llama", streamed, trained=trained, device=device, **shape)
                step, score, get = made.step, made.score, made.weights
                batches = [make_batch(seed, rows=8, length=128).to(device) for seed in range(20)]
                step(batches[0])
                if graphs:
                    pool = torch.cuda.graph_pool_handle()
                    step, score = (cuda_graphs.Graphs(f, pool) for f in (step, score))
                losses = [(step(batch), score(batch) if n % 3 == 0 else None) for n, batch in enumerate(batches[:10])]
                get()  # saving in between changes nothing
                losses += [(step(batch), score(batch)) for batch in batches[10:]]
                found.append((losses, get()))
            for losses, final in found[1:]:
                for (loss, scores), (loss0, scores0) in zip(losses, found[0][0], strict=True):
                    assert torch.equal(loss, loss0)
                    assert scores is None or torch.equal(scores, scores0)
                assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(final, found[0][1], strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


def test_rows_from_host_are_the_embeddings():
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    table, ids = torch.randn(500, 1500).bfloat16(), torch.randint(500, (4, 7), device=device)
    table = table.pin_memory() if device == "cuda" else table
    assert torch.equal(streaming.rows_from_host(table, ids).cpu(), F.embedding(ids.cpu(), table))
