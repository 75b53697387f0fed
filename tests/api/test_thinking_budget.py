"""Reasoning of so many tokens at most, on all routes; what templates are told of it in a chat."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from autotp_serving.engine.thinking_budget import BudgetTags, ThinkingBudget
from tests.api import service
from tests.api.test_tools import stream
from tests.fakes import ByteTokenizer, FakeRunner

THOUGHT = "Hm, two < three."
ASK = {"messages": [{"role": "user", "content": "think"}], "max_tokens": 80, "temperature": 0}
TEXT = f"<think>{THOUGHT}</think>Yes."


@pytest.fixture(autouse=True)
def book(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = "user: begun\nassistant: <think>"
    answers = {"user: think\nassistant: ": TEXT, begun: TEXT.removeprefix("<think>")}
    monkeypatch.setattr(service, "BOOK", answers)


def post(*bodies: dict[str, Any], path: str = "/v1/chat/completions") -> list[httpx.Response]:
    async def go() -> list[httpx.Response]:
        async with service.client(config={"reasoning_parser": "think"}) as (http, _):
            return [await http.post(path, json=body) for body in bodies]

    return asyncio.run(go())


@pytest.mark.parametrize("num_in_flight", [1, 2])
def test_reasoning_has_exactly_as_many_tokens(
    num_in_flight: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token is a byte here, and the end tag takes eight of them, none of which is reasoning."""
    monkeypatch.setattr(FakeRunner, "max_in_flight", num_in_flight)
    budgets = range(len(THOUGHT) + 10)
    replies = post(*(ASK | {"thinking_budget": budget} for budget in budgets))
    for budget, reply in zip(budgets, replies, strict=True):
        message = reply.json()["choices"][0]["message"]
        # What may begin the end tag does so.
        thought = THOUGHT[:budget].removesuffix("<").rstrip()
        assert message.get("reasoning_content", "") == thought, budget
        if budget >= len(THOUGHT):
            assert message["content"] == "Yes."


def test_every_name_of_a_budget() -> None:
    names = ("thinking_budget", "max_thinking_tokens", "thinking_token_budget")
    free, conflict, *held = post(
        ASK | {names[0]: -1},
        ASK | {names[0]: 1, names[1]: 2},
        *(ASK | {name: 2} for name in names),
    )
    assert free.json()["choices"][0]["message"]["reasoning_content"] == THOUGHT
    assert conflict.status_code == 400
    assert {one.json()["choices"][0]["message"]["reasoning_content"] for one in held} == {"Hm"}
    message, _ = stream(ASK | {names[0]: 2}, tool_call_parser="none")
    assert message["reasoning_content"] == "Hm"
    (plain,) = post(ASK | {names[0]: 1, "messages": [{"role": "user", "content": "other"}]})
    assert plain.json()["choices"][0]["message"]["content"]


def test_a_budget_beside_structured_output() -> None:
    wanted = {"structured_outputs": {"choice": ["Yes.", "No."]}, "thinking_budget": 4}
    (reply,) = post(ASK | wanted)
    message = reply.json()["choices"][0]["message"]
    assert message["reasoning_content"] == THOUGHT[:4].rstrip()
    assert message["content"] in ("Yes.", "No.")


def test_anthropics_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    body = {"messages": ASK["messages"], "max_tokens": 80, "temperature": 0}
    thinking = {"type": "enabled", "budget_tokens": 2}
    (reply,) = post(body | {"thinking": thinking}, path="/v1/messages")
    block = reply.json()["content"][0]
    assert (block["type"], block["thinking"]) == ("thinking", "Hm")


def test_reasoning_that_the_prompt_has_begun_and_channels() -> None:
    tokenizer = ByteTokenizer()
    guide = ThinkingBudget(3, BudgetTags(tokenizer, "think"), has_begun=True).start()
    written = b""
    for token in b"abcdefg":
        mask = guide.allowed()
        written += bytes([token]) if mask is None else only(mask)
        guide.accept(written[-1])
    assert written == b"abc</th"
    nothing = ThinkingBudget(0, BudgetTags(tokenizer, "think"), has_begun=True).start()
    assert only(nothing.allowed()) == b"<"
    guide = ThinkingBudget(2, BudgetTags(tokenizer, "harmony"), has_begun=False).start()
    text = b"<|channel|>analysis<|message|>ab<|end|><|start|>assistant<|channel|>"
    for token in text:
        mask = guide.allowed()
        assert mask is None or only(mask)[0] == token
        guide.accept(token)
    assert only(guide.allowed()) == b"cf"  # commentary or final, no further analysis


def only(mask: bytes | None) -> bytes:
    bits = int.from_bytes(mask or b"", "little")
    return bytes(token for token in range(256) if bits >> token & 1)


def test_chats_tell_templates_of_reasoning(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []

    def render(self: ByteTokenizer, messages: Any, options: dict[str, Any]) -> str:
        names = ("enable_thinking", "thinking", "reasoning_effort")
        seen.append({name: options[name] for name in names if name in options})
        return "a"

    def with_template(source: str, *changes: dict[str, Any]) -> list[str | None]:
        made = ByteTokenizer.__init__

        def init(self: ByteTokenizer) -> None:
            made(self)
            self.chat_template = source

        with monkeypatch.context() as patch:
            patch.setattr(ByteTokenizer, "render_chat", render)
            patch.setattr(ByteTokenizer, "__init__", init)
            replies = post(*(ASK | {"max_tokens": 1} | change for change in changes))
        assert all(reply.status_code == 200 for reply in replies)
        return [reply.headers.get("x-ignored-fields") for reply in replies]

    switched = {"chat_template_kwargs": {"enable_thinking": False}}
    efforts: list[dict[str, Any]] = [{"reasoning_effort": one} for one in ("none", "high", "xhigh")]
    ignored = with_template("{{ thinking }}", efforts[0], switched, efforts[1])
    assert ignored == [None, None, "reasoning_effort"]
    told = {"enable_thinking": False, "thinking": False}
    assert seen == [{"thinking": False}, told, {"thinking": True}]
    seen.clear()
    asked = (efforts[2], efforts[1] | {"chat_template_kwargs": {"reasoning_effort": "max"}})
    assert with_template("{{ reasoning_effort }}", *asked) == [None, None]
    assert seen == [{"reasoning_effort": "high"}, {"reasoning_effort": "max"}]
    assert with_template("{{ messages }}", {"reasoning_effort": "none"}) == ["reasoning_effort"]
    (refused,) = post(ASK | {"reasoning_effort": "much"})
    assert json.loads(refused.text)["error"]["param"] == "reasoning_effort"
