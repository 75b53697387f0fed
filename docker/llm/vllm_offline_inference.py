"""examples/offline_inference.py under the name that the vLLM guide gives it."""

import runpy
import sys
from pathlib import Path

print("vllm_offline_inference.py is a link to examples/offline_inference.py", file=sys.stderr)
script = Path(__file__).parent / "examples" / "offline_inference.py"
runpy.run_path(str(script), run_name="__main__")
