"""The CPU device: what torch keeps of the steps it has run stays bounded."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from autotp_serving.devices.cpu import PRODUCT_CACHES, CpuDevice

# Products of 200 numbers of tokens, as a server's steps have them; prints MiB grown.
PROGRAM = """
import os, torch
from pathlib import Path
from autotp_serving.devices.cpu import CpuDevice

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20


CpuDevice(0)
torch.set_num_threads(1)
weights = [torch.randn(rows, 256).bfloat16() for rows in (256, 384, 512)]
with torch.inference_mode():
    torch.nn.functional.linear(torch.randn(1, 256).bfloat16(), weights[0])
    before = resident()
    for tokens in range(1, 201):
        for weight in weights:
            torch.nn.functional.linear(torch.randn(tokens, 256).bfloat16(), weight)
print(resident() - before)
"""


def test_memory_does_not_grow_with_every_new_number_of_tokens() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120, check=True
    )
    assert int(done.stdout) < 200  # about 350 when a product was kept for each


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PRODUCT_CACHES[0], "5")
    monkeypatch.delenv(PRODUCT_CACHES[1], raising=False)
    CpuDevice(0)
    assert os.environ[PRODUCT_CACHES[0]] == "5"
    assert os.environ[PRODUCT_CACHES[1]] == "64"
