"""Run under mpirun: answer the prompts of a JSON file with `LLM`, without drafts, with those that
are looked up, and with those of a draft model.

    mpirun -np N python tests/ranks/drafts_program.py MODEL IN.json OUT.json

IN.json: {"prompts": [text], "params": [{SamplingParams fields, or "regex"}], "settings":
{ServingConfig fields}}. OUT.json: of each way token ids, logprobs and ends, how many drafts ran and
how many were accepted.
"""

from __future__ import annotations

import json
import sys
from dataclasses import astuple
from pathlib import Path

from autotp_serving import LLM, SamplingParams
from autotp_serving.engine.drafts import Drafter
from autotp_serving.engine.model_drafts import ModelDrafts
from autotp_serving.structured_output import StructuredOutput


class EagerDrafter(Drafter):
    """As many drafts as there are, whatever they cost."""

    def _choose_lens(self, sequences, *_):
        """Of each sequence."""
        return [(one, max(0, self._find_most(one))) for one in sequences]


def main() -> None:
    """Answer and write."""
    model_path, in_path, out_path = sys.argv[1:]
    job = json.loads(Path(in_path).read_text())
    params = []
    for fields in job["params"]:
        bias = {int(token): value for token, value in fields.pop("logit_bias", {}).items()}
        if regex := fields.pop("regex", None):
            fields["structured_output"] = StructuredOutput("regex", regex)
        params.append(SamplingParams(**fields, logit_bias=bias))
    found = []
    with LLM(model_path, **job["settings"]) as llm:
        for max_drafts, guesses in ((0, None), (6, None), (6, llm._engine._draft)):
            drafter = llm._engine.scheduler.drafter = EagerDrafter(max_drafts)
            if guesses is not None:
                drafter.use_model(ModelDrafts(guesses, max_tokens=64))
            completions = llm.generate(job["prompts"], params, show_progress=False)
            answers = [(one.token_ids, one.logprobs, one.finish_reason) for one in completions]
            found.append((answers, drafter.num_draft_tokens, drafter.num_accepted_tokens))
    Path(out_path).write_text(json.dumps(found, default=astuple))


if __name__ == "__main__":
    main()
