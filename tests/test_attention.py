"""Rows end to end in one line, with attention within each. python -m pytest tests/test_attention.py"""

import inspect

import pytest
import torch
import torch.nn.functional as F
import transformers
from support.tiny import ARCHITECTURES, TINY, make_model
from support.training import as_lm, checkpointed
from torch.nn.attention import varlen

import finetune_lowmem
from lowmem import cuda_graphs
from lowmem.adafactor import Adafactor
from lowmem.training import attention, models
from lowmem.training.attention import attend_within_rows
from lowmem.training.batches import Sequence
from lowmem.training.data import Data
from lowmem.training.errors import UserError
from lowmem.training.layouts import Lines, PaddedRows

IN_LINES = [name for name in ARCHITECTURES if name != "gemma2"]
LENGTHS = (41, 24, 31, 6, 3, 62, 34, 13)  # some longer than the windows of 16


def rows(seed=0, lengths=LENGTHS):
    generator = torch.Generator().manual_seed(seed)
    return [Sequence.ending(torch.randint(2, 400, (n,), generator=generator).tolist(), n // 3) for n in lengths]


def data_for(lm, sequences=None, few_lengths=False):
    """Data whose layout was chosen for the model."""
    data = Data(sequences or rows(), [], max_tokens=128)
    data.layout.few_lengths = few_lengths
    cuda_graphs.leave_out_masks(lm.network, data.longest())
    attention.choose_layout(lm, data)
    return data


def config_of(architecture, **settings):
    """A tiny model of an architecture that no other test has."""
    return transformers.AutoModelForCausalLM.from_config(architecture(**(TINY | settings)), dtype=torch.float32).eval()


@pytest.mark.parametrize("few_lengths", [False, True])
@pytest.mark.parametrize("architecture", IN_LINES)
def test_loss_and_gradients_are_those_of_padded_rows(architecture, few_lengths):
    """fp32, so that only the order of sums differs; with a line that is filled up, too. Seen: 5e-7."""
    found = []
    for layout in (PaddedRows, Lines):
        lm = as_lm(make_model(architecture))
        data = data_for(lm, few_lengths=few_lengths) if layout is Lines else Data(rows(), [], max_tokens=128)
        assert type(data.layout) is layout
        lm.check(data)
        checkpointed(lm.network)
        batch = data.batch(data.train)
        loss = finetune_lowmem.training_loss(lm, batch)
        loss.backward()
        found.append((loss.item(), torch.cat([p.grad.flatten() for p in lm.trained.values()])))
    (padded_loss, padded), (loss, gradient) = found
    assert batch.ids.shape == (1, few_or_not(sum(LENGTHS) - 8, few_lengths))
    assert loss == pytest.approx(padded_loss, rel=1e-5)
    assert (gradient - padded).norm() < 1e-5 * padded.norm()


def few_or_not(length, few_lengths):
    return 256 if few_lengths else length


@pytest.mark.parametrize(
    "architecture",
    [
        name if name in ("llama", "mistral", "mixtral") else pytest.param(name, marks=pytest.mark.slow)
        for name in IN_LINES
    ],
)
def test_updates_are_those_of_padded_rows(architecture):
    """Ten steps of Adafactor in backward, in fp32. Seen: 9e-6.

    Without a key's bias, which changes no weight of softmax: its gradient is rounding noise, and so are its steps, which
    round the others' otherwise.
    """
    found, noise = [], ("k_proj.bias", "query_key_value.bias", "c_attn.bias")
    for layout in (PaddedRows, Lines):
        lm = as_lm(make_model(architecture))
        data = data_for(lm) if layout is Lines else Data(rows(), [], max_tokens=128)
        checkpointed(lm.network)
        trained = {name: p for name, p in lm.trained.items() if not name.endswith(noise)}
        assert len(trained) >= len(lm.trained) - 2
        before = {name: p.detach().clone() for name, p in trained.items()}
        finetune_lowmem.update_in_backward(Adafactor(trained.values(), lr=1e-2), trained)
        for _ in range(10):
            finetune_lowmem.training_loss(lm, data.batch(data.train)).backward()
        found.append({name: p.detach() - before[name] for name, p in trained.items()})
    padded, lines = found
    for name in padded:
        assert (lines[name] - padded[name]).norm() < 1e-4 * padded[name].norm(), name


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma3", "gpt2", "mixtral"])
def test_a_row_s_scores_do_not_depend_on_its_neighbours(architecture):
    """First, last, alone, beside others: to the rounding of products of other sizes; with neighbours of like lengths, to the bit."""
    lm = as_lm(make_model(architecture))
    data = data_for(lm)
    row, others = data.train[0], data.train[1:]
    with torch.no_grad():
        alone = lm.score_targets(data.batch([row]))
        first = lm.score_targets(data.batch([row, *others]))[: row.targets]
        last = lm.score_targets(data.batch([*others, row]))[-row.targets :]
        other = lm.score_targets(data.batch([row, *rows(seed=1)[1:]]))[: row.targets]
    for scores in (first, last):
        torch.testing.assert_close(scores, alone, atol=1e-4, rtol=1e-5)
    if architecture != "mixtral":  # whose experts get other numbers of tokens
        assert torch.equal(first, other)


@pytest.mark.parametrize("window", [None, 4, 100])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
def test_attention_within_rows_is_softmax_by_its_definition(heads, window):
    """In fp64."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, n, 30, 8, dtype=torch.float64) for n in (heads[0], heads[1], heads[1]))
    starts = torch.tensor([0, 7, 7, 20, 29, 30, 30], dtype=torch.int32)  # rows of 7, 0, 13, 9, 1 and 0 tokens
    found, _ = attend_within_rows(
        None, q, k, v, None, 0.3, sliding_window=window, cu_seq_lens_q=starts, max_length_q=16
    )
    row_of = torch.bucketize(torch.arange(30), starts[1:], right=True)
    distance = torch.arange(30)[:, None] - torch.arange(30)
    seen = (row_of[:, None] == row_of) & (distance >= 0) & (distance < (window or 30))
    k, v = (x.repeat_interleave(heads[0] // heads[1], 1) for x in (k, v))
    weights = (0.3 * q @ k.mT).masked_fill(~seen, -torch.inf).softmax(-1)
    torch.testing.assert_close(found, (weights @ v).transpose(1, 2))


@pytest.mark.parametrize("gqa", [True, False])
def test_varlen_attn_gets_what_its_signature_takes(gqa, monkeypatch):
    """That of the torch that is installed, as it is from 2.12 on, with `enable_gqa`, and as before, without."""
    installed, given = inspect.signature(varlen.varlen_attn), {}
    parameters = [p for name, p in installed.parameters.items() if name != "enable_gqa"]
    if gqa:
        parameters.append(inspect.Parameter("enable_gqa", inspect.Parameter.KEYWORD_ONLY, default=False))
    signature = inspect.Signature(parameters)
    monkeypatch.setattr(attention, "GQA", attention.gqa_of(signature))

    def stand_in(*args, **kwargs):
        given.update(signature.bind(*args, **kwargs).arguments)
        return args[0]

    monkeypatch.setattr(varlen, "varlen_attn", stand_in)
    q, k = torch.randn(1, 4, 9, 8), torch.randn(1, 2, 9, 8)
    starts = torch.tensor([0, 4, 9], dtype=torch.int32)
    out = attention._attend_on_gpu(q, k, k, 0.5, 3, starts, 5)
    assert torch.equal(out, q.transpose(1, 2))
    assert given["key"].shape == (9, 2, 8)
    assert (given["max_q"], given["max_k"], given["scale"], given["window_size"]) == (5, 5, 0.5, (2, 0))
    assert given["cu_seq_q"] is given["cu_seq_k"] is starts
    assert given.get("enable_gqa", False) == ("enable_gqa" in signature.parameters)


def test_torch_compile_follows_attention_on_a_gpu_whole(monkeypatch):
    """Traced, not run: a break in it would cut each compiled layer once more."""
    torch._dynamo.reset()
    traced = []
    monkeypatch.setattr(attention, "_attend_on_cpu", attention._attend_on_gpu)

    def backend(graph, inputs):
        traced.append(graph)
        return lambda *_: (torch.zeros(1, 9, 4, 16),)

    q, k = torch.randn(1, 4, 9, 16).bfloat16(), torch.randn(1, 2, 9, 16).bfloat16()
    attend = torch.compile(attend_within_rows, fullgraph=True, dynamic=True, backend=backend)
    starts = torch.tensor([0, 4, 9], dtype=torch.int32)
    attend(None, q, k, k, None, 0.5, sliding_window=3, cu_seq_lens_q=starts, max_length_q=5)
    assert len(traced) == 1
    torch._dynamo.reset()


CONV_OR_STATE = {
    "mamba": (transformers.MambaConfig, {"state_size": 8}, "attention is not PyTorch's"),
    "lfm2": (transformers.Lfm2Config, {"layer_types": ["full_attention", "conv"]}, "not every layer is plain attention"),
    "qwen3-next": (
        transformers.Qwen3NextConfig,
        {
            "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
            "linear_num_key_heads": 2, "linear_num_value_heads": 4, "layer_types": ["linear_attention", "full_attention"],
        },
        "not every layer is plain attention|can't keep packed sequences apart",  # transformers 5.24's own words
    ),
    "falcon-h1": (  # attention and a state-space model in each layer
        transformers.FalconH1Config,
        {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1},
        "a layer sees across rows",
    ),
    "gpt2 with dropout": (transformers.GPT2Config, {"n_positions": 128}, "dropout in attention"),
    "gemma2": (transformers.Gemma2Config, {"head_dim": 8}, "soft-capping|not PyTorch's"),
    "bloom": (transformers.BloomConfig, {}, "not PyTorch's"),
    "gpt-oss": (
        transformers.GptOssConfig, {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}, "not PyTorch's",
    ),
}  # fmt: skip


@pytest.mark.parametrize("architecture", CONV_OR_STATE)
def test_models_that_see_across_rows_or_lack_more_than_windows_get_padded_rows(architecture, capsys):
    """transformers packs some of them in silence (its PR 46333)."""
    config, settings, why = CONV_OR_STATE[architecture]
    lm = as_lm(config_of(config, **settings))
    before = lm.network.config._attn_implementation
    data = Data(rows(), [], max_tokens=128)
    attention.choose_layout(lm, data)
    assert type(data.layout) is PaddedRows
    assert lm.network.config._attn_implementation == before
    said = capsys.readouterr().out
    assert "padded rows" in said
    assert any(part in said for part in why.split("|"))
    assert lm.score_targets(data.batch(data.train)).isfinite().all()


def test_rows_that_change_how_others_are_turned_are_refused():
    """Of Phi-3 with 128k the longest row of a batch chooses the angles of all."""
    rope = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}  # as Phi-3's config.json has it
    lengths = {"max_position_embeddings": 128, "original_max_position_embeddings": 32}
    lm = as_lm(config_of(transformers.Phi3Config, rope_scaling=rope, pad_token_id=0, **lengths))
    attention.choose_layout(lm, Data([s for s in rows() if s.tokens <= 32], [], max_tokens=128))
    for data in (Data([Sequence.ending([1] * 34, 4)], [], 128), Data([], [Sequence.ending([1] * 34, 4)], 128)):
        with pytest.raises(UserError, match=r"33 tokens.*more than 32 .*LongRoPE.*: take --max_length 32"):
            attention.choose_layout(lm, data)


def test_what_one_rank_finds_all_follow(monkeypatch, capsys):
    monkeypatch.setattr(attention.parallel, "gather_objects", lambda why_not: [why_not, "a layer sees across rows"])
    data = Data(rows(), [], max_tokens=128)
    attention.choose_layout(as_lm(make_model("llama")), data)
    assert type(data.layout) is PaddedRows
    assert "padded rows: a layer sees across rows" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"s_aux": torch.zeros(4)}, "attention sinks"), ({"softcap": 50.0}, "soft-capping"),
        ({"dropout": 0.1}, "dropout"), ({"cu_seq_lens_q": None}, "not told where rows start"),
    ],
)  # fmt: skip
def test_what_attention_within_rows_lacks_is_refused(given, why):
    x = torch.zeros(1, 4, 9, 8)
    with pytest.raises(NotImplementedError, match=why):
        attend_within_rows(None, x, x, x, None, **{"cu_seq_lens_q": torch.tensor([0, 9])} | given)


def test_one_row_to_train_on_is_enough_to_see_that_rows_leak():
    config, settings, _ = CONV_OR_STATE["falcon-h1"]
    data = Data(rows()[:1], rows(), max_tokens=128)
    attention.choose_layout(as_lm(config_of(config, **settings)), data)
    assert type(data.layout) is PaddedRows


def test_positions_that_do_not_start_at_0_are_kept():
    """OPT's tables of positions start at 2 (transformers PR 47525)."""
    network = config_of(transformers.OPTConfig, ffn_dim=64, word_embed_proj_dim=32, dropout=0.0)
    lm, data = as_lm(network), Data(rows(), [], max_tokens=128)
    with torch.no_grad():
        padded = lm.score_targets(data.batch(data.train))
        attention.choose_layout(lm, data)
        assert type(data.layout) is Lines
        torch.testing.assert_close(lm.score_targets(data.batch(data.train)), padded, atol=1e-4, rtol=1e-5)


class Shifted(transformers.GPT2LMHeadModel):
    """A model with a table of positions that run on from row to row, whatever it is told."""

    def __init__(self, config):
        super().__init__(config)
        self.transformer.register_forward_pre_hook(
            lambda _, args, kwargs: (args, kwargs | {"position_ids": None}), with_kwargs=True
        )


class Windowed(transformers.LlamaForCausalLM):
    """A model that does not tell its attention of the window that its mask has."""

    def __init__(self, config):
        super().__init__(config)
        config.sliding_window = 48


@pytest.mark.parametrize(
    ("network", "architecture", "why"),
    [
        (Shifted, "gpt2", "a row's place in a line changes it"),
        (Windowed, "llama", "attention does not say its window of 48 tokens"),
    ],
)
def test_positions_and_windows_that_do_not_arrive_are_found(network, architecture, why, capsys):
    lm = as_lm(network(make_model(architecture).config).eval())
    data = Data(rows(), [], max_tokens=128)
    attention.choose_layout(lm, data)
    assert type(data.layout) is PaddedRows
    assert why in capsys.readouterr().out


def test_rounding_that_grows_over_many_layers_is_no_change_of_place(monkeypatch):
    """80 layers of random weights amplify bf16's rounding, of 2^-9, to more than IN_PLACE."""
    network = make_model("llama", num_hidden_layers=80)
    for p in network.parameters():
        if p.ndim > 1:
            p.data.mul_(1.8 / p.shape[-1] ** 0.5 / p.std())  # as of 8,192 inputs at a deviation of 0.02
    lm, data = as_lm(network), Data(rows(), [], max_tokens=128)
    _, before = attention._hidden_states(lm, data.small())
    at, plain = data.small().indices, attention.attend_within_rows

    def rounded_otherwise(*args, **kwargs):
        out, weights = plain(*args, **kwargs)
        return out * (1 + 2**-9 * torch.randn(out.shape, generator=torch.Generator().manual_seed(0))), weights

    with monkeypatch.context() as patch:
        patch.setattr(attention, "attend_within_rows", rounded_otherwise)
        attention.choose_layout(lm, data)
        assert type(data.layout) is Lines
        _, after = attention._hidden_states(lm, data.small())
    transformers.AttentionInterface.register(attention.NAME, plain)
    assert attention._apart(before[at], after[data.small().indices]).max() > attention.IN_PLACE


@pytest.mark.parametrize("which", [0, 3, 5])
def test_one_layer_that_tells_places_in_a_line_apart_is_found(which, capsys):
    network = make_model("llama", num_hidden_layers=6)

    def by_place(_, args, kwargs):
        states = kwargs["hidden_states"]
        return args, kwargs | {"hidden_states": states * (1 + torch.arange(states.shape[1])[:, None] / 100)}

    network.model.layers[which].self_attn.register_forward_pre_hook(by_place, with_kwargs=True)
    data = Data(rows(), [], max_tokens=128)
    attention.choose_layout(as_lm(network), data)
    assert type(data.layout) is PaddedRows
    assert "a row's place in a line changes it" in capsys.readouterr().out


def four_dimensions(layers):
    """As between the layers of Gemma 3n."""
    layers[0].register_forward_hook(lambda _, args, out: out[None])
    layers[1].register_forward_pre_hook(lambda _, args: (args[0][0], *args[1:]))


def twice_the_same(layers):
    layers[1] = layers[0]


def one_idle(layers):
    layers[1].forward = layers[0].forward


@pytest.mark.parametrize(
    ("change", "layout"), [(four_dimensions, Lines), (twice_the_same, Lines), (one_idle, PaddedRows)]
)
def test_layers_of_other_make_are_tried_out_too(change, layout):
    network = make_model("llama")
    change(network.model.layers)
    data = Data(rows(), [], max_tokens=128)
    attention.choose_layout(as_lm(network), data)
    assert type(data.layout) is layout


def test_a_window_behind_the_first_layers_is_looked_for():
    """Qwen2-MoE does not tell its attention of it; a plan is made with the first layers alone."""
    kinds = ["full_attention", "full_attention", "sliding_attention", "sliding_attention"]
    experts = {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
    windows = {"num_hidden_layers": 4, "layer_types": kinds, "use_sliding_window": True, "sliding_window": 16}
    lm = as_lm(config_of(transformers.Qwen2MoeConfig, **experts, **windows))
    data = Data(rows(), [], max_tokens=128)
    cuda_graphs.leave_out_masks(lm.network, data.longest())
    with models.first_layers(lm.network, models.layers_to_measure(lm.network)) as few:
        assert len(few) == 2
        attention.choose_layout(lm, data)
    assert type(data.layout) is PaddedRows


@pytest.mark.parametrize("few_lengths", [False, True])
def test_a_line_that_leaks_is_refused(few_lengths):
    """Full attention over the whole line, as under an all-ones mask (transformers PR 46634): `check` sees it on the whole model."""
    lm = as_lm(make_model("llama"))
    data = data_for(lm, few_lengths=few_lengths)
    lm.check(data)

    def over_all(module, query, key, value, *args, scaling=None, **how):
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2), None

    transformers.AttentionInterface.register(attention.NAME, over_all)
    try:
        with pytest.raises(models.UserError, match="not causal, a token changes what comes before it or another row"):
            lm.check(data)
    finally:
        transformers.AttentionInterface.register(attention.NAME, attend_within_rows)


# ---------------------------------------------------------------------------------------------------------------------
# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("architecture", IN_LINES)
def test_on_a_gpu_loss_and_gradients_are_those_of_fp32(architecture):
    """bf16 by FlashAttention against the padded rows of the same weights in fp32: as near as bf16's padded rows are, twice."""
    sizes = {"hidden_size": 64, "intermediate_size": 128}
    sizes |= {"head_dim": 16} if architecture in ("qwen3", "gemma3") else {}
    found = {}
    for name, dtype in (("fp32", torch.float32), ("padded", torch.bfloat16), ("lines", torch.bfloat16)):
        network = make_model(architecture, **sizes).bfloat16().to(dtype).cuda()
        lm = as_lm(network)
        data = Data(rows(), [], max_tokens=128)
        if name == "lines":
            data = data_for(lm, few_lengths=True)
            assert type(data.layout) is Lines
            lm.check(data)
        checkpointed(lm.network)
        loss = finetune_lowmem.training_loss(lm, data.batch(data.train).to("cuda"))
        loss.backward()
        found[name] = loss.item(), torch.cat([p.grad.flatten().float() for p in lm.trained.values()])
    (true_loss, truth), padded, lines = (found[name] for name in ("fp32", "padded", "lines"))
    off = {name: (found[name][1] - truth).norm() / truth.norm() for name in ("padded", "lines")}
    assert off["lines"] < 2 * off["padded"]
    assert abs(lines[0] - true_loss) < max(2 * abs(padded[0] - true_loss), 0.01 * true_loss)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 16])
def test_on_a_gpu_a_row_does_not_depend_on_its_neighbours(window):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, n, 300, 64, device="cuda", dtype=torch.bfloat16) for n in (4, 2, 2))
    starts = torch.tensor([0, 100, 170, 170, 300], dtype=torch.int32, device="cuda")
    how = {"sliding_window": window, "max_length_q": 256}
    whole, _ = attend_within_rows(None, q, k, v, None, cu_seq_lens_q=starts, **how)
    for start, end in ((0, 100), (100, 170), (170, 300)):
        row = [x[:, :, start:end] for x in (q, k, v)]
        one = torch.tensor([0, end - start], dtype=torch.int32, device="cuda")
        alone, _ = attend_within_rows(None, *row, None, cu_seq_lens_q=one, **how)
        assert torch.equal(alone, whole[:, start:end])
        on_cpu, _ = attend_within_rows(None, *(x.cpu().double() for x in row), None, cu_seq_lens_q=one.cpu(), **how)
        assert (alone.cpu() - on_cpu).norm() < 0.01 * on_cpu.norm()
