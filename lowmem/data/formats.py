"""What the rows of a data set are, by their columns, and what is read of one. Other columns are ignored."""

import json
from collections.abc import Callable
from typing import NamedTuple

from lowmem.data.chat import Conversation
from lowmem.data.documents import Document
from lowmem.training.errors import UserError

ROLES = ("system", "developer", "user", "assistant", "tool")
SPEAKERS = {"human": "user", "gpt": "assistant"} | {name: name for name in ("user", "assistant", "system", "tool")}
ACCEPTED = (
    "HellaSwag's; messages; conversations; prompt and completion; instruction, input and output; text (the first of "
    "these that are there)"
)


class Format(NamedTuple):
    """A kind of row: its name for the reader, the columns that it needs, and what reads it.

    read: function(row) -> Conversation or Document; raises UserError without the row's number.
    """

    name: str
    columns: tuple[str, ...]
    kind: type
    read: Callable[[dict], Conversation | Document]


def messages(row: dict) -> Conversation:
    """The conversation of a row with `messages`, and `tools` and `chat_template_kwargs` where given."""
    return _conversation(row, _messages(row["messages"], "messages"))


def conversations(row: dict) -> Conversation:
    """The conversation of a row with `conversations`, a list of {from, value}."""
    turns = _list(row["conversations"], "conversations")
    return _conversation(row, [_renamed(turn, f"conversations, entry {k}") for k, turn in enumerate(turns)])


def prompt_and_completion(row: dict) -> Document:
    """The text of a row with `prompt` and `completion`."""
    prompt = _text(row, "prompt")
    return Document(prompt + _text(row, "completion"), start=len(prompt))


def prompt_and_completion_messages(row: dict) -> Conversation:
    """The conversation of a row whose `prompt` and `completion` are messages; the completion's turns are trained."""
    prompt, completion = (_messages(row[name], name) for name in ("prompt", "completion"))
    return _conversation(row, prompt + completion, first=len(prompt))


def instruction(row: dict) -> Conversation:
    """The conversation of a row with `instruction`, `input`, which may be empty or missing, and `output`."""
    question, answer = _text(row, "instruction"), _text(row, "output")
    more = "" if row.get("input") is None else _text(row, "input")
    question = f"{question}\n\n{more}" if more else question
    return Conversation([{"role": "user", "content": question}, {"role": "assistant", "content": answer}])


def text(row: dict) -> Document:
    """The text of a row with `text`."""
    return Document(_text(row, "text"))


FORMATS = (
    Format("conversations", ("messages",), Conversation, messages),
    Format("conversations", ("conversations",), Conversation, conversations),
    Format("prompts and completions", ("prompt", "completion"), Document, prompt_and_completion),
    Format("instructions", ("instruction", "output"), Conversation, instruction),
    Format("texts", ("text",), Document, text),
)
AS_MESSAGES = Format(
    "prompts and completions of messages", ("prompt", "completion"), Conversation, prompt_and_completion_messages
)


def recognise(row: dict, where: str) -> Format:
    """The format of a data set with such a row. Raises UserError."""
    found = next((f for f in FORMATS if all(name in row for name in f.columns)), None)
    if found is None:
        columns = ", ".join(map(str, row))[:200] or "none"
        raise UserError(f"{where}: the columns are {columns}, and these are accepted: {ACCEPTED}")
    return AS_MESSAGES if found.columns == AS_MESSAGES.columns and isinstance(row["prompt"], list) else found


def read(row: dict, where: str, form: Format) -> Conversation | Document:
    """What is trained of a row. Raises UserError, which names the row."""
    if missing := [name for name in form.columns if name not in row]:
        raise UserError(f"{where} has no {' and no '.join(missing)}, as other rows have: mend the row or take it out")
    try:
        return form.read(row)
    except UserError as error:
        raise UserError(f"{where}: {error}: mend the row or take it out") from error


def _kind(value):
    kinds = {str: "text", list: "a list", dict: "an object", type(None): "null", bool: "true or false"}
    return (kinds | {int: "a number", float: "a number"}).get(type(value), type(value).__name__)


def _text(row, name):
    if not isinstance(row[name], str):
        raise UserError(f"{name} is {_kind(row[name])}, where text belongs")
    return row[name]


def _list(value, name):
    if not isinstance(value, list):
        raise UserError(f"{name} is {_kind(value)}, where a list belongs")
    return value


def _object(value, name):
    if not isinstance(value, dict):
        raise UserError(f"{name} is {_kind(value)}, where an object belongs")
    return value


def _conversation(row, turns, first=0):
    tools, variables = _json(row, "tools"), _json(row, "chat_template_kwargs")
    tools = None if tools is None else [_object(tool, "an entry of tools") for tool in _list(tools, "tools")]
    variables = {} if variables is None else _object(variables, "chat_template_kwargs")
    return Conversation(turns, first, tools or None, variables)


def _json(row, name):
    """The value of a column that may be JSON text, since columns of Arrow have one type; None if there is none."""
    value = row.get(name)
    if not isinstance(value, str):
        return value
    return _parsed(value, name) if value.strip() else None


def _parsed(text, name):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name} is text, but no JSON ({str(error)[:100]})") from error


def _messages(value, name):
    return [_message(message, f"{name}, entry {k}") for k, message in enumerate(_list(value, name))]


def _message(message, name):
    """A message as templates take it. The keys that Arrow adds, with None, are dropped, and calls of no tool."""
    message = {key: value for key, value in _object(message, name).items() if value is not None}
    calls = message.pop("tool_calls", None)
    if calls:
        calls = enumerate(_list(calls, f"{name}: tool_calls"))
        message["tool_calls"] = [_call(call, f"{name}: tool_calls, entry {k}") for k, call in calls]
    role, content = message.get("role"), message.get("content")
    if role is None:
        raise UserError(f"{name} has no role: give one of {', '.join(ROLES)}")
    if role not in ROLES:
        raise UserError(f"{name}: the role is {str(role)[:40]!r}, and not {', '.join(ROLES)}")
    if content is None and not (role == "assistant" and message.get("tool_calls")):
        raise UserError(f"{name} has no content, and no tool_calls")
    if role == "assistant" and message.get("weight") == 0:  # OpenAI's
        raise UserError(
            f"{name} has weight 0, and all answers are trained: give lists of messages as prompt and completion, "
            "of which the prompt is not trained, without that key"
        )
    if content is not None and not isinstance(content, str):
        raise UserError(f"{name}: the content is {_kind(content)}, where text belongs")
    return message | {"content": content or ""}


def _call(call, name):
    """A tool call whose arguments are an object, also where they are JSON text, as OpenAI has them."""
    if "function" in _object(call, name):
        return call | {"function": _call(call["function"], f"{name}: function")}
    if not isinstance(call.get("name"), str):
        raise UserError(f"{name} has no name of a tool")
    if (arguments := call.get("arguments")) is None:
        return call
    name += ": arguments"
    return call | {"arguments": _object(_parsed(arguments, name) if isinstance(arguments, str) else arguments, name)}


def _renamed(turn, name):
    """A message of an entry {from, value}, with its other keys."""
    speaker = _object(turn, name).get("from")
    if not isinstance(speaker, str) or speaker not in SPEAKERS:
        raise UserError(f"{name}: `from` is {str(speaker)[:40]!r}, and not {', '.join(SPEAKERS)}")
    others = {key: value for key, value in turn.items() if key not in ("from", "value")}
    return _message(others | {"role": SPEAKERS[speaker], "content": turn.get("value")}, name)
