"""Flags and the YAML file: one source of settings, every mistake refused by name."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from autotp_serving import __version__
from autotp_serving.command_line import SECTIONS, build_parser, parse_args
from autotp_serving.config import ConfigError, ServingConfig

MODEL = ["--model", "some/folder"]


def parse(*words: str) -> ServingConfig:
    return parse_args([*MODEL, *words])


@pytest.fixture
def write(tmp_path: Path):
    """Writes a config file; returns its path."""

    def write(text: str) -> str:
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return str(path)

    return write


def test_no_flags_give_the_defaults_of_the_record():
    assert parse() == ServingConfig(model_path="some/folder")


def test_every_setting_has_a_flag_whose_help_tells_default_and_unit():
    actions = {action.dest: action for action in build_parser()._actions}
    for item in fields(ServingConfig):
        action = actions[item.name]
        text = action.help
        assert re.search(r"\(default: \S+\)|default: |no default", text), item.name
        if not isinstance(action, argparse.BooleanOptionalAction) and not action.choices:
            assert action.metavar and action.metavar.isupper(), f"{item.name}: no unit"
        if isinstance(item.default, int | float) and not isinstance(item.default, bool):
            assert f"(default: {item.default})" in text, item.name


def test_help_has_every_setting_in_one_section():
    listed = [name for names in SECTIONS.values() for name in names]
    assert sorted(listed) == sorted(item.name for item in fields(ServingConfig))


def test_version_is_printed(capsys):
    with pytest.raises(SystemExit) as end:
        parse_args(["--version"])
    assert end.value.code == 0 and capsys.readouterr().out == f"AutoTP Serving {__version__}\n"


def test_help_can_be_printed(capsys):
    with pytest.raises(SystemExit) as ended:
        parse_args(["--help"])
    assert ended.value.code == 0
    assert "--max-num-seqs SEQUENCES, --max-num-seq SEQUENCES" in capsys.readouterr().out


def test_the_guides_spellings_mean_the_same():
    config = parse("--max-num-seq", "5", "--max-num-batched-token", "77")
    assert (config.max_num_seqs, config.max_num_batched_tokens) == (5, 77)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--max-num-sqes", "4"], r"no flag --max-num-sqes; did you mean --max-num-seqs\?"),
        (["--max-num-sqes=4"], r"no flag --max-num-sqes; did you mean --max-num-seqs\?"),
        (["--zzz"], r"no flag --zzz \(see --help\)"),
        (["stray"], "'stray' belongs to no flag"),
        (["--port", "many"], "--port.*'many'"),
        (["--request-timeout", "0"], "--request-timeout must be above 0"),
        (["--ssl-keyfile", "k"], "--ssl-keyfile needs --ssl-certfile"),
        (["--cors-origin", "https://a/"], "--cors-origin https://a/ is no origin"),
        (["--log-format", "xml"], "--log-format.*'xml'"),
    ],
)
def test_mistakes_are_named_in_one_line(words, expected):
    with pytest.raises(ConfigError, match=expected) as caught:
        parse(*words)
    assert "\n" not in str(caught.value)


def test_file_sets_and_command_line_wins(write):
    path = write(
        "max-num-seqs: 3\nport: 9000\nmax_body_size: 1MiB\nenable-prefix-caching: false\n"
        "served-model-name: [one, two]\napi-key: k1\nkv-cache-memory:\n"
        "modules-to-not-convert: [lm_head, gate]\n"
    )
    config = parse("--config", path, "--port", "9001", "--api-key", "k2")
    assert (config.max_num_seqs, config.port) == (3, 9001)
    assert (config.max_body_size, config.enable_prefix_caching) == (2**20, False)
    assert config.served_model_name == ("one", "two")
    assert config.api_key == ("k2",)
    assert config.kv_cache_memory is None
    assert config.modules_to_not_convert == ("lm_head", "gate")


def test_file_alone_can_name_the_model_and_may_be_empty(write):
    assert parse_args(["--config", write("model: there")]).model_path == "there"
    assert parse("--config", write("# nothing\n")) == parse()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("max-num-sqes: 4", r"no setting max-num-sqes; did you mean max-num-seqs\?"),
        ("config: other.yaml", "no setting config"),
        ("help: true", "no setting help"),
        ("port: many", "--port.*'many'"),
        ("port: [1, 2]", "port takes one value, not 2"),
        ("port: {a: 1}", "port must be a plain value"),
        ("port: 1\nport: 2", "port is there twice"),
        ("max-num-seqs: 1\nmax-num-seq: 2", "are the same setting"),
        ("trust-remote-code: 1", "trust-remote-code must be true or false"),
        ("seed: true", "--seed"),
        ("port 8000", "lines of the form"),
        ("a: [", "is not YAML"),
    ],
)
def test_mistakes_in_a_file_name_the_file_and_the_key(write, text, expected):
    with pytest.raises(ConfigError, match=rf"--config .*config\.yaml.*{expected}") as caught:
        parse("--config", write(text))
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        parse("--config", str(tmp_path / "none.yaml"))


def test_repeated_keys_add_up_and_repeated_names_replace():
    config = parse("--api-key", "a", "--api-key", "b", "c", "--served-model-name", "x",
                   "--served-model-name", "y")  # fmt: skip
    assert config.api_key == ("a", "b", "c")
    assert config.served_model_name == ("y",)


def test_keys_do_not_show_where_settings_are_printed():
    assert "secret-key" not in repr(parse("--api-key", "secret-key"))


def test_a_python_without_the_packages_is_told_in_one_line() -> None:
    root = Path(__file__).parents[1]
    command = [sys.executable, "-S", "serving.py", "--model", str(root / "demo_model")]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
    assert run.returncode == 2
    assert "Traceback" not in run.stderr
    (line,) = [line for line in run.stderr.splitlines() if "serving.py: error:" in line]
    assert "has no package" in line and "pip install -r requirements.txt" in line
