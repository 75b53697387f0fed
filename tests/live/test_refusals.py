"""What cannot start says so in one line, cause and cure, and leaves with exit code 2.

Under mpirun where ranks have to agree on it; else `serving.main` is called right here.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import serving
from autotp_serving.distributed.launch import LocalRankGroup
from tests.live.launch import CACHE_FLAGS, Launch, mpirun

pytestmark = pytest.mark.live

FAULTY = str(Path(__file__).with_name("faulty_serving.py"))
INDEX = "model.safetensors.index.json"


@pytest.fixture
def broken(model_path: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint, to be damaged."""
    return Path(shutil.copytree(model_path, tmp_path / "model"))


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def truncate(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def check_refusal(server: Launch, *words: str) -> None:
    """Every rank is gone, and one line of all that was printed is ours."""
    assert server.wait(60.0) == 2, server.log
    assert len(server.errors) == 1, server.log
    assert "Traceback" not in server.log
    for word in words:
        assert word in server.errors[0]


def test_a_mistake_that_all_ranks_see(start: Callable[..., Launch]) -> None:
    check_refusal(start(mpirun(2), "--model", "x", "--no-such-flag"), "--no-such-flag", "--help")


def test_a_mistake_that_only_rank_0_sees(
    start: Callable[..., Launch], model_flags: list[str]
) -> None:
    """The port is rank 0's alone; the others are busy joining the group."""
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        server = start(mpirun(2), *model_flags, port=port)
        check_refusal(server, f"port {port} is taken", "--port")


def test_a_mistake_that_only_rank_1_sees(
    start: Callable[..., Launch], model_flags: list[str]
) -> None:
    server = start(mpirun(2), *model_flags, program=(FAULTY, "refuse"))
    check_refusal(server, "rank 1 has no such card: start fewer ranks")


def test_a_fault_while_rank_1_loads(start: Callable[..., Launch], model_flags: list[str]) -> None:
    """No mistake of the user's: a traceback tells where, and no rank waits for the one lost."""
    server = start(mpirun(2), *model_flags, program=(FAULTY, "load"))
    assert server.wait(60.0) not in (0, 2), server.log
    assert "rank 1 failed" in server.log and "a shard vanished" in server.log


def test_a_truncated_shard_under_mpirun(start: Callable[..., Launch], broken: Path) -> None:
    truncate(shards(broken)[2])
    check_refusal(
        start(mpirun(2), "--model", str(broken), *CACHE_FLAGS), shards(broken)[2].name, "cut short"
    )


def test_a_limit_of_open_files_that_two_ranks_cannot_join_under(
    start: Callable[..., Launch], model_flags: list[str]
) -> None:
    limited = ["bash", "-c", 'ulimit -n 64; exec "$@"', "bash", *mpirun(2)]
    check_refusal(start(limited, *model_flags), "64 files", "ulimit -n")


def test_a_link_out_of_the_folder_under_mpirun(start: Callable[..., Launch], broken: Path) -> None:
    moved = shards(broken)[1].rename(broken.parent / "elsewhere.safetensors")
    (broken / "model-00002-of-00006.safetensors").symlink_to(moved)
    server = start(mpirun(2), "--model", str(broken), *CACHE_FLAGS)
    check_refusal(server, "model-00002-of-00006.safetensors", "leads out of the model folder")


# From here on in this process, one rank.


@pytest.fixture
def refuse(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., str]]:
    """Calls serving.main, which must refuse; returns its one line."""
    package_logger = logging.getLogger("autotp_serving")
    logger_state = (package_logger.handlers, package_logger.propagate, package_logger.level)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr("autotp_serving.api.server.serve", lambda *args: 0)
    monkeypatch.setattr(LocalRankGroup, "abort", lambda self: None)

    def call(*argv: object, num_ranks: int = 1) -> str:
        group = LocalRankGroup(size=num_ranks, local_size=num_ranks)
        monkeypatch.setattr(serving, "join_group", lambda environ: group)
        defaults = ["--port", "0", "--host", "127.0.0.1", *CACHE_FLAGS]
        code = serving.main([*defaults, *map(str, argv)])
        error_output = capfd.readouterr().err
        assert code == 2, f"exit code {code}: {error_output}"
        assert "Traceback" not in error_output
        lines = [line for line in error_output.splitlines() if "serving.py: error:" in line]
        assert len(lines) == 1, error_output
        return lines[0]

    yield call
    package_logger.handlers, package_logger.propagate = logger_state[:2]
    package_logger.setLevel(logger_state[2])
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_a_model_path_that_leads_nowhere(refuse: Callable[..., str]) -> None:
    line = refuse("--model", "/no/such/folder")
    assert "/no/such/folder" in line and "--repo-id-or-model-path" in line


@pytest.mark.parametrize(
    ("text", "words"),
    [("{ damaged", "config.json"), ("{}", "config.json"), ("[1]", "config.json")],
)
def test_a_damaged_config(text: str, words: str, refuse: Callable[..., str], broken: Path) -> None:
    (broken / "config.json").write_text(text)
    assert words in refuse("--model", broken)


MODES = pytest.mark.parametrize("mode", ["serve", "plan", "save"])


def mode_flags(mode: str, folder: Path) -> list[object]:
    """The three things that are done with a model folder."""
    return {"serve": [], "plan": ["--plan"], "save": ["--save-low-bit", folder / "new"]}[mode]


@MODES
@pytest.mark.parametrize("size", [-5, 0, 10**18, "384", 384.5, True, {}], ids=str)
@pytest.mark.parametrize("name", ["vocab_size", "num_hidden_layers", "head_dim"])
def test_sizes_that_no_model_has(
    name: str, size: Any, mode: str, refuse: Callable[..., str], broken: Path, tmp_path: Path
) -> None:
    change_config(broken, **{name: size})
    line = refuse("--model", broken, *mode_flags(mode, tmp_path))
    assert name in line and repr(size) in line
    assert not (tmp_path / "new").exists()


def test_a_size_that_is_left_out_is_the_familys_and_not_the_checkpoints(
    refuse: Callable[..., str], broken: Path
) -> None:
    config = json.loads((broken / "config.json").read_text())
    del config["vocab_size"]
    (broken / "config.json").write_text(json.dumps(config))
    assert "(384, 256)" in refuse("--model", broken)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": "x"},
        {"rope_parameters": {"rope_type": "yarn", "factor": "x"}},
        {"hidden_act": "no such"},
        {"rms_norm_eps": "x"},
        {"num_attention_heads": 6},
        {"text_config": {"vocab_size": -5}},
    ],
    ids=str,
)
def test_settings_of_a_model_that_cannot_be_built(
    changes: dict[str, Any], refuse: Callable[..., str], broken: Path
) -> None:
    change_config(broken, **changes)
    assert "config.json" in refuse("--model", broken)


@MODES
def test_a_config_nested_without_end(
    mode: str, refuse: Callable[..., str], broken: Path, tmp_path: Path
) -> None:
    (broken / "config.json").write_text('{"a":' * 200_000 + "1" + "}" * 200_000)
    assert "levels" in refuse("--model", broken, *mode_flags(mode, tmp_path))


@MODES
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "chat_template.jinja", INDEX])
def test_a_fifo_in_the_folder(
    name: str, mode: str, refuse: Callable[..., str], broken: Path, tmp_path: Path
) -> None:
    (broken / name).unlink(missing_ok=True)
    os.mkfifo(broken / name)
    line = refuse("--model", broken, *mode_flags(mode, tmp_path))
    assert name in line and "fifo" in line


@MODES
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "LICENSE", "notes.txt"])
def test_nothing_outside_the_folder_is_read_or_copied(
    name: str, mode: str, refuse: Callable[..., str], broken: Path, tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("{}")
    (broken / name).unlink(missing_ok=True)
    (broken / name).symlink_to(secret)
    line = refuse("--model", broken, *mode_flags(mode, tmp_path))
    assert name in line and str(secret) in line
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("mode", ["serve", "save"])
def test_an_index_that_names_a_file_elsewhere(
    mode: str, refuse: Callable[..., str], broken: Path, tmp_path: Path
) -> None:
    moved = shards(broken)[1].rename(tmp_path / "elsewhere.safetensors")
    text = (broken / INDEX).read_text().replace("model-00002-of-00006.safetensors", str(moved))
    (broken / INDEX).write_text(text)
    line = refuse("--model", broken, *mode_flags(mode, tmp_path))
    assert str(moved) in line and "leads out of the model folder" in line


@pytest.mark.parametrize(
    "text", ["{ cut", "[]", '{"eos_token_id": "x"}', '{"eos_token_id": [257, null]}']
)
def test_a_broken_generation_config(text: str, refuse: Callable[..., str], broken: Path) -> None:
    (broken / "generation_config.json").write_text(text)
    assert "generation_config.json" in refuse("--model", broken, "--low-bit", "bf16")


@pytest.mark.parametrize(
    "text",
    ["", "[]", "[" * 200_000, '{"version": "9.0", "model": {"type": "Newest"}}',
     '{"version": "1.0", "added_tokens": [], "model": {"type": "Newest"}}'],
    ids=lambda text: text[:40],
)  # fmt: skip
def test_a_tokenizer_that_the_library_cannot_read(
    text: str, refuse: Callable[..., str], broken: Path
) -> None:
    (broken / "tokenizer.json").write_text(text)
    line = refuse("--model", broken, "--low-bit", "bf16")
    assert "tokenizer" in line and str(broken) in line


@pytest.mark.parametrize("mode", ["serve", "plan"])
@pytest.mark.parametrize(("size", "hint"), [("4", "unit"), ("1KiB", "unit"), ("2MiB", "")])
def test_a_cache_too_small_for_one_sequence_is_refused_before_a_weight_is_read(
    size: str, hint: str, mode: str, refuse: Callable[..., str], model_path: Path,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("autotp_serving.model.loader.WeightFiller.fill", None)
    flags = ["--model", model_path, "--kv-cache-memory", size]
    line = refuse(*flags, *mode_flags(mode, tmp_path))
    assert "--kv-cache-memory" in line and "--max-model-len is 2048" in line and hint in line


@pytest.mark.parametrize("mode", ["serve", "plan"])
def test_a_cache_larger_than_the_memory_there_is(
    mode: str, refuse: Callable[..., str], model_path: Path, tmp_path: Path
) -> None:
    flags = ["--model", model_path, "--kv-cache-memory", "900TiB"]
    line = refuse(*flags, *mode_flags(mode, tmp_path))
    assert "--kv-cache-memory" in line and "lower it" in line


def test_a_missing_shard(refuse: Callable[..., str], broken: Path) -> None:
    name = shards(broken)[1].name
    shards(broken)[1].unlink()
    line = refuse("--model", broken)
    assert name in line and "download" in line


def test_an_empty_shard(refuse: Callable[..., str], broken: Path) -> None:
    shards(broken)[0].write_bytes(b"")
    assert shards(broken)[0].name in refuse("--model", broken)


@pytest.mark.parametrize(
    "text", ["{ damaged", "[]", '{"weight_map": []}', '{"weight_map": 3}', "{}"]
)
def test_a_damaged_index(text: str, refuse: Callable[..., str], broken: Path) -> None:
    (broken / INDEX).write_text(text)
    assert INDEX in refuse("--model", broken)


def test_no_weights(refuse: Callable[..., str], broken: Path) -> None:
    for path in [*shards(broken), broken / INDEX]:
        path.unlink()
    assert str(broken) in refuse("--model", broken)


def replace_tensor(folder: Path, name: str, tensor: torch.Tensor | None) -> None:
    """Put another tensor in its place, or none."""
    path = folder / json.loads((folder / INDEX).read_text())["weight_map"][name]
    tensors = load_file(path)
    del tensors[name]
    if tensor is not None:
        tensors[name] = tensor
    save_file(tensors, path)


@pytest.mark.parametrize("shape", [(256, 250), (250, 256), (256,)], ids=str)
def test_a_tensor_of_another_shape(
    shape: tuple[int, ...], refuse: Callable[..., str], broken: Path
) -> None:
    name = "model.layers.1.self_attn.q_proj.weight"
    replace_tensor(broken, name, torch.zeros(shape))
    line = refuse("--model", broken, "--low-bit", "bf16")
    assert name in line and str(shape) in line


def test_a_tensor_that_is_not_there(refuse: Callable[..., str], broken: Path) -> None:
    name = "model.layers.2.mlp.up_proj.weight"
    replace_tensor(broken, name, None)
    assert name in refuse("--model", broken, "--low-bit", "bf16")


def test_more_ranks_than_key_value_heads(refuse: Callable[..., str], model_path: Path) -> None:
    line = refuse("--model", model_path, num_ranks=5)
    assert "5 ranks" in line and "4 key/value heads" in line


def test_an_unknown_weight_format(refuse: Callable[..., str], model_path: Path) -> None:
    line = refuse("--model", model_path, "--low-bit", "nf17")
    assert "--low-bit" in line and "nf17" in line


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--max-model-len", "2049"], ["--max-model-len", "2049", "2048"]),
        (["--kv-cache-memory", "64KiB"], ["--kv-cache-memory", "--max-model-len"]),
        (["--dtype", "int8"], ["--dtype", "int8"]),
        (["--device", "xpu"], ["--device xpu"]),
        (["--host", "no.such.host.invalid"], ["--host"]),
        (["--max-num-seqs", "9", "--max-num-batched-tokens", "8"], ["--max-num-batched-tokens"]),
    ],
    ids=lambda value: value[0] if value[0].startswith("--") else "",
)
def test_settings_that_cannot_be(
    flags: list[str], words: list[str], refuse: Callable[..., str], model_path: Path
) -> None:
    line = refuse("--model", model_path, *flags)
    for word in words:
        assert word in line


def test_a_folder_without_tokenizer(refuse: Callable[..., str], broken: Path) -> None:
    for path in broken.glob("tokenizer*"):
        path.unlink()
    assert "tokenizer" in refuse("--model", broken, "--low-bit", "bf16")


def test_an_architecture_that_does_not_exist(refuse: Callable[..., str], broken: Path) -> None:
    change_config(broken, model_type="no_such_model", architectures=["NoSuchModel"])
    assert "no_such_model" in refuse("--model", broken)
