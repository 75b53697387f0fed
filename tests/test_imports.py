"""The rooms of the package: which may import which, and what no room may import at all.

Read from the source, so lazy imports count too; `TYPE_CHECKING` blocks do not. README's table of
the rooms is made from the same list, so that neither can be false: `python -m tests.test_imports`.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "autotp_serving"


@dataclass(frozen=True)
class Room:
    """A folder of the package, or the modules at its top.

    Attributes:
        job: what it is for, as README has it.
        may_import: other rooms.
    """

    job: str
    may_import: tuple[str, ...]


BASE = (
    "config",
    "command_line",
    "request",
    "structured_output",
    "batch",
    "block_transfer",
    "step_times",
    "heap",
    "logs",
    "collector",
    "progress",
    "model_folder",
    "pooling",
)
ROOMS = {
    "base": Room("words that all share: " + ", ".join(f"`{name}`" for name in BASE), ()),
    "devices": Room(
        "cpu, cuda, xpu: memory and what else a device can do; compiled code", ("base",)
    ),
    "low_bit": Room("weight formats as bytes: quantize, dequantize, pack, select", ("base",)),
    "kernels": Room(
        "ways to compute, per device: `cpu/`, `cuda/`, `triton/`, portable `reference/`, ipex-llm",
        ("low_bit", "devices", "base"),
    ),
    "layers": Room(
        "low-bit linears, output head, fused layers taken apart, experts",
        ("kernels", "low_bit", "base"),
    ),
    "distributed": Room(
        "the ranks as a group: launch, channel, collectives, placement, agreement",
        ("devices", "base"),
    ),
    "model": Room(
        "checkpoint, shards, loader, families, self-check, attention, KV cache, save",
        ("layers", "kernels", "distributed", "low_bit", "devices", "base"),
    ),
    "memory": Room(
        "what a model takes and whether it fits: `--plan`, checks at start, cache size",
        ("model", "kernels", "distributed", "low_bit", "devices", "base"),
    ),
    "worker": Room(
        "a rank's work: runner, sampler, logits processors, logprobs, profiler",
        ("memory", "model", "layers", "kernels", "distributed", "low_bit", "devices", "base"),
    ),
    "engine": Room(
        "scheduler, blocks, batch builder, output processor, tokenizer, grammar", ("base",)
    ),
    "api": Room(
        "HTTP: app, middleware, metrics, native routes, chat page; `openai/`, `responses/`, "
        "`anthropic/`, `pooling/`",
        ("engine", "base"),
    ),
    "head": Room(
        "HTTP and engine in a process of their own: starts the ranks, talks to them, starts them "
        "anew",
        ("distributed", "base"),
    ),
    "llm": Room(
        "the engine in a script, without HTTP", ("worker", "engine", "model", "distributed", "base")
    ),
}
FOLDERS = set(ROOMS) - {"base", "llm"}
WITHOUT_TORCH = {"base", "engine", "api", "head"}
HEAVY = {"torch", "transformers", "deepspeed", "triton"}
LAZY_EXCEPTIONS = {
    "engine/tokenizer.py": {"transformers"},
    "engine/tokenizer_files.py": {"transformers"},
    "engine/chat_template.py": {"transformers"},
}
STANDARD_LIBRARY_ONLY = {
    *("config.py", "request.py", "structured_output.py", "batch.py", "block_transfer.py")
}
VENDORS = {
    "llguidance": {"engine/grammar.py", "engine/vocabulary.py"},
    "deepspeed": {
        "distributed/collectives.py",
        "model/build.py",
        "model/sharding_plan.py",
        "memory/meta_planner.py",
    },
    "ipex_llm": {"kernels/ipex_llm.py"},
    "oneccl_bindings_for_pytorch": {"devices/xpu.py"},
    "intel_extension_for_pytorch": set(),
    "intel_extension_for_deepspeed": set(),
    "torchao": set(),
    "bigdl": set(),
}
TABLE_START, TABLE_END = "<!-- layout: python -m tests.test_imports -->", "<!-- end of layout -->"


@dataclass(frozen=True)
class Import:
    """One imported module, and whether that waits until a function is called."""

    name: str
    line: int
    is_lazy: bool

    @property
    def top(self) -> str:
        """The package it belongs to."""
        return self.name.partition(".")[0]


def list_imports(source: str, path: str) -> Iterator[Import]:
    """Every import of a file's text; `from package import module` counts as the module."""
    folders = [PACKAGE, *path.split("/")[:-1]]

    def visit(node: ast.AST, is_lazy: bool) -> Iterator[Import]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            for child in node.orelse:
                yield from visit(child, is_lazy)
            return
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, is_lazy)
        elif isinstance(node, ast.ImportFrom):
            base = folders[: len(folders) + 1 - node.level] if node.level else []
            for alias in node.names:
                names = [*base, *filter(None, [node.module]), alias.name]
                yield Import(".".join(names), node.lineno, is_lazy)
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, is_lazy or is_function)

    yield from visit(ast.parse(source), False)


def find_room(parts: tuple[str, ...]) -> str:
    """The room of a module of the package, from the names after the package's."""
    if parts[0] in FOLDERS:
        return parts[0]
    return "llm" if parts[0] in ("llm", "__init__") else "base"


def find_mistakes(path: str, source: str) -> list[str]:
    """What a file of the package imports and must not.

    Args:
        path: below the package's folder, as "worker/runner.py".
    """
    room = find_room(tuple(path.removesuffix(".py").split("/")))
    mistakes = []
    for item in list_imports(source, path):

        def blame(reason: str, item: Import = item) -> None:
            mistakes.append(f"{PACKAGE}/{path}:{item.line} imports {item.name}: {reason}")

        if item.top == PACKAGE:
            target = find_room(tuple(item.name.split(".")[1:]))
            is_version = item.name == f"{PACKAGE}.__version__"
            if target not in (room, *ROOMS[room].may_import) and not is_version:
                blame(f"{room} may not reach into {target}")
        if item.top in ("serving", "tests", "benchmark", "benchmarks"):
            blame("the package stands without them")
        if item.top in HEAVY and room in WITHOUT_TORCH:
            allowed = LAZY_EXCEPTIONS.get(path, set()) if item.is_lazy else set()
            if item.top not in allowed:
                blame(f"{room} runs without it")
        if path in STANDARD_LIBRARY_ONLY and item.top not in {*sys.stdlib_module_names, PACKAGE}:
            blame("standard library only")
        if item.top in VENDORS:
            if path not in VENDORS[item.top]:
                blame("belongs into " + (", ".join(sorted(VENDORS[item.top])) or "no file"))
            elif not item.is_lazy:
                blame("only inside a function")
        of_devices = {*sys.stdlib_module_names, PACKAGE, "torch", *VENDORS}
        if room == "devices" and item.top not in of_devices:
            blame("devices import torch only")
    return mistakes


FILES = sorted((ROOT / PACKAGE).rglob("*.py"))


def format_layout() -> str:
    """README's table of the package."""
    lines = ["| in `autotp_serving/` | job | may import |", "|---|---|---|"]
    for name, room in ROOMS.items():
        where = {"base": "the top", "llm": "`llm.py`"}.get(name, f"`{name}/`")
        allowed = ", ".join(room.may_import) or "standard library, PyYAML"
        never = "; never torch" if name in WITHOUT_TORCH else ""
        lines.append(f"| {where} | {room.job} | {allowed}{never} |")
    return "\n".join(lines)


def test_readme_shows_this_layout() -> None:
    text = (ROOT / "README.md").read_text()
    shown = text.split(TABLE_START)[1].split(TABLE_END)[0]
    assert shown.strip() == format_layout(), "run: python -m tests.test_imports"


def test_every_folder_is_a_room() -> None:
    assert {path.parent.name for path in (ROOT / PACKAGE).glob("*/*.py")} == FOLDERS


def test_the_base_is_what_it_is_said_to_be() -> None:
    top = {path.stem for path in (ROOT / PACKAGE).glob("*.py")}
    assert top == {*BASE, "llm", "__init__"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT / PACKAGE)))
def test_no_room_reaches_where_it_must_not(path: Path) -> None:
    relative = path.relative_to(ROOT / PACKAGE).as_posix()
    mistakes = find_mistakes(relative, path.read_text())
    assert not mistakes, "\n".join(mistakes)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT / PACKAGE)))
def test_only_devices_compare_the_names_of_devices(path: Path) -> None:
    """What differs between devices is asked of the device, or of the backend chosen for it."""
    found = re.findall(r"[=!]= ?['\"](?:cpu|cuda|xpu)['\"]", path.read_text())
    assert not found or path.parent.name == "devices"


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("api/app.py", "import torch"),
        ("api/app.py", "def f():\n    import torch.nn"),
        ("api/openai/routes.py", f"from {PACKAGE}.model import loader"),
        ("api/app.py", f"from {PACKAGE}.worker.runner import ModelRunner"),
        ("api/app.py", f"from {PACKAGE}.worker import worker"),
        ("api/app.py", f"from {PACKAGE}.distributed.channel import StepChannel"),
        ("engine/engine.py", f"from {PACKAGE}.api.app import build_app"),
        ("engine/engine.py", "from transformers import AutoTokenizer"),
        ("engine/tokenizer.py", "import transformers"),
        ("engine/tokenizer.py", "def f():\n    import torch"),
        ("brand_new.py", "try:\n    import torch\nexcept ImportError:\n    torch = None"),
        ("brand_new.py", f"import {PACKAGE}.engine.engine"),
        ("config.py", "import yaml"),
        ("batch.py", "def f():\n    import numpy"),
        ("devices/cpu.py", "import psutil"),
        ("devices/cpu.py", f"from {PACKAGE}.distributed.launch import RankGroup"),
        ("low_bit/tensor.py", f"from {PACKAGE}.kernels.cpu import tiles"),
        ("kernels/cpu/linear.py", f"from {PACKAGE}.model.loader import load_model"),
        ("kernels/cpu/linear.py", "from ...model.loader import load_model"),
        ("kernels/triton/store.py", f"from {PACKAGE}.model.kv_cache import Pools"),
        ("engine/engine.py", "import triton"),
        ("layers/low_bit_linear.py", "from ..model import loader"),
        ("model/loader.py", f"from {PACKAGE}.memory.footprint import find_footprint"),
        ("model/loader.py", f"from {PACKAGE}.worker.runner import ModelRunner"),
        ("worker/runner.py", f"from {PACKAGE}.engine import Engine"),
        ("worker/runner.py", "def f():\n    import deepspeed"),
        ("distributed/collectives.py", "import deepspeed"),
        ("distributed/collectives.py", f"from {PACKAGE}.model.build import build"),
        ("layers/low_bit_linear.py", "def f():\n    from ipex_llm import optimize_model"),
        ("model/build.py", "def f():\n    import torchao"),
        ("worker/worker.py", f"from {PACKAGE}.api.app import build_app"),
        ("worker/worker.py", "import serving"),
    ],
)
def test_the_rule_sees(path: str, source: str) -> None:
    assert len(find_mistakes(path, source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("api/app.py", f"from {PACKAGE} import __version__"),
        ("api/app.py", f"from {PACKAGE}.engine import Engine\nimport fastapi"),
        ("api/app.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"),
        ("engine/tokenizer.py", "def f():\n    from transformers import AutoTokenizer"),
        (
            "kernels/cpu/linear.py",
            "from ...low_bit.tensor import LowBitTensor\nfrom . import tiles",
        ),
        ("distributed/collectives.py", "def f():\n    import deepspeed.comm"),
        (
            "worker/runner.py",
            f"import torch\nfrom {PACKAGE}.distributed.channel import StepChannel",
        ),
        ("worker/worker.py", f"from {PACKAGE}.model.loader import load_model"),
    ],
)
def test_the_rule_lets_pass(path: str, source: str) -> None:
    assert find_mistakes(path, source) == []


def test_the_control_side_runs_without_torch() -> None:
    """What is said above of the source, seen at run time, third parties' imports included."""
    code = (
        f"import sys, {PACKAGE}.api.app, {PACKAGE}.api.server, {PACKAGE}.engine, "
        f"{PACKAGE}.engine.tokenizer, {PACKAGE}.command_line, {PACKAGE}.head.supervisor\n"
        f"print(sorted({HEAVY!r} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "[]\n", done.stderr


if __name__ == "__main__":
    readme = ROOT / "README.md"
    before, rest = readme.read_text().split(TABLE_START)
    after = rest.split(TABLE_END)[1]
    readme.write_text(f"{before}{TABLE_START}\n{format_layout()}\n{TABLE_END}{after}")
