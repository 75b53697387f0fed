"""From inputs to pooled vectors: tokenized, admitted and run a portion at a time. Rank 0 only.

They go the way of all prompts, through one scheduler, in chunks where they are long.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from autotp_serving.api.admission import Admission
from autotp_serving.api.engine_client import EngineClient
from autotp_serving.api.errors import check_reason
from autotp_serving.api.middleware import RequestRecord
from autotp_serving.config import ServingConfig
from autotp_serving.request import Pooling, Request, SamplingParams

PORTION_STEPS = 4
"""Steps that the requests of one call fill before others get their turn of the queue."""

Input = TypeVar("Input")


class PromptPooler:
    """Runs the inputs of one call, and gives their vectors in order.

    Args:
        engine: runs what was admitted.
        admission: makes requests of token ids.
        config: how many sequences run and wait.
    """

    def __init__(self, engine: EngineClient, admission: Admission, config: ServingConfig) -> None:
        self._engine = engine
        self._admission = admission
        self._portion = min(
            PORTION_STEPS * config.max_num_seqs, config.max_num_seqs + config.max_queue_len
        )

    async def pool(
        self,
        inputs: Sequence[Input],
        encode: Callable[[Input], Awaitable[list[int]]],
        pooling: Pooling,
        record: RequestRecord,
        field_name: str,
        priority: int | None,
    ) -> list[array[float]]:
        """Run inputs; only as many as fill a few steps are tokenized, and in the queue, at once.

        Args:
            encode: tokenizes one.
            record: of the HTTP request; its usage counts their tokens.
            field_name: the client's word for them.
            priority: see Request.

        Returns:
            Vectors of float32.

        Raises:
            ApiError, RequestError: as admission and the engine have it; no input is answered then.
        """
        params = SamplingParams(max_tokens=0, pooling=pooling)
        found: list[array[float]] = []
        for start in range(0, len(inputs), self._portion):
            requests: list[Request] = []
            for one in inputs[start : start + self._portion]:
                await asyncio.sleep(0)  # short texts are tokenized on the event loop
                requests += self._admission.admit(
                    await encode(one),
                    [params],
                    record,
                    first_choice=start + len(requests),
                    prompt_field=field_name,
                    length_field=field_name,
                    priority=priority,
                )
            found += await self._run(requests, record)
        return found

    async def _run(self, requests: Sequence[Request], record: RequestRecord) -> list[array[float]]:
        vectors: dict[str, array[float]] = {}
        with self._engine.open(requests, record.usage) as stream:
            async for outputs in stream:
                for output in outputs:
                    check_reason(output)
                    vectors[output.request_id] = array("f", output.pooled)
        return [vectors[request.request_id] for request in requests]
