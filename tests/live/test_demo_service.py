"""The embedded model on two ranks: tools, seeds in a crowd, 500 connections of which half leave."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

import httpx
import openai
import pydantic
import pytest

from tests.live.crowd import kept, resident_mib, run_round
from tests.live.launch import Launch

pytestmark = pytest.mark.live

QUESTION = [{"role": "user", "content": "What is AI?"}]
MAX_GROWTH_MIB = 32  # what a second crowd may leave with the allocator; ten leave 6 MiB


class Trip(pydantic.BaseModel):
    """Plan a trip."""

    city: Literal["Berlin", "Bern", "S\N{LATIN SMALL LETTER A WITH TILDE}o Paulo"]
    days: int = pydantic.Field(ge=1, le=30)
    names: list[Literal["Ann", "Bob"]] = pydantic.Field(max_length=3)


@pytest.mark.parametrize(("choice", "reason"), [
    ("required", "tool_calls"),
    ({"type": "function", "function": {"name": "Trip"}}, "stop"),
])  # fmt: skip
def test_forced_calls_validate_at_temperature_1_whole_and_streamed(
    demo_server: Launch, choice: Any, reason: str
) -> None:
    client = openai.OpenAI(base_url=f"{demo_server.url}/v1", api_key="none", max_retries=0)
    asked = {
        "model": "demo_model",
        "messages": QUESTION,
        "tools": [openai.pydantic_function_tool(Trip)],
        "tool_choice": choice,
        "parallel_tool_calls": False,
        "temperature": 1.0,
        "max_tokens": 300,
    }
    for one in client.chat.completions.parse(**asked, n=12, seed=1).choices:
        (call,) = one.message.tool_calls
        assert isinstance(call.function.parsed_arguments, Trip)
        assert (one.finish_reason, one.message.content) == (reason, None)
    with client.chat.completions.stream(**asked, seed=3) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion().choices[0]
    assert kinds.count("tool_calls.function.arguments.delta") > 3
    assert isinstance(final.message.tool_calls[0].function.parsed_arguments, Trip)
    assert final.finish_reason == reason


def test_seeded_answers_are_the_same_alone_and_in_a_crowd(demo_server: Launch) -> None:
    async def ask(http: httpx.AsyncClient, seed: int | None, **options: Any) -> str:
        body = {"prompt": "The noun", "n_predict": 24, "temperature": 1.0, "seed": seed,
                "top_p": 0.95, "ignore_eos": True} | options  # fmt: skip
        reply = await http.post(f"{demo_server.url}/generate", json=body)
        assert reply.status_code == 200, reply.text
        return reply.json()["message"]["content"]

    async def go() -> tuple[list[str], list[str]]:
        async with httpx.AsyncClient(timeout=300) as http:
            alone = [await ask(http, seed) for seed in range(4)]
            crowd = [
                asyncio.create_task(
                    ask(http, None, prompt="crowd " * number, n_predict=20 + number)
                )
                for number in range(1, 20)
            ]
            among = await asyncio.gather(*(ask(http, seed) for seed in range(4)))
            await asyncio.gather(*crowd)
            return alone, among

    alone, among = asyncio.run(go())
    assert among == alone and len(set(alone)) == 4


def test_500_connections_of_which_half_leave_at_random(demo_server: Launch) -> None:
    """The rest get all they asked for, and nothing is kept of anybody."""
    before = kept(demo_server)
    crowd = run_round(demo_server.url, 500, seed=5)
    assert crowd.num_complete == crowd.num_stayed == 250 and crowd.num_left
    memory = [resident_mib(pid) for pid in demo_server.rank_pids()]
    run_round(demo_server.url, 200, seed=6)
    after = kept(demo_server)
    assert not any(after[name] for name in ("streams", "sequences", "blocks"))
    assert after["tasks"] <= before["tasks"]
    assert after["files"] <= before["files"] + 2
    assert after["threads"] <= before["threads"] + 2  # those that compile grammars start when asked
    for pid, mib in zip(demo_server.rank_pids(), memory, strict=True):
        assert resident_mib(pid) < mib + MAX_GROWTH_MIB
