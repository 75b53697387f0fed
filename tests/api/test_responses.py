"""/v1/responses over HTTP: items out, items of earlier turns in, and what is refused by name."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from autotp_serving.api.responses.item_memory import ItemMemory
from autotp_serving.api.responses.schemas import MAX_ITEMS, InputItem
from autotp_serving.api.responses.store import ResponseStore
from autotp_serving.request import RequestError
from tests.api import service
from tests.api.dialects import ARGUMENTS, BOOK, CONFIG, SCHEMA, post, read_events
from tests.fakes import ByteTokenizer

TOOL = {"type": "function", "name": "get_weather", "parameters": SCHEMA}
ASK = {"input": "weather?", "tools": [TOOL], "temperature": 0}


def create(body: dict[str, Any], **options: Any) -> dict[str, Any]:
    (reply,) = post("/v1/responses", body, **options)
    assert reply.status_code == 200, reply.text
    return reply.json()


def stream(body: dict[str, Any]) -> list[dict[str, Any]]:
    (reply,) = post("/v1/responses", body | {"stream": True})
    events = read_events(reply.text)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def kinds_of(events: list[dict[str, Any]]) -> list[str]:
    """Their types, those of deltas once in a row."""
    kinds = [event["type"].removeprefix("response.") for event in events]
    return [kind for kind, before in zip(kinds, ["", *kinds], strict=False) if kind != before]


def test_a_text():
    response = create({"input": "What is AI?", "temperature": 0, "metadata": {"a": "b"}})
    (item,) = response["output"]
    assert (item["type"], item["role"], item["status"]) == ("message", "assistant", "completed")
    assert item["content"][0]["text"] == "A branch of computer science."
    assert response["status"] == "completed" and response["metadata"] == {"a": "b"}
    assert response["usage"]["total_tokens"] == 29 + 30
    assert response["id"].startswith("resp_") and response["object"] == "response"


def test_instructions_and_leading_system_items_are_one_system_message():
    items = [
        {"role": "developer", "content": [{"type": "input_text", "text": "Be kind."}]},
        {"type": "message", "role": "user", "content": "What is AI?", "id": "x", "foo": 1},
    ]
    response = create({"instructions": "Be brief.", "input": items, "temperature": 0})
    assert response["output"][0]["content"][0]["text"] == "Science."


def test_reasoning_text_and_a_call_are_items():
    reasoning, message, call = create(ASK)["output"]
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "Hm."}]
    assert reasoning["summary"] == []
    assert message["content"][0]["text"] == "Let me see."
    assert (call["type"], call["name"], call["arguments"]) == (
        "function_call", "get_weather", ARGUMENTS,
    )  # fmt: skip
    assert len({item["id"] for item in (reasoning, message, call)}) == 3


def test_a_stream_says_the_same_in_order():
    events = stream(ASK)
    assert kinds_of(events) == [
        *("created", "in_progress", "output_item.added", "content_part.added"),
        *("reasoning_text.delta", "reasoning_text.done", "content_part.done", "output_item.done"),
        *("output_item.added", "content_part.added", "output_text.delta", "output_text.done"),
        *("content_part.done", "output_item.done", "output_item.added"),
        *("function_call_arguments.delta", "function_call_arguments.done", "output_item.done"),
        "completed",
    ]
    for name, index, whole in (("output_text", 1, "Let me see."),
                               ("function_call_arguments", 2, ARGUMENTS)):  # fmt: skip
        deltas = [one for one in events if one["type"] == f"response.{name}.delta"]
        assert "".join(one["delta"] for one in deltas) == whole
        assert {one["output_index"] for one in deltas} == {index}
    done = [one["item"] for one in events if one["type"] == "response.output_item.done"]
    assert events[-1]["response"]["output"] == done
    assert events[-1]["response"]["usage"]["output_tokens"] > 0
    assert events[0]["response"]["status"] == "in_progress"


def test_reasoning_comes_as_a_summary_where_one_is_wanted():
    body = {"input": "think", "temperature": 0, "reasoning": {"summary": "auto"}}
    reasoning = create(body)["output"][0]
    assert reasoning["summary"] == [{"type": "summary_text", "text": "Hm."}]
    assert "reasoning_summary_text.delta" in kinds_of(stream(body))


def test_max_output_tokens_leave_a_response_incomplete():
    response = create(ASK | {"max_output_tokens": 80})
    assert response["status"] == "incomplete"
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert [item["status"] for item in response["output"]][-2:] == ["completed", "incomplete"]
    assert kinds_of(stream(ASK | {"max_output_tokens": 80}))[-1] == "incomplete"


def test_a_turn_is_sent_back_as_it_came():
    output = create(ASK)["output"]
    call_id = output[-1]["call_id"]
    for result in ("sunny", [{"type": "input_text", "text": "sunny"}]):
        answer = {"type": "function_call_output", "call_id": call_id, "output": result}
        items = [{"role": "user", "content": "weather?"}, *output, answer]
        response = create(ASK | {"input": items})
        assert response["output"][-1]["content"][0]["text"] == "Sunny."


@pytest.mark.parametrize("store", [None, True, False])
def test_items_may_be_referred_to_unless_nothing_was_to_be_stored(store: bool | None) -> None:
    async def go() -> httpx.Response:
        async with service.client(book=BOOK, config=CONFIG) as (http, _):
            first = await http.post("/v1/responses", json=ASK | {"store": store})
            *others, call = first.json()["output"]
            references = [{"type": "item_reference", "id": item["id"]} for item in others]
            answer = {"type": "function_call_output", "call_id": call["call_id"], "output": "sunny"}
            items = [{"role": "user", "content": "weather?"}, *references, call, answer]
            return await http.post("/v1/responses", json=ASK | {"input": items})

    second = asyncio.run(go())
    if store is False:
        assert (second.status_code, second.json()["error"]["param"]) == (400, "input.1")
    else:
        assert second.json()["output"][-1]["content"][0]["text"] == "Sunny."


def test_the_memory_of_items_is_bounded_and_apart_by_key():
    memory = ItemMemory(max_items=2, max_chars=1000)
    for number in range(3):
        memory.keep_all("a", [{"id": f"m{number}", "type": "message", "content": "x"}])
    assert memory.find("a", "m0") is None and memory.find("b", "m2") is None
    assert memory.find("a", "m2").content == "x"
    memory.keep_all("a", [{"id": "long", "type": "message", "content": "x" * 2000}])
    assert memory.find("a", "long") is None and memory.find("a", "m2") is None
    memory.keep_all("a", [{"id": "m3", "type": "message", "content": "x"}])
    assert memory.find("a", "m3") is not None


def test_a_store_keeps_responses_to_read_and_to_go_on_from():
    async def go() -> None:
        options = {
            "book": BOOK,
            "config": CONFIG | {"responses_store": True, "api_key": ["a", "b"]},
        }
        async with service.client(**options) as (http, _):
            http.headers["Authorization"] = "Bearer a"
            streamed = await http.post("/v1/responses", json=ASK | {"stream": True, "store": True})
            assert "x-ignored-fields" not in streamed.headers
            first = read_events(streamed.text)[-1]["response"]
            where = f"/v1/responses/{first['id']}"
            assert first["store"] and (await http.get(where)).json() == first
            output = {"type": "function_call_output", "output": "sunny"}
            output["call_id"] = first["output"][-1]["call_id"]
            more = ASK | {"input": [output], "previous_response_id": first["id"]}
            second = (await http.post("/v1/responses", json=more | {"store": False})).json()
            assert second["output"][-1]["content"][0]["text"] == "Sunny."
            assert second["previous_response_id"] == first["id"] and not second["store"]
            assert (await http.get(f"/v1/responses/{second['id']}")).status_code == 404
            assert (await http.get(where, params={"stream": "true"})).status_code == 400
            other = {"headers": {"Authorization": "Bearer b"}}
            assert (await http.get(where, **other)).status_code == 404
            assert (await http.delete(where, **other)).status_code == 404
            third = await http.post(
                "/v1/responses", json=ASK | {"previous_response_id": first["id"]}
            )
            assert third.status_code == 200
            assert (await http.delete(where)).json()["deleted"]
            assert (await http.get(where)).status_code == 404
            # What goes on from it lacks its beginning now.
            last = await http.post(
                "/v1/responses", json=more | {"previous_response_id": third.json()["id"]}
            )
            assert last.json()["error"]["param"] == "previous_response_id"

    asyncio.run(go())


def test_a_stored_conversation_is_no_longer_than_a_body_may_be():
    store = ResponseStore()
    asked = [InputItem(type="reasoning")] * (MAX_ITEMS // 2 - 1)
    for number in range(3):
        before = f"resp_{number - 1}" if number else None
        response = {"id": f"resp_{number}", "previous_response_id": before, "output": []}
        store.keep("", asked, response)
    assert len(store.conversation("", "resp_1")) == MAX_ITEMS - 2
    with pytest.raises(RequestError, match=f"over {MAX_ITEMS} items"):
        store.conversation("", "resp_2")


def test_tools_in_a_namespace_keep_their_names():
    group = {"type": "namespace", "name": "group", "tools": [TOOL]}
    call = create(ASK | {"tools": [group]})["output"][-1]
    assert (call["name"], call["namespace"]) == ("get_weather", "group")


def test_sampling_fields_reach_the_sampler_and_are_told():
    given = {"frequency_penalty": 0.5, "presence_penalty": 0.25}
    untold = {"top_k": 3, "min_p": 0.5, "repetition_penalty": 1.5, "seed": 7, "ignore_eos": True}

    async def go() -> None:
        async with service.client() as (http, served):
            body = {"input": "a", "stop": "x", "max_output_tokens": 3} | given | untold
            reply = await http.post("/v1/responses", json=body)
            told, params = reply.json(), served.runner.samples[0].params
            assert {name: (told[name], getattr(params, name)) for name in given} == {
                name: (value, value) for name, value in given.items()
            }
            assert {name: getattr(params, name) for name in untold} == untold
            assert params.stop == ("x",)

    asyncio.run(go())


def test_variables_of_the_template_go_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def render(self: ByteTokenizer, messages: Any, options: dict[str, Any]) -> str:
        seen.append(options.get("said"))
        return "a"

    monkeypatch.setattr(ByteTokenizer, "render_chat", render)
    create({"input": "a", "max_output_tokens": 1, "chat_template_kwargs": {"said": "b"}})
    assert seen == ["b"]


def test_logprobs_are_those_of_the_text():
    wants = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    body = ASK | {"input": "weather?"} | wants
    response = create(body)
    assert response["top_logprobs"] == 2
    told = response["output"][1]["content"][0]["logprobs"]
    assert "".join(one["token"] for one in told).endswith("Let me see.")
    assert {len(one["top_logprobs"]) for one in told} == {2}
    events = stream(body)
    deltas = [one for one in events if one["type"] == "response.output_text.delta"]
    assert [one for delta in deltas for one in delta["logprobs"]] == told
    assert all(delta["logprobs"] for delta in deltas)
    (done,) = [one for one in events if one["type"] == "response.output_text.done"]
    assert done["logprobs"] == told
    assert create(ASK)["output"][1]["content"][0]["logprobs"] == []


def test_a_custom_tool_takes_text():
    tool = {"type": "custom", "name": "say", "description": "Says it."}
    choice = {"type": "custom", "name": "say"}
    body = {"input": "think", "tools": [tool], "tool_choice": choice, "max_output_tokens": 200}
    (reply,) = post("/v1/responses", body, config={"reasoning_parser": "none"})
    (call,) = reply.json()["output"]
    assert (call["type"], call["name"]) == ("custom_tool_call", "say")
    history = [call, {"type": "custom_tool_call_output", "call_id": "c", "output": "said"}]
    create({"input": [{**call, "input": "hello"}, history[1]], "max_output_tokens": 1})


def test_what_is_ignored_is_told():
    body = {
        "input": "think", "store": True, "service_tier": "auto", "max_output_tokens": 1,
        "include": ["reasoning.encrypted_content"], "text": {"verbosity": "low"},
        "reasoning": {"effort": "low"}, "tools": [{"type": "web_search"}],
    }  # fmt: skip
    (reply,) = post("/v1/responses", body)
    assert set(reply.headers["x-ignored-fields"].split(", ")) == {
        "store", "service_tier", "tools.0 (web_search)", "include", "text.verbosity",
        "reasoning.effort",
    }  # fmt: skip
    (reply,) = post("/v1/responses", {"input": "think", "max_output_tokens": 1, "store": None})
    assert "x-ignored-fields" not in reply.headers


def test_structured_text():
    schema = {"type": "object", "properties": {"ok": {"enum": ["a"]}}, "required": ["ok"],
              "additionalProperties": False}  # fmt: skip
    text = {"format": {"type": "json_schema", "name": "n", "schema": schema, "strict": True}}
    response = create({"input": "x", "text": text}, config={"reasoning_parser": "none"})
    assert json.loads(response["output"][0]["content"][0]["text"]) == {"ok": "a"}
    assert response["text"] == text


IMAGE = {"type": "input_image", "image_url": "data:image/png;base64,AA"}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"store": 1}, "store"),
        ({"conversation": "c"}, "conversation"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"truncate_prompt_tokens": 1}, "truncate_prompt_tokens"),
        ({"regex": "a", "text": {"format": {"type": "json_object"}}}, "regex"),
        ({"response_format": {"type": "json_object"}, "text": {"format": {"type": "text"}}},
         "response_format"),
        ({"temprature": 1}, "temprature"),
        ({"input": []}, "input"),
        ({"input": [{"content": "x"}]}, "input.0.role"),
        ({"input": [{"role": "user", "content": [IMAGE]}]}, "input.0.content.0.type"),
        ({"input": [{"type": "web_search_call"}]}, "input.0.type"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input.0.call_id"),
        ({"tools": [{"type": "file_search"}]}, "tools.0.type"),
        ({"tools": [TOOL, TOOL]}, "tools.1.name"),
        ({"tools": [{"type": "function"}]}, "tools.0.name"),
        ({"tools": [{"type": "namespace", "name": "n", "tools": [{"name": "x"}]}]},
         "tools.0.tools.0.type"),
        ({"tools": [{"type": "custom", "name": "c", "format": {"type": "grammar"}}]},
         "tools.0.format"),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "f"}}, "tool_choice"),
        ({"max_output_tokens": 10**6}, "max_output_tokens"),
        ({"input": "x" * 2000}, "input"),
        ({"text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "no"}}}},
         "text.format"),
        ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format.schema"),
        ({"stream_options": {}}, "stream_options"),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused_by_name(body: dict[str, Any], param: str):
    (reply,) = post("/v1/responses", {"input": "x"} | body)
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["param"] == param
    assert reply.json()["error"]["message"].startswith(param)


def test_a_failure_in_a_stream_is_its_last_event():
    body = {"input": "What is AI?", "stream": True}
    (reply,) = post("/v1/responses", body, fail_at_step=3)
    last = read_events(reply.text)[-1]
    assert last["type"] == "response.failed"
    assert last["response"]["error"]["code"] == "server_error"
