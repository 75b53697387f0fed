"""Run batches on the model. `ModelRunner` on every rank, `LeadRunner` on rank 0."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence

import torch

from autotp_serving.batch import Batch, DraftInput, PoolInput, SampleInput, ScoreInput, StepResult
from autotp_serving.block_transfer import BlockTransfer
from autotp_serving.distributed.channel import StepChannel
from autotp_serving.model.adapters import CONTROL_PREFIX, AdapterSlots, drop_message
from autotp_serving.model.batch_state import BatchState
from autotp_serving.model.forward import Forward
from autotp_serving.model.kv_cache import KVCache
from autotp_serving.model.state_layers import StateLayer, copy_states
from autotp_serving.request import AdapterError
from autotp_serving.step_times import LAYOUT, RankTimes, StepTimes
from autotp_serving.worker.block_file import BlockFile
from autotp_serving.worker.draft_model import DRAFT_PREFIX, DraftModel, propose_drafts
from autotp_serving.worker.drafts import accept_drafts
from autotp_serving.worker.sampler import Sampled, Sampler
from autotp_serving.worker.step_logits import LogitsGatherer, StepLogits

STOP_MESSAGE = b""


class ModelRunner:
    """This rank's part of a step; what its steps cost is in `times`.

    Args:
        forward: the way through the model's layers.
        gatherer: makes what is sampled from of the pass's logits.
        state: what this rank keeps of the running sequences.
        broadcast: gives every rank, in place, what rank 0 has in a tensor on the device; None where
            the host knows every token before it is needed, as with one step in flight.
        state_layers: those that keep states beside the KV blocks.
        block_file: keeps blocks beyond the pool.
        all_reduce: sums a tensor over the ranks in place; where there is such a file.
        adapters: where adapters are loaded to; None where none can be.
        draft_model: what guesses tokens; None where there is none.
    """

    def __init__(
        self,
        forward: Forward,
        gatherer: LogitsGatherer,
        state: BatchState,
        times: StepTimes,
        broadcast: Callable[[torch.Tensor], None] | None = None,
        state_layers: Sequence[StateLayer] = (),
        block_file: BlockFile | None = None,
        all_reduce: Callable[[torch.Tensor], torch.Tensor] | None = None,
        adapters: AdapterSlots | None = None,
        draft_model: DraftModel | None = None,
    ) -> None:
        self.times = times
        self._forward = forward
        self._gatherer = gatherer
        self._state = state
        self._broadcast = broadcast
        self.state_layers = state_layers
        self._block_file = block_file
        self._all_reduce = all_reduce
        self.adapters = adapters
        self.draft_model = draft_model

    @torch.inference_mode()
    def run(self, batch: Batch) -> StepLogits:
        """Run one forward pass; all ranks must do so together.

        On a device of its own each draft runs as a sequence of one token, so that a step with
        drafts is one of those that there are graphs for.

        Returns:
            What rank 0 samples from; on the others it means nothing.
        """
        started = time.perf_counter()
        copy_states(self.state_layers, batch.state_copies)
        if not self._state.is_host:
            batch = batch.spread_drafts()
        inputs = self._state.apply(batch, self._forward.find_padded_size(batch))
        inputs.adapters = batch.adapters
        logits = self._gatherer(self._forward(inputs), batch)
        self.times.add_step(time.perf_counter() - started)
        return logits

    def share_tokens(self, batch: Batch, token_ids: torch.Tensor | None = None) -> None:
        """Put the tokens that rank 0 chose into every rank's state, where steps overlap.

        Args:
            token_ids: [num_samples] int64, on rank 0.
        """
        if self._broadcast is None or not batch.sampled or batch.num_drafts:
            return  # what follows drafts begins only once they are verified
        if token_ids is None:
            device = self._state.last_token_ids.device
            token_ids = torch.empty(len(batch.sampled), dtype=torch.int64, device=device)
        self._broadcast(token_ids)
        self._state.put_tokens(batch, token_ids[:, None])

    @torch.inference_mode()
    def transfer(self, transfer: BlockTransfer) -> list[int]:
        """See Runner; all ranks must do so together."""
        assert self._block_file is not None and self._all_reduce is not None
        failed = self._block_file.run(transfer)
        if not failed:
            return []
        device = self._state.block_tables.device
        counts = torch.tensor(failed, dtype=torch.float32, device=device)
        return self._all_reduce(counts).nonzero().flatten().tolist()

    def follow(self, channel: StepChannel) -> None:
        """On ranks other than 0: obey batches until rank 0 says stop."""
        while (message := channel.receive()) != STOP_MESSAGE:
            if BlockTransfer.is_one(message):
                self.transfer(BlockTransfer.from_bytes(message))
                continue
            if message.startswith(CONTROL_PREFIX):
                assert self.adapters is not None, "all ranks have the same settings"
                self.adapters.obey(message)
                continue
            if message.startswith(DRAFT_PREFIX):
                assert self.draft_model is not None, "all ranks have the same settings"
                self.draft_model.run(Batch.from_bytes(message[len(DRAFT_PREFIX) :]))
                continue
            batch = Batch.from_bytes(message)
            self.run(batch)
            self.share_tokens(batch)
            channel.report(self.times.snapshot().to_bytes())
        channel.stop_monitoring()
        self.close()

    def close(self) -> None:
        """After the last step."""
        if self._block_file is not None:
            self._block_file.close()


class LeadRunner:
    """Rank 0's runner: tells the other ranks, runs with them, samples. See `Runner`."""

    def __init__(
        self,
        runner: ModelRunner,
        cache: KVCache,
        channel: StepChannel,
        num_ranks: int,
        sampler: Sampler,
        max_in_flight: int,
        *,
        can_draft: bool,
        vocab_size: int,
        stored_blocks: Sequence[tuple[int, bytes]] = (),
    ) -> None:
        self.stored_blocks = stored_blocks
        self.rank_times = [RankTimes() for _ in range(num_ranks)]
        self._runner = runner
        self._channel = channel
        self._sampler = sampler
        self._forwarded: tuple[Batch, StepLogits] | None = None
        self._in_flight: deque[tuple[Batch, Sampled]] = deque()
        self._num_sent = 0
        self.num_blocks = cache.num_blocks
        self.block_size = cache.block_size
        self.max_in_flight = max_in_flight
        self.has_states = bool(runner.state_layers)
        self.can_draft = can_draft
        self._vocab_size = vocab_size

    def forward(self, batch: Batch) -> None:
        """See Runner.

        Raises:
            ConnectionError: naming the rank that is gone.
        """
        self._num_sent += 1
        if len(self.rank_times) > 1:
            self._channel.send(batch.to_bytes())
        try:
            self._forwarded = (batch, self._runner.run(batch))
        except RuntimeError as error:
            raise self._name_loss(error) from error

    def sample(
        self,
        samples: Sequence[SampleInput],
        scores: Sequence[ScoreInput] = (),
        pools: Sequence[PoolInput] = (),
    ) -> None:
        """See Runner; the logits are those of rank 0."""
        assert self._forwarded is not None, "nothing was forwarded"
        batch, logits = self._forwarded
        self._forwarded = None
        sampled = self._sampler.sample(logits, samples, scores, pools)
        try:
            self._runner.share_tokens(batch, sampled.token_ids)
        except RuntimeError as error:
            raise self._name_loss(error) from error
        self._in_flight.append((batch, sampled))

    def collect(self) -> StepResult:
        """See Runner."""
        batch, sampled = self._in_flight.popleft()
        result = sampled.wait()
        if batch.num_drafts:
            result = accept_drafts(batch, result)
        self.rank_times[0] = self._runner.times.snapshot()
        self._read_reports()
        return result

    def transfer(self, transfer: BlockTransfer) -> list[int]:
        """See Runner.

        Raises:
            ConnectionError: naming the rank that is gone.
        """
        if len(self.rank_times) > 1:
            self._channel.send(transfer.to_bytes())
        try:
            return self._runner.transfer(transfer)
        except RuntimeError as error:
            raise self._name_loss(error) from error

    def draft(self, batch: Batch, drafts: Sequence[DraftInput]) -> list[list[int]]:
        """See Runner.

        Raises:
            ConnectionError: naming the rank that is gone.
        """
        model = self._runner.draft_model
        assert model is not None, "there is no draft model"

        def run(batch: Batch) -> StepLogits:
            if len(self.rank_times) > 1:
                self._channel.send(DRAFT_PREFIX + batch.to_bytes())
            return model.run(batch)

        try:
            return propose_drafts(run, self._sampler, batch, drafts, self._vocab_size)
        except RuntimeError as error:
            raise self._name_loss(error) from error

    def load_adapter(self, slot: int, path: str) -> None:
        """See Runner; this rank alone reads the folder."""
        if self._runner.adapters is None:
            raise AdapterError("this server takes no adapters: start it with --enable-lora")
        self._have_obeyed(self._runner.adapters.read(slot, path))

    def drop_adapter(self, slot: int) -> None:
        """See Runner."""
        self._have_obeyed(drop_message(slot))

    def _have_obeyed(self, message: bytes) -> None:
        assert self._runner.adapters is not None, "nothing was loaded"
        if len(self.rank_times) > 1:
            self._channel.send(message)
        self._runner.adapters.obey(message)

    def find_late_ranks(self) -> str:
        """Who has not done the step under way, in words; for any thread, while it lasts."""
        try:
            self._read_reports()
        except ConnectionError as error:
            return str(error)
        late = [
            self._channel.name(rank)
            for rank, times in enumerate(self.rank_times)
            if rank and times.num_steps < self._num_sent
        ]
        # While others are late rank 0 may be waiting for them.
        if len(late) > 1:
            return f"{' and '.join(late)} have not reported; they or their neighbours hang"
        return f"{late[0] if late else self._channel.name(0)} has not reported, it hangs"

    def _read_reports(self) -> None:
        for rank, report in self._channel.take_reports(LAYOUT.size).items():
            self.rank_times[rank] = RankTimes.from_bytes(report)

    def release(self, request_id: str) -> None:
        """See Runner; the other ranks keep nothing but blocks."""
        self._sampler.release(request_id)

    def stop(self) -> None:
        """Let the other ranks go."""
        self._channel.stop_monitoring()
        self._channel.send(STOP_MESSAGE)
        self._runner.close()

    def _name_loss(self, error: RuntimeError) -> Exception:
        """A sum that lacks a rank names its socket at best: say which rank is gone."""
        loss = self._channel.find_loss()
        return error if loss is None else ConnectionError(loss)
