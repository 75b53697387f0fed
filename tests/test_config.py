"""Settings: each one that cannot work is named, with its cure, in one line."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from autotp_serving.command_line import parse_args
from autotp_serving.config import ConfigError, ServingConfig, parse_bytes

MODEL = ["--repo-id-or-model-path", "folder/model"]


def test_defaults_are_those_of_the_guide() -> None:
    config = parse_args(MODEL)
    assert config == ServingConfig(model_path="folder/model")
    assert (config.port, config.max_num_seqs, config.max_num_batched_tokens) == (8000, 8, 4096)


@pytest.mark.parametrize(
    ("flags", "field", "value"),
    [
        (["--model", "x"], "model_path", "x"),
        (["--low-bit", "bf16"], "low_bit", "bf16"),
        (["--max-num-seq", "3"], "max_num_seqs", 3),
        (["--max-num-seqs", "3"], "max_num_seqs", 3),
        (["--max-num-batched-token", "64"], "max_num_batched_tokens", 64),
        (["--max-num-batched-tokens", "64"], "max_num_batched_tokens", 64),
        (["--max-model-len", "77"], "max_model_len", 77),
        (["--kv-cache-memory", "3MiB"], "kv_cache_memory", 3 * 2**20),
        (["--max-body-size", "1g"], "max_body_size", 2**30),
        (["--no-enable-prefix-caching"], "enable_prefix_caching", False),
        (["--trust-remote-code"], "trust_remote_code", True),
        (["--gpu-memory-utilization", "0.5"], "gpu_memory_utilization", 0.5),
        (["--drain-seconds", "0"], "drain_seconds", 0.0),
        (["--dtype", "float32"], "dtype", "float32"),
        (["--kv-cache-dtype", "int8"], "kv_cache_dtype", "int8"),
        (["--device", "cpu"], "device", "cpu"),
        (["--seed", "-4"], "seed", -4),
        (["--port", "0"], "port", 0),
    ],
)
def test_flags_set_their_fields(flags: list[str], field: str, value: Any) -> None:
    assert getattr(parse_args([*MODEL, *flags]), field) == value


def test_names_are_several() -> None:
    config = parse_args([*MODEL, "--served-model-name", "a", "b"])
    assert config.model_names == tuple(config.served_model_name) == ("a", "b")


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("/x/llama", ("llama",)),
        ("/x/llama/", ("llama",)),
        ("m", ("m",)),
        ("./m", ("m",)),
        ("/x/m/.", ("m",)),
        ("/", ("model",)),
        ("meta-llama/Llama-2-7b", ("Llama-2-7b", "meta-llama/Llama-2-7b")),
        ("../secret/m", ("m",)),
        (
            "/hub/models--meta-llama--Llama-2-7b/snapshots/0123abc",
            ("meta-llama/Llama-2-7b",),
        ),
    ],
)
def test_the_model_is_called_by_its_folder_and_not_by_where_it_lies(
    path: str, names: tuple[str, ...]
) -> None:
    assert ServingConfig(model_path=path).model_names == names


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--no-such-flag"], ["--no-such-flag", "--help"]),
        (["--max-num", "3"], ["--max-num"]),
        (["stray"], ["stray"]),
        (["--port"], ["--port"]),
        (["--port", "http"], ["--port", "http"]),
        (["--port", "65536"], ["--port", "65536"]),
        (["--port", "-1"], ["--port", "-1"]),
        (["--kv-offload-dir", "x", "--no-enable-prefix-caching"], ["--kv-offload-dir"]),
        (["--kv-offload-size", "1GiB"], ["--kv-offload-size", "--kv-offload-dir"]),
        (["--kv-cache-dtype", "fp8"], ["--kv-cache-dtype", "fp8", "int8", "auto"]),
        (["--kv-cache-dtype", "bfloat16"], ["--kv-cache-dtype", "bfloat16", "--dtype"]),
        (["--dtype", "int3"], ["--dtype", "int3", "bfloat16"]),
        (["--device", "tpu"], ["--device", "tpu", "xpu"]),
        (["--max-num-seqs", "0"], ["--max-num-seqs", "0"]),
        (["--max-model-len", "0"], ["--max-model-len", "0"]),
        (["--max-queue-len", "0"], ["--max-queue-len", "0"]),
        (["--block-size", "0"], ["--block-size", "0"]),
        (["--kv-cache-memory", "lots"], ["--kv-cache-memory", "lots", "512MiB"]),
        (["--kv-cache-memory", "0"], ["--kv-cache-memory", "0"]),
        (["--max-body-size", "0"], ["--max-body-size", "0"]),
        (["--gpu-memory-utilization", "0"], ["--gpu-memory-utilization", "0"]),
        (["--gpu-memory-utilization", "1.1"], ["--gpu-memory-utilization", "1.1"]),
        (["--gpu-memory-utilization", "nan"], ["--gpu-memory-utilization", "nan"]),
        (["--drain-seconds", "-1"], ["--drain-seconds", "-1"]),
        (["--drain-seconds", "nan"], ["--drain-seconds", "nan"]),
        (["--drain-seconds", "inf"], ["--drain-seconds", "inf"]),
        (
            ["--max-num-seqs", "9", "--max-num-batched-tokens", "8"],
            ["--max-num-seqs", "9", "--max-num-batched-tokens", "8"],
        ),
    ],
)
def test_each_error_names_the_flag_in_one_line(flags: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as refusal:
        parse_args([*MODEL, *flags])
    message = str(refusal.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_a_missing_model_is_named() -> None:
    with pytest.raises(ConfigError, match="--repo-id-or-model-path is missing"):
        parse_args([])


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("123", 123),
        ("1k", 1024),
        ("512MiB", 512 * 2**20),
        ("512mb", 512 * 2**20),
        ("1.5 GB", 3 * 2**29),
        (" 2t ", 2**41),
        ("10B", 10),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "-1", "1e9", "GiB", "1 2", "4Q", "0x10", "1.g"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is not a size"):
        parse_bytes(text)


def test_scripts_write_sizes_as_the_command_line_does() -> None:
    config = ServingConfig(model_path="m", kv_cache_memory="64MiB")  # type: ignore[arg-type]
    assert config.kv_cache_memory == 64 * 2**20
    with pytest.raises(ConfigError, match="--kv-cache-memory: 'much' is not a size"):
        ServingConfig(model_path="m", kv_cache_memory="much")  # type: ignore[arg-type]
