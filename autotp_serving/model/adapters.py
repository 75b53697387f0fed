"""The LoRA adapters that this rank holds, and the pass that runs with them. Every rank.

Rank 0 reads an adapter's folder, checks it against the model and hands its file to the other ranks,
so that all have the same and no other needs the folder.
"""

from __future__ import annotations

import marshal
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from autotp_serving.batch import Batch
from autotp_serving.config import ConfigError, ServingConfig
from autotp_serving.layers.adapters import AdapterStep, LinearAdapters
from autotp_serving.layers.dense_linear import DenseLinear
from autotp_serving.layers.low_bit_linear import LowBitLinear
from autotp_serving.layers.unfuse import Experts, FusedOutput
from autotp_serving.low_bit.selection import is_linear
from autotp_serving.model.adapter_folder import TENSOR_NAME, AdapterFolder, read_adapter_folder
from autotp_serving.model.families import PROVED
from autotp_serving.model.forward import Forward, PlainForward
from autotp_serving.model.fused_layers import FusedForward
from autotp_serving.model.shards import Shard
from autotp_serving.model.step_inputs import StepInputs
from autotp_serving.request import AdapterError

CONTROL_PREFIX = array("i", (-2,)).tobytes()
"""Before a message to the other ranks about adapters: a batch begins with a number above -1, and a
transfer of KV blocks with -1."""

FLOAT_BYTES = 4


class Sink(Protocol):
    """Takes in one linear layer's part of adapters. See LinearAdapters."""

    def put(self, slot: int, down: Tensor, up: Tensor, scale: float) -> None:
        """Of the slot, from 1; down [rank, in_features], up [out_features, rank]."""
        ...

    def drop(self, slot: int) -> None:
        """Nothing where there are none."""
        ...


class AdapterSlots:
    """Slots that adapters are loaded into, from 1 to --max-loras.

    Args:
        shards: of the model's tensors, by name.
        device: where adapters go.

    Raises:
        ConfigError: this model is served without adapters.
    """

    def __init__(
        self,
        model: nn.Module,
        shards: Mapping[str, Shard],
        config: ServingConfig,
        device: torch.device,
    ) -> None:
        family = model.config.model_type
        if family not in PROVED or config.pools or config.low_bit_provider == "ipex-llm":
            raise ConfigError(
                "--enable-lora is for models that generate, of the families "
                f"{', '.join(PROVED)}, without --low-bit-provider ipex-llm: leave it out"
            )
        self.step = AdapterStep()
        self.num_slots, self._max_rank = config.max_loras, config.max_lora_rank
        self._device = device
        self._linears = _list_linears(model, shards)
        self._parts = _list_parts(model)
        self._shards = {name: shards[f"{name}.weight"] for name in self._linears}
        self._sinks: dict[str, Sink] = {
            name: LinearAdapters(linear, self.step) for name, linear in self._linears.items()
        }

    @property
    def num_bytes(self) -> int:
        """Most memory that adapters take here."""
        numbers = sum(
            stop - start for shard in self._shards.values() for start, stop in shard.ranges
        )
        return self.num_slots * self._max_rank * numbers * FLOAT_BYTES

    def use(self, forward: Forward, plain: PlainForward) -> Forward:
        """The pass that runs with adapters too."""
        takes_adapters = isinstance(forward, FusedForward | PlainForward)
        if isinstance(forward, FusedForward):
            names = {linear: name for name, linear in self._linears.items()}
            sinks = forward.take_adapters(self.step, self.num_slots, self._max_rank)
            self._sinks |= {names[linear]: sink for linear, sink in sinks.items()}
        return AdapterForward(forward, None if takes_adapters else plain, self.step)

    def read(self, slot: int, path: str) -> bytes:
        """On rank 0: an adapter's folder, as the message that makes every rank install it.

        Raises:
            AdapterError: it is not served, or not for this model; nothing has changed.
        """
        folder = read_adapter_folder(Path(path), self._max_rank)
        self._check(folder)
        try:
            data = folder.weights.read_bytes()
            tensors = _parse(data)
        except Exception as error:  # the file has changed since its header was read
            raise AdapterError(f"{folder.weights} cannot be read ({error})"[:300]) from error
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if found != {_tensor_name(*key): one.shape for key, one in folder.tensors.items()}:
            raise AdapterError(f"{folder.weights} has changed while it was read")
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            raise AdapterError(f"{folder.weights} holds numbers that are NaN or infinite")
        return CONTROL_PREFIX + marshal.dumps((slot, folder.scale, data))

    def obey(self, message: bytes) -> None:
        """Install what `read` gave, or drop what `drop_message` names."""
        slot, scale, data = marshal.loads(message[len(CONTROL_PREFIX) :])
        for sink in self._sinks.values():
            sink.drop(slot)
        if data is None:
            return
        tensors = _parse(data)
        for name in {name.rpartition(".")[0] for name in tensors}:
            down, up = tensors[f"{name}.A"], tensors[f"{name}.B"]
            for part, rows in self._find_parts(name).items():
                ranges = self._shards[part].ranges
                (row_start, row_stop), (col_start, col_stop) = ranges
                own = up[rows.start + row_start : rows.start + row_stop]
                self._sinks[part].put(
                    slot,
                    down[:, col_start:col_stop].to(self._device),
                    own.to(self._device),
                    scale,
                )

    def _check(self, folder: AdapterFolder) -> None:
        """Refuse an adapter whose tensors are not for layers of this model."""
        for (name, matrix), tensor in folder.tensors.items():
            parts = self._find_parts(name)
            if not parts:
                raise AdapterError(
                    f"{folder.weights}: {name[:200]} is no linear layer of this model that takes "
                    "adapters (experts, embeddings and the output head do not)"
                )
            num_cols = self._shards[next(iter(parts))].full_shape[1]
            expected = num_cols if matrix == "A" else sum(map(len, parts.values()))
            found = tensor.shape[1 if matrix == "A" else 0]
            if found != expected:
                raise AdapterError(
                    f"{folder.weights}: lora_{matrix} of {name[:200]} is for {found} numbers, and "
                    f"this model's layer has {expected}: it was trained on another model"
                )

    def _find_parts(self, name: str) -> dict[str, range]:
        """The linear layers that a module's name stands for, each with its rows of B."""
        if name in self._linears:
            return {name: range(self._shards[name].full_shape[0])}
        return self._parts.get(name, {})


class AdapterForward:
    """A pass whose sequences may have adapters; without any it is the given pass.

    Args:
        forward: of sequences without.
        plain: of those with, one after the other in the same step; None where `forward` takes both.
    """

    def __init__(self, forward: Forward, plain: Forward | None, step: AdapterStep) -> None:
        self._forward, self._plain, self._step = forward, plain, step
        self.can_draft = forward.can_draft

    def find_padded_size(self, batch: Batch) -> int:
        """See Forward: steps with adapters have no graphs."""
        return 0 if batch.adapters else self._forward.find_padded_size(batch)

    def __call__(self, inputs: StepInputs) -> Tensor:
        """See Forward."""
        if not inputs.adapters:
            return self._forward(inputs)
        if self._plain is None:
            return self._run(self._forward, inputs)
        of_base = [index for index, slot in enumerate(inputs.adapters) if not slot]
        if not of_base:
            return self._run(self._plain, inputs)
        others = [index for index, slot in enumerate(inputs.adapters) if slot]
        logits = None
        for forward, indices in ((self._forward, of_base), (self._plain, others)):
            part, places = select_sequences(inputs, indices)
            found = self._run(forward, part)
            if logits is None:
                logits = found.new_empty(len(inputs.logit_rows), *found.shape[1:])
            logits[places] = found
        return logits

    def _run(self, forward: Forward, inputs: StepInputs) -> Tensor:
        self._step.begin(inputs.adapters, inputs.host_query_lens)
        try:
            return forward(inputs)
        finally:
            self._step.end()


def select_sequences(inputs: StepInputs, indices: Sequence[int]) -> tuple[StepInputs, Tensor]:
    """A step of some of a step's sequences.

    Args:
        inputs: without padding.
        indices: of the sequences, ascending.

    Returns:
        Their step, and which of the whole step's `logit_rows` its own are.
    """
    device = inputs.token_ids.device
    starts = list(accumulate(inputs.host_query_lens, initial=0))
    lens = [inputs.host_query_lens[index] for index in indices]
    tokens = torch.tensor([row for i in indices for row in range(starts[i], starts[i + 1])])
    place_of = torch.full((inputs.num_tokens,), -1)
    place_of[tokens] = torch.arange(len(tokens))
    new_rows = place_of[inputs.logit_rows.cpu()]
    places = (new_rows >= 0).nonzero()[:, 0]
    chosen = torch.tensor(indices, device=device)
    tokens = tokens.to(device)
    part = replace(
        inputs,
        token_ids=inputs.token_ids[tokens],
        positions=inputs.positions[tokens],
        slots=inputs.slots[tokens],
        rows=inputs.rows[chosen],
        query_starts=torch.tensor(
            list(accumulate(lens, initial=0)), dtype=torch.int32, device=device
        ),
        context_lens=inputs.context_lens[chosen],
        logit_rows=new_rows[places].to(device),
        host_query_lens=lens,
        host_context_lens=[inputs.host_context_lens[index] for index in indices],
        num_seqs=len(lens),
        num_tokens=len(tokens),
        adapters=[inputs.adapters[index] for index in indices],
    )
    return part, places.to(device)


def drop_message(slot: int) -> bytes:
    """What makes every rank forget the adapter in a slot."""
    return CONTROL_PREFIX + marshal.dumps((slot, 0.0, None))


def _list_linears(model: nn.Module, shards: Mapping[str, Shard]) -> dict[str, nn.Module]:
    """The linear layers that see every token of a step once, by name; neither head nor experts."""
    head = model.get_output_embeddings()
    apart = {id(child) for one in model.modules() if isinstance(one, Experts)
             for child in one.modules()}  # fmt: skip
    apart |= {id(child) for child in head.modules()}
    return {
        name: module
        for name, module in model.named_modules()
        if (isinstance(module, DenseLinear | LowBitLinear) or is_linear(module))
        and id(module) not in apart
        and f"{name}.weight" in shards
    }


def _list_parts(model: nn.Module) -> dict[str, dict[str, range]]:
    """Of layers that were taken apart, the parts and the rows of each in the whole, by name."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, FusedOutput):
            stops = list(accumulate(module.sizes.values()))
            parent = name.rpartition(".")[0]
            found[name] = {
                f"{parent}.{part}": range(stop - size, stop)
                for (part, size), stop in zip(module.sizes.items(), stops, strict=True)
            }
    return found


def _parse(data: bytes) -> dict[str, Tensor]:
    """Matrices by module name and "A" or "B"."""
    from safetensors.torch import load

    found = {}
    for key, tensor in load(data).items():
        match = TENSOR_NAME.fullmatch(key)
        assert match is not None
        found[_tensor_name(match[1], match[2])] = tensor
    return found


def _tensor_name(module: str, matrix: str) -> str:
    return f"{module}.{matrix}"
