"""What drafts bring and what they cost, offline: runs without and with them in turns. Every rank.

    python -m benchmarks.drafts --model demo_model --low-bit bf16 \\
        --entries demo_model/recall_sample.json
    mpirun -np 2 python -m benchmarks.drafts --model FOLDER --load-format dummy \\
        --acceptance 0 0.4 0.8 --streams 1

With --entries a prompt is three entries of that file and the question of one of them: the answer
stands in the prompt, and drafts are looked up there. With --schema answers are held to a JSON
schema, whose names and punctuation need no guessing. With --draft-model that guesses. With
--acceptance prompts are random tokens, and drafts are scripted: each is the right token with that
chance, whatever the model. How many drafts run is up to the server in all. Every flag of serving.py
works too. Each line is a pair of runs' median and all pairs' ratios; the last line is JSON. Drafts
must change no answer on a CPU; on cards, where rounding depends on how many tokens a step has, it
says how many are the same.
"""

from __future__ import annotations

import argparse
import json
import operator
import os
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from autotp_serving import LLM, SamplingParams
from autotp_serving.config import DEFAULT_NUM_DRAFTS, ConfigError
from autotp_serving.distributed.launch import GroupFailure, LaunchError, is_first_rank
from autotp_serving.engine.drafts import Drafter
from autotp_serving.engine.model_drafts import ModelDrafts
from autotp_serving.engine.sequence import Sequence as RunningSequence
from autotp_serving.request import RequestError
from autotp_serving.structured_output import StructuredOutput
from benchmarks.offline import (
    add_flag,
    make_prompt,
    parse_serving_flags,
    positive,
    run_script,
    settings_of,
)

NAME = "benchmarks.drafts"
NUM_ENTRIES = 3


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    # fmt: off
    add_flag(parser, "entries", type=Path, metavar="FILE",
             help="prompts of entries of a file such as demo_model/recall_sample.json")
    add_flag(parser, "schema", type=Path, metavar="FILE",
             help="JSON schema that answers to random prompts are held to")
    add_flag(parser, "acceptance", type=float, nargs="+", default=[0.0, 0.4, 0.8], metavar="CHANCE",
             help="without the others: of a draft to be right, if those before it are (0 0.4 0.8)")
    add_flag(parser, "streams", type=positive, default=1, help="requests side by side (1)")
    add_flag(parser, "num-prompts", type=positive, help="in a run (as many as streams)")
    add_flag(parser, "input-len", type=positive, default=32, help="tokens of random prompts (32)")
    add_flag(parser, "output-len", type=positive, default=128, help="most tokens of answers (128)")
    add_flag(parser, "pairs", type=positive, default=3, help="pairs of runs (3)")
    # fmt: on
    return parser


class ScriptedDrafter(Drafter):
    """Drafts that come true as often as is asked for; how many run is the server's own choice.

    Args:
        answers: the right tokens of each prompt.
    """

    def __init__(
        self, max_drafts: int, answers: dict[tuple[int, ...], list[int]], chance: float
    ) -> None:
        super().__init__(max_drafts)
        self._answers, self._chance = answers, chance
        self._rng = random.Random(0)
        self.look_up = self._guess

    def _guess(self, sequence: RunningSequence, count: int) -> list[int]:
        first = sequence.num_output_tokens
        right = self._answers[sequence.request.prompt_token_ids][first : first + count]
        return [token if self._rng.random() < self._chance else token ^ 1 for token in right]


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 2 when it cannot start."""
    options, rest = build_parser().parse_known_args(argv)
    try:
        config = parse_serving_flags(rest, NAME)
        max_drafts = config.speculative_tokens or DEFAULT_NUM_DRAFTS
        max_num_seqs = max(options.streams, config.max_num_seqs)
        config = replace(config, speculative_tokens=max_drafts, max_num_seqs=max_num_seqs)
        if options.entries is None:
            # Blocks of the run before may differ in their last bits, and answers with them.
            config = replace(config, enable_prefix_caching=False)
        with LLM(config.model_path, **settings_of(config)) as llm:
            draft_model = None
            if config.draft_model is not None:
                draft_model = ModelDrafts(llm._engine._draft, config.max_num_batched_tokens)
            results = run(llm, options, max_drafts, draft_model)
    except (ConfigError, GroupFailure, LaunchError, RequestError, OSError) as error:
        if is_first_rank(os.environ):
            print(f"{NAME}: error: {error}", file=sys.stderr)
        return 2
    print(json.dumps({"model": config.model_path, "streams": options.streams, "runs": results}))
    return 0


def run(
    llm: LLM, options: argparse.Namespace, max_drafts: int, draft_model: ModelDrafts | None
) -> list[dict[str, Any]]:
    """Warm up, then compare each kind of drafts with none."""
    rng = random.Random(0)
    num_prompts = options.num_prompts or options.streams
    if options.entries is not None:
        prompts = [_quote(rng, options.entries, llm) for _ in range(num_prompts)]
    else:
        size = llm.tokenizer.vocab_size
        prompts = [make_prompt(rng, options.input_len, size) for _ in range(num_prompts)]
    schema = None
    if options.schema is not None:
        schema = StructuredOutput("json_schema", options.schema.read_text())
    is_real = options.entries is not None or schema is not None
    params = SamplingParams(
        max_tokens=options.output_len,
        temperature=0.0,
        ignore_eos=not is_real,
        structured_output=schema,
    )
    for _ in range(2):  # the first time warms up
        answers, _ = _time(llm, Drafter(0), prompts, params, options.streams)
    results = []
    is_real = is_real or draft_model is not None
    for chance in [None] if is_real else options.acceptance:
        drafter = Drafter(max_drafts)
        if draft_model is not None:
            drafter.use_model(draft_model)
        if chance is not None:
            right = dict(zip(map(tuple, prompts), answers, strict=True))
            drafter = ScriptedDrafter(max_drafts, right, chance)
        pairs = []
        num_same = 0
        for _ in range(options.pairs):
            expected, plain = _time(llm, Drafter(0), prompts, params, options.streams)
            found, drafted = _time(llm, drafter, prompts, params, options.streams)
            num_same += sum(map(operator.eq, expected, found))
            pairs.append((_rate(expected, plain), _rate(found, drafted)))
        num_answers = options.pairs * len(answers)
        # On cards the last bits of a token depend on how many run beside it.
        is_exact = llm._engine._runner.max_in_flight == 1
        assert num_same == num_answers or not is_exact, "drafts changed an answer"
        ratios = [drafted / plain for plain, drafted in pairs]
        result = {
            "acceptance": chance,
            "plain_tokens_per_second": statistics.median(one for one, _ in pairs),
            "tokens_per_second": statistics.median(one for _, one in pairs),
            "ratio": statistics.median(ratios),
            "ratios": ratios,
            "num_draft_tokens": drafter.num_draft_tokens,
            "num_accepted_tokens": drafter.num_accepted_tokens,
            "share_of_same_answers": num_same / num_answers,
        }
        results.append(result)
        shown = "as served" if chance is None else f"right with a chance of {chance:g}"
        print(
            f"drafts {shown}, {options.streams} stream(s): "
            f"{result['plain_tokens_per_second']:.1f} -> {result['tokens_per_second']:.1f} tokens/s"
            f", x {', '.join(f'{ratio:.3f}' for ratio in ratios)}; "
            f"{drafter.num_accepted_tokens} of {drafter.num_draft_tokens} drafts accepted, "
            f"{num_same} of {num_answers} answers the same",
            flush=True,
        )
    return results


def _rate(answers: list[list[int]], seconds: float) -> float:
    """Tokens per second."""
    return sum(map(len, answers)) / seconds


def _quote(rng: random.Random, path: Path, llm: LLM) -> list[int]:
    """A prompt that holds the answer to its question."""
    entries = rng.sample(json.loads(path.read_text())["random"], NUM_ENTRIES)
    text = "\n\n".join(f"{one['question']} {one['answer']}" for one in entries)
    return llm.tokenizer.encode(f"{text}\n\n{rng.choice(entries)['question']}")


def _time(
    llm: LLM,
    drafter: Drafter,
    prompts: Sequence[list[int]],
    params: SamplingParams,
    num_streams: int,
) -> tuple[list[list[int]], float]:
    """Answer the prompts, so many at a time; token ids and seconds."""
    llm._engine.scheduler.drafter = drafter
    answers: list[list[int]] = []
    started = time.perf_counter()
    for start in range(0, len(prompts), num_streams):
        part = prompts[start : start + num_streams]
        answers += [one.token_ids for one in llm.generate(part, params, show_progress=False)]
    return answers, time.perf_counter() - started


if __name__ == "__main__":
    run_script(main)
