"""A first pass over the loaded model: what its cache must hold, what a step takes. Every rank."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import nn

from autotp_serving.batch import MAX_SCORED_ROWS
from autotp_serving.config import ServingConfig
from autotp_serving.devices import Device
from autotp_serving.kernels.kv_pools import Pools
from autotp_serving.kernels.reference.attention import ReferenceCache
from autotp_serving.kernels.reference.recurrence import ReferenceRecurrence
from autotp_serving.model.families import PROVED, check_attention, refuse_by_name
from autotp_serving.model.forward import PlainForward
from autotp_serving.model.kv_cache import CacheKernels, KVCacheShape
from autotp_serving.model.self_check import NUM_SEQUENCES, check_unproved
from autotp_serving.model.shapes import find_kv_sources
from autotp_serving.model.state_layers import allocate_states
from autotp_serving.model.step_inputs import StepInputs

CPU_PROBE_TOKENS = 16


@dataclass
class CacheProbe:
    """Stands in for the KV cache in a first forward pass and notes what each layer would store."""

    device: torch.device
    block_size: int
    head_shapes: dict[int, tuple[int, int, int]]
    is_int8: bool = False
    kernels: CacheKernels = field(default_factory=ReferenceCache)

    def write(
        self, layer: int, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> Pools:
        """Note the shapes; a prefill without earlier context reads nothing back."""
        self.head_shapes[layer] = (key.shape[1], key.shape[2], value.shape[2])
        return Pools(key, value)


def probe_model(
    model: nn.Module, config: ServingConfig, device: Device, max_model_len: int
) -> tuple[KVCacheShape, int | None]:
    """Run the heaviest step once, to learn what the cache must hold and what a step needs.

    A CPU's step is short, as its time counts, and tells nothing of a heavy one's activations.

    Returns:
        The cache's shape on this rank, and the peak bytes of activations; None on CPU.
    """
    probe = CacheProbe(device.torch_device, config.block_size, {})
    num_tokens = CPU_PROBE_TOKENS if device.is_host else config.max_num_batched_tokens
    lens = [min(max_model_len, num_tokens)] * max(1, num_tokens // max_model_len)
    inputs = StepInputs.of_prompts([[0] * length for length in lens], device.torch_device)
    inputs = replace(inputs, logit_rows=inputs.logit_rows[: config.max_num_seqs + MAX_SCORED_ROWS])
    allocate_states(
        model, max(NUM_SEQUENCES, len(lens)), device.torch_device, ReferenceRecurrence()
    )
    device.reset_peak_memory()
    before = device.peak_memory()
    with refuse_by_name(model.config), torch.inference_mode():
        PlainForward(model, probe)(inputs)
    device.synchronize()
    peak = None if device.is_host else max(0, device.peak_memory() - before)
    device.reset_peak_memory()
    check_attention(model, set(probe.head_shapes), config.block_size)
    if model.config.model_type not in PROVED:
        with refuse_by_name(model.config):
            check_unproved(model, device.torch_device)
    sources = tuple(find_kv_sources(model.config.get_text_config()))
    num_layers = max(probe.head_shapes) + 1
    is_sparse = num_layers > len(sources)
    sources += tuple(range(len(sources), num_layers))  # of indexers
    none = (0, *next(iter(probe.head_shapes.values()))[1:])
    found = [probe.head_shapes.get(layer, none) for layer in range(num_layers)]
    head_shapes = tuple(
        (heads if sources[layer] == layer else 0, *dims)
        for layer, (heads, *dims) in enumerate(found)
    )
    is_int8 = config.kv_cache_dtype == "int8"
    block_size = config.block_size
    shape = KVCacheShape(head_shapes, block_size, model.dtype, is_int8, sources, is_sparse)
    return shape, peak
