"""No agent's history is refused, whichever family's template reads it, and all of it is read."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from autotp_serving.api.openai.chat_schemas import ChatRequest
from autotp_serving.api.openai.completion_parser import CompletionParsers, join
from autotp_serving.config import ServingConfig
from autotp_serving.engine.chat_template import ChatTemplate
from autotp_serving.structured_output import ToolFormat
from tests.api import service, tool_families
from tests.api.histories import NEXT, RESULTS, SYSTEM, TOOLS, History, histories
from tests.fakes import ByteTokenizer

EACH = "{% for m in messages %}"
END = "{% endfor %}"
HEAD = "{% if add_generation_prompt %}<assistant>{% endif %}"
ALTERNATE = (
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
)

# What is special about each family's template, in as few words as will do.
FAMILIES = {
    "qwen": EACH + "<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% endif %}"
    "{% for c in m.tool_calls %}{% if c.function %}{% set c = c.function %}{% endif %}<tool_call>"
    "{{ c.name }}{% if c.arguments is string %}{{ c.arguments }}{% else %}"
    "{{ c.arguments | tojson }}{% endif %}</tool_call>{% endfor %}" + END + HEAD,
    "llama3": EACH + "{% if 'tool_calls' in m %}{% if m.tool_calls | length != 1 %}"
    "{{ raise_exception('only single tool-calls at once') }}{% endif %}"
    "{% set c = m.tool_calls[0].function %}<|python_tag|>{{ c.name }}{{ c.arguments | tojson }}"
    "{% elif m.role == 'tool' %}<ipython>{{ m.content | tojson }}"
    "{% else %}<{{ m.role }}>{{ m['content'] | trim }}{% endif %}" + END + HEAD,
    "mistral": "{% if messages[0].role == 'system' %}{{ messages[0].content + '' }}"
    "{% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}"
    "{% set ns = namespace(index=0) %}{% for m in rest %}"
    "{% if m.role in ('user', 'assistant') and m.tool_calls is not defined %}"
    "{% if (m.role == 'user') != (ns.index % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% set ns.index = ns.index + 1 %}"
    "{% endif %}{% endfor %}{% for m in rest %}{% if m.tool_calls is defined %}[TOOL_CALLS]"
    "{% for c in m.tool_calls %}{{ c.function | tojson }}{% if c.id | length != 9 %}"
    "{{ raise_exception('nine characters') }}{% endif %}{{ c.id }}{% endfor %}"
    "{% elif m.role == 'tool' %}{% if m.tool_call_id | length != 9 %}"
    "{{ raise_exception('nine characters') }}{% endif %}{{ m.content + m.tool_call_id }}"
    "{% elif m.role in ('user', 'assistant') %}<{{ m.role }}>{{ m.content + '' }}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}",
    "deepseek v3": EACH + "{% if m['role'] == 'tool' %}{{ '<out>' + m['content'] }}"
    "{% elif m['tool_calls'] is defined and m['tool_calls'] is not none %}"
    "{% for c in m['tool_calls'] %}{% if m['content'] is none %}{{ '<call>' + c['function']['name']"
    " + '<sep>' + c['function']['arguments'] }}{% else %}{{ m['content'] + '<call>' +"
    " c['function']['name'] + '<sep>' + c['function']['arguments'] }}{% endif %}{% endfor %}"
    "{% else %}{{ '<' + m['role'] + '>' + m['content'] }}{% endif %}" + END + HEAD,
    "deepseek r1": EACH + "{% if m['role'] == 'assistant' and m['tool_calls'] %}"
    "{% for c in m['tool_calls'] %}{{ '<call>' + c['type'] + '<sep>' + c['function']['name'] +"
    " '\\n```json\\n' + c['function']['arguments'] }}{% endfor %}{% endif %}"
    "{% if m['role'] == 'assistant' and m['content'] is not none %}{% set content = m['content'] %}"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ '<Assistant>' + content }}{% endif %}"
    "{% if m['role'] != 'assistant' %}{{ '<' + m['role'] + '>' + m['content'] }}{% endif %}"
    + END + HEAD,
    "glm": EACH + "<|{{ m.role }}|>{{ m.content }}{% for c in m.tool_calls %}"
    "<tool_call>{{ c.function.name }}{% set args = c.function.arguments %}"
    "{% for k, v in args.items() %}<arg_key>{{ k }}</arg_key><arg_value>"
    "{{ v | tojson if v is not string else v }}</arg_value>{% endfor %}</tool_call>{% endfor %}"
    + END + HEAD,
    "qwen coder": EACH + "<{{ m.role }}>{{ m.content if m.content is string else '' }}"
    "{% if m.tool_calls is defined and m.tool_calls is iterable %}{% for c in m.tool_calls %}"
    "{% if c.function is defined %}{% set c = c.function %}{% endif %}<function={{ c.name }}>"
    "{% if c.arguments is defined %}{% for name, value in c.arguments | items %}"
    "<parameter={{ name }}>{{ value }}</parameter>{% endfor %}{% endif %}</function>{% endfor %}"
    "{% endif %}" + END + HEAD,
    "minimax": "{% set last = namespace(name=none) %}" + EACH
    + "{% if m.role == 'tool' %}{% if last.name is none %}"
    "{{ raise_exception('no previous assistant message with a tool call') }}{% endif %}"
    "<response>{{ m.content }}</response>{% else %}<{{ m.role }}>{{ m.content }}"
    "{% if m.tool_calls %}{% for c in m.tool_calls %}<invoke name={{ c.function.name }}>"
    "{% for k, v in c.function.arguments | items %}{{ k }}={{ v }}{% endfor %}{% endfor %}"
    "{% set last.name = m.tool_calls[-1].function.name %}{% endif %}{% endif %}" + END + HEAD,
    "gpt-oss": "{% set last = namespace(name=none) %}" + EACH
    + "{% if m.role == 'tool' %}{% if last.name is none %}{{ raise_exception('none') }}{% endif %}"
    "functions.{{ last.name }} to=assistant {{ m.content | tojson }}"
    "{% elif 'tool_calls' in m %}{% if m.content and m.thinking %}"
    "{{ raise_exception('both content and thinking') }}{% endif %}{% if m.thinking %}"
    "<analysis>{{ m.thinking }}{% endif %}{{ m.content }}{% set c = m.tool_calls[0].function %}"
    "{% if m.tool_calls | length > 1 %}{{ raise_exception('one call') }}{% endif %}"
    "to=functions.{{ c.name }} {{ c.arguments | tojson }}{% set last.name = c.name %}"
    "{% else %}<{{ m.role }}>{{ m.content + '' }}{% endif %}" + END + HEAD,
    "command-r": EACH + "{% if m.role == 'tool' %}{{ m.name + ': ' + m.content }}"
    "{% elif m.tool_calls %}{% for c in m.tool_calls %}{{ c.id + ' ' + c.function.name }}"
    "{{ c.function.arguments | tojson }}{% endfor %}{% else %}<{{ m.role }}>{{ m.content + '' }}"
    "{% endif %}" + END + HEAD,
    "kimi": EACH + "<{{ m.role }}>{% if m.tool_calls %}{{ m.content }}{% for c in m.tool_calls %}"
    "{% set args = c['function']['arguments'] %}{{ c['id'] }} {{ c['function']['name'] }} "
    "{{ args if args is string else args | tojson }}{% endfor %}{% elif m.role == 'tool' %}"
    "## Return of {{ m.tool_call_id }}\n{{ m.content }}{% else %}{{ m.content + '' }}{% endif %}"
    + END + HEAD,
    "gemma": EACH + "{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}" + ALTERNATE + "<start_of_turn>{{ m.role + '\n' + m['content'] | trim }}"
    + END + HEAD,
    "deepseek v3.1": EACH + "{% if m['role'] == 'assistant' and m['tool_calls'] is defined and"
    " m['tool_calls'] is not none %}{% for c in m['tool_calls'] %}"
    "{{ (m['content'] if m['content'] is not none and loop.first else '') + '<call>' +"
    " c['function']['name'] + '<sep>' + c['function']['arguments'] }}{% endfor %}"
    "{% elif m['role'] == 'tool' %}{{ '<out>' + m['content'] }}"
    "{% elif m['role'] == 'assistant' %}{% set content = m['content'] %}"
    "{% if '</think>' in content %}{% set content = content.split('</think>', 1)[1] %}{% endif %}"
    "{{ '</think>' + content }}{% else %}{{ '<' + m['role'] + '>' + m['content'] }}{% endif %}"
    + END + HEAD,
    "granite": "{% if messages[0]['role'] == 'system' %}{% set said = messages[0]['content'] %}"
    "{% set rest = messages[1:] %}{% else %}{% set said = 'Today.' %}{% set rest = messages %}"
    "{% endif %}<system>{{ said }}{% for m in rest %}"
    "{% if m['role'] == 'assistant' and m.tool_calls %}<assistant>"
    "{{ m.content if m.content is string else '' }}{% for c in m.tool_calls %}<tool_call>"
    '{"name": "{{ c.function.name }}", "arguments": {% if c.function.arguments is string %}'
    "{{ c.function.arguments }}{% else %}{{ c.function.arguments | tojson }}{% endif %}}"
    "{% endfor %}{% else %}{{ '<' + m['role'] + '>' + m['content'] }}{% endif %}" + END + HEAD,
    "functiongemma": EACH + "{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "{% if m.role == 'tool' %}{% if not m.name %}{{ raise_exception(\"'name' must be provided\") }}"
    "{% endif %}<response>{{ m.name }}:{{ m.content | trim }}{% else %}<{{ role }}>"
    "{% if m.content is string %}{{ m.content | trim }}{% elif m.content is iterable %}"
    "{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}"
    "{% for c in m.tool_calls or [] %}call:{{ c.function.name }}("
    "{% if c.function.arguments is mapping %}{% for k, v in c.function.arguments | dictsort %}"
    "{{ k }}:<escape>{{ v }}<escape>{% endfor %}{% else %}{{ c.function.arguments }}{% endif %})"
    "{% endfor %}{% endif %}" + END + HEAD,
    "phi": EACH + "{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}" + END + HEAD,
    "chatml": EACH + "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    + END + HEAD,
}  # fmt: skip
WITHOUT_SYSTEM = {"gemma"}
HISTORIES = histories()


def tokenizer(template: str) -> type[ByteTokenizer]:
    """Bytes, and a chat template."""

    class Templated(ByteTokenizer):
        def __init__(self) -> None:
            super().__init__()
            self.chat_template = template
            self.template = ChatTemplate({"default": template}, {"bos_token": "<s>"})

        def render_chat(self, messages: Any, options: Any) -> str:
            return self.template.render(messages, options)

    return Templated


def what_was_said(history: History) -> list[str]:
    """Texts that must be in the prompt."""
    said = [message["content"] for message in history if message["role"] in ("user", "tool")]
    texts = [text if isinstance(text, str) else text[0]["text"] for text in said]
    if any(message.get("tool_calls") for message in history):
        texts += ["get_weather", "Bern"]
    return [*texts, *(SYSTEM for message in history if message["role"] in ("system", "developer"))]


def test_there_are_a_hundred() -> None:
    assert len({json.dumps(history) for history in HISTORIES.values()}) >= 100


@pytest.mark.parametrize("family", FAMILIES)
def test_no_history_is_refused(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "ByteTokenizer", tokenizer(FAMILIES[family]))

    async def go() -> dict[str, str]:
        problems: dict[str, str] = {}
        async with service.client(max_model_len=8192) as (http, _):
            for name, history in HISTORIES.items():
                if family in WITHOUT_SYSTEM:
                    roles = ("system", "developer")
                    history = [one for one in history if one["role"] not in roles]
                body = {"messages": history, "tools": TOOLS}
                reply = await http.post("/v1/chat/completions", json=body | {"max_tokens": 1})
                if reply.status_code != 200:
                    problems[name] = reply.text
                    continue
                prompt = bytes((await http.post("/tokenize", json=body)).json()["tokens"]).decode()
                missing = [text for text in what_was_said(history) if text not in prompt]
                first, second = RESULTS.values()
                if first in prompt and not prompt.index(first) < prompt.find(second, 0):
                    missing.append("the results' order")
                if missing:
                    problems[name] = f"{missing} not in {prompt}"
        return problems

    problems = asyncio.run(go())
    assert not problems, next(iter(problems.items()))


@pytest.mark.parametrize("tool_format", ["hermes", "llama3"])
@pytest.mark.parametrize("max_tokens", [None, 60, 100])
def test_own_replies_come_back(
    tool_format: str, max_tokens: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole and streamed, complete and cut short, through the template that teaches the format."""
    family = {"hermes": "qwen", "llama3": "llama3"}[tool_format]
    monkeypatch.setattr(service, "ByteTokenizer", tokenizer(FAMILIES[family]))
    call = '{"name": "get_weather", "%s": {"city": "Bern"}}'
    text = {
        "hermes": "<think>Hm.</think>I look.\n"
        + "\n".join([f"<tool_call>\n{call % 'arguments'}\n</tool_call>"] * 2),
        "llama3": "; ".join([call % "parameters"] * 2),
    }[tool_format]
    monkeypatch.setattr(service, "BOOK", {"<user>weather?<assistant>": text})
    body = {"messages": [{"role": "user", "content": "weather?"}], "tools": TOOLS,
            "temperature": 0, "max_tokens": max_tokens}  # fmt: skip

    def add_up(stream: str) -> dict[str, Any]:
        message: dict[str, Any] = {}
        for line in stream.splitlines():
            if not line.startswith("data: {"):
                continue
            for key, value in json.loads(line[6:])["choices"][0]["delta"].items():
                if key != "tool_calls":
                    message[key] = (message.get(key) or "") + value if key != "role" else value
                    continue
                for one in value:
                    calls = message.setdefault("tool_calls", [])
                    if one["index"] == len(calls):
                        calls.append(one)
                    else:
                        function = calls[one["index"]]["function"]
                        function["arguments"] += one["function"]["arguments"]
        return message

    async def go() -> list[httpx.Response]:
        config = {"tool_call_parser": tool_format, "reasoning_parser": "think"}
        async with service.client(max_model_len=4096, config=config) as (http, _):
            url = "/v1/chat/completions"
            whole = (await http.post(url, json=body)).json()["choices"][0]["message"]
            streamed = add_up((await http.post(url, json=body | {"stream": True})).text)
            assert max_tokens == 60 or whole["tool_calls"]
            replies = []
            for message in (whole, streamed):
                results = [
                    {"role": "tool", "tool_call_id": one["id"], "content": "sunny"}
                    for one in message.get("tool_calls", ())
                ]
                messages = [*body["messages"], message, *results, {"role": "user", "content": NEXT}]
                again = body | {"messages": messages, "max_tokens": 1}
                replies.append(await http.post(url, json=again))
            return replies

    for reply in asyncio.run(go()):
        assert reply.status_code == 200, reply.text


@pytest.mark.parametrize("tool_format", tool_families.FAMILIES)
def test_calls_of_every_format_come_back(tool_format: ToolFormat) -> None:
    """As parsed whole or from pieces, and wherever max_tokens cuts them."""
    family = tool_families.FAMILIES[tool_format]
    template = ChatTemplate({"default": family.template}, {})
    schemas = tool_families.TOOLS
    tools = [
        {"type": "function", "function": {"name": name, "parameters": schema}}
        for name, schema in schemas.items()
    ]
    config = ServingConfig(model_path="x", tool_call_parser=tool_format, reasoning_parser="none")
    parsers = CompletionParsers(ByteTokenizer(), config)
    for end in range(1, len(family.calls) + 1):
        text = family.calls[:end]
        piece_len = end if end % 2 else 7
        parser = parsers.make(None, dict(schemas), None)
        assert parser is not None
        deltas = [
            delta
            for start in range(0, end, piece_len)
            for delta in parser.add(
                text[start : start + piece_len], is_last=start + piece_len >= end
            )
        ]
        message = {"role": "assistant", **join(deltas)}
        calls = message.get("tool_calls", [])
        results = [{"role": "tool", "tool_call_id": one["id"], "content": "ok"} for one in calls]
        messages = [{"role": "user", "content": "go"}, message, *results,
                    {"role": "user", "content": NEXT}]  # fmt: skip
        body = ChatRequest.model_validate({"messages": messages, "tools": tools})
        prompt = template.render(*body.for_template())
        assert NEXT in prompt and all(one["function"]["name"] in prompt for one in calls)
    assert len(calls) == 2 and "2.5" in prompt


def test_a_role_that_a_template_lacks_stays_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "ByteTokenizer", tokenizer(FAMILIES["gemma"]))
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": NEXT}]

    async def go() -> httpx.Response:
        async with service.client() as (http, _):
            return await http.post("/v1/chat/completions", json={"messages": messages})

    reply = asyncio.run(go())
    assert reply.status_code == 400
    assert "System role not supported" in reply.json()["error"]["message"]
