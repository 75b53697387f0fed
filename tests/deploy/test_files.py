"""The files of docker/ and deploy/: whole, consistent with the server, and right to their checkers.

Checkers that are not installed are skipped by name; `bash run_tests.sh --deploy` installs them.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from autotp_serving.api.api_keys import ENVIRONMENT_NAME
from autotp_serving.config import ServingConfig
from tests.deploy.dockerfile import list_context, list_steps, read_pairs, read_stages, read_words

ROOT = Path(__file__).parents[2]
DOCKER, DEPLOY = ROOT / "docker", ROOT / "deploy"
TARGETS = ("cpu", "xpu", "cuda")
OVERLAYS = ("cpu", "intel-gpu", "nvidia")
SEED_NAMES = {  # the vLLM guide's, and what they stand for
    "start-vllm-service.sh": "start-service.sh",
    "vllm_offline_inference.py": "examples/offline_inference.py",
    "benchmark_vllm_throughput.py": "benchmarks/throughput.py",
}
STAGES = read_stages(DOCKER / "Dockerfile")
SECONDS = {"s": 1, "m": 60}


def run_checker(*words: str) -> str:
    """What a checker printed; the test is skipped where it is not installed."""
    if shutil.which(words[0]) is None:
        pytest.skip(f"{words[0]} is not installed")
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def words_of(target: str, word: str) -> list[str]:
    """The texts of all steps of a kind, inherited ones included."""
    return [step.text for step in list_steps(STAGES, target)[1] if step.word == word]


def seconds(text: str) -> int:
    return int(text[:-1]) * SECONDS[text[-1]]


def render(overlay: str) -> dict[str, dict[str, Any]]:
    """The manifests of an overlay by kind."""
    text = run_checker("kubectl", "kustomize", f"deploy/kubernetes/{overlay}")
    return {item["kind"]: item for item in yaml.safe_load_all(text)}


def test_hadolint_has_nothing_to_say() -> None:
    run_checker("hadolint", "docker/Dockerfile")


@pytest.mark.parametrize("target", TARGETS)
def test_bases_and_packages_are_pinned(target: str) -> None:
    base, _ = list_steps(STAGES, target)
    tag = base.partition("@")[0].rpartition(":")[2]
    assert re.search(r"\d{8}|\d+\.\d+\.\d+", tag), base
    for text in words_of(target, "RUN"):
        for package in re.findall(r"^\s+([a-z][\w.+-]*)(=?)", text.partition("&& rm")[0], re.M):
            assert package[1] == "=", f"{package[0]} is not pinned"
        for words in re.findall(r"pip install (.*?)(?: *&&|$)", text):
            assert re.search(r"torch==\d|-r /tmp/(requirements|xpu)", words), words


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_waits_drains_and_is_watched(target: str) -> None:
    entry = read_words(words_of(target, "ENTRYPOINT")[-1])
    assert entry[:2] == ["/usr/bin/tini", "--"]
    assert read_words(words_of(target, "CMD")[-1]) == ["/bin/bash"]
    check = read_words(words_of(target, "HEALTHCHECK")[-1].partition("CMD ")[2])
    assert "/health" in check[-1] and "${PORT:-8000}" in check[-1]
    if target == "xpu":  # starts as root for the card's group, and leaves it at once
        assert entry[2:] == ["/usr/local/bin/as-llm"]
        assert "setpriv --reuid llm" in (DOCKER / "as-llm").read_text()
        assert read_pairs(words_of(target, "ENV")[-1])["SERVICE_USER_COMMAND"] == entry[2]
    else:
        assert words_of(target, "USER") == ["10001"]


def test_what_the_image_needs_is_in_the_context_and_nothing_else() -> None:
    names = {str(path) for path in list_context(ROOT)}
    assert {
        "serving.py",
        "start-service.sh",
        "examples/offline_inference.py",
        "payload-1024.lua",
    } <= names
    assert {
        "autotp_serving/api/static/chat.html",
        "demo_model/config.json",
        "prompt/1024.txt",
    } <= names
    assert {f"docker/llm/{name}" for name in SEED_NAMES} <= names
    tops = {name.partition("/")[0] for name in names}
    assert not tops & {"tests", "docs", "deploy", ".git", ".venv", ".ci", "tools", "benchmark.json"}
    assert not any("__pycache__" in name or "/training/" in name for name in names)
    scripts = {name for name in names if name.endswith(".py") and "/" not in name}
    git = subprocess.run(["git", "ls-files", "*.py"], capture_output=True, text=True, cwd=ROOT)
    tracked = {name for name in git.stdout.split() if "/" not in name}
    assert tracked <= scripts, "a new script is missing from .dockerignore"


@pytest.mark.parametrize(("name", "real"), SEED_NAMES.items())
def test_the_guides_names_lead_to_our_scripts_and_say_so(name: str, real: str) -> None:
    assert (ROOT / real).exists()
    assert f"{name} is a link to {real}" in (DOCKER / "llm" / name).read_text()


def test_the_guides_service_script_starts_ours_with_its_model_and_name(tmp_path: Path) -> None:
    """A reader of the guide changes these two lines of it."""
    text = (DOCKER / "llm" / "start-vllm-service.sh").read_text()
    text = re.sub(r"^model=.*", 'model="/llm/models/Qwen1.5"', text, flags=re.M)
    text = re.sub(r"^served_model_name=.*", 'served_model_name="Qwen1.5"', text, flags=re.M)
    (tmp_path / "start-vllm-service.sh").write_text(text)
    (tmp_path / "start-service.sh").write_text('echo "$MODEL $SERVED_MODEL_NAME $*"\n')
    done = subprocess.run(
        ["bash", str(tmp_path / "start-vllm-service.sh"), "--max-num-seq", "4"],
        capture_output=True, text=True, cwd="/",
    )  # fmt: skip
    assert done.stdout == "/llm/models/Qwen1.5 Qwen1.5 --max-num-seq 4\n", done.stderr


def test_compose_has_a_profile_for_each_target() -> None:
    document = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    assert set(document["services"]) == set(TARGETS)
    settings = set(re.findall(r"\$\{([A-Z_]+):-", (ROOT / "start-service.sh").read_text()))
    for target, service in document["services"].items():
        assert service["profiles"] == [target] and service["build"]["target"] == target
        assert seconds(service["stop_grace_period"]) > ServingConfig(model_path="x").drain_seconds
        assert set(service["environment"]) <= settings, "start-service.sh does not read it"
        assert not re.search(r"_KEY|PASSWORD|SECRET", str(service))
    has_plugin = shutil.which("docker") and not subprocess.call(
        ["docker", "compose", "version"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    run_checker(
        *(["docker", "compose"] if has_plugin else ["docker-compose"]), "-f", "docker/compose.yaml",
        *(word for target in TARGETS for word in ("--profile", target)), "config", "--quiet",
    )  # fmt: skip


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_manifests_render_and_fit_the_servers_habits(overlay: str) -> None:
    kinds = render(overlay)
    pod = kinds["Deployment"]["spec"]["template"]["spec"]
    container = pod["containers"][0]
    assert container["startupProbe"]["httpGet"]["path"] == "/health"
    assert container["livenessProbe"]["httpGet"]["path"] == "/health"
    assert container["readinessProbe"]["httpGet"]["path"] == "/ready"
    drain = ServingConfig(model_path="x").drain_seconds
    sleep = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] > sleep + drain
    settings = set(re.findall(r"\$\{([A-Z_]+):-", (ROOT / "start-service.sh").read_text()))
    assert {item["name"] for item in container["env"]} <= settings | {ENVIRONMENT_NAME}
    mounts = {item["mountPath"]: item["name"] for item in container["volumeMounts"]}
    volumes = {item["name"]: item for item in pod["volumes"]}
    assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
    labels = kinds["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert kinds["Service"]["spec"]["selector"].items() <= labels.items()
    selected = kinds["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"]
    assert selected.items() <= labels.items()
    limits = container["resources"]["limits"]
    card = {"intel-gpu": "gpu.intel.com/i915", "nvidia": "nvidia.com/gpu"}.get(overlay)
    assert card is None or limits[card] == "1"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_manifests_obey_the_schemas_of_kubernetes(overlay: str, tmp_path: Path) -> None:
    rendered = tmp_path / "rendered.yaml"
    rendered.write_text(run_checker("kubectl", "kustomize", f"deploy/kubernetes/{overlay}"))
    assert "passed" in run_checker("kubernetes-validate", "--strict", str(rendered))


def test_the_monitor_watches_a_port_that_the_service_has() -> None:
    monitor = render("monitoring")["ServiceMonitor"]["spec"]
    service = render("cpu")["Service"]
    assert monitor["endpoints"][0]["port"] in {port["name"] for port in service["spec"]["ports"]}
    labels = service["metadata"]["labels"]
    assert monitor["selector"]["matchLabels"].items() <= labels.items()


def test_the_unit_leaves_time_to_drain_and_signals_mpirun_alone() -> None:
    text = (DEPLOY / "autotp-serving.service").read_text()
    stop = int(re.search(r"^TimeoutStopSec=(\d+)", text, re.M)[1])
    assert stop > ServingConfig(model_path="x").drain_seconds
    assert "KillMode=mixed" in text
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    done = subprocess.run(
        ["systemd-analyze", "verify", str(DEPLOY / "autotp-serving.service")],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and not done.stderr.strip(), done.stderr
