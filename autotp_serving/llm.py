"""The server's engine in a script: `from autotp_serving import LLM, SamplingParams`.

Works in a single process and under `mpirun`: there, rank 0's script goes on, and the other ranks
serve it from inside the constructor until rank 0 is done, and then exit.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from autotp_serving.config import ServingConfig
from autotp_serving.distributed.launch import find_num_ranks, join_group, leave_group
from autotp_serving.engine import Engine
from autotp_serving.engine.adapters import parse_adapters
from autotp_serving.engine.grammar_compiler import GrammarCompiler
from autotp_serving.model.source import resolve_model
from autotp_serving.request import (
    AdapterError,
    FinishReason,
    Request,
    RequestError,
    RequestOutput,
    SamplingParams,
    TokenLogprobs,
)


@dataclass
class Completion:
    """The completion to one prompt.

    Attributes:
        logprobs: one for each of `token_ids`, if asked for.
        prompt_logprobs: one for each prompt token after the first, if asked for.
        pooled: of a model that embeds or reranks, see RequestOutput.
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: str | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    pooled: bytes = b""


class LLM:
    """A model ready to answer batches of prompts.

    Args:
        model_path: folder of a Hugging Face checkpoint, GGUF file, or name on a hub.
        settings: any other field of ServingConfig, by name.

    Raises:
        ConfigError, GroupFailure: it cannot start; in one line, with the cure.
    """

    def __init__(self, model_path: str, **settings: Any) -> None:
        from autotp_serving.engine.tokenizer import HuggingFaceTokenizer
        from autotp_serving.worker.worker import start_worker

        config = ServingConfig(model_path=model_path, **settings)
        group = join_group(os.environ)
        find_num_ranks(config, group)
        config = resolve_model(config, group)
        worker = start_worker(config, group)
        leave = partial(leave_group, group.rank)
        worker.channel.monitor(leave, config.step_timeout)
        if worker.lead is None:
            worker.runner.follow(worker.channel)
            sys.exit(0)
        # Also when the script ends without `close`, or ends with an error.
        self._release = weakref.finalize(self, worker.lead.stop)
        self.tokenizer = HuggingFaceTokenizer(
            Path(config.model_path),
            trust_remote_code=config.trust_remote_code,
            num_rows=worker.vocab_size,
        )
        if config.draft_model is not None:
            self.tokenizer.check_draft(Path(config.draft_model), config.trust_remote_code)
        self._max_queue_len = config.max_queue_len
        self._engine = Engine(
            worker.lead,
            self.tokenizer,
            config,
            worker.max_model_len,
            self._collect,
            on_stall=leave,
            find_late_ranks=worker.lead.find_late_ranks,
        )
        self._engine.watchdog.start()
        self._completions: dict[str, Completion] = {}
        self._numbers = itertools.count()
        self._compiler = GrammarCompiler(self.tokenizer)
        try:
            for name, path in parse_adapters(config.lora_modules):
                self.load_adapter(name, path)
        except AdapterError:
            self.close()
            raise

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapter: str | Sequence[str | None] | None = None,
        show_progress: bool = True,
    ) -> list[Completion]:
        """Answer prompts, batched as the server batches them.

        Args:
            prompts: texts, or token ids as they are.
            params: for all prompts, or one for each.
            adapter: name of a LoRA adapter that is loaded, for all prompts or one for each; None
                for the model as it is.

        Raises:
            RequestError: a prompt, params or an adapter that cannot be served; then none is.
            GrammarError: a structured output that cannot be compiled.
        """
        if params is None or isinstance(params, SamplingParams):
            params = [params or SamplingParams()] * len(prompts)
        if adapter is None or isinstance(adapter, str):
            adapter = [adapter] * len(prompts)
        requests = [
            self._make_request(*triple) for triple in zip(prompts, params, adapter, strict=True)
        ]
        for request in requests:
            self._engine.check(request)
        self._completions = {request.request_id: Completion() for request in requests}
        completions = list(self._completions.values())
        waiting = requests[::-1]
        try:
            with (
                tqdm(
                    total=len(waiting), unit="prompt", disable=None if show_progress else True
                ) as bar,
                _hold_interrupts() as raise_interrupt,
            ):
                while waiting or self._engine.has_work:
                    while waiting and self._engine.stats().num_waiting < self._max_queue_len:
                        self._engine.submit(waiting.pop())
                    self._engine.step()
                    raise_interrupt()
                    num_done = sum(item.finish_reason is not None for item in completions)
                    if num_done > bar.n:
                        bar.update(num_done - bar.n)
        finally:  # also after Ctrl+C: the next call finds an engine without work
            for request in requests:
                self._engine.abort(request.request_id)
        return completions

    def load_adapter(self, name: str, path: str) -> None:
        """Load a LoRA adapter, a folder as PEFT saves it, under a name of its own.

        Raises:
            AdapterError: it is not served, or there is no room for it.
        """
        self._wait(self._engine.load_adapter(name, path))

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter.

        Raises:
            AdapterError: none is loaded by this name.
        """
        self._wait(self._engine.unload_adapter(name))

    def _wait(self, future: Future[Any]) -> None:
        self._engine.step()  # in which it is done
        future.result()

    def _make_request(
        self, prompt: str | Sequence[int], params: SamplingParams, adapter_name: str | None
    ) -> Request:
        """Tokenize one prompt and compile its structured output. Raises as `generate` does."""
        is_array = hasattr(prompt, "__array__")
        token_ids: Sequence[int]
        if isinstance(prompt, str):
            try:
                token_ids = self.tokenizer.encode(prompt)
            except (UnicodeEncodeError, TypeError) as error:
                raise RequestError("prompt", "is not valid Unicode text") from error
        elif is_array or isinstance(prompt, Sequence):
            token_ids = prompt
        else:
            raise RequestError("prompt", "must be a text or a list of token ids")
        if not isinstance(params, SamplingParams):
            raise RequestError("params", "must be SamplingParams")
        adapter = None
        if adapter_name is not None:
            adapter = self._engine.adapters.find(adapter_name)
            if adapter is None:
                raise RequestError("adapter", f"no adapter is loaded as '{adapter_name}'")
        grammar = None
        if params.structured_output is not None:
            grammar = self._compiler.submit(params.structured_output).result()
        return Request(
            f"request {next(self._numbers)}",
            tuple(token_ids),
            params,
            time.monotonic(),
            grammar=grammar,
            adapter=adapter,
        )

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
            completion = self._completions.get(output.request_id)
            if completion is None:
                continue  # of a call that was interrupted
            completion.text += output.text
            completion.token_ids.extend(output.token_ids)
            completion.finish_reason = output.finish_reason
            completion.error = output.error
            completion.logprobs.extend(output.logprobs)
            if output.prompt_logprobs is not None:
                completion.prompt_logprobs = output.prompt_logprobs
            completion.pooled = output.pooled


@contextlib.contextmanager
def _hold_interrupts() -> Iterator[Callable[[], None]]:
    """Keep Ctrl+C until the function that this gives is called; a second one is not kept.

    In the middle of a step it would leave the runner, and the other ranks, with half of one.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    is_pending = False

    def note(*_: object) -> None:
        nonlocal is_pending
        if is_pending:
            raise KeyboardInterrupt
        is_pending = True

    def raise_interrupt() -> None:
        if is_pending:
            raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:  # the script has its own way, or none
        yield lambda: None
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield raise_interrupt
    finally:
        signal.signal(signal.SIGINT, before)
