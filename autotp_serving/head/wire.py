"""What the head and the ranks say to each other, as bytes. Head and every rank.

Steps go one way, what came of them the other, each a length and as many bytes, in one write. Both
ends are the same program on the same host and the connection is theirs alone (see `ranks`), so
the bytes are `marshal`'s, of plain values: nothing in them is ever run.
"""

from __future__ import annotations

import marshal
import socket
from collections.abc import Sequence
from dataclasses import MISSING, astuple, fields
from typing import Any, NamedTuple

from autotp_serving.batch import PoolInput, SampleInput, ScoreInput, StepResult
from autotp_serving.distributed.awake_reader import AwakeReader
from autotp_serving.distributed.channel import LENGTH
from autotp_serving.request import Pooling, SamplingParams, TokenLogprobs

READ_BYTES = 2**16

PLAIN_SAMPLE = SampleInput(SamplingParams())
"""The largest logit is the token, and nothing else matters."""


class Ready(NamedTuple):
    """What ranks that are ready to run tell of themselves.

    Attributes:
        num_blocks: blocks in the KV pool, the same on every rank.
        block_size: tokens a block holds.
        max_in_flight: steps that may be begun and not collected.
        has_states: whether layers keep states beside the blocks.
        can_draft: whether batches may hold drafts.
        max_model_len: most tokens of a prompt and its completion together.
        vocab_size: tokens that the model has an embedding and logits for.
        device_kind: "cpu", "cuda" or "xpu".
        stored_blocks: see Runner.
    """

    num_blocks: int
    block_size: int
    max_in_flight: int
    has_states: bool
    can_draft: bool
    max_model_len: int
    vocab_size: int
    device_kind: str = "cpu"
    stored_blocks: Sequence[tuple[int, bytes]] = ()

    def describe(self) -> str:
        """For people."""
        return f"sequences of {self.max_model_len} tokens on {self.device_kind}"

    def serves_like(self, other: Ready) -> bool:
        """Whether requests let in for the others are right for these; what is kept may differ."""
        return self[1:-1] == other[1:-1]


class LineClosed(ConnectionError):
    """The other side is gone."""


class Line:
    """One end of the connection between the head and a rank; whole messages of plain values.

    One thread may send and one receive. Both raise LineClosed.

    Args:
        is_awake: a wait for a message begins awake, see AwakeReader.
    """

    def __init__(self, connection: socket.socket, *, is_awake: bool = False) -> None:
        self.connection = connection
        self._unread = bytearray()
        self._read = AwakeReader(connection).read if is_awake else connection.recv

    def send(self, message: Any) -> None:
        """Hand over a message, in one write."""
        data = marshal.dumps(message)
        try:
            self.connection.sendall(LENGTH.pack(len(data)) + data)
        except OSError as error:
            raise LineClosed from error

    def receive(self) -> Any:
        """Wait for the next message."""
        self._read_until(LENGTH.size)
        end = LENGTH.size + LENGTH.unpack_from(self._unread)[0]
        self._read_until(end)
        message = marshal.loads(memoryview(self._unread)[LENGTH.size : end].tobytes())
        del self._unread[:end]
        return message

    def _read_until(self, num_bytes: int) -> None:
        while len(self._unread) < num_bytes:
            try:
                part = self._read(READ_BYTES)
            except OSError as error:
                raise LineClosed from error
            if not part:
                raise LineClosed
            self._unread += part


class SampleWriter:
    """Writes sampling inputs; what the ranks know of a request already is not sent again."""

    def __init__(self) -> None:
        self._num_sent: dict[str, int] = {}  # tokens of each request that is known there
        self._released: list[str] = []

    def pack(self, samples: Sequence[SampleInput]) -> list[tuple[Any, ...] | None]:
        """The samples of a step; None for a plain one."""
        return [None if sample.is_plain else self._pack(sample) for sample in samples]

    def take_released(self) -> list[str]:
        """Requests to forget, before this step's samples."""
        released, self._released = self._released, []
        return released

    def release(self, request_id: str) -> None:
        """Forget a request."""
        if self._num_sent.pop(request_id, None) is not None:
            self._released.append(request_id)

    def _pack(self, sample: SampleInput) -> tuple[Any, ...]:
        num_sent = self._num_sent.get(sample.request_id)
        params = _pack_params(sample.params) if num_sent is None else None
        tokens: list[int] = []
        if sample.params.has_penalties:
            tokens = list(sample.token_ids[num_sent or 0 :])
        self._num_sent[sample.request_id] = (num_sent or 0) + len(tokens)
        return (
            *(sample.request_id, sample.uniform, sample.num_prompt_tokens, sample.banned),
            *(sample.allowed, tokens, sample.drafts, params),
        )


class SampleReader:
    """Reads what a `SampleWriter` has written, all of it and in order."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[SamplingParams, list[int]]] = {}

    def unpack(self, samples: Sequence[tuple[Any, ...] | None]) -> list[SampleInput]:
        """The samples of a step."""
        return [PLAIN_SAMPLE if sample is None else self._unpack(*sample) for sample in samples]

    def release(self, request_id: str) -> None:
        """Forget a request."""
        del self._known[request_id]

    def _unpack(
        self,
        request_id: str,
        uniform: float,
        num_prompt_tokens: int,
        banned: tuple[int, ...],
        allowed: bytes | None,
        tokens: list[int],
        drafts: tuple[int, ...],
        params: dict[str, Any] | None,
    ) -> SampleInput:
        if params is not None:
            self._known[request_id] = (SamplingParams(**params), [])
        known, token_ids = self._known[request_id]
        token_ids += tokens
        return SampleInput(
            known, uniform, request_id, token_ids, num_prompt_tokens, banned, allowed, drafts
        )


def _pack_params(params: SamplingParams) -> dict[str, Any]:
    """What is not as by default. A structured output comes as masks, step by
    step; pooling with the rows to pool."""
    packed = {}
    for one in fields(params):
        value = getattr(params, one.name)
        default = {} if one.default is MISSING else one.default
        if one.name not in ("structured_output", "pooling") and value != default:
            packed[one.name] = value
    return packed


def pack_scores(scores: Sequence[ScoreInput]) -> list[tuple[list[int], int]]:
    """Prompt rows to score, as plain values."""
    return [(score.target_ids, score.num_top) for score in scores]


def pack_pools(pools: Sequence[PoolInput]) -> list[tuple[Any, ...]]:
    """Prompt rows to pool, as plain values."""
    return [
        (
            *(one.request_id, astuple(one.pooling), one.num_rows, one.num_tokens),
            *(one.is_first, one.is_last),
        )
        for one in pools
    ]


def unpack_pools(packed: Sequence[tuple[Any, ...]]) -> list[PoolInput]:
    """Inverse of `pack_pools`."""
    return [PoolInput(name, Pooling(*pooling), *rest) for name, pooling, *rest in packed]


def pack_result(result: StepResult) -> tuple[Any, ...]:
    """What came of a step, as plain values."""
    logprobs = [None if one is None else _pack_logprobs(one) for one in result.logprobs]
    scores = [_pack_logprobs(one) for one in result.scores]
    return result.token_ids, logprobs, scores, list(result.pooled)


def unpack_result(packed: tuple[Any, ...]) -> StepResult:
    """Inverse of `pack_result`."""
    token_ids, logprobs, scores, pooled = packed
    return StepResult(
        token_ids,
        [None if one is None else _unpack_logprobs(one) for one in logprobs],
        [_unpack_logprobs(one) for one in scores],
        pooled,
    )


def _pack_logprobs(logprobs: Sequence[TokenLogprobs]) -> list[tuple[Any, ...]]:
    return [(one.token_id, one.logprob, one.top) for one in logprobs]


def _unpack_logprobs(packed: Sequence[tuple[Any, ...]]) -> list[TokenLogprobs]:
    return [TokenLogprobs(*one) for one in packed]
