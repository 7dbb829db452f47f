"""Placeholders for people in a prompt: words that the user chooses, by default `@` and the person's name.

Text is compared in Unicode normalization form C and without case.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence

PLACEHOLDER_MARK = "@"
# Scripts in which words and particles follow each other without a space: Thai, Lao, Tibetan, Burmese, Hangul, Khmer,
# Kana, Bopomofo, Han. First and last code point of each range of letters.
UNSPACED_SCRIPTS = (
    (0x0E00, 0x109F), (0x1100, 0x11FF), (0x1780, 0x17FF), (0x3005, 0x3007), (0x3040, 0x318F), (0x31A0, 0x31FF),
    (0x3400, 0x9FFF), (0xAC00, 0xD7FF), (0xF900, 0xFAFF), (0xFF66, 0xFFDC), (0x20000, 0x3FFFF),
)  # fmt: skip

# The text split at its placeholders, each replaced by the index of the person: [text, 0, text, 1, text].
PromptParts = list[str | int]


def parse_placeholders(names: Sequence[str], text: str) -> list[str]:
    """A placeholder per person: comma-separated words, or `@name` each. Raises ValueError where they do not fit."""
    words = (
        [unicodedata.normalize("NFC", word.strip()) for word in text.split(",")]
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
    return PLACEHOLDER_MARK + unicodedata.normalize("NFC", name.rpartition("/")[2].strip())


def split_prompt(text: str, placeholders: Sequence[str]) -> PromptParts:
    """Split a text at its placeholders, as whole words in any case. If it has none, all people come first."""
    parts = _split_at_placeholders(text, placeholders)
    if len(parts) == 1:
        return [*(item for i in range(len(placeholders)) for item in ("", i)), f" {parts[0]}"]
    return parts


def describe_missing_people(text: str, placeholders: Sequence[str]) -> str:
    """What `split_prompt` does with the people whose placeholder is not in the text; empty if all are."""
    parts = _split_at_placeholders(text, placeholders)
    missing = ", ".join(word for i, word in enumerate(placeholders) if i not in parts)
    if not missing:
        return ""
    return f"Not in the text, {'put in front' if len(parts) == 1 else 'left out'}: {missing}."


def _split_at_placeholders(text: str, placeholders: Sequence[str]) -> PromptParts:
    text = unicodedata.normalize("NFC", text)
    # Some letters have several in lower case: the position in the text of each, and of the end.
    folded = "".join(char.casefold() for char in text)
    positions = [i for i, char in enumerate(text) for _ in char.casefold()] + [len(text)]
    words = sorted(((word.casefold(), i) for i, word in enumerate(placeholders)), key=lambda one: -len(one[0]))
    out: PromptParts = []
    end = start = 0
    while start < len(folded):
        matches = ((word, i) for word, i in words if folded.startswith(word, start))
        word, person = next((one for one in matches if _is_whole_word(folded, start, start + len(one[0]))), ("", -1))
        if word:
            out += [text[end : positions[start]], person]
            end = positions[start + len(word)]
        start += max(len(word), 1)
    return [*out, text[end:]]


def _is_whole_word(text: str, start: int, end: int) -> bool:
    """Whether no word goes on before or behind a part of a text."""
    before, first, last, behind = text[start - 1 : start], text[start], text[end - 1], text[end : end + 1]
    if behind and unicodedata.category(behind)[0] == "M":  # belongs to the last letter
        return False
    return not (
        (_continues_word(before) and not _is_unspaced(first)) or (_continues_word(behind) and not _is_unspaced(last))
    )


def _continues_word(char: str) -> bool:
    return (
        bool(char)
        and (char.isalnum() or char == "_" or unicodedata.category(char)[0] == "M")
        and not _is_unspaced(char)
    )


def _is_unspaced(char: str) -> bool:
    return any(first <= ord(char) <= last for first, last in UNSPACED_SCRIPTS)


def join_prompt(prompt_parts: PromptParts, describe_person: Callable[[int], str]) -> str:
    """The text with each placeholder replaced by the description of its person."""
    return "".join(item if isinstance(item, str) else describe_person(item) for item in prompt_parts)
