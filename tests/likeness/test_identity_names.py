"""Valid and invalid file names of identities."""

from __future__ import annotations

import pytest
from comfyui_likeness.likeness.identity import identity_file

GOOD = ("anna", "Anna-Maria 2", "family/anna", "a/b/c", "Žoë", "李小龙", "अनिता", "a_b.c", "x" * 120, "console")


@pytest.mark.parametrize("name", GOOD)
def test_good_names(name: str) -> None:
    assert identity_file.check_identity_name(name) == name


def test_names_are_normalized() -> None:
    assert identity_file.check_identity_name("Zoe\u0308") == "Zoë"


BAD = (
    *("", " ", ".", "..", "../anna", "a/../b", "a/..", "/anna", "anna/", "a//b", "C:/anna", "C:anna", "\\anna", "a\\b"),
    *("..\\anna", "a\0", "a\nb", "a\tb", "a\x7f", ".hidden", "a/.hidden", "con", "CON", "nul.txt", "a/Aux", "com1"),
    *("LPT9", "COM¹", "con .x", "anna.", "anna ", " anna", "a /b", "a*b", "a?b", "a|b", "a<b", 'a"b', "a:b", "~root/x"),
    *("$HOME", "%TEMP%", "x" * 121, "李" * 100, "\u202eanna", "a\u200bb", "\ud800", "a\u2215b", "a\u2028b"),
)


@pytest.mark.parametrize("name", BAD)
def test_bad_names(name: str) -> None:
    with pytest.raises(ValueError, match="got the identity name .*expected letters"):
        identity_file.check_identity_name(name)
