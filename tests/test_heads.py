"""Heads of real architectures at tiny size, and the proof that ours gives the model's own logits."""

import pytest
import torch
import transformers
from support.tiny import ARCHITECTURES, make_model
from support.training import CPU, make_batch

from lowmem import streaming
from lowmem.training import heads
from lowmem.training.batches import Sequence
from lowmem.training.data import Data
from lowmem.training.errors import UserError


def check(model, head, batch):
    """`check_head` of the loss that evaluation has."""
    with torch.no_grad():
        evaluation = lambda hidden: -head.score_targets(hidden, batch.targets)[:, 0].mean()  # noqa: E731
        heads.check_head(model, head, batch, {"evaluation": evaluation})


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_and_log_probs_are_the_models_own(architecture, monkeypatch):
    """In fp32, the log-probabilities in blocks of two rows."""
    monkeypatch.setattr(heads, "MAX_LOGITS", 800)
    model, batch = make_model(architecture), make_batch(rows=2)
    head = heads.Head(model)
    with torch.no_grad():
        own = model(input_ids=batch.ids).logits.flatten(0, 1)[batch.indices]
        hidden = model.base_model(input_ids=batch.ids).last_hidden_state.flatten(0, 1)[batch.indices]
        torch.testing.assert_close(head.logits(hidden), own, atol=1e-5, rtol=1e-5)
        batch.targets[::3] = own[::3].argmax(-1)
        found = head.score_targets(hidden, batch.targets)
        scores = own.log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]
        torch.testing.assert_close(found[:, 0], scores, atol=1e-5, rtol=1e-5)
        assert torch.equal(found[:, 1], (own.argmax(-1) == batch.targets).float())
    check(model, head, batch)


def test_of_equal_logits_one_is_the_likeliest():
    """A model of which nothing is left predicts one token, not each."""
    model = make_model("llama")
    model.lm_head.weight.data.zero_()
    hidden, targets = torch.randn(5, model.config.hidden_size), torch.tensor([3, 0, 7, 0, 399])
    whole = heads.Head(model)
    pieces = streaming.StreamedHead(model, streaming.CopyStreams(CPU), CPU, piece_bytes=4096)
    for head in (whole, pieces):
        with torch.no_grad():
            assert head.score_targets(hidden, targets)[:, 1].tolist() == [0, 1, 0, 1, 0]


class OddHead(transformers.LlamaForCausalLM):
    """A head that does what no flag of its config tells."""

    odd = staticmethod(lambda logits: logits)

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = self.odd(output.logits)
        return output


@pytest.mark.parametrize(
    "odd",
    [
        lambda x: 10 * torch.tanh(x / 10),
        lambda x: x / 2,
        lambda x: x + torch.linspace(-3, 3, x.shape[-1]),
        lambda x: x.roll(1, -1),
    ],
    ids=["hidden soft-capping", "hidden scaling", "hidden bias", "another order"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("initializer_range", [0.1, 0.001])
def test_an_unknown_head_is_refused_by_name(odd, dtype, initializer_range):
    model, batch = OddHead(make_model(initializer_range=initializer_range).config).to(dtype), make_batch()
    head = heads.Head(model)
    check(model, head, batch)
    model.odd = odd
    with pytest.raises(UserError, match="OddHead is not supported: evaluation"):
        check(model, head, batch)


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_a_known_head_is_not_refused_for_few_and_likely_targets(rank):
    """A loss far below the largest logit, of one target: bf16's rounding of the model's own logits does not cancel."""
    model = make_model(initializer_range=0.1).bfloat16()
    head, data = heads.Head(model), Data([], [], max_tokens=64)
    for seed in range(20):
        ids = torch.randint(5, model.config.vocab_size, (1, 7), generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            target = model(input_ids=ids).logits[0, -1].argsort(descending=True)[rank]
        check(model, head, data.batch([Sequence.ending([*ids[0].tolist(), target.item()], 1)]))


def test_damaged_weights_are_said():
    model = make_model()
    with torch.no_grad():
        model.get_output_embeddings().weight[7] = torch.nan
    with pytest.raises(UserError, match="its weights are damaged or too large"):
        check(model, heads.Head(model), make_batch())


def test_a_model_without_a_head_is_refused_by_name():
    with pytest.raises(UserError, match="LlamaModel is not supported: its language-model head"):
        heads.Head(make_model().base_model)


def test_a_scale_that_is_no_number_is_refused():
    model = make_model()
    model.config.logit_scale = "2"
    with pytest.raises(UserError, match="config.json is damaged: logit_scale is '2'"):
        heads.Head(model)
