"""The server's engine in a script: `from autotp_serving import LLM, SamplingParams`.

Works in a single process and under `mpirun`: there, rank 0's script goes on, and the other ranks
serve it from inside the constructor until rank 0 is done, and then exit.
"""

from __future__ import annotations

import os
import sys
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from autotp_serving.config import ServingConfig
from autotp_serving.engine import Engine
from autotp_serving.engine.grammar_compiler import GrammarCompiler
from autotp_serving.ranks import find_num_ranks, join_control, leave_group
from autotp_serving.request import (
    FinishReason,
    Request,
    RequestOutput,
    SamplingParams,
    TokenLogprobs,
)


@dataclass
class Completion:
    """The answer to one prompt.

    Attributes:
        logprobs: one for each of `token_ids`, if asked for.
        prompt_logprobs: one for each prompt token after the first, if asked for.
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: str | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None


class LLM:
    """A model ready to answer batches of prompts.

    Args:
        model_path: folder of a Hugging Face checkpoint.
        settings: any other field of ServingConfig, by name.

    Raises:
        ConfigError, GroupFailure: it cannot start; in one line, with the cure.
    """

    def __init__(self, model_path: str, **settings: Any) -> None:
        from autotp_serving.tokenizer import HuggingFaceTokenizer
        from autotp_serving.worker import start_worker

        config = ServingConfig(model_path=model_path, **settings)
        control = join_control(os.environ)
        find_num_ranks(config, control)
        worker = start_worker(config, control)
        worker.channel.watch(partial(leave_group, control.rank))
        if worker.lead is None:
            worker.runner.follow(worker.channel)
            sys.exit(0)
        # Also when the script ends without `close`, or ends with an error.
        self._release = weakref.finalize(self, worker.lead.stop)
        self.tokenizer = HuggingFaceTokenizer(
            Path(model_path), trust_remote_code=config.trust_remote_code
        )
        self._max_queue_len = config.max_queue_len
        self._engine = Engine(
            worker.lead, self.tokenizer, config, worker.max_model_len, self._collect
        )
        self._completions: dict[str, Completion] = {}
        self._compiler = GrammarCompiler(self.tokenizer)

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        show_progress: bool = True,
    ) -> list[Completion]:
        """Answer prompts, batched as the server batches them.

        Args:
            prompts: texts, or token ids as they are.
            params: for all prompts, or one for each.

        Raises:
            RequestError: a prompt that does not fit.
            GrammarError: a structure that cannot be compiled.
        """
        if params is None or isinstance(params, SamplingParams):
            params = [params or SamplingParams()] * len(prompts)
        waiting = []
        for index, (prompt, prompt_params) in enumerate(zip(prompts, params, strict=True)):
            token_ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
            structure = prompt_params.structure
            grammar = None if structure is None else self._compiler.submit(structure).result()
            waiting.append(
                Request(
                    str(index),
                    tuple(token_ids),
                    prompt_params,
                    time.monotonic(),
                    grammar=grammar,
                )
            )
        completions = [Completion() for _ in waiting]
        self._completions = {str(index): item for index, item in enumerate(completions)}
        waiting.reverse()
        with tqdm(total=len(waiting), unit="prompt", disable=not show_progress) as bar:
            while waiting or self._engine.has_work:
                while waiting and self._engine.stats().num_waiting < self._max_queue_len:
                    self._engine.submit(waiting.pop())
                self._engine.step()
                num_done = sum(item.finish_reason is not None for item in completions)
                if num_done > bar.n:
                    bar.update(num_done - bar.n)
        return completions

    def close(self) -> None:
        """Let the other ranks go; the instance cannot be used afterwards."""
        self._engine.shutdown()
        self._release()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _collect(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            completion = self._completions[output.request_id]
            completion.text += output.text
            completion.token_ids.extend(output.token_ids)
            completion.finish_reason = output.finish_reason
            completion.error = output.error
            completion.logprobs.extend(output.logprobs)
            if output.prompt_logprobs is not None:
                completion.prompt_logprobs = output.prompt_logprobs
