"""From flags and a YAML file to one `ServingConfig`. Every rank; standard library and PyYAML.

The flags are the fields of `ServingConfig`; the keys of the file are the flags' names. What is on
the command line wins over the file, and the file over the defaults.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from autotp_serving import __version__
from autotp_serving.config import ConfigError, ServingConfig

SECTIONS = {
    "the model": (
        *("model_path", "hub", "revision", "served_model_name", "any_model_name", "load_format"),
        *("allow_pickle", "trust_remote_code", "generation_config", "task"),
    ),
    "LoRA adapters": ("lora_modules", "enable_lora", "max_loras", "max_lora_rank"),
    "its weights": (
        *("low_bit", "low_bit_provider", "lm_head_low_bit", "modules_to_not_convert"),
        *("save_low_bit", "dtype"),
    ),
    "devices and memory": (
        *(
            "device",
            "tensor_parallel_size",
            "data_parallel_size",
            "expert_parallel",
            "plan",
            "device_memory",
            "max_host_ram",
        ),
        *("gpu_memory_utilization", "kv_cache_memory", "kv_cache_dtype", "block_size"),
        *("kv_offload_dir", "kv_offload_size", "enforce_eager"),
    ),
    "batches and limits": (
        *("max_model_len", "max_num_seqs", "max_num_batched_tokens", "enable_prefix_caching"),
        *("max_step_ms", "speculative_tokens", "draft_model", "scheduling_policy"),
        *("max_queue_len", "request_timeout", "compile_timeout", "template_timeout"),
        *("step_timeout", "max_restarts", "recovery_timeout", "drain_seconds", "seed"),
    ),
    "HTTP": (
        *("host", "port", "max_body_size", "api_key", "api_key_file", "admin_api_key"),
        *("cors_origin", "allowed_host", "ssl_certfile", "ssl_keyfile"),
    ),
    "what completions hold": ("tool_call_parser", "reasoning_parser", "responses_store"),
    "logs and traces": ("log_level", "log_format", "otlp_traces_endpoint", "profile"),
}
"""Of --help: fields of `ServingConfig`, each in one of them."""


def parse_args(argv: list[str] | None = None) -> ServingConfig:
    """Read the command line and the file it may name. Exits only for --help and --version.

    Raises:
        ConfigError: in one line, naming the flag or the key.
    """
    parser = build_parser()
    settings = _parse(parser, argv)
    path = settings.pop("config", None)
    if path is not None:
        settings = _read_file(path, parser) | settings
    fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()
    }
    return ServingConfig(**fields)


class _Parser(argparse.ArgumentParser):
    """Reports a bad command line as one ConfigError instead of usage text and an exit."""

    def error(self, message: str) -> Any:
        raise ConfigError(f"{message} (see --help)")


def build_parser() -> argparse.ArgumentParser:
    """Make the flags. What is not given does not appear in the namespace."""
    parser = _Parser(
        prog="serving.py",
        description="Serve a model over HTTP, on one card or several (start it under mpirun).",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="YAML file of settings, its keys named like these flags, which win over it; "
        "default: none",
    )
    parser.add_argument("--version", action="version", version=f"AutoTP Serving {__version__}")
    sections = {
        name: section
        for title, names in SECTIONS.items()
        for section in [parser.add_argument_group(title)]
        for name in names
    }
    for item in fields(ServingConfig):
        options = {key: value for key, value in item.metadata.items() if value is not None}
        flags = options.pop("flags") or (f"--{item.name.replace('_', '-')}",)
        parse = options.pop("parse", None)
        if isinstance(item.default, bool):
            options["action"] = argparse.BooleanOptionalAction
        elif "choices" not in options:
            options["type"] = parse or type(item.default)
        if item.default not in (None, "", ()):
            options["help"] += f" (default: {item.default})"
        options["help"] = options["help"].replace("%", "%%")
        section = sections[item.name]
        section.add_argument(*flags, dest=item.name, default=argparse.SUPPRESS, **options)
    return parser


def _parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> dict[str, Any]:
    namespace, unknown = parser.parse_known_args(argv)
    for word in unknown:
        if not word.startswith("-"):
            continue
        name = word.partition("=")[0]
        raise ConfigError(f"there is no flag {name}{_suggest(name, _flags(parser))} (see --help)")
    if unknown:
        raise ConfigError(f"'{unknown[0]}' belongs to no flag (see --help)")
    return vars(namespace)


def _flags(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """Every flag that a file may set too."""
    return {
        flag: action
        for action in parser._actions
        if action.dest not in ("help", "version", "config")
        for flag in action.option_strings
        if not flag.startswith("--no-")
    }


def _suggest(name: str, flags: dict[str, argparse.Action]) -> str:
    nearest = difflib.get_close_matches(name, flags, n=1)
    return f"; did you mean {nearest[0]}?" if nearest else ""


def _read_file(path: str, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Settings of a file, checked by the same parser as the command line."""
    import yaml

    try:
        text = Path(path).read_text(encoding="utf-8")
        document = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        detail = " ".join(str(error).split())
        raise ConfigError(f"--config {path} is not YAML: {detail}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"--config {path} must hold lines of the form `port: 8000`")
    keys = [key.value for key, _ in document.value]
    for key in keys:
        if keys.count(key) > 1:
            raise ConfigError(f"--config {path}: {key} is there twice")
    try:
        return _parse(parser, list(_as_arguments(values, _flags(parser))))
    except ConfigError as error:
        raise ConfigError(f"--config {path}: {error}") from error


def _as_arguments(values: dict[Any, Any], flags: dict[str, argparse.Action]) -> Iterator[str]:
    """A file's settings in the words of the command line."""
    seen: dict[str, str] = {}
    for key, value in values.items():
        flag = f"--{str(key).replace('_', '-')}"
        action = flags.get(flag)
        if action is None:
            suggestion = _suggest(flag, flags).replace(" --", " ")
            raise ConfigError(f"there is no setting {key}{suggestion}")
        if action.dest in seen:
            raise ConfigError(f"{seen[action.dest]} and {key} are the same setting: keep one")
        seen[action.dest] = str(key)
        if value is None:  # `key:` with nothing after it: the default
            continue
        if isinstance(action, argparse.BooleanOptionalAction):
            if not isinstance(value, bool):
                raise ConfigError(f"{key} must be true or false, not {value}")
            yield flag if value else f"--no-{flag[2:]}"
            continue
        many = value if isinstance(value, list) else [value]
        if any(isinstance(one, (dict, list)) for one in many):
            raise ConfigError(f"{key} must be a plain value")
        if action.nargs == "+":
            yield from (flag, *map(str, many))
        elif len(many) == 1 or action.dest == "modules_to_not_convert":
            yield f"{flag}={','.join(map(str, many))}"
        else:
            raise ConfigError(f"{key} takes one value, not {len(many)}")
