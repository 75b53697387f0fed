"""Which variables a chat template reads, so that what nobody reads is not passed as if. Rank 0."""

from __future__ import annotations

import jinja2
from jinja2 import meta


def list_variables(source: str) -> frozenset[str]:
    """Names that a template expects from outside; none for one that cannot be read."""
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        return frozenset(meta.find_undeclared_variables(environment.parse(source)))
    except (jinja2.TemplateError, RecursionError):
        return frozenset()
