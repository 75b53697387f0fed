"""benchmarks/throughput.py under the name that the vLLM guide gives it."""

import runpy
import sys
from pathlib import Path

print("benchmark_vllm_throughput.py is a link to benchmarks/throughput.py", file=sys.stderr)
script = Path(__file__).parent / "benchmarks" / "throughput.py"
runpy.run_path(str(script), run_name="__main__")
