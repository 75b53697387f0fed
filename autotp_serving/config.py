"""Every setting of the server, each default stated once. Same on all ranks, standard library only.

`ServingConfig` is the one frozen record; `command_line` builds the flags from its fields, so a flag
exists if and only if a field does.
"""

from __future__ import annotations

import argparse
import os
import re
from dataclasses import dataclass, field, fields, replace
from typing import Any, get_args

from autotp_serving.structured_output import ReasoningFormat, ToolFormat


class ConfigError(ValueError):
    """A setting that cannot work; its message names the flag and the cure, in one line."""


DEFAULT_LOW_BIT = "sym_int4"

TASKS = ("auto", "generate", "embed", "rerank")

KV_CACHE_DTYPES = ("auto", "int8")

SCHEDULING_POLICIES = ("fcfs", "priority", "strict-priority")

MIN_STEP_TIMEOUT = 1.0
"""On a busy machine a healthy rank may be silent for nearly as long."""

MIN_KEPT_STATES = 4
"""Even a server of one sequence at a time has a few conversations, each with a beginning."""

DEFAULT_NUM_DRAFTS = 4

MAX_SPECULATIVE_TOKENS = 16
"""Longer guesses are hardly ever right to their end."""

MOST_ROWS_WITH_DRAFTS = 64
"""Of a step. In wider ones a row costs so much that guesses hardly pay."""

DEFAULT_OFFLOAD_SIZE = 8 * 2**30
MAX_LORAS, MAX_LORA_RANK = 256, 512

UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def parse_bytes(text: str) -> int:
    """Read '512MiB', '4g', '1.5 GB' or a plain number of bytes; units are powers of 1024."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?\s*", text.lower())
    if match is None:
        raise argparse.ArgumentTypeError(f"'{text}' is not a size: write 512MiB or 4GiB")
    return int(float(match[1]) * UNITS[match[2]])


def setting(
    default: Any,
    text: str,
    *,
    flags: tuple[str, ...] = (),
    parse: Any = None,
    unit: str | None = None,
    secret: bool = False,
    **rest: Any,
) -> Any:
    """Declare a field with its help text and further argparse options.

    A default that is None or empty is explained in the text. `unit` stands for the value in
    --help. What is secret never shows where settings are printed.
    """
    metadata = {"help": text, "flags": flags, "parse": parse, "metavar": unit, **rest}
    return field(default=default, repr=not secret, metadata=metadata)


@dataclass(frozen=True)
class ServingConfig:
    """All settings of one server. Checked at birth; raises ConfigError naming the flag."""

    model_path: str = setting(
        "",
        "folder of a Hugging Face checkpoint, GGUF file, or name of a model on a hub as "
        "organisation/name, for GGUF organisation/name:Q4_K_M; no default, it must be named",
        flags=("--repo-id-or-model-path", "--model"),
        unit="MODEL",
    )
    hub: str = setting(
        "huggingface",
        "where a model that is given by name comes from; modelscope needs its package",
        choices=("huggingface", "modelscope"),
    )
    revision: str | None = setting(
        None,
        "branch, tag or commit of a model that is given by name; default: the hub's main branch",
        parse=str,
        unit="REVISION",
    )
    served_model_name: tuple[str, ...] = setting(
        (),
        "names under which /v1 serves the model; default: its name on the hub, or its folder's",
        parse=str,
        nargs="+",
        unit="NAME",
    )
    any_model_name: bool = setting(
        False,
        "answer requests for models of any other name too, which some clients cannot help sending",
    )
    task: str = setting(
        "auto",
        "what the model is served for: completions, embeddings, or scores of documents; auto: what "
        "its own files say it was made for",
        choices=TASKS,
    )
    low_bit: str | None = setting(
        None,
        f"weight format; bf16 and fp16 leave weights as they are; default: {DEFAULT_LOW_BIT}, or "
        "what a saved low-bit folder holds",
        parse=str,
        unit="FORMAT",
    )
    low_bit_provider: str = setting(
        "auto",
        "who converts and multiplies low-bit weights; auto: native; ipex-llm: see "
        "requirements/ipex-llm.txt",
        choices=("auto", "native", "ipex-llm"),
    )
    lm_head_low_bit: str = setting(
        "auto",
        "weight format of the output head; auto: sym_int8 if --low-bit converts weights",
        unit="FORMAT",
    )
    modules_to_not_convert: tuple[str, ...] = setting(
        (),
        "parts of module names, separated by commas, that stay dense; default: none",
        unit="NAMES",
        parse=lambda text: tuple(part for part in text.split(",") if part),
    )
    save_low_bit: str | None = setting(
        None,
        "folder to write the converted model to, instead of serving it; default: none",
        parse=str,
        unit="FOLDER",
    )
    load_format: str = setting(
        "auto",
        "where weights come from; auto: the folder's files; dummy: small random numbers in the "
        "shapes of its config.json, to measure speed and memory without a checkpoint",
        choices=("auto", "dummy"),
    )
    allow_pickle: bool = setting(
        False,
        "read pytorch_model.bin where a folder holds no safetensors, with torch's restricted "
        "unpickler; only for files from people you trust",
    )
    tensor_parallel_size: int | None = setting(
        None,
        "number of ranks; without mpirun the server starts so many itself, and starts them anew "
        "when they die; default: as many as mpirun started, or one in this process",
        parse=int,
        unit="RANKS",
    )
    data_parallel_size: int = setting(
        1,
        "groups of --tensor-parallel-size ranks, each with the whole model and devices of its own, "
        "behind one port; requests go where their prefix is cached, or to the group with the least "
        "left to do. Without mpirun only",
        unit="GROUPS",
    )
    plan: bool = setting(
        False, "print what the model will take on each rank, from its config.json, and leave"
    )
    device_memory: int | None = setting(
        None,
        "with --plan: memory of the card to plan for, as 16GiB (with --device cpu: of the host); "
        "default: what the device here has free",
        parse=parse_bytes,
        unit="BYTES",
    )
    max_host_ram: int | None = setting(
        None,
        "most host memory that the ranks on one host may take together, as 24GiB; refused before "
        "loading if the estimate is above; default: no limit",
        parse=parse_bytes,
        unit="BYTES",
    )
    dtype: str = setting(
        "auto",
        "type of activations; auto: float16 with --low-bit fp16, else bfloat16",
        choices=("auto", "bfloat16", "float16", "float32"),
    )
    device: str = setting(
        "auto", "where to run; auto: xpu, cuda or cpu", choices=("auto", "cpu", "cuda", "xpu")
    )
    host: str = setting("0.0.0.0", "address to listen on", unit="ADDRESS")
    port: int = setting(8000, "port to listen on; 0 takes any that is free", unit="PORT")
    max_num_seqs: int = setting(
        8,
        "most sequences in one step",
        flags=("--max-num-seqs", "--max-num-seq"),
        unit="SEQUENCES",
    )
    max_num_batched_tokens: int = setting(
        4096,
        "most tokens in one step; longer prompts run in chunks",
        flags=("--max-num-batched-tokens", "--max-num-batched-token"),
        unit="TOKENS",
    )
    max_step_ms: float | None = setting(
        None,
        "milliseconds that a step is to take at most while completions stream: prompts beside them "
        "run in chunks of as many tokens as fit, by what steps have taken; default: no limit",
        parse=float,
        unit="MS",
    )
    max_model_len: int | None = setting(
        None,
        "most tokens of prompt and completion together; default: the model's own limit",
        parse=int,
        unit="TOKENS",
    )
    max_queue_len: int = setting(
        1024, "most requests that wait; one more is answered 503", unit="REQUESTS"
    )
    scheduling_policy: str = setting(
        "fcfs",
        "who runs first, and is preempted last: fcfs: who came first; priority: requests whose "
        "`priority` is lower, and at every eighth turn who has waited longest; strict-priority: "
        "lower ones alone, so that others may wait for ever",
        choices=SCHEDULING_POLICIES,
    )
    request_timeout: float | None = setting(
        None,
        "seconds after which a request ends with an error, whatever has come of it (504); "
        "default: none",
        parse=float,
        unit="SECONDS",
    )
    compile_timeout: float = setting(
        2.0,
        "seconds of processor time that compiling a structured output may take; more is a 400",
        unit="SECONDS",
    )
    template_timeout: float = setting(
        2.0,
        "seconds of processor time that the chat template may take for a conversation; more is "
        "answered 400",
        unit="SECONDS",
    )
    step_timeout: float = setting(
        60.0,
        "seconds after which a rank that is silent, or a step that has not ended, is taken to hang "
        "and ends the server; the first steps may take longer, and so may any that is expected to",
        unit="SECONDS",
    )
    max_restarts: int = setting(
        5,
        "how often ranks that have died or hang are started anew; they count as well again after "
        "ten minutes. Only where the server starts them itself (--tensor-parallel-size without "
        "mpirun)",
        unit="TIMES",
    )
    recovery_timeout: float = setting(
        120.0,
        "seconds that requests wait for ranks that are started anew, before they end with an error",
        unit="SECONDS",
    )
    max_body_size: int = setting(
        32 * 2**20,
        "most bytes of a request body, as 512KiB or 32MiB; more is answered 413",
        parse=parse_bytes,
        unit="BYTES",
    )
    drain_seconds: float = setting(
        30.0, "seconds that running requests get to finish after SIGTERM or Ctrl+C", unit="SECONDS"
    )
    api_key: tuple[str, ...] = setting(
        (),
        "keys that clients may show as `Authorization: Bearer KEY`; with none, all are served. "
        "Keys in --api-key-file and in the environment's AUTOTP_API_KEY (separated by commas) "
        "count too, and are not seen in the list of processes; default: none",
        parse=str,
        nargs="+",
        action="extend",
        unit="KEY",
        secret=True,
    )
    api_key_file: str | None = setting(
        None, "file with one key a line; default: none", parse=str, unit="FILE"
    )
    admin_api_key: tuple[str, ...] = setting(
        (),
        "keys that may change the server while it runs (load and unload adapters), beside all that "
        "other keys may; those in the environment's AUTOTP_ADMIN_API_KEY (separated by commas) "
        "count too; default: none, and nobody may",
        parse=str,
        nargs="+",
        action="extend",
        unit="KEY",
        secret=True,
    )
    cors_origin: tuple[str, ...] = setting(
        (),
        "origins whose pages may call the server from a browser, or *; default: none",
        parse=str,
        nargs="+",
        action="extend",
        unit="ORIGIN",
    )
    allowed_host: tuple[str, ...] = setting(
        (),
        "further names by which browsers may call the server, as llm.example.com behind a proxy; "
        "IP addresses, localhost and this host's own names are always allowed; default: none",
        parse=str,
        nargs="+",
        action="extend",
        unit="NAME",
    )
    ssl_certfile: str | None = setting(
        None, "serve https with this certificate chain (PEM); default: http", parse=str, unit="FILE"
    )
    ssl_keyfile: str | None = setting(
        None,
        "private key of the certificate (PEM); default: it is in --ssl-certfile",
        parse=str,
        unit="FILE",
    )
    tool_call_parser: str = setting(
        "auto",
        "how the model writes tool calls; auto: as its chat template has it",
        choices=("auto", "none", *get_args(ToolFormat)),
    )
    reasoning_parser: str = setting(
        "auto",
        "how the model marks its reasoning, which chats answer as reasoning_content; auto: as its "
        "chat template has it",
        choices=("auto", "none", *get_args(ReasoningFormat)),
    )
    responses_store: bool = setting(
        False,
        "keep the latest 1,024 responses of /v1/responses in memory, up to 64 million characters, "
        "for previous_response_id and to be read again",
    )
    log_level: str = setting(
        "info",
        "least important lines to log; none holds the text of a prompt or a completion",
        choices=("debug", "info", "warning", "error"),
    )
    log_format: str = setting(
        "text", "lines for readers, or one JSON object a line", choices=("text", "json")
    )
    gpu_memory_utilization: float = setting(
        0.9, "share of a device's memory to use in all, weights included, 0 to 1", unit="SHARE"
    )
    kv_cache_memory: int | None = setting(
        None,
        "bytes of KV cache per rank, as 512MiB or 4GiB; default: sized by the server",
        parse=parse_bytes,
        unit="BYTES",
    )
    kv_cache_dtype: str = setting(
        "auto",
        "type of keys and values in the KV cache; auto: that of activations; int8: with a float32 "
        "scale for each token and key/value head, about half the memory",
        unit="TYPE",
    )
    block_size: int = setting(16, "tokens in one block of the KV cache", unit="TOKENS")
    enable_prefix_caching: bool = setting(True, "reuse the KV cache of equal prompt beginnings")
    kv_offload_dir: str | None = setting(
        None,
        "folder of files in which full blocks of the KV cache are kept when it has no room for "
        "them, and when the server ends; they come back by their tokens; default: none",
        parse=str,
        unit="FOLDER",
    )
    kv_offload_size: int = setting(
        DEFAULT_OFFLOAD_SIZE,
        "most bytes that each rank keeps in --kv-offload-dir, as 20GiB; the oldest make room",
        parse=parse_bytes,
        unit="BYTES",
    )
    enforce_eager: bool = setting(
        False, "on a CUDA card, launch decode steps kernel by kernel instead of replaying graphs"
    )
    speculative_tokens: int | None = setting(
        None,
        "most tokens of a sequence that are guessed and verified along with its next one: those "
        "that followed the same tokens before, in prompt or answer; text does not depend on it, on "
        "cards but for rounding; default: 4 where that is certain (docs/speed.md), else 0, which "
        "is off, as it is on several cards and with --load-format dummy, whose text loops",
        parse=int,
        unit="TOKENS",
    )
    draft_model: str | None = setting(
        None,
        "folder of a smaller model with the same tokenizer, which guesses those tokens instead; "
        "it is sharded, converted (--low-bit) and cached as the model is; default: none",
        parse=str,
        unit="FOLDER",
    )
    otlp_traces_endpoint: str | None = setting(
        None,
        "where OpenTelemetry traces of requests are sent by OTLP, as "
        "http://collector:4318/v1/traces; they hold no prompts; default: there are none",
        parse=str,
        unit="URL",
    )
    profile: str | None = setting(
        None,
        "folder for a breakdown and a torch profiler trace of a few decode steps, taken once after "
        "the first; default: none",
        parse=str,
        unit="FOLDER",
    )
    generation_config: str = setting(
        "auto",
        "where /v1 has its sampling defaults from; auto: the model's generation_config.json; none: "
        "temperature 1, and nothing else",
        choices=("auto", "none"),
    )
    seed: int = setting(
        0, "seeds the sampling of requests that name no seed of their own", unit="NUMBER"
    )
    expert_parallel: bool = setting(
        False, "in a mixture of experts, whole experts on each rank instead of a part of every one"
    )
    enable_lora: bool = setting(
        False, "take LoRA adapters while the server runs; --lora-modules means it too"
    )
    lora_modules: tuple[str, ...] = setting(
        (),
        "LoRA adapters to start with: PEFT folders, and the names by which requests ask for them; "
        "default: none",
        parse=str,
        nargs="+",
        unit="NAME=FOLDER",
    )
    max_loras: int = setting(8, "most LoRA adapters loaded at a time", unit="ADAPTERS")
    max_lora_rank: int = setting(
        16, "highest rank of a LoRA adapter; memory is kept for it", unit="RANK"
    )
    trust_remote_code: bool = setting(False, "run Python code that comes with the model")

    def __post_init__(self) -> None:
        if not self.model_path:
            raise ConfigError("--repo-id-or-model-path is missing: name a checkpoint folder")
        self._read_sizes()
        at_least_one = ("max_num_seqs", "max_num_batched_tokens", "max_model_len", "max_queue_len",
                        "max_body_size", "block_size", "kv_cache_memory", "device_memory",
                        "max_host_ram", "kv_offload_size", "tensor_parallel_size",
                        "data_parallel_size")  # fmt: skip
        for name in at_least_one:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
        if self.task not in TASKS:
            raise ConfigError(f"--task must be one of {', '.join(TASKS)}, not {self.task}")
        if self.scheduling_policy not in SCHEDULING_POLICIES:
            raise ConfigError(
                f"--scheduling-policy must be one of {', '.join(SCHEDULING_POLICIES)}, not "
                f"{self.scheduling_policy}"
            )
        if self.pools and self.save_low_bit is not None:
            raise ConfigError(
                "--save-low-bit is for models that generate: leave it out, --low-bit converts "
                "others while they load"
            )
        if self.pools and self.lm_head_low_bit != "auto":
            raise ConfigError("--lm-head-low-bit is for models that generate: leave it out")
        if self.kv_cache_dtype not in KV_CACHE_DTYPES:
            raise ConfigError(
                f"--kv-cache-dtype {self.kv_cache_dtype} is not there: write int8, which takes as "
                "little memory as fp8, or auto, for the type of activations (--dtype)"
            )
        if self.kv_offload_dir is not None and (self.pools or not self.enable_prefix_caching):
            raise ConfigError(
                "--kv-offload-dir is for models that generate, with prefix caching, as blocks are "
                "found by their tokens: leave it out"
            )
        if self.kv_offload_dir is None and self.kv_offload_size != DEFAULT_OFFLOAD_SIZE:
            raise ConfigError("--kv-offload-size is for --kv-offload-dir: name the folder as well")
        if self.device_memory is not None and not self.plan:
            raise ConfigError("--device-memory is for --plan: leave it out, or add --plan")
        if not 0.0 <= self.drain_seconds < float("inf"):
            raise ConfigError(f"--drain-seconds must be 0 or more, not {self.drain_seconds}")
        if self.request_timeout is not None and not 0.0 < self.request_timeout < float("inf"):
            raise ConfigError(f"--request-timeout must be above 0, not {self.request_timeout}")
        for name in ("compile_timeout", "template_timeout"):
            if not 0.0 < getattr(self, name) <= 3600.0:
                flag = f"--{name.replace('_', '-')}"
                raise ConfigError(
                    f"{flag} must be above 0, 3600 at most, not {getattr(self, name)}"
                )
        if not MIN_STEP_TIMEOUT <= self.step_timeout < float("inf"):
            raise ConfigError(
                f"--step-timeout must be at least {MIN_STEP_TIMEOUT:g}, not {self.step_timeout}"
            )
        if self.max_step_ms is not None and not 0.0 < self.max_step_ms < float("inf"):
            raise ConfigError(f"--max-step-ms must be above 0, not {self.max_step_ms:g}")
        if not 0 <= (self.speculative_tokens or 0) <= MAX_SPECULATIVE_TOKENS:
            raise ConfigError(
                f"--speculative-tokens must be from 0 to {MAX_SPECULATIVE_TOKENS}, not "
                f"{self.speculative_tokens}"
            )
        if self.draft_model is not None and (self.pools or self.speculative_tokens == 0):
            raise ConfigError(
                "--draft-model is for models that generate, with --speculative-tokens above 0: "
                "leave it out"
            )
        if self.max_restarts < 0:
            raise ConfigError(f"--max-restarts must be 0 or more, not {self.max_restarts}")
        if not 0.0 < self.recovery_timeout < float("inf"):
            raise ConfigError(f"--recovery-timeout must be above 0, not {self.recovery_timeout}")
        for origin in self.cors_origin:
            if not re.fullmatch(r"\*|[a-z][a-z0-9+.-]*://[^/\s]+", origin):
                raise ConfigError(
                    f"--cors-origin {origin} is no origin: write https://host, or *, without a path"
                )
        endpoint = self.otlp_traces_endpoint
        if endpoint is not None and not re.fullmatch(r"https?://[^/\s]+\S*", endpoint):
            raise ConfigError(
                f"--otlp-traces-endpoint {endpoint} is no URL: write "
                "http://collector:4318/v1/traces"
            )
        for name in self.allowed_host:
            if not re.fullmatch(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*", name):
                raise ConfigError(
                    f"--allowed-host {name} is no host name: write llm.example.com, without a "
                    "scheme, port or path"
                )
        if not 1 <= self.max_loras <= MAX_LORAS:
            raise ConfigError(f"--max-loras must be from 1 to {MAX_LORAS}, not {self.max_loras}")
        if not 1 <= self.max_lora_rank <= MAX_LORA_RANK:
            raise ConfigError(
                f"--max-lora-rank must be from 1 to {MAX_LORA_RANK}, not {self.max_lora_rank}"
            )
        if self.uses_adapters:
            self._check_adapters()
        if self.low_bit_provider == "ipex-llm" and self.save_low_bit is not None:
            raise ConfigError(
                "--save-low-bit writes this server's own formats: leave out "
                "--low-bit-provider ipex-llm"
            )
        if self.ssl_keyfile and not self.ssl_certfile:
            raise ConfigError("--ssl-keyfile needs --ssl-certfile: name the certificate as well")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"--port must be from 0 to 65535, not {self.port}")
        if not 0.0 < self.gpu_memory_utilization <= 1.0:
            raise ConfigError(
                f"--gpu-memory-utilization must be above 0 and at most 1, "
                f"not {self.gpu_memory_utilization}"
            )
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"--max-num-batched-tokens ({self.max_num_batched_tokens}) must be at least "
                f"--max-num-seqs ({self.max_num_seqs}): each sequence runs a token a step"
            )

    def _read_sizes(self) -> None:
        """Scripts may write sizes as the command line does, as 4GiB."""
        for one in fields(self):
            value = getattr(self, one.name)
            if isinstance(value, str) and one.metadata["parse"] is parse_bytes:
                try:
                    object.__setattr__(self, one.name, parse_bytes(value))
                except argparse.ArgumentTypeError as error:
                    raise ConfigError(f"--{one.name.replace('_', '-')}: {error}") from error

    def _check_adapters(self) -> None:
        names = [one.partition("=")[0] for one in self.lora_modules]
        for setting, name in zip(self.lora_modules, names, strict=True):
            if not name or not setting.partition("=")[2] or name.startswith("{"):
                raise ConfigError(f"--lora-modules {setting}: write NAME=FOLDER")
            if names.count(name) > 1 or name in self.model_names:
                raise ConfigError(f"--lora-modules {setting}: the name {name} is taken")
        if len(names) > self.max_loras:
            raise ConfigError(
                f"--lora-modules names {len(names)} adapters: raise --max-loras ({self.max_loras})"
            )
        others = {
            "--plan": self.plan, "--save-low-bit": self.save_low_bit is not None,
            f"--task {self.task}": self.pools, "--data-parallel-size": self.data_parallel_size > 1,
        }  # fmt: skip
        for flag, is_asked in others.items():
            if is_asked:
                raise ConfigError(f"{flag} is not for servers with LoRA adapters: leave one out")

    @property
    def uses_adapters(self) -> bool:
        """Whether LoRA adapters may be loaded."""
        return self.enable_lora or bool(self.lora_modules)

    def of_draft(self, max_model_len: int) -> ServingConfig:
        """The settings under which --draft-model is loaded, for sequences of that length."""
        assert self.draft_model is not None
        return replace(
            self, model_path=self.draft_model, draft_model=None, max_model_len=max_model_len,
            enable_lora=False, lora_modules=(),
        )  # fmt: skip

    @property
    def pools(self) -> bool:
        """True for models whose hidden states are pooled in place of completions."""
        return self.task in ("embed", "rerank")

    @property
    def num_rows(self) -> int:
        """Rows that a rank keeps of sequences: of each running one, and one for padding."""
        return self.max_num_seqs + 1

    @property
    def num_drafts(self) -> int:
        """Most tokens of a sequence that are guessed ahead, if its model allows it."""
        if self.speculative_tokens is not None:
            return self.speculative_tokens
        is_off = self.load_format == "dummy" and self.draft_model is None
        return 0 if is_off else DEFAULT_NUM_DRAFTS

    @property
    def max_decode_rows(self) -> int:
        """Most tokens of a step without prompts: the next one of each sequence, and guesses."""
        num_rows = self.max_num_seqs * (1 + self.num_drafts)
        return max(self.max_num_seqs, min(num_rows, MOST_ROWS_WITH_DRAFTS))

    @property
    def num_kept_states(self) -> int:
        """Beginnings of prompts whose states are kept, of models whose layers have states."""
        return max(MIN_KEPT_STATES, self.max_num_seqs) if self.enable_prefix_caching else 0

    @property
    def shown_task(self) -> str:
        """The task in words for clients; "auto" is settled once the model is in a folder."""
        return self.task if self.pools else "generate"

    @property
    def model_names(self) -> tuple[str, ...]:
        """Names under which the model is shown, the preferred one first; never where it lies."""
        return tuple(self.served_model_name) or self.default_model_names

    @property
    def default_model_names(self) -> tuple[str, ...]:
        """Names of the model's own, the preferred one first."""
        path = os.path.abspath(self.model_path)  # also of `.` and of `models/..`
        # What the Hugging Face Hub's cache calls a commit of organisation/name.
        cached = re.search(r"/models--([^/]+)/snapshots/[^/]+$", path)
        if cached is not None:
            return (cached[1].replace("--", "/"),)
        folder = path.rpartition("/")[2] or "model"
        is_repo_id = re.fullmatch(r"\w[\w.-]*/[\w.-]+", self.model_path) is not None
        return (folder, self.model_path) if is_repo_id else (folder,)
