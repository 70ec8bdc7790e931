"""The turns of a conversation as different tools name them: role or from, content or value, gpt or assistant."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from keyecli.training.rows import Role, RowError

_CALL = "call"
# Of ms-swift, LLaMA-Factory, OpenAI, TRL and Qwen together: no name has two meanings.
ROLES: dict[str, str] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "tool": "tool",
    "tool_response": "tool",
    "observation": "tool",
    "tool_call": _CALL,
    "function_call": _CALL,
}
_THOUGHT_KEYS = ("reasoning_content", "reasoning")


@dataclass(frozen=True)
class Turn:
    """What one side says: text with placeholders, or a list of typed parts. supervised: as in `Message`."""

    role: Role
    content: str | list[Any]
    supervised: bool | None = None


@dataclass(frozen=True)
class Tags:
    """Where a message has its role and content, the first key that it has counting, and what each role's name stands for."""

    role_keys: tuple[str, ...] = ("role", "from")
    content_keys: tuple[str, ...] = ("content", "value")
    roles: Mapping[str, str] = field(default_factory=lambda: ROLES)


DEFAULT_TAGS = Tags()


def turns_of(messages: Any, tags: Tags = DEFAULT_TAGS) -> list[Turn]:
    """The turns of a list of messages. A message's own `loss` says whether it is learnt (ms-swift).

    A call of a tool is a part of the answer that it stands in, written as Qwen's chat template writes it. RowError for
    an unknown role and for content that is neither text nor a list of parts.
    """
    if isinstance(messages, str):
        raise RowError("the conversation is one text, and it must be a list of messages")
    if not isinstance(messages, Sequence):
        raise RowError("the conversation must be a list of messages")
    turns: list[Turn] = []
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping):
            raise RowError(f"message {number} must be an object with a role and content")
        if "human" in message and "assistant" in message:
            turns += [
                Turn("user", _content(message["human"], number)),
                Turn("assistant", _content(message["assistant"], number)),
            ]
            continue
        _add(turns, message, number, tags)
    return turns


def _add(turns: list[Turn], message: Mapping[str, Any], number: int, tags: Tags) -> None:
    name = next((message[key] for key in tags.role_keys if message.get(key) is not None), None)
    role = tags.roles.get(name) if isinstance(name, str) else None
    if role is None:
        known = ", ".join(tags.roles)
        said = "has no role" if name is None else f"is of {name!r}"
        raise RowError(f"message {number} {said}, and known roles are {known}")
    value = next((message[key] for key in tags.content_keys if message.get(key) is not None), None)
    if value is None and message.get("tool_calls"):
        raise RowError(f"message {number} has tool_calls without content: write it as a tool_call message")
    content = _content(value, number)
    supervised = _supervised(message.get("loss"), number)
    if role == _CALL:
        _add_call(turns, content, supervised, number)
        return
    thought = next((message[key] for key in _THOUGHT_KEYS if message.get(key)), None)
    if role == "assistant" and thought is not None and isinstance(content, str):
        content = f"<think>\n{thought}\n</think>\n\n{content}"
    turns.append(Turn(_role(role), content, supervised))


def _add_call(turns: list[Turn], content: str | list[Any], supervised: bool | None, number: int) -> None:
    if not isinstance(content, str):
        raise RowError(f"message {number} calls a tool and must be text")
    call = f"<tool_call>\n{content}\n</tool_call>"
    before = turns[-1] if turns else None
    if before and before.role == "assistant" and isinstance(before.content, str):
        if before.supervised == supervised:
            between = "" if not before.content or before.content.endswith("\n") else "\n"
            turns[-1] = replace(before, content=before.content + between + call)
            return
        raise RowError(f"message {number} goes on with the answer before it, but its loss is another")
    turns.append(Turn("assistant", call, supervised))


def _role(name: str) -> Role:
    roles: dict[str, Role] = {
        "system": "system", "user": "user", "assistant": "assistant", "tool": "tool"
    }  # fmt: skip
    return roles[name]


def _content(value: Any, number: int) -> str | list[Any]:
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return value
    if isinstance(value, Mapping):  # a call or a result of a tool that was not spelled out as text
        return json.dumps(value, ensure_ascii=False)
    raise RowError(f"message {number} has no content: it must be text or a list of parts")


def _supervised(loss: Any, number: int) -> bool | None:
    if loss is None:
        return None
    if isinstance(loss, bool | int | float) and loss in (0, 1):
        return bool(loss)
    raise RowError(f"message {number} has a loss of {loss!r}, and it must be true or false")
