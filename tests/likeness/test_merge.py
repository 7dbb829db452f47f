"""Merging, mixing and comparing identities, and the averages on the unit sphere."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from comfyui_likeness.likeness.identity import averaging, merge
from comfyui_likeness.likeness.spec import Feature, Identity
from support.identities import ENCODER_HASH, make_identity
from torch import Tensor

ARC = Feature("arcface.buffalo_l", "raw", "face112")
OTHER_ARC = Feature("arcface.antelopev2", "raw", "face112")
PROJECTED = Feature("clip.vit-h-14", "projected", "photo")
GRID = Feature("clip.vit-h-14", "penultimate", "photo")
NEEDS = (ARC, PROJECTED, GRID)
SHAPES = ((16,), (12,), (5, 6))
SEEDS = range(8)


def rows(seed: int, n: int, d: int = 16) -> Tensor:
    """Vectors of different lengths around a common direction."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(d, generator=generator)
    lengths = 5 + 20 * torch.rand(n, 1, generator=generator)
    return averaging.normalize_rows(common + 0.7 * torch.randn(n, d, generator=generator)).double() * lengths


def angle(a: Tensor, b: Tensor) -> float:
    a, b = averaging.normalize_rows(a.double()), averaging.normalize_rows(b.double())
    return float(2 * torch.atan2((a - b).norm(), (a + b).norm()))


def person(seed: int = 0, faces: int = 1, spread: float = 0.5) -> Identity:
    """An identity of several similar faces."""
    one = make_identity(NEEDS, SHAPES, 1, seed)
    generator = torch.Generator().manual_seed(1000 + seed)
    drawn = {
        key: value + spread * torch.randn(faces, *value.shape[1:], generator=generator)
        for key, value in one.embeddings.items()
    }
    crop = torch.randint(0, 256, (faces, 8, 6, 3), generator=generator, dtype=torch.uint8)
    return replace(
        make_identity(NEEDS, SHAPES, faces, seed), embeddings=drawn, zero_embeddings=one.zero_embeddings, crop=crop
    )


def same(a: Identity, b: Identity, close: bool = False) -> bool:
    equal = (lambda x, y: torch.allclose(x, y, rtol=1e-5, atol=1e-5)) if close else torch.equal
    return a.embeddings.keys() == b.embeddings.keys() and all(
        equal(value, b.embeddings[key]) for key, value in a.embeddings.items()
    )


def key(feature: Feature) -> str:
    return feature.format_encoder_id(ENCODER_HASH)


@pytest.mark.parametrize("seed", SEEDS)
def test_slerp(seed: int) -> None:
    a, b = rows(seed, 2)
    assert torch.allclose(averaging.slerp_embeddings(a, b, 0), a) and torch.allclose(
        averaging.slerp_embeddings(a, b, 1), b
    )
    for t in (0.1, 0.5, 0.8):
        between = averaging.slerp_embeddings(a, b, t)
        assert torch.allclose(between, averaging.slerp_embeddings(b, a, 1 - t))
        assert angle(a, between) == pytest.approx(t * angle(a, b), abs=1e-9)
        assert float(between.norm()) == pytest.approx(float((1 - t) * a.norm() + t * b.norm()))
        assert float(
            averaging.slerp_embeddings(averaging.normalize_rows(a), averaging.normalize_rows(b), t).norm()
        ) == pytest.approx(1, abs=1e-12)
        # Two near directions, where the sine of the angle vanishes.
        assert angle(averaging.slerp_embeddings(a, a * 2 + 1e-10, t), a) < 1e-9
        assert torch.allclose(
            averaging.compute_karcher_mean(torch.stack([a, b]), torch.tensor([1 - t, t]).double()), between
        )


def test_slerp_keeps_the_dtype_and_rejects_opposites() -> None:
    a, b = rows(0, 2)
    assert averaging.slerp_embeddings(a.half(), b.half(), 0.5).dtype == torch.float16
    with pytest.raises(ValueError, match="opposite"):
        averaging.slerp_embeddings(a, -a, 0.5)
    with pytest.raises(ValueError, match="cancel out"):
        averaging.compute_spherical_mean(torch.stack([a, -a * 3]), torch.ones(2).double())


def test_zero_vectors_only_shorten_the_mean() -> None:
    a, weight = rows(0, 1), torch.ones(2).double()
    both = torch.cat([a, torch.zeros_like(a)])
    for centre in (
        averaging.compute_spherical_mean,
        averaging.compute_karcher_mean,
        averaging.compute_spherical_median,
    ):
        assert torch.allclose(centre(both, weight), a[0] / 2)
        assert torch.equal(centre(torch.zeros_like(both), weight), torch.zeros(16).double())


def cost(x: Tensor, weight: Tensor, m: Tensor, power: int) -> float:
    return sum(float(w) * angle(row, m) ** power for row, w in zip(x, weight, strict=True))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("centre", "power"), [(averaging.compute_karcher_mean, 2), (averaging.compute_spherical_median, 1)]
)
def test_spherical_averages_minimize_their_cost(centre, power: int, seed: int) -> None:
    x = rows(seed, 5)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.rand(5, generator=generator).double() + 0.1
    m = centre(x, weight)
    best = cost(x, weight, m, power)
    if centre is averaging.compute_karcher_mean:
        assert float(m.norm()) == pytest.approx(float(weight @ x.norm(dim=1) / weight.sum()))
    for size in (1e-1, 1e-2, 1e-3):
        other = averaging.normalize_rows(m) + size * torch.randn(20, 16, generator=generator).double()
        assert all(cost(x, weight, row, power) >= best - 1e-9 for row in other)


@pytest.mark.parametrize("seed", SEEDS)
def test_euclidean_median_minimizes_its_cost(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(6, 40, generator=generator).double()
    weight = torch.rand(6, generator=generator).double() + 0.1
    m = merge.compute_median(x, weight, False)
    best = float(weight @ (x - m).norm(dim=1))
    for size in (1, 1e-2, 1e-3):
        for row in m + size * torch.randn(20, 40, generator=generator).double():
            assert float(weight @ (x - row).norm(dim=1)) >= best - 1e-9
    assert torch.allclose(m, merge.compute_median(x, weight * 7, False))


@pytest.mark.parametrize("direction", [True, False])
def test_median_is_a_row_that_outweighs_the_rest(direction: bool) -> None:
    x = rows(1, 4)
    m = merge.compute_median(x, torch.tensor([1.0, 1.0, 9.0, 1.0]).double(), direction)
    assert angle(m, x[2]) < 1e-6
    assert direction or torch.allclose(m, x[2], atol=1e-6)
    assert torch.allclose(merge.compute_median(x[[0, 0, 0]], torch.ones(3).double(), direction), x[0])


@pytest.mark.parametrize(
    ("lengths", "weight", "length"),
    [
        ([1, 2, 900], [1, 1, 1], 2),
        ([900, 1, 3, 2], [1, 1, 1, 1], 2.5),
        ([1, 2, 3], [5, 1, 1], 1),
        ([3, 2, 1], [1, 2, 1], 2),
        ([4, 8], [1, 1], 6),
    ],
)
def test_the_median_has_the_weighted_median_length(lengths: list[float], weight: list[float], length: float) -> None:
    x = averaging.normalize_rows(rows(0, len(lengths))) * torch.tensor(lengths, dtype=torch.float64)[:, None]
    assert float(
        averaging.compute_spherical_median(x, torch.tensor(weight, dtype=torch.float64)).norm()
    ) == pytest.approx(length)


def test_cosine_matrix() -> None:
    x = torch.tensor([[2.0, 0], [0, 3], [1, 1], [0, 0]])
    h = 0.5**0.5
    want = torch.tensor([[1, 0, h, 0], [0, 1, h, 0], [h, h, 1, 0], [0, 0, 0, 0]], dtype=torch.float64)
    assert torch.allclose(merge.compute_cosine_matrix(x), want)
    assert float(merge.compute_cosine_matrix(rows(0, 9).half()).abs().max()) <= 1


@pytest.mark.parametrize("seed", SEEDS)
def test_outliers_are_found_among_photos_of_one_person(seed: int) -> None:
    x = rows(seed, 7, 256)
    stranger = torch.randn(256, generator=torch.Generator().manual_seed(99 + seed)).double()
    assert merge.find_outliers(x) == []
    for place in (0, 3, 7):
        assert merge.find_outliers(torch.cat([x[:place], stranger[None], x[place:]])) == [place]
    assert merge.find_outliers(torch.cat([x[:2], stranger[None]])) == [2]
    assert merge.find_outliers(torch.stack([x[0], x[1], stranger, x[2], stranger * 1.1])) == [2, 4]


def test_no_outliers_without_a_majority() -> None:
    x = rows(0, 3, 256)
    assert merge.find_outliers(x[:1]) == merge.find_outliers(torch.stack([x[0], -x[0]])) == []
    assert merge.find_outliers(x[[0, 0, 0, 0]]) == []
    assert merge.find_outliers(torch.eye(6)) == []  # six strangers
    # Alike enough to be one person, though less than the others are.
    alike = torch.tensor([[1.0, 0, 0], [1, 0.01, 0], [1, 0, 0.01], [0.6, 0.8, 0]])
    assert merge.find_outliers(alike) == [] and merge.find_outliers(alike, min_cosine=1) == [3]


@pytest.mark.parametrize("method", merge.MERGE_METHODS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_merging_one_face_returns_it(method: str, dtype: torch.dtype) -> None:
    identity = person()
    identity = replace(identity, embeddings={key: value.to(dtype) for key, value in identity.embeddings.items()})
    merged, report = merge.merge_identities([identity], method)
    assert same(merged, identity) and merged.sources == identity.sources and merged.name == identity.name
    for name in ("box", "kps", "score", "weight", "crop"):
        assert torch.equal(getattr(merged, name), getattr(identity, name))
    assert merged.hashes == identity.hashes and merged.zero_embeddings.keys() == identity.zero_embeddings.keys()
    assert "No outliers" in report


@pytest.mark.parametrize("method", merge.MERGE_METHODS)
def test_order_does_not_matter(method: str) -> None:
    people = [person(0, 2), replace(person(0, 1, 0.4), score=torch.tensor([0.5])), person(0, 3, 0.6)]
    first, _ = merge.merge_identities(people, method)
    for order in itertools.permutations(people):
        merged, _ = merge.merge_identities(order, method)
        if method == "concatenate":
            assert all(torch.equal(a.sort(0)[0], first.embeddings[k].sort(0)[0]) for k, a in merged.embeddings.items())
        else:
            assert same(merged, first, close=True) and torch.equal(merged.crop, first.crop)


def test_concatenate_keeps_every_face() -> None:
    a, b = person(0, 2), person(1, 3)
    b = replace(b, crop=torch.full((3, 4, 9, 3), 7, dtype=torch.uint8), weight=torch.tensor([1.0, 0, 2]))
    merged, report = merge.merge_identities([a, b], "concatenate")
    assert len(merged) == 5 and "result 5 face(s)" in report
    assert torch.equal(merged.embeddings[key(ARC)], torch.cat([a.embeddings[key(ARC)], b.embeddings[key(ARC)]]))
    assert merged.weight.tolist() == [1, 1, 1, 0, 2] and len(merged.sources) == 5
    assert merged.crop is not None and merged.crop.shape == (5, 8, 9, 3)
    assert torch.equal(merged.crop[:2, :, :6], a.crop) and torch.equal(merged.crop[2:, :4], b.crop)
    assert not merged.crop[:2, :, 6:].any() and not merged.crop[2:, 4:].any()
    merged, report = merge.merge_identities([a, replace(b, crop=None)], "concatenate")
    assert merged.crop is None and "Dropped the face crops" in report


def test_means_of_unit_embeddings_and_of_grids() -> None:
    identity = person(0, 4)
    merged, _ = merge.merge_identities([identity], "mean")
    for feature in (ARC, PROJECTED):
        given, made = identity.embeddings[key(feature)], merged.embeddings[key(feature)]
        assert float(made.norm()) == pytest.approx(float(given.norm(dim=1).mean()))
        assert torch.allclose(
            averaging.normalize_rows(made[0]),
            averaging.normalize_rows(averaging.normalize_rows(given).sum(0)),
            atol=1e-6,
        )
    assert torch.allclose(merged.embeddings[key(GRID)], identity.embeddings[key(GRID)].mean(0, keepdim=True), atol=1e-6)
    assert merged.weight.tolist() == [4]
    best = int(
        merge.compute_cosine_matrix(torch.cat([merged.embeddings[key(ARC)], identity.embeddings[key(ARC)]]))[
            0, 1:
        ].argmax()
    )
    assert torch.equal(merged.crop[0], identity.crop[best])


@pytest.mark.parametrize(
    ("method", "needs"),
    [("quality-weighted", (ARC, GRID)), ("geometric median", (ARC, GRID)), ("geometric median", (GRID,))],
)
def test_robust_methods_ignore_a_stranger(method: str, needs: tuple[Feature, ...]) -> None:
    generator = torch.Generator().manual_seed(3)
    shapes = tuple({ARC: (256,), GRID: (5, 6)}[feature] for feature in needs)
    one = make_identity(needs, shapes)
    good = {k: v + 0.3 * torch.randn(6, *v.shape[1:], generator=generator) for k, v in one.embeddings.items()}
    bad = {k: 50 * torch.randn(v.shape, generator=generator) for k, v in one.embeddings.items()}
    family = replace(make_identity(needs, shapes, 6), embeddings=good)
    stranger = replace(one, embeddings=bad, name="stranger")
    clean = merge.merge_identities([family], "mean")[0].embeddings
    plain = merge.merge_identities([family, stranger], "mean")[0].embeddings
    merged, report = merge.merge_identities([family, stranger], method)
    for k, want in clean.items():
        far, near = (float((made[k] - want).norm()) for made in (plain, merged.embeddings))
        assert near < 0.2 * far
    assert same(merged, merge.merge_identities([stranger, family], method)[0], close=True)
    assert "7 (stranger: photo 1)" in report if ARC in needs else "cannot be compared" in report


def test_quality_weights() -> None:
    identity = replace(person(0, 3, 0.0), score=torch.tensor([0.9, 0.3, 0.0]), weight=torch.tensor([1.0, 2.0, 1.0]))
    assert torch.allclose(merge.compute_quality_weights(identity).float(), torch.tensor([0.9, 0.6, 0.6]))
    unseen = replace(identity, score=torch.zeros(3))
    assert torch.allclose(merge.compute_quality_weights(unseen).float(), identity.weight)
    against = {key(ARC): torch.tensor([[1.0, 0], [-1.0, 0.0]])}
    strangers = replace(make_identity((ARC,), ((2,),), 2), embeddings=against)
    assert torch.equal(merge.compute_quality_weights(strangers).float(), strangers.weight)


@pytest.mark.parametrize("method", [name for name in merge.MERGE_METHODS if name != "concatenate"])
def test_faces_of_weight_0_are_ignored(method: str) -> None:
    identity = replace(person(0, 4), weight=torch.tensor([1.0, 2.0, 0.0, 0.5]))
    without = merge._select_faces(identity, torch.tensor([0, 1, 3]))
    assert same(merge.merge_identities([identity], method)[0], merge.merge_identities([without], method)[0])
    with pytest.raises(ValueError, match="only faces of weight 0"):
        merge.merge_identities([replace(identity, weight=torch.zeros(4))], method)


def test_only_shared_embeddings_are_kept() -> None:
    a = make_identity((ARC, PROJECTED), ((16,), (12,)), 1, 0)
    b = replace(make_identity((ARC, OTHER_ARC, PROJECTED), ((16,), (16,), (13,)), 1, 1), name="bob")
    merged, report = merge.merge_identities([a, b], "mean")
    assert list(merged.embeddings) == list(merged.zero_embeddings) == list(merged.hashes) == [key(ARC)]
    assert "Dropped arcface.antelopev2.raw.face112: identity 1 ('person 0') lacks it." in report
    assert "Dropped clip.vit-h-14.projected.photo: its shapes differ" in report
    assert "different names" in report
    only = make_identity((OTHER_ARC,), ((16,),), 1, 1)
    with pytest.raises(ValueError, match="'person 0'.*has arcface.buffalo_l.*'person 1'.*has arcface.antelopev2"):
        merge.merge_identities([a, only], "mean")
    with pytest.raises(ValueError, match="no identity"):
        merge.merge_identities([], "mean")
    with pytest.raises(ValueError, match="expected one of mean"):
        merge.merge_identities([a], "sum")


def test_different_encoder_files_give_a_warning() -> None:
    sha = "f" * 64
    a, b, c = (make_identity((ARC,), ((16,),), 1, seed) for seed in range(3))
    other = ARC.format_encoder_id(sha)
    odd = replace(
        b, embeddings={other: b.embeddings[key(ARC)]}, zero_embeddings={other: torch.ones(1, 16)}, hashes={other: sha}
    )
    for order in itertools.permutations([a, odd, c]):
        merged, report = merge.merge_identities(order, "mean")
        assert f"Warning: {ARC} comes from different encoder files (01234567, ffffffff)" in report
        assert list(merged.embeddings) == [key(ARC)] and merged.hashes == {key(ARC): ENCODER_HASH}
        assert not torch.equal(merged.zero_embeddings[key(ARC)], torch.ones(1, 16))
        assert same(merged, merge.merge_identities([a, b, c], "mean")[0], close=True)
    assert "different encoder files" in merge.describe_mix([a, odd], [1, 1])


def test_reports_of_many_faces_stay_small() -> None:
    report = merge.merge_identities([person(0, 40)], "mean")[1]
    assert "agreement" in report and max(map(len, report.splitlines())) < 200
    assert len(merge.merge_identities([person(0, 40)], "mean")[0].sources[0]) <= 200


def test_mix_of_two() -> None:
    a, b = person(0), person(1)
    mixed = merge.mix_identities([a, b], [3, 1])
    for feature in (ARC, PROJECTED):
        x, y = a.embeddings[key(feature)][0], b.embeddings[key(feature)][0]
        assert torch.allclose(mixed.embeddings[key(feature)][0], averaging.slerp_embeddings(x, y, 0.25), atol=1e-6)
    grid = 0.75 * a.embeddings[key(GRID)] + 0.25 * b.embeddings[key(GRID)]
    assert torch.allclose(mixed.embeddings[key(GRID)], grid, atol=1e-6)
    assert torch.equal(mixed.crop, a.crop) and mixed.name == "person 0 and person 1"
    assert (
        mixed.sources == ("person 0 75%, person 1 25%",)
        and len(mixed) == 1
        and mixed.zero_embeddings.keys() == a.zero_embeddings.keys()
    )
    assert same(merge.mix_identities([b, a], [1, 3]), mixed, close=True)
    assert torch.equal(merge.mix_identities([a, b], [1, 3]).crop, b.crop)
    assert merge.describe_mix([a, b], [3, 1]) == "person 0: 75.0%\nperson 1: 25.0%"


def test_mix_of_more() -> None:
    people = [person(seed, 1 + seed) for seed in range(4)]
    weights = [0.1, 0.4, 0.3, 0.2]
    mixed = merge.mix_identities(people, weights)
    for order in itertools.permutations(range(4)):
        assert same(merge.mix_identities([people[i] for i in order], [weights[i] for i in order]), mixed, close=True)
    assert same(merge.mix_identities(people, [2 * w for w in weights]), mixed, close=True)
    assert same(merge.mix_identities(people, [1e308] * 4), merge.mix_identities(people, [1] * 4), close=True)
    # Faces count within their identity only.
    assert same(merge.mix_identities(people[:2], [1, 0]), merge.merge_identities(people[:1], "mean")[0])
    many = replace(people[1], weight=people[1].weight * 50)
    assert same(merge.mix_identities([people[0], many], [1, 1]), merge.mix_identities(people[:2], [1, 1]), close=True)


def test_identities_of_weight_0_are_ignored_in_a_mix() -> None:
    a, b = person(0), person(1)
    poor = replace(person(2), embeddings={}, weight=torch.zeros(1))
    assert same(merge.mix_identities([a, poor, b], [1, 0, 2]), merge.mix_identities([a, b], [1, 2]))
    assert same(merge.mix_identities([a], [5]), a) and merge.mix_identities([a], [5]).sources == a.sources


@pytest.mark.parametrize(
    "weights", [[], [1], [1, 1, 1], [0, 0], [1, -1], [float("nan"), 1], [float("inf"), 1]], ids=str
)
def test_invalid_weights_are_rejected(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="expected one per identity"):
        merge.mix_identities([person(0), person(1)], weights)


def test_parse_weights() -> None:
    assert merge.parse_weights("", 3) == merge.parse_weights(" , ", 3) == [1, 1, 1]
    assert merge.parse_weights("0.7, .3", 2) == merge.parse_weights("0.7 .3", 2) == merge.parse_weights("0.7;.3\n", 2)
    assert merge.parse_weights("1e-1,2", 2) == [0.1, 2]
    for text in ("1", "1,2,3", "one two", "1,b"):
        with pytest.raises(ValueError, match="expected 2 numbers"):
            merge.parse_weights(text, 2)
