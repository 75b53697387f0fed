"""A model's chat template: conversation in, prompt out. Rank 0 and its helper process, no torch.

A template is a program that comes with the model and runs on what clients send, so it is foreign
twice. `template_cost` tells for which ones it is known that they do little work; all others run in
a process that may be ended (`engine.sandbox`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from autotp_serving.engine.chat_history import list_forms, put_tools
from autotp_serving.engine.template_habits import TemplateHabits, find_habits

MAX_REASON_LEN = 300


class ChatTemplateError(ValueError):
    """A conversation that the template refuses; the message is the template's own reason."""


class ChatTemplate:
    """What is needed to render conversations, without the tokenizer.

    Args:
        sources: templates by name; one that has no name is "default".
        special_tokens: variables that every template sees, as `bos_token`.
    """

    def __init__(self, sources: dict[str, str], special_tokens: dict[str, str]) -> None:
        self.sources = sources
        self.special_tokens = special_tokens
        self._habits: dict[str, TemplateHabits] = {}

    def load(self) -> None:
        """Import what rendering needs and compile the templates, ahead of the first rendering."""
        from transformers.utils import chat_template_utils

        for source in self.sources.values():
            self._find_habits(source)
            try:
                chat_template_utils.render_jinja_template([], chat_template=source)
            except Exception:  # each conversation is told why
                continue

    def find_source(self, has_tools: bool) -> str:
        """The template for a conversation with or without tools, as transformers chooses it.

        Raises ChatTemplateError.
        """
        name = "tool_use" if has_tools and "tool_use" in self.sources else "default"
        if name not in self.sources:
            raise ChatTemplateError("the model has several and none of them is the default")
        return self.sources[name]

    def render(self, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> str:
        """Write a conversation out, in this thread, for as long as the template likes.

        Where the template refuses it, other forms are tried, see `chat_history`.

        Raises:
            ChatTemplateError: the template refuses it, or fails.
        """
        source = self.find_source("tools" in options)
        refusal: ChatTemplateError | None = None
        habits = self._find_habits(source)
        if options.get("tools") and habits.reads_tools_of_message:
            messages = put_tools(messages, options["tools"])
        for conversation in list_forms(messages, habits):
            try:
                return self._render(source, conversation, options)
            except ChatTemplateError as error:  # that of the closest form is told
                refusal = refusal or error
        assert refusal is not None, "a conversation has a form"
        raise refusal

    def _find_habits(self, source: str) -> TemplateHabits:
        if source not in self._habits:
            self._habits[source] = find_habits(source)
        return self._habits[source]

    def _render(
        self, source: str, conversation: list[dict[str, Any]], options: Mapping[str, Any]
    ) -> str:
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            rendered = render_jinja_template(
                [conversation],
                chat_template=source,
                **{**self.special_tokens, **options},
            )
            # It says that it returns a text.
            (text,), _ = cast(tuple[list[str], list[Any]], rendered)
        except MemoryError:
            raise
        except RecursionError as error:
            raise ChatTemplateError("it never ends on these, or they are too deep") from error
        except TemplateError as error:  # its own words
            raise ChatTemplateError(" ".join(str(error).split())[:MAX_REASON_LEN]) from error
        except Exception as error:  # a program of somebody else's: it may raise anything
            raise ChatTemplateError(describe_error(error)) from error
        return text


def describe_error(error: Exception) -> str:
    """An error of somebody else's program, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:MAX_REASON_LEN]
