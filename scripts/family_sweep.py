"""Try every decoder family of the installed transformers: equal, or refused by name?

    python scripts/family_sweep.py                     # all of them at 1 and 2 ranks
    python scripts/family_sweep.py --only olmo2 gptj
    python scripts/family_sweep.py --write             # put the table into docs/families.md

For each family a tiny random checkpoint is made, answered by transformers' own generate, one prompt
at a time, and served here in float32, in batches and chunks. That takes about ten minutes of
processor time; what --folder keeps is not made again. Exit code 1: some family was served
wrongly or broke without a line of its own.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
DOCS = ROOT / "docs" / "families.md"
START, END = "<!-- table: scripts/family_sweep.py -->", "<!-- end of table -->"

MAX_TOKENS = 8
PATIENCE = 300.0
MAX_PARAMETERS = 45_000_000
SETTINGS = {
    "low_bit": "bf16",
    "dtype": "float32",
    "device": "cpu",
    "max_num_batched_tokens": 48,
    "max_num_seqs": 3,
    "max_model_len": 128,
    "kv_cache_memory": 32 * 2**20,
}

# What a config calls its sizes, and how small they are made.
SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim"), 128),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 3),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "d_ff"), 256),
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 3),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 256),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 128),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk"), 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"), 512),
    "max_target_positions": 512,
    **dict.fromkeys(("sliding_window", "attention_chunk_size"), 24),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "n_shared_experts"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "v_head_dim"), 32),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "rotary_dim"), 16),
    "head_dim": 32,
    "index_topk": 20,  # fewer than most prompts have
    "index_n_heads": 8,
    "index_head_dim": 32,
    "tie_word_embeddings": False,  # or each token's best successor is itself
    "is_decoder": True,
    "vocab_size": 320,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "vocab_size_per_layer_input": 320,
    "patch_size": 14,
    "image_size": 28,
}

KINDS = ("layer_types", "mlp_layer_types")
"""Settings that name the kind of each layer: a tiny model has all that the default one has."""

SECOND_TRY = {"num_hidden_layers": 4, "num_key_value_heads": 4, "head_dim": 32}

# What the names above do not say of a family.
LATENT = {"head_dim": 16, "rope_interleave": True, "num_key_value_heads": 4}  # keys of every head
QWEN4 = {
    "layer_types": ["linear_attention", "indexed_attention", "linear_attention"],
    **dict.fromkeys(("indexer_n_heads", "indexer_kv_heads"), 1),
    "indexer_head_dim": 32,
    "indexer_budget": 64,
    "indexer_compress_ratio": 8,
}
KIMI_LAYERS = ["linear_attention", "full_attention", "linear_attention"]
LLAMA4 = {
    "num_hidden_layers": 4,
    "attention_chunk_size": 32,
    "intermediate_size_mlp": 256,
    "moe_layers": [1, 3],
    "no_rope_layers": [1, 1, 1, 0],
    "layer_types": ["chunked_attention"] * 3 + ["full_attention"],
    "floor_scale": 16,
    "attn_scale": 0.5,
    "num_experts_per_tok": 1,
}
GEMMA4_UNIFIED = {
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "per_layer_config": {number: {"head_dim": 64} for number in (1, 3, 5)},
}
GEMMA4 = GEMMA4_UNIFIED | {
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 32,
    "use_double_wide_mlp": True,
    "enable_moe_block": True,
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": 128,
}
GEMMA3N = {
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "num_kv_shared_layers": 2,
    "intermediate_size": [256] * 6,
    "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0, 0.0, 0.0],
    "hidden_size_per_layer_input": 32,
    "laurel_rank": 32,
}
EXTRA: dict[str, dict[str, Any]] = {
    **{name: {"head_dim": 32} for name in ("ministral", "hunyuan_v1_dense", "hunyuan_v1_moe")},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    **dict.fromkeys(("deepseek_v3", "youtu", "axk1"), LATENT),
    "deepseek_v2": LATENT | {"num_experts_per_tok": 2, "topk_method": "greedy"},
    "gptj": {"n_inner": None},
    # As many key as value dimensions, or transformers writes its convolutions in wrong parts.
    "olmo_hybrid": {"linear_key_head_dim": 32, "linear_value_head_dim": 32},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 32},
    "granitemoehybrid": {
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "mamba_n_heads": 8,
        "mamba_d_head": 32,
        "shared_intermediate_size": 128,
    },
    **dict.fromkeys(("llama4", "llama4_text"), LLAMA4),
    **dict.fromkeys(("gemma3n", "gemma3n_text"), GEMMA3N),
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"hidden_size": 128, "ffn_hidden_size": 128, "moe_top_k": 2},
    },
    "longcat_flash": {
        "num_layers": 2,
        "head_dim": 16,
        "qk_head_dim": 32,
        "num_key_value_heads": 4,
        "expert_ffn_hidden_size": 128,
        "zero_expert_num": 2,
    },
    **dict.fromkeys(("qwen4_exp", "qwen4_exp_text"), QWEN4),
    "glm_moe_dsa": {"indexer_types": ["full", "shared", "full", "shared"]},
    "dots3_note_text": {"num_key_value_heads": 4},
    "mvp": {"init_std": 0.15},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid", "hybrid"]},
    "xmod": {"default_language": "en_XX"},
    "gpt_neo": {"num_layers": 4, "attention_types": [[["global", "local"], 2]], "window_size": 24},
    "zaya": {"num_experts_per_tok": 1},
    "mamba2": {"num_heads": 8, "head_dim": 32},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": LATENT | {"linear_num_heads": 4, "linear_head_dim": 32},
    "bailing_hybrid": LATENT | {"num_expert_group": 1, "layer_types": KIMI_LAYERS},
    "reformer": {"axial_pos_embds_dim": [32, 96], "axial_pos_shape": [16, 32]},
    **dict.fromkeys(("gemma4", "gemma4_text"), GEMMA4),
    **dict.fromkeys(("gemma4_unified", "gemma4_unified_text"), GEMMA4_UNIFIED),
    "phi3": {"resid_pdrop": 0.0},
    "gemma2": {"query_pre_attn_scalar": 48, "attn_logit_softcapping": 5.0},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 1},
    "qwen3": {"use_sliding_window": True, "max_window_layers": 1},
}

UNTRIED = {
    "blt": "a second model cuts its bytes into patches, over which it attends: a cache of patches",
    "dots3_note": "its text model is `dots3_note_text`, above",
    "emu3": "no class of transformers loads its language model alone: one that does",
    "gemma3n": "its vision tower asks for timm; its text model is `gemma3n_text`, above",
    "gemma4_assistant": "it drafts from the keys and values of a Gemma 4: both in one server",
    "gemma4_unified_assistant": "as `gemma4_assistant`",
    "mllama": "its layers attend to images: a cache of an image's keys and values",
    "musicgen": "its tokens are sound, in several books at once: a head for each",
    "musicgen_melody": "as `musicgen`",
    "prophetnet": "it predicts several tokens at once by streams of attention: its own pass",
    "xlm": "random weights give one answer to every prompt: a real checkpoint",
    "xmod": "random weights give one answer to every prompt: a real checkpoint",
}
"""Families of which no tiny model can be made, why, and what serving or trying them would need."""


def main(argv: list[str] | None = None) -> int:
    """Make, serve, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", help="families by their model_type")
    parser.add_argument("--folder", type=Path, help="where checkpoints are made, and kept")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--write", action="store_true", help=f"put the table into {DOCS.name}")
    parser.add_argument(
        "--serve", nargs=3, metavar=("JOBS", "OUT", "FIRST"), help=argparse.SUPPRESS
    )
    options = parser.parse_args(argv)
    if options.serve:
        return serve(*options.serve)
    root = options.folder or Path(tempfile.mkdtemp(prefix="families"))
    try:
        made = make_all(options.only, root)
        found = {num_ranks: serve_all(made, num_ranks, root) for num_ranks in options.ranks}
    finally:
        if options.folder is None:
            shutil.rmtree(root, ignore_errors=True)
    lines = format_table(made, found)
    print("\n".join(lines))
    if options.write:
        text = DOCS.read_text()
        head, tail = text.split(START)[0], text.split(END)[1]
        DOCS.write_text("\n".join([head + START, *lines, END]) + tail)
    bad = [line for line in lines if "WRONG" in line or "BROKE" in line]
    return 1 if bad else 0


def list_families() -> list[str]:
    """Every model_type that transformers has a decoder for."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def make_all(only: list[str] | None, root: Path) -> dict[str, Any]:
    """Tiny checkpoints and their answers; for a family without, the reason as text."""
    import transformers

    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    made: dict[str, Any] = {}
    for family in only or list_families():
        answers = root / family / "answers.json"
        if not answers.exists():
            found = make_somehow(family, root / family)
            answers.parent.mkdir(parents=True, exist_ok=True)
            answers.write_text(json.dumps(found))
        made[family] = json.loads(answers.read_text())
        print(f"{family}: {'made' if isinstance(made[family], list) else made[family]}", flush=True)
    return made


def make_somehow(family: str, folder: Path) -> list[list[int]] | str:
    """Transformers' answers from the first way to make a tiny model that works."""
    found = ""
    tries = (({}, 1.0), (SECOND_TRY, 1.0), ({}, 4.0), ({}, 16.0), ({}, 64.0))
    for keeps_kinds, (changes, strength) in itertools.product((True, False), tries):
        try:
            found = make_one(family, folder, changes, strength, keeps_kinds)
        except Exception as error:  # whatever a family says of sizes that it does not like
            found = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:150]}"
        if isinstance(found, list):
            break
    return found


def make_one(
    family: str, folder: Path, changes: dict[str, Any], strength: float, keeps_kinds: bool
) -> list[list[int]] | str:
    """Save one family's checkpoint, and return transformers' answers.

    Args:
        changes: of SMALL.
        strength: of the embeddings, without which some models say the same of every prompt.
        keeps_kinds: see `shrink`.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = shrink(AutoConfig.for_model(family), SMALL | changes, keeps_kinds)
    text = settings.get("text_config", settings)
    text |= EXTRA.get(family, {})
    config = AutoConfig.for_model(family, **settings)
    with torch.device("meta"):
        size = sum(value.numel() for value in AutoModelForCausalLM.from_config(config).parameters())
    if size > MAX_PARAMETERS:
        return f"not tiny: {size} parameters"
    torch.manual_seed(sum(family.encode()))
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:  # born as zeros and ones, which hide wrong handling
                parameter.normal_(std=0.3).add_(0.0 if name.endswith("bias") else 1.0)
            elif parameter.std() < 0.1:  # a family that sets its own small numbers
                parameter.normal_(std=0.15)
            if parameter.dim() == 2 and "embed" not in name:
                parameter.div_(strength**0.5)
        model.get_input_embeddings().weight.mul_(strength)
    model.save_pretrained(folder)
    for path in (ROOT / "demo_model").glob("tokenizer*.json"):
        shutil.copy(path, folder)
    try:  # sdpa leaves softcaps out
        model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    except ValueError:
        model = AutoModelForCausalLM.from_pretrained(folder)
    model = model.float().eval()
    answers = []
    for prompt in make_prompts():
        output = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=MAX_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            forced_bos_token_id=None,
            forced_eos_token_id=None,
        )
        answers.append(output[0, len(prompt) :].tolist())
    if len({token for answer in answers for token in answer}) < 6:
        return "answers that prove little"
    return answers


def shrink(config: Any, sizes: dict[str, Any], keeps_kinds: bool) -> dict[str, Any]:
    """Small values for the sizes that a config has, its parts included.

    Args:
        keeps_kinds: all kinds of layers are among the few, by turns.
    """
    found = {}
    settings = config.to_dict()
    for name, value in settings.items():
        if name in config.sub_configs and hasattr(getattr(config, name, None), "to_dict"):
            found[name] = shrink(getattr(config, name), sizes, keeps_kinds)
        elif name in sizes and (value is not None or name.startswith("num_key")):
            found[name] = sizes[name]
        elif name in KINDS:  # by turns, or as the class itself has it
            kinds = list(dict.fromkeys(value or ()))
            count = sizes["num_hidden_layers"]
            found[name] = (kinds * count)[:count] if keeps_kinds and kinds else None
    return found


def make_prompts() -> list[list[int]]:
    """One token, less than a window, more than a window, more than a chunk."""
    rng = random.Random(3)
    return [[rng.randrange(3, 320) for _ in range(length)] for length in (1, 17, 40, 70)]


def serve_all(made: dict[str, Any], num_ranks: int, root: Path) -> dict[str, Any]:
    """Answers of every family that was made, from one program unless a family ends it."""
    families = [family for family, answers in made.items() if isinstance(answers, list)]
    jobs, out = root / "jobs.json", root / f"out{num_ranks}.jsonl"
    jobs.write_text(json.dumps([[family, str(root / family)] for family in families]))
    out.write_text("")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    mpirun = Path(sys.executable).with_name("mpirun")
    launcher = [str(mpirun) if mpirun.exists() else "mpirun", "-np", str(num_ranks)]
    while (done := len(out.read_text().splitlines())) < len(families):
        words = [sys.executable, __file__, "--serve", str(jobs), str(out), str(done)]
        with (root / "log").open("a") as log:
            process = subprocess.Popen(
                [*launcher, *words], env=environment, stdout=log, stderr=log, start_new_session=True
            )
        last, since = done, time.monotonic()
        while process.poll() is None and time.monotonic() - since < PATIENCE:
            time.sleep(0.5)
            count = len(out.read_text().splitlines())
            if count > last:
                last, since = count, time.monotonic()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if (count := len(out.read_text().splitlines())) < len(families):
            with out.open("a") as file:
                file.write(json.dumps([families[count], "BROKE: the program hung or died"]) + "\n")
    return dict(json.loads(line) for line in out.read_text().splitlines())


def serve(jobs: str, out: str, first: str) -> int:
    """Under mpirun: answer the jobs from number `first` on, a line of JSON for each."""
    from autotp_serving import LLM, SamplingParams
    from autotp_serving.config import ConfigError

    params = SamplingParams(max_tokens=MAX_TOKENS, ignore_eos=True)
    is_lead = os.environ.get("PMI_RANK", "0") == "0"
    for family, folder in json.loads(Path(jobs).read_text())[int(first) :]:
        try:
            with LLM(folder, **SETTINGS) as llm:
                completions = llm.generate(make_prompts(), params, show_progress=False)
            found: Any = [item.token_ids for item in completions]
        except ConfigError as error:
            found = f"refused: {error}"
        except SystemExit:  # how a rank other than 0 leaves LLM
            found = None
        except Exception as error:
            found = f"BROKE: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:150]}"
        if is_lead:
            with open(out, "a") as file:
                file.write(json.dumps([family, found]) + "\n")
    return 0


def shorten(line: str) -> str:
    """A refusal without the folder, without the cure and without the family's name once more."""
    line = re.split(": start 1 rank|: it does not belong|: use another|: this architecture", line)[
        0
    ]
    line = re.sub(r"the family '\S+' (cannot be served:? ?)?", "", line)
    line = re.sub(r"\S+/\S+ has no tensor", "no tensor", line)
    return line if len(line) < 150 else f"{line[:150]} ..."


def format_table(made: dict[str, Any], found: dict[int, dict[str, Any]]) -> list[str]:
    """One line a family."""
    heads = [f"{count} rank{'s' if count > 1 else ''}" for count in found]
    lines = ["| family | " + " | ".join(heads) + " |", "|---|" + "---|" * len(heads)]
    counts: collections.Counter[str] = collections.Counter()
    for family, expected in made.items():
        if not isinstance(expected, list):
            counts["not tried"] += 1
            continue
        cells = []
        for answers in found.values():
            answer = answers[family]
            if isinstance(answer, str):
                cells.append(shorten(answer))
            else:
                cells.append("equal" if answer == expected else "WRONG")
        counts[" / ".join(cell.partition(":")[0] for cell in cells)] += 1
        lines.append(f"| `{family}` | " + " | ".join(cells).replace("\n", " ") + " |")
    untried = [family for family, expected in made.items() if not isinstance(expected, list)]
    lines += ["", ", ".join(f"{count} {what}" for what, count in counts.most_common()) + "."]
    if untried:
        lines += ["", "Not tried, with what serving or trying them would need:"]
        for family in untried:
            lines.append(
                f"- `{family}`: {UNTRIED.get(family, 'no tiny model of it could be made')}."
            )
    return lines


if __name__ == "__main__":
    sys.exit(main())
