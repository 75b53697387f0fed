"""What each low-bit format leaves of the demo model: recall and perplexity. One process.

    python scripts/low_bit_recall.py                    print the table of docs/low_bit.md
    python scripts/low_bit_recall.py --write            put it there
    python scripts/low_bit_recall.py --formats bf16 sym_int8 --kv-cache-dtype int8
    CXX=none python scripts/low_bit_recall.py --formats sym_int4    without compiled kernels

Recall: of the 300 random entries of demo_model/recall_sample.json, how many are answered with the
right opening and the first 24 tokens of the definition. Perplexity: per token of the questions and
answers about 50 common words, which the model was trained on, so it is near 1 for weights as they
were. Text that is not from the dictionary means nothing to this model.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from autotp_serving import LLM, SamplingParams  # noqa: E402
from autotp_serving.low_bit.formats import FORMATS, bits_per_weight  # noqa: E402

PAGE = ROOT / "docs" / "low_bit.md"
BEGIN, END = "<!-- table: scripts/low_bit_recall.py -->", "<!-- end of recall table -->"
DEMO = ROOT / "demo_model"
DEFINITION_TOKENS = 24
HEADER = "| format | bits per weight | recall | perplexity |\n|---|---:|---:|---:|"


def measure(low_bit: str | None, folder: Path = DEMO, **settings: Any) -> tuple[float, float]:
    """Recall from 0 to 1 and perplexity of the demo model in a format; `settings` are LLM's.

    Args:
        folder: where the demo model is, or what was made of it.
    """
    entries = json.loads((DEMO / "recall_sample.json").read_text())
    sample = entries["random"]
    texts = [f"{entry['question']} {entry['answer']}" for entry in entries["common"]]
    settings |= {"low_bit": low_bit, "kv_cache_memory": 2**28, "max_num_seqs": 32}
    with LLM(str(folder), **settings) as llm:

        def encode(text: str) -> list[int]:
            return llm.tokenizer.encode(text, add_special_tokens=False)

        heads = [len(encode(f" {entry['head']}")) for entry in sample]
        expected = [
            llm.tokenizer.decode(
                encode(f" {entry['head']} {entry['definition']}")[: head + DEFINITION_TOKENS]
            )
            for entry, head in zip(sample, heads, strict=True)
        ]
        params = [SamplingParams(max_tokens=head + DEFINITION_TOKENS + 2) for head in heads]
        answers = llm.generate([entry["question"] for entry in sample], params)
        num_right = sum(
            answer.text.startswith(text) for answer, text in zip(answers, expected, strict=True)
        )
        scored = llm.generate(texts, SamplingParams(max_tokens=1, prompt_logprobs=0))
    logprobs = [token.logprob for answer in scored for token in answer.prompt_logprobs]
    return num_right / len(sample), math.exp(-sum(logprobs) / len(logprobs))


def main() -> None:
    """Measure each format and print its line when it is known."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--formats", nargs="+", default=["bf16", *FORMATS])
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--write", action="store_true", help="put the table into docs/low_bit.md")
    arguments = parser.parse_args()
    lines = [HEADER]
    for name in arguments.formats:
        recall, perplexity = measure(name, kv_cache_dtype=arguments.kv_cache_dtype)
        bits = bits_per_weight(name)
        lines.append(f"| `{name}` | {bits:g} | {100 * recall:.1f} % | {perplexity:.2f} |")
        print(lines[-1], flush=True)
    if arguments.write:
        before, rest = PAGE.read_text().split(BEGIN)
        table = "\n".join(lines)
        PAGE.write_text(f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
