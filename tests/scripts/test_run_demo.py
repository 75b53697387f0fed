"""run_demo.sh: what it installs, when it does not, and the command that it ends in."""

from __future__ import annotations

import re
from pathlib import Path

import pytest


def test_installs_once_then_starts_at_once(fresh_tree):
    first = fresh_tree.run("run_demo.sh")
    assert first.returncode == 0, first.stderr
    assert "making a virtual environment" in first.stderr
    assert "installing requirements.txt" in first.stderr
    second = fresh_tree.run("run_demo.sh")
    assert second.returncode == 0
    assert "installing" not in second.stderr
    assert "making" not in second.stderr
    (fresh_tree.root / "requirements.txt").write_text("# changed\n")
    assert "installing requirements.txt" in fresh_tree.run("run_demo.sh").stderr


def test_starts_two_ranks_on_port_8000_and_passes_flags_through(tree):
    result = tree.run("run_demo.sh", "--max-num-seqs", "16", "--low-bit", "fp16")
    assert result.returncode == 0, result.stderr
    command = " ".join(tree.arguments)
    assert command.startswith("-np 2 --prepend-rank")
    assert command.endswith(
        "python serving.py --repo-id-or-model-path demo_model --low-bit sym_int8 --port 8000"
        " --max-num-seqs 16 --low-bit fp16"
    )
    assert tree.environment["VIRTUAL_ENV"] == str(tree.venv)
    assert int(tree.environment["OMP_NUM_THREADS"]) >= 1


def test_num_ranks_port_and_threads_come_from_the_environment(tree):
    result = tree.run("run_demo.sh", NUM_RANKS="3", PORT="9001", OMP_NUM_THREADS="5")
    assert result.returncode == 0, result.stderr
    assert tree.arguments[:2] == ["-np", "3"]
    assert tree.arguments[-2:] == ["--port", "9001"]
    assert tree.environment["OMP_NUM_THREADS"] == "5"


def test_cores_are_shared_out(tree):
    tree.fake("nproc", "#!/bin/sh\necho 8\n")
    tree.fake("lscpu", "#!/bin/sh\nseq 1 8\n")
    result = tree.run("run_demo.sh", NUM_RANKS="2")
    cores = int(re.search(r"on (\d+) core", result.stderr)[1])
    assert 1 <= cores <= 8  # a container's quota may lower it
    assert int(tree.environment["OMP_NUM_THREADS"]) == max(1, cores // 2)


def test_each_memory_node_gets_a_rank(tree):
    """Ranks find their cores by themselves."""
    for nodes, ranks in ((1, 2), (2, 2), (4, 4)):
        tree.fake("lscpu", f"#!/bin/sh\nseq 1 {nodes}\n")
        tree.run("run_demo.sh")
        assert tree.arguments[:3] == ["-np", str(ranks), "--prepend-rank"]
    tree.run("run_demo.sh", NUM_RANKS="2")
    assert tree.arguments[:2] == ["-np", "2"]


def test_exit_code_of_the_group_is_the_script_s(tree):
    assert tree.run("run_demo.sh", FAKE_EXIT="7").returncode == 7


def test_bad_settings_and_missing_model_are_one_line(tree):
    for name, value in (("NUM_RANKS", "two"), ("PORT", "abc"), ("PORT", "70000")):
        bad = tree.run("run_demo.sh", **{name: value})
        assert (bad.returncode, len(bad.stderr.splitlines())) == (2, 1)
        assert name in bad.stderr and value in bad.stderr
    (tree.root / "demo_model" / "config.json").unlink()
    gone = tree.run("run_demo.sh")
    assert (gone.returncode, len(gone.stderr.splitlines())) == (2, 1)
    assert "demo_model" in gone.stderr


def test_dry_run_only_shows_the_command(tree):
    result = tree.run("run_demo.sh", DRY_RUN="1")
    assert result.returncode == 0
    assert "serving.py --repo-id-or-model-path demo_model" in result.stderr
    assert not (tree.record / "arguments").exists()


def test_requirements_that_cannot_be_installed_end_in_one_line_of_ours(fresh_tree):
    (fresh_tree.root / "requirements.txt").write_text("./no-such-folder\n")
    result = fresh_tree.run("run_demo.sh")
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("ERROR: pip could not install")
    assert not list(fresh_tree.venv.glob(".installed-*"))


def test_an_old_pip_is_replaced_or_named(fresh_tree):
    (fresh_tree.venv / "bin").mkdir(parents=True)
    python = fresh_tree.venv / "bin" / "python"
    python.write_text(OLD_PIP)
    python.chmod(0o755)
    result = fresh_tree.run("run_demo.sh")
    assert result.returncode == 2
    assert "installing a newer pip, since 19.2.3 is too old" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("ERROR: pip could not install")


def test_what_pip_waits_for_is_told_line_by_line(fresh_tree):
    """No carriage return where there is no terminal to draw on."""
    (fresh_tree.venv / "bin").mkdir(parents=True)
    python = fresh_tree.venv / "bin" / "python"
    python.write_text(SLOW_PIP)
    python.chmod(0o755)
    result = fresh_tree.run("run_demo.sh")
    assert result.returncode == 0, result.stderr
    assert "    Downloading something.whl (1 kB), 3 s" in result.stderr.splitlines()
    assert "\r" not in result.stderr


OLD_PIP = """#!/bin/sh
[ "$3" = --version ] && { echo "pip 19.2.3 from here"; exit; }
[ "$3" = install ] && { echo "no network" >&2; exit 1; }
echo Python 3.11.7
"""
SLOW_PIP = """#!/bin/sh
[ "$3" = --version ] && { echo "pip 24.0 from here"; exit; }
[ "$3" = install ] && { echo "  Downloading something.whl (1 kB)"; sleep 4; exit; }
echo Python 3.11.7
"""
FAKE_PYTHON = """#!/bin/sh
[ "$2" = pytest ] && {{ echo "$@" >"$RECORD/pytest"; exit {status}; }}
exec {python} "$@"
"""


def make_test_venv(tree, folder: Path, status: int) -> Path:
    """An environment in which pytest only notes its arguments and exits."""
    venv = folder / "venv"
    (venv / "bin").mkdir(parents=True)
    for tool in ("wrk", "jq", "curl"):
        tree.fake(tool, "#!/bin/sh\n")
    python = venv / "bin" / "python"
    python.write_text(FAKE_PYTHON.format(status=status, python=tree.venv / "bin" / "python"))
    python.chmod(0o755)
    return venv


@pytest.mark.parametrize(("status", "message"), [(5, "no test at all"), (1, "FAILED")])
def test_run_tests_fails_with_pytest(tree, tmp_path, status, message):
    """An empty run (pytest's exit code 5) counts as a failure like any other."""
    venv = make_test_venv(tree, tmp_path, status)
    result = tree.run("run_tests.sh", VENV=str(venv))
    assert result.returncode == status
    assert message in result.stderr
    assert "passed" not in result.stderr


def test_run_tests_with_ipex_llm_has_an_environment_of_its_own(tree, tmp_path):
    venv = make_test_venv(tree, tmp_path, 0)
    for path in ("tests/low_bit", "tests/model"):
        (tree.root / path).mkdir(parents=True)
    first = tree.run("run_tests.sh", "--ipex-llm", "-x", IPEX_LLM_VENV=str(venv))
    assert first.returncode == 0, first.stderr
    serving, testing = (
        first.stderr.index(f"installing requirements/{name}.txt") for name in ("ipex-llm", "dev")
    )
    assert serving < testing
    assert "tests with ipex-llm: passed" in first.stderr
    words = (tree.record / "pytest").read_text().split()
    assert {"tests/layers", "tests/model/test_save.py", "tests/ranks/test_ipex_llm.py"} < set(words)
    assert words[-1] == "-x"
    second = tree.run("run_tests.sh", "--ipex-llm", "tests/model", IPEX_LLM_VENV=str(venv))
    assert "installing" not in second.stderr
    words = (tree.record / "pytest").read_text().split()
    assert [word for word in words if word.startswith("tests")] == ["tests/model"]
