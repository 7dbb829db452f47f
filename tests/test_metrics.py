"""Metrics of the report, on answers that are known."""

from __future__ import annotations

import math

import pytest
import scipy.linalg
import torch
from comfyui_likeness.training import metrics

X, Y, Z, NONE = *torch.eye(3), torch.zeros(3)


def test_a_picture_without_a_face_is_like_nobody() -> None:
    seen = torch.stack((2 * X, X + Y, NONE))
    assert metrics.cosines(seen, X).tolist() == pytest.approx([1, math.sqrt(0.5), 0])
    assert metrics.nearest(seen, torch.stack((-X, -Y))).tolist() == pytest.approx([0, -math.sqrt(0.5), 0])
    assert metrics.nearest(seen, -X[None])[2] == 0
    assert metrics.lost(seen).tolist() == [0, 0, 1]


def test_the_direction_of_photos_does_not_depend_on_their_lengths() -> None:
    assert torch.allclose(metrics.direction(torch.stack((9 * X, Y))), (X + Y).double() / math.sqrt(2))


def test_paste_is_how_much_nearer_the_references_are() -> None:
    seen = torch.stack((X, Y))
    ref, target = metrics.nearest(seen, torch.stack((X, Z))), metrics.cosines(seen, torch.stack((Y, Y)))
    assert metrics.paste(ref, target).tolist() == [1, -1]


def test_adherence_counts_what_was_asked_of_others_as_wrong() -> None:
    cosine, right = metrics.adherence(torch.stack((X + 0.1 * Z, Z)), torch.stack((X, Y, Z)), torch.tensor([0, 1]))
    assert right.tolist() == [1, 0] and cosine[1] == 0
    assert float(cosine[0]) == pytest.approx(1 / math.sqrt(1.01))


def test_a_style_is_found_where_its_own_text_is_nearest() -> None:
    seen, texts = torch.stack((X + 0.1 * Y, Y + 0.1 * X, X)), torch.stack((X, Y, Z))
    assert metrics.likest(seen, 3 * texts, torch.tensor([0, 0, 0])).tolist() == [1, 0, 1]
    assert metrics.likest(seen, texts, torch.tensor([0, 1, 2])).tolist() == [1, 1, 0]


def test_two_people_are_right_only_where_both_are() -> None:
    pictures = [(X, Y), (Y, X), (X, X), (X, NONE), (X, X + Y / 2)]
    found = metrics.assignment(torch.stack([torch.stack(pair) for pair in pictures]), torch.stack((X, Y)))
    assert found.right.tolist() == [1, 0, 0, 0, 0] and found.assigned.tolist() == [1, 0, 0, 0, 1]
    assert found.own.tolist()[:4] == [1, 0, 0.5, 0.5] and found.swapped.tolist()[:4] == [0, 1, 0.5, 0]
    assert found.lost.tolist() == [0, 0, 0, 0.5, 0]


def test_frechet_distance_is_that_of_normal_distributions() -> None:
    chance = torch.Generator().manual_seed(3)
    wide = torch.tensor([1.0, 2.0, 3.0])
    near, far = torch.randn(4000, 3, generator=chance), torch.randn(3000, 3, generator=chance) * wide + 2
    found = metrics.frechet(near, far)
    assert found == pytest.approx(3 * 4 + 0 + 1 + 4, rel=0.05)  # of the means, and (sigma - 1)^2
    covariances = [rows.double().T.cov() for rows in (near, far)]
    root = scipy.linalg.sqrtm((covariances[0] @ covariances[1]).numpy()).real.trace()
    means = float((near.double().mean(0) - far.double().mean(0)).square().sum())
    assert found == pytest.approx(means + sum(float(c.trace()) for c in covariances) - 2 * root, abs=1e-6)
    assert metrics.frechet(far, near) == pytest.approx(found, abs=1e-6)
    assert metrics.frechet(near[:5], near[:5]) == pytest.approx(0, abs=1e-5)
    few = torch.randn(4, 9, generator=chance)  # of a covariance that has no inverse
    assert metrics.frechet(few, few) == pytest.approx(0, abs=1e-5)
    with pytest.raises(ValueError, match="got 1 and 4 pictures"):
        metrics.frechet(few[:1], few)


def test_the_interval_is_the_means_own() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(1)) * 2 + 3
    found = metrics.interval(values)
    error = 1.96 * float(values.std()) / 20
    assert found.mean == pytest.approx(float(values.mean()), abs=1e-6)
    assert (found.mean - found.low, found.high - found.mean) == pytest.approx((error, error), rel=0.1)
    assert metrics.interval(values) == found != metrics.interval(values, seed=1)
    assert metrics.interval(torch.full((5,), 0.5)) == (0.5, 0.5, 0.5)
