"""Earlier turns in the forms in which chat templates read them. Rank 0 and its helper processes.

Clients send back what they were given: calls with arguments that were cut short, without ids, with
results in another order. What a template expects differs from family to family and is read off its
syntax; where it refuses a conversation all the same, other forms of it are tried, the closest
first. No form leaves out what was said, the reasoning before it apart.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from autotp_serving.engine.template_habits import REASONING_KEYS, SHORT_ID_LEN, TemplateHabits

Message = dict[str, Any]

NOT_IN_SHORT_ID = re.compile(r"[^0-9A-Za-z]")


def list_forms(messages: Sequence[Mapping[str, Any]], habits: TemplateHabits) -> Iterator[Any]:
    """A conversation as a template expects it, then in other forms, for one that refuses it.

    Args:
        messages: as a client sends them; what is no message is left to the template.
    """
    if not all(isinstance(message, Mapping) for message in messages):
        yield messages
        return
    form = _prepare([dict(message) for message in messages], habits)
    yield form
    steps: tuple[Callable[[list[Message]], list[Message]], ...] = (
        _split_calls, _gather_system, _alternate, _drop_reasoning, _turn_arguments,
    )  # fmt: skip
    for step in steps:
        changed = step([dict(message) for message in form])
        if changed != form:
            form = changed
            yield form


def _prepare(messages: list[Message], habits: TemplateHabits) -> list[Message]:
    """The usual form: everything filled in, nothing null."""
    for message in messages:
        message["tool_calls"] = [
            _read_call(call, habits) for call in _calls(message) if isinstance(call, Mapping)
        ]
    _fill_ids(messages)
    messages = _sort_results(messages)
    if habits.wants_short_ids:
        for message in messages:
            for call in message["tool_calls"]:
                call["id"] = _shorten(call["id"])
            if isinstance(message.get("tool_call_id"), str):
                message["tool_call_id"] = _shorten(message["tool_call_id"])
    if not habits.writes_calls:
        messages = _write_out_calls(messages)
    return [_finish(message, habits) for message in messages]


def _calls(message: Message) -> Sequence[Any]:
    calls = message.get("tool_calls")
    return calls if isinstance(calls, list | tuple) else ()


def _read_call(call: Mapping[str, Any], habits: TemplateHabits) -> Message:
    function = call.get("function")
    if not isinstance(function, Mapping):
        return dict(call)
    arguments = _read_arguments(function.get("arguments"))
    if isinstance(arguments, str):  # cut short, or no object
        if habits.writes_calls and not (habits.takes_text or habits.arguments_are_text):
            arguments = {}
    elif habits.arguments_are_text:
        arguments = json.dumps(arguments, ensure_ascii=False)
    return {"type": "function", **call, "function": {**function, "arguments": arguments}}


def _read_arguments(arguments: Any) -> dict[str, Any] | str:
    """A call's arguments as an object; as text where they are none."""
    if not isinstance(arguments, str):
        return arguments if isinstance(arguments, dict) else {}
    if not arguments.strip():
        return {}
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    return value if isinstance(value, dict) else arguments


def _fill_ids(messages: list[Message]) -> None:
    """Give every call an id, and every result the id and the name of its call.

    A result without an id answers the first call that no other one has answered.
    """
    names: dict[str, str] = {}
    waiting: list[str] = []
    answered = {message.get("tool_call_id") for message in messages}
    num_calls = 0
    for message in messages:
        if calls := message["tool_calls"]:
            waiting = []
        for call in calls:
            num_calls += 1
            if not isinstance(call.get("id"), str) or not call["id"]:
                call["id"] = f"call{num_calls:05d}"
            function = call.get("function")
            name = function.get("name") if isinstance(function, Mapping) else None
            if isinstance(name, str):
                names[call["id"]] = name
            if call["id"] not in answered:
                waiting.append(call["id"])
        if message.get("role") != "tool":
            continue
        if not message.get("tool_call_id") and waiting:
            message["tool_call_id"] = waiting.pop(0)
        if not message.get("name") and isinstance(message.get("tool_call_id"), str):
            message["name"] = names.get(message["tool_call_id"])


def _sort_results(messages: list[Message]) -> list[Message]:
    """Results in the order of their calls: most templates write no ids."""
    done: list[Message] = []
    for caller, results in _rounds(messages):
        order = {call.get("id"): number for number, call in enumerate(_calls(caller))}
        results.sort(key=lambda one: order.get(one.get("tool_call_id"), len(order)))
        done += [caller, *results] if caller else results
    return done


def _rounds(messages: list[Message]) -> Iterator[tuple[Message, list[Message]]]:
    """Each message with the results that follow it; nothing before results at the beginning."""
    caller: Message = {}
    results: list[Message] = []
    for message in messages:
        if message.get("role") == "tool":
            results.append(message)
            continue
        if caller or results:
            yield caller, results
        caller, results = message, []
    yield caller, results


def _shorten(call_id: str) -> str:
    """Nine letters and digits for an id, the same ones each time."""
    plain = NOT_IN_SHORT_ID.sub("", call_id)
    if len(plain) < SHORT_ID_LEN:
        plain = hashlib.sha256(call_id.encode("utf-8", "replace")).hexdigest()
    return plain[-SHORT_ID_LEN:]


def _write_out_calls(messages: list[Message]) -> list[Message]:
    """Calls and results as text, for a template that knows neither."""
    done: list[Message] = []
    for caller, results in _rounds(messages):
        calls = [_write_call(call) for call in caller.pop("tool_calls", ())]
        if calls:
            caller["content"] = "\n".join(filter(None, (_text(caller), *calls)))
        if caller:
            done.append(caller)
        if results:
            lines = [f"<tool_response>\n{_text(one)}\n</tool_response>" for one in results]
            done.append({"role": "user", "content": "\n".join(lines)})
    return done


def _write_call(call: Message) -> str:
    function = call.get("function")
    function = function if isinstance(function, Mapping) else {}
    shown = {"name": function.get("name"), "arguments": function.get("arguments")}
    return f"<tool_call>\n{json.dumps(shown, ensure_ascii=False)}\n</tool_call>"


def _text(message: Message) -> str:
    content = message.get("content")
    if isinstance(content, list):
        parts = [part.get("text") for part in content if isinstance(part, Mapping)]
        return "\n".join(part for part in parts if isinstance(part, str))
    return content if isinstance(content, str) else ""


def _finish(message: Message, habits: TemplateHabits) -> Message:
    """Leave out what is null or empty: templates know a missing key, many write null as "None"."""
    reasoning = message.pop(REASONING_KEYS[0], None)
    done = {key: value for key, value in message.items() if value is not None}
    if not done.get("tool_calls"):
        done.pop("tool_calls", None)
        done.setdefault("content", "")
    elif not done.get("content"):
        done.pop("content", None)
        if habits.tests_none:
            done["content"] = None
    if reasoning:
        done[habits.reasoning_key] = reasoning
    return done


def _split_calls(messages: list[Message]) -> list[Message]:
    """One call at a time, each with its results, for templates that know no more."""
    done: list[Message] = []
    for caller, results in _rounds(messages):
        calls = _calls(caller)
        if len(calls) < 2:
            done += [caller, *results] if caller else results
            continue
        own: dict[Any, list[Message]] = {call.get("id"): [] for call in calls}
        strangers = [one for one in results if one.get("tool_call_id") not in own]
        for one in results:
            own.get(one.get("tool_call_id"), []).append(one)
        for number, call in enumerate(calls):
            rest = {"role": caller.get("role")}
            done.append({**(rest if number else caller), "tool_calls": [call]})
            done += own.pop(call.get("id"), ())
        done += strangers
    return done


def _gather_system(messages: list[Message]) -> list[Message]:
    """All that the system says at the beginning."""
    system = [message for message in messages if message.get("role") == "system"]
    if not system or (len(system) == 1 and messages[0] is system[0]):
        return messages
    text = "\n\n".join(filter(None, map(_text, system)))
    others = [message for message in messages if message.get("role") != "system"]
    return [{**system[0], "content": text}, *others]


def _alternate(messages: list[Message]) -> list[Message]:
    """User and assistant by turns, the user first, as some templates insist on.

    Turns of the same side are joined; where one is missing, an empty one stands in for it. A result
    without a call is the user's.
    """
    turns: list[tuple[Message, list[str]]] = []
    last_plain = "assistant"
    has_call = False
    for message in messages:
        if message.get("role") == "tool" and not has_call:
            message = {"role": "user", "content": _text(message)}
        role = message.get("role")
        calls = _calls(message)
        has_call = has_call or bool(calls)
        before, texts = turns[-1] if turns else ({}, [])
        is_plain = role in ("user", "assistant") and not calls
        if role in ("user", "assistant") and before.get("role") == role and not _calls(before):
            texts.append(_text(message))
            before |= {key: message[key] for key in message if key not in ("role", "content")}
            if calls:  # no longer a plain turn
                last_plain = "user"
            continue
        if is_plain and role == last_plain:
            missing = "user" if role == "assistant" else "assistant"
            turns.append(({"role": missing, "content": ""}, [""]))
        if is_plain:
            last_plain = str(role)
        turns.append((message, [_text(message)]))
    return [
        message | {"content": "\n\n".join(filter(None, texts))} if len(texts) > 1 else message
        for message, texts in turns
    ]


def _drop_reasoning(messages: list[Message]) -> list[Message]:
    """Without reasoning, which some templates take only where nothing else was said."""
    return [
        {key: value for key, value in message.items() if key not in REASONING_KEYS}
        for message in messages
    ]


def _turn_arguments(messages: list[Message]) -> list[Message]:
    """Arguments as text where they were objects, and the other way round."""
    for message in messages:
        if calls := _calls(message):
            message["tool_calls"] = [_turn(call) for call in calls]
    return messages


def _turn(call: Message) -> Message:
    function = call.get("function")
    if not isinstance(function, Mapping):
        return call
    arguments = function.get("arguments")
    turned: Any = _read_arguments(arguments)
    if not isinstance(arguments, str):
        turned = json.dumps(arguments, ensure_ascii=False)
    return {**call, "function": {**function, "arguments": turned}}


def put_tools(messages: Iterable[Mapping[str, Any]], tools: Sequence[Any]) -> list[Message]:
    """A conversation whose system message has the tools as JSON, for templates that want it so."""
    text = json.dumps([tool.get("function", tool) for tool in tools], ensure_ascii=False)
    done = [dict(message) for message in messages]
    for message in done:
        if message.get("role") == "system":
            message["tools"] = text
            return done
    return [{"role": "system", "content": "", "tools": text}, *done]


def write_tools(messages: Iterable[Mapping[str, Any]], tools: Sequence[Any]) -> list[Message]:
    """A conversation that tells of tools in its first words, for a template that knows none."""
    lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    text = f"Tools that can be called, as JSON:\n{lines}"
    done = [dict(message) for message in messages]
    for message in done:
        if message.get("role") in ("system", "user"):
            message["content"] = "\n\n".join(filter(None, (text, _text(message))))
            return done
    return [{"role": "user", "content": text}, *done]
