"""Metrics of the report on inputs with known results."""

from __future__ import annotations

import math

import pytest
import scipy.linalg
import torch
from comfyui_likeness.portrait_world.evaluation import metrics

X, Y, Z, NONE = *torch.eye(3), torch.zeros(3)


def test_image_without_a_face_has_cosine_0() -> None:
    faces = torch.stack((2 * X, X + Y, NONE))
    assert metrics.compute_cosines(faces, X).tolist() == pytest.approx([1, math.sqrt(0.5), 0])
    assert metrics.compute_reference_similarity(faces, torch.stack((-X, -Y))).tolist() == pytest.approx(
        [0, -math.sqrt(0.5), 0]
    )
    assert metrics.compute_reference_similarity(faces, -X[None])[2] == 0
    assert metrics.flag_missing_faces(faces).tolist() == [0, 0, 1]


def test_mean_unit_embedding_does_not_depend_on_norms() -> None:
    assert torch.allclose(metrics.compute_mean_unit_embedding(torch.stack((9 * X, Y))), (X + Y).double() / math.sqrt(2))


def test_paste_is_reference_minus_target_similarity() -> None:
    faces = torch.stack((X, Y))
    ref, target = (
        metrics.compute_reference_similarity(faces, torch.stack((X, Z))),
        metrics.compute_cosines(faces, torch.stack((Y, Y))),
    )
    assert metrics.compute_paste_score(ref, target).tolist() == [1, -1]


def test_adherence_counts_other_prompts_as_wrong() -> None:
    cosine, right = metrics.measure_adherence(
        torch.stack((X + 0.1 * Z, Z)), torch.stack((X, Y, Z)), torch.tensor([0, 1])
    )
    assert right.tolist() == [1, 0] and cosine[1] == 0
    assert float(cosine[0]) == pytest.approx(1 / math.sqrt(1.01))


def test_style_matches_if_its_text_has_the_highest_cosine() -> None:
    faces, texts = torch.stack((X + 0.1 * Y, Y + 0.1 * X, X)), torch.stack((X, Y, Z))
    assert metrics.match_top_text(faces, 3 * texts, torch.tensor([0, 0, 0])).tolist() == [1, 0, 1]
    assert metrics.match_top_text(faces, texts, torch.tensor([0, 1, 2])).tolist() == [1, 1, 0]


def test_assignment_of_two_people() -> None:
    pairs = [(X, Y), (Y, X), (X, X), (X, NONE), (X, X + Y / 2)]
    result = metrics.measure_assignment(torch.stack([torch.stack(pair) for pair in pairs]), torch.stack((X, Y)))
    assert result.right.tolist() == [1, 0, 0, 0, 0] and result.assigned.tolist() == [1, 0, 0, 0, 1]
    assert result.own.tolist()[:4] == [1, 0, 0.5, 0.5] and result.swapped.tolist()[:4] == [0, 1, 0.5, 0]
    assert result.lost.tolist() == [0, 0, 0, 0.5, 0]


def test_frechet_distance_of_normal_distributions() -> None:
    generator = torch.Generator().manual_seed(3)
    wide = torch.tensor([1.0, 2.0, 3.0])
    near, far = torch.randn(4000, 3, generator=generator), torch.randn(3000, 3, generator=generator) * wide + 2
    result = metrics.compute_frechet_distance(near, far)
    assert result == pytest.approx(3 * 4 + 0 + 1 + 4, rel=0.05)  # means, then (sigma - 1)^2
    covariances = [rows.double().T.cov() for rows in (near, far)]
    root = scipy.linalg.sqrtm((covariances[0] @ covariances[1]).numpy()).real.trace()
    means = float((near.double().mean(0) - far.double().mean(0)).square().sum())
    assert result == pytest.approx(means + sum(float(c.trace()) for c in covariances) - 2 * root, abs=1e-6)
    assert metrics.compute_frechet_distance(far, near) == pytest.approx(result, abs=1e-6)
    assert metrics.compute_frechet_distance(near[:5], near[:5]) == pytest.approx(0, abs=1e-5)
    few = torch.randn(4, 9, generator=generator)  # singular covariance
    assert metrics.compute_frechet_distance(few, few) == pytest.approx(0, abs=1e-5)
    with pytest.raises(ValueError, match="got 1 and 4 images"):
        metrics.compute_frechet_distance(few[:1], few)


def test_bootstrap_interval_matches_the_normal_approximation() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(1)) * 2 + 3
    result = metrics.compute_bootstrap_interval(values)
    error = 1.96 * float(values.std()) / 20
    assert result.mean == pytest.approx(float(values.mean()), abs=1e-6)
    assert (result.mean - result.low, result.high - result.mean) == pytest.approx((error, error), rel=0.1)
    assert metrics.compute_bootstrap_interval(values) == result != metrics.compute_bootstrap_interval(values, seed=1)
    assert metrics.compute_bootstrap_interval(torch.full((5,), 0.5)) == (0.5, 0.5, 0.5)
