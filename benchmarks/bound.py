"""The least time that a model's work can take on given hardware. Rank 0 only.

Every weight that a step needs is read once, the embedding's looked-up rows and activations count
nothing, and every multiplication runs at the fastest rate that torch reaches there. No program can
be faster; how near one comes is the fraction quoted. Kernels of our own that multiply faster than
torch's can come out above 100 % where multiplying is what takes the time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from autotp_serving.config import ServingConfig
from autotp_serving.low_bit.formats import FORMATS
from benchmarks.hardware import Hardware

DENSE_BITS = {"bf16": 16, "fp16": 16, "fp32": 32}


@dataclass(frozen=True)
class ModelCosts:
    """What a model's work consists of, over all ranks.

    Attributes:
        body_bytes, body_numbers: weights of the layers, those of experts apart.
        expert_bytes, expert_numbers: of all experts.
        expert_share: experts that one token needs, of all.
        head_bytes, head_numbers: of the output head.
        kv_bytes: keys and values of one token.
        attention_width: query heads times head dimension, summed over the layers.
    """

    body_bytes: float
    body_numbers: float
    expert_bytes: float
    expert_numbers: float
    expert_share: float
    head_bytes: float
    head_numbers: float
    kv_bytes: float
    attention_width: int

    def step_bytes(self, num_tokens: int, num_context: int) -> float:
        """Read in a step of so many tokens, with so many tokens in the cache before it."""
        # Experts that at least one of the tokens needs, when each draws its own at random.
        needed = 1 - (1 - self.expert_share) ** num_tokens
        weights = self.body_bytes + self.expert_bytes * needed + self.head_bytes
        return weights + num_context * self.kv_bytes

    def operations(self, num_tokens: int, num_rows: int, num_pairs: int) -> float:
        """Multiplications and additions; `num_pairs` of query and key, `num_rows` of logits."""
        numbers = self.body_numbers + self.expert_numbers * self.expert_share
        linear = 2 * num_tokens * numbers + 2 * num_rows * self.head_numbers
        return linear + 4 * num_pairs * self.attention_width


@dataclass(frozen=True)
class Bound:
    """Least seconds of some work, and what limits it."""

    reading: float
    multiplying: float

    @property
    def seconds(self) -> float:
        """Reading and multiplying overlap at best."""
        return max(self.reading, self.multiplying)

    @property
    def limit(self) -> str:
        """What takes longer."""
        return "memory" if self.reading > self.multiplying else "multiplying"


class Bounds:
    """Bounds of one model on one machine."""

    def __init__(self, costs: ModelCosts, hardware: Hardware, *, low_bit: bool) -> None:
        self._costs = costs
        self._read = hardware.read_bytes
        rates = [hardware.bf16_operations, hardware.int8_operations if low_bit else None]
        self._multiply = max(rate for rate in rates if rate)

    def prefill(self, lengths: list[int]) -> Bound:
        """Prompts of these lengths in one step."""
        num_tokens = sum(lengths)
        pairs = sum(length * (length + 1) // 2 for length in lengths)
        return Bound(
            self._costs.step_bytes(num_tokens, 0) / self._read,
            self._costs.operations(num_tokens, len(lengths), pairs) / self._multiply,
        )

    def decode(self, num_sequences: int, num_context: int) -> Bound:
        """A token for each sequence, all their contexts together being so long."""
        return Bound(
            self._costs.step_bytes(num_sequences, num_context) / self._read,
            self._costs.operations(num_sequences, num_sequences, num_context) / self._multiply,
        )

    def whole_job(self, jobs: list[tuple[int, int]], max_num_seqs: int) -> Bound:
        """Any number of (prompt, output) lengths, at most so many sequences at a time."""
        prefill = [self.prefill([length]) for length, _ in jobs]
        # Full steps: each output token carries its share of one read of the weights.
        num_outputs = sum(max(0, output - 1) for _, output in jobs)
        contexts = sum((output - 1) * (length + output / 2) for length, output in jobs)
        width = max(1, min(max_num_seqs, len(jobs)))
        step = self.decode(width, 0)
        kv_seconds = contexts * self._costs.kv_bytes / self._read
        return Bound(
            num_outputs / width * step.reading + kv_seconds,
            sum(bound.multiplying for bound in prefill) + num_outputs / width * step.multiplying,
        )


def find_costs(config: ServingConfig) -> ModelCosts:
    """From config.json and the formats that the weights will have; reads no weight."""
    from autotp_serving.memory.footprint import MemorySetup
    from autotp_serving.memory.planner import find_footprints
    from autotp_serving.model.lengths import find_max_model_len
    from autotp_serving.model.loader import read_model_config

    model_config = read_model_config(config)
    max_model_len = find_max_model_len(config, model_config)
    setup = MemorySetup(config, max_model_len, on_cpu=True)
    footprint = find_footprints(setup, model_config)[0]
    text = model_config.get_text_config()
    num_experts, used = _find_experts(text)
    sizes: dict[str, list[float]] = {"body": [0, 0], "expert": [0, 0], "head": [0, 0]}
    kinds = {"head": "head", "MLP": "expert" if num_experts else "body"}
    has_head = any(kind == "head" for kind, _ in footprint.weights)
    for (kind, name), num_bytes in footprint.weights.items():
        if kind == "embedding":
            if has_head:
                continue
            place = "head"  # tied: the same matrix is the head
        else:
            place = kinds.get(kind, "body")
        bits = DENSE_BITS.get(name) or FORMATS[name].bits_per_weight
        sizes[place][0] += num_bytes
        sizes[place][1] += num_bytes * 8 / bits
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return ModelCosts(
        *sizes["body"],
        *sizes["expert"],
        used / num_experts if num_experts else 1.0,
        *sizes["head"],
        footprint.kv_bytes_per_block / config.block_size,
        text.num_attention_heads * head_dim * text.num_hidden_layers,
    )


def _find_experts(text: Any) -> tuple[int, int]:
    """Experts per layer and how many of them a token uses; 0 for a dense model."""
    for name in ("num_local_experts", "num_experts", "n_routed_experts"):
        if getattr(text, name, None):
            return getattr(text, name), text.num_experts_per_tok
    return 0, 0
