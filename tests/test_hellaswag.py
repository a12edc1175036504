"""HellaSwag: rows, sequences, and the evaluation, judged by lm-evaluation-harness. python -m pytest tests/test_hellaswag.py"""

import gzip
import json
import re
import shutil
import zipfile
from types import SimpleNamespace

import datasets
import hypothesis.strategies as st
import pytest
import torch
import transformers
from benchmarks.harness import harness_results
from hypothesis import given, settings
from support.damage import contents, cut
from support.runs import refused
from support.tiny import ODD_ROWS, make_model, make_row, make_tokenizer, many_rows, write_jsonl
from support.training import CPU, as_lm
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

import common
from lowmem.training import evaluation, tokenizing
from lowmem.training.batches import IGNORE
from lowmem.training.errors import UserError

TOKENIZER = make_tokenizer()


def checked(rows):
    return [common.check_row(row, number, "rows") for number, row in enumerate(rows)]


def to_score(rows, tokenizer, max_tokens, **how):
    """HellaSwag data of rows to score alone."""
    found, scored = common.evaluation_rows(checked(rows), tokenizer, max_tokens)
    return common.HellaSwag([], scored, max_tokens, rows=found, **how)


def arguments(dataset, train_rows=None, eval_rows=None, **more):
    settings = {
        "train_text": "harness",
        "epochs": 1,
        "batch_size": 4,
        "max_steps": None,
        "warmup_steps": 0,
        "seed": 0,
        "max_length": None,
        "train_on": "answers",
    } | more
    return SimpleNamespace(dataset=str(dataset), train_rows=train_rows, eval_rows=eval_rows, **settings)


# ---------------------------------------------------------------------------------------------------------------------
# Scores

# Bar of the design: 1e-3. Seen here: 4e-6 (fp32 sums of up to 60 log-probabilities in another order).
LOGLIKELIHOOD_TOLERANCE = 1e-3


@pytest.mark.parametrize(
    ("architecture", "bos", "merge"),
    [("llama", False, False), ("llama", True, True), ("gpt2", False, True), ("gemma2", True, False)],
    ids=["llama", "llama-bos-merge-across-boundary", "gpt2-merge-across-boundary", "gemma2-bos"],
)
def test_scores_equal_the_harness_row_by_row(architecture, bos, merge):
    tokenizer, rows = make_tokenizer(bos, merge), ODD_ROWS + many_rows(6)
    model = make_model(architecture, max_position_embeddings=60, n_positions=60)
    expected, accuracy = harness_results(model, tokenizer, rows)
    limit = tokenizing.length_limit(model.config, tokenizer)
    data = to_score(rows, tokenizer, limit, eval_tokens=300)
    assert any(len(s.ids) == limit + 1 for s in data.scored), "no row reaches the model's limit"
    found = evaluation.evaluate(as_lm(model), data, CPU)
    scores = torch.tensor([row["loglikelihoods"] for row in found.rows])
    assert scores.sub(torch.tensor(expected)).abs().max() < LOGLIKELIHOOD_TOLERANCE
    assert [(row["ind"], row["label"]) for row in found.rows] == [(row["ind"], int(row["label"])) for row in rows]
    assert found.finite
    ours = found.values
    assert (ours["acc"], ours["acc_norm"]) == pytest.approx((accuracy["acc"], accuracy["acc_norm"]))
    gold = [-row_scores[int(row["label"])] for row_scores, row in zip(expected, rows, strict=True)]
    assert ours["gold_nll"] == pytest.approx(sum(gold) / len(gold), abs=1e-3)


def test_the_merging_tokenizer_really_merges_across_the_boundary():
    tokenizer = make_tokenizer(merge_across_words=True)
    query, endings = common.harness_text(many_rows(1)[0])
    whole = tokenizer(query + " " + endings[0])["input_ids"]
    assert whole[: len(tokenizer(query)["input_ids"])] != tokenizer(query)["input_ids"]


def test_ties_go_to_the_lowest_index():
    row = common.EvalRow(0, 1, [2, 2, 4, 4])
    assert common.accuracy([row], [[-2.0, -1.0, -1.0, -2.0]])["acc"] == 100
    assert common.accuracy([row], [[-1.0, -1.0, -2.0, -2.0]])["acc_norm"] == 0


def test_padding_changes_no_score():
    lm = as_lm(make_model())
    found = [
        evaluation.evaluate(lm, to_score(many_rows(8), TOKENIZER, 128, **how), CPU).rows
        for how in ({"eval_tokens": 1}, {"eval_tokens": 10**6})
    ]
    one_by_one, together = (torch.tensor([row["loglikelihoods"] for row in rows]) for rows in found)
    assert (one_by_one - together).abs().max() < 1e-4


def test_scores_that_are_not_finite_are_said():
    model = make_model()
    with torch.no_grad():
        model.get_output_embeddings().weight[5] = torch.nan
    assert not evaluation.evaluate(as_lm(model), to_score(many_rows(4), TOKENIZER, 128), CPU).finite


def test_evaluation_makes_no_array_of_rows_by_tokens_by_vocabulary(monkeypatch):
    """The largest tensor of an evaluation, seen at the dispatcher: a block of logits, bounded whatever the batch."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            largest = max(largest, out.numel() if torch.is_tensor(out) else 0)
            return out

    lm, data = as_lm(make_model()), to_score(many_rows(32), TOKENIZER, 128)
    (blocks,) = lm.head.blocks(torch.zeros(50_000, 32))
    assert max(len(h) for h in blocks) * 400 <= 2**23
    monkeypatch.setattr(lm.head, "blocks", lambda *tensors, **_: [tensor.split(16) for tensor in tensors])
    with Watch():
        evaluation.evaluate(lm, data, CPU)
    tokens = sum(len(s.ids) for s in data.scored)
    assert 16 * 400 <= largest < 0.1 * tokens * 400


# ---------------------------------------------------------------------------------------------------------------------
# Text and sequences


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


@pytest.mark.parametrize("bos", [False, True])
def test_labels_are_the_right_ending_and_eos_alone(bos):
    tokenizer, rows = make_tokenizer(bos), checked(ODD_ROWS)
    for text in ("harness", "raw"):
        sequences = common.training_sequences(rows, tokenizer, text, 1000)
        batch = common.HellaSwag(sequences, [], 1000).batch(sequences)
        for number, row in enumerate(rows):
            endings = common.harness_text(row)[1] if text == "harness" else row["endings"]
            labels = batch.labels[number]
            targets = tokenizer.decode(labels[labels != IGNORE])
            assert targets.strip() == endings[row["label"]].strip() + "<eos>"
            assert "<eos>" not in tokenizer.decode(batch.ids[number])
            # a label is the next input token
            places = (labels[:-1] != IGNORE).nonzero()[:-1, 0]
            assert torch.equal(labels[places], batch.ids[number, places + 1])


@pytest.mark.parametrize(("bos", "behind"), [(False, "<eos>"), (True, "<eos> <eos>"), (True, "<bos> <eos>")])
def test_what_a_tokenizer_adds_behind_a_text_is_taken_off(bos, behind):
    """As `add_eos_token` does: the text goes on, and rows are trained and scored as without."""
    plain, adds = make_tokenizer(bos), make_tokenizer(bos)
    template = "<bos> $A" if bos else "$A"
    tokens = [("<bos>", 0), ("<eos>", 1)]
    adds.backend_tokenizer.post_processor = processors.TemplateProcessing(f"{template} {behind}", special_tokens=tokens)
    assert adds("word")["input_ids"] == plain("word")["input_ids"] + [t == "<eos>" for t in behind.split()]
    assert (tokenizing.added_behind(plain), tokenizing.added_behind(adds)) == (0, len(behind.split()))
    rows = checked(ODD_ROWS)
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
        with pytest.raises(UserError, match="2 of 2 rows to train on have a right ending without a token"):
            common.training_sequences([gone, gone], tokenizer, text, 99)
    unscorable = (
        "2 validation endings cannot be scored.*: row 1 \\(ind 0\\), ending 0, 'cuts': no token of its own, row 2"
    )
    other = make_row(7, 0) | {"label": 0}
    with pytest.raises(UserError, match=unscorable):
        common.evaluation_rows([other, gone, there], tokenizer, 99)


@pytest.mark.parametrize("words", [300, pytest.param(200_000, marks=pytest.mark.slow)])
def test_a_long_row_is_cut_on_the_left_and_said(words, capsys):
    """Up to a context of a megabyte."""
    rows = checked([*many_rows(5), make_row(5, 0, ctx_a="word " * words)])
    *_, sequence = common.training_sequences(rows, TOKENIZER, "harness", 50)
    assert len(sequence.ids) == 51
    assert TOKENIZER.decode(sequence.ids).endswith("cuts an onion.<eos>")
    assert common.HellaSwag([sequence], [], 50).batch([sequence]).ids.shape == (1, 50)
    _, scored = common.evaluation_rows(rows, TOKENIZER, 50)
    assert max(len(s.ids) for s in scored) == 51
    said = capsys.readouterr().out
    assert "1 of 6 sequences to train on are longer than 50 tokens: cut on the left" in said
    assert "4 of 24 sequences to evaluate on are longer than 50 tokens: cut on the left" in said


def test_a_warm_up_longer_than_the_run_is_refused(dataset_folder):
    flags = {"batch_size": 4, "max_steps": 10, "warmup_steps": 10}
    with pytest.raises(UserError, match="--warmup_steps 10 is not less than the run's 10 steps: take fewer"):
        common.load(arguments(dataset_folder, **flags), TOKENIZER, 128)
    data = common.load(arguments(dataset_folder, **flags | {"epochs": 0}), TOKENIZER, 128)
    assert (data.train, len(data.rows), len(data.scored)) == ([], 16, 64)


def test_content_tells_apart_what_is_scored_apart():
    """What is hashed for --resume: labels too, and which rows train and which are scored."""
    rows = checked(many_rows(8))
    one = common.training_sequences(rows[:1], TOKENIZER, "harness", 99)
    plain = to_score(rows, TOKENIZER, 99)
    changed = [
        to_score([rows[0] | {"label": (rows[0]["label"] + 1) % 4}, *rows[1:]], TOKENIZER, 99),
        to_score(rows[::-1], TOKENIZER, 99),
        common.HellaSwag(plain.scored, [], 99),
        common.HellaSwag(one, plain.scored, 99, rows=plain.rows),
    ]
    assert len({b"".join(data.content()) for data in (plain, *changed)}) == 5


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("a\0"),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
names = ("activity_label", "ctx_a", "ctx_b", "ctx")
sound_row = st.fixed_dictionaries(
    dict.fromkeys(names, text)
    | {"endings": st.lists(text, min_size=4, max_size=4), "label": st.sampled_from(["0", "3", 1])}
)
odd_row = st.fixed_dictionaries(
    dict.fromkeys(names, text | anything)
    | {"endings": st.lists(text, min_size=3, max_size=5) | anything, "label": st.sampled_from("0123") | anything}
)


@given(st.lists(sound_row | odd_row, min_size=1, max_size=3), st.sampled_from(["harness", "raw"]), st.integers(1, 40))
@settings(max_examples=300, deadline=None)
def test_any_rows_are_refused_or_become_sound_batches(rows, text, limit):
    """Of any types at all: UserError, or batches whose targets are the right ending's ids, in order, and EOS.

    Rows whose right ending is empty are left out.
    """
    problem = None
    try:
        rows = [common.check_row(row, number, "train") for number, row in enumerate(rows)]
    except UserError as error:
        problem = str(error)
    if problem:
        assert re.match(r"train, row \d+", problem)
        return
    ending_of = {
        id(row): (common.harness_text(row)[1] if text == "harness" else row["endings"])[row["label"]] for row in rows
    }
    kept_rows = [row for row in rows if ending_of[id(row)].strip()]
    if not kept_rows:
        with pytest.raises(UserError, match="have a right ending without a token of its own"):
            common.training_sequences(rows, TOKENIZER, text, limit)
        return
    sequences, rows = common.training_sequences(rows, TOKENIZER, text, limit), kept_rows
    data = common.HellaSwag(sequences, [], limit)
    batch = data.batch(sequences)
    assert batch.ids.shape == batch.labels.shape == (len(rows), data.shape(sequences).length)
    assert batch.ids.shape[1] <= limit
    assert batch.weights.sum().item() == pytest.approx(1)
    for row, sequence, ids, labels in zip(rows, sequences, batch.ids, batch.labels, strict=True):
        kept = labels[labels != IGNORE].tolist()
        assert kept == sequence.ids.tolist()[-sequence.targets :]
        assert kept[-1] == TOKENIZER.eos_token_id
        end = len(sequence.ids) - 1
        assert ids[:end].tolist() == sequence.ids.tolist()[:-1]
        assert not ids[end:].any()
        decoded = TOKENIZER.decode(kept[:-1], clean_up_tokenization_spaces=False)
        if len(sequence.ids) <= limit and row["ctx" if text == "raw" else "activity_label"].strip():
            assert decoded.endswith(ending_of[id(row)])


# ---------------------------------------------------------------------------------------------------------------------
# Data sets


@pytest.mark.parametrize("form", ["save_to_disk", "parquet", "jsonl"])
def test_forms_of_a_data_set(form, tmp_path):
    splits = {"train": many_rows(8), "validation": many_rows(4, seed=1)}
    data = datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in splits.items()})
    if form == "save_to_disk":
        data.save_to_disk(str(tmp_path))
    for name, rows in splits.items():
        if form == "parquet":
            data[name].to_parquet(str(tmp_path / f"{name}.parquet"))
        if form == "jsonl":
            write_jsonl(tmp_path / f"{name}.jsonl", rows)
        assert common.load_rows(arguments(tmp_path), name) == checked(rows)
        assert common.load_rows(arguments(tmp_path, 3, 3), name) == checked(rows)[:3]


def test_rows_of_a_folder_with_an_odd_name_and_of_a_file_with_a_byte_order_mark(tmp_path):
    """datasets would take the name for a pattern."""
    folder = tmp_path / "[a]*$HOME"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", many_rows(5))
    (folder / "train.jsonl").write_bytes(
        b"\xef\xbb\xbf" + (folder / "train.jsonl").read_bytes().replace(b"\n", b"\r\n\n")
    )
    datasets.Dataset.from_list(many_rows(5)).to_parquet(str(folder / "validation.parquet"))
    args = arguments(folder, train_rows=4)
    assert common.load_rows(args, "train") == common.load_rows(args, "validation")[:4]
    assert len(common.load_rows(args, "validation")) == 5


@pytest.mark.parametrize(("where", "behind"), [("", ""), ("data", ""), ("data", "-0123456789abcdef")])
def test_rows_in_the_hub_s_layout(where, behind, tmp_path):
    """In parts, as parquet or compressed, in data/ as in a clone, or not; of what else lies there nothing is taken."""
    rows, folder = checked(many_rows(12)), tmp_path / where
    folder.mkdir(exist_ok=True)
    datasets.Dataset.from_list(rows[:5]).to_parquet(str(folder / f"train-00000-of-00002{behind}.parquet"))
    datasets.Dataset.from_list(rows[5:]).to_parquet(str(folder / f"train-00001-of-00002{behind}.parquet"))
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    name = f"validation-00000-of-00001{behind}" if where else "validation.v2"
    (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    for other in ("test-00000-of-00001.parquet", "training-00000-of-00001.parquet", "train.txt"):
        (folder / other).touch()
    for limit in (None, 4, 5, 7):
        args = arguments(tmp_path, limit, limit)
        assert common.load_rows(args, "train") == common.load_rows(args, "validation") == rows[:limit]


def row_with(**changes):
    return lambda f: write_jsonl(f / "train.jsonl", [*many_rows(5), make_row(5, 0) | changes])


def without(row, *names):
    return {k: v for k, v in row.items() if k not in names}


def save_to_disk(folder):
    rows = {name: datasets.Dataset.from_list(many_rows(20)) for name in ("train", "validation")}
    datasets.DatasetDict(rows).save_to_disk(str(folder))
    return folder


def parquet(folder):
    (folder / "train.jsonl").unlink()
    datasets.Dataset.from_list(many_rows(20)).to_parquet(str(folder / "train.parquet"))
    return folder / "train.parquet"


def gzipped(folder):
    content = (folder / "train.jsonl").read_bytes()
    (folder / "train.jsonl").unlink()
    (folder / "train.jsonl.gz").write_bytes(gzip.compress(content))
    return folder / "train.jsonl.gz"


def replace_bytes(old, new):
    return lambda f: (f / "train.jsonl").write_bytes((f / "train.jsonl").read_bytes().replace(old, new, 1))


AGAIN = "get it again"
ARROW = "data-00000-of-00001.arrow"
DAMAGE = {
    "a line cut": (lambda f: cut(f / "train.jsonl", 0.9), "line 54, is not JSON"),
    "an empty file": (lambda f: (f / "train.jsonl").write_text(""), "split train is empty"),
    "blank lines alone": (lambda f: (f / "train.jsonl").write_text("\n\n\n"), "split train is empty"),
    "not UTF-8": (replace_bytes(b"takes", b"t\xffkes"), AGAIN),
    "UTF-16": (lambda f: (f / "train.jsonl").write_bytes((f / "train.jsonl").read_text().encode("utf-16")), AGAIN),
    "NUL bytes": (replace_bytes(b"takes", b"t\0kes"), "line 1, is not JSON"),
    "a hole of NUL bytes at the end": (lambda f: (f / "train.jsonl").write_bytes((f / "train.jsonl").read_bytes() + bytes(4096)), "line 61, is not JSON"),
    "an escaped NUL": (row_with(ctx_a="a\0b"), "row 5 contains a NUL character"),
    "an escaped NUL in an ending": (row_with(endings=["a", "b", "c\0", "d"]), "row 5 contains a NUL character"),
    "HTML": (lambda f: (f / "train.jsonl").write_text("<html>404</html>"), "line 1, is not JSON"),
    "null for a row": (lambda f: (f / "train.jsonl").write_text("null\n" + (f / "train.jsonl").read_text()), "line 1, is not a row, which is a JSON object"),
    "a list for a row": (lambda f: (f / "train.jsonl").write_text("[1]\n"), "line 1, is not a row, which is a JSON object"),
    "a row without anything": (lambda f: write_jsonl(f / "train.jsonl", [make_row(0, 0), {}]), "row 1: activity_label, ctx_a, ctx_b and ctx must be strings"),
    "lists in lists, 100,000 deep": (lambda f: (f / "train.jsonl").write_text("[" * 100_000 + "]" * 100_000), "line 1, is not JSON"),
    "half of a surrogate pair": (row_with(ctx_a="a\ud800b"), "row 5 contains a NUL character or half of a surrogate pair"),
    "a number of 10,000 digits": (lambda f: (f / "train.jsonl").write_text('{"label": ' + "9" * 10_000 + "}"), "line 1, is not JSON"),
    "a number among texts": (row_with(ctx_a=5), "row 5: activity_label, ctx_a, ctx_b and ctx must be strings"),
    "null for text": (row_with(ctx_b=None), "row 5: activity_label, ctx_a, ctx_b and ctx must be strings"),
    "a list for text": (row_with(ctx=["a"]), "row 5: activity_label, ctx_a, ctx_b and ctx must be strings"),
    "three endings": (row_with(endings=["a", "b", "c"]), "row 5: endings must be four strings"),
    "five endings": (row_with(endings=["a"] * 5), "row 5: endings must be four strings"),
    "null for endings": (row_with(endings=None), "row 5: endings must be four strings"),
    "a null ending": (row_with(endings=["a", "b", None, "d"]), "row 5: endings must be four strings"),
    "text for endings": (row_with(endings="abcd"), "row 5: endings must be four strings"),
    "columns missing": (lambda f: write_jsonl(f / "train.jsonl", [without(r, "ctx_a", "endings") for r in many_rows(3)]), "lacks the HellaSwag columns ctx_a, endings"),
    "endings missing in one row": (lambda f: write_jsonl(f / "train.jsonl", [make_row(0, 0), without(make_row(1, 0), "endings")]), "row 1: endings must be four strings"),
    "label 4": (row_with(label="4"), "row 5: label '4' is not 0, 1, 2 or 3"),
    "label null": (row_with(label=None), "row 5: label 'None' is not 0, 1, 2 or 3"),
    "no label, as in the test split": (row_with(label=""), "HellaSwag's test split has none"),
    "label a megabyte": (row_with(label="9" * 10**6), "row 5: label '9999999999999999999999999999999999999999' is not"),
    "no rows": (lambda f: write_jsonl(f / "validation.jsonl", []), "split validation is empty"),
    "an empty ending": (lambda f: write_jsonl(f / "validation.jsonl", [make_row(0, 0, endings=["a", "", "b", "c"])]), "row 0 (ind 0), ending 1, ''"),
    "an ending of markers alone": (lambda f: write_jsonl(f / "validation.jsonl", [make_row(0, 0, endings=["a", "b", "c", "[step]"])]), "row 0 (ind 0), ending 3, ''"),
    "an ending longer than the model": (lambda f: write_jsonl(f / "validation.jsonl", [make_row(0, 0, endings=["a", "b", "c", "word " * 200])]), "1 validation endings cannot be scored: each ending needs between 1 and 128 tokens, and these have others: row 0 (ind 0), ending 3, 'word word word word word word word word ': 200 tokens; take their rows out"),
    "a folder for a file": (lambda f: [(f / "train.jsonl").unlink(), (f / "train.jsonl").mkdir()], AGAIN),
    "two files for a split": (lambda f: shutil.copy(f / "train.jsonl", f / "train.parquet"), "and has train.jsonl, train.parquet"),
    "a part missing": (lambda f: (f / "train.jsonl").rename(f / "train-00001-of-00002.jsonl"), "and has train-00001-of-00002.jsonl"),
    "parts of two wholes": (lambda f: [shutil.copy(f / "train.jsonl", f / "train-00000-of-00001.jsonl"), (f / "train.jsonl").rename(f / "train-00001-of-00002.jsonl")], "and has train-00000-of-00001.jsonl, train-00001-of-00002.jsonl"),
    "a whole and its part": (lambda f: shutil.copy(f / "train.jsonl", f / "train-00000-of-00001.jsonl"), "and has train-00000-of-00001.jsonl, train.jsonl"),
    "a whole beside parts in data/": (lambda f: [(f / "data").mkdir(), shutil.copy(f / "train.jsonl", f / "data" / "train-00000-of-00001.jsonl")], "and has data/train-00000-of-00001.jsonl, train.jsonl"),
    "no file for a split": (lambda f: (f / "train.jsonl").unlink(), "and has none"),
    "gzip cut": (lambda f: cut(gzipped(f)), AGAIN),
    "gzip of nothing": (lambda f: gzipped(f).write_bytes(b""), "split train is empty"),
    "text named gzip": (lambda f: (f / "train.jsonl").rename(f / "train.jsonl.gz"), AGAIN),
    "parquet cut": (lambda f: cut(parquet(f)), AGAIN),
    "parquet empty": (lambda f: parquet(f).write_bytes(b""), AGAIN),
    "parquet a zip": (lambda f: zipfile.ZipFile(parquet(f), "w").close(), AGAIN),
    "arrow cut": (lambda f: cut(save_to_disk(f) / "train" / ARROW), AGAIN),
    "arrow missing": (lambda f: (save_to_disk(f) / "train" / ARROW).unlink(), AGAIN),
    "arrow empty": (lambda f: (save_to_disk(f) / "train" / ARROW).write_bytes(b""), AGAIN),
    "dataset_dict cut": (lambda f: cut(save_to_disk(f) / "dataset_dict.json"), AGAIN),
    "dataset_info cut": (lambda f: cut(save_to_disk(f) / "train" / "dataset_info.json"), AGAIN),
    "a split missing": (lambda f: shutil.rmtree(save_to_disk(f) / "validation"), AGAIN),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_data_set_is_refused(name, dataset_folder, tmp_path):
    damage, message = DAMAGE[name]
    shutil.copytree(dataset_folder, tmp_path / "data")
    damage(tmp_path / "data")
    before = contents(tmp_path)
    with pytest.raises(UserError) as refused:
        common.load_hellaswag(arguments(tmp_path / "data"), TOKENIZER, 128)
    said = str(refused.value)
    assert message in said
    assert len(said) < 800
    assert "\n" not in said
    assert contents(tmp_path) == before


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a line cut", "arrow cut"])
def test_a_damaged_data_set_ends_the_command_in_one_line(name, commands, model_folder, dataset_folder, tmp_path):
    damage, message = DAMAGE[name]
    shutil.copytree(dataset_folder, tmp_path / "data")
    damage(tmp_path / "data")
    flags = ["--model", model_folder(), "--dataset", tmp_path / "data", "--output_dir", tmp_path / "runs"]
    assert message in refused(commands, "finetune_lowmem", "--run-name", "x", *flags)
    assert not (tmp_path / "runs").exists()


def test_what_is_no_data_set_is_refused(dataset_folder, tmp_path):
    for value, message in (
        ("", "--dataset '' is no folder"),
        (tmp_path, "needs one file validation.jsonl, .jsonl.gz, .json, .csv or .parquet, or all parts"),
        (dataset_folder / "train.jsonl", "train.jsonl has no split validation, only train"),
        ("Rowan/hellaswag", "check the name, the network"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            common.load_rows(arguments(value), "validation")
