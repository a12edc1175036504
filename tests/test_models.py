"""Real architectures at tiny size: each trains correctly or is refused by name. python -m pytest tests/test_models.py"""

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
import transformers
from support.damage import change_json
from support.runs import weights
from support.tiny import ARCHITECTURES, TINY, make_model, make_tokenizer
from support.training import as_lm, checkpointed, make_batch, own_loss

import finetune_base
import finetune_lowmem
from lowmem import placement
from lowmem.training import models
from lowmem.training.batches import Sequence
from lowmem.training.data import Data
from lowmem.training.errors import UserError

DATA = Data([Sequence.ending([5, 6, 7], 1)], [], max_tokens=128)


@pytest.mark.parametrize("trained", ["layers", "all"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loss_and_gradients_equal_the_models_own(architecture, trained):
    """In fp32, where any difference is a mistake and not rounding: both scripts' losses and every trained gradient."""
    batch, plain = make_batch(), make_model(architecture)
    models.choose_trained(plain, trained)
    truth = own_loss(plain, batch)
    truth.backward()
    for script in (finetune_lowmem, finetune_base):
        lm = as_lm(checkpointed(copy.deepcopy(plain)), trained, script.precision)
        lm.network.zero_grad()
        loss = script.training_loss(lm, batch)
        loss.backward()
        assert loss.item() == pytest.approx(truth.item(), rel=1e-5)
        for (name, p), expected in zip(lm.network.named_parameters(), plain.parameters(), strict=True):
            assert (p.grad is None) == (expected.grad is None) == (not p.requires_grad) == (name not in lm.trained)
            if p.grad is not None:
                assert (p.grad - expected.grad).norm() < 1e-4 * expected.grad.norm() + 1e-7, name


@pytest.mark.gpu
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("trained", ["layers", "all"])
def test_gpu_gradients_against_fp32_truth(architecture, trained):
    """bf16 on the GPU: error to the fp32 truth at most 1.5 times the ordinary bf16 path's."""
    batch, model = make_batch(rows=16), make_model(architecture, hidden_size=64, intermediate_size=128).bfloat16()
    models.choose_trained(model, trained)
    truth, naive = copy.deepcopy(model).float(), copy.deepcopy(model).cuda()
    own_loss(truth, batch).backward()
    own_loss(naive, batch.to("cuda")).backward()
    lm = as_lm(model, trained, finetune_lowmem.precision)
    placement.place_within(lm, placement.Plan(0, False), torch.device("cuda"))
    finetune_lowmem.training_loss(lm, batch.to("cuda")).backward()
    for (name, p), q, t in zip(model.named_parameters(), naive.parameters(), truth.parameters(), strict=True):
        if t.grad is not None:
            error, naive_error = ((x.grad.cpu().float() - t.grad).norm() / t.grad.norm() for x in (p, q))
            assert error < 1.5 * naive_error + 5e-3, name


def test_a_layer_s_hooks_run_again_in_backward_and_only_there():
    """They bring a streamed layer's weights. Twice turned on, each layer still runs twice, in the later context."""
    network, runs, entered = make_model(), [], []
    models.checkpoint_activations(network)
    models.checkpoint_activations(network, context_fn=lambda: (nullcontext(), entered.append(1) or nullcontext()))
    for k, layer in enumerate(models.decoder_layers(network)):
        layer.register_forward_pre_hook(lambda *_, k=k: runs.append(k))
    lm, batch = as_lm(network), make_batch()
    with torch.no_grad():
        lm.score_targets(batch)
    assert runs == [0, 1]
    finetune_lowmem.training_loss(lm, batch).backward()
    assert runs == [0, 1, 0, 1, 1, 0]
    assert len(entered) == 2
    network.eval()
    finetune_lowmem.training_loss(lm, batch).backward()
    assert runs == [0, 1, 0, 1, 1, 0, 0, 1]


def test_checkpointing_changes_no_name_and_makes_one_class():
    """A class for each layer would be compiled anew."""
    plain, network = make_model(), make_model()
    models.checkpoint_activations(network)
    assert list(network.state_dict()) == list(plain.state_dict())
    first, second = models.decoder_layers(network)
    assert type(first) is type(second)
    assert type(first).__name__ == "LlamaDecoderLayer"


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


def test_a_model_that_sees_later_tokens_is_refused_by_name():
    batch = make_batch()
    for architecture in ARCHITECTURES:
        models.check_causal(as_lm(make_model(architecture)), DATA, batch)
        models.check_causal(
            as_lm(make_model(architecture).bfloat16(), precision=finetune_lowmem.precision), DATA, batch
        )
    lm = as_lm(make_model("gemma3", use_bidirectional_attention=True))
    with pytest.raises(UserError, match="Gemma3ForCausalLM is not supported: it is not causal"):
        models.check_causal(lm, DATA, batch)


def test_a_tokenizer_of_another_model_is_refused():
    data = Data([Sequence.ending([5, 400, 7], 1)], [], max_tokens=128)
    with pytest.raises(UserError, match="ids up to 400 where LlamaForCausalLM knows 400"):
        models.check_ids(as_lm(make_model()), data)


def test_layers_that_text_does_not_reach_are_refused():
    lm = as_lm(make_model())
    tower = copy.deepcopy(lm.network.base_model)
    lm.network.get_decoder = lambda: tower
    with pytest.raises(UserError, match="what is taken for its decoder layers does not all run on text"):
        models.check_causal(lm, DATA, make_batch())


def test_a_loss_that_differs_is_refused_by_its_name():
    lm = as_lm(make_model())
    lm.check(DATA, finetune_lowmem.linear_cross_entropy)
    with pytest.raises(UserError, match="LlamaForCausalLM is not supported: cross entropy gives a loss"):
        lm.check(DATA, lambda *inputs: finetune_lowmem.linear_cross_entropy(*inputs) / 2)


def test_a_model_that_cannot_checkpoint_is_refused_by_name():
    model = make_model()
    model.supports_gradient_checkpointing = False
    with pytest.raises(UserError, match="LlamaForCausalLM is not supported: .*gradient checkpointing"):
        models.checkpoint_activations(model)


def test_decoder_layers_that_cannot_be_found_are_refused_by_name():
    model = make_model()
    model.config.num_hidden_layers = 7
    with pytest.raises(UserError, match="LlamaForCausalLM is not supported: its decoder layers"):
        models.choose_trained(model, "layers")


# ---------------------------------------------------------------------------------------------------------------------
# Random numbers and precision


def test_random_numbers_in_training_are_seen_where_no_module_or_setting_tells():
    """OPT draws its dropout by a function; without its own random state again, a rerun layer would draw another."""
    batch = make_batch()
    for architecture in ARCHITECTURES:
        assert not as_lm(make_model(architecture)).uses_rng_in_forward(batch), architecture
    config = transformers.OPTConfig(
        vocab_size=400, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32
    )
    lm = as_lm(transformers.OPTForCausalLM(config).eval())
    assert lm.uses_rng_in_forward(batch)
    assert not lm.network.training


def test_fp32_products_are_exact_products_of_bf16_values():
    torch.manual_seed(0)
    a, w = torch.randn(50, 300).bfloat16(), torch.randn(40, 300).bfloat16()
    truth = (a.double() @ w.double().T).to(torch.bfloat16)
    with models.Fp32Products():
        results = [F.linear(a, w), a @ w.T, torch.matmul(a, w.T), torch.addmm(torch.zeros(40).bfloat16(), a, w.T)]
    for result in results:
        assert result.dtype == torch.bfloat16
        # fp32 sums round to another bf16 value than the truth for a few in 10,000
        assert (result != truth).double().mean() < 5e-3
    with models.Fp32Products():
        assert (a.float() @ w.float().T).dtype == torch.float32


# ---------------------------------------------------------------------------------------------------------------------
# The layers of the text


def load_bf16(folder, trained="layers"):
    return models.load(str(folder), torch.bfloat16, trained, finetune_lowmem.precision)


def pictures_and_text(folder):
    """A Gemma 3 with a vision tower of as many layers as the text has."""
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28, "patch_size": 14}  # fmt: skip
    text = TINY | {"head_dim": 8, "sliding_window": 16}
    tokens = {"mm_tokens_per_image": 4, "image_token_index": 5, "boi_token_index": 3, "eoi_token_index": 4}
    torch.manual_seed(0)
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, **tokens)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("trained", ["layers", "all"])
def test_of_a_model_of_pictures_and_text_the_text_is_chosen(trained, tmp_path):
    lm = load_bf16(pictures_and_text(tmp_path), trained)
    text = {name for name, _ in lm.network.named_parameters() if "language_model" in name}
    layers = {name for name in text if ".layers." in name}
    assert lm.trained.keys() == (layers if trained == "layers" else text)


@pytest.mark.slow
@pytest.mark.parametrize("trained", ["layers", "all"])
def test_of_a_model_of_pictures_and_text_the_text_is_trained(trained, run, tmp_path):
    model = pictures_and_text(tmp_path / "model")
    flags = "--batch_size", 4, "--max_steps", 3, "--epochs", 1, "--trained", trained
    summary, folder = run("finetune_lowmem", "x", *flags, model=model)
    before, after = weights(model), weights(folder / "model")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    text = {name for name in before if "language_model" in name}
    layers = {name for name in text if ".layers." in name}
    assert changed == layers if trained == "layers" else layers < changed <= text
    assert summary["eval"][1]["gold_nll"] < summary["eval"][0]["gold_nll"]


def test_layers_that_may_be_skipped_are_refused_by_name(tmp_path):
    opt = {"ffn_dim": 64, "word_embed_proj_dim": 32, "do_layer_norm_before": True, "layerdrop": 0.5}
    bart = {
        "d_model": 32,
        "decoder_layers": 2,
        "decoder_ffn_dim": 64,
        "decoder_attention_heads": 4,
        "decoder_layerdrop": 0.1,
        "encoder_layerdrop": 0.1,  # of no encoder that is here
    }
    for config, name in (
        (transformers.OPTConfig(**TINY | opt), "layerdrop"),
        (transformers.BartConfig(**TINY | bart), "decoder_layerdrop"),
    ):
        model = tmp_path / config.model_type
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(model)
        message = f"is not supported while it skips layers at random: set {name} to 0 in its config.json"
        with pytest.raises(UserError, match=message):
            load_bf16(model)
        change_json(model / "config.json", **{name: 0.0})
        assert load_bf16(model).trained


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_routers_train_in_the_type_that_is_asked_for(stored, tmp_path):
    """transformers 5.24 loads them in fp32, whatever their files hold."""
    config = transformers.Dots1Config(
        **(TINY | {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1}),
        topk_group=1, first_k_dense_replace=1, n_shared_experts=1, head_dim=8,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config, dtype=stored).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    lm = models.load(str(tmp_path), torch.bfloat16, "layers", nullcontext)
    assert any("gate.weight" in name for name in lm.trained)
    assert {p.dtype for p in lm.trained.values()} == {torch.bfloat16}
