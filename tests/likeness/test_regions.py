"""Regions: masks at each latent grid size, visible queries, regions from boxes."""

from __future__ import annotations

import pytest
import torch
from comfyui_likeness.likeness.attention import regions
from comfyui_likeness.likeness.spec import Person
from support.fused_kv import make_fused_kv_identity, make_stripe_masks
from torch import Tensor


def test_a_single_identity_is_a_person_everywhere() -> None:
    identity = make_fused_kv_identity()
    (person,) = regions.convert_to_people(identity)
    assert person.identity is identity and person.mask is None and person.strength == 1
    people = (Person(identity), Person(identity))
    assert regions.convert_to_people(people) is people


def test_coverage_is_by_area() -> None:
    mask = torch.zeros(1, 64, 64)
    mask[:, :20, :20] = 1
    coverage = regions.compute_coverage(mask, 8, 8).view(8, 8)
    assert torch.allclose(coverage[:3, :3], torch.tensor([[1, 1, 0.5], [1, 1, 0.5], [0.5, 0.5, 0.25]]))
    assert regions.find_inside_queries(mask, 8, 8).view(8, 8)[:3, :3].tolist() == [
        [True] * 3,
        [True] * 3,
        [True, True, False],
    ]


@pytest.mark.parametrize("size", [(64, 64), (96, 40), (37, 91), (5, 3), (640, 8)])
def test_a_mask_of_any_shape_is_stretched_over_the_image(size: tuple[int, int]) -> None:
    mask = torch.zeros(1, *size)
    mask[:, :, : size[1] // 2] = 1
    coverage = regions.compute_coverage(mask, 9, 11).view(9, 11)
    assert (coverage[:, 0] == 1).all() and (coverage[:, -1] == 0).all()
    assert abs(float(coverage.mean()) - float(mask.mean())) < 0.06


def test_a_small_mask_never_vanishes() -> None:
    mask = torch.zeros(2, 512, 512)
    mask[0, 100:130, 200:230] = 1
    mask[1, :256] = 1
    assert regions.is_region_too_small(mask, 8, 8) and not regions.is_region_too_small(mask[1:], 8, 8)
    inside = regions.find_inside_queries(mask, 8, 8)
    assert inside[0].nonzero().flatten().tolist() == [8 * 1 + 3]  # the cell that it covers most
    assert int(inside[1].sum()) == 32


def is_visible(masks: list[Tensor | None], i: int, q: int, outside: str) -> bool:
    """Eq. 7 for one query and one identity."""
    inside = [j for j, m in enumerate(masks) if m is not None and bool(m.flatten()[q] >= 0.5)]
    if any(j != i for j in inside):
        return False
    return outside == "all" or masks[i] is None or i in inside


@pytest.mark.parametrize("outside", regions.OUTSIDE_MODES)
def test_visible_queries_follow_eq_7(outside: str) -> None:
    generator = torch.Generator().manual_seed(3)
    masks: list[Tensor | None] = [(torch.rand(1, 6, 7, generator=generator) > 0.6).float() for _ in range(3)]
    for masks_or_none in (masks, [*masks, None], [None, None], masks[:1]):
        visible = regions.compute_visible_queries(masks_or_none, 6, 7, outside)
        for i, rows in enumerate(visible):
            assert rows[0].tolist() == [is_visible(masks_or_none, i, q, outside) for q in range(42)]


def test_masks_repeat_over_a_larger_batch() -> None:
    left, right = make_stripe_masks()
    both = torch.cat((left, right))
    visible = regions.compute_visible_queries([both, None], 8, 8)
    assert visible[0].shape[0] in (1, 2) and visible[1].shape[0] == 2
    assert torch.equal(regions.repeat_for_images(both, 5), both[[0, 1, 0, 1, 0]])
    assert regions.repeat_for_images(left, 5) is left


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.zeros(1, 8, 8), "'anna' may appear.*got a black mask;"),
        (torch.zeros(2, 8, 8), "got a black mask for all 2 images"),
        (torch.full((1, 8, 8), torch.nan), "NaN"),
        (torch.ones(1, 1, 8, 8), "shape"),
    ],
)
def test_invalid_masks_are_rejected(mask: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        regions.check_region(mask, "anna")


def test_a_mask_without_a_batch_dimension_is_one_image() -> None:
    assert regions.check_region(torch.full((8, 8), 2.0), "anna").shape == (1, 8, 8)
    assert float(regions.check_region(torch.full((8, 8), 2.0), "anna").max()) == 1


BOXES = torch.tensor([[0.0, 0, 40, 64], [24, 0, 64, 64]])


def test_overlap_rules() -> None:
    exclusive, priority, soft = (regions.make_box_regions(BOXES, 64, 64, 0, rule) for rule in regions.OVERLAP_RULES)
    assert exclusive[0, :, :32].all() and not exclusive[0, :, 32:].any()
    assert torch.equal(exclusive.sum(0), torch.ones(64, 64))
    assert priority[0, :, :40].all() and priority[1, :, 40:].all() and not priority[1, :, :40].any()
    assert (soft[:, :, 30] == 0.5).all() and (soft[0, :, 10] == 1).all()
    for masks in (exclusive, priority, soft):
        assert float(masks.sum(0).max()) <= 1


@pytest.mark.parametrize("rule", list(regions.OVERLAP_RULES))
def test_feathered_edges_are_soft_and_sum_to_at_most_one(rule: str) -> None:
    hard, soft = regions.make_box_regions(BOXES, 64, 64, 0, rule), regions.make_box_regions(BOXES, 64, 64, 8, rule)
    assert float(soft.sum(0).max()) <= 1 + 1e-5
    edge = soft[0, 32]
    assert ((edge > 0.02) & (edge < 0.98)).sum() >= 8
    assert abs(float(soft.mean()) - float(hard.mean())) < 0.02
    assert regions.make_box_regions(BOXES, 64, 64, 500, rule).isfinite().all()


def test_boxes_are_parsed_and_sorted() -> None:
    boxes = regions.parse_boxes("0.1, 0.2, 0.4, 0.9\n\n0.5,0,1,1 ; 0, 0, 0.2, 0.2")
    assert boxes.shape == (3, 4)
    assert regions.sort_left_to_right(boxes)[:, 0].tolist() == pytest.approx([0.0, 0.1, 0.5])
    assert regions.parse_boxes("").shape == (0, 4)
    for wrong in ("0.1, 0.2, 0.4", "a, b, c, d", "0.4, 0, 0.1, 1", "0, 0, 1, 1.2"):
        with pytest.raises(ValueError, match="left, top, right, bottom"):
            regions.parse_boxes(wrong)


def test_half_covered_pixels_count_half() -> None:
    mask = regions.rasterize_boxes(torch.tensor([[0.5, 0, 2, 1.25]]), 3, 3)[0]
    assert torch.allclose(mask, torch.tensor([[0.5, 1, 0], [0.125, 0.25, 0], [0, 0, 0]]))


def test_masks_of_different_numbers_repeat_each_by_itself() -> None:
    two, three = (torch.rand(n, 8, 8, generator=torch.Generator().manual_seed(n)) for n in (2, 3))
    visible = regions.compute_visible_queries([two, three], 8, 8)
    for image in range(6):
        alone = regions.compute_visible_queries([two[image % 2][None], three[image % 3][None]], 8, 8)
        assert all(torch.equal(many[image % len(many)], one[0]) for many, one in zip(visible, alone, strict=True))
