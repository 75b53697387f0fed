"""What a model is built with: nothing of torch's compiler, which still can be had."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.ranks.test_families import IS_TRANSFORMERS_4

ROOT = Path(__file__).parents[2]

PROGRAM = """
import sys
import torch
from autotp_serving.config import ServingConfig
from autotp_serving.model.build import build_on_meta
from autotp_serving.model.loader import read_model_config
config = read_model_config(ServingConfig(model_path="demo_model"))
build_on_meta(config, torch.bfloat16, False)
assert not {"torch._dynamo", "torch._inductor"} & {*sys.modules}
double = torch.compile(lambda x: 2 * x, backend="eager")
assert double(torch.ones(2)).tolist() == [2, 2]
assert torch._dynamo.config.recompile_limit > 0
"""


@pytest.mark.skipif(IS_TRANSFORMERS_4, reason="it imports the compiler in other ways")
def test_a_model_is_built_without_the_compiler() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
