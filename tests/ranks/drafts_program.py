"""Run under mpirun: answer the prompts of a JSON file with `LLM`, without drafts, with those that
are looked up, and with those of a draft model.

    mpirun -np N python tests/ranks/drafts_program.py MODEL IN.json OUT.json

IN.json: {"prompts": [text], "params": [{SamplingParams fields, or "regex"}], "settings":
{ServingConfig fields}, "as_on_cards": steps overlap, and drafts are sequences of their own}.
OUT.json: of each way token ids, logprobs and ends, how many drafts ran and how many were accepted.
"""

from __future__ import annotations

import json
import sys
from dataclasses import astuple
from pathlib import Path

from autotp_serving import LLM, SamplingParams
from autotp_serving.batch import Batch
from autotp_serving.devices.cpu import CpuDevice
from autotp_serving.engine.drafts import Drafter
from autotp_serving.engine.model_drafts import ModelDrafts
from autotp_serving.model.batch_state import BatchState
from autotp_serving.model.step_inputs import StepInputs
from autotp_serving.structured_output import StructuredOutput


class EagerDrafter(Drafter):
    """As many drafts as there are, whatever they cost."""

    def _choose_lens(self, sequences, *_):
        """Of each sequence."""
        return [(one, max(0, self._find_most(one))) for one in sequences]

    def _is_worth_waiting(self, lens, *_):
        """Always."""
        return bool(lens)


def do_as_cards_do() -> None:
    """Overlap steps, and run drafts as sequences."""
    apply = BatchState.apply

    def apply_spread(state: BatchState, batch: Batch, num_padded_seqs: int = 0) -> StepInputs:
        state.reserve(256, 64)
        return apply(state, batch.spread_drafts(), num_padded_seqs)

    BatchState.apply = apply_spread
    CpuDevice.max_in_flight = 2


def main() -> None:
    """Answer and write."""
    model_path, in_path, out_path = sys.argv[1:]
    job = json.loads(Path(in_path).read_text())
    if job["as_on_cards"]:
        do_as_cards_do()
    params = []
    for fields in job["params"]:
        bias = {int(token): value for token, value in fields.pop("logit_bias", {}).items()}
        if regex := fields.pop("regex", None):
            fields["structured_output"] = StructuredOutput("regex", regex)
        params.append(SamplingParams(**fields, logit_bias=bias))
    found = []
    with LLM(model_path, **job["settings"]) as llm:
        ways = [(0, None), (6, None)]
        if "draft_model" in job["settings"]:
            ways.append((6, llm._engine._draft))
        for max_drafts, guesses in ways:
            drafter = llm._engine.scheduler.drafter = EagerDrafter(max_drafts)
            if guesses is not None:
                drafter.use_model(ModelDrafts(guesses, max_tokens=64))
            completions = llm.generate(job["prompts"], params, show_progress=False)
            answers = [(one.token_ids, one.logprobs, one.finish_reason) for one in completions]
            found.append((answers, drafter.num_draft_tokens, drafter.num_accepted_tokens))
    Path(out_path).write_text(json.dumps(found, default=astuple))


if __name__ == "__main__":
    main()
