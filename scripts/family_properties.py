"""Does a family keep the server's promises, with low-bit weights and long contexts?

    python scripts/family_properties.py                  # the families of today, at 1 and 2 ranks
    python scripts/family_properties.py --only gemma4_text --ranks 2 --folder /tmp/families

Tiny checkpoints are those of family_sweep.py. Asked is of each, with sym_int4 weights: the same
tokens alone and in a batch, after a preemption, with a beginning that another prompt has left in
the cache, from a folder that --save-low-bit wrote, and at any number of ranks; and in float32, the
tokens of transformers behind a prompt of 4,000. Exit code 1: one of them does not hold.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

FAMILIES = (
    *("gemma3_text", "gemma4_text", "gemma4_unified_text", "gpt_oss", "glm4_moe", "deepseek_v2"),
    *("deepseek_v3", "minimax_m2", "llama4_text", "olmo2", "olmo3", "phi3", "smollm3"),
    *("ernie4_5_moe", "hunyuan_v1_dense", "hunyuan_v1_moe", "seed_oss", "qwen3_next", "qwen3_5"),
    *("qwen3_5_moe", "granitemoehybrid", "bamba", "falcon_h1", "nemotron_h", "lfm2", "lfm2_moe"),
    *("olmo_hybrid", "kimi_linear", "deepseek_v32", "glm_moe_dsa", "hy_v4"),
    *("jamba", "minimax"),
)
PROPERTIES = ("batch", "preemption", "prefix", "saved", "ranks", "4,000 tokens")
LONG_LEN, LONG_MAX, MAX_TOKENS = 4000, 4096, 60
BLOCKS = 10
"""Of 16 tokens: fewer than three sequences of up to 85 take."""
POOL_BYTES = 2**25
LOW_BIT = {"low_bit": "sym_int4", "dtype": "float32", "device": "cpu", "max_num_seqs": 3}
PATIENCE = 900.0


def main(argv: list[str] | None = None) -> int:
    """Make, ask at each number of ranks, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=FAMILIES, help="families by model_type")
    parser.add_argument("--folder", type=Path, help="where checkpoints are made, and kept")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--ask", nargs=2, metavar=("FOLDER", "OUT"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.ask:
        return ask(*map(Path, options.ask))
    root = options.folder or Path(tempfile.mkdtemp(prefix="properties"))
    try:
        rows = [check_family(family, root, options.ranks) for family in options.only]
    finally:
        if options.folder is None:
            shutil.rmtree(root, ignore_errors=True)
    print(f"| family | {' | '.join(PROPERTIES)} |\n|---|{'---|' * len(PROPERTIES)}")
    print("\n".join(rows))
    return 1 if any("NO" in row for row in rows) else 0


def check_family(family: str, root: Path, ranks: list[int]) -> str:
    """A row of the table."""
    from scripts.family_sweep import make_all

    folder = root / family
    made = make_all([family], root)[family]
    if not isinstance(made, list):
        return f"| `{family}` | NO tiny model: {made} |"
    lengthen(folder)
    expected = answer_long(folder)
    answers = []
    for num_ranks in ranks:
        out = folder / f"properties{num_ranks}.json"
        out.unlink(missing_ok=True)
        mpirun = Path(sys.executable).with_name("mpirun")
        launcher = [str(mpirun) if mpirun.exists() else "mpirun", "-np", str(num_ranks)]
        words = [sys.executable, __file__, "--ask", str(folder), str(out)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [*launcher, *words], env=environment, capture_output=True, text=True, timeout=PATIENCE
        )
        if not out.exists():
            return f"| `{family}` | NO: {(done.stderr.strip().splitlines() or [''])[-1][:200]} |"
        answers.append(json.loads(out.read_text()))
    alone = [answer["alone"] for answer in answers]
    found = {
        "batch": all(answer["together"] == answer["alone"] for answer in answers),
        "preemption": all(
            answer["preempted"] == answer["alone"] and answer["preemptions"] for answer in answers
        ),
        "prefix": all(answer["again"] == answer["alone"] and answer["hits"] for answer in answers),
        "saved": all(answer["saved"] == answer["alone"] for answer in answers),
        "ranks": all(one == alone[0] for one in alone),
        "4,000 tokens": all(answer["long"] == expected for answer in answers),
    }
    cells = ("yes" if found[name] else "NO" for name in PROPERTIES)
    row = f"| `{family}` | {' | '.join(cells)} |"
    print(row, flush=True)
    return row


def lengthen(folder: Path) -> None:
    """Let the checkpoint's longest sequence be long enough."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.get("text_config", config)["max_position_embeddings"] = LONG_MAX
    path.write_text(json.dumps(config))


def long_prompt() -> list[int]:
    """One of `LONG_LEN` tokens."""
    rng = random.Random(4)
    return [rng.randrange(3, 320) for _ in range(LONG_LEN)]


def answer_long(folder: Path) -> list[list[int]]:
    """What transformers says to the long prompt, in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    # Eager, which knows softcaps and sinks.
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").float()
    prompt = torch.tensor([long_prompt()])
    output = model.eval().generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=8,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return [output[0, LONG_LEN:].tolist()]


def ask(folder: Path, out: Path) -> int:
    """Under mpirun: the family's answers in every situation, as JSON."""
    from autotp_serving import LLM, SamplingParams
    from autotp_serving.config import ServingConfig
    from autotp_serving.distributed.launch import join_group
    from autotp_serving.layers import low_bit_linear
    from autotp_serving.model.loader import read_model_config
    from autotp_serving.model.save import save_low_bit

    # The CPU kernels also round activations, in groups that depend on the number of ranks.
    low_bit_linear.load_library = lambda format: None
    rng = random.Random(5)
    prompts = [[rng.randrange(3, 320) for _ in range(length)] for length in (17, 20, 25)]
    params = SamplingParams(max_tokens=MAX_TOKENS, ignore_eos=True)
    found: dict[str, Any] = {}

    def answer(llm: LLM, prompts: list[list[int]]) -> list[list[int]]:
        return [one.token_ids for one in llm.generate(prompts, params, show_progress=False)]

    def open_model(path: Path, use: Any, **settings: Any) -> None:
        common = LOW_BIT | {"max_num_batched_tokens": 48, "max_model_len": 128}
        try:
            with LLM(str(path), **(common | settings)) as llm:
                use(llm)
        except SystemExit:  # how a rank other than 0 leaves LLM; here it has more to do
            pass

    def use_freely(llm: LLM) -> None:
        found["alone"] = [answer(llm, [prompt])[0] for prompt in prompts]
        found["together"] = answer(llm, prompts)
        found["block_bytes"] = POOL_BYTES // llm._engine.stats().num_blocks

    def use_tightly(llm: LLM) -> None:
        found["preempted"] = answer(llm, prompts)
        found["preemptions"] = llm._engine.stats().num_preemptions

    def use_again(llm: LLM) -> None:
        answer(llm, prompts)
        found["again"] = answer(llm, prompts)
        found["hits"] = llm._engine.stats().num_prefix_hit_tokens

    def use_saved(llm: LLM) -> None:
        found["saved"] = answer(llm, prompts)

    def use_long(llm: LLM) -> None:
        params = SamplingParams(max_tokens=8, ignore_eos=True)
        done = llm.generate([long_prompt()], params, show_progress=False)
        found["long"] = [one.token_ids for one in done]

    open_model(folder, use_freely, enable_prefix_caching=False, kv_cache_memory=POOL_BYTES)
    group = join_group(os.environ)
    block_bytes = group.all_gather(found.get("block_bytes"))[0]
    tight = {"enable_prefix_caching": False, "kv_cache_memory": BLOCKS * block_bytes}
    open_model(folder, use_tightly, **tight)
    open_model(folder, use_again, kv_cache_memory=POOL_BYTES)
    saved = folder.with_name(f"{folder.name}-saved")
    config = ServingConfig(
        str(folder), low_bit="sym_int4", dtype="float32", save_low_bit=str(saved)
    )
    if group.rank == 0:
        shutil.rmtree(saved, ignore_errors=True)
    save_low_bit(config, read_model_config(config), group)
    open_model(saved, use_saved, low_bit=None, kv_cache_memory=POOL_BYTES)
    long = {"low_bit": "bf16", "max_model_len": LONG_MAX, "max_num_batched_tokens": 512}
    open_model(folder, use_long, **long, kv_cache_memory=2**28)
    if group.rank == 0:
        out.write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
