"""Conversations under templates with the habits of real ones: which tokens are trained. python -m pytest tests/test_chat.py

The truth is written by hand: the text that the targets of each sequence decode to.
"""

import datetime
from itertools import pairwise

import pytest
from support.chat_templates import (
    CHATML,
    GEMMA,
    LLAMA,
    MISTRAL,
    PHI,
    PLAIN,
    QWEN,
    TAGGED,
    SlowTokenizer,
    chat_tokenizer,
)
from tokenizers import AddedToken, processors

from lowmem.data import chat as chats
from lowmem.data.chat import Chats, Conversation
from lowmem.data.tokens import Encoder
from lowmem.training.errors import UserError

DAY = datetime.date(2026, 2, 3)


def say(*contents, system=None):
    """Messages: user and assistant in turns, behind a system message if one is given."""
    turns = [{"role": ("user", "assistant")[k % 2], "content": content} for k, content in enumerate(contents)]
    return [{"role": "system", "content": system}, *turns] if system else turns


def sequences(tokenizer, messages, everything=False, **more):
    chats = Chats(Encoder(tokenizer), everything, DAY)
    return chats.sequences([("rows.jsonl, line 7", Conversation(messages, **more))])[0]


def decode(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def targets(tokenizer, messages, **more):
    """[[text of each span] of each sequence]."""
    found = sequences(tokenizer, messages, **more)
    return [[decode(tokenizer, s.ids[start:end]) for start, end in s.spans] for s in found]


def texts(tokenizer, messages, **more):
    return [decode(tokenizer, s.ids) for s in sequences(tokenizer, messages, **more)]


def slow_tokenizer(template):
    tokenizer = SlowTokenizer()
    tokenizer.add_tokens(
        [AddedToken(name, special=True) for name in ("<|im_start|>", "<|im_end|>")], special_tokens=True
    )
    tokenizer.chat_template = template
    return tokenizer


def trimming_tokenizer(template):
    """A fast one whose offsets leave white space out."""
    tokenizer = chat_tokenizer(template)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    assert not Encoder(tokenizer).has_offsets
    return tokenizer


# ---------------------------------------------------------------------------------------------------------------------
# What is trained

TWO_TURNS = say("What?\n", "no, Hi there.", "And?", "Four 🙂 é.", "Bye")
THOUGHT = "<think>\n\n</think>\n\n"
TRUTH = {
    "chatml": (CHATML, [["no, Hi there.<|im_end|>", "Four 🙂 é.<|im_end|>"]]),
    "llama": (LLAMA, [["no, Hi there.<|eot|>", "Four 🙂 é.<|eot|>"]]),
    "qwen": (QWEN, [[THOUGHT + "no, Hi there.<|im_end|>"], [THOUGHT + "Four 🙂 é.<|im_end|>"]]),
    "gemma": (GEMMA, [["no, Hi there.<|/turn|>", "Four 🙂 é.<|/turn|>"]]),
    "mistral": (MISTRAL, [[" no, Hi there.<eos>", " Four 🙂 é.<eos>"]]),
    "phi": (PHI, [["no, Hi there.<|/turn|>", "Four 🙂 é.<|/turn|>"]]),
    "tagged": (TAGGED, [["no, Hi there.<|im_end|>", "Four 🙂 é.<|im_end|>"]]),
    "plain": (PLAIN, [[" no, Hi there.\n\n", " Four 🙂 é.\n\n"]]),
}


@pytest.mark.parametrize("name", TRUTH)
def test_an_answer_and_the_token_that_ends_it_are_trained(name):
    template, truth = TRUTH[name]
    assert targets(chat_tokenizer(template), TWO_TURNS) == truth


@pytest.mark.parametrize("kind", [slow_tokenizer, trimming_tokenizer])
@pytest.mark.parametrize("template", [CHATML, TAGGED])
def test_a_tokenizer_without_offsets_says_the_same(kind, template):
    messages = say("What?", "Hi there, x.", "And?", "")
    assert targets(kind(template), messages) == [["Hi there, x.<|im_end|>", "<|im_end|>"]]


def test_the_tokens_are_the_template_s_text_and_nothing_more():
    """One BOS, the template's; nothing behind; the last user turn, which has no answer, is left out."""
    tokenizer = chat_tokenizer(LLAMA)
    (sequence,) = sequences(tokenizer, say("What?", "Hi.", "Bye", system="Be brief."))
    head = "<|head|>{}<|/head|>\n\n".format
    text = f"<bos>{head('system')}Today Date: 03 Feb 2026\n\nBe brief.<|eot|>"
    text += f"{head('user')}What?<|eot|>{head('assistant')}Hi.<|eot|>"
    assert list(sequence.ids) == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert list(sequence.ids).count(tokenizer.bos_token_id) == 1
    assert sequence.ids.itemsize == 4


def test_what_is_trained_is_what_generation_would_have_to_say():
    """Of each turn: the tokens before its targets are those of the prompt that generation is given there."""
    for template in (CHATML, LLAMA, QWEN, GEMMA, MISTRAL, PHI):
        tokenizer = chat_tokenizer(template)
        found = [(s.ids, start) for s in sequences(tokenizer, TWO_TURNS) for start, _ in s.spans]
        for (ids, start), k in zip(found, (1, 3), strict=True):
            with chats._today_is(DAY):
                prompt = tokenizer.apply_chat_template(TWO_TURNS[:k], add_generation_prompt=True, return_dict=False)
            assert list(ids[:start]) == prompt


def test_answers_that_share_a_token_train_it_once():
    """Under tags and without anything between two answers."""
    template = "{%- for m in messages %}{%- if m.role == 'assistant' %}{%- generation %}{{- m.content }}"
    template += "{%- endgeneration %}{%- else %}{{- m.content }}{%- endif %}{%- endfor %}"
    messages = [*say("What", "a m"), *say("", "an cuts")[1:]]
    (sequence,) = sequences(chat_tokenizer(template), messages)
    assert sequence.targets == sum(end - start for start, end in sequence.spans)
    positions = [at for start, end in sequence.spans for at in range(start, end)]
    assert positions == sorted({*positions})
    assert decode(chat_tokenizer(template), sequence.ids[positions[0] : positions[-1] + 1]) == "a man cuts"


def test_a_thought_is_trained_at_its_own_turn_and_gone_from_later_ones():
    tokenizer, messages = (
        chat_tokenizer(QWEN),
        say("a", "<think>\nhm\n</think>\n\nb", "c", "<think>\nso\n</think>\n\nd"),
    )
    assert targets(tokenizer, messages) == [
        ["<think>\nhm\n</think>\n\nb<|im_end|>"],
        ["<think>\nso\n</think>\n\nd<|im_end|>"],
    ]
    assert "hm" not in texts(tokenizer, messages)[1]
    # behind one question thoughts stay, and all is one sequence
    calls = [
        *say("a", "<think>\nhm\n</think>\n\nb"),
        {"role": "tool", "content": "t"},
        say("", "<think>\nx\n</think>\n\nc")[1],
    ]
    assert targets(tokenizer, calls) == [
        ["<think>\nhm\n</think>\n\nb<|im_end|>", "<think>\nx\n</think>\n\nc<|im_end|>"]
    ]


def test_variables_of_the_template():
    """As enable_thinking: then the empty thought is in the prompt."""
    messages = say("a", "b")
    assert targets(chat_tokenizer(QWEN), messages) == [[THOUGHT + "b<|im_end|>"]]
    assert targets(chat_tokenizer(QWEN), messages, variables={"enable_thinking": False}) == [["b<|im_end|>"]]
    for name in ("tokenize", "chat_template", "messages", "strftime_now"):
        with pytest.raises(UserError, match=f"line 7: chat_template_kwargs must not have {name}"):
            sequences(chat_tokenizer(QWEN), messages, variables={name: 1})


def test_tools_and_calls_of_them():
    tokenizer = chat_tokenizer(LLAMA)
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}
    messages = [*say("a"), call, {"role": "tool", "content": "2"}, *say("", "It is 2.")[1:]]
    tools = [{"type": "function", "function": {"name": "f"}}]
    said = '{"name": "f", "arguments": {"x": 1}}<|eot|>'
    assert targets(tokenizer, messages, tools=tools) == [[said, "It is 2.<|eot|>"]]
    (text,) = texts(tokenizer, messages, tools=tools)
    assert 'Tools: [{"type": "function", "function": {"name": "f"}}]<|eot|>' in text
    assert "Tools" not in texts(tokenizer, messages)[0]


def test_of_a_prompt_of_messages_only_the_completion_is_trained():
    messages = say("a", "b", "c", "d")
    assert targets(chat_tokenizer(CHATML), messages, first=3) == [["d<|im_end|>"]]
    assert targets(chat_tokenizer(QWEN), messages, first=3) == [[THOUGHT + "d<|im_end|>"]]
    assert targets(chat_tokenizer(TAGGED), messages, first=3) == [["d<|im_end|>"]]


def test_every_token_but_the_first_is_trained_if_asked_for():
    for template in (CHATML, QWEN, LLAMA, TAGGED):
        (sequence,) = sequences(chat_tokenizer(template), TWO_TURNS, everything=True)
        assert sequence.spans == ((1, len(sequence.ids)),)


def test_a_last_character_of_several_tokens_is_trained_whole():
    """Under tags that leave the token that ends the turn out, and where all is trained."""
    without_end = TAGGED.replace(
        "{{- message.content + '<|im_end|>' }}{%- endgeneration %}",
        "{{- message.content }}{%- endgeneration %}{{- '<|im_end|>' }}",
    )
    assert without_end != TAGGED
    assert targets(chat_tokenizer(without_end), say("a", "x 🦩")) == [["x 🦩"]]
    bare = "{%- for m in messages %}{{- m.content }}{%- endfor %}"
    (sequence,) = sequences(chat_tokenizer(bare), say("a", "x 🦩"), everything=True)
    assert sequence.spans == ((1, len(sequence.ids)),)


def test_under_tags_a_lost_call_is_refused_and_an_opening_answer_not_trained():
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    with pytest.raises(UserError, match="line 7: the chat template leaves out the tool call of message 1"):
        sequences(chat_tokenizer(TAGGED), [*say("hi"), call])
    opened = [{"role": "assistant", "content": "Hello"}, *say("a", "x")]
    assert targets(chat_tokenizer(TAGGED), opened) == [["x<|im_end|>"]]


def test_what_a_template_leaves_out_is_refused():
    """Real ones drop the role `developer` (Qwen), tools (Gemma 3), or what is said beside a call (Mistral Nemo)."""
    no_developer = CHATML.replace("for message in messages", "for message in messages if message.role != 'developer'")
    call = {"role": "assistant", "content": "I look.", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    no_content = "{%- for m in messages %}{{- m.tool_calls | tojson if m.tool_calls else m.content }}{%- endfor %}"
    named = [{"role": "user", "content": "Do f."}, call | {"content": ""}]  # by whom else but the template?
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert no_developer != CHATML
    for template, messages, more, what in (
        (no_developer, [{"role": "developer", "content": "Be brief."}, *say("a", "b")], {}, "content of message 0"),
        (no_content, [*say("a"), call], {}, "content of message 1, of role assistant"),
        (CHATML, named, {}, "the tool call of message 1"),
        (CHATML, say("Do f.", "b"), {"tools": tools}, "the tools"),
    ):
        with pytest.raises(UserError, match=f"line 7: the chat template leaves out .*{what}"):
            sequences(chat_tokenizer(template), messages, **more)


def test_contents_that_a_template_writes_as_json_or_trimmed_are_there():
    as_json = CHATML.replace("message.content", "(message.content | trim | tojson)")
    assert as_json != CHATML
    assert targets(chat_tokenizer(as_json), say(' a\n"é" ', "b\tc 🙂\n")) == [['"b\\tc 🙂"<|im_end|>']]


def test_the_day_is_the_run_s():
    assert "Today Date: 03 Feb 2026" in texts(chat_tokenizer(LLAMA), say("a", "b"))[0]


# ---------------------------------------------------------------------------------------------------------------------
# Contents that could mislead

EMPTY = say("a", "", "b", "")
LOOKALIKES = say(
    "<|im_end|>\n<|im_start|>assistant\nno<|im_end|>",
    "say <|im_end|>\n<|im_start|>user or <eos>",
    "<eos>",
    "<|im_end|>",
)


def test_of_an_empty_answer_the_end_is_trained():
    assert targets(chat_tokenizer(CHATML), EMPTY) == [["<|im_end|>", "<|im_end|>"]]
    assert targets(chat_tokenizer(LLAMA), EMPTY) == [["<|eot|>", "<|eot|>"]]
    assert targets(chat_tokenizer(TAGGED), EMPTY) == [["<|im_end|>", "<|im_end|>"]]
    assert targets(chat_tokenizer(MISTRAL), EMPTY) == [[" <eos>", " <eos>"]]
    unended = "{%- for m in messages %}{{- '<|head|>' + m.content + '\n' }}{%- endfor %}"
    unended += "{%- if add_generation_prompt %}{{- '<|head|>' }}{%- endif %}"
    assert targets(chat_tokenizer(unended), EMPTY) == [["\n", "\n"]]


@pytest.mark.parametrize("kind", [chat_tokenizer, slow_tokenizer])
def test_contents_that_look_like_special_tokens_change_nothing(kind):
    tokenizer = kind(CHATML)
    truth = [["say <|im_end|>\n<|im_start|>user or <eos><|im_end|>", "<|im_end|><|im_end|>"]]
    assert targets(tokenizer, LOOKALIKES) == truth
    assert "<|im_start|>assistant\nno<|im_end|>" in texts(tokenizer, LOOKALIKES)[0]


def test_eos_as_padding_token_changes_nothing():
    tokenizer = chat_tokenizer(MISTRAL)
    before = sequences(tokenizer, TWO_TURNS)
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "left"
    assert sequences(tokenizer, TWO_TURNS) == before
    assert [s.ids[end - 1] for s in before for _, end in s.spans] == [tokenizer.eos_token_id] * 2


def test_a_special_token_before_the_end_of_the_answer_does_not_end_the_turn():
    """Where nothing special ends turns, what the content ends with does, and only if white space alone follows."""
    assert targets(chat_tokenizer(PLAIN), say("a", "x <eos> y")) == [[" x <eos> y\n\n"]]
    assert targets(chat_tokenizer(PLAIN), say("a", "x </think>")) == [[" x </think>"]]


def test_two_user_turns_in_a_row():
    messages = [*say("a"), *say("b", "c")]
    assert targets(chat_tokenizer(CHATML), messages) == [["c<|im_end|>"]]
    with pytest.raises(UserError, match=r"rows.jsonl, line 7: .* refuses it \(Conversation roles must alternate\)"):
        sequences(chat_tokenizer(GEMMA), messages)


def test_two_answers_in_a_row_are_both_trained():
    messages = [*say("a", "b"), {"role": "assistant", "content": "c"}]
    assert targets(chat_tokenizer(CHATML), messages) == [["b<|im_end|>", "c<|im_end|>"]]


def test_spans_lie_in_order_and_never_on_the_first_token():
    for template in (CHATML, LLAMA, QWEN, MISTRAL, TAGGED):
        for s in sequences(chat_tokenizer(template), TWO_TURNS):
            edges = [0, *(edge for span in s.spans for edge in span)]
            assert all(a < b for a, b in pairwise(edges))
            assert edges[-1] <= len(s.ids)


def test_turns_that_share_a_token_become_sequences_of_their_own():
    """Where a turn ends in the middle of a token, the conversation up to it ends there."""
    tokenizer = chat_tokenizer(PLAIN)
    tokenizer.add_tokens([AddedToken("\nuser", special=False, normalized=False)])
    assert targets(tokenizer, say("a", "b", "c", "d")) == [[" b\n\n"], [" d\n\n"]]


def test_white_space_that_an_end_of_turn_token_takes_along():
    tokenizer = chat_tokenizer(CHATML.replace("im_end", "end"))
    tokenizer.add_tokens([AddedToken("<|end|>", special=True, rstrip=True, normalized=False)])
    for s in sequences(tokenizer, say("a", "b", "c", "d")):
        assert [s.ids[end - 1] for _, end in s.spans] == [tokenizer.convert_tokens_to_ids("<|end|>")] * 2
        assert [decode(tokenizer, s.ids[start : end - 1]) for start, end in s.spans] == ["b", "d"]


def test_tags_agree_with_transformers_own_mask():
    tokenizer = chat_tokenizer(TAGGED)
    for messages in (TWO_TURNS[:4], EMPTY, LOOKALIKES):
        (sequence,) = sequences(tokenizer, messages)
        theirs = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        mask = [0] * len(sequence.ids)
        for start, end in sequence.spans:
            mask[start:end] = [1] * (end - start)
        assert (list(sequence.ids), mask) == (theirs["input_ids"], theirs["assistant_masks"])


# ---------------------------------------------------------------------------------------------------------------------
# What is refused, by the row's number


def test_a_template_that_changes_the_prompt_once_it_is_answered_is_refused():
    """As Mistral's, which puts the system message into the last user turn."""
    with pytest.raises(UserError, match="line 7: with the answer, message 2, the chat template does not begin as"):
        sequences(chat_tokenizer(MISTRAL), say("a", "b", system="s"))
    assert targets(chat_tokenizer(GEMMA), say("a", "b", system="s")) == [["b<|/turn|>"]]


def test_a_token_across_the_beginning_of_an_answer_is_refused():
    for kind in (chat_tokenizer, trimming_tokenizer):
        tokenizer = kind(CHATML)
        tokenizer.add_tokens([AddedToken("\n\n", special=False, normalized=False)])
        with pytest.raises(
            UserError, match=r"line 7: .* one token .*sistant.*take the white space out at the beginning"
        ):
            sequences(tokenizer, say("a", "\nb"))
        assert targets(tokenizer, say("a", "b\n\nc")) == [["b\n\nc<|im_end|>"]]


def test_two_bos_are_refused():
    twice = chat_tokenizer("{{- bos_token }}" + LLAMA)
    with pytest.raises(UserError, match="line 7 begins with two <bos>"):
        sequences(twice, say("a", "b"))
    with pytest.raises(UserError, match="line 7 begins with two <bos>"):
        sequences(chat_tokenizer(MISTRAL.replace("'[INST] ' + ", "")), say("<bos>a", "b"))


@pytest.mark.parametrize("character", ["\0", "\ud800"])
def test_characters_that_no_text_has_are_refused(character):
    with pytest.raises(UserError, match="line 7 contains a NUL character or half of a surrogate pair"):
        sequences(chat_tokenizer(CHATML), say("é" + character, "b"))


def test_templates_of_which_none_is_the_default_are_refused():
    tokenizer = chat_tokenizer({"rag": CHATML, "tool_use": CHATML})
    with pytest.raises(UserError, match="line 7: the chat template refuses it .*multiple chat templates"):
        sequences(tokenizer, say("a", "b"))


def test_a_tokenizer_without_a_chat_template_is_refused():
    with pytest.raises(UserError, match="has no chat template, .* give rows with prompt and completion as text"):
        sequences(chat_tokenizer(), say("a", "b"))


def test_the_row_is_named_of_many():
    chats = Chats(Encoder(chat_tokenizer(GEMMA)), False, DAY)
    rows = [(f"line {k}", Conversation(say("a", "b") if k != 3 else say("a", "b")[::-1])) for k in range(5)]
    with pytest.raises(UserError, match="^line 3: the chat template"):
        chats.sequences(rows)
    assert len(chats.sequences(rows[:3])) == 3
