"""What an encoder made of all faces together, when identities are merged and mixed."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from comfyui_likeness.likeness import identity as math
from comfyui_likeness.likeness.spec import Feature, Identity
from identities import HASH, identity
from torch import Tensor

ARC = Feature("arcface.buffalo_l", "raw", "face112")
OMNI = Feature("omni_id", "tokens", "face224")
KEY = OMNI.id(HASH)


def person(seed: int = 0, faces: int = 1, needs: tuple[Feature, ...] = (ARC,), sha256: str = HASH) -> Identity:
    """Faces of one person, alike, and tokens of all of them together."""
    one = identity(needs, ((256,),) * len(needs), faces, seed)
    alike = {key: rows[:1] + 0.1 * rows for key, rows in one.embeddings.items()}
    tokens = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(100 + seed))
    key = OMNI.id(sha256)
    return replace(one, embeddings=alike, joint={key: tokens}, hashes=dict(one.hashes) | {key: sha256})


def tokens(who: Identity) -> Tensor:
    (made,) = who.joint.values()
    assert made.shape == (1, 6, 8) and who.hashes.keys() == {*who.embeddings, *who.joint}
    return made


def test_they_are_found_by_their_feature() -> None:
    who = person()
    assert who.find_joint(OMNI) == KEY and who.find(OMNI) is None
    assert who.find_joint(ARC) is None and identity((ARC,), ((4,),)).find_joint(OMNI) is None


@pytest.mark.parametrize("method", math.METHODS)
def test_a_merge_of_one_identity_keeps_them(method: str) -> None:
    who = person(0, 3)
    merged, report = math.merge([who], method)
    assert torch.equal(tokens(merged), tokens(who)) and "Averaged" not in report
    half = replace(who, joint={KEY: tokens(who).half()})
    assert tokens(math.merge([half], method)[0]).dtype == torch.float16


@pytest.mark.parametrize("method", ["mean", "concatenate"])
def test_a_merge_of_several_averages_them_by_their_faces_weights_and_says_so(method: str) -> None:
    a, b = person(0, 3), replace(person(1, 2), weight=torch.tensor([1.0, 0.0]), name="person 0")
    merged, report = math.merge([a, b], method)
    assert torch.allclose(tokens(merged), 0.75 * tokens(a) + 0.25 * tokens(b), atol=1e-6)
    assert f"Averaged {KEY}: to encode all photos together would keep more of the person." in report
    absent = replace(b, weight=torch.zeros(2))
    assert torch.equal(tokens(math.merge([a, absent], method)[0]), tokens(a))
    nobody = [replace(who, weight=torch.zeros(len(who))) for who in (a, b)]
    if method == "concatenate":
        assert torch.allclose(tokens(math.merge(nobody, method)[0]), (tokens(a) + tokens(b)) / 2, atol=1e-6)


@pytest.mark.parametrize("method", math.METHODS)
def test_the_order_of_identities_does_not_matter(method: str) -> None:
    people = [person(0, 2), replace(person(0), joint=person(1).joint), replace(person(0, 3), joint=person(2).joint)]
    first = tokens(math.merge(people, method)[0])
    for order in itertools.permutations(people):
        assert torch.allclose(tokens(math.merge(order, method)[0]), first, atol=1e-5)


@pytest.mark.parametrize("method", ["quality-weighted", "geometric median"])
def test_a_stranger_moves_them_little_by_the_robust_methods(method: str) -> None:
    her = [replace(person(0), joint={KEY: tokens(person(0)) + 0.1 * tokens(person(i))}) for i in range(1, 5)]
    stranger = replace(person(9), joint={KEY: 50 * tokens(person(9))})
    clean = tokens(math.merge(her, "mean")[0])
    near, far = (float((tokens(math.merge([*her, stranger], name)[0]) - clean).norm()) for name in (method, "mean"))
    assert near < 0.2 * far


def test_without_a_common_file_or_for_all_they_are_dropped_or_warned_of() -> None:
    other = person(1, sha256="f" * 64)
    merged, report = math.merge([person(0), other, person(2)], "mean")
    assert list(merged.joint) == [KEY] and f"Warning: {OMNI} comes from different encoder files" in report
    merged, report = math.merge([person(0), replace(person(1), joint={})], "mean")
    assert not merged.joint and f"Dropped {OMNI}: identity 2 ('person 1') lacks it." in report
    short = replace(person(1), joint={KEY: torch.zeros(1, 5, 8)})
    merged, report = math.merge([person(0), short], "mean")
    assert not merged.joint and f"Dropped {OMNI}: its shapes differ" in report and KEY not in merged.hashes


@pytest.mark.parametrize("method", math.METHODS)
def test_they_are_enough_to_merge_and_to_mix(method: str) -> None:
    a, b = person(0, 2, ()), replace(person(1, 1, ()), name="bob")
    merged, report = math.merge([a, b], method)
    assert len(merged) == (3 if method == "concatenate" else 1) and not merged.embeddings
    middle = tokens(a) if "median" in method else (2 * tokens(a) + tokens(b)) / 3  # with two thirds of the weight
    assert torch.allclose(tokens(merged), middle, atol=1e-5)
    assert "the faces cannot be compared" in report
    assert torch.allclose(tokens(math.mix([a, b], [1, 3])), 0.25 * tokens(a) + 0.75 * tokens(b), atol=1e-6)
    with pytest.raises(ValueError, match="'person 0'.*holds omni_id.tokens.face224; .*'bob'.*holds nothing"):
        math.merge([a, replace(b, joint={}, hashes={})], method)


def test_a_mix_is_linear_and_weight_0_equals_absence() -> None:
    a, b, c = (person(seed, 1 + seed) for seed in range(3))
    mixed = math.mix([a, b, c], [0.5, 0.3, 0.2])
    assert torch.allclose(tokens(mixed), 0.5 * tokens(a) + 0.3 * tokens(b) + 0.2 * tokens(c), atol=1e-6)
    assert torch.equal(tokens(math.mix([a, b, c], [2, 0, 1])), tokens(math.mix([a, c], [2, 1])))
    assert torch.equal(tokens(math.mix([b], [5])), tokens(b))
    assert math.mix([a, replace(b, joint={})], [1, 1]).joint == {}
    assert "lacks it" in math.mix_report([a, replace(b, joint={})], [1, 1])
