"""The cpu image, made step by step from docker/Dockerfile, and used as the vLLM guide has it.

Takes ten minutes and 3 GB, so only `bash run_tests.sh --deploy` asks for it.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deploy.image import Container, Image, find_obstacle

OBSTACLE = find_obstacle()
pytestmark = [
    pytest.mark.skipif("TEST_IMAGE" not in os.environ, reason="bash run_tests.sh --deploy"),
    pytest.mark.skipif(OBSTACLE is not None, reason=str(OBSTACLE)),
    pytest.mark.timeout(3600),
]

SEED_CURL = """
curl http://localhost:8000/v1/completions \\
-H "Content-Type: application/json" \\
-d '{
  "model": "YOUR_MODEL",
  "prompt": "San Francisco is a",
  "max_tokens": 128,
  "temperature": 0
}' | jq '.choices[0].text'
"""
USER = 10001
MODEL_NAME = "Llama-2-7b-chat-hf"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    made = Image(tmp_path_factory.mktemp("image") / "root")
    made.build("cpu", print)
    return made


@pytest.fixture
def container(image: Image) -> Iterator[Container]:
    """`docker run -itd --net=host -v .../models:/llm/models --shm-size=16g IMAGE`."""
    started = image.container(mounts={ROOT / "demo_model": f"/llm/models/{MODEL_NAME}"})
    yield started
    started.kill()


def test_the_guides_steps_work_as_they_are_written(container: Container, tmp_path: Path) -> None:
    """Start, look around, set model and name, serve, ask, measure."""
    assert container.exec("id", "-u").stdout.strip() == str(USER)
    listed = container.exec("ls", "/llm").stdout.split()
    assert {"start-vllm-service.sh", "vllm_offline_inference.py", "payload-1024.lua"} <= set(listed)
    changes = [
        ("model", f"/llm/models/{MODEL_NAME}", "start-vllm-service.sh"),
        ("served_model_name", MODEL_NAME, "start-vllm-service.sh"),
    ]
    for name, value, script in changes:
        done = container.exec("sed", "-i", f's#^{name}=.*#{name}="{value}"#', f"/llm/{script}")
        assert done.returncode == 0, done.stderr

    log = tmp_path / "service.log"
    service = container.exec_detached("bash", "/llm/start-vllm-service.sh", log=log)
    deadline = time.monotonic() + 900.0
    while "Application startup complete." not in log.read_text(errors="replace"):
        assert service.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(1.0)

    done = container.exec("bash", "-c", SEED_CURL.replace("YOUR_MODEL", MODEL_NAME))
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)) > 20, done.stdout
    users = container.users()
    assert any("serving.py" in words for words in users)
    assert set(users.values()) == {USER}, users

    payload = "/llm/payload-1024.lua"
    container.exec(
        "sed", "-i", f's#^local model = "demo_model"#local model = "{MODEL_NAME}"#', payload
    )
    container.exec("sed", "-i", "s#^local max_tokens = 128#local max_tokens = 2#", payload)
    words = (
        "wrk -t1 -c1 -d10s -s payload-1024.lua http://localhost:8000/v1/completions --timeout 2m"
    )
    done = container.exec("bash", "-c", f"cd /llm && {words}")
    assert re.search(r"[1-9]\d* requests in", done.stdout), done.stdout + done.stderr
    assert "Non-2xx" not in done.stdout, done.stdout

    for name in ("vllm_offline_inference.py", "benchmark_vllm_throughput.py"):
        done = container.exec("python", f"/llm/{name}", "--help")
        assert done.returncode == 0 and "is a link to" in done.stderr, done.stderr
    done = container.exec("python", "/llm/vllm_offline_inference.py")
    assert done.returncode == 0 and "What is AI?" in done.stdout, done.stderr


def test_a_container_that_serves_is_healthy_and_drains_when_stopped(image: Image) -> None:
    """Two ranks, as `docker run -e TENSOR_PARALLEL_SIZE=2 IMAGE bash /llm/start-service.sh` starts
    them; then `docker stop` under way of an answer.
    """
    settings = {"TENSOR_PARALLEL_SIZE": "2"}
    served = image.container("bash", "/llm/start-service.sh", variables=settings)
    try:
        served.wait_healthy()
        assert "WARNING" not in served.log, "sums do not go through shared memory"
        body = '{"prompt": "What is AI?", "n_predict": 200, "ignore_eos": true}'
        header = "Content-Type: application/json"
        words = f"curl -sN localhost:8000/generate_stream -H '{header}' -d '{body}'"
        log = Path(image.folder.parent) / "stream.log"
        stream = served.exec_detached("bash", "-c", words, log=log)
        deadline = time.monotonic() + 60.0
        while log.read_bytes().count(b"\n") < 5:
            assert time.monotonic() < deadline, served.log
            time.sleep(0.05)
        assert served.stop(60.0) == 0, served.log
        assert stream.wait(10.0) == 0
        last = json.loads(log.read_text().splitlines()[-1])
        assert (last["index"], last["finish_reason"]) == (200, "length")
    finally:
        served.kill()
