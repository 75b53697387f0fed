"""The loglikelihoods that transformers gives, by the server's own interpreter.

`python -m tests.clients.loglikelihoods CHECKPOINT DTYPE ITEMS.jsonl` prints a list for each item:
[loglikelihood, whether greedy decoding gives this choice, number of tokens] for each choice.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    """See above."""
    checkpoint, dtype, items = sys.argv[1:]
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=getattr(torch, dtype))
    found = []
    for line in Path(items).read_text().splitlines():
        item = json.loads(line)
        start = len(tokenizer(item["question"])["input_ids"])
        found.append([])
        for choice in item["choices"]:
            tokens = torch.tensor(tokenizer(item["question"] + choice)["input_ids"])
            with torch.inference_mode():
                logits = model(tokens[None]).logits[0, start - 1 : -1].float()
            targets = tokens[start:]
            logprobs = logits.log_softmax(-1).gather(1, targets[:, None])
            is_greedy = bool((logits.argmax(-1) == targets).all())
            found[-1].append([logprobs.sum().item(), is_greedy, len(targets)])
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
