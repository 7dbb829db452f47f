"""Names of people in prompts: whole words, in any case, script and Unicode form."""

from __future__ import annotations

import pytest
from comfyui_likeness.likeness.methods import prompt_placeholders


def test_placeholders_are_whole_words() -> None:
    assert prompt_placeholders.split_prompt("zoe, Zs and a zebra", ["z"])[:2] == ["", 0]
    assert prompt_placeholders.split_prompt("mail me@anna, @annabel or @anna-lena", ["@anna"]) == [
        "mail me@anna, @annabel or ", 0, "-lena",
    ]  # fmt: skip
    assert prompt_placeholders.make_default_placeholder("family/Anna Maria") == "@Anna Maria"


# Placeholders, a text, and what is left of it: {0} is the first person.
NAMES_IN_TEXTS = [
    (["@Jos\u00e9"], "@Jose\u0301 and @JOSE\u0301, not @Jose\u0301e", "{0} and {0}, not @Jos\u00e9e"),
    (["@Jose"], "@Jose\u0301 or @Jose", "@Jos\u00e9 or {0}"),
    (["@\u0130pek"], "@\u0130pek, @i\u0307pek, @ipek", "{0}, {0}, @ipek"),
    (["@Strau\u00df"], "@STRAUSS, @strau\u00df", "{0}, {0}"),
    (["@安娜"], "在公园@安娜跑步，@安娜is here", "在公园{0}跑步，{0}is here"),
    (["@安娜", "@安娜贝尔"], "@安娜贝尔和@安娜", "{1}和{0}"),
    (["@さくら"], "私は@さくらちゃんと", "私は{0}ちゃんと"),
    (["@안나"], "@안나가 공원에서", "{0}가 공원에서"),
    (["@ก้อง"], "@ก้องวิ่ง", "{0}วิ่ง"),
    (["@anna"], "看@anna在公园, @annabel, @anna2, me@anna, @anna_b", "看{0}在公园, @annabel, @anna2, me@anna, @anna_b"),
    (["@안나"], "me@안나", "me@안나"),
    (["@राम"], "@राम और @रामा", "{0} और @रामा"),
    (["安娜"], "photo of安娜in rain", "photo of{0}in rain"),
]


@pytest.mark.parametrize(("placeholders", "text", "expected"), NAMES_IN_TEXTS)
def test_names_of_every_script_are_found(placeholders: list[str], text: str, expected: str) -> None:
    words = prompt_placeholders.parse_placeholders([""] * len(placeholders), ",".join(placeholders))
    parts = prompt_placeholders.split_prompt(text, words)
    found = prompt_placeholders.join_prompt(parts, lambda person: f"{{{person}}}")
    assert found == (expected if "{" in expected else f"{{0}} {expected}")  # without a name, the person comes first


def test_names_are_compared_in_one_normal_form() -> None:
    decomposed = "Zoe\u0308"
    assert prompt_placeholders.make_default_placeholder(decomposed) == "@Zo\u00eb"
    with pytest.raises(ValueError, match="for two people"):
        prompt_placeholders.parse_placeholders([decomposed, "Zo\u00eb"], "")
