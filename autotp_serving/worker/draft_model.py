"""A smaller model that guesses what the model will say: loaded, run, asked for drafts. Every rank.

It is sharded as the model is, since loader, passes and the all-reduce are there already and each
rank then holds and multiplies its share; on rank 0 alone it would have one core while the others
wait. Its cache has the same blocks: what a sequence's table says holds for both, so nothing more
has to be sent, freed or preempted. Blocks that it did not write hold nonsense for it, which costs
guesses and no text.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from autotp_serving.batch import INVALID_TOKEN, Batch, DraftInput, SampleInput
from autotp_serving.config import ConfigError, ServingConfig
from autotp_serving.devices import Device
from autotp_serving.distributed.launch import RankGroup
from autotp_serving.low_bit.selection import LowBitSelection
from autotp_serving.memory.draft_plan import check_draft_length, name_draft_model
from autotp_serving.memory.probe import probe_model
from autotp_serving.model.families import PROVED, check_heads
from autotp_serving.model.forward import Forward
from autotp_serving.model.kv_cache import KVCache, KVCacheShape
from autotp_serving.model.lengths import fix_rotary
from autotp_serving.model.loader import load_model, read_model_config
from autotp_serving.model.state_layers import list_state_layers
from autotp_serving.request import SamplingParams
from autotp_serving.worker.backend import Backend, PassSetup
from autotp_serving.worker.sampler import Sampler
from autotp_serving.worker.step_logits import LogitsGatherer, StepLogits

DRAFT_PREFIX = array("i", (-3,)).tobytes()
"""Before a batch that the other ranks are to run on the draft model; see CONTROL_PREFIX."""


@dataclass(frozen=True)
class LoadedDraftModel:
    """This rank's shard of the draft model, and what a block of its cache holds."""

    model: nn.Module
    shape: KVCacheShape

    def open(self, num_blocks: int, backend: Backend, setup: PassSetup) -> DraftModel:
        """Give it a cache; all ranks must do so together."""
        device = setup.state.block_tables.device
        cache = KVCache(self.shape, num_blocks, device, backend.cache(self.shape))
        head = self.model.get_output_embeddings()
        gatherer = LogitsGatherer(head, by_candidates=self.model.config.model_type in PROVED)
        forward = backend.layer(self.model, cache, setup)
        return DraftModel(forward, gatherer, setup, head.vocab_size)


def load_draft_model(
    config: ServingConfig,
    group: RankGroup,
    device: Device,
    all_reduce: Callable[[torch.Tensor], torch.Tensor],
    max_model_len: int,
    check: Callable[[nn.Module, Any, LowBitSelection], None],
) -> LoadedDraftModel:
    """Load this rank's part of --draft-model; all ranks must call it.

    Args:
        check: see load_model.

    Raises:
        ConfigError: in one line that names the flag.
    """
    own = config.of_draft(max_model_len)
    with name_draft_model(own):
        model_config = read_model_config(own)
        check_heads(model_config, group.size)
        check_draft_length(model_config, max_model_len)
        model = load_model(own, model_config, group, device.torch_device, all_reduce, check)
        if list_state_layers(model):
            raise ConfigError("its layers keep states, from which refused guesses cannot be taken")
        fix_rotary(model, max_model_len)
        shape, _ = probe_model(model, own, device, max_model_len)
    return LoadedDraftModel(model, shape)


class DraftModel:
    """Runs the draft model's part of this rank.

    Args:
        setup: whose state has the block tables; the model's own steps keep it up to date.
        vocab_size: tokens that it has rows for.
    """

    def __init__(
        self, forward: Forward, gatherer: LogitsGatherer, setup: PassSetup, vocab_size: int
    ) -> None:
        self._forward = forward
        self._gatherer = gatherer
        self._state = setup.state
        self._vocab_size = vocab_size

    @torch.inference_mode()
    def run(self, batch: Batch) -> StepLogits:
        """Run a batch; all ranks must do so together. Means nothing on ranks other than 0."""
        inputs = self._state.apply(batch)
        # The model may have rows for tokens that this one has none for.
        inputs.token_ids = inputs.token_ids.clamp(max=self._vocab_size - 1)
        return self._gatherer(self._forward(inputs), batch)


def propose_drafts(
    run: Callable[[Batch], StepLogits],
    sampler: Sampler,
    batch: Batch,
    drafts: Sequence[DraftInput],
    vocab_size: int,
) -> list[list[int]]:
    """Guess token after token, of all sequences side by side. Rank 0 only.

    Args:
        run: runs a batch on all ranks.
        vocab_size: of the model; guesses that it has no row for end their sequence's.

    Returns:
        See `Runner.draft`.
    """
    rows = [batch.rows[index] for index in batch.sampled]
    ends = [batch.starts[index] + batch.query_lens[index] for index in batch.sampled]
    found: list[list[int]] = [[] for _ in drafts]
    active = list(range(len(drafts)))
    batch.num_top = find_num_top(drafts)
    logits = run(batch)
    num_found = 0
    while active:
        samples = [make_sample(drafts[number], num_found) for number in active]
        token_ids = sampler.sample(logits, samples).wait().token_ids
        for number, (token,) in zip(active, token_ids, strict=True):
            if token != INVALID_TOKEN and token < vocab_size:
                found[number].append(token)
        num_found += 1
        active = [
            number
            for number in active
            if num_found == len(found[number]) < len(drafts[number].uniforms)
        ]
        if active:
            ones = [1] * len(active)
            logits = run(
                Batch(
                    [rows[number] for number in active],
                    [ends[number] + num_found - 1 for number in active],
                    ones,
                    ones,
                    [found[number][-1] for number in active],
                    sampled=list(range(len(active))),
                    num_top=find_num_top([drafts[number] for number in active]),
                )
            )
    return found


def find_num_top(drafts: Sequence[DraftInput]) -> list[int]:
    """See Batch: a draw may need all logits."""
    num_top = [1 if one.temperature == 0.0 else 0 for one in drafts]
    return num_top if 0 in num_top else []


def make_sample(draft: DraftInput, number: int) -> SampleInput:
    """What the sampler needs for one guess."""
    params = SamplingParams(
        temperature=draft.temperature, top_k=draft.top_k, top_p=draft.top_p, min_p=draft.min_p
    )
    return SampleInput(params, draft.uniforms[number])
