"""Own data through both scripts: what a run learns, scores, records and saves, goes on from and refuses, on tiny models.
python -m pytest tests/test_own_runs.py
"""

import datetime
import gzip
import json
import math
import random
import re
from contextlib import nullcontext
from types import SimpleNamespace

import datasets
import pytest
import torch
import transformers
from support.chat_templates import CHATML, GEMMA, LLAMA, PLAIN, QWEN, SPECIAL, chat_tokenizer
from support.damage import cut
from support.runs import SCRIPTS, assert_same_run, both_scripts, difference, lines, refused, timeless, weights
from support.tiny import ARCHITECTURES, make_model, write_jsonl

from lowmem import placement
from lowmem.training import arguments, attention, command, memory
from lowmem.training import weights as stored_weights
from lowmem.training.errors import UserError

TOKENIZER = chat_tokenizer(CHATML)
VOCABULARY = 416  # rows of the models' embeddings, for the tokenizer's 411 tokens
WORDS = ["apple", "bridge", "candle", "drum", "eagle", "flute", "garden", "hammer"]


def make_pairs(count, seed):
    """[(question, answer)] with a rule to learn: the answer repeats the question's word. Of several lengths."""
    rng = random.Random(seed)
    words = [(rng.choice(WORDS), " ".join(rng.choices(WORDS, k=rng.randrange(6)))) for _ in range(count)]
    return [(f"Someone sees the {word} {others}.", f"takes the {word} home.") for word, others in words]


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def chat(question, answer, *more):
    return {"messages": [user(question), assistant(answer), *more]}


def head(question):
    """What CHATML makes of a question, and of what asks for an answer."""
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


def of_chat(question, answer):
    """What the model sees of a pair as a conversation: context, target, context, ..."""
    return head(question), f"{answer}<|im_end|>", "\n"


# How a pair becomes a row, and what the model sees of it: pieces of text, of which every second is trained
FORMATS = {
    "messages": (chat, of_chat),
    "conversations": (
        lambda q, a: {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]},
        of_chat,
    ),
    "prompt and completion": (
        lambda q, a: {"prompt": q, "completion": f" {a}"},
        lambda q, a: (f"<bos>{q}", f" {a}<eos>"),
    ),
    "prompt and completion of messages": (
        lambda q, a: {"prompt": [user(q)], "completion": [assistant(a)]},
        of_chat,
    ),
    "instruction": (
        lambda q, a: {"instruction": "What then?", "input": q, "output": a},
        lambda q, a: of_chat(f"What then?\n\n{q}", a),
    ),
    "text": (lambda q, a: {"text": f"{q} {a}"}, lambda q, a: ("<bos>", f"{q} {a}<eos>")),
}  # fmt: skip
LITTLE = ("--no_save_model", "--eval_rows", 2)  # of a run that is not asked for its model
TRAIN, HELD_OUT = make_pairs(40, seed=1), make_pairs(11, seed=2)


def write_folder(folder, form, train=TRAIN, held_out=HELD_OUT, split="validation"):
    """The pairs as rows of a format, in a file for each split."""
    folder.mkdir(exist_ok=True)
    make, _ = FORMATS[form]
    for name, pairs in (("train", train), (split, held_out)):
        write_jsonl(folder / f"{name}.jsonl", [make(*pair) for pair in pairs])
    return folder


def tokens_of(pieces):
    """(ids, indices of those that are trained) of pieces of text, each tokenized by itself."""
    ids, trained = [], []
    for number, piece in enumerate(pieces):
        found = TOKENIZER(piece, add_special_tokens=False)["input_ids"]
        trained += range(len(ids), len(ids) + len(found)) if number % 2 else ()
        ids += found
    return ids, trained


def count_targets(form, pairs):
    """Tokens to train of the pairs as rows of a format."""
    return sum(len(tokens_of(FORMATS[form][1](*pair))[1]) for pair in pairs)


@torch.no_grad()
def scores_alone(model, form, pairs=HELD_OUT):
    """[(NLL, targets, right)] by transformers alone, a row at a time; `right` counts targets that no token beats."""
    found = []
    for pair in pairs:
        ids, trained = tokens_of(FORMATS[form][1](*pair))
        trained, ids = torch.tensor(trained), torch.tensor(ids)
        log_probs = model(input_ids=ids[None]).logits[0].float().log_softmax(-1)[trained - 1]
        of_targets = log_probs.gather(1, ids[trained, None])[:, 0]
        found.append((-of_targets.sum().item(), len(trained), int((log_probs.argmax(-1) == ids[trained]).sum())))
    return found


def load_plain(folder, dtype=torch.float32):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory):
    """chat_model(architecture, template, change, **settings) -> folder of a tiny model, with the tokenizer that knows
    the templates' tokens. change: of the model before it is saved. Made when first asked for.
    """
    made = {}

    def get(architecture="llama", template=CHATML, change=None, **settings):
        key = (architecture, template, change, repr(settings))
        if key not in made:
            made[key] = tmp_path_factory.mktemp(architecture)
            model = make_model(architecture, **{"vocab_size": VOCABULARY} | settings)
            if change:
                change(model)
            model.save_pretrained(made[key])
            chat_tokenizer(template).save_pretrained(made[key])
        return made[key]

    return get


@pytest.fixture
def train(run, chat_model):
    """train(script, name, dataset, *flags, model=None) -> (summary, run folder). See LITTLE."""

    def go(script, name, dataset, *flags, model=None):
        return run(script, name, "--dataset", dataset, "--batch_size", 4, *flags, model=model or chat_model())

    return go


def evaluated(folder, epoch):
    """[(NLL, targets, right)] of an evaluation, as recorded."""
    return [(row["nll"], row["target_tokens"], row["right"]) for row in lines(folder / f"eval_epoch{epoch}.jsonl")]


def assert_scores(found, truth, error=1e-4):
    """error: of a row's NLL a target."""
    assert len(found) == len(truth)
    assert [row[1:] for row in found] == [row[1:] for row in truth]
    assert max(abs(a[0] - b[0]) / b[1] for a, b in zip(found, truth, strict=True)) < error


# ---------------------------------------------------------------------------------------------------------------------
# Every format: what is learned, and what is left of it

TWICE = ("messages", "prompt and completion")
FORMS_AND_SCRIPTS = [(form, list(SCRIPTS)[k % 2]) for k, form in enumerate(FORMATS)]
FORMS_AND_SCRIPTS += [(form, script) for form in TWICE for script in SCRIPTS if (form, script) not in FORMS_AND_SCRIPTS]


@pytest.mark.parametrize(("form", "script"), FORMS_AND_SCRIPTS)
def test_a_run_learns_and_leaves_what_is_promised(form, script, train, tmp_path, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = write_folder(tmp_path / "rows", form)
    summary, left = train(script, "r", folder, "--epochs", 2)
    said = capsys.readouterr().out
    evals = summary["eval"]
    of_scores = {"nll", "perplexity", "token_accuracy"}
    assert [set(e) for e in evals] == [{"epoch", "step", "rows"} | of_scores] * 3
    assert [(e["epoch"], e["step"], e["rows"]) for e in evals] == [(0, 0, 11), (1, 10, 11), (2, 20, 11)]
    assert evals[2]["nll"] < 0.8 * evals[0]["nll"]  # seen: 0.75 at most
    assert evals[2]["token_accuracy"] > evals[0]["token_accuracy"] + 10
    assert summary["target_tokens"] == 2 * count_targets(form, TRAIN)
    assert (summary["rows"], summary["steps"]) == (80, 20)
    counts = {"train_rows": 40, "eval_rows": 11, "train_read": 40, "validation_read": 11}
    assert {name: count for name, count in summary["data"].items() if count} == counts
    assert json.loads((left / "summary.json").read_text())["eval"] == evals
    for e in evals:
        rows = lines(left / f"eval_epoch{e['epoch']}.jsonl")
        assert [set(row) for row in rows] == [{"row", "nll", "target_tokens", "right"}] * 11
        assert [row["row"] for row in rows] == list(range(11))
        nll, targets, right = (sum(row[name] for row in rows) for name in ("nll", "target_tokens", "right"))
        assert targets == count_targets(form, HELD_OUT)
        assert e["nll"] == pytest.approx(nll / targets, rel=1e-12)
        assert e["perplexity"] == pytest.approx(math.exp(e["nll"]), rel=1e-12)
        assert e["token_accuracy"] == 100 * right / targets
    # records and screen
    logged = [line for line in lines(left / "metrics.jsonl") if "nll" in line]
    assert logged == [{k: v for k, v in e.items() if k != "rows"} for e in evals]
    board = EventAccumulator(str(left)).Reload()
    for name in of_scores:
        points = [(event.step, event.value) for event in board.Scalars(f"eval/{name}")]
        assert points == [(e["step"], pytest.approx(e[name], rel=1e-6)) for e in evals]
    assert "40 to train on, 11 held out (split validation)" in said
    assert re.search(r"tokens +\d+ a sequence, \d+ at most; \d+\.\d % are targets", said)
    first, table = said.split(f"{script} r: 20 steps, 80 rows")
    assert re.search(r"held-out rows: 11 +NLL a token +perplexity *tokens right %\n", table)
    for e in evals:
        figures = [f"{e['nll']:.4f}", f"{e['perplexity']:.3f}", f"{e['token_accuracy']:.2f}"]
        title = f"epoch {e['epoch']}" if e["epoch"] else "before"
        assert re.search(rf"^{title} +" + " +".join(map(re.escape, figures)) + "$", table, re.M)
        said_then = "epoch {}: NLL a token {}, perplexity {}, tokens right {} %".format(e["epoch"], *figures)
        assert said_then in first
    # the saved model, asked by transformers alone; of bf16 its rounding stays, seen: 0.01
    if script == "finetune_base":
        assert_scores(evaluated(left, 2), scores_alone(load_plain(left / "model"), form))
    else:
        alone = scores_alone(load_plain(left / "model", torch.bfloat16), form)
        found = evaluated(left, 2)
        assert [row[1] for row in found] == [row[1] for row in alone]
        assert max(abs(a[0] - b[0]) / b[1] for a, b in zip(found, alone, strict=True)) < 0.03


# ---------------------------------------------------------------------------------------------------------------------
# The figures are the model's own

PADDED = {
    "gemma2": {"attn_logit_softcapping": 50.0},
    "gpt2": {"attn_pdrop": 0.1},
    "lfm2": {"layer_types": ["full_attention", "conv"]},
}


@pytest.fixture
def lfm2(monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, "lfm2", (transformers.Lfm2Config, {"pad_token_id": 1}))


IN_LINES = ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("mistral", "gpt2 in lines"))]


@pytest.mark.parametrize("architecture", [*IN_LINES, *PADDED])
def test_the_figures_are_those_of_each_row_alone(architecture, train, chat_model, tmp_path, capsys, lfm2):
    """By transformers, in fp32, before and after training, of rows in a line and of rows that are padded."""
    name = architecture.partition(" ")[0]
    model = chat_model(name, **PADDED.get(architecture, {}))
    folder = write_folder(tmp_path / "rows", "messages")
    summary, left = train("finetune_base", "r", folder, "--epochs", 1, "--lr", 1e-3, model=model)
    said = capsys.readouterr().out
    assert ("padded rows" in said, "in one line" in said) == (architecture in PADDED, architecture not in PADDED)
    for epoch, of in enumerate((model, left / "model")):
        truth = scores_alone(load_plain(of), "messages")
        assert_scores(evaluated(left, epoch), truth)
        nll, targets, right = map(sum, zip(*truth, strict=True))
        assert summary["eval"][epoch]["nll"] == pytest.approx(nll / targets, abs=1e-5)
        assert summary["eval"][epoch]["token_accuracy"] == pytest.approx(100 * right / targets)
    assert evaluated(left, 0) != evaluated(left, 1)


@both_scripts
def test_padded_rows_give_the_scores_of_lines(script, train, tmp_path, monkeypatch):
    """Of the same model, which could take either."""
    folder = write_folder(tmp_path / "rows", "messages")
    _, in_lines = train(script, "lines", folder, "--epochs", 0)
    monkeypatch.setattr(attention, "choose_layout", lambda *_: None)
    _, padded = train(script, "padded", folder, "--epochs", 0)
    a, b = evaluated(in_lines, 0), evaluated(padded, 0)
    if script == "finetune_base":
        assert_scores(a, b)
    else:
        assert max(abs(x[0] - y[0]) / x[1] for x, y in zip(a, b, strict=True)) < 0.03


@pytest.mark.parametrize(("script", "error"), [("finetune_base", 1e-5), ("finetune_lowmem", 0.01)])
def test_the_loss_of_a_step_is_the_mean_over_all_targets_of_its_batch(script, error, train, chat_model, tmp_path):
    """Of rows with one target to thirty: a mean of rows' means would be another number, as would one of halves."""
    pairs = [(q, a * (1 + 3 * (k % 3))) for k, (q, a) in enumerate(TRAIN[:7])] + [("x", "")]
    folder = write_folder(tmp_path / "rows", "messages", pairs)
    flags = ("--max_steps", 1, "--log_every", 1, "--batch_size", 64, *LITTLE)
    _, left = train(script, "r", folder, *flags)
    rows = scores_alone(load_plain(chat_model()), "messages", pairs)
    truth = sum(row[0] for row in rows) / sum(row[1] for row in rows)
    assert abs(truth - sum(row[0] / row[1] for row in rows) / len(rows)) > 3 * error
    (loss,) = [line["train_loss"] for line in lines(left / "metrics.jsonl") if "train_loss" in line]
    assert loss == pytest.approx(truth, abs=error)


# ---------------------------------------------------------------------------------------------------------------------
# Where rows come from


def write_parquet(folder):
    folder.mkdir()
    for split, pairs in (("train", TRAIN), ("test", HELD_OUT)):
        datasets.Dataset.from_list([chat(*pair) for pair in pairs]).to_parquet(str(folder / f"{split}.parquet"))


def write_saved(folder):
    splits = {"train": TRAIN, "test": HELD_OUT}
    datasets.DatasetDict(
        {name: datasets.Dataset.from_list([chat(*pair) for pair in pairs]) for name, pairs in splits.items()}
    ).save_to_disk(str(folder))


@pytest.mark.parametrize("write", [lambda f: write_folder(f, "messages", split="eval"), write_parquet, write_saved])
def test_a_folder_with_splits(write, train, tmp_path):
    """Whatever holds them, the rows are the same, and so is all that is trained and scored."""
    few = ("--max_steps", 2, "--no_save_model")
    _, truth = train("finetune_base", "truth", write_folder(tmp_path / "truth_rows", "messages"), *few)
    write(tmp_path / "rows")
    _, found = train("finetune_base", "r", tmp_path / "rows", *few)
    assert evaluated(found, 0) == evaluated(truth, 0)
    assert timeless(found) == timeless(truth)


def test_of_one_file_rows_are_held_out_that_are_not_trained(train, tmp_path, capsys):
    """Four of 40, of which each is there twice, chosen by the seed, named by their numbers in the file; --eval_rows
    takes fewer.
    """
    file, pairs = tmp_path / "all.jsonl", TRAIN[:20] * 2
    write_jsonl(file, [chat(*pair) for pair in pairs])
    summary, left = train("finetune_base", "r", file, "--epochs", 1)
    assert "held out (of the split train, by --seed 42)" in capsys.readouterr().out
    held_out = [row["row"] for row in lines(left / "eval_epoch0.jsonl")]
    assert len(held_out) == 4
    theirs = [pairs[row] for row in held_out]
    trained = [pair for pair in pairs if pair not in theirs]
    assert summary["target_tokens"] == count_targets("messages", trained)
    assert (summary["rows"], summary["data"]["train_rows"]) == (len(trained), len(trained))
    assert summary["data"]["equal_to_held_out"] == 36 - len(trained) > 0
    assert_scores(evaluated(left, 1), scores_alone(load_plain(left / "model"), "messages", theirs))
    again, _ = train("finetune_base", "again", file, "--epochs", 0, "--eval_rows", 3)
    other, _ = train("finetune_base", "other", file, "--epochs", 0, "--seed", 1)
    assert again["eval"][0]["rows"] == 3
    assert other["eval"][0]["nll"] != summary["eval"][0]["nll"]


# ---------------------------------------------------------------------------------------------------------------------
# Flags


@both_scripts
def test_all_parameters_train_and_the_special_tokens_embeddings_move(script, train, chat_model, tmp_path):
    """Those that the rows have, and no row of a token that they do not have."""
    folder = write_folder(tmp_path / "rows", "messages")
    ids = TOKENIZER.convert_tokens_to_ids(SPECIAL)
    before = weights(chat_model())["model.embed_tokens.weight"]
    for trained in ("all", "layers"):
        _, left = train(script, trained, folder, "--max_steps", 3, "--trained", trained, "--eval_rows", 1)
        after = weights(left / "model")["model.embed_tokens.weight"]
        moved = {
            name for name, k in zip(SPECIAL, ids, strict=True) if not torch.equal(after[k], before[k].to(after.dtype))
        }
        assert moved == ({"<|im_start|>", "<|im_end|>"} if trained == "all" else set())


@pytest.mark.parametrize("form", ["messages", "prompt and completion"])
def test_every_token_but_the_first_is_trained_if_asked_for(form, train, tmp_path):
    folder = write_folder(tmp_path / "rows", form)
    few = ("--epochs", 1, "--train_on", "all", "--no_save_model")
    summary, _ = train("finetune_lowmem", "r", folder, *few)
    truth = [sum(len(tokens_of(FORMATS[form][1](*pair))[0]) - 1 for pair in pairs) for pairs in (TRAIN, HELD_OUT)]
    assert summary["target_tokens"] == truth[0]
    held_out = lines(tmp_path / "r" / "eval_epoch0.jsonl")
    assert sum(row["target_tokens"] for row in held_out) == truth[1]


def test_rows_are_cut_at_the_length_that_is_asked_for(train, tmp_path, capsys):
    """Rows of which an answer's beginning is left are trained so far; those without are left out; all are counted."""
    lengths = [[len(tokens_of(of_chat(*pair)[:part])[0]) for pair in TRAIN] for part in (1, 2, 3)]
    limit = sorted(lengths[0])[30]  # tokens that are read: the token that comes next is still a target
    targets = [max(0, min(limit + 1, end) - start) for start, end, _ in zip(*lengths, strict=True)]
    assert {0 < n < end - start for n, start, end in zip(targets, *lengths[:2], strict=True)} == {True, False}
    folder = write_folder(tmp_path / "rows", "messages")
    summary, _ = train("finetune_lowmem", "r", folder, "--epochs", 1, "--max_length", limit, *LITTLE)
    said = capsys.readouterr().out
    assert summary["target_tokens"] == sum(targets)
    counts = {
        "train_cut": sum(whole - 1 > limit for whole in lengths[2]),
        "train_without_target": targets.count(0),
        "train_rows": 40 - targets.count(0),
    }
    assert counts["train_without_target"] > 0
    assert counts.items() <= summary["data"].items()
    assert f"{counts['train_cut']} of the 40 rows of" in said
    assert f"have nothing to train within {limit} tokens (--max_length): left out" in said


def test_streamed_layers_train_as_resident_ones(train, chat_model, tmp_path, monkeypatch):
    """Bit for bit, the head streamed too, with --resume and other numbers of layers."""
    model = chat_model("llama-tied", num_hidden_layers=5)
    folder = write_folder(tmp_path / "rows", "messages")
    plain = placement.make_plan

    def go(streamed, name, *flags):
        def make_plan(*args):
            assert plain(*args).streamed == 0
            return placement.Plan(streamed, bool(streamed))

        monkeypatch.setattr(placement, "make_plan", make_plan)
        return train("finetune_lowmem", name, folder, "--epochs", 1, "--train_rows", 28, *flags, model=model)

    (summary, whole), _ = go(0, "whole"), go(5, "parts", "--max_steps", 3)
    streamed, parts = go(3, "parts", "--resume")
    assert summary["eval"][1]["nll"] < 0.9 * summary["eval"][0]["nll"]
    assert len(summary["eval"]) == len(streamed["eval"]) == 2
    for a, b in zip(summary["eval"], streamed["eval"], strict=True):  # other batches, other rounding
        assert a["nll"] == pytest.approx(b["nll"], abs=0.01)
    a, b = weights(whole / "model"), weights(parts / "model")
    assert all(torch.equal(tensor, b[name]) for name, tensor in a.items())


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_two_ranks_train_and_score_as_one(script, run_ranks, chat_model, tmp_path):
    """Conversations of which some are two sequences, 41 of them: a last batch of one."""
    template, folder = QWEN, tmp_path / "rows"
    folder.mkdir()
    for name, pairs in (("train", TRAIN[:33]), ("validation", HELD_OUT)):
        turns = [(user(q), assistant(a)) if k % 4 == 0 else () for k, (q, a) in enumerate(pairs[::-1])]
        write_jsonl(folder / f"{name}.jsonl", [chat(*pair, *more) for pair, more in zip(pairs, turns, strict=True)])
    flags = ["--dataset", folder, "--model", chat_model(template=template), "--epochs", 1]
    one, two = (run_ranks(n, script, f"{n}", *flags) for n in (1, 2))
    a, b = (json.loads((left / "summary.json").read_text()) for left in (one, two))
    assert (a["ranks"], b["ranks"]) == (1, 2)
    for name in ("steps", "rows", "target_tokens", "data", "trained_params"):
        assert a[name] == b[name]
    exact = script == "finetune_base"
    assert_scores(evaluated(two, 0), evaluated(one, 0), error=1e-4) if exact else None
    for e, f in zip(a["eval"], b["eval"], strict=True):
        assert e["rows"] == f["rows"] == 11
        assert e["nll"] == pytest.approx(f["nll"], abs=1e-4 if exact else 0.05)
    assert difference(one, two) < (1e-6 if exact else 0.02)


# ---------------------------------------------------------------------------------------------------------------------
# A run that goes on


@pytest.fixture
def set_day(monkeypatch):
    """set_day(day): what the scripts take for today."""

    def go(day):
        today = SimpleNamespace(today=lambda: day)
        monkeypatch.setattr(arguments, "datetime", SimpleNamespace(date=today))

    return go


@both_scripts
def test_a_run_goes_on_bit_for_bit_also_on_another_day(script, train, chat_model, tmp_path, set_day):
    """Under a template that says the day; stopped in the middle of an epoch."""
    flags = ("--epochs", 2, "--train_rows", 20, "--log_every", 1, "--save_every", 5)
    folder, model = write_folder(tmp_path / "rows", "messages"), chat_model(template=LLAMA)
    set_day(datetime.date(2025, 12, 31))
    _, whole = train(script, "whole", folder, *flags, model=model)
    train(script, "parts", folder, *flags, "--max_steps", 7, model=model)
    set_day(datetime.date(2026, 1, 1))
    summary, parts = train(script, "parts", folder, *flags, "--resume", model=model)
    assert summary["args"]["date"] == "2025-12-31"
    assert_same_run(whole, parts)
    assert [evaluated(parts, epoch) for epoch in range(3)] == [evaluated(whole, epoch) for epoch in range(3)]
    _, other = train(script, "other", folder, *flags, "--max_steps", 1, model=model)
    assert evaluated(other, 0) != evaluated(whole, 0)  # the day is in the rows


CHANGES = {
    "a token": lambda rows: rows[5]["messages"][0].update(content=rows[5]["messages"][0]["content"][:-1] + "!"),
    "two rows swapped": lambda rows: rows.insert(0, rows.pop(1)),
    "a row less": lambda rows: rows.pop(),
}


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_run_does_not_go_on_with_other_rows(change, split, train, tmp_path):
    folder = write_folder(tmp_path / "rows", "messages")
    train("finetune_base", "r", folder, "--max_steps", 2, "--eval_rows", 8, "--no_save_model")
    file = folder / f"{split}.jsonl"
    rows = lines(file)[: 8 if split == "validation" else None]
    CHANGES[change](rows)
    write_jsonl(file, rows)
    with pytest.raises(UserError, match=r"--resume: --dataset .* no longer holds what"):
        train("finetune_base", "r", folder, "--max_steps", 3, "--eval_rows", 8, "--no_save_model", "--resume")


@pytest.mark.parametrize(
    ("flag", "value"), [("--train_on", "all"), ("--max_length", 60), ("--eval_rows", 3), ("--train_rows", 30)]
)
def test_a_run_does_not_go_on_with_other_settings_of_its_rows(flag, value, train, tmp_path):
    folder = write_folder(tmp_path / "rows", "messages")
    train("finetune_base", "r", folder, "--max_steps", 1, *LITTLE)
    with pytest.raises(UserError, match=f"was started with other settings: {flag} "):
        train("finetune_base", "r", folder, "--max_steps", 2, *LITTLE, "--resume", flag, value)


# ---------------------------------------------------------------------------------------------------------------------
# A dry run


@pytest.fixture
def without_weights(tmp_path, chat_model, monkeypatch):
    """A model folder whose weights are gone, and cannot be loaded."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in chat_model().iterdir():
        (folder / file.name).write_bytes(b"" if file.suffix == ".safetensors" else file.read_bytes())
    monkeypatch.setattr(stored_weights, "load", lambda *_: pytest.fail("weights were loaded"))
    return folder


def test_a_dry_run_without_epochs_shows_what_is_scored(train, without_weights, tmp_path, capsys):
    folder = write_folder(tmp_path / "rows", "messages")
    train("finetune_lowmem", "r", folder, "--dry_run", "--epochs", 0, model=without_weights)
    said = capsys.readouterr().out
    assert "0 to train on, 11 held out" in said
    assert said.count("⟦") == 3


def test_of_long_rows_what_is_trained_is_shown(train, chat_model, tmp_path, capsys):
    alone(*(chat("word " * 400, f"{k} " + "said " * 400) for k in range(4)))(tmp_path / "rows")
    model = chat_model(max_position_embeddings=16384)
    train("finetune_base", "r", tmp_path / "rows", "--dry_run", model=model)
    shown = [line for line in capsys.readouterr().out.splitlines() if "⟦" in line]
    assert len(shown) == 3
    assert all(line.count("⟦") == line.count("⟧") == 1 and len(line) <= 1600 for line in shown)


@both_scripts
def test_a_dry_run_shows_the_rows_and_leaves_nothing(script, train, without_weights, tmp_path, capsys):
    folder = write_folder(tmp_path / "rows", "messages")
    before = {*tmp_path.iterdir()}
    train(script, "r", folder, "--dry_run", model=without_weights)
    said = capsys.readouterr().out
    assert {*tmp_path.iterdir()} == before
    assert "conversations (column messages): 40 to train on, 11 held out (split validation)" in said
    ids = [tokens_of(of_chat(*pair)) for pair in TRAIN]
    tokens, targets = sum(len(row[0]) - 1 for row in ids), sum(len(row[1]) for row in ids)  # the last id is not read
    mean, longest = f"{tokens / 40:,.0f}", max(len(row[0]) - 1 for row in ids)
    assert f"{mean} a sequence, {longest} at most; {100 * targets / tokens:.1f} % are targets" in said
    shown = [f"{head(q)}⟦{a}<|im_end|>⟧\n".replace("\n", "\\n") for q, a in TRAIN[::13][:3]]
    assert [line for line in said.splitlines() if "⟦" in line] == shown
    assert re.search(r"weights +\d+\.\d\d GiB", said)
    assert "epoch 0" not in said


@both_scripts
def test_a_dry_run_is_for_one_process_from_the_beginning(script, train, tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "rows", "messages")
    alone = "--dry_run is for one process and from the beginning: leave --resume and torchrun out"
    train(script, "r", folder, "--max_steps", 1, *LITTLE)
    for name in ("r", "other"):
        with pytest.raises(UserError, match=alone):
            train(script, name, folder, "--dry_run", "--resume")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=alone):
        train(script, "s", folder, "--dry_run")


def test_a_dry_run_needs_no_place_to_write(train, without_weights, tmp_path, capsys):
    folder = write_folder(tmp_path / "rows", "messages")
    flags = ["--dry_run", "--output_dir", folder / "train.jsonl"]
    train("finetune_base", "r", folder, *flags, model=without_weights)
    assert "are targets" in capsys.readouterr().out


def test_a_dry_run_refuses_what_a_run_would(train, without_weights, tmp_path):
    folder = write_folder(tmp_path / "rows", "messages", TRAIN[:4])
    with (folder / "train.jsonl").open("a") as file:
        file.write("{\n")
    with pytest.raises(UserError, match=r"train.jsonl, line 5, is not JSON"):
        train("finetune_base", "r", folder, "--dry_run", model=without_weights)


@both_scripts
def test_a_dry_run_shows_the_rows_before_it_says_that_memory_is_short(
    script, train, without_weights, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(memory, "free_host_memory", lambda: 1)
    with pytest.raises(UserError, match="of free host memory|are free"):
        train(script, "r", write_folder(tmp_path / "rows", "messages"), "--dry_run", model=without_weights)
    assert "⟦" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# What is said of special tokens

MARKERS = TOKENIZER.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
UNSEEN = "the model was hardly trained on {}, which these rows have"
NO_STOP = "these rows end answers with <|im_end|>, at which generation does not stop"


@torch.no_grad()
def next_to_nothing(model):
    model.get_input_embeddings().weight[MARKERS[1]] *= 0.01


@torch.no_grad()
def all_alike(model):
    weight = model.get_input_embeddings().weight
    weight[400:] = weight[:400].mean(0)  # as resize_token_embeddings makes them


def knows_its_stop(model):
    model.generation_config.eos_token_id = [1, MARKERS[1]]


def knows_one_stop(model):
    model.generation_config.eos_token_id = MARKERS[1]


@pytest.mark.parametrize(
    ("script", "change", "unseen"),
    [
        ("finetune_base", next_to_nothing, "<|im_end|>"),
        ("finetune_lowmem", all_alike, "<|im_start|>, <|im_end|>"),
        ("finetune_base", None, None),
        ("finetune_base", knows_its_stop, None),
        ("finetune_lowmem", knows_one_stop, None),
    ],
)
def test_tokens_that_the_model_does_not_know_are_said(script, change, unseen, train, chat_model, tmp_path, capsys):
    folder, model = write_folder(tmp_path / "rows", "messages"), chat_model(change=change)
    few = ("--max_steps", 1, *LITTLE)
    for trained in ("layers", "all"):
        train(script, trained, folder, *few, "--trained", trained, model=model)
        said = capsys.readouterr().out
        assert ("hardly trained on" in said) == (unseen is not None and trained == "layers")
        if unseen and trained == "layers":
            assert UNSEEN.format(unseen) in said
            assert "take --trained all" in said
        assert (NO_STOP in said) == (change not in (knows_its_stop, knows_one_stop))
        assert "eos_token_id in the saved model's generation_config.json" in said or NO_STOP not in said


def test_answers_that_end_with_no_stop_token_are_said(train, chat_model, tmp_path, capsys):
    train(
        "finetune_lowmem",
        "r",
        write_folder(tmp_path / "rows", "messages"),
        "--max_steps",
        1,
        *LITTLE,
        model=chat_model(template=PLAIN),
    )
    assert "no answer in these rows ends with a token at which generation stops" in capsys.readouterr().out


def test_rows_without_special_tokens_have_nothing_said_of_them(train, chat_model, tmp_path, capsys):
    folder = write_folder(tmp_path / "rows", "prompt and completion")
    model = chat_model(change=all_alike, pad_token_id=None)  # whose embedding would be 0
    train("finetune_base", "r", folder, "--max_steps", 1, *LITTLE, model=model)
    said = capsys.readouterr().out
    assert "hardly trained" not in said
    assert "does not stop" not in said


# ---------------------------------------------------------------------------------------------------------------------
# What each bad input gets: one line with file and row number, exit code 2, nothing half-made

GOOD = [chat(*pair) for pair in TRAIN[:4]]


def jsonl(*rows):
    """Writes good rows, then these, or these lines."""

    def write(folder):
        folder.mkdir()
        lines_of_file = [row if isinstance(row, str) else json.dumps(row) for row in (*GOOD, *rows)]
        (folder / "train.jsonl").write_text("\n".join(lines_of_file) + "\n")
        write_jsonl(folder / "validation.jsonl", GOOD)

    return write


def alone(*rows, held_out=GOOD):
    """Writes these rows alone."""

    def write(folder):
        folder.mkdir()
        write_jsonl(folder / "train.jsonl", rows)
        write_jsonl(folder / "validation.jsonl", held_out)

    return write


def cut_gz(folder):
    folder.mkdir()
    (folder / "train.jsonl.gz").write_bytes(gzip.compress(random.Random(0).randbytes(9000).hex().encode()))
    cut(folder / "train.jsonl.gz")
    write_jsonl(folder / "validation.jsonl", GOOD)


# Of each: what writes the rows, the chat template, flags, what is said
BAD = {
    "unknown columns": (alone({"question": "a", "answer": "b"}, held_out=[{"question": "a", "answer": "b"}]), CHATML, (), "train.jsonl, line 1: the columns are question, answer, and these are accepted: "),
    "no row with an assistant turn": (alone({"messages": [user("a")]}, {"messages": []}), CHATML, (), "split train: no row can be used: 2 have no assistant turn"),
    "no chat template": (alone(*GOOD), None, (), "the tokenizer of --model has no chat template.* prompt and completion as text"),
    "a prompt that is no prefix": (jsonl({"messages": [{"role": "system", "content": "s"}, user("a"), assistant("b"), assistant("c")]}), "{% if messages[-1].role == 'user' %}S{% endif %}{% for m in messages %}{{ m.role + m.content }}{% endfor %}", (), "train.jsonl, line 1: with the answer, message 1, the chat template does not begin as it does without"),
    "turns that the template refuses": (jsonl({"messages": [user("a"), user("b"), assistant("c")]}), GEMMA, (), "train.jsonl, line 5: the chat template refuses it .Conversation roles must alternate"),
    "a broken template": (alone(*GOOD), CHATML + "{% for", (), "the chat template of --model is broken, line 7 .* mend it, or get it again"),
    "all answers cut off": (alone(*GOOD), CHATML, ("--max_length", 3), "no row can be used: 4 have nothing to train within 3 tokens .--max_length.: take a larger --max_length"),
    "broken JSON": (jsonl('{"messages": [}'), CHATML, (), "train.jsonl, line 5, is not JSON"),
    "half a line": (jsonl('{"messages": [{"role": "us'), CHATML, (), "train.jsonl, line 5, is not JSON"),
    "a line that is no row": (jsonl("[1]"), CHATML, (), "train.jsonl, line 5, is not a row"),
    "a list where text belongs": (jsonl(chat(["a"], "b")), CHATML, (), "train.jsonl, line 5: messages, entry 0: the content is a list, where text belongs"),
    "null where text belongs": (jsonl(chat("a", None)), CHATML, (), "train.jsonl, line 5: messages, entry 1 has no content"),
    "an unknown role": (jsonl({"messages": [{"role": "bot", "content": "a"}]}), CHATML, (), "train.jsonl, line 5: messages, entry 0: the role is 'bot'"),
    "a row of another format": (jsonl({"text": "a"}), CHATML, (), "train.jsonl, line 5 has no messages"),
    "two BOS": (alone({"text": "<bos>a"}), CHATML, (), "train.jsonl, line 1 begins with two <bos>"),
    "an empty held-out split": (alone(*GOOD, held_out=[]), CHATML, (), "split validation is empty"),
    "a held-out split without answers": (alone(*GOOD, held_out=[{"messages": [user("a")]}]), CHATML, (), "split validation: no row can be used: 1 have no assistant turn"),
    "one row, none to hold out": (lambda folder: (folder.mkdir(), write_jsonl(folder / "train.jsonl", GOOD[:1])), CHATML, (), "the 1 rows of the split train cannot be dealt out"),
    "an empty file": (alone(held_out=GOOD), CHATML, (), "split train is empty"),
    "a file that is cut": (cut_gz, CHATML, (), "train.jsonl.gz, behind line"),
    "longer than the model": (alone(*GOOD), CHATML, ("--max_length", 129), "--max_length 129 is more than the 128 tokens that the model takes"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "script"), [(name, list(SCRIPTS)[k % 2]) for k, name in enumerate(BAD)])
def test_a_bad_input_ends_in_one_line(name, script, chat_model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    write, template, flags, said = BAD[name]
    write(tmp_path / "rows")
    argv = ["--run-name", "r", "--output_dir", tmp_path / "runs", "--model", chat_model(template=template)]
    capsys.readouterr()
    argv += ["--dataset", tmp_path / "rows", *flags]
    with pytest.raises(SystemExit) as ended:
        command.start(lambda: SCRIPTS[script].main([str(a) for a in argv]))
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert re.search(said, line), line
    assert line.startswith("error: ")
    assert len(line) < 800
    assert not (tmp_path / "runs").exists()


def test_a_row_without_an_assistant_turn_is_left_out_where_others_have_one(train, tmp_path, capsys):
    jsonl({"messages": [user("a")]}, {"messages": []})(tmp_path / "rows")
    summary, _ = train("finetune_base", "r", tmp_path / "rows", "--epochs", 1, *LITTLE)
    assert f"2 of the 6 rows of dataset {tmp_path / 'rows'}, split train have no assistant turn to train: left out" in (
        capsys.readouterr().out
    )
    assert (summary["rows"], summary["data"]["train_without_assistant_turn"]) == (4, 2)


@pytest.mark.slow
@both_scripts
@pytest.mark.parametrize("name", ["broken JSON", "no chat template"])
def test_a_bad_input_ends_the_command(name, script, chat_model, commands, tmp_path):
    write, template, _, said = BAD[name]
    write(tmp_path / "rows")
    flags = ["--run-name", "r", "--output_dir", tmp_path / "runs", "--model", chat_model(template=template)]
    assert re.search(said, refused(commands, script, *flags, "--dataset", tmp_path / "rows"))
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
@both_scripts
def test_a_dry_run_as_a_command(script, without_weights, commands, tmp_path):
    """Exit code 0; 2 with --resume or under torchrun, in one line."""
    rows = write_folder(tmp_path / "rows", "messages")
    flags = ["--run-name", "r", "--output_dir", tmp_path / "runs", "--model", without_weights, "--dataset", rows]
    code, out, err = commands.run(script, *flags, "--dry_run")
    assert (code, out.count("⟦")) == (0, 3), err
    assert not (tmp_path / "runs").exists()
    ended = commands.run_ranks(2, script, *flags, "--dry_run")
    assert [code for code, _, _ in ended] == [2, 2]
    assert "error: --dry_run is for one process" in ended[0][2]


# ---------------------------------------------------------------------------------------------------------------------
# What a hostile user finds


@pytest.mark.parametrize("flags", [(), ("--dry_run",)])
@both_scripts
def test_special_tokens_without_embeddings_are_refused(script, flags, train, chat_model, tmp_path):
    """A tokenizer with added tokens, beside a model whose embeddings were not resized."""
    folder, model = write_folder(tmp_path / "rows", "messages"), chat_model(vocab_size=400)
    with pytest.raises(UserError, match=r"ids up to 401 where LlamaForCausalLM knows 400: they do not belong together"):
        train(script, "r", folder, *flags, model=model)


def test_an_answer_that_begins_a_conversation_is_not_trained(train, tmp_path, capsys):
    """As in many of ShareGPT's rows: it answers nothing. What follows is."""
    rows = [{"messages": [assistant("Hello."), *chat(*pair)["messages"]]} for pair in TRAIN[:4]]
    alone(*rows, {"messages": [assistant("Hello.")]})(tmp_path / "rows")
    train("finetune_base", "r", tmp_path / "rows", "--dry_run")
    said = capsys.readouterr().out
    (question, answer), hello = TRAIN[0], "<|im_start|>assistant\nHello.<|im_end|>\n"
    assert f"{hello}{head(question)}⟦{answer}<|im_end|>⟧\n".replace("\n", "\\n") in said
    assert "1 of the 5 rows of" in said


@pytest.mark.parametrize("name", ["where", "call", "self"])
def test_a_variable_of_the_template_may_have_any_name(name, train, tmp_path):
    """One that Python cannot take is refused, with the row."""
    jsonl(GOOD[0] | {"chat_template_kwargs": {name: "x"}})(tmp_path / "rows")
    with pytest.raises(UserError, match="train.jsonl, line 5") if name == "self" else nullcontext():
        train("finetune_base", "r", tmp_path / "rows", "--dry_run")


@pytest.mark.parametrize("damage", [lambda file: file.unlink(), lambda file: file.write_text("{")])
def test_a_run_without_its_config_goes_on_on_another_day(damage, train, tmp_path, set_day):
    """The checkpoint knows the day."""
    folder = write_folder(tmp_path / "rows", "messages")
    set_day(datetime.date(2025, 12, 31))
    _, left = train("finetune_base", "r", folder, "--max_steps", 1)
    damage(left / "config.json")
    set_day(datetime.date(2026, 1, 1))
    summary, _ = train("finetune_base", "r", folder, "--max_steps", 2, "--resume")
    assert (summary["steps"], summary["args"]["date"]) == (2, "2025-12-31")


def test_a_column_that_is_there_twice_is_refused(train, tmp_path):
    (tmp_path / "rows.csv").write_text("text,text\n" + "".join(f"a{k},b{k}\n" for k in range(12)))
    with pytest.raises(UserError, match=r"rows.csv, line 1, names the column 'text' twice"):
        train("finetune_base", "r", tmp_path / "rows.csv", "--dry_run")


def test_the_headings_of_the_closing_table_stand_apart(train, tmp_path, capsys):
    train("finetune_base", "r", write_folder(tmp_path / "rows", "messages"), "--epochs", 0)
    assert re.search(r"NLL a token  +perplexity  +tokens right %\n", capsys.readouterr().out)


def test_rows_are_shown_in_one_line_and_say_nothing_to_the_terminal(train, tmp_path, capsys):
    odd = "\x1b[2J\x07\x0b\x85\u2028\u202e"
    alone(*(chat(f"a\t{odd}", f"b{k}") for k in range(3)))(tmp_path / "rows")
    train("finetune_base", "r", tmp_path / "rows", "--dry_run")
    shown = [line for line in capsys.readouterr().out.splitlines() if "⟦" in line]
    assert len(shown) == 3
    assert r"a\t\x1b[2J\x07\x0b\x85\u2028\u202e<|im_end|>\n" in shown[0]


# ---------------------------------------------------------------------------------------------------------------------
# The saved model


@pytest.mark.parametrize("script", [pytest.param("finetune_base", marks=pytest.mark.slow), "finetune_lowmem"])
def test_the_saved_model_answers_and_ends_its_turn(script, train, chat_model, tmp_path):
    """It has learned one answer, and generates that up to the token that ends it, where its settings make it stop."""
    model = chat_model(change=knows_its_stop)
    pairs = [(question, "takes it home.") for question, _ in TRAIN]
    folder = write_folder(tmp_path / "rows", "messages", pairs, pairs[:2])
    summary, left = train(script, "r", folder, "--epochs", 4, "--trained", "all", model=model)
    assert summary["eval"][-1]["token_accuracy"] == 100
    tokenizer = transformers.AutoTokenizer.from_pretrained(left / "model")
    assert tokenizer.chat_template == CHATML
    saved = load_plain(left / "model")
    assert saved.generation_config.eos_token_id == [1, MARKERS[1]]
    for question, answer in pairs[:2]:
        prompt = tokenizer.apply_chat_template(
            [user(question)], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        said = saved.generate(**prompt, do_sample=False, max_new_tokens=40)[0, prompt["input_ids"].shape[1] :]
        assert tokenizer.decode(said, skip_special_tokens=False) == f"{answer}<|im_end|>"
