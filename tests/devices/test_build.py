"""A build that dies must not stop later starts: the locks around compiled code."""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from pathlib import Path

import pytest

from autotp_serving.devices.build import hold_build_lock

HOLDER = """
import sys, time
from pathlib import Path
from autotp_serving.devices.build import hold_build_lock
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
