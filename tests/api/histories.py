"""Conversations as agents send them back: how clients write them, and what happens to them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

Message = dict[str, Any]
History = list[Message]

SYSTEM = "You help with the weather."
QUESTION = "How is the weather in Bern and in Köln?"
RESULTS = {
    "call_0123456789abcdef01234567": "sunny, 21",
    "call_0123456789abcdef01234568": "rain, 12",
}
ANSWER = "Sunny in Bern, rain in Köln."
THOUGHT = "Two cities, so two calls."
NEXT = "And tomorrow?"
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": None,
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
            "cache_control": {"type": "ephemeral"},
        },
        "defer_loading": False,
    }
]


def call(call_id: str, city: str, **rest: Any) -> Message:
    arguments = json.dumps({"city": city}, ensure_ascii=False)
    function = {"name": "get_weather", "arguments": arguments}
    return {"id": call_id, "type": "function", "function": function} | rest


def conversation(
    *, content: Any = None, calls: dict[str, Any] | None = None, **rest: Any
) -> History:
    """Question, two calls, two results, answer, question.

    Args:
        content: beside the calls.
        calls: more fields of each call.
        rest: more fields of each message of the assistant's.
    """
    first, second = RESULTS
    return [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": QUESTION},
        {
            "role": "assistant",
            "content": content,
            "tool_calls": [
                call(first, "Bern", **(calls or {})), call(second, "Köln", **(calls or {})),
            ],
        }
        | rest,
        *({"role": "tool", "tool_call_id": one, "content": text} for one, text in RESULTS.items()),
        {"role": "assistant", "content": ANSWER} | rest,
        {"role": "user", "content": NEXT},
    ]  # fmt: skip


def stream_sum() -> History:
    """Deltas added up by hand, their indices kept."""
    history = conversation(content="", reasoning=THOUGHT, reasoning_content=THOUGHT)
    for index, one in enumerate(history[2]["tool_calls"]):
        one["index"] = index
    return history


def text_parts() -> History:
    history = conversation(content=[{"type": "text", "text": "I look.", "annotations": []}])
    for message in history:
        if message["role"] != "tool" and isinstance(message["content"], str):
            part = {"type": "text", "text": message["content"]}
            message["content"] = [part | {"cache_control": {"type": "ephemeral"}}]
        elif message["role"] == "tool":
            message["content"] = [{"type": "text", "text": message["content"]}]
    return history


def objects() -> History:
    history = conversation()
    for one in history[2]["tool_calls"]:
        one["function"]["arguments"] = json.loads(one["function"]["arguments"])
    return history


# How clients write what they were given.
CLIENTS: dict[str, Callable[[], History]] = {
    "openai": lambda: conversation(refusal=None, annotations=[], audio=None, function_call=None),
    "stream": stream_sum,
    "litellm": lambda: conversation(
        provider_specific_fields={"refusal": None}, thinking_blocks=None, images=[],
        reasoning_content=THOUGHT,
    ),
    "langchain": lambda: conversation(content="", name=None),
    "agents": lambda: conversation(id="msg_1", status="completed", reasoning=[{"text": THOUGHT}]),
    "webui": lambda: conversation(
        content="I look.", calls={"index": 0}, output=[{"type": "message"}], files=None,
    ),
    "parts": text_parts,
    "objects": objects,
    "thinking": lambda: conversation(
        content=[{"type": "thinking", "thinking": THOUGHT, "signature": "x"},
                 {"type": "text", "text": "I look."}],
    ),
}  # fmt: skip


def as_is(history: History) -> History:
    return history


def cut(history: History) -> History:
    """The last call ended with max_tokens."""
    history[2]["tool_calls"][1]["function"]["arguments"] = '{"city": "Kö'
    return history


def empty(history: History) -> History:
    history[2]["tool_calls"][1]["function"]["arguments"] = ""
    return history


def null(history: History) -> History:
    history[2]["tool_calls"][1]["function"]["arguments"] = None
    history[2]["content"] = None
    history[5]["content"] = None
    return history


def no_ids(history: History) -> History:
    for message in history:
        message.pop("tool_call_id", None)
        for one in message.get("tool_calls", ()):
            del one["id"]
    return history


def short_ids(history: History) -> History:
    names = {name: str(number) for number, name in enumerate(RESULTS)}
    for message in history:
        if "tool_call_id" in message:
            message["tool_call_id"] = names[message["tool_call_id"]]
        for one in message.get("tool_calls", ()):
            one["id"] = names[one["id"]]
    return history


def results_reordered(history: History) -> History:
    history[3], history[4] = history[4], history[3]
    return history


def keys_reordered(history: History) -> History:
    return [dict(reversed(message.items())) for message in history]


def interrupted(history: History) -> History:
    """The user did not wait for the answer."""
    del history[5]
    return history


def unanswered(history: History) -> History:
    """Nor for the results."""
    del history[3:6]
    return history


def in_the_loop(history: History) -> History:
    """The model is to go on after the results."""
    return history[:5]


def windowed(history: History) -> History:
    """The oldest turns were cut off, a result without its call first."""
    return [history[0], *history[4:]]


def windowed_to_call(history: History) -> History:
    return [history[0], *history[2:]]


def repeated(history: History) -> History:
    """Two turns of one side after another, of both sides."""
    answer = copy.deepcopy(history[5])
    return [*history[:2], history[1], *history[2:6], answer, *history[6:]]


def late_system(history: History) -> History:
    """What the system says comes between."""
    return [*history[1:6], {"role": "developer", "content": SYSTEM}, history[6]]


DAMAGES = (
    as_is, cut, empty, null, no_ids, short_ids, results_reordered, keys_reordered, interrupted,
    unanswered, in_the_loop, windowed, windowed_to_call, repeated, late_system,
)  # fmt: skip


def histories() -> dict[str, History]:
    """Every client's conversation with everything that may have happened to it."""
    return {
        f"{name}, {damage.__name__}": damage(copy.deepcopy(write()))
        for name, write in CLIENTS.items()
        for damage in DAMAGES
    }
