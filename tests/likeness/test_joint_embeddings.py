"""Joint embeddings when identities are merged and mixed."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from comfyui_likeness.likeness.identity import merge
from comfyui_likeness.likeness.spec import Feature, Identity
from support.identities import ENCODER_HASH, make_identity
from torch import Tensor

ARC = Feature("arcface.buffalo_l", "raw", "face112")
OMNI = Feature("omni_id", "tokens", "face224")
KEY = OMNI.format_encoder_id(ENCODER_HASH)


def person(seed: int = 0, faces: int = 1, needs: tuple[Feature, ...] = (ARC,), sha256: str = ENCODER_HASH) -> Identity:
    """Similar faces of one person, and joint tokens."""
    one = make_identity(needs, ((256,),) * len(needs), faces, seed)
    alike = {key: rows[:1] + 0.1 * rows for key, rows in one.embeddings.items()}
    tokens = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(100 + seed))
    key = OMNI.format_encoder_id(sha256)
    return replace(one, embeddings=alike, joint_embeddings={key: tokens}, hashes=dict(one.hashes) | {key: sha256})


def tokens(identity: Identity) -> Tensor:
    (made,) = identity.joint_embeddings.values()
    assert made.shape == (1, 6, 8) and identity.hashes.keys() == {*identity.embeddings, *identity.joint_embeddings}
    return made


def test_find_joint_embedding() -> None:
    identity = person()
    assert identity.find_joint_embedding(OMNI) == KEY and identity.find_embedding(OMNI) is None
    assert (
        identity.find_joint_embedding(ARC) is None and make_identity((ARC,), ((4,),)).find_joint_embedding(OMNI) is None
    )


@pytest.mark.parametrize("method", merge.MERGE_METHODS)
def test_merging_one_identity_keeps_joint_embeddings(method: str) -> None:
    identity = person(0, 3)
    merged, report = merge.merge_identities([identity], method)
    assert torch.equal(tokens(merged), tokens(identity)) and "Averaged" not in report
    half = replace(identity, joint_embeddings={KEY: tokens(identity).half()})
    assert tokens(merge.merge_identities([half], method)[0]).dtype == torch.float16


@pytest.mark.parametrize("method", ["mean", "concatenate"])
def test_merging_averages_joint_embeddings_by_face_weight(method: str) -> None:
    a, b = person(0, 3), replace(person(1, 2), weight=torch.tensor([1.0, 0.0]), name="person 0")
    merged, report = merge.merge_identities([a, b], method)
    assert torch.allclose(tokens(merged), 0.75 * tokens(a) + 0.25 * tokens(b), atol=1e-6)
    assert f"Averaged {KEY}: encoding all photos jointly would keep more of the likeness." in report
    absent = replace(b, weight=torch.zeros(2))
    assert torch.equal(tokens(merge.merge_identities([a, absent], method)[0]), tokens(a))
    nobody = [replace(identity, weight=torch.zeros(len(identity))) for identity in (a, b)]
    if method == "concatenate":
        assert torch.allclose(tokens(merge.merge_identities(nobody, method)[0]), (tokens(a) + tokens(b)) / 2, atol=1e-6)


@pytest.mark.parametrize("method", merge.MERGE_METHODS)
def test_the_order_of_identities_does_not_matter(method: str) -> None:
    people = [
        person(0, 2),
        replace(person(0), joint_embeddings=person(1).joint_embeddings),
        replace(person(0, 3), joint_embeddings=person(2).joint_embeddings),
    ]
    first = tokens(merge.merge_identities(people, method)[0])
    for order in itertools.permutations(people):
        assert torch.allclose(tokens(merge.merge_identities(order, method)[0]), first, atol=1e-5)


@pytest.mark.parametrize("method", ["quality-weighted", "geometric median"])
def test_robust_methods_ignore_a_stranger(method: str) -> None:
    her = [replace(person(0), joint_embeddings={KEY: tokens(person(0)) + 0.1 * tokens(person(i))}) for i in range(1, 5)]
    stranger = replace(person(9), joint_embeddings={KEY: 50 * tokens(person(9))})
    clean = tokens(merge.merge_identities(her, "mean")[0])
    near, far = (
        float((tokens(merge.merge_identities([*her, stranger], name)[0]) - clean).norm()) for name in (method, "mean")
    )
    assert near < 0.2 * far


def test_other_encoder_files_and_missing_joint_embeddings() -> None:
    other = person(1, sha256="f" * 64)
    merged, report = merge.merge_identities([person(0), other, person(2)], "mean")
    assert list(merged.joint_embeddings) == [KEY] and f"Warning: {OMNI} comes from different encoder files" in report
    merged, report = merge.merge_identities([person(0), replace(person(1), joint_embeddings={})], "mean")
    assert not merged.joint_embeddings and f"Dropped {OMNI}: identity 2 ('person 1') lacks it." in report
    short = replace(person(1), joint_embeddings={KEY: torch.zeros(1, 5, 8)})
    merged, report = merge.merge_identities([person(0), short], "mean")
    assert not merged.joint_embeddings and f"Dropped {OMNI}: its shapes differ" in report and KEY not in merged.hashes


@pytest.mark.parametrize("method", merge.MERGE_METHODS)
def test_identities_with_only_joint_embeddings(method: str) -> None:
    a, b = person(0, 2, ()), replace(person(1, 1, ()), name="bob")
    merged, report = merge.merge_identities([a, b], method)
    assert len(merged) == (3 if method == "concatenate" else 1) and not merged.embeddings
    middle = tokens(a) if "median" in method else (2 * tokens(a) + tokens(b)) / 3  # with two thirds of the weight
    assert torch.allclose(tokens(merged), middle, atol=1e-5)
    assert "the faces cannot be compared" in report
    assert torch.allclose(tokens(merge.mix_identities([a, b], [1, 3])), 0.25 * tokens(a) + 0.75 * tokens(b), atol=1e-6)
    with pytest.raises(ValueError, match="'person 0'.*has omni_id.tokens.face224; .*'bob'.*has nothing"):
        merge.merge_identities([a, replace(b, joint_embeddings={}, hashes={})], method)


def test_a_mix_is_linear_and_ignores_weight_0() -> None:
    a, b, c = (person(seed, 1 + seed) for seed in range(3))
    mixed = merge.mix_identities([a, b, c], [0.5, 0.3, 0.2])
    assert torch.allclose(tokens(mixed), 0.5 * tokens(a) + 0.3 * tokens(b) + 0.2 * tokens(c), atol=1e-6)
    assert torch.equal(tokens(merge.mix_identities([a, b, c], [2, 0, 1])), tokens(merge.mix_identities([a, c], [2, 1])))
    assert torch.equal(tokens(merge.mix_identities([b], [5])), tokens(b))
    assert merge.mix_identities([a, replace(b, joint_embeddings={})], [1, 1]).joint_embeddings == {}
    assert "lacks it" in merge.describe_mix([a, replace(b, joint_embeddings={})], [1, 1])
