"""examples/offline_inference.py under the name that the vLLM guide gives it."""

import runpy
import sys
from pathlib import Path

print("vllm_offline_inference.py is a link to examples/offline_inference.py", file=sys.stderr)
runpy.run_path(str(Path(__file__).with_name("examples/offline_inference.py")), run_name="__main__")
