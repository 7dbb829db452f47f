"""Placeholders for people in a prompt: words that the user chooses, by default `@` and the person's name."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

PLACEHOLDER_MARK = "@"

# The text split at its placeholders, each replaced by the index of the person: [text, 0, text, 1, text].
PromptParts = list[str | int]


def parse_placeholders(names: Sequence[str], text: str) -> list[str]:
    """A placeholder per person: comma-separated words, or `@name` each. Raises ValueError where they do not fit."""
    words = (
        [word.strip() for word in text.split(",")]
        if text.strip()
        else [make_default_placeholder(name) for name in names]
    )
    if len(words) != len(names) or not all(words):
        raise ValueError(
            f"got {len(words)} placeholder(s) for {len(names)} people; expected one word for each, "
            "separated by commas, or none at all for @ and the person's name"
        )
    duplicate = next((word for i, word in enumerate(words) if word.casefold() in map(str.casefold, words[:i])), None)
    if duplicate is not None:
        raise ValueError(f"got {duplicate!r} for two people; expected a word for each; rename one, or set placeholder")
    return words


def make_default_placeholder(name: str) -> str:
    """`@` and the name; of a name with a subfolder, `@` and its last part."""
    return PLACEHOLDER_MARK + name.rpartition("/")[2].strip()


def split_prompt(text: str, placeholders: Sequence[str]) -> PromptParts:
    """Split a text at its placeholders, as whole words in any case. If it has none, all people come first."""
    pattern = "|".join(rf"(?<!\w){re.escape(word)}(?!\w)" for word in sorted(placeholders, key=len, reverse=True))
    indices = {word.casefold(): i for i, word in enumerate(placeholders)}
    out: PromptParts = []
    end = 0
    for match in re.finditer(pattern, text, re.IGNORECASE):
        out += [text[end : match.start()], indices[match[0].casefold()]]
        end = match.end()
    if not out:
        return [*(item for i in range(len(placeholders)) for item in ("", i)), f" {text}"]
    return [*out, text[end:]]


def join_prompt(prompt_parts: PromptParts, describe_person: Callable[[int], str]) -> str:
    """The text with each placeholder replaced by the description of its person."""
    return "".join(item if isinstance(item, str) else describe_person(item) for item in prompt_parts)
