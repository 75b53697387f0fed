"""What answers that keep to a JSON schema cost those in the same batch that do not.

    python -m benchmarks.structured_output --model demo_model --low-bit bf16
    mpirun -np 2 python -m benchmarks.structured_output --model MODEL --streams 4 --beside 4

The engine without HTTP. A few plain answers run beside as many others, which are plain in one batch
and keep to a JSON schema in the next; all sampled at temperature 1 and equally long, so that
nothing differs but the schema. The two kinds of batch take turns, as machines are shared and their
mood changes, and each is compared with its neighbour in time. Every flag of serving.py works too.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
from dataclasses import replace

from autotp_serving import SamplingParams
from autotp_serving.config import ConfigError
from autotp_serving.distributed.launch import GroupFailure, LaunchError, is_first_rank
from autotp_serving.request import RequestError
from autotp_serving.structured_output import StructuredOutput
from benchmarks.offline import (
    TimedLLM,
    add_flag,
    make_prompt,
    parse_serving_flags,
    positive,
    run_script,
    settings_of,
)

NAME = "benchmarks.structured_output"
PROMPT_LEN = 32

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 3, "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "role": {"enum": ["user", "admin", "guest"]},
        "emails": {"type": "array", "items": {"type": "string", "maxLength": 30}, "maxItems": 3},
        "address": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}, "zip": {"type": "integer"}},
            "required": ["city", "zip"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "age", "role", "address"],
    "additionalProperties": False,
}
ORDER = {
    "type": "object",
    "properties": {
        "id": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{6}$"},
        "total": {"type": "number", "minimum": 0},
        "paid": {"type": "boolean"},
        "note": {"anyOf": [{"type": "null"}, {"type": "string", "maxLength": 200}]},
    },
    "required": ["id", "total", "paid", "note"],
    "additionalProperties": False,
}
# Longer than any answer here, so that none ends before the plain ones do.
SCHEMAS = [{"type": "array", "items": item, "minItems": 500} for item in (PERSON, ORDER)]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    # fmt: off
    add_flag(parser, "streams", type=positive, default=4, help="plain answers that are timed (4)")
    add_flag(parser, "beside", type=positive, default=4, help="answers beside them (4)")
    add_flag(parser, "output-len", type=positive, default=128, help="tokens of each answer (128)")
    add_flag(parser, "rounds", type=positive, default=16, help="pairs of batches (16)")
    # fmt: on
    return parser


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 2 when it cannot start."""
    options, rest = build_parser().parse_known_args(argv)
    try:
        config = parse_serving_flags(rest, NAME)
        batch_size = options.streams + options.beside
        if batch_size > config.max_num_seqs:
            config = replace(config, max_num_seqs=batch_size)
        with TimedLLM(config.model_path, **settings_of(config)) as llm:
            result = measure(llm, options)
    except (ConfigError, GroupFailure, LaunchError, RequestError, OSError) as error:
        if is_first_rank(os.environ):
            print(f"{NAME}: error: {error}", file=sys.stderr)
        return 2
    print(
        f"{options.streams} plain answers beside {options.beside} others, median of "
        f"{options.rounds} rounds: a step takes {result['plain_ms']:.2f} ms where those are plain, "
        f"{result['structured_ms']:.2f} ms where they keep to a schema; the plain ones lose "
        f"{result['loss']:.1%} of their speed (rounds: {result['least_loss']:.1%} to "
        f"{result['most_loss']:.1%})"
    )
    print(json.dumps({"model": config.model_path, "low_bit": config.low_bit, **result}))
    return 0


def measure(llm: TimedLLM, options: argparse.Namespace) -> dict[str, float]:
    """Median milliseconds between two tokens of a plain answer, and what the schemas cost."""
    free = SamplingParams(max_tokens=options.output_len, temperature=1.0, ignore_eos=True)
    formed = [
        replace(free, structured_output=StructuredOutput("json_schema", json.dumps(schema)))
        for schema in SCHEMAS
    ]
    neighbours = {
        "plain": [free] * options.beside,
        "structured": [formed[number % len(formed)] for number in range(options.beside)],
    }
    for beside in neighbours.values():  # the first batches of a process are slow
        run(llm, [free] * options.streams, beside, seed=0)
    steps: dict[str, list[float]] = {kind: [] for kind in neighbours}
    for number in range(options.rounds):
        kinds = list(neighbours)
        for kind in kinds if number % 2 else reversed(kinds):
            seconds = run(llm, [free] * options.streams, neighbours[kind], seed=number)
            steps[kind].append(seconds)
    losses = [
        1 - plain / structured
        for plain, structured in zip(steps["plain"], steps["structured"], strict=True)
    ]
    return {
        "plain_ms": statistics.median(steps["plain"]) * 1e3,
        "structured_ms": statistics.median(steps["structured"]) * 1e3,
        "loss": statistics.median(losses),
        "least_loss": min(losses),
        "most_loss": max(losses),
    }


def run(
    llm: TimedLLM, plain: list[SamplingParams], beside: list[SamplingParams], seed: int
) -> float:
    """Mean seconds between two tokens of the plain answers."""
    params = [*plain, *beside]
    rng = random.Random(seed)
    prompts = [make_prompt(rng, PROMPT_LEN, llm.tokenizer.vocab_size) for _ in params]
    llm.arrivals.clear()
    completions = llm.generate(prompts, params, show_progress=False)
    assert all(one.finish_reason == "length" for one in completions)
    timed = {str(number) for number in range(len(plain))}
    moments = [moment for moment, ids in llm.arrivals if timed <= set(ids)]
    return (moments[-1] - moments[0]) / (len(moments) - 1)


if __name__ == "__main__":
    run_script(main)
