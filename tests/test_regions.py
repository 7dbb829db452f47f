"""Regions: what a mask means at each size of layer, who sees whom, how boxes become regions."""

from __future__ import annotations

import pytest
import torch
from comfyui_likeness.likeness import regions
from comfyui_likeness.likeness.spec import Person
from fuseds import halves, person
from torch import Tensor


def test_a_lone_identity_is_a_person_everywhere() -> None:
    who = person()
    (alone,) = regions.everyone(who)
    assert alone.identity is who and alone.mask is None and alone.strength == 1
    people = (Person(who), Person(who))
    assert regions.everyone(people) is people


def test_a_cell_counts_by_its_area() -> None:
    mask = torch.zeros(1, 64, 64)
    mask[:, :20, :20] = 1
    cover = regions.cover(mask, 8, 8).view(8, 8)
    assert torch.allclose(cover[:3, :3], torch.tensor([[1, 1, 0.5], [1, 1, 0.5], [0.5, 0.5, 0.25]]))
    assert regions.inside(mask, 8, 8).view(8, 8)[:3, :3].tolist() == [[True] * 3, [True] * 3, [True, True, False]]


@pytest.mark.parametrize("size", [(64, 64), (96, 40), (37, 91), (5, 3), (640, 8)])
def test_a_mask_of_any_shape_is_stretched_over_the_picture(size: tuple[int, int]) -> None:
    mask = torch.zeros(1, *size)
    mask[:, :, : size[1] // 2] = 1
    cover = regions.cover(mask, 9, 11).view(9, 11)
    assert (cover[:, 0] == 1).all() and (cover[:, -1] == 0).all()
    assert abs(float(cover.mean()) - float(mask.mean())) < 0.06


def test_a_small_mask_never_vanishes() -> None:
    mask = torch.zeros(2, 512, 512)
    mask[0, 100:130, 200:230] = 1
    mask[1, :256] = 1
    assert regions.vanishes(mask, 8, 8) and not regions.vanishes(mask[1:], 8, 8)
    inside = regions.inside(mask, 8, 8)
    assert inside[0].nonzero().flatten().tolist() == [8 * 1 + 3]  # where it covers most
    assert int(inside[1].sum()) == 32


def brute(masks: list[Tensor | None], i: int, q: int, outside: str) -> bool:
    """Eq. 7, a query and an identity at a time."""
    within = [j for j, m in enumerate(masks) if m is not None and bool(m.flatten()[q] >= 0.5)]
    if any(j != i for j in within):
        return False
    return outside == "all" or masks[i] is None or i in within


@pytest.mark.parametrize("outside", regions.OUTSIDE)
def test_who_sees_whom(outside: str) -> None:
    generator = torch.Generator().manual_seed(3)
    masks: list[Tensor | None] = [(torch.rand(1, 6, 7, generator=generator) > 0.6).float() for _ in range(3)]
    for given in (masks, [*masks, None], [None, None], masks[:1]):
        seen = regions.visible(given, 6, 7, outside)
        for i, rows in enumerate(seen):
            assert rows[0].tolist() == [brute(given, i, q, outside) for q in range(42)]


def test_masks_of_a_batch_begin_again() -> None:
    left, right = halves()
    both = torch.cat((left, right))
    seen = regions.visible([both, None], 8, 8)
    assert seen[0].shape[0] in (1, 2) and seen[1].shape[0] == 2
    assert torch.equal(regions.for_rows(both, 5), both[[0, 1, 0, 1, 0]])
    assert regions.for_rows(left, 5) is left


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.zeros(1, 8, 8), "empty mask for 'anna'"),
        (torch.stack((torch.ones(8, 8), torch.zeros(8, 8))), "picture 2 of 2"),
        (torch.full((1, 8, 8), torch.nan), "NaN"),
        (torch.ones(1, 1, 8, 8), "shape"),
    ],
)
def test_masks_that_mean_nothing_are_refused(mask: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        regions.check(mask, "anna")


def test_a_flat_mask_is_one_picture() -> None:
    assert regions.check(torch.full((8, 8), 2.0), "anna").shape == (1, 8, 8)
    assert float(regions.check(torch.full((8, 8), 2.0), "anna").max()) == 1


BOXES = torch.tensor([[0.0, 0, 40, 64], [24, 0, 64, 64]])


def test_rules_of_overlap() -> None:
    exclusive, priority, soft = (regions.lay_out(BOXES, 64, 64, 0, rule) for rule in regions.OVERLAPS)
    assert exclusive[0, :, :32].all() and not exclusive[0, :, 32:].any()
    assert torch.equal(exclusive.sum(0), torch.ones(64, 64))
    assert priority[0, :, :40].all() and priority[1, :, 40:].all() and not priority[1, :, :40].any()
    assert (soft[:, :, 30] == 0.5).all() and (soft[0, :, 10] == 1).all()
    for masks in (exclusive, priority, soft):
        assert float(masks.sum(0).max()) <= 1


@pytest.mark.parametrize("rule", list(regions.OVERLAPS))
def test_feathered_edges_are_soft_and_never_add_up_to_more(rule: str) -> None:
    hard, soft = regions.lay_out(BOXES, 64, 64, 0, rule), regions.lay_out(BOXES, 64, 64, 8, rule)
    assert float(soft.sum(0).max()) <= 1 + 1e-5
    edge = soft[0, 32]
    assert ((edge > 0.02) & (edge < 0.98)).sum() >= 8
    assert abs(float(soft.mean()) - float(hard.mean())) < 0.02
    assert regions.lay_out(BOXES, 64, 64, 500, rule).isfinite().all()


def test_boxes_in_words() -> None:
    boxes = regions.parse_boxes("0.1, 0.2, 0.4, 0.9\n\n0.5,0,1,1 ; 0, 0, 0.2, 0.2")
    assert boxes.shape == (3, 4)
    assert regions.left_to_right(boxes)[:, 0].tolist() == pytest.approx([0.0, 0.1, 0.5])
    assert regions.parse_boxes("").shape == (0, 4)
    for wrong in ("0.1, 0.2, 0.4", "a, b, c, d", "0.4, 0, 0.1, 1", "0, 0, 1, 1.2"):
        with pytest.raises(ValueError, match="left, top, right, bottom"):
            regions.parse_boxes(wrong)


def test_half_covered_pixels_count_half() -> None:
    mask = regions.rectangles(torch.tensor([[0.5, 0, 2, 1.25]]), 3, 3)[0]
    assert torch.allclose(mask, torch.tensor([[0.5, 1, 0], [0.125, 0.25, 0], [0, 0, 0]]))
