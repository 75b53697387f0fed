"""The rooms of the package: which may import which, and what no room may import at all.

Read from the source, so lazy imports count too; `TYPE_CHECKING` blocks do not.
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

# Modules at the top that are no base; any other is, and stays so without being named here.
TOP_ROOMS = {
    "ranks": "ranks",
    "channel": "ranks",
    "watch": "ranks",
    "stand_in": "ranks",
    "agreement": "ranks",
    "collectives": "ranks",
    "symmetric_memory": "ranks",
    "listeners": "ranks",
    "worker": "wiring",
    "llm": "wiring",
    "__init__": "wiring",
}
ALLOWED = {
    "base": {"base"},
    "ranks": {"ranks", "base"},
    "devices": {"devices", "base"},
    "low_bit": {"low_bit", "kernels", "devices", "base"},
    "kernels": {"kernels", "low_bit", "devices", "base"},
    "model": {"model", "kernels", "low_bit", "devices", "ranks", "base"},
    "engine": {"engine", "base"},
    "api": {"api", "engine", "base"},
    "wiring": {"wiring", "model", "kernels", "low_bit", "devices", "ranks", "engine", "base"},
}
FOLDERS = {"api", "engine", "model", "kernels", "low_bit", "devices"}
WITHOUT_TORCH = {"base", "engine", "api"}
HEAVY = {"torch", "transformers", "deepspeed", "triton"}
LAZY_EXCEPTIONS = {
    "tokenizer.py": {"transformers"},
    "chat_template.py": {"transformers"},
    "native_build.py": {"torch"},
}
STANDARD_LIBRARY_ONLY = {"config.py", "request.py", "structure.py", "batch.py"}
VENDORS = {
    "llguidance": {"engine/grammar.py"},
    "deepspeed": {"collectives.py", "model/build.py", "memory/meta_planner.py"},
    "ipex_llm": {"kernels/ipex_llm.py"},
    "oneccl_bindings_for_pytorch": {"devices/xpu.py"},
    "intel_extension_for_pytorch": set(),
    "intel_extension_for_deepspeed": set(),
    "torchao": set(),
    "bigdl": set(),
}


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
    return parts[0] if parts[0] in FOLDERS else TOP_ROOMS.get(parts[0], "base")


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
            if target not in ALLOWED[room] and not is_version:
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


def test_every_folder_is_a_room() -> None:
    assert {path.parent.name for path in (ROOT / PACKAGE).glob("*/*.py")} == FOLDERS


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
        ("api/app.py", f"from {PACKAGE}.model import runner"),
        ("api/app.py", f"from {PACKAGE}.model.runner import ModelRunner"),
        ("api/app.py", f"from {PACKAGE} import worker"),
        ("api/app.py", f"from {PACKAGE}.channel import StepChannel"),
        ("engine/engine.py", f"from {PACKAGE}.api.app import build_app"),
        ("engine/engine.py", "from transformers import AutoTokenizer"),
        ("tokenizer.py", "import transformers"),
        ("tokenizer.py", "def f():\n    import torch"),
        ("brand_new.py", "try:\n    import torch\nexcept ImportError:\n    torch = None"),
        ("brand_new.py", f"import {PACKAGE}.engine.engine"),
        ("config.py", "import yaml"),
        ("batch.py", "def f():\n    import numpy"),
        ("devices/cpu.py", "import psutil"),
        ("devices/cpu.py", f"from {PACKAGE}.ranks import RankGroup"),
        ("layers/low_bit_linear.py", f"from {PACKAGE}.model.loader import load_model"),
        ("layers/low_bit_linear.py", "from ..model import loader"),
        ("kernels/cpu/linear.py", "from ...model.loader import load_model"),
        ("kernels/triton/store.py", f"from {PACKAGE}.model.kv_pools import Pools"),
        ("engine/engine.py", "import triton"),
        ("worker/runner.py", f"from {PACKAGE}.engine import Engine"),
        ("worker/runner.py", "def f():\n    import deepspeed"),
        ("collectives.py", "import deepspeed"),
        ("collectives.py", f"from {PACKAGE}.model.build import build"),
        ("layers/low_bit_linear.py", "def f():\n    from ipex_llm import optimize_model"),
        ("model/build.py", "def f():\n    import torchao"),
        ("worker.py", f"from {PACKAGE}.api.app import build_app"),
        ("worker.py", "import serving"),
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
        ("tokenizer.py", "def f():\n    from transformers import AutoTokenizer"),
        ("kernels/cpu/linear.py", "from ..tensor import LowBitTensor\nfrom . import tiles"),
        ("collectives.py", "def f():\n    import deepspeed.comm"),
        ("worker/runner.py", f"import torch\nfrom {PACKAGE}.channel import StepChannel"),
        ("worker.py", f"from {PACKAGE}.model.loader import load_model"),
    ],
)
def test_the_rule_lets_pass(path: str, source: str) -> None:
    assert find_mistakes(path, source) == []


def test_the_control_side_runs_without_torch() -> None:
    """What is said above of the source, seen at run time, third parties' imports included."""
    code = (
        f"import sys, {PACKAGE}.api.app, {PACKAGE}.api.server, {PACKAGE}.engine, "
        f"{PACKAGE}.tokenizer, {PACKAGE}.command_line\n"
        f"print(sorted({HEAVY!r} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "[]\n", done.stderr
