"""scripts/run_multi_host.sh: what it asks of the machines, and the command that it ends in."""

from __future__ import annotations

from pathlib import Path

import pytest

SCRIPT = "scripts/run_multi_host.sh"


@pytest.fixture
def machines(tree, tmp_path):
    """A tree with a host file, all packages, and other machines that are ready."""
    tree.hosts = tmp_path / "hosts"
    tree.hosts.write_text("alpha:2\n# spare: gamma\n\nbeta:1   # the small one\ndelta")
    tree.fake("python", "#!/bin/sh\ncat >/dev/null\n")
    tree.fake("ssh", '#!/bin/sh\nprintf "%s\\n" "$*" >> "$RECORD/ssh"\n')
    tree.fake("lscpu", "#!/bin/sh\nseq 1 8\n")
    tree.fake("nproc", "#!/bin/sh\necho 8\n")
    return tree


def launch(tree, *arguments, **environment):
    variables = {"SYS": "/nowhere", "VIRTUAL_ENV": "/somewhere"}
    return tree.run(SCRIPT, str(tree.hosts), *arguments, **(variables | environment))


def test_starts_all_ranks_and_asks_each_other_machine_first(machines):
    result = launch(machines, "/models/llama", "--port", "9000")
    assert result.returncode == 0, result.stderr
    python = str(machines.bin / "python")
    assert machines.arguments == [
        *("-f", str(machines.hosts), "-np", "4", "--prepend-rank", python, "serving.py"),
        *("--repo-id-or-model-path", "/models/llama", "--port", "9000"),
    ]
    asked = (machines.record / "ssh").read_text()
    assert " beta test" in asked and " delta test" in asked
    assert python in asked and str(machines.root / "serving.py") in asked
    assert " alpha " not in asked and "gamma" not in asked
    assert machines.environment["OMP_NUM_THREADS"] == "4"  # shared by this machine's two ranks
    assert "ServerAliveInterval" in machines.environment["HYDRA_LAUNCHER_EXTRA_ARGS"]


def test_the_model_may_be_named_by_a_file_on_each_machine(machines):
    assert launch(machines, "--config", "/etc/serving.yaml").returncode == 0
    assert machines.arguments[-3:] == ["serving.py", "--config", "/etc/serving.yaml"]


def test_a_machine_that_cannot_be_reached_is_named(machines):
    machines.fake("ssh", "#!/bin/sh\necho 'ssh: Permission denied' >&2\nexit 255\n")
    result = launch(machines, "/models/llama")
    assert result.returncode == 2
    assert "ERROR: ssh beta does not work (ssh: Permission denied)" in result.stderr


def test_a_machine_without_the_environment_is_named(machines):
    machines.fake("ssh", "#!/bin/sh\necho 'there is no /x/python'\n")
    result = launch(machines, "/models/llama")
    assert result.returncode == 2
    assert "ERROR: on beta: there is no /x/python" in result.stderr


def test_a_dry_run_asks_nobody(machines):
    result = launch(machines, "/models/llama", DRY_RUN="1")
    assert result.returncode == 0
    assert "==> mpirun -f" in result.stderr
    assert not Path(machines.record / "ssh").exists()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("alpha:two\n", "the number of ranks of alpha"),
        ("# nobody\n", "names no machine"),
    ],
)
def test_a_host_file_that_makes_no_sense_is_refused(text, complaint, machines):
    machines.hosts.write_text(text)
    result = launch(machines, "/models/llama")
    assert result.returncode == 2
    assert complaint in result.stderr


def test_a_missing_host_file_is_refused(tree):
    assert "no host file named" in tree.run(SCRIPT).stderr
    assert "cannot be read" in tree.run(SCRIPT, "/nowhere/hosts").stderr


def test_gpu_ranks_on_several_machines_do_not_rely_on_shared_memory(machines, tmp_path):
    device = tmp_path / "sys" / "class" / "drm" / "renderD128" / "device"
    device.mkdir(parents=True)
    (device / "vendor").write_text("0x8086\n")
    machines.fake("lscpu", "#!/bin/sh\necho 0\n")
    assert launch(machines, "/models/llama", SYS=str(tmp_path / "sys")).returncode == 0
    assert machines.environment["FI_PROVIDER"] == "tcp"
    assert machines.environment["CCL_ATL_SHM"] == "0"


def test_open_mpi_is_told_apart(machines):
    machines.fake("mpirun", "#!/bin/sh\necho 'mpirun (Open MPI) 5.0.3'\n")
    result = launch(machines, "/models/llama")
    assert result.returncode == 2
    assert "Open MPI" in result.stderr
