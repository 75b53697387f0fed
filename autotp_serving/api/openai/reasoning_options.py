"""What a chat template can be told about reasoning: whether to, and how much. Rank 0 only."""

from __future__ import annotations

from typing import Any

from autotp_serving.engine.template_variables import list_variables

SWITCHES = ("enable_thinking", "thinking")
EFFORT = "reasoning_effort"
EFFORTS = {"minimal": "low", "xhigh": "high", "max": "high"}
"""Templates know low, medium and high."""


class ReasoningOptions:
    """The variables for it, of which a template may read all or none.

    Args:
        chat_template: its source.
    """

    def __init__(self, chat_template: str) -> None:
        variables = list_variables(chat_template)
        self.switch = next((name for name in SWITCHES if name in variables), None)
        self.has_effort = EFFORT in variables

    def for_template(self, is_wanted: bool | None, effort: str | None) -> dict[str, Any]:
        """Variables for one conversation.

        Args:
            is_wanted: whether the model is to think first; None leaves it to the template.
            effort: how much.
        """
        options: dict[str, Any] = {}
        if self.switch is not None and is_wanted is not None:
            options[self.switch] = is_wanted
        if self.has_effort and effort is not None:
            options[EFFORT] = EFFORTS.get(effort, effort)
        return options
