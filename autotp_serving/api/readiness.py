"""/ready: has a good step gone through all ranks lately? Rank 0 only.

A step that ended proves that every rank ran, since each waits for the others inside it, and one
with finite numbers that the model works. Where none ended lately, or numbers were not finite after
it, a request of one token asks for one; probes in between cost nothing.
"""

from __future__ import annotations

import asyncio
import time
from itertools import count

from autotp_serving.api.engine_client import EngineClient, Usage
from autotp_serving.api.errors import ApiError, check_reason
from autotp_serving.request import Pooling, Request, SamplingParams

FRESH_SECONDS = 10.0
"""A step proves readiness for so long, or for this many times its own duration if that is more."""
FRESH_STEPS = 3.0

WAIT_SECONDS = 5.0
"""How long one probe waits for the step it asked for."""

RETRY_SECONDS = 1.0
"""How long a refusal holds before the engine is asked again."""

ANY_TOKEN = 0


class Readiness:
    """Answers probes; at most one request of its own is ever under way.

    Args:
        pools: the model embeds or reranks, and gives no tokens.
    """

    def __init__(self, engine: EngineClient, *, pools: bool) -> None:
        self._engine = engine
        self._params = SamplingParams(max_tokens=1, ignore_eos=True)
        if pools:
            self._params = SamplingParams(max_tokens=0, pooling=Pooling())
        self._numbers = count()
        self._task: asyncio.Task[None] | None = None
        self._refusal: ApiError | None = None
        self._asked_time = 0.0
        self._answered_time = 0.0

    async def check(self) -> float:
        """Seconds since the last good step ended.

        Raises:
            ApiError: 503, with the cause.
        """
        self._engine.check_open()
        outage = self._engine.engine.outage
        if outage is not None:
            raise ApiError(503, f"{outage}: the ranks are started anew", code="recovering")
        if self._refusal is not None or not self._is_fresh():
            if self._task is None and not self._has_just_failed():
                self._asked_time = time.monotonic()
                self._task = asyncio.ensure_future(self._ask())
            if self._task is not None:
                await asyncio.wait((self._task,), timeout=WAIT_SECONDS)
            if self._task is not None:
                waited = time.monotonic() - self._asked_time
                raise ApiError(
                    503, f"no step has ended: a request of one token waits for {waited:.0f} s",
                    code="no_step",
                )  # fmt: skip
            if self._refusal is not None:
                raise self._refusal
        return self._age()

    async def _ask(self) -> None:
        """Run one token through the engine, and note what came of it."""
        request = Request(
            f"ready-{next(self._numbers)}",
            (ANY_TOKEN,),
            self._params,
            time.monotonic(),
        )
        self._refusal = None
        try:
            with self._engine.open([request], Usage(), is_measured=False) as stream:
                async for outputs in stream:
                    check_reason(outputs[-1])
        except ApiError as error:
            self._refusal = ApiError(503, error.message, code=error.code)
        finally:
            self._answered_time = time.monotonic()
            self._task = None

    def _age(self) -> float:
        last = self._engine.engine.last_step_time
        return float("inf") if last is None else time.monotonic() - last

    def _is_fresh(self) -> bool:
        last_step_seconds = self._engine.engine.stats().last_step_seconds
        is_sound = self._engine.engine.is_sound
        return is_sound and self._age() < max(FRESH_SECONDS, FRESH_STEPS * last_step_seconds)

    def _has_just_failed(self) -> bool:
        return self._refusal is not None and time.monotonic() - self._answered_time < RETRY_SECONDS
