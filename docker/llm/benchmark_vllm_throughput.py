"""benchmarks/throughput.py under the name that the vLLM guide gives it."""

import runpy
import sys
from pathlib import Path

print("benchmark_vllm_throughput.py is a link to benchmarks/throughput.py", file=sys.stderr)
runpy.run_path(str(Path(__file__).with_name("benchmarks/throughput.py")), run_name="__main__")
