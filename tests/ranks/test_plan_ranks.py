"""--plan in one process says what AutoTP makes of several; dummy weights are the same for all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers

from autotp_serving.memory.known_shapes import DEFAULTS
from tests.model.checkpoints import save_tiny_llama
from tests.model.families import COMMON, FAMILIES
from tests.ranks.launch import ROOT, run_jobs, run_program

pytestmark = pytest.mark.ranks


def run_alone(words: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a Python program of the repository without mpirun."""
    return subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
    )


def plan_and_load(folder: Path, num_ranks: int, settings: dict[str, Any], tmp: Path) -> Any:
    """What is planned and what is loaded, per rank."""
    job = {"num_ranks": num_ranks, "settings": settings}
    loaded = run_program("plan_program", num_ranks, folder, job, tmp)
    out = tmp / "planned.json"
    done = run_alone(["tests/ranks/plan_program.py", str(folder), str(tmp / "in.json"), str(out)])
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text()), loaded


@pytest.mark.parametrize(
    ("num_ranks", "low_bit", "changes"),
    [(2, "sym_int4", {}), (3, "bf16", {"tie_word_embeddings": True})],
)
def test_planned_ranks_are_those_loaded(
    num_ranks: int, low_bit: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    settings = {"low_bit": low_bit, "device": "cpu", "kv_cache_memory": 2**24}
    if num_ranks == 2:
        changes = changes | {"intermediate_size": 768}  # so that two ranks split no block
    folder = save_tiny_llama(tmp_path / "model", **changes)
    planned, loaded = plan_and_load(folder, num_ranks, settings, tmp_path)
    assert planned == loaded
    assert len(planned) == num_ranks


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_config_alone_says_what_the_sharded_model_says(num_ranks: int, tmp_path: Path) -> None:
    """Every family that is planned without torch; 3 ranks share 4 key/value heads unevenly."""
    for name, (config_class, changes) in FAMILIES.items():
        heads = {"num_key_value_heads": 4, "intermediate_size": 300} if num_ranks == 3 else {}
        config = getattr(transformers, config_class)(**(COMMON | heads | changes))
        if config.model_type in DEFAULTS:
            config.save_pretrained(tmp_path / name)
    folders = sorted(map(str, tmp_path.iterdir()))
    done = run_alone(["tests/ranks/known_plan_program.py", str(num_ranks), *folders])
    assert done.returncode == 0, done.stderr
    answers = [line.split() for line in done.stdout.splitlines()]
    assert len(answers) == num_ranks * len(folders) >= num_ranks * len(DEFAULTS)
    assert all(answer[1:] == ["equal"] for answer in answers), done.stdout


def test_dummy_weights_answer_alike_at_one_and_two_ranks(tmp_path: Path) -> None:
    folder = save_tiny_llama(tmp_path / "model")
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    settings = {"load_format": "dummy", "low_bit": "bf16", "dtype": "float32", "device": "cpu"}
    job = {"prompts": [[1, 2, 3], [7] * 40], "max_tokens": [8, 8], "settings": settings}
    answers = [run_jobs([job | {"model": str(folder)}], ranks, tmp_path) for ranks in (1, 2)]
    assert isinstance(answers[0][0], list), answers
    assert answers[0] == answers[1]


def test_plan_prints_a_table_and_refuses_what_cannot_fit(tmp_path: Path) -> None:
    folder = save_tiny_llama(tmp_path)
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    words = ["serving.py", "--plan", "--model", str(folder), "--tensor-parallel-size", "3",
             "--device-memory", "1GiB", "--low-bit", "bf16"]  # fmt: skip
    done = run_alone(words)
    assert done.returncode == 0, done.stderr
    rows = [line.split("  ")[0] for line in done.stdout.splitlines()]
    assert {"embedding, bf16", "attention, bf16", "weights together"} <= set(rows)
    done = run_alone([*words, "--device-memory", "1MiB"])
    assert done.returncode == 2
    assert "rank 0 needs" in done.stderr and "--gpu-memory-utilization" in done.stderr
    assert "weights together" in done.stdout


def test_a_plan_imports_no_torch_where_config_json_is_enough(tmp_path: Path) -> None:
    """It would take seconds; a family that only transformers knows is planned with it."""
    folder = save_tiny_llama(tmp_path / "llama")
    code = (
        "import sys, serving\n"
        f"arguments = ['--plan', '--model', {str(folder)!r}, '--device-memory', '1GiB']\n"
        "print(serving.main(arguments), 'torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = run_alone(["-c", code])
    assert done.stdout.splitlines()[-1] == "0 False False", done.stderr
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"model_type": "olmo2", "architectures": ["Olmo2ForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(settings))
    for path in folder.glob("model*.safetensors*"):  # another family's
        path.unlink()
    done = run_alone(["-c", code])
    assert done.stdout.splitlines()[-1] == "0 True True", done.stderr


def test_a_count_of_ranks_that_was_not_started_is_refused(tmp_path: Path) -> None:
    words = ["serving.py", "--model", str(tmp_path), "--tensor-parallel-size", "2"]
    done = run_alone([*words, "--save-low-bit", str(tmp_path / "saved")])
    assert done.returncode == 2
    assert "start with mpirun -np 2" in done.stderr
