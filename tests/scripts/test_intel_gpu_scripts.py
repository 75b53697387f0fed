"""The Intel GPU launch and the service launch, on made-up machines with a stand-in for mpirun."""

from __future__ import annotations

from pathlib import Path

import pytest

ARC = "run_llama2_7b_chat_hf_arc_2_card.sh"


@pytest.fixture
def machine(tree, tmp_path):
    """A machine with two Intel GPUs, oneAPI, tcmalloc and all packages."""
    tree.sys = tmp_path / "sys"
    for index in range(2):
        device = tree.sys / "class" / "drm" / f"renderD{128 + index}" / "device"
        device.mkdir(parents=True)
        (device / "vendor").write_text("0x8086\n")
        (device / "numa_node").write_text("0\n")
    tree.oneapi = tmp_path / "oneapi"
    tree.oneapi.mkdir()
    (tree.oneapi / "setvars.sh").write_text(
        'echo noise; : "$UNSET"; false; export FROM_SETVARS=1\n'
    )
    tree.conda = tmp_path / "conda"
    (tree.conda / "lib").mkdir(parents=True)
    # The loader is asked for it by name only; an empty one would be an error of its own.
    (tree.conda / "lib" / "libtcmalloc.so").symlink_to(find_any_library())
    tree.fake("python", "#!/bin/sh\ncat >/dev/null\n")

    def run(script, *arguments, **environment):
        variables = {
            "SYS": str(tree.sys),
            "ONEAPI_ROOT": str(tree.oneapi),
            "CONDA_PREFIX": str(tree.conda),
        }
        return tree.run(script, *arguments, **(variables | environment))

    tree.launch = run
    return tree


def find_any_library() -> Path:
    """A shared library that is safe to preload anywhere."""
    return next(path for root in ("/lib", "/usr/lib") for path in Path(root).glob("*/libm.so.6"))


def lines(text: str, start: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(start)]


def test_arc_script_starts_two_ranks_with_the_documented_flags(machine):
    result = machine.launch(ARC, "/models/llama")
    assert result.returncode == 0, result.stderr
    assert not lines(result.stderr, "WARNING")
    assert " ".join(machine.arguments) == (
        "-np 2 --prepend-rank python serving.py --device xpu --repo-id-or-model-path /models/llama"
        " --low-bit sym_int4 --port 8000 --max-num-seqs 8 --max-num-batched-tokens 4096"
    )
    environment = machine.environment
    assert environment["FROM_SETVARS"] == "1"
    assert environment["LD_PRELOAD"] == str(machine.conda / "lib" / "libtcmalloc.so")
    assert environment["CCL_ZE_IPC_EXCHANGE"] == "sockets"
    assert environment["CCL_ATL_TRANSPORT"] == "ofi"


def test_arc_script_takes_the_model_from_its_last_line(machine):
    script = machine.root / ARC
    last_line = script.read_text().splitlines()[-1]
    for setting in ("YOUR_REPO_ID_OR_MODEL_PATH", "--port 8000", "--max-num-seqs 8"):
        assert setting in last_line
    script.write_text(script.read_text().replace("YOUR_REPO_ID_OR_MODEL_PATH", "/models/edited"))
    result = machine.launch(ARC, "--port", "9000")
    assert result.returncode == 0, result.stderr
    assert "/models/edited" in machine.arguments
    assert machine.arguments[-2:] == ["--port", "9000"]


def test_arc_script_without_a_model_says_where_to_put_it(machine):
    result = machine.launch(ARC)
    assert result.returncode == 2
    assert "last line" in result.stderr.splitlines()[-1]


def test_number_of_gpus_and_own_variables_win(machine):
    result = machine.launch(ARC, "/m", NUM_GPUS="1", FI_PROVIDER="tcp", CCL_TOPO_P2P_ACCESS="0")
    assert result.returncode == 0, result.stderr
    assert machine.arguments[:2] == ["-np", "1"]
    assert machine.environment["FI_PROVIDER"] == "tcp"
    assert machine.environment["CCL_TOPO_P2P_ACCESS"] == "0"


def test_each_missing_piece_is_one_line_with_its_cure(machine):
    (machine.sys / "class" / "drm" / "renderD129" / "device" / "vendor").write_text("0x10de\n")
    (machine.oneapi / "setvars.sh").unlink()
    machine.fake("lscpu", "#!/bin/sh\nseq 0 1\n")
    machine.fake("python", "#!/bin/sh\ncat >/dev/null; echo torch deepspeed\n")
    result = machine.launch(ARC, "/m", DRY_RUN="1")
    assert result.returncode == 0
    warnings = lines(result.stderr, "WARNING")
    for cure in ("pip install -r requirements/xpu.txt", "sycl-ls", "intel-oneapi-base-toolkit",
                 "apt-get install numactl"):  # fmt: skip
        assert sum(cure in line for line in warnings) == 1, (cure, warnings)
    assert len(warnings) == 4
    assert machine.launch(ARC, "/m").returncode == 2  # without packages there is nothing to start


def test_ranks_stay_on_the_memory_node_of_the_gpus(machine):
    machine.fake("lscpu", "#!/bin/sh\nseq 0 1\n")
    machine.fake("numactl", '#!/bin/sh\necho "$@" > "$RECORD/numactl"\nshift 2\nexec "$@"\n')
    result = machine.launch(ARC, "/m")
    assert result.returncode == 0, result.stderr
    assert (machine.record / "numactl").read_text().startswith("--cpunodebind=0 --preferred=0 mpi")
    assert machine.arguments[:2] == ["-np", "2"]


def test_setvars_none_leaves_oneapi_out(machine):
    machine.launch(ARC, "/m", SETVARS="none")
    assert "FROM_SETVARS" not in machine.environment


def test_service_script_has_its_settings_at_the_top(machine):
    script = machine.root / "start-service.sh"
    script.write_text(
        script.read_text()
        .replace("${MODEL:-demo_model}", "/models/Qwen1.5")
        .replace("${SERVED_MODEL_NAME:-demo_model}", "Qwen1.5")
        .replace("${TENSOR_PARALLEL_SIZE:-1}", "2")
    )
    result = machine.launch("start-service.sh", "--max-num-seq", "3")
    assert result.returncode == 0, result.stderr
    command = " ".join(machine.arguments)
    assert command.startswith("-np 2 --prepend-rank python serving.py --model /models/Qwen1.5 ")
    assert "--served-model-name Qwen1.5 --port 8000" in command
    for flag in ("--gpu-memory-utilization 0.9", "--max-model-len 2048",
                 "--max-num-batched-tokens 4096", "--max-num-seqs 12"):  # fmt: skip
        assert flag in command
    assert command.endswith("--max-num-seq 3")
    assert machine.environment["CCL_ZE_IPC_EXCHANGE"] == "sockets"


def test_service_script_without_an_intel_gpu_asks_for_no_intel_stack(machine, tmp_path):
    result = machine.launch("start-service.sh", SYS=str(tmp_path / "nothing"))
    assert result.returncode == 0, result.stderr
    assert machine.arguments[:2] == ["-np", "1"]
    assert not lines(result.stderr, "WARNING")
    assert "CCL_ZE_IPC_EXCHANGE" not in machine.environment
