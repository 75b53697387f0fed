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

    def complete(self, options: dict[str, Any], effort: str | None) -> dict[str, Any]:
        """Variables of a conversation, what else it says of reasoning among them.

        Args:
            options: what is known of them, and takes precedence. A switch that the template calls
                by another name is told by that too.
            effort: how much reasoning is wanted, "none" for none; None leaves it to the template.
        """
        is_wanted = None if effort is None else effort != "none"
        told = self.for_template(is_wanted, effort if is_wanted else None)
        given = next((options[name] for name in SWITCHES if name in options), None)
        if self.switch is not None and given is not None:
            told[self.switch] = given
        return told | options

    def heeds(self, effort: str | None) -> bool:
        """Whether the template can be told of an effort."""
        return effort is None or self.has_effort or (effort == "none" and self.switch is not None)
