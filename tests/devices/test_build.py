"""A build that dies must not stop later starts: the locks around compiled code."""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from pathlib import Path

import pytest

from autotp_serving.devices import build
from autotp_serving.devices.build import BuildError, find_reason, hold_build_lock

HOLDER = """
import sys, time
from pathlib import Path
from autotp_serving.devices import build
from autotp_serving.devices.build import BuildError, find_reason, hold_build_lock
with hold_build_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def hold_elsewhere(folder: Path, seconds: float) -> subprocess.Popen[str]:
    """Another process that has the lock."""
    command = [sys.executable, "-c", HOLDER, str(folder), str(seconds)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    return holder


def test_the_lock_that_a_killed_build_of_torch_left_behind_is_removed(tmp_path: Path) -> None:
    """Torch's extension builder would wait on it for ever, and so would every later start."""
    from torch.utils.file_baton import FileBaton

    folder = tmp_path / "extension"
    folder.mkdir()
    assert FileBaton(str(folder / "lock")).try_acquire()
    assert not FileBaton(str(folder / "lock")).try_acquire(), "torch's lock has changed"
    with hold_build_lock(folder):
        baton = FileBaton(str(folder / "lock"))
        assert baton.try_acquire()
        baton.release()


def test_a_killed_holder_frees_the_lock(tmp_path: Path) -> None:
    holder = hold_elsewhere(tmp_path / "extension", 600)
    holder.kill()
    holder.wait()
    with hold_build_lock(tmp_path / "extension"):
        pass


def test_builds_of_one_folder_wait_for_each_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A lock file that is there is in use, and stays, until its holder is done."""
    caplog.set_level(logging.INFO)
    started = time.monotonic()
    holder = hold_elsewhere(tmp_path / "extension", 1.0)
    with hold_build_lock(tmp_path / "other"):
        assert holder.poll() is None
    assert caplog.messages == []
    with hold_build_lock(tmp_path / "extension"):
        assert time.monotonic() - started >= 1.0
    assert caplog.messages == ["Waiting for another process that compiles extension"]
    assert holder.wait(10) == 0


def test_the_reason_is_the_compiler_s_own() -> None:
    output = "[1/2] c++ -c x.cpp\nx.cpp:1:5: error: no such thing\ncollect2: error: ld returned 1\n"
    assert find_reason(output) == "x.cpp:1:5: error: no such thing"
    linker = "/usr/bin/ld: cannot find b/libgomp.so.1\ncollect2: error: ld returned 1 exit status\n"
    assert find_reason(linker) == "/usr/bin/ld: cannot find b/libgomp.so.1"
    assert find_reason("") == "no reason given"


def test_a_failed_build_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the source, the compiler or the file that remembers it goes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a cache"))
    source = tmp_path / "own" / "broken.cpp"
    source.parent.mkdir()
    source.write_text("int f() { return missing; }\n")
    runs: list[str] = []
    compile_really = build._compile

    def count(name: str, command: list[str], library: Path) -> None:
        runs.append(name)
        compile_really(name, command, library)

    monkeypatch.setattr(build, "_compile", count)
    for _ in range(2):
        with pytest.raises(BuildError, match="missing"):
            build.build_library("broken", source, ())
    assert runs == ["broken"]
    source.write_text("int f() { return 1; }\n")
    assert build.build_library("broken", source, ()).exists()


def test_torch_s_openmp_is_found_beside_others() -> None:
    """The one in use, whatever was loaded before or after; the environment's path has a blank."""
    site = "/home/me/a b/site-packages"
    maps = "".join(
        f"7f00-7f01 r-xp 00000000 08:01 {number} {site}/{name}\n"
        for number, name in enumerate(
            ("sentencepiece.libs/libgomp-6a29c32d.so.1.0.0", "torch/lib/libgomp.so.1")
        )
    )
    found = build.find_openmp(f"7f00-7f01 rw-p 00000000 00:00 0\n{maps}", Path(f"{site}/torch"))
    assert found == Path(f"{site}/torch/lib/libgomp.so.1")
    assert build.find_openmp("", Path("/torch")) is None
