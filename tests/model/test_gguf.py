"""GGUF files as models: settings, tensors, vocabularies, and files that must be refused."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from autotp_serving.config import ConfigError, ServingConfig
from autotp_serving.distributed.launch import LocalRankGroup
from autotp_serving.engine.tokenizer import HuggingFaceTokenizer
from autotp_serving.model.gguf.checkpoint import GgufCheckpoint, decode
from autotp_serving.model.gguf.folder import convert_metadata, find_gguf
from autotp_serving.model.gguf.header import TYPES, GgufError, TensorType, read_header
from autotp_serving.model.source import resolve_model
from tests.model.families import save_family

gguf = pytest.importorskip("gguf")
from tests.model.gguf_files import read_state, write_gguf  # noqa: E402

ROOT = Path(__file__).parents[2]
TYPE_NAMES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")
K_NAMES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
K_SHAPE = {"hidden_size": 256, "num_attention_heads": 8, "intermediate_size": 512}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def resolve(path: Path, **settings: Any) -> ServingConfig:
    return resolve_model(ServingConfig(model_path=str(path), **settings), LocalRankGroup())


def test_block_sizes_are_the_packages_own() -> None:
    for number, one in TYPES.items():
        kind = gguf.GGMLQuantizationType(number)
        assert (kind.name, *gguf.GGML_QUANT_SIZES[kind]) == (one.name, one.block, one.num_bytes)


@pytest.mark.parametrize("type_name", [*TYPE_NAMES, *K_NAMES])
def test_any_slice_is_what_the_package_decodes(type_name: str, tmp_path: Path) -> None:
    """Rows and columns that no block and no head begins at, too."""
    changes = K_SHAPE if type_name in K_NAMES else {}
    decoded = read_state(
        write_gguf(
            save_family("llama", tmp_path / "model", **changes), tmp_path / "m.gguf", type_name
        )
    )
    checkpoint = GgufCheckpoint(convert_metadata([tmp_path / "m.gguf"]), torch.float32)
    assert checkpoint.names() == set(decoded)
    for name, whole in decoded.items():
        assert checkpoint.shape(name) == whole.shape
        sizes = whole.shape
        for ranges in (
            tuple((0, size) for size in sizes),
            tuple((size // 3, size - 5) for size in sizes),
            tuple((size // 2, size) for size in sizes),
        ):
            expected = whole[tuple(slice(*one) for one in ranges)]
            assert torch.equal(checkpoint.read(name, ranges), expected), (name, ranges)


def test_numbers_come_in_the_type_that_is_asked_for(tmp_path: Path) -> None:
    decoded = read_state(
        write_gguf(save_family("qwen2", tmp_path / "m"), tmp_path / "m.gguf", "Q8_0")
    )
    checkpoint = GgufCheckpoint(convert_metadata([tmp_path / "m.gguf"]), torch.bfloat16)
    name = "model.layers.1.mlp.down_proj.weight"
    found = checkpoint.read(name, ((0, 8), (0, 256)))
    assert checkpoint.itemsize(name) == 2 and torch.equal(found, decoded[name][:8].bfloat16())


@pytest.mark.parametrize("one", TYPES.values(), ids=lambda one: one.name)
def test_every_type_is_decoded_by_the_package(one: TensorType) -> None:
    rng = np.random.default_rng(1)
    data = rng.integers(0, 60, (3, 4 * one.num_bytes), dtype=np.uint8)  # no NaN among them
    expected = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[one.name])
    found = decode(data, one.name)
    assert found.shape == (3, 4 * one.block)
    assert np.array_equal(found.float().numpy(), expected.astype(np.float32))


YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "long_factor": [1.0 + number / 2 for number in range(16)],
    "short_factor": [1.0 + number / 4 for number in range(16)],
}


def test_stretched_rotary_embeddings(tmp_path: Path) -> None:
    import transformers

    def add_factors(writer: Any) -> None:
        for kind in ("long", "short"):
            factors = np.array(LONGROPE[f"{kind}_factor"], np.float32)
            writer.add_tensor(f"rope_factors_{kind}.weight", factors)

    for family, changes, change in (
        ("qwen2", {"rope_parameters": YARN}, lambda _: None),
        (
            "phi3",
            {"rope_parameters": LONGROPE, "original_max_position_embeddings": 128},
            add_factors,
        ),
    ):
        model = save_family(family, tmp_path / family, **changes)
        write_gguf(model, tmp_path / f"{family}.gguf", "F16", change=change)
        folder = resolve(tmp_path / f"{family}.gguf").model_path
        found = transformers.AutoConfig.from_pretrained(folder)
        original = transformers.AutoConfig.from_pretrained(model)
        found.rope_parameters.pop("type", None)  # the old name of rope_type, which stands there too
        assert found.rope_parameters == original.rope_parameters
        assert found.max_position_embeddings == original.max_position_embeddings
        names = GgufCheckpoint(Path(folder), torch.float32).names()
        assert not any("rope" in name for name in names)


FAMILY_NAMES = (
    *("llama", "llama-tied-bias", "llama-rope-linear", "qwen2", "qwen3", "gemma2", "phi3"),
    *("mixtral", "qwen3-moe"),
)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_settings_are_those_of_the_original(family: str, tmp_path: Path) -> None:
    import transformers

    # As llama.cpp runs every model of this family.
    changes = {"norm_topk_prob": True} if family == "qwen3-moe" else {}
    model = save_family(family, tmp_path / "model", **changes)
    write_gguf(model, tmp_path / "m.gguf", "F16")
    folder = Path(resolve(tmp_path / "m.gguf").model_path)
    found = transformers.AutoConfig.from_pretrained(folder)
    original = transformers.AutoConfig.from_pretrained(model)
    known = set(
        json.loads((Path(resolve(tmp_path / "m.gguf").model_path) / "config.json").read_text())
    )
    skipped = {"architectures", "torch_dtype", "bos_token_id", "eos_token_id", "pad_token_id"}
    skipped |= {"sliding_window"} if family == "mixtral" else set()
    # What a Gemma 2 of this size would have; the made-up one has another.
    skipped |= {"query_pre_attn_scalar"} if family == "gemma2" else set()
    for name in (known | {"rope_parameters"}) - skipped - {"rope_theta", "rope_scaling"}:
        if hasattr(original, name):
            assert getattr(found, name) == getattr(original, name), name


def test_the_demo_models_tokenizer_gives_the_same_ids(tmp_path: Path) -> None:
    write_gguf(ROOT / "demo_model", tmp_path / "m.gguf", "F16")
    folder = Path(resolve(tmp_path / "m.gguf").model_path)
    found = HuggingFaceTokenizer(folder)
    original = HuggingFaceTokenizer(ROOT / "demo_model")
    lines = (ROOT / "docs" / "api.md").read_text().splitlines()
    lines += [
        "What is AI?",
        "<|user|>hi<|end|>",
        "  two  blanks ",
        "äöü 漢字 🙂",
        "12345",
        "a\n\nb\t",
    ]
    for line in lines:
        assert found.encode(line) == original.encode(line), line
    assert found.chat_template == original.chat_template
    assert found.eos_token_ids == original.eos_token_ids
    assert found.special_token_ids == original.special_token_ids


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def head(num_tensors: int, num_entries: int, *parts: bytes) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, num_tensors, num_entries) + b"".join(parts)


def tensor(shape: tuple[int, ...], type_id: int, offset: int) -> bytes:
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text("a") + sizes + struct.pack("<IQ", type_id, offset)


ENTRY = text("general.architecture") + struct.pack("<I", 8) + text("llama")
HOSTILE = {
    "empty": b"",
    "no magic": b"GGML" + bytes(40),
    "version 1": b"GGUF" + struct.pack("<IQQ", 1, 0, 0),
    "big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "tensors without end": head(2**60, 0),
    "settings without end": head(0, 2**60),
    "a key without end": head(0, 1, struct.pack("<Q", 2**63)),
    "a text without end": head(0, 1, text("a"), struct.pack("<IQ", 8, 2**62)),
    "a list without end": head(0, 1, text("a"), struct.pack("<IIQ", 9, 0, 2**62)),
    "a list of lists": head(0, 1, text("a"), struct.pack("<IIQ", 9, 9, 1) * 1000),
    "a key twice": head(0, 2, ENTRY, ENTRY),
    "no text": head(0, 1, struct.pack("<Q", 4), b"\xff" * 40),
    "many dimensions": head(1, 0, text("a"), struct.pack("<I", 2**31)),
    "a huge tensor": head(1, 0, tensor((2**62, 2**62), 0, 0)),
    "half a block": head(1, 0, tensor((33,), 2, 0)),
    "an unknown type": head(1, 0, tensor((32,), 77, 0)),
    "behind the end": head(1, 0, tensor((32,), 0, 2**40)),
    "nothing of a model": head(0, 1, ENTRY),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(HOSTILE[name])
    with pytest.raises(ConfigError) as caught:
        resolve(path)
    assert "m.gguf" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma2", "qwen3-moe"])
def test_damaged_heads_are_refused_or_harmless(family: str, tmp_path: Path) -> None:
    """Nothing but a refusal comes of bytes that are changed at random, and it comes soon."""
    write_gguf(save_family(family, tmp_path / "model"), tmp_path / "m.gguf", "Q8_0")
    data = (tmp_path / "m.gguf").read_bytes()
    start = read_header(tmp_path / "m.gguf").num_bytes
    rng = np.random.default_rng(4)
    num_refused = 0
    for _ in range(150):
        changed = bytearray(data)
        for place in rng.integers(8, start, 3):
            changed[place] = rng.integers(0, 256)
        (tmp_path / "m.gguf").write_bytes(changed)
        try:
            folder = Path(resolve(tmp_path / "m.gguf").model_path)
            GgufCheckpoint(folder, torch.float32)
        except ConfigError as error:
            assert "\n" not in str(error)
            num_refused += 1
    assert num_refused > 50


def test_a_file_that_is_cut_anywhere_is_refused(tmp_path: Path) -> None:
    write_gguf(save_family("llama", tmp_path / "model"), tmp_path / "m.gguf", "Q8_0")
    data = (tmp_path / "m.gguf").read_bytes()
    start = read_header(tmp_path / "m.gguf").num_bytes
    for length in (*range(0, start, 997), start, len(data) // 2, len(data) - 1):
        (tmp_path / "cut.gguf").write_bytes(data[:length])
        with pytest.raises(ConfigError, match="cut short"):
            resolve(tmp_path / "cut.gguf")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda writer: writer.add_clamp_kqv(3.0), "attention.clamp_kqv = 3.0 is not known"),
        (lambda writer: writer.add_logit_scale(2.0), "logit_scale = 2.0 is not known"),
        (lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE), "longrope"),
        (
            lambda writer: writer.add_tensor("rope_freqs.weight", np.full(16, 3.0, np.float32)),
            "not those of Llama 3",
        ),
        (
            lambda writer: writer.add_tensor("blk.0.attn_sinks.weight", np.ones(4, np.float32)),
            "attn_sinks",
        ),
    ],
)
def test_what_is_not_understood_is_refused_by_name(
    change: Any, expected: str, tmp_path: Path
) -> None:
    write_gguf(save_family("llama", tmp_path / "model"), tmp_path / "m.gguf", "F16", change=change)
    with pytest.raises(ConfigError, match=expected):
        GgufCheckpoint(Path(resolve(tmp_path / "m.gguf").model_path), torch.float32)


def test_an_unknown_architecture_and_an_unknown_split(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "mamba")
    write_only_settings(writer)
    with pytest.raises(GgufError, match=r"'mamba'.*llama, qwen2, qwen3"):
        resolve(tmp_path / "a.gguf")

    def change(writer: Any) -> None:
        writer.add_key_value("tokenizer.ggml.pre", "of-tomorrow", gguf.GGUFValueType.STRING)

    model = save_family("llama", tmp_path / "model")
    write_gguf(model, tmp_path / "m.gguf", "F16", change=change)
    with pytest.raises(GgufError, match=r"'of-tomorrow', which is not known: put the original"):
        resolve(tmp_path / "m.gguf")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((model / name).read_bytes())
    assert resolve(tmp_path / "m.gguf").model_names == ("m",)


def write_only_settings(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_parts_of_a_split_file_belong_together(tmp_path: Path) -> None:
    model = save_family("llama", tmp_path / "model")
    decoded = read_state(write_gguf(model, tmp_path / "m.gguf", "Q8_0", split_max_tensors=9))
    parts = sorted(tmp_path.glob("m-*.gguf"))
    assert len(parts) == 4 and find_gguf(parts[0]) == parts == find_gguf(tmp_path)
    checkpoint = GgufCheckpoint(Path(resolve(tmp_path).model_path), torch.float32)
    assert checkpoint.names() == set(decoded)
    for name, whole in decoded.items():
        ranges = tuple((0, size) for size in whole.shape)
        assert torch.equal(checkpoint.read(name, ranges), whole)
    parts[2].rename(tmp_path / "away")
    with pytest.raises(GgufError, match=r"00003-of-00004.gguf is missing: download all 4 parts"):
        resolve(parts[0])
    (tmp_path / "away").rename(parts[2])
    (tmp_path / "other.gguf").touch()
    with pytest.raises(GgufError, match=r"several GGUF files \(m-00001-of-00004.gguf, other.gguf"):
        resolve(tmp_path)


def test_a_link_out_of_a_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "stranger"
    folder.mkdir()
    (tmp_path / "secret.gguf").write_bytes(b"GGUF")
    (folder / "m.gguf").symlink_to(tmp_path / "secret.gguf")
    with pytest.raises(ConfigError, match="leads out of the model folder"):
        resolve(folder)


def test_the_folder_is_made_once_and_anew_for_a_changed_file(tmp_path: Path) -> None:
    model = save_family("llama", tmp_path / "model")
    write_gguf(model, tmp_path / "m.gguf", "F16")
    first = resolve(tmp_path / "m.gguf").model_path
    made_at = (Path(first) / "config.json").stat().st_mtime_ns
    assert resolve(tmp_path / "m.gguf").model_path == first
    assert (Path(first) / "config.json").stat().st_mtime_ns == made_at
    write_gguf(model, tmp_path / "m.gguf", "Q8_0")
    assert resolve(tmp_path / "m.gguf").model_path != first


def test_end_tokens_and_sampling_go_into_the_generation_config(tmp_path: Path) -> None:
    def change(writer: Any) -> None:
        writer.add_eot_token_id(5)
        writer.add_key_value("general.sampling.temp", 0.6, gguf.GGUFValueType.FLOAT32)
        writer.add_key_value("general.sampling.top_k", 20, gguf.GGUFValueType.INT32)

    write_gguf(ROOT / "demo_model", tmp_path / "m.gguf", "F16", change=change)
    folder = Path(resolve(tmp_path / "m.gguf").model_path)
    found = json.loads((folder / "generation_config.json").read_text())
    # <|end_of_text|>, the one added above, and <|end|>, which the chat template writes.
    assert found == {
        "temperature": 0.6,
        "top_k": 20,
        "do_sample": True,
        "eos_token_id": [1, 5, 6],
    }
