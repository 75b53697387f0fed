"""How each family writes calls: what is special of its chat template, and two calls of its model.

The templates are our own, cut down to what tells the families apart.
"""

from __future__ import annotations

from dataclasses import dataclass

from autotp_serving.structured_output import ToolFormat

EACH = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}"
END = "{% endfor %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
NAME = "{{ c.function.name }}"
JSON = "{{ c.function.arguments | tojson }}"
OBJECT = f'{{"name": "{NAME}", "arguments": {JSON}}}'
PAIRS = "{% for k, v in c.function.arguments.items() %}"

TOOLS = {
    "weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"$ref": "#/$defs/Days"},
            "units": {"anyOf": [{"enum": ["C", "F"]}, {"type": "null"}]},
        },
        "$defs": {"Days": {"type": "array", "items": {"type": "integer"}}},
    },
    "add": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "number"}}},
}
WEATHER = {"city": 'K"ö<l>n\n{', "days": [1, 2], "units": None}
ADD = {"a": 1, "b": 2.5}
WEATHER_JSON = '{"city": "K\\"ö<l>n\\n{", "days": [1, 2], "units": null}'
ADD_JSON = '{"a": 1, "b": 2.5}'


@dataclass(frozen=True)
class Family:
    """One of them.

    Attributes:
        template: what tells it from others.
        calls: of `weather` and `add`, as its models write them.
        malformed: what looks like a call and is none.
    """

    template: str
    calls: str
    malformed: str


def objects(begin: str, separator: str, end: str, key: str = "arguments") -> str:
    calls = (("weather", WEATHER_JSON), ("add", ADD_JSON))
    written = (f'{{"name": "{name}", "{key}": {arguments}}}' for name, arguments in calls)
    return begin + separator.join(written) + end


def gemma(begin: str, quote: str, end: str) -> str:
    city = f"{quote}{WEATHER['city']}{quote}"
    weather = f"{begin}call:weather{{city:{city},days:[1,2],units:null}}{end}"
    return weather + f"{begin}call:add{{a:1,b:2.5}}{end}"


XML = [WEATHER["city"], "[1, 2]", "null", "1", "2.5"]
V3 = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>{}\n```json\n{}\n```<｜tool▁call▁end｜>"  # noqa: RUF001
V31 = "<｜tool▁call▁begin｜>{}<｜tool▁sep｜>{}<｜tool▁call▁end｜>"  # noqa: RUF001
SECTION = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")  # noqa: RUF001
KIMI = "<|tool_call_begin|>functions.{}:{}<|tool_call_argument_begin|>{}<|tool_call_end|>"
HARMONY = "<|channel|>commentary to=functions.{} <|constrain|>json<|message|>{}"

FAMILIES: dict[ToolFormat, Family] = {
    "hermes": Family(
        f"{EACH}<tool_call>\n{OBJECT}\n</tool_call>{END}",
        objects("<tool_call>\n", "\n</tool_call>\n<tool_call>\n", "\n</tool_call>"),
        '<tool_call>\n{"name": "other", "arguments": {}}\n</tool_call>',
    ),
    "llama3": Family(
        f'{EACH}<|python_tag|>{{"name": "{NAME}", "parameters": {JSON}}}{END}',
        objects("", "; ", "", "parameters"),
        '{"name": "other", "parameters": {}}',
    ),
    "mistral": Family(
        f"{EACH}[TOOL_CALLS]{NAME}[ARGS]{JSON}{END}",
        f"[TOOL_CALLS]weather[ARGS]{WEATHER_JSON}[TOOL_CALLS]add[CALL_ID]abc123XYZ[ARGS]{ADD_JSON}",
        "[TOOL_CALLS]weather[ARGS]nothing",
    ),
    "mistral_json": Family(
        f"{EACH}[TOOL_CALLS] [{OBJECT}]{END}",
        objects("[TOOL_CALLS] [", ", ", "]").replace('2.5}}]', '2.5}, "id": "abc123XYZ"}]'),
        "[TOOL_CALLS] [weather]",
    ),
    "qwen3_coder": Family(
        f"{EACH}<tool_call>\n<function={NAME}>\n{PAIRS}<parameter={{{{ k }}}}>\n{{{{ v }}}}\n"
        f"</parameter>\n{{% endfor %}}</function>\n</tool_call>{END}",
        "<tool_call>\n<function=weather>\n<parameter=city>\n{}\n</parameter>\n<parameter=days>\n{}"
        "\n</parameter>\n<parameter=units>\n{}\n</parameter>\n</function>\n</tool_call>\n"
        # Without the tag around it, as these models forget it.
        "<function=add>\n<parameter=a>\n{}\n</parameter>\n<parameter=b>{}</parameter>\n</function>"
        "\n</tool_call>".format(*XML),
        "<tool_call>\n<function=other>\n</function>\n</tool_call>",
    ),
    "glm45": Family(
        f"{EACH}<tool_call>{NAME}\n{PAIRS}<arg_key>{{{{ k }}}}</arg_key>\n<arg_value>{{{{ v }}}}"
        f"</arg_value>\n{{% endfor %}}</tool_call>{END}",
        "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>{}</arg_value>\n<arg_key>days"
        "</arg_key>\n<arg_value>{}</arg_value>\n<arg_key>units</arg_key>\n<arg_value>{}</arg_value>"
        "\n</tool_call>\n<tool_call>add<arg_key>a</arg_key><arg_value>{}</arg_value><arg_key>b"
        "</arg_key><arg_value>{}</arg_value></tool_call>".format(*XML),
        "<tool_call>weather of today</tool_call>",
    ),
    "minimax_m2": Family(
        f'{EACH}<minimax:tool_call>\n<invoke name="{NAME}">\n{PAIRS}<parameter name="{{{{ k }}}}">'
        f"{{{{ v }}}}</parameter>\n{{% endfor %}}</invoke>\n</minimax:tool_call>{END}",
        '<minimax:tool_call>\n<invoke name="weather">\n<parameter name="city">{}</parameter>\n'
        '<parameter name="days">{}</parameter>\n<parameter name="units">{}</parameter>\n</invoke>\n'
        '<invoke name="add">\n<parameter name="a">{}</parameter>\n<parameter name="b">{}'
        "</parameter>\n</invoke>\n</minimax:tool_call>".format(*XML),
        '<minimax:tool_call>\n<invoke name="other">\n</invoke>\n</minimax:tool_call>',
    ),
    "deepseek_v3": Family(
        EACH + SECTION[0] + V3.format(NAME, JSON) + SECTION[1] + END,
        SECTION[0] + V3.format("weather", WEATHER_JSON) + "\n" + V3.format("add", ADD_JSON)
        + SECTION[1],
        SECTION[0] + V3.format("other", "{}") + SECTION[1],
    ),
    "deepseek_v31": Family(
        EACH + SECTION[0] + V31.format(NAME, JSON) + SECTION[1] + END,
        SECTION[0] + V31.format("weather", WEATHER_JSON) + V31.format("add", ADD_JSON) + SECTION[1],
        SECTION[0] + "weather?" + SECTION[1],
    ),
    "kimi_k2": Family(
        f"{EACH}<|tool_calls_section_begin|>{KIMI.format(NAME, 0, JSON)}"
        f"<|tool_calls_section_end|>{END}",
        f"<|tool_calls_section_begin|>{KIMI.format('weather', 0, WEATHER_JSON)}"
        f"{KIMI.format('add', 1, ADD_JSON)}<|tool_calls_section_end|>",
        f"<|tool_calls_section_begin|>{KIMI.format('other', 0, '{}')}<|tool_calls_section_end|>",
    ),
    "phi4": Family(
        "{% if tools %}<|tool|>{{ tools | tojson }}<|/tool|>{% endif %}"
        f"{EACH}<|tool_call|>[{OBJECT}]<|/tool_call|>{END}",
        objects("<|tool_call|>[", ", ", "]<|/tool_call|>"),
        "functools are no [functions].",
    ),
    "granite": Family(
        f"{EACH}<|tool_call|>[{OBJECT}]{END}",
        objects("<|tool_call|>[", ", ", "]"),
        "<|tool_call|>[]",
    ),
    "gemma4": Family(
        f"{EACH}<|tool_call>call:{NAME}{JSON}<tool_call|>{END}",
        gemma("<|tool_call>", '<|"|>', "<tool_call|>"),
        "<|tool_call>call:other{}<tool_call|>",
    ),
    "functiongemma": Family(
        f"{EACH}<start_function_call>call:{NAME}{JSON}<end_function_call>{END}",
        gemma("<start_function_call>", "<escape>", "<end_function_call>"),
        "<start_function_call>weather<end_function_call>",
    ),
    "harmony": Family(
        f"{EACH}<|start|>assistant{HARMONY.format(NAME, JSON)}<|call|>{END}",
        f"{HARMONY.format('weather', WEATHER_JSON)}<|end|><|start|>assistant"
        f"{HARMONY.format('add', ADD_JSON)}",
        "<|channel|>commentary to=functions.other <|constrain|>json<|message|>{}",
    ),
}  # fmt: skip
