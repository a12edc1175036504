"""HellaSwag as lm-evaluation-harness scores it, judged by the real package. python -m pytest tests/test_hellaswag.py"""

import math
import random

import hypothesis.strategies as st
import pytest
import torch
import transformers
from benchmarks.harness import harness_results
from conftest import ODD_ROWS, make_model, make_row, make_tokenizer, many_rows
from hypothesis import given, settings
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

import common

CPU = torch.device("cpu")


def log_probs_of(model, head=None):
    head = head or common.Head(model)
    return lambda batch: common.target_log_probs(model, head, batch, torch.no_grad)


# Bar of the design: 1e-3. Seen here: 4e-6 (fp32 sums of up to 60 log-probabilities in another order).
LOGLIKELIHOOD_TOLERANCE = 1e-3


@pytest.mark.parametrize("bos", [False, True], ids=["no-bos", "bos"])
@pytest.mark.parametrize("merge", [False, True], ids=["words", "merge-across-boundary"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_scores_equal_the_harness_row_by_row(bos, merge, architecture):
    tokenizer, rows = make_tokenizer(bos, merge), ODD_ROWS + many_rows(6)
    model = make_model(architecture, max_position_embeddings=60, n_positions=60)
    expected, accuracy = harness_results(model, tokenizer, rows)
    limit = common.length_limit(model.config, tokenizer)
    prepared = common.evaluation_rows([row | {"label": int(row["label"])} for row in rows], tokenizer, limit)
    assert any(len(s.ids) == limit + 1 for row in prepared for s in row.sequences), "no row reaches the model's limit"
    scores = common.evaluate(model, prepared, CPU, limit, log_probs_of(model), tokens_per_batch=300)
    assert torch.tensor(scores).sub(torch.tensor(expected)).abs().max() < LOGLIKELIHOOD_TOLERANCE
    ours = common.accuracy(prepared, scores)
    assert (ours["acc"], ours["acc_norm"]) == pytest.approx((accuracy["acc"], accuracy["acc_norm"]))
    gold = [-row_scores[int(row["label"])] for row_scores, row in zip(expected, rows, strict=True)]
    assert ours["gold_nll"] == pytest.approx(sum(gold) / len(gold), abs=1e-3)


def test_the_merging_tokenizer_really_merges_across_the_boundary():
    tokenizer = make_tokenizer(merge_across_words=True)
    query, endings = common.harness_text(many_rows(1)[0])
    whole = tokenizer(query + " " + endings[0])["input_ids"]
    assert whole[: len(tokenizer(query)["input_ids"])] != tokenizer(query)["input_ids"]


def test_text():
    query, endings = common.harness_text(ODD_ROWS[2])
    # " [title]" becomes ". "; a marker leaves two spaces behind; one pass of two to one is all
    assert query == "Fixing a roof: How to fix a roof. Get a ladder. Climb. Then you"
    assert common.harness_text(ODD_ROWS[3])[1] == ["a b", "c d", " e f", "g  h"]
    assert common.harness_text(ODD_ROWS[1])[0] == "Cooking: A man stands in a kitchen."


def test_empty_context_gets_bos_or_eos():
    for bos, expected in ((True, 0), (False, 1)):
        tokenizer = make_tokenizer(bos)
        ((context, continuation),) = common.encode_pairs(tokenizer, [("", " hello")])
        assert context == [expected]
        assert continuation == tokenizer(" hello", add_special_tokens=False)["input_ids"]


def test_ties_go_to_the_lowest_index():
    row = common.EvalRow(0, 1, [], [2, 2, 4, 4])
    assert common.accuracy([row], [[-2.0, -1.0, -1.0, -2.0]])["acc"] == 100
    assert common.accuracy([row], [[-1.0, -1.0, -2.0, -2.0]])["acc_norm"] == 0


def test_a_row_that_cannot_be_scored_is_refused(tokenizer):
    for endings in (["a", "", "b", "c"], ["a", "[step]", "b", "c"], ["a", "b", "c", "word " * 200]):
        with pytest.raises(common.UserError, match="cannot be scored"):
            common.evaluation_rows([make_row(3, 0, endings=endings) | {"label": 0}], tokenizer, 64)


def labelled(tokenizer, batch, row):
    """(text of the inputs, text of the labels) of one row of a batch."""
    keep = batch.labels[row] != common.IGNORE
    return tokenizer.decode(batch.ids[row]), tokenizer.decode(batch.labels[row][keep])


@pytest.mark.parametrize("bos", [False, True])
def test_labels_are_the_right_ending_and_eos_alone(bos):
    tokenizer = make_tokenizer(bos)
    rows = [row | {"label": int(row["label"])} for row in ODD_ROWS]
    for text in ("harness", "raw"):
        sequences = common.training_sequences(rows, tokenizer, text, 1000)
        batch = common.collate(sequences, 1000)
        for number, row in enumerate(rows):
            endings = common.harness_text(row)[1] if text == "harness" else row["endings"]
            inputs, targets = labelled(tokenizer, batch, number)
            assert targets.strip() == endings[row["label"]].strip() + "<eos>"
            assert "<eos>" not in inputs
            # a label is the next input token
            places = (batch.labels[number, :-1] != common.IGNORE).nonzero()[:-1, 0]
            assert torch.equal(batch.labels[number, places], batch.ids[number, places + 1])


@pytest.mark.parametrize("behind", ["<eos>", "<eos> <eos>", "<bos> <eos>"])
@pytest.mark.parametrize("bos", [False, True])
def test_what_a_tokenizer_adds_behind_a_text_is_taken_off(bos, behind):
    """As `add_eos_token` does: the text goes on, and rows are trained and scored as without."""
    plain, adds = make_tokenizer(bos), make_tokenizer(bos)
    template = "<bos> $A" if bos else "$A"
    tokens = [("<bos>", 0), ("<eos>", 1)]
    adds.backend_tokenizer.post_processor = processors.TemplateProcessing(f"{template} {behind}", special_tokens=tokens)
    assert adds("word")["input_ids"] == plain("word")["input_ids"] + [t == "<eos>" for t in behind.split()]
    assert (common.added_behind(plain), common.added_behind(adds)) == (0, len(behind.split()))
    rows = [row | {"label": int(row["label"])} for row in ODD_ROWS]
    for text in ("harness", "raw"):
        assert common.training_sequences(rows, adds, text, 99) == common.training_sequences(rows, plain, text, 99)
    assert common.evaluation_rows(rows, adds, 99) == common.evaluation_rows(rows, plain, 99)


def test_rows_whose_ending_has_no_token_of_its_own_are_left_out_and_named(capsys):
    """One token spans the context's end and the ending; or the ending is a marker and nothing else."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<eos>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )  # fmt: skip
    tokenizer.train_from_iterator(["he cuts", "Cooking: he cuts"] * 50, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    gone = make_row(0, 0, ctx_a="he", ctx_b="", endings=["cuts", "flies", "paints", "sings"]) | {"label": 0}
    there, marker = gone | {"label": 1}, gone | {"endings": ["[step]"] * 4}
    for text, rows, names in (
        ("raw", [there, gone, there, gone], "row 1 ' cuts', row 3 ' cuts'"),
        ("harness", [marker, there, gone, gone, gone], "row 0 ' ', row 2 ' cuts', row 3 ' cuts', ..."),
    ):
        kept = common.training_sequences(rows, tokenizer, text, 99)
        assert kept == common.training_sequences([row for row in rows if row is there], tokenizer, text, 99)
        said = f"{len(rows) - len(kept)} of {len(rows)} rows to train on have a right ending without a token of its own"
        assert f"{said} ({names}): left out\n" in capsys.readouterr().out
        with pytest.raises(common.UserError, match="2 of 2 rows to train on have a right ending without a token"):
            common.training_sequences([gone, gone], tokenizer, text, 99)
    unscorable = (
        "2 validation endings cannot be scored.*: row 1 \\(ind 0\\), ending 0, 'cuts': no token of its own, row 2"
    )
    other = make_row(7, 0) | {"label": 0}
    with pytest.raises(common.UserError, match=unscorable):
        common.evaluation_rows([other, gone, there], tokenizer, 99)


def test_a_long_row_is_cut_on_the_left(tokenizer):
    row = make_row(0, 0, ctx_a="word " * 300) | {"label": 0}
    (sequence,) = common.training_sequences([row], tokenizer, "harness", 50)
    assert len(sequence.ids) == 51
    assert tokenizer.decode(sequence.ids).endswith("cuts an onion.<eos>")
    assert common.collate([sequence], 50).ids.shape == (1, 50)


def test_padding_changes_no_score(tokenizer):
    model, rows = make_model(), [row | {"label": int(row["label"])} for row in many_rows(8)]
    prepared = common.evaluation_rows(rows, tokenizer, 128)
    one_by_one = common.evaluate(model, prepared, CPU, 128, log_probs_of(model), tokens_per_batch=1)
    together = common.evaluate(model, prepared, CPU, 128, log_probs_of(model), tokens_per_batch=10**6, pad_to=32)
    assert torch.tensor(one_by_one).sub(torch.tensor(together)).abs().max() < 1e-4


@given(
    st.lists(st.integers(1, 300), min_size=1, max_size=400), st.integers(1, 40), st.integers(0, 99), st.integers(1, 3)
)
@settings(max_examples=60, deadline=None)
def test_batch_order_deals_each_row_once_and_is_seeded(lengths, batch_size, seed, epoch):
    batches = common.batch_order(lengths, batch_size, seed, epoch)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    assert len(batches) == math.ceil(len(lengths) / batch_size)
    assert batches == common.batch_order(lengths, batch_size, seed, epoch)


def test_batch_order_saves_padding_and_changes_with_the_epoch():
    rng = random.Random(0)
    lengths = [rng.randint(20, 160) for _ in range(2000)]
    ordered = common.batch_order(lengths, 8, 42, 1)
    padded = sum(len(batch) * max(lengths[row] for row in batch) for batch in ordered)
    assert padded < 1.05 * sum(lengths), "rows of like length are not together"
    assert ordered != common.batch_order(lengths, 8, 42, 2)


texts = st.text(max_size=60)


@given(texts, texts, texts, st.lists(texts.filter(lambda t: t.strip()), min_size=4, max_size=4), st.integers(0, 3))
@settings(max_examples=150, deadline=None)
def test_any_text_is_formatted_and_collated(activity, ctx_a, ctx_b, endings, label):
    tokenizer = make_tokenizer_once()
    row = make_row(0, label, activity, ctx_a, ctx_b, endings) | {"label": label}
    for text in ("harness", "raw"):
        (sequence,) = common.training_sequences([row], tokenizer, text, 64)
        batch = common.collate([sequence], 64)
        assert 1 <= (batch.labels != common.IGNORE).sum() == sequence.targets <= 64


def make_tokenizer_once(made=[]):  # noqa: B006 (hypothesis runs the test many times)
    made or made.append(make_tokenizer())
    return made[0]


def test_evaluation_makes_no_array_of_rows_by_tokens_by_vocabulary(tokenizer, monkeypatch):
    """The largest tensor of an evaluation, seen at the dispatcher: a piece of logits, bounded whatever the batch."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            largest = max(largest, out.numel() if torch.is_tensor(out) else 0)
            return out

    model, rows = make_model(), [row | {"label": int(row["label"])} for row in many_rows(32)]
    prepared, head = common.evaluation_rows(rows, tokenizer, 128), common.Head(model)
    monkeypatch.setattr(head, "pieces", lambda *tensors: [tensor.split(16) for tensor in tensors])
    with Watch():
        common.evaluate(model, prepared, CPU, 128, log_probs_of(model, head))
    tokens = sum(len(s.ids) for row in prepared for s in row.sequences)
    assert 16 * 400 <= largest < 0.1 * tokens * 400
    (pieces,) = common.Head(model).pieces(torch.zeros(50_000, 32))
    assert max(len(h) for h in pieces) * 400 <= 2**23
