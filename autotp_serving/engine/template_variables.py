"""Which variables a chat template reads from outside. Rank 0 only.

Read off its syntax. Jinja's own function for it writes the template's program, for which it works
out constants: with a template from a stranger that may take all the memory there is.
"""

from __future__ import annotations

import jinja2
from jinja2 import nodes


def list_variables(source: str) -> frozenset[str]:
    """Names that a template expects from outside; none for one that cannot be read.

    A name that it sets itself counts only if it asks whether that is defined.
    """
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        tree = environment.parse(source)
        names = list(tree.find_all(nodes.Name))
        asked = [test.node for test in tree.find_all(nodes.Test) if test.name == "defined"]
    except (jinja2.TemplateSyntaxError, RecursionError):
        return frozenset()
    read = {name.name for name in names if name.ctx == "load"}
    written = {name.name for name in names if name.ctx != "load"}
    return frozenset((read - written) | {one.name for one in asked if isinstance(one, nodes.Name)})
