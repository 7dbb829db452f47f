"""Whose face is whose by directions, and views by pose, on answers that are known."""

from __future__ import annotations

import itertools

import pytest
import torch
from comfyui_likeness.training.collect import clusters
from torch import Tensor

WIDTH = 512


def faces_of(*counts: int, spread: float = 0.9, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Directions of so many faces of each person, 0.74 from its centre at 0.9, and whose they are, in any order."""
    chance = torch.Generator().manual_seed(seed)
    who = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    rows = torch.randn(len(counts), WIDTH, generator=chance)[who]
    rows += spread * torch.randn(len(who), WIDTH, generator=chance)
    order = torch.randperm(len(who), generator=chance)
    return torch.nn.functional.normalize(rows[order].double(), dim=1), who[order]


@pytest.mark.parametrize("strangers", [[], [1] * 5, [1] * 40, [20], [9, 9, 9], [12] + [1] * 25])
def test_one_person_among_strangers(strangers: list[int]) -> None:
    rows, who = faces_of(24, *strangers)
    kept = clusters.person(rows, 0.6)
    right = who[kept] == 0
    assert right.all(), "precision"
    assert right.sum() >= 23, "recall"
    assert len(set(kept.tolist())) == len(kept)


def test_what_is_unlike_the_centre_is_left_out() -> None:
    rows, who = faces_of(24, 4)
    odd = int((who == 0).nonzero()[0])
    rows[odd] = 0.5 * rows[odd] + torch.nn.functional.normalize(torch.randn(WIDTH, dtype=torch.float64), dim=0)
    kept = clusters.person(rows, 0.6)
    assert odd not in kept and (who[kept] == 0).all() and len(kept) == 23
    assert len(clusters.person(rows, 0.9)) < 2  # nobody is that much like a centre


def test_everybody_in_a_crowd() -> None:
    counts = [4 + n % 9 for n in range(40)] + [1] * 30
    rows, who = faces_of(*counts, spread=0.8)
    found = clusters.people(rows, 0.6, least=3)
    owners = [set(who[some].tolist()) for some in found]
    assert all(len(owner) == 1 for owner in owners)
    assert sorted(next(iter(owner)) for owner in owners) == list(range(40))
    kept = sum(len(some) for some in found)
    assert kept >= 0.97 * sum(counts[:40])


def test_a_few_beside_many_are_found_in_a_crowd() -> None:
    """So few that all together hang together about the many."""
    rows, who = faces_of(60, 4, spread=0.6)
    assert [set(who[some].tolist()) for some in clusters.people(rows, 0.6, 2)] == [{0}, {1}]
    strangers, _ = faces_of(*[1] * 6)
    assert clusters.people(strangers, 0.6, 2) == []
    assert clusters.people(rows[:0], 0.6, 2) == [] and clusters.people(rows[:1], 0.6, 2) == []


def test_views_differ_in_pose_and_are_the_sharpest_of_their_kind() -> None:
    chance = torch.Generator().manual_seed(1)
    poses = torch.rand(200, 3, generator=chance) * torch.tensor([120, 60, 30.0]) - torch.tensor([60, 30, 15.0])
    quality = torch.rand(200, generator=chance).tolist()
    taken = clusters.views(poses, quality, 8)
    assert len(set(taken)) == 8
    assert all(float((poses[a] - poses[b]).abs().sum()) > 15 for a, b in itertools.combinations(taken, 2))
    assert [quality[i] for i in taken] == sorted((quality[i] for i in taken), reverse=True)
    worst = set(sorted(range(200), key=lambda i: quality[i])[:40])
    assert not worst & set(taken) and quality[taken[0]] == max(quality)


def test_faces_of_one_pose_are_one_view() -> None:
    poses = torch.cat((torch.zeros(20, 3), torch.full((3, 3), 20.0))) + torch.rand(23, 3)
    assert len(clusters.views(poses, [1.0] * 20 + [2.0] * 3, 8)) == 2
    assert clusters.views(torch.zeros(1, 3), [1.0], 8) == [0]
