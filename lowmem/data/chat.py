"""Conversations under a tokenizer's chat template, as sequences whose targets are what the assistant says."""

import inspect
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import date, datetime, time

from jinja2 import TemplateSyntaxError

from lowmem.data.tokens import Encoder, check
from lowmem.training.batches import Sequence
from lowmem.training.errors import UserError

GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")  # the tag of templates that say themselves what is trained


@dataclass(slots=True)
class Conversation:
    """Messages up to the last assistant turn, of which assistant turns from index `first` on are trained or scored.

    tools, variables: further variables of the chat template.
    """

    messages: list[dict]
    first: int = 0
    tools: list[dict] | None = None
    variables: dict = field(default_factory=dict)

    def __post_init__(self):
        turns = self.turns()
        self.messages = self.messages[: turns[-1] + 1] if turns else []

    def turns(self) -> list[int]:
        """Indices of the assistant turns that are trained: not of one that begins, since it answers nothing."""
        first = max(1, self.first)
        return [k for k, m in enumerate(self.messages) if m["role"] == "assistant" and k >= first]

    @property
    def size(self) -> int:
        """Characters of it, about."""
        return sum(len(message["content"]) for message in self.messages)


@dataclass(slots=True)
class Rendered:
    """The text of a conversation, or of its beginning, and where in it the turns (start, end) are, in characters.

    whole_turns: whether turns are trained to their ends, and not to their end-of-turn token alone.
    """

    where: str
    text: str
    turns: list[tuple[int, int]]
    whole_turns: bool = False


@contextmanager
def _today_is(day):
    """In this context the templates' `strftime_now` tells that day: a run that goes on tomorrow reads the same."""
    from transformers.utils import chat_template_utils

    class Day(datetime):
        @classmethod
        def now(cls, tz=None):
            return cls.combine(day, time())

    before, chat_template_utils.datetime = chat_template_utils.datetime, Day
    try:
        yield
    finally:
        chat_template_utils.datetime = before


class EndsInTheMiddle(Exception):
    """A token holds the end of a turn and the beginning of the next."""


def _with_odd_names(conversation):
    """The conversation with names of tools that no text has, and {such a name: what is left out where it is not}."""
    names = {}

    def rename(tool, what):
        if isinstance(tool.get("function"), dict):
            return tool | {"function": rename(tool["function"], what)}
        names[name := f"tool~{len(names)}~"] = what
        return tool | {"name": name}

    tools = [rename(tool, "the tools") for tool in conversation.tools or ()]
    messages = [
        message | {"tool_calls": [rename(call, f"the tool call of message {k}") for call in message["tool_calls"]]}
        if "tool_calls" in message
        else message
        for k, message in enumerate(conversation.messages)
    ]
    return replace(conversation, messages=messages, tools=tools or None), names


def _says(text, content):
    """Whether the text has the content, perhaps as JSON; templates may leave out thoughts and white space around it."""
    said = content.split("</think>")[-1].strip()
    return said in text or any(json.dumps(said, ensure_ascii=ascii)[1:-1] in text for ascii in (True, False))


class Chats:
    """Makes sequences of conversations. everything: whether all tokens are trained, not the assistant's alone.

    day: the day that the template is told. Raises UserError if the tokenizer has no chat template.
    """

    def __init__(self, encoder: Encoder, everything: bool, day: date):
        self.encoder, self.everything, self.tokenizer = encoder, everything, encoder.tokenizer
        if not self.tokenizer.chat_template:
            raise UserError(
                "the tokenizer of --model has no chat template, which rows of messages need: take an instruction-tuned "
                "model, or give rows with prompt and completion as text"
            )
        templates = self.tokenizer.chat_template  # some have one for tools
        self.template = templates if isinstance(templates, str) else "\n".join(templates.values())
        self.day = day
        self.reserved = {*inspect.signature(self.tokenizer.apply_chat_template).parameters, "messages", "strftime_now"}

    def sequences(self, rows: list[tuple[str, Conversation]]) -> list[list[Sequence]]:
        """The sequences of each (where it is, conversation): one, or one a turn if the template renders it otherwise
        once others follow. Raises UserError, which names the row.
        """
        with _today_is(self.day):
            made = self._tokenized([self._rendered(*row) for row in rows])
            by_turn = ([list(self._by_turn(*row))] for row, found in zip(rows, made, strict=True) if not found)
            return [found or self._tokenized(next(by_turn))[0] for found in made]

    def unread_keys(self, conversation: Conversation) -> set[str]:
        """The keys of messages, beside role, content and tool_calls, whose names are nowhere in the chat template."""
        keys = {key for message in conversation.messages for key in message} - {"role", "content", "tool_calls"}
        return {key for key in keys if not re.search(rf"\b{re.escape(key)}\b", self.template)}

    # Text

    def render(self, where: str, conversation: Conversation, count: int, prompt: bool = False) -> str:
        """The template's text of the first `count` messages, with prompt=True and what asks for an answer.

        Raises UserError.
        """
        return self._explained(
            where,
            self.tokenizer.apply_chat_template,
            conversation.messages[:count],
            tools=conversation.tools,
            add_generation_prompt=prompt,
            tokenize=False,
            **self._variables(where, conversation),
        )

    def _variables(self, where, conversation):
        if taken := sorted(conversation.variables.keys() & self.reserved):
            raise UserError(f"{where}: chat_template_kwargs must not have {', '.join(taken)}: take that out")
        return conversation.variables

    def _explained(self, where, call, /, *args, **settings):
        """What the call returns. Raises a UserError of whatever a template does about a conversation."""
        try:
            return call(*args, **settings)
        except (MemoryError, UserError):
            raise
        except TemplateSyntaxError as error:
            said = f"line {error.lineno} ({error.message}): mend it, or get it again"
            raise UserError(f"the chat template of --model is broken, {said}") from error
        except Exception as error:
            text = " ".join(str(error).split())[:200]
            raise UserError(f"{where}: the chat template refuses it ({text}): mend the row or take it out") from error

    def _rendered(self, where, conversation) -> list[Rendered]:
        """The whole conversation, or a text for each turn."""
        if GENERATION.search(self._explained(where, self.tokenizer.get_chat_template, tools=conversation.tools)):
            return [self._tagged(where, conversation)]
        count = len(conversation.messages)
        whole = self.render(where, conversation, count)
        self._require_whole(where, conversation, whole)
        if self.everything:
            return [Rendered(where, whole, [(0, len(whole))], whole_turns=True)]
        turns, closing = [], self._closing(where, conversation, whole)
        whole = whole.removesuffix(closing)
        for k in conversation.turns():
            prompt = self.render(where, conversation, k, prompt=True)
            until = whole if k + 1 == count else self.render(where, conversation, k + 1).removesuffix(closing)
            if not (until.startswith(prompt) and whole.startswith(until)):
                return list(self._by_turn(where, conversation))
            turns.append((len(prompt), len(until)))
        return [Rendered(where, whole, turns)]

    def _closing(self, where, conversation, text):
        """EOS where the template ends each text with it, and not each turn, as Phi's do; otherwise nothing."""
        eos, turns = self.tokenizer.eos_token, conversation.turns()
        if not (eos and turns and text.endswith(eos)):
            return ""
        asked, prompt = (self.render(where, conversation, turns[0], prompt) for prompt in (False, True))
        closes = asked.endswith(eos) and not prompt.startswith(asked) and prompt.startswith(asked.removesuffix(eos))
        return eos if closes else ""

    def _require_whole(self, where, conversation, text):
        """Refuse a conversation of which the template leaves something out: tools, their calls, a message, a role."""
        lacking = [
            f"the content of message {k}, of role {message['role']}"
            for k, message in enumerate(conversation.messages)
            if not _says(text, message["content"])
        ]
        if conversation.tools or any("tool_calls" in message for message in conversation.messages):
            renamed, names = _with_odd_names(conversation)
            text = self.render(where, renamed, len(renamed.messages))
            lacking = [what for name, what in names.items() if name not in text] + lacking
        if lacking:
            raise UserError(
                f"{where}: the chat template leaves out {lacking[0]}: take a model whose template writes that, or take "
                "it or the row out"
            )

    def _by_turn(self, where, conversation) -> Iterator[Rendered]:
        """For each turn the conversation up to it. Raises UserError."""
        for k in conversation.turns():
            prompt = self.render(where, conversation, k, prompt=True)
            until = self.render(where, conversation, k + 1)
            until = until.removesuffix(self._closing(where, conversation, until))
            if not until.startswith(prompt):
                raise UserError(
                    f"{where}: with the answer, message {k}, the chat template does not begin as it does without, so "
                    "that what is to be learned is unknown: put a system message into the first user message, let user "
                    "and assistant take turns, or take the row out"
                )
            yield Rendered(where, until, [(len(prompt), len(until))])

    def _tagged(self, where, conversation) -> Rendered:
        """The whole conversation, whose template says by {% generation %} what the assistant says."""
        from transformers.utils.chat_template_utils import render_jinja_template

        variables = self.tokenizer.special_tokens_map | self._variables(where, conversation)
        (text,), (turns,) = self._explained(
            where,
            render_jinja_template,
            [conversation.messages],
            tools=conversation.tools,
            chat_template=self.tokenizer.get_chat_template(tools=conversation.tools),
            return_assistant_tokens_mask=True,
            **variables,
        )
        self._require_whole(where, conversation, text)
        if self.everything:
            turns = [(0, len(text))]
        elif count := conversation.first or conversation.messages[0]["role"] == "assistant":
            before = self.render(where, conversation, count)
            if not text.startswith(before):
                raise UserError(
                    f"{where}: the chat template renders the prompt otherwise with the completion behind it"
                )
            turns = [turn for turn in turns if turn[0] >= len(before)]
        return Rendered(where, text, [turn for turn in turns if turn[0] < turn[1]], whole_turns=True)

    # Tokens

    def _tokenized(self, rows: list[list[Rendered]]) -> list[list[Sequence] | None]:
        """The sequences of each row; None of a row of which turns run into each other."""
        texts = iter(self.encoder.encode([check(part.text, part.where) for row in rows for part in row], special=False))
        made = []
        for row in rows:
            parts = [(part, next(texts)) for part in row]
            try:
                made.append([self._sequence(part, text) for part, text in parts])
            except EndsInTheMiddle:
                made.append(None)
        return made

    def _sequence(self, part, text):
        spans = [self._span(part, text, start, end) for start, end in part.turns]
        return self.encoder.sequence(text.ids, spans, part.where)

    def _span(self, part, text, start, end):
        """The (start, end) in tokens of a turn."""
        first, across = text.border(start)
        if part.whole_turns:
            return first, text.last(end) + 1
        if across:
            joined = part.text[max(0, start - 8) : start + 8]
            raise UserError(
                f"{part.where}: the tokenizer makes one token of the end of the prompt and the beginning of an answer "
                f"({joined!r}): take the white space out at the beginning of the answer, or at the end of the "
                "template's prompt"
            )
        said = len(part.text[:end].rstrip())
        if said > start and text.ids[last := text.last(said)] in self.encoder.added:
            return first, last + 1
        stop, across = text.border(end)
        if across:
            raise EndsInTheMiddle
        return first, stop
