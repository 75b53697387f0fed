"""Answer prompts in a script, without HTTP; every rank runs this same file.

    python examples/offline_inference.py    # the demo model, one process
    mpirun -np 2 python examples/offline_inference.py --model MODEL --low-bit sym_int4

Prompts come from --prompts FILE, one a line; without it, a few samples are answered.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the package is used from this checkout, not installed

from autotp_serving import LLM, SamplingParams  # noqa: E402
from autotp_serving.config import ConfigError  # noqa: E402
from autotp_serving.distributed.launch import GroupFailure, LaunchError  # noqa: E402
from autotp_serving.logs import configure_logging  # noqa: E402
from autotp_serving.request import RequestError  # noqa: E402

SAMPLES = ["What is AI?", "Define dog.", "What does run mean?", "Tell me about the moon."]


def main(argv: list[str] | None = None) -> int:
    """Load, answer, print. Returns the exit code: 2 when it cannot start."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    demo = ROOT / "demo_model"
    parser.add_argument("--model", default=str(demo), help="checkpoint folder (default: demo)")
    parser.add_argument("--low-bit", default="bf16", help="weight format (default: bf16)")
    parser.add_argument("--prompts", type=Path, help="file with one prompt a line")
    parser.add_argument("--max-tokens", type=int, default=64, help="most tokens an answer")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    options = parser.parse_args(argv)
    configure_logging()
    try:
        prompts = options.prompts.read_text().splitlines() if options.prompts else SAMPLES
        params = SamplingParams(max_tokens=options.max_tokens, temperature=options.temperature)
        with LLM(options.model, low_bit=options.low_bit) as llm:
            started = time.perf_counter()
            completions = llm.generate(prompts, params)
            seconds = time.perf_counter() - started
    except (ConfigError, GroupFailure, LaunchError, RequestError, OSError) as error:
        print(f"offline_inference.py: error: {error}", file=sys.stderr)
        return 2
    for prompt, completion in zip(prompts, completions, strict=True):
        print(f"{prompt!r} -> {completion.text!r} ({completion.finish_reason})")
    num_tokens = sum(len(completion.token_ids) for completion in completions)
    print(f"{num_tokens} tokens in {seconds:.2f} s, {num_tokens / seconds:.1f} tokens/s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
