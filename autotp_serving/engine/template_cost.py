"""Tells of a chat template whether its work is in proportion to what it is given. Rank 0 only.

Read off the template's syntax, from a list of what is known to be cheap: loops over the messages
and over parts of one message, conditions, texts put together once. A template with anything else
(range, macros, products, texts that grow from themselves) may still be harmless, and is treated as
if it were not.
"""

from __future__ import annotations

from collections.abc import Iterator

import jinja2
from jinja2 import nodes

CHEAP_FILTERS = {
    *("trim", "length", "count", "tojson", "string", "lower", "upper", "capitalize", "title"),
    *("default", "d", "first", "last", "list", "items", "safe", "selectattr", "rejectattr"),
}
CHEAP_METHODS = {
    *("strip", "lstrip", "rstrip", "startswith", "endswith", "split", "rsplit", "items", "keys"),
    *("values", "get", "lower", "upper", "title", "capitalize"),
}
CHEAP_FUNCTIONS = {"raise_exception", "namespace", "strftime_now"}
CHEAP_NODES = (
    *(nodes.Output, nodes.TemplateData, nodes.If, nodes.For, nodes.Assign, nodes.Break),
    *(nodes.Continue, nodes.Const, nodes.Name, nodes.NSRef, nodes.Getattr, nodes.Getitem),
    *(nodes.Slice, nodes.Compare, nodes.Operand, nodes.And, nodes.Or, nodes.Not, nodes.Test),
    *(nodes.CondExpr, nodes.List, nodes.Tuple, nodes.Dict, nodes.Pair, nodes.Keyword),
    *(nodes.Concat, nodes.Add, nodes.Sub, nodes.Neg, nodes.Mod, nodes.Filter, nodes.Call),
)
GROWING = (nodes.Add, nodes.Concat, nodes.List, nodes.Tuple, nodes.Dict)
SMALL_NAMES = frozenset({"loop", "bos_token", "eos_token", "unk_token", "pad_token"})

MAX_NUM_NODES = 4096
"""Of a template; one writes its input out at most once for each."""

MAX_CONST = 64
"""Of an argument of a filter or a method: its value, or its length."""


class _CostlyError(Exception):
    """The template has something that is not known to be cheap."""


def is_cheap(source: str) -> bool:
    """True if the template's work and output are at most in proportion to its input."""
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        _Checker(environment.parse(source)).check()
    except (_CostlyError, jinja2.TemplateSyntaxError, RecursionError):
        return False
    return True


class _Checker:
    """One template. Variables are known by name, attributes of namespaces as `name.attribute`."""

    def __init__(self, tree: nodes.Template) -> None:
        self._tree = tree
        if sum(1 for _ in tree.find_all(nodes.Node)) > MAX_NUM_NODES:
            raise _CostlyError
        self._namespaces: set[str] = set()
        self._values: dict[str, list[nodes.Node]] = {}
        self._targets = {
            name.name for loop in tree.find_all(nodes.For) for name in _names(loop.target)
        }
        for node in tree.find_all(nodes.Assign):
            self._note_assignment(node.target, node.node)
        self._numbers = set(self._values)
        while rest := {
            name for name in self._numbers if not all(map(self._is_number, self._values[name]))
        }:
            self._numbers -= rest

    def check(self) -> None:
        """Raise _CostlyError where something is not known to be cheap."""
        self._check_growth()
        for child in self._tree.iter_child_nodes():
            self._check(child, None)

    def _note_assignment(self, target: nodes.Node, value: nodes.Node) -> None:
        if isinstance(target, nodes.NSRef):
            self._values.setdefault(f"{target.name}.{target.attr}", []).append(value)
        elif not isinstance(target, nodes.Name):
            raise _CostlyError
        elif isinstance(value, nodes.Call) and _called_function(value) == "namespace":
            self._namespaces.add(target.name)
            if value.args or value.dyn_args or value.dyn_kwargs:
                raise _CostlyError
            for keyword in value.kwargs:
                name = f"{target.name}.{keyword.key}"
                self._values.setdefault(name, []).append(keyword.value)
        elif target.name in self._targets:  # for example, by a part of itself
            if _find_root(value) != target.name:
                raise _CostlyError
        else:
            self._values.setdefault(target.name, []).append(value)

    def _variable(self, node: nodes.Node) -> str | None:
        """The variable that a node is, if it is one."""
        if isinstance(node, nodes.Getattr) and isinstance(node.node, nodes.Name):
            name = node.node.name
            return f"{name}.{node.attr}" if name in self._namespaces else None
        return node.name if isinstance(node, nodes.Name) else None

    def _variables(self, node: nodes.Node) -> Iterator[str]:
        """All that an expression mentions."""
        name = self._variable(node)
        if name is not None:
            yield name
            return
        for child in node.iter_child_nodes():
            yield from self._variables(child)

    def _is_number(self, node: nodes.Node) -> bool:
        """True for a number or a truth, whatever the conversation."""
        if isinstance(node, nodes.Const):
            return not isinstance(node.value, str)
        if isinstance(node, nodes.Compare | nodes.Test | nodes.Not):
            return True
        if isinstance(node, nodes.Add | nodes.Sub | nodes.And | nodes.Or):
            return self._is_number(node.left) and self._is_number(node.right)
        if isinstance(node, nodes.Filter):
            return node.name in ("length", "count")
        if isinstance(node, nodes.Getattr) and _find_root(node.node) == "loop":
            return node.attr not in ("previtem", "nextitem") and _is_path(node)
        return self._variable(node) in self._numbers

    def _grows(self, value: nodes.Node) -> bool:
        """True if a value may be longer than each of its parts."""
        parts = [value, *value.find_all(nodes.Expr)]
        return any(
            isinstance(part, GROWING) or (isinstance(part, nodes.Filter) and part.name == "tojson")
            for part in parts
            if not self._is_number(part)
        )

    def _check_growth(self) -> None:
        """A text that is put together from others may be added to, and never doubled.

        What is set in a loop is forgotten with its round, except in namespaces.
        """
        texts = {name: self._values[name] for name in self._values.keys() - self._numbers}
        grown: set[str] = set()
        while more := {
            name
            for name, values in texts.items()
            if name not in grown
            and any(self._grows(one) or grown.intersection(self._variables(one)) for one in values)
        }:
            grown |= more
        for value in (one for values in texts.values() for one in values):
            parts = [name for name in self._variables(value) if name in grown]
            if self._grows(value) and (len(parts) > 1 or any("." in name for name in parts)):
                raise _CostlyError

    def _check(self, node: nodes.Node, targets: frozenset[str] | None) -> None:
        """Check a node and all below. `targets`: variables of the innermost loop around it."""
        if not isinstance(node, CHEAP_NODES):
            raise _CostlyError
        if isinstance(node, nodes.For):
            self._check_loop(node, targets)
            return
        if targets is not None and isinstance(node, nodes.Output | nodes.Assign | nodes.If):
            parts: list[nodes.Node] = [*node.nodes] if isinstance(node, nodes.Output) else []
            parts = [node.node] if isinstance(node, nodes.Assign) else parts
            parts = [node.test] if isinstance(node, nodes.If) else parts
            for part in parts:
                self._check_local(part, targets, frozenset())
        if isinstance(node, nodes.Mod) and not self._is_number(node.left):
            raise _CostlyError  # a text's % writes fields as wide as it likes
        if isinstance(node, nodes.Test):
            _check_arguments(node, node.name != "in")
        if isinstance(node, nodes.Filter):
            _check_arguments(node, node.name in CHEAP_FILTERS)
        if isinstance(node, nodes.Call):
            name = _called_function(node)
            if isinstance(node.node, nodes.Getattr):
                _check_arguments(node, node.node.attr in CHEAP_METHODS)
            elif name == "strftime_now":
                _check_arguments(node, True)
            elif name not in CHEAP_FUNCTIONS:
                raise _CostlyError
        for child in node.iter_child_nodes():
            self._check(child, targets)

    def _check_loop(self, node: nodes.For, targets: frozenset[str] | None) -> None:
        # A loop in a loop goes over a part of what the outer one is at, so their rounds add up.
        if node.recursive or (targets is not None and _find_root(node.iter) not in targets):
            raise _CostlyError
        inner = frozenset(name.name for name in _names(node.target))
        self._check(node.iter, None)
        if node.test is not None:
            self._check(node.test, inner)
            self._check_local(node.test, inner, frozenset())
        for child in node.body:
            self._check(child, inner)
        for child in node.else_:
            self._check(child, targets)

    def _check_local(self, node: nodes.Node, targets: frozenset[str], seen: frozenset[str]) -> None:
        """What a round of a loop handles comes from that round, and not from all of them.

        `seen`: variables whose values are being looked at.
        """
        if self._is_glance(node) or _called_function(node) == "raise_exception":
            return
        name = self._variable(node)
        if name is None:
            for child in node.iter_child_nodes():
                self._check_local(child, targets, seen)
        elif name not in targets and name not in SMALL_NAMES and name not in self._numbers:
            if name not in self._values or "." in name:
                raise _CostlyError
            for value in self._values[name] if name not in seen else ():
                self._check_local(value, targets, seen | {name})

    def _is_glance(self, node: nodes.Node) -> bool:
        """True for what takes the same time however large a thing is that it looks at."""
        if isinstance(node, nodes.Test):
            return _find_root(node.node) is not None and not isinstance(node.node, nodes.Filter)
        if isinstance(node, nodes.Compare):
            operands = [node.expr, *(operand.expr for operand in node.ops)]
            are_plain = all(operand.op not in ("in", "notin") for operand in node.ops)
            return are_plain and all(map(_is_path, operands))
        if isinstance(node, nodes.Filter):
            return node.name in ("length", "count") and _is_path(node.node)
        if isinstance(node, nodes.Not):
            return _is_path(node.node)
        return self._is_number(node) and not isinstance(node, nodes.Compare | nodes.Test)


def _called_function(node: nodes.Node) -> str | None:
    """The name of the function that a node calls, if it does and that is no method."""
    if isinstance(node, nodes.Call) and isinstance(node.node, nodes.Name):
        return node.node.name
    return None


def _check_arguments(node: nodes.Filter | nodes.Test | nodes.Call, is_cheap: bool) -> None:
    """Arguments are what the template's author wrote down, and small."""
    arguments = [*node.args, *(keyword.value for keyword in node.kwargs)]
    for argument in arguments:
        value = argument.value if isinstance(argument, nodes.Const) else None
        size = len(value) if isinstance(value, str) else abs(value or 0)
        if not isinstance(argument, nodes.Const) or size > MAX_CONST:
            raise _CostlyError
    if not is_cheap or node.dyn_args or node.dyn_kwargs:
        raise _CostlyError


def _is_path(node: nodes.Node | None) -> bool:
    """True for a variable or a part of it, and for what the template's author wrote down."""
    if isinstance(node, nodes.Getattr | nodes.Getitem):
        is_plain = isinstance(node, nodes.Getattr) or isinstance(node.arg, nodes.Const)
        return is_plain and _is_path(node.node)
    return isinstance(node, nodes.Name | nodes.Const)


def _find_root(node: nodes.Node | None) -> str | None:
    """The variable of which an expression is a part."""
    if isinstance(node, nodes.Name):
        return node.name
    if isinstance(node, nodes.Getattr | nodes.Getitem | nodes.Filter):
        return _find_root(node.node)
    if isinstance(node, nodes.Call) and isinstance(node.node, nodes.Getattr):
        return _find_root(node.node.node)
    return None


def _names(node: nodes.Node) -> Iterator[nodes.Name]:
    """The variables that a target of an assignment or a loop has."""
    if isinstance(node, nodes.Name):
        yield node
    for child in node.iter_child_nodes():
        yield from _names(child)
