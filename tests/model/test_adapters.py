"""LoRA adapters: what folders may hold, the fused pass beside torch, steps in two parts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from autotp_serving import LLM, SamplingParams
from autotp_serving.block_transfer import BlockTransfer
from autotp_serving.config import ServingConfig
from autotp_serving.distributed.launch import LocalRankGroup
from autotp_serving.model.adapter_folder import read_adapter_folder
from autotp_serving.model.adapters import (
    CONTROL_PREFIX,
    AdapterForward,
    AdapterSlots,
    drop_message,
)
from autotp_serving.model.forward import PlainForward
from autotp_serving.model.fused_layers import fuse
from autotp_serving.model.loader import load_model, read_model_config
from autotp_serving.request import AdapterError, RequestError
from tests.compiler import needs_compiler
from tests.model.adapters import ALL, merge_adapter, save_adapter
from tests.model.families import generate_with_transformers, save_family
from tests.model.test_fused_layers import CPU, STEPS, find_error, load, make_step

SLOTS = ([1, 2], [0, 2], [2, 1], [1, 0])
"""Of the sequences in each of STEPS."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model and two adapters."""
    root = tmp_path_factory.mktemp("adapters")
    model = save_family("llama", root / "model")
    return {
        "model": model,
        "one": save_adapter(model, root / "one", ALL, 8),
        "two": save_adapter(model, root / "two", ("q_proj", "down_proj"), 5, use_rslora=True),
    }


def load_with_adapters(
    folders: dict[str, Path], low_bit: str, dtype: str
) -> tuple[torch.nn.Module, AdapterSlots]:
    config = ServingConfig(
        model_path=str(folders["model"]), low_bit=low_bit, dtype=dtype, enable_lora=True
    )
    shards: dict = {}
    model = load_model(
        config, read_model_config(config), LocalRankGroup(), CPU, lambda x: x,
        keep_shards=shards.update,
    )  # fmt: skip
    return model, AdapterSlots(model, shards, config, CPU)


@torch.inference_mode()
def run(forward: AdapterForward) -> list[torch.Tensor]:
    found = []
    for parts, slots in zip(STEPS, SLOTS, strict=True):
        inputs = make_step(parts)
        inputs.adapters = slots[: len(parts)]
        found.append(forward(inputs).double())
    return found


@needs_compiler
@pytest.mark.parametrize("low_bit", ["bf16", "sym_int4"])
def test_the_fused_pass_is_as_near_to_float32_as_plain_torch(
    folders: dict[str, Path], low_bit: str
) -> None:
    logits = {}
    for kind, dtype in (("fused", "bfloat16"), ("plain", "bfloat16"), ("exact", "float32")):
        model, slots = load_with_adapters(folders, low_bit, dtype)
        _, cache = load(folders["model"], low_bit, dtype)
        forward = fuse(model, cache) if kind == "fused" else PlainForward(model, cache)
        forward = slots.use(forward, PlainForward(model, cache))
        bare = run(forward)[0] if kind == "fused" else None
        for slot, name in ((1, "one"), (2, "two")):
            slots.obey(slots.read(slot, str(folders[name])))
        logits[kind] = run(forward)
        if kind == "fused":
            # Operation by operation it is the same, to the last bit; without adapters as before.
            layers, forward._forward._native_layers = forward._forward._native_layers, None
            assert all(map(torch.equal, run(forward), logits[kind]))
            forward._forward._native_layers = layers
            assert not torch.equal(bare, logits[kind][0])
            for slot in (1, 2):
                slots.obey(slots.read(slot, str(folders["one"])))
                slots.obey(drop_message(slot))
            assert torch.equal(run(forward)[0], bare)
    for ours, theirs, exact in zip(*logits.values(), strict=True):
        assert find_error(ours, exact) < 1.3 * find_error(theirs, exact) < 0.4


def test_a_pass_without_adapters_runs_base_rows_and_leaves_the_others_to_torch(
    folders: dict[str, Path],
) -> None:
    model, slots = load_with_adapters(folders, "bf16", "float32")
    _, cache = load(folders["model"], "bf16", "float32")
    plain = PlainForward(model, cache)
    slots.obey(slots.read(1, str(folders["one"])))
    slots.obey(slots.read(2, str(folders["two"])))
    whole = run(slots.use(plain, plain))
    seen = []

    class Quick(PlainForward):
        def __call__(self, inputs):
            seen.append(list(inputs.adapters))
            return super().__call__(inputs)

    split = run(AdapterForward(Quick(model, cache), plain, slots.step))
    for ours, theirs in zip(split, whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert seen == [[0], [0]], "rows without adapters alone"


@needs_compiler
def test_text_does_not_depend_on_neighbours_and_drafts(folders: dict[str, Path]) -> None:
    prompts = [list(range(20, 60)), [7] * 50, [30, 31, 32] * 9, list(range(99, 130))]
    names = ["one", None, "two", "one"]
    params = SamplingParams(max_tokens=24, ignore_eos=True)
    modules = [f"{name}={folders[name]}" for name in ("one", "two")]
    with LLM(
        str(folders["model"]), low_bit="sym_int8", lora_modules=tuple(modules),
        max_num_batched_tokens=48, kv_cache_memory=2**24, speculative_tokens=4,
    ) as llm:  # fmt: skip
        alone = [
            llm.generate([prompt], params, adapter=name, show_progress=False)[0].token_ids
            for prompt, name in zip(prompts, names, strict=True)
        ]
        together = llm.generate(prompts, params, adapter=names, show_progress=False)
        assert [one.token_ids for one in together] == alone
        base = llm.generate(prompts, params, show_progress=False)
        assert sum(a.token_ids == b.token_ids for a, b in zip(base, together, strict=True)) == 1


@pytest.mark.parametrize("name", ["one", "two"])
def test_tokens_equal_the_merged_models(
    folders: dict[str, Path], tmp_path: Path, name: str
) -> None:
    prompts = [list(range(20, 60)), [7] * 50]
    expected = generate_with_transformers(
        merge_adapter(folders["model"], folders[name], tmp_path), prompts, 12
    )
    with LLM(
        str(folders["model"]), low_bit="bf16", dtype="float32", enable_lora=True,
        kv_cache_memory=2**24,
    ) as llm:  # fmt: skip
        llm.load_adapter("mine", str(folders[name]))
        params = SamplingParams(max_tokens=12, ignore_eos=True)
        found = llm.generate(prompts, params, adapter="mine", show_progress=False)
        assert [one.token_ids for one in found] == expected
        llm.unload_adapter("mine")
        with pytest.raises(RequestError, match="no adapter"):
            llm.generate(prompts, params, adapter="mine", show_progress=False)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias 'all'"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"brand_new": True}, "brand_new"),
        ({"peft_type": "IA3"}, "peft_type"),
        ({"task_type": "SEQ_CLS"}, "task_type"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"init_lora_weights": ["pissa"]}, "init_lora_weights"),
        ({"r": 64}, "--max-lora-rank"),
        ({"r": True}, "whole number"),
        ({"r": 5}, "says 5"),
        ({"lora_alpha": float("inf")}, "lora_alpha"),
        ({"lora_alpha": None}, "lora_alpha"),
    ],
)
def test_settings_that_are_not_served_are_refused_by_name(
    folders: dict[str, Path], tmp_path: Path, settings: dict, reason: str
) -> None:
    folder = copy(folders["one"], tmp_path, settings)
    with pytest.raises(AdapterError, match=reason):
        read_adapter_folder(folder, 16)


def copy(source: Path, folder: Path, settings: dict, tensors: dict | None = None) -> Path:
    config = json.loads((source / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | settings))
    own = load_file(source / "adapter_model.safetensors") | (tensors or {})
    save_file(own, folder / "adapter_model.safetensors")
    return folder


PREFIX = "base_model.model."


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({f"{PREFIX}lm_head.lora_A.weight": (8, 128), f"{PREFIX}lm_head.lora_B.weight": (320, 8)},
         "output head"),
        ({f"{PREFIX}model.embed_tokens.lora_embedding_A": (8, 320)}, "lora_embedding_A"),
        ({f"{PREFIX}model.layers.0.mlp.up_proj.lora_A.weight": (8, 64)}, "another model"),
        ({f"{PREFIX}model.layers.7.mlp.up_proj.lora_A.weight": (8, 128)}, "alone"),
    ],
)  # fmt: skip
def test_tensors_that_are_not_for_the_model_are_refused_by_name(
    folders: dict[str, Path], tmp_path: Path, tensors: dict, reason: str
) -> None:
    _, slots = load_with_adapters(folders, "bf16", "float32")
    made = {name: torch.zeros(shape) for name, shape in tensors.items()}
    folder = copy(folders["one"], tmp_path, {}, made)
    with pytest.raises(AdapterError, match=reason):
        slots.read(1, str(folder))


def test_folders_that_are_none_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    _, slots = load_with_adapters(folders, "bf16", "float32")
    with pytest.raises(AdapterError, match="name a folder as PEFT"):
        slots.read(1, str(tmp_path / "nowhere"))
    folder = copy(folders["one"], tmp_path, {})
    weights = folder / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-4])
    with pytest.raises(AdapterError, match="cut short"):
        slots.read(1, str(folder))
    weights.write_bytes(whole[:-4] + b"\x00\x00\xc0\x7f")
    with pytest.raises(AdapterError, match="NaN"):
        slots.read(1, str(folder))
    weights.unlink()
    weights.symlink_to(folders["one"] / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="leads out"):
        slots.read(1, str(folder))
    weights.unlink()
    (folder / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(AdapterError, match="pickled"):
        slots.read(1, str(folder))


def test_what_is_said_of_adapters_is_no_transfer_of_blocks():
    assert not BlockTransfer.is_one(drop_message(1))
    assert not BlockTransfer().to_bytes().startswith(CONTROL_PREFIX)
