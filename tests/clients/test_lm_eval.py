"""lm-eval's `local-completions` against two ranks: its loglikelihoods are those of transformers."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients.conftest import DEMO, KEY, SERVER_PYTHON, launch_demo
from tests.live.launch import ROOT, Launch

pytest.importorskip("lm_eval", reason="no lm-eval here")

NUM_ITEMS = 6

TASK = """\
task: dictionary
dataset_path: json
dataset_kwargs: {data_files: {test: ITEMS}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: gold
target_delimiter: ""
metric_list: [{metric: acc}]
"""

# Largest difference allowed: of a whole loglikelihood in float32; of the mean over its tokens in
# bfloat16, where logits near 20 lie 0.125 apart and two ranks add up in another order.
FLOAT32_NOISE = 0.0005
BFLOAT16_NOISE = 0.05


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions with their answer among three others."""
    folder = tmp_path_factory.mktemp("task")
    rng = random.Random(1)
    sample = json.loads((DEMO / "recall_sample.json").read_text())["random"][:NUM_ITEMS]
    lines = []
    for entry in sample:
        others = rng.sample([one for one in sample if one is not entry], 3)
        choices = [f" {one['answer']}" for one in (entry, *others)]
        right = choices[0]
        rng.shuffle(choices)
        lines.append({"question": entry["question"], "choices": choices,
                      "gold": choices.index(right)})  # fmt: skip
    path = folder / "items.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "task.yaml").write_text(TASK.replace("ITEMS", str(path)))
    return path


@pytest.fixture
def float32_server(tmp_path: Path) -> Iterator[Launch]:
    """Rounding is no excuse here."""
    launch = launch_demo(tmp_path / "log", "--dtype", "float32")
    try:
        yield launch.wait_ready()
    finally:
        launch.clean_up()


@pytest.mark.parametrize(
    ("dtype", "fixture"), [("float32", "float32_server"), ("bfloat16", "demo_server")]
)
def test_loglikelihoods_equal_those_of_transformers(
    items: Path, dtype: str, fixture: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = items.parent
    url = request.getfixturevalue(fixture).url
    model = f"model=demo_model,base_url={url}/v1/completions,tokenizer={DEMO}"
    home = {name: str(tmp_path / name) for name in ("HF_HOME", "HF_DATASETS_CACHE")}
    run = subprocess.run(
        [sys.executable, "-m", "lm_eval", "run", "--model", "local-completions",
         "--model_args", f"{model},add_bos_token=True,num_concurrent=4,max_retries=1",
         "--include_path", str(folder), "--tasks", "dictionary", "--log_samples",
         "--output_path", str(tmp_path / "out")],
        env=os.environ | home | {"HF_HUB_OFFLINE": "1", "OPENAI_API_KEY": KEY},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    (samples,) = (tmp_path / "out").rglob("samples_*.jsonl")
    told = {one["doc_id"]: one["resps"] for one in map(json.loads, samples.open())}
    reference = subprocess.run(
        [SERVER_PYTHON, "-m", "tests.clients.loglikelihoods", str(DEMO), dtype, str(items)],
        cwd=ROOT, capture_output=True, text=True, check=True, timeout=300,
    )  # fmt: skip
    expected = json.loads(reference.stdout)
    assert len(told) == len(expected) == NUM_ITEMS
    for number, choices in enumerate(expected):
        for ((value, is_greedy),), (loglikelihood, same, num_tokens) in zip(
            told[number], choices, strict=True
        ):
            assert is_greedy == str(same)
            difference = abs(float(value) - loglikelihood)
            if dtype == "float32":
                assert difference < FLOAT32_NOISE
            else:
                assert difference / num_tokens < BFLOAT16_NOISE
    (results,) = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(results.read_text())["results"]["dictionary"]["acc,none"] == 1.0
