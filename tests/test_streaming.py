"""Streaming from host memory: the mechanism, on the CPU; whole runs on a GPU. python -m pytest tests/test_streaming.py"""

import weakref
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import ARCHITECTURES, make_model
from test_architectures import CPU, checkpointed, make_batch
from test_cli import lines, run, weights  # noqa: F401 (run is a fixture)

import common
import finetune_lowmem


def make_run(architecture, streamed, slots=2, trained="layers", layers=5, device=CPU, copies=None, **shape):
    """A bf16 model of five layers with step, score and weights; `streamed` of them stream, the head too if it can."""
    model = make_model(architecture, num_hidden_layers=layers, **shape).bfloat16()
    chosen = common.choose_trained(model, trained)
    copies, layers = copies or finetune_lowmem.Copies(device), common.decoder_layers(model)
    head = (
        finetune_lowmem.StreamedHead(model, copies, device, piece=8192) if trained == "layers" else common.Head(model)
    )
    finetune_lowmem.keep_on_host(model, device, head=trained == "layers")
    for i, layer in enumerate(layers):
        if i not in streamed:
            layer.to(device)
    stack = finetune_lowmem.StreamedLayers([layers[i] for i in streamed], copies, device, slots)
    checkpointed(model, stack.again)
    optimizer = common.Adafactor(chosen.values(), lr=1e-2, seed=3)
    finetune_lowmem.update_in_backward(optimizer, chosen, after=stack.send_home)

    def step(batch):
        loss = finetune_lowmem.training_loss(model, head, batch)
        loss.backward()
        copies.settle()
        return loss.detach()

    @torch.no_grad()
    def score(batch):
        log_probs = common.target_log_probs(model, head, batch, finetune_lowmem.precision)
        copies.settle()
        return log_probs

    def weights():
        with stack.at_home():
            return [p.detach().clone() for p in model.parameters()]

    return SimpleNamespace(model=model, stack=stack, step=step, score=score, weights=weights, optimizer=optimizer)


@pytest.mark.parametrize("streamed", [range(5), [0, 1, 3, 4], [1, 2, 3, 4]])
@pytest.mark.parametrize("slots", [2, 1, 3])
def test_streamed_layers_train_as_resident_ones_do(streamed, slots):
    """Bit for bit, evaluations and saving between the steps included."""
    runs = [make_run("llama", layers, slots) for layers in ([], streamed)]
    for seed in range(15):
        batch = make_batch(seed)
        losses = [one.step(batch) for one in runs]
        assert torch.equal(*losses)
        if seed % 3 == 0:
            assert torch.equal(*(one.score(batch) for one in runs))
        if seed % 7 == 0:
            resident, moved = (one.weights() for one in runs)
            assert all(torch.equal(a, b) for a, b in zip(resident, moved, strict=True))


class LateCopies(finetune_lowmem.Copies):
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


class CountedCopies(finetune_lowmem.Copies):
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
    bytes_ = len(one.stack.home[0])
    weights = sum(part.stop - part.start for part in one.stack.parts)
    late, before = [], one.stack._before
    one.stack._before = lambda i: (
        late.extend([i] * any(layer != i for layer in one.stack.holds[i % slots])) or before(i)
    )
    for _ in range(3):
        copies.fetched, copies.sent = Counter(), 0
        one.step(make_batch())
        assert copies.sent == 6 * weights
        assert copies.fetched == {i: (i >= slots) * bytes_ + (i < 6 - slots) * weights for i in range(6)}
        copies.fetched, copies.sent = Counter(), 0
        one.score(make_batch())
        assert copies.fetched == dict.fromkeys(range(6), bytes_)
        assert copies.sent == 0
    assert not late


@pytest.mark.parametrize("streamed", [range(5), [0, 1, 3, 4]])
def test_what_runs_waits_for_its_copies(streamed):
    """With copies done as late as may be, as a busy bus would, the weights are still the resident run's."""
    plain, late = make_run("llama", []), make_run("llama", streamed, copies=LateCopies())
    for seed in range(6):
        assert torch.equal(plain.step(make_batch(seed)), late.step(make_batch(seed)))
        assert torch.equal(plain.score(make_batch(seed)), late.score(make_batch(seed)))
    assert all(torch.equal(a, b) for a, b in zip(plain.weights(), late.weights(), strict=True))


@pytest.mark.parametrize("trained", ["layers", "all"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_streams(architecture, trained):
    runs = [make_run(architecture, layers, trained=trained) for layers in ([], range(5))]
    for seed in range(4):
        losses = [one.step(make_batch(seed)) for one in runs]
        assert torch.equal(*losses)
    resident, moved = (one.weights() for one in runs)
    assert all(torch.equal(a, b) for a, b in zip(resident, moved, strict=True))


@pytest.mark.parametrize("logits", [common.LOGITS, 300])
@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "gemma2", "granite", "phi"])
def test_a_streamed_heads_log_probs_and_gradient(architecture, logits, monkeypatch):
    """Against fp64, with logits large enough that a soft-capping and a running maximum matter; at once or in parts."""
    monkeypatch.setattr(common, "LOGITS", logits)
    model, batch = make_model(architecture), make_batch()
    model.requires_grad_(False)
    plain = common.Head(model)
    hidden = torch.randn(40, 32) * 8
    targets = torch.randint(400, (40,))
    upstream = torch.randn(40)
    x = hidden.double().requires_grad_()
    true = x * plain.scale @ plain.weight.double().T + (0 if plain.bias is None else plain.bias.double())
    if plain.softcap:
        true = plain.softcap * torch.tanh(true / plain.softcap)
    truth = true.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    (truth * upstream).sum().backward()
    own = model(input_ids=batch.ids).logits
    head = finetune_lowmem.StreamedHead(model, finetune_lowmem.Copies(CPU), CPU, piece=4096)
    assert len(head.parts) == 14
    for _ in range(2):  # the buffers hold the right pieces for a second pass
        y = hidden.clone().requires_grad_()
        found = head.log_probs(y, targets)
        (found * upstream).sum().backward()
        assert (found - truth).abs().max() < 1e-4
        assert (y.grad - x.grad).norm() < 1e-5 * x.grad.norm()
    assert (model(input_ids=batch.ids).logits - own).abs().max() < 1e-5
    assert F.mse_loss(head.logits(hidden).double(), true) < 1e-8


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
    gib = common.GIB
    plan = finetune_lowmem.plan_within(int(budget * gib), 3 * gib, 8, gib, head and head * gib)
    assert plan == finetune_lowmem.Plan(*expected[:2], expected[2] * gib)


def test_a_plan_of_so_few_layers_that_none_streams():
    for layers in (0, 2):
        assert finetune_lowmem.plan_within(100, 50, layers, 10, 60) == finetune_lowmem.Plan(0, True, 50 + 10 * layers)


def test_a_steps_predicted_time_is_the_slower_of_work_and_copies_in_each_part():
    assert finetune_lowmem.predicted_seconds([2, 6, 8], [3, 1, 2], share=0.5) == 3 + 3 + 4


def test_a_batch_size_above_the_number_of_rows_means_all_of_them(run):  # noqa: F811
    whole, _ = run("finetune_lowmem", "whole", "--batch_size", 10**12, "--epochs", 1)
    assert whole["steps"] == 1


def test_a_budget_too_small_names_the_least_that_works():
    with pytest.raises(
        common.UserError, match=r"4\.90 GiB of GPU memory are too few: .* needs 5\.02 with all streamed that can be"
    ):
        finetune_lowmem.plan_within(int(4.9 * common.GIB), 3 * common.GIB, 8, common.GIB, common.GIB)


@pytest.fixture
def run_streamed(run, tmp_path, tokenizer, monkeypatch):  # noqa: F811
    """run_streamed(streamed, name, *flags): the script on a model of five layers, on the CPU; the head streams too.

    Copies are done as late as what the script waits for allows.
    """
    monkeypatch.setattr(finetune_lowmem, "Copies", lambda device: LateCopies())
    folder = tmp_path / "five"
    make_model("llama-tied", num_hidden_layers=5).save_pretrained(folder)
    tokenizer.save_pretrained(folder)

    def go(streamed, name, *flags):
        monkeypatch.setattr(finetune_lowmem, "choose_plan", lambda *_: finetune_lowmem.Plan(streamed, True))
        return run("finetune_lowmem", name, "--batch_size", 4, "--epochs", 2, *flags, model=folder)

    return go


def test_a_streamed_run_saves_and_scores_what_a_resident_one_does(run_streamed):
    resident, one = run_streamed(0, "resident")
    streamed, other = run_streamed(4, "streamed", "--save_every", 4)
    assert resident["eval"] == streamed["eval"]
    assert resident["eval"][-1]["gold_nll"] < 0.8 * resident["eval"][0]["gold_nll"]
    for part in ("model", "checkpoint/step-30"):
        assert weights(one / part).keys() == weights(other / part).keys()
        assert all(torch.equal(t, weights(other / part)[name]) for name, t in weights(one / part).items())


@pytest.mark.parametrize(("before", "after"), [(5, 5), (3, 0), (0, 4)])
def test_a_streamed_run_goes_on_from_its_checkpoint(run_streamed, before, after):
    """Also with more or less of the model on the GPU than before."""
    _, whole = run_streamed(5, "whole")
    run_streamed(before, "parts", "--max_steps", 7)
    _, parts = run_streamed(after, "parts", "--resume")
    assert all(torch.equal(t, weights(parts / "model")[name]) for name, t in weights(whole / "model").items())
    losses = [[m["train_loss"] for m in lines(f / "metrics.jsonl") if "train_loss" in m] for f in (whole, parts)]
    assert losses[0] == losses[1]


def test_layers_unlike_the_others_or_with_a_shared_weight_never_stream():
    model = make_model("llama", num_hidden_layers=5)
    layers = common.decoder_layers(model)
    layers[0].mlp.up_proj = torch.nn.Linear(32, 96, bias=False)
    assert finetune_lowmem.layers_alike(model) == list(layers)[1:]
    layers[4].mlp.up_proj = torch.nn.Linear(32, 96, bias=False)
    assert finetune_lowmem.layers_alike(model) == list(layers)[1:4]  # the most, not those like the last
    layers[4].mlp.up_proj = torch.nn.Linear(32, 64, bias=False)
    layers[2].mlp.up_proj.weight = layers[4].mlp.up_proj.weight
    assert finetune_lowmem.layers_alike(model) == [layers[1], layers[3]]


@pytest.mark.parametrize("late", [False, True])
def test_a_step_without_a_layer_or_a_gradient_costs_time_not_weights(late):
    """Layers that are skipped (as layerdrop does) and weights without a gradient (as an idle expert's)."""
    plain = make_run("llama", [], layers=6)
    moved = make_run("llama", range(6), layers=6, copies=LateCopies() if late else None)
    for seed in range(12):
        for one in (plain, moved):
            layers = common.decoder_layers(one.model)
            one.model.model.layers = torch.nn.ModuleList(layer for i, layer in enumerate(layers) if i != seed % 7)
            idle = layers[seed * 5 % 6].mlp.down_proj.weight.requires_grad_(False)
            one.loss = one.step(make_batch(seed))
            one.model.model.layers = layers
            idle.requires_grad_(True)
            one.scores = one.score(make_batch(seed))
        assert torch.equal(plain.loss, moved.loss)
        assert torch.equal(plain.scores, moved.scores)
    assert all(torch.equal(a, b) for a, b in zip(plain.weights(), moved.weights(), strict=True))


def test_saving_copies_no_streamed_weights(tmp_path, monkeypatch):
    """save_pretrained clones tensors that share a storage: at home each has its own."""
    model = make_model("llama", num_hidden_layers=5).bfloat16()
    stack = finetune_lowmem.StreamedLayers(list(common.decoder_layers(model)), finetune_lowmem.Copies(CPU), CPU)
    with stack.at_home():
        places = [p.untyped_storage().data_ptr() for p in stack.at_home_as]
        monkeypatch.setattr(torch.Tensor, "clone", lambda *_: pytest.fail("a weight was copied"))
        model.save_pretrained(tmp_path)
    assert len(set(places)) == len(places) == 5 * 9


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_first_layers_make_a_model_too(architecture):
    model, batch = make_model(architecture, num_hidden_layers=5), make_batch()
    whole = model(input_ids=batch.ids).logits
    with finetune_lowmem.first_layers(model, 2) as few:
        assert len(few) == len(common.decoder_layers(model)) == 2
        assert not torch.equal(model(input_ids=batch.ids).logits, whole)
    assert torch.equal(model(input_ids=batch.ids).logits, whole)


def test_host_memory_is_checked_before_anything_is_loaded(tmp_path, monkeypatch):
    model = make_model("llama").bfloat16()
    size = common.size_in_bytes(model.parameters())
    for dtype in (torch.bfloat16, torch.float16):
        model.to(dtype).save_pretrained(tmp_path / str(dtype))
    bf16, fp16 = (str(tmp_path / f"torch.{name}") for name in ("bfloat16", "float16"))
    monkeypatch.setattr(common, "free_host_memory", lambda: size - 1)
    slots = finetune_lowmem.SLOTS * common.size_in_bytes(common.decoder_layers(model)[0].parameters())
    finetune_lowmem.check_host_memory(bf16, 2**29 + slots + 1)  # that byte on the GPU
    with pytest.raises(common.UserError, match="of free host memory are too little"):
        finetune_lowmem.check_host_memory(bf16, 2**29 + slots)
    with pytest.raises(common.UserError, match=r"but as torch\.float16: to convert it takes"):
        finetune_lowmem.check_host_memory(fp16, 10 * size)
    monkeypatch.setattr(common, "free_host_memory", lambda: size)
    for name in (bf16, fp16):
        finetune_lowmem.check_host_memory(name, size - 1)


@pytest.mark.parametrize("own", ["", "0::/\n", "1:cpu:/elsewhere\n0::/user/job\n"])
def test_a_container_or_a_job_may_have_less_memory_than_its_host(own, tmp_path, monkeypatch):
    monkeypatch.setattr(common.psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    monkeypatch.setattr(common, "CONTROL_GROUPS", tmp_path)
    monkeypatch.setattr(common, "OWN_CONTROL_GROUP", tmp_path / "own")
    (tmp_path / "own").write_text(own)
    assert common.free_host_memory() == 1000
    for folder in [tmp_path, tmp_path / "user"][: 1 + ("user" in own)]:
        folder.mkdir(exist_ok=True)
        (folder / "memory.current").write_text("500\n")
        (folder / "memory.stat").write_text("anon 300\ninactive_file 50\nactive_file 100\n")
        for limit, free in [("2000", 1000), ("700", 350), ("max", 1000)]:
            (folder / "memory.max").write_text(f"{limit}\n")
            assert common.free_host_memory() == free


def test_the_largest_batch_is_as_large_as_any():
    train = [common.Sequence([0] * (4 + n % 30), 1 + n % 3) for n in range(50)]
    batch = common.largest_batch(train, 8, 16, 2048)
    assert batch.ids.shape == (8, 32)
    assert len(batch.targets) == 8 * 3


def test_streaming_frees_each_layer_before_it_takes_the_next(monkeypatch):
    """So that loading never holds the model twice."""
    model = make_model("llama", num_hidden_layers=5).bfloat16()
    layers = common.decoder_layers(model)
    old = [[weakref.ref(p.untyped_storage()) for p in layer.parameters()] for layer in layers]
    plain, alive = common.host_memory, []

    def host_memory(*args):
        alive.append(sum(any(storage() is not None for storage in layer) for layer in old))
        return plain(*args)

    monkeypatch.setattr(common, "host_memory", host_memory)
    finetune_lowmem.StreamedLayers(list(layers), finetune_lowmem.Copies(CPU), CPU)
    assert alive == [5, 4, 3, 2, 1]


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
            weights = []
            for streamed in ([], range(6), [0, 2, 3, 5]):
                made = make_run("llama", streamed, trained=trained, device=device, **shape)
                step, score, get = made.step, made.score, made.weights
                batches = [make_batch(seed, rows=8, length=128).to(device) for seed in range(20)]
                step(batches[0])
                if graphs:
                    pool = torch.cuda.graph_pool_handle()
                    step, score = (finetune_lowmem.Graphs(f, pool, rows=8) for f in (step, score))
                losses = [(step(batch), score(batch) if n % 3 == 0 else None) for n, batch in enumerate(batches[:10])]
                get()  # saving in between changes nothing
                losses += [(step(batch), score(batch)) for batch in batches[10:]]
                weights.append((losses, get()))
            for losses, final in weights[1:]:
                for (loss, scores), (loss0, scores0) in zip(losses, weights[0][0], strict=True):
                    assert torch.equal(loss, loss0)
                    assert scores is None or torch.equal(scores, scores0)
                assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(final, weights[0][1], strict=True))
    finally:
        torch.use_deterministic_algorithms(False)
