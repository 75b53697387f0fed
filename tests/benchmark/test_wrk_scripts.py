"""Both wrk scripts: their bodies, and errors that show in wrk's own summary."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.benchmark.fake_server import FakeServer

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(
    shutil.which("wrk") is None, reason="wrk is not installed: apt-get install wrk"
)


def wrk(script, url, cwd, *, connections=2, timeout="1m"):
    """Run wrk the way that the documentation does, for one second."""
    command = ["wrk", f"-t{connections}", f"-c{connections}", "-d1s", "-s", script, url]
    result = subprocess.run(
        [*command, "--timeout", timeout], cwd=cwd, capture_output=True, text=True, timeout=60
    )
    return result.stdout + result.stderr


def test_native_script():
    with FakeServer(first_delay=0.01) as server:
        out = wrk("./wrk_script_1024.lua", f"{server.url}/generate/", ROOT)
        bodies = server.bodies
        lengths = {len(server.tokenizer.encode(body["prompt"])) for body in bodies}
    assert set(bodies[0]) == {"prompt", "n_predict", "ignore_eos"}
    assert (bodies[0]["n_predict"], bodies[0]["ignore_eos"]) == (128, True)
    assert (ROOT / "prompt" / "1024.txt").read_text().strip() in bodies[0]["prompt"]
    assert min(lengths) > 800
    assert len({body["prompt"] for body in bodies}) == len(bodies)  # nothing comes from a cache
    assert re.search(r"Not 2xx: +0\n", out)
    assert "connect 0, read 0, write 0, timeout 0" in out
    assert "NOT A CLEAN RUN" not in out
    assert abs(int(re.search(r"Answered: +(\d+)", out)[1]) - len(bodies)) <= 2


def test_openai_script_from_another_folder(tmp_path):
    with FakeServer(first_delay=0.01) as server:
        out = wrk(ROOT / "payload-1024.lua", f"{server.url}/v1/completions", tmp_path)
        body = server.bodies[0]
    assert body["model"] == "demo_model"
    assert body["max_tokens"] == 128
    assert body["use_beam_search"] is False
    assert body["stream"] is False
    assert body["ignore_eos"] is True
    answered = int(re.search(r"Answered: +(\d+)", out)[1])
    assert int(re.search(r"Output tokens: +(\d+)", out)[1]) == 128 * answered
    assert "NOT A CLEAN RUN" not in out


@pytest.mark.parametrize(
    ("fault", "sign"),
    [("http500", r"First of them: +500 .*out of luck"), ("hangup", r"read [1-9]")],
)
def test_errors_show_in_the_summary(fault, sign):
    def every_third(number):
        return fault if number % 3 == 0 else None

    with FakeServer(fault=every_third, first_delay=0.01) as server:
        out = wrk("wrk_script_1024.lua", f"{server.url}/generate/", ROOT)
    assert re.search(sign, out), out
    assert "NOT A CLEAN RUN" in out


def test_a_server_that_never_answers_does_not_look_fine():
    """wrk's own summary shows no error here: it counts a timeout only when an answer comes late."""
    with FakeServer(first_delay=3600) as server:
        out = wrk("wrk_script_1024.lua", f"{server.url}/generate/", ROOT, timeout="1s")
    assert re.search(r"Answered: +0 ", out), out
    assert "NOT A CLEAN RUN: nothing was answered" in out
