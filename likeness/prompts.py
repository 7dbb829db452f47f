"""Where in a prompt a person stands: a word of the user's choice, `@` and the person's name if there is none."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

MARK = "@"

# A person's number for each place where the text names one, and the text between: [text, 0, text, 1, text].
Parts = list[str | int]


def placeholders(names: Sequence[str], given: str) -> list[str]:
    """A word for each person: those given, parted by commas, or `@name`. Raises ValueError where they do not fit."""
    words = [word.strip() for word in given.split(",")] if given.strip() else [default(name) for name in names]
    if len(words) != len(names) or not all(words):
        raise ValueError(
            f"got {len(words)} placeholder(s) for {len(names)} people; expected one word for each, parted by commas, "
            "or none at all for @ and the person's name"
        )
    same = next((word for i, word in enumerate(words) if word.casefold() in map(str.casefold, words[:i])), None)
    if same is not None:
        raise ValueError(f"got {same!r} for two people; expected a word for each; rename one, or set placeholder")
    return words


def default(name: str) -> str:
    """`@` and the name, of a name in a subfolder its last part."""
    return MARK + name.rpartition("/")[2].strip()


def parts(text: str, words: Sequence[str]) -> Parts:
    """The text taken apart at the people's words, which count as whole words in any case. None there: all in front."""
    pattern = "|".join(rf"(?<!\w){re.escape(word)}(?!\w)" for word in sorted(words, key=len, reverse=True))
    numbers = {word.casefold(): i for i, word in enumerate(words)}
    out: Parts = []
    end = 0
    for match in re.finditer(pattern, text, re.IGNORECASE):
        out += [text[end : match.start()], numbers[match[0].casefold()]]
        end = match.end()
    if not out:
        return [*(item for i in range(len(words)) for item in ("", i)), f" {text}"]
    return [*out, text[end:]]


def joined(found: Parts, say: Callable[[int], str]) -> str:
    """The text with what is said of each person at each place."""
    return "".join(item if isinstance(item, str) else say(item) for item in found)
