"""Own data: which rows, what of them is trained, what is counted and refused. python -m pytest tests/test_own.py"""

import datetime
import json
import math
import random
import re
from types import SimpleNamespace

import datasets
import pytest
import torch
from benchmarks import tokenize_rows
from support.chat_templates import CHATML, LLAMA, QWEN, chat_tokenizer
from support.tiny import many_rows, write_jsonl
from tokenizers import processors

import common
from lowmem.data import facts, own
from lowmem.training import arguments
from lowmem.training.batches import Sequence
from lowmem.training.errors import UserError

CHAT = chat_tokenizer(CHATML)


def load(folder, tokenizer=CHAT, max_tokens=200, **changes):
    settings = {
        "dataset": str(folder), "train_rows": None, "eval_rows": None, "epochs": 1, "batch_size": 2, "seed": 0, "max_length": None,
        "train_on": "answers", "date": "2026-02-03", "max_steps": None, "warmup_steps": 0, "train_text": "harness",
    }  # fmt: skip
    return common.load(SimpleNamespace(**settings | changes), tokenizer, max_tokens)


def split_folder(tmp_path, train, validation=None, split="validation"):
    write_jsonl(tmp_path / "train.jsonl", train)
    write_jsonl(tmp_path / f"{split}.jsonl", validation or train[:1])
    return tmp_path


def decode(ids, tokenizer=CHAT):
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def shown(sequences, tokenizer=CHAT):
    """The sequences as `marked` shows them."""
    return [facts.marked(s, tokenizer) for s in sequences]


def chat(question, answer):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


# ---------------------------------------------------------------------------------------------------------------------
# Columns, each with what the model sees, its targets between ⟦ and ⟧

HEAD = "<|im_start|>user\\n{}<|im_end|>\\n<|im_start|>assistant\\n".format
CALL = [{"function": {"name": "f", "arguments": {}}}]
COLUMNS = {
    "messages": (chat("a", "b"), HEAD("a") + "⟦b<|im_end|>⟧\\n"),
    "conversations": (
        {"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "id": 3},
        "<|im_start|>system\\ns<|im_end|>\\n" + HEAD("a") + "⟦b<|im_end|>⟧\\n",
    ),
    "conversations by other names": (
        {"conversations": [{"from": "user", "value": "a"}, {"from": "tool", "value": "t"}, {"from": "assistant", "value": "b"}]},
        "<|im_start|>user\\na<|im_end|>\\n<|im_start|>tool\\nt<|im_end|>\\n<|im_start|>assistant\\n⟦b<|im_end|>⟧\\n",
    ),
    "prompt and completion": ({"prompt": "Once upon", "completion": " a time"}, "<bos>Once upon⟦ a time<eos>⟧"),
    "a completion that ends in EOS": ({"prompt": "Once", "completion": " a<eos>"}, "<bos>Once⟦ a<eos>⟧"),
    "an empty completion": ({"prompt": "Once", "completion": ""}, "<bos>Once⟦<eos>⟧"),
    "an empty prompt": ({"prompt": "", "completion": "Once"}, "<bos>⟦Once<eos>⟧"),
    "a token across the border": ({"prompt": "Someone se", "completion": "es"}, "<bos>Someone⟦ sees<eos>⟧"),
    "prompt and completion of messages": (
        {"prompt": chat("a", "b")["messages"], "completion": chat("c", "d")["messages"]},
        HEAD("a") + "b<|im_end|>\\n" + HEAD("c") + "⟦d<|im_end|>⟧\\n",
    ),
    "instruction": ({"instruction": "a", "output": "b"}, HEAD("a") + "⟦b<|im_end|>⟧\\n"),
    "instruction with an empty input": ({"instruction": "a", "input": "", "output": "b"}, HEAD("a") + "⟦b<|im_end|>⟧\\n"),
    "instruction with null for input": ({"instruction": "a", "input": None, "output": "b"}, HEAD("a") + "⟦b<|im_end|>⟧\\n"),
    "instruction and input": ({"instruction": "a", "input": "x", "output": "b"}, HEAD("a\\n\\nx") + "⟦b<|im_end|>⟧\\n"),
    "text": ({"text": "Once\nupon"}, "<bos>⟦Once\\nupon<eos>⟧"),
    "a text that ends in EOS": ({"text": "Once<eos>"}, "<bos>⟦Once<eos>⟧"),
    "the first of the table": (chat("a", "b") | {"text": "no", "prompt": "no", "completion": "no"}, HEAD("a") + "⟦b<|im_end|>⟧\\n"),
    "other columns": ({"text": "Once", "prompt": "no", "instruction": 5, "label": 1}, "<bos>⟦Once<eos>⟧"),
}  # fmt: skip


@pytest.mark.parametrize("name", COLUMNS)
def test_what_is_trained_of_the_columns(name, tmp_path):
    row, truth = COLUMNS[name]
    data = load(split_folder(tmp_path, [row]))
    assert shown(data.train) == shown(data.scored) == [truth]


def test_a_tokenizer_without_bos_and_one_that_adds_tokens_behind(tmp_path):
    """The first token has none before it; EOS is there once, and nothing else."""
    plain, adds = chat_tokenizer(bos=False), chat_tokenizer()
    template = processors.TemplateProcessing("<bos> $A <eos> <bos>", special_tokens=[("<bos>", 0), ("<eos>", 1)])
    adds.backend_tokenizer.post_processor = template
    for rows, truth in (
        ([{"text": "Once upon"}], ("O⟦nce upon<eos>⟧", "<bos>⟦Once upon<eos>⟧")),
        ([{"prompt": "Once", "completion": " upon"}], ("Once⟦ upon<eos>⟧", "<bos>Once⟦ upon<eos>⟧")),
    ):
        folder = split_folder(tmp_path, rows)
        for tokenizer, expected in zip((plain, adds), truth, strict=True):
            assert shown(load(folder, tokenizer).train, tokenizer) == [expected]


def test_tools_and_variables_as_lists_and_as_json(tmp_path):
    tools, variables = [{"type": "function", "function": {"name": "f"}}], {"enable_thinking": False}
    rows = [
        chat("a", "b") | {"tools": tools, "chat_template_kwargs": variables},
        chat("a", "b") | {"tools": json.dumps(tools), "chat_template_kwargs": json.dumps(variables)},
        chat("a", "b") | {"tools": None, "chat_template_kwargs": None},
        chat("a", "b") | {"tools": [], "chat_template_kwargs": ""},
    ]
    with_tools = QWEN.replace("{%- for", "{%- if tools %}{{- tools | tojson }}{%- endif %}{%- for", 1)
    for template, with_them in (
        (LLAMA, 'Tools: [{"type": "function"'),
        (with_tools, "\\n<think>\\n\\n</think>\\n\\n⟦b"),
    ):
        tokenizer = chat_tokenizer(template)
        found = shown(load(split_folder(tmp_path, rows), tokenizer).train, tokenizer)
        assert found[0] == found[1]
        assert with_them in found[0]
        assert found[2] == found[3]
        assert with_them not in found[2]


def test_keys_without_a_value_are_none(tmp_path):
    """As Arrow adds them: a template that asks whether there is a call sees none."""
    tokenizer = chat_tokenizer(LLAMA)
    row = {"messages": [m | {"tool_calls": None, "name": None} for m in chat("a", "b")["messages"]]}
    found = load(split_folder(tmp_path, [row, chat("a", "b")]), tokenizer).train
    assert found[0] == found[1]


def test_the_benchmark_of_reading_runs(tmp_path):
    """Both ways make the same tokens of its rows."""
    rng = random.Random(0)
    rows = [row for row in (tokenize_rows.conversation(rng) for _ in range(60)) if len(str(row)) < 2000]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    _, tokens, _ = tokenize_rows.ours(tmp_path / "rows.jsonl", CHAT)
    assert tokens == tokenize_rows.by_map(tmp_path / "rows.jsonl", CHAT, str(tmp_path / "cache"))[-1]


def test_rows_that_are_read_for_long_show_progress(tmp_path, monkeypatch, capsys):
    bar = own.tqdm
    monkeypatch.setattr(own, "tqdm", lambda *args, **settings: bar(*args, **settings | {"delay": 0}))
    load(split_folder(tmp_path, [chat("a", "b")] * 3))
    assert "tokenizing train: " in capsys.readouterr().err


def test_calls_of_no_tool_are_none_and_arguments_may_be_json_text(tmp_path):
    """As OpenAI has them; a template that writes JSON would write it twice."""
    tokenizer = chat_tokenizer(LLAMA)
    without = {"messages": [m | {"tool_calls": []} for m in chat("a", "b")["messages"]]}
    arguments = ({"x": "1"}, '{"x": "1"}')
    calls = [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": a}}]} for a in arguments]
    rows = [chat("a", "b"), without, *({"messages": [chat("a", "b")["messages"][0], call]} for call in calls)]
    found = shown(load(split_folder(tmp_path, rows), tokenizer).train, tokenizer)
    assert found[0] == found[1]
    assert found[2] == found[3]
    assert '⟦{"name": "f", "arguments": {"x": "1"}}<|eot|>⟧' in found[2]


@pytest.mark.parametrize("arguments", ['{"x": 1', "", "[1]", "null", 5, [1]])
def test_arguments_that_are_no_object_are_refused(arguments, tmp_path):
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}
    row = {"messages": [chat("a", "b")["messages"][0], call]}
    with pytest.raises(UserError, match="line 1: messages, entry 1: tool_calls, entry 0: function: arguments is "):
        load(split_folder(tmp_path, [row]), chat_tokenizer(LLAMA))


def test_calls_in_conversations_are_those_in_messages(tmp_path):
    tokenizer = chat_tokenizer(LLAMA)
    asked, called = {"from": "human", "value": "a"}, {"from": "gpt", "value": None, "tool_calls": CALL}
    as_messages = {"messages": [chat("a", "b")["messages"][0], {"role": "assistant", "tool_calls": CALL}]}
    rows = [{"conversations": [asked, called]}], [as_messages]
    found, same = (load(split_folder(tmp_path, form), tokenizer).train for form in rows)
    assert found == same
    assert '⟦{"name": "f", "arguments": {}}<|eot|>⟧' in shown(found, tokenizer)[0]


def test_what_a_template_does_not_read_of_messages_is_said_and_counted(tmp_path, capsys):
    """CHATML reads role and content alone."""
    user, answer = chat("a", "b")["messages"]
    rows = [chat("a", "b"), {"messages": [user, answer | {"reasoning_content": "c", "weight": 1}]}]
    data = load(split_folder(tmp_path, [*rows, rows[1]], rows[:1]))
    said = capsys.readouterr().out
    for key in ("reasoning_content", "weight"):
        assert re.search(
            f"2 of the 3 rows of dataset .*, split train have messages with '{key}', which the chat t", said
        )
        assert data.counts[f"train_unread_key_{key}"] == 2
    assert "split validation" not in said
    reads = CHATML.replace("message.content", "(message.reasoning_content or '') + message.content")
    tokenizer = chat_tokenizer(reads)
    data = load(tmp_path, tokenizer)
    assert "reasoning_content" not in capsys.readouterr().out
    assert "⟦cb<|im_end|>⟧" in shown(data.train, tokenizer)[1]


def test_an_answer_that_must_not_be_trained_is_refused(tmp_path):
    """OpenAI's weight of 0, which would be trained."""
    user, answer = chat("a", "b")["messages"]
    rows = [{"messages": [user, answer | {"weight": 0}, user, answer | {"weight": 1}]}]
    with pytest.raises(UserError, match="line 1: messages, entry 1 has weight 0, and all answers are trained: give"):
        load(split_folder(tmp_path, rows))
    rows = [{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "weight": 0}]}]
    with pytest.raises(UserError, match="line 1: conversations, entry 1 has weight 0"):
        load(split_folder(tmp_path, rows))


def test_files_that_are_not_read_are_said(tmp_path, capsys):
    folder = split_folder(tmp_path, [chat("a", "b")] * 12 + [chat("a", "c")], split="Validation")
    for name in ("test.json.gz", "README.md", "trainer.py"):
        (folder / name).touch()
    data = load(folder)
    assert "not read, for their names (docs/data.md): Validation.jsonl, test.json.gz\n" in capsys.readouterr().out
    assert "of the split train" in data.origin
    for name in ("valid.jsonl", "dev.jsonl", "test.jsonl"):
        (folder / name).write_text((folder / "train.jsonl").read_text())
    data = load(folder)
    assert "(docs/data.md): Validation.jsonl, dev.jsonl, test.json.gz, test.jsonl\n" in capsys.readouterr().out
    assert data.origin == "split valid"


def test_binary_data_are_named(tmp_path):
    datasets.Dataset.from_list([{"text": b"a"}]).to_parquet(str(tmp_path / "train.parquet"))
    with pytest.raises(UserError, match="row 0: text is bytes, where text belongs"):
        load(tmp_path / "train.parquet")


def test_every_token_is_trained_if_asked_for(tmp_path):
    data = load(split_folder(tmp_path, [chat("a", "b")]), train_on="all")
    (sequence,) = data.train
    assert sequence.spans == ((1, len(sequence.ids)),)
    assert shown(load(split_folder(tmp_path, [{"prompt": "Once", "completion": " upon"}]), train_on="all").train) == [
        "<bos>⟦Once upon<eos>⟧"
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Lengths, what is left out, what is held out


def test_rows_are_cut_at_their_ends_and_those_without_a_target_left_out(tmp_path, capsys):
    """--max_length counts the tokens that the model reads; of a row of 3 the second is cut, the third left out."""
    rows = [
        {"prompt": "a", "completion": "bc"},
        {"prompt": "a", "completion": "bcdefgh"},
        {"prompt": "0123456789", "completion": "z"},
    ]
    folder = split_folder(tmp_path, rows)
    data = load(folder, max_length=4)
    assert shown(data.train) == ["<bos>a⟦bc<eos>⟧", "<bos>a⟦bcd⟧"]
    assert max(s.tokens for s in data.train) == 4
    said = capsys.readouterr().out
    assert f"2 of the 3 rows of dataset {folder}, split train are longer than 4 tokens (--max_length): cut at" in said
    assert (
        f"1 of the 3 rows of dataset {folder}, split train have nothing to train within 4 tokens (--max_length)" in said
    )
    counts = {"train_rows": 2, "eval_rows": 1, "train_read": 3, "train_cut": 2, "train_without_target": 1}
    assert counts.items() <= data.counts.items()
    assert len(load(folder, max_tokens=4).train) == 2
    with pytest.raises(UserError, match=r"no row can be used: 3 have nothing to train within 1 tokens.* larger --max_"):
        load(folder, max_length=1)
    with pytest.raises(UserError, match="--max_length 201 is more than the 200 tokens that the model takes"):
        load(folder, max_length=201)


def test_of_a_conversation_of_several_sequences_each_is_cut(tmp_path):
    row = {"messages": chat("a", "b")["messages"] + chat("c", "d")["messages"]}
    tokenizer = chat_tokenizer(QWEN)
    whole = load(split_folder(tmp_path, [row]), tokenizer)
    assert len(whole.train) == 2
    first = whole.train[0].tokens
    assert load(tmp_path, tokenizer, max_length=first).train == whole.train[:1]


def test_rows_without_an_assistant_turn_are_left_out_and_counted(tmp_path, capsys):
    rows = [{"messages": chat("a", "b")["messages"][:1]}, chat("a", "b"), {"messages": []}]
    data = load(split_folder(tmp_path, rows, rows[1:2]))
    assert len(data.train) == 1
    assert "2 of the 3 rows of" in (said := capsys.readouterr().out)
    assert "have no assistant turn to train: left out" in said
    assert data.counts["train_without_assistant_turn"] == 2
    with pytest.raises(UserError, match="no row can be used: 1 have no assistant turn to train: take other rows"):
        load(split_folder(tmp_path, rows[:1]))


TEXTS = [{"text": f"number {k}"} for k in range(100)]


def test_held_out_rows_are_chosen_by_the_seed_and_are_no_training_rows(tmp_path, capsys):
    write_jsonl(tmp_path / "all.jsonl", TEXTS)
    once, again, other = (load(tmp_path / "all.jsonl", seed=seed) for seed in (0, 0, 1))
    assert (len(once.train), len(once.scored)) == (90, 10)
    assert (once.train, once.scored, once.rows) == (again.train, again.scored, again.rows)
    assert once.rows != other.rows
    assert shown(once.scored) == [f"<bos>⟦number {row}<eos>⟧" for row in once.rows]
    assert not {*shown(once.train)} & {*shown(once.scored)}
    evaluated = load(tmp_path / "all.jsonl", epochs=0)
    assert (evaluated.train, evaluated.scored) == ([], once.scored)
    assert len(load(tmp_path / "all.jsonl", eval_rows=3).scored) == 3
    assert len(load(tmp_path / "all.jsonl", eval_rows=60).scored) == 10
    few = load(tmp_path / "all.jsonl", train_rows=5)
    assert (len(few.train), len(few.scored)) == (4, 1)
    write_jsonl(tmp_path / "all.jsonl", [{"text": str(k)} for k in range(2300)])
    assert len(load(tmp_path / "all.jsonl").scored) == 200


def test_training_rows_that_equal_a_held_out_one_are_left_out_and_counted(tmp_path, capsys):
    write_jsonl(tmp_path / "all.jsonl", TEXTS[:20] * 5)
    data = load(tmp_path / "all.jsonl")
    held_out = {*shown(data.scored)}
    assert not held_out & {*shown(data.train)}
    left_out = 100 - len(data.scored) - len(data.train)
    assert left_out == data.counts["equal_to_held_out"] == 5 * len(held_out) - 10 > 0
    assert f"{left_out} rows to train on equal a held-out row: left out" in capsys.readouterr().out
    write_jsonl(tmp_path / "all.jsonl", TEXTS[:1] * 5)
    with pytest.raises(UserError, match="the 5 rows of the split train cannot be dealt out"):
        load(tmp_path / "all.jsonl")
    write_jsonl(tmp_path / "all.jsonl", TEXTS[:1])
    with pytest.raises(UserError, match="the 1 rows of the split train cannot be dealt out"):
        load(tmp_path / "all.jsonl")


def test_the_held_out_split_is_validation_or_test_or_eval(tmp_path):
    for split in ("eval", "test", "dev", "valid", "val", "validation"):
        split_folder(tmp_path, TEXTS[:8], [{"text": split}], split)
        data = load(tmp_path)
        assert shown(data.scored) == [f"<bos>⟦{split}<eos>⟧"]
        assert len(data.train) == 8
        assert f"1 held out (split {split})" in data.describe()
    write_jsonl(tmp_path / "validation.jsonl", [])
    with pytest.raises(UserError, match="split validation is empty"):
        load(tmp_path)
    (tmp_path / "train.jsonl").unlink()
    write_jsonl(tmp_path / "validation.jsonl", TEXTS)
    assert len(load(tmp_path, epochs=0, eval_rows=7).scored) == 7


def test_what_the_start_says_of_the_data(tmp_path):
    data = load(split_folder(tmp_path, [{"prompt": "ab", "completion": "c"}, {"prompt": "abcd", "completion": "efg"}]))
    assert data.describe() == (
        "prompts and completions (columns prompt, completion): 2 to train on, 1 held out (split validation)"
    )
    assert data.describe_tokens() == "6 a sequence, 8 at most; 50.0 % are targets"
    rows = [{"messages": chat("a", "b")["messages"] + chat("c", f"d{k}")["messages"]} for k in range(4)]
    write_jsonl(tmp_path / "all.jsonl", rows)
    said = load(tmp_path / "all.jsonl", chat_tokenizer(QWEN)).describe()
    assert said.startswith(
        "conversations (column messages): 3 to train on as 6 sequences, 1 held out (of the split train,"
    )


def test_the_training_order_is_the_arguments(tmp_path):
    data = load(split_folder(tmp_path, TEXTS), seed=5, epochs=2, batch_size=3)
    assert (data.seed, data.batch_size, data.max_tokens) == (5, 3, 200)
    with pytest.raises(UserError, match="--warmup_steps 50 is not less than the run's 50 steps"):
        load(tmp_path, warmup_steps=50)


# ---------------------------------------------------------------------------------------------------------------------
# Scores


def test_scores(tmp_path):
    """Of a row of two sequences one line; all by tokens."""
    tokenizer = chat_tokenizer(QWEN)
    two = {"messages": chat("a", "b")["messages"] + chat("c", "dd")["messages"]}
    gone = {"messages": []}
    data = load(split_folder(tmp_path, [two], [chat("a", "b"), gone, two]), tokenizer)
    lengths = [s.targets for s in data.scored]
    assert (data.rows, lengths[2] - lengths[1], lengths[0]) == ([0, 2, 2], 1, lengths[1])
    scores = data.score(torch.tensor([-3.0, -5.0, -7.5], dtype=torch.float64), torch.tensor([1, 2, 3]))
    assert scores.rows == [
        {"row": 0, "nll": 3.0, "target_tokens": lengths[0], "right": 1},
        {"row": 2, "nll": 12.5, "target_tokens": lengths[1] + lengths[2], "right": 5},
    ]
    nll = 15.5 / sum(lengths)
    assert scores.values == pytest.approx(
        {"nll": nll, "perplexity": math.exp(nll), "token_accuracy": 600 / sum(lengths)}
    )
    assert scores.finite
    assert scores.values.keys() == own.OwnData.SCORES.keys()
    worst = data.score(torch.tensor([-3.0, -torch.inf, -1e9], dtype=torch.float64), torch.tensor([0, 0, 0]))
    assert (worst.values["perplexity"], worst.finite) == (math.inf, False)
    large = data.score(torch.full([3], -1e9, dtype=torch.float64), torch.tensor([0, 0, 0]))  # no JSON can hold it
    assert (large.values["perplexity"], large.finite) == (math.inf, False)


def test_content_tells_apart_what_is_scored_apart(tmp_path):
    """What is hashed for --resume."""
    tokenizer = chat_tokenizer(QWEN)
    first, second = chat("a", "b")["messages"], chat("c", "d")["messages"]
    one_row = load(split_folder(tmp_path, [chat("x", "y")], [{"messages": first + second}]), tokenizer)
    two_rows = own.OwnData(one_row.train, one_row.scored, 200, rows=[0, 1])
    assert b"".join(one_row.content()) != b"".join(two_rows.content())
    assert b"".join(one_row.content()) == b"".join(load(tmp_path, tokenizer).content())


# ---------------------------------------------------------------------------------------------------------------------
# What is refused, in one line with file and row


def message(**changes):
    return {"messages": [{"role": "user", "content": "a"} | changes, {"role": "assistant", "content": "b"}]}


REFUSED = {
    "unknown columns": ({"question": "a", "answer": "b"}, "line 1: the columns are question, answer, and these are accepted: HellaSwag's; messages; conv"),
    "no columns": ({}, "line 1: the columns are none"),
    "text for messages": ({"messages": "a"}, "messages is text, where a list belongs"),
    "null for messages": ({"messages": None}, "messages is null, where a list belongs"),
    "texts for messages": ({"messages": ["a"]}, "messages, entry 0 is text, where an object belongs"),
    "an unknown role": (message(role="bot"), "messages, entry 0: the role is 'bot', and not system, developer, user, assistant, tool"),
    "no role": (message(role=None), "messages, entry 0 has no role: give one of system, developer, user"),
    "no content": (message(content=None), "messages, entry 0 has no content, and no tool_calls"),
    "a call by the user": (message(content=None, tool_calls=CALL), "messages, entry 0 has no content"),
    "a list for content": (message(content=[{"type": "text", "text": "a"}]), "messages, entry 0: the content is a list, where text belongs"),
    "an unknown speaker": ({"conversations": [{"from": "bing", "value": "a"}]}, "conversations, entry 0: `from` is 'bing', and not human, gpt, user"),
    "role for from": ({"conversations": chat("a", "b")["messages"]}, "conversations, entry 0: `from` is 'None'"),
    "a list for text": ({"text": ["a"]}, "text is a list, where text belongs"),
    "a number for text": ({"prompt": "a", "completion": 5}, "completion is a number, where text belongs"),
    "text behind messages": ({"prompt": chat("a", "b")["messages"], "completion": "c"}, "completion is text, where a list belongs"),
    "messages behind text": ({"prompt": "a", "completion": chat("a", "b")["messages"]}, "completion is a list, where text belongs"),
    "null for output": ({"instruction": "a", "output": None}, "output is null, where text belongs"),
    "a list for input": ({"instruction": "a", "input": [], "output": "b"}, "input is a list, where text belongs"),
    "tools that are no JSON": (chat("a", "b") | {"tools": "f"}, "tools is text, but no JSON"),
    "an object for tools": (chat("a", "b") | {"tools": {"f": 1}}, "tools is an object, where a list belongs"),
    "a list for variables": (chat("a", "b") | {"chat_template_kwargs": "[1]"}, "chat_template_kwargs is a list, where an object belongs"),
    "NUL": ({"text": "a\0b"}, "contains a NUL character"),
    "half of a surrogate pair": (chat("a\ud800", "b"), "contains a NUL character or half of a surrogate pair"),
    "two BOS": ({"text": "<bos>a"}, "begins with two <bos>"),
    "a call under a template without tools": (
        {"messages": [*chat("a", "b")["messages"][:1], {"role": "assistant", "content": None, "tool_calls": CALL}]},
        "the chat template leaves out the tool call of message 1",
    ),
    "a call that is a number": (
        {"messages": [*chat("a", "b")["messages"][:1], {"role": "assistant", "content": "b", "tool_calls": [3]}]},
        "messages, entry 1: tool_calls, entry 0 is a number, where an object belongs",
    ),
    "calls that are no list": (
        {"messages": [*chat("a", "b")["messages"][:1], {"role": "assistant", "content": "b", "tool_calls": 3}]},
        "messages, entry 1: tool_calls is a number, where a list belongs",
    ),
    "a call of no name": (
        {"messages": [*chat("a", "b")["messages"][:1], {"role": "assistant", "content": "b", "tool_calls": [{"function": {}}]}]},
        "messages, entry 1: tool_calls, entry 0: function has no name of a tool",
    ),
    "white space that joins the prompt": (chat("a", "\nb"), "take the white space out at the beginning of the answer"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_row_is_refused_in_one_line(name, tmp_path):
    row, said = REFUSED[name]
    tokenizer = chat_tokenizer(CHATML)
    tokenizer.add_tokens(["\n\n"])
    good = next((dict(truth[0]) for truth in COLUMNS.values() if row.keys() == truth[0].keys()), None)
    if good is not None and name != "text behind messages":  # whose format the first row tells
        split_folder(tmp_path, [good, good, row], [good])
        number = 3
    else:
        split_folder(tmp_path, [row], [row])
        number = 1
    with pytest.raises(UserError) as refused:
        load(tmp_path, tokenizer)
    assert said in str(refused.value)
    assert f"{tmp_path / 'train.jsonl'}, line {number}" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 600


def test_a_row_without_the_columns_of_the_first_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"train.jsonl, line 2 has no messages, as other rows have"):
        load(split_folder(tmp_path, [chat("a", "b"), {"text": "a"}]))


def test_hellaswag_is_told_by_its_columns(tmp_path):
    data = load(split_folder(tmp_path, many_rows(8)), max_tokens=128)
    assert isinstance(data, common.HellaSwag)
    assert max(s.tokens for s in load(tmp_path, max_tokens=128, max_length=9).train) == 9
    with pytest.raises(UserError, match="--train_on all is for other rows than HellaSwag's"):
        load(tmp_path, max_tokens=128, train_on="all")


# ---------------------------------------------------------------------------------------------------------------------
# The day of the run


def test_a_resumed_run_has_the_day_on_which_it_began(tmp_path):
    (tmp_path / "x").mkdir()
    assert arguments.day_of_run(None) == datetime.date.today().isoformat()
    assert arguments.day_of_run(tmp_path / "x") == datetime.date.today().isoformat()
    (tmp_path / "x" / "config.json").write_text('{"date": "2025-12-31"}')
    assert arguments.day_of_run(tmp_path / "x") == "2025-12-31"
    parser = arguments.parser("script", "What.", batch_size=1, lr=1e-3, demo_lr=1e-3, log_every=1)
    args = arguments.parse(parser, ["--run-name", "y", "--output_dir", str(tmp_path)])
    assert (args.date, args.train_on, args.max_length) == (datetime.date.today().isoformat(), "answers", None)


def test_the_template_is_told_the_day_of_the_run(tmp_path):
    tokenizer = chat_tokenizer(LLAMA)
    data = load(split_folder(tmp_path, [chat("a", "b")]), tokenizer, date="2025-12-31")
    assert "Today Date: 31 Dec 2025" in shown(data.train, tokenizer)[0]


# ---------------------------------------------------------------------------------------------------------------------
# What is said of the data


def test_special_tokens_that_the_model_has_not_learned(tmp_path):
    tokenizer = chat_tokenizer(LLAMA)
    data = load(split_folder(tmp_path, [chat("a", "b")]), tokenizer)
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in ("<|head|>", "<|/head|>", "<|eot|>", "<|turn|>")}
    embeddings = torch.randn(len(tokenizer), 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert facts.unseen_tokens(data, tokenizer, embeddings) == []
    embeddings[ids["<|turn|>"]] = 0  # is not used
    assert facts.unseen_tokens(data, tokenizer, embeddings) == []
    embeddings[ids["<|eot|>"]] *= 0.01
    assert facts.unseen_tokens(data, tokenizer, embeddings) == ["<|eot|>"]
    embeddings[ids["<|/head|>"]] = embeddings[ids["<|head|>"]]
    assert facts.unseen_tokens(data, tokenizer, embeddings) == ["<|head|>", "<|/head|>", "<|eot|>"]
    texts = load(split_folder(tmp_path, [{"text": "a"}]), chat_tokenizer(bos=False))
    assert facts.unseen_tokens(texts, tokenizer, embeddings) == []
    embeddings[tokenizer.eos_token_id] = 0  # which ends a text, and is only predicted
    assert facts.unseen_tokens(texts, tokenizer, embeddings) == [tokenizer.eos_token]


def test_tokens_that_end_turns_and_do_not_stop_generation(tmp_path):
    data = load(split_folder(tmp_path, [chat("a", "b")]))
    end = CHAT.convert_tokens_to_ids("<|im_end|>")
    for known in (None, CHAT.eos_token_id, [CHAT.eos_token_id]):
        assert facts.stops(data, CHAT, known) == (["<|im_end|>"], False)
    for known in (end, [CHAT.eos_token_id, end]):
        assert facts.stops(data, CHAT, known) == ([], True)
    whole = load(tmp_path, train_on="all")  # which ends with a line break
    assert facts.stops(whole, CHAT, None) == (["<|im_end|>"], False)


def test_of_long_stretches_the_beginning_and_the_end_are_marked():
    ids = CHAT("a" * 300 + "b" * 300, add_special_tokens=False)["input_ids"]
    start = len(CHAT("a" * 300, add_special_tokens=False)["input_ids"])
    line = facts.marked(Sequence.ending(ids, len(ids) - start), CHAT, most=20)
    assert line == f"{'a' * 10} ... {'a' * 10}⟦{'b' * 10} ... {'b' * 10}⟧"


def test_marked():
    ids = CHAT("a\\b\n", add_special_tokens=False)["input_ids"] + CHAT("é 🙂 x", add_special_tokens=False)["input_ids"]
    start = len(CHAT("a\\b\n", add_special_tokens=False)["input_ids"])
    assert facts.marked(Sequence.ending(ids, len(ids) - start), CHAT) == "a\\\\b\\n⟦é 🙂 x⟧"
    sequence = Sequence.ending(ids, len(ids) - start).slice(0, len(ids) - 1)
    assert facts.marked(sequence, CHAT) == "a\\\\b\\n⟦é 🙂 ⟧"


def test_what_shows_nothing_is_marked():
    ids = CHAT("a\ufeff\u200b\u202e\U000e0041b", add_special_tokens=False)["input_ids"]
    assert facts.marked(Sequence.ending(ids, 0), CHAT) == r"a\ufeff\u200b\u202e\U000e0041b⟦⟧"
