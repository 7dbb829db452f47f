"""Faces grouped by person, and views selected by pose, with known answers."""

from __future__ import annotations

import itertools

import pytest
import torch
from comfyui_likeness.training.build_dataset import face_clusters
from torch import Tensor

WIDTH = 512


def make_faces(*counts: int, spread: float = 0.9, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Unit embeddings of `counts` faces per person, shuffled, and their people.

    At spread 0.9 the cosine to a person's center is 0.74.
    """
    generator = torch.Generator().manual_seed(seed)
    people = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    rows = torch.randn(len(counts), WIDTH, generator=generator)[people]
    rows += spread * torch.randn(len(people), WIDTH, generator=generator)
    order = torch.randperm(len(people), generator=generator)
    return torch.nn.functional.normalize(rows[order].double(), dim=1), people[order]


@pytest.mark.parametrize("strangers", [[], [1] * 5, [1] * 40, [20], [9, 9, 9], [12] + [1] * 25])
def test_one_person_among_strangers(strangers: list[int]) -> None:
    rows, people = make_faces(24, *strangers)
    kept = face_clusters.find_main_person(rows, 0.6)
    correct = people[kept] == 0
    assert correct.all(), "precision"
    assert correct.sum() >= 23, "recall"
    assert len(set(kept.tolist())) == len(kept)


def test_faces_far_from_the_center_are_left_out() -> None:
    rows, people = make_faces(24, 4)
    outlier = int((people == 0).nonzero()[0])
    rows[outlier] = 0.5 * rows[outlier] + torch.nn.functional.normalize(torch.randn(WIDTH, dtype=torch.float64), dim=0)
    kept = face_clusters.find_main_person(rows, 0.6)
    assert outlier not in kept and (people[kept] == 0).all() and len(kept) == 23
    assert len(face_clusters.find_main_person(rows, 0.9)) < 2  # no face is that similar to the center


def test_everyone_in_a_crowd() -> None:
    counts = [4 + n % 9 for n in range(40)] + [1] * 30
    rows, people = make_faces(*counts, spread=0.8)
    found = face_clusters.find_people(rows, 0.6, min_faces=3)
    owners = [set(people[group].tolist()) for group in found]
    assert all(len(owner) == 1 for owner in owners)
    assert sorted(next(iter(owner)) for owner in owners) == list(range(40))
    kept = sum(len(group) for group in found)
    assert kept >= 0.97 * sum(counts[:40])


def test_a_small_group_next_to_a_large_one_is_found() -> None:
    """So few that the mean of all is close to the large group."""
    rows, people = make_faces(60, 4, spread=0.6)
    assert [set(people[group].tolist()) for group in face_clusters.find_people(rows, 0.6, 2)] == [{0}, {1}]
    strangers, _ = make_faces(*[1] * 6)
    assert face_clusters.find_people(strangers, 0.6, 2) == []
    assert face_clusters.find_people(rows[:0], 0.6, 2) == [] and face_clusters.find_people(rows[:1], 0.6, 2) == []


def test_views_differ_in_pose_and_are_the_best_of_their_pose() -> None:
    generator = torch.Generator().manual_seed(1)
    poses = torch.rand(200, 3, generator=generator) * torch.tensor([120, 60, 30.0]) - torch.tensor([60, 30, 15.0])
    quality = torch.rand(200, generator=generator).tolist()
    taken = face_clusters.select_views(poses, quality, 8)
    assert len(set(taken)) == 8
    assert all(float((poses[a] - poses[b]).abs().sum()) > 15 for a, b in itertools.combinations(taken, 2))
    assert [quality[i] for i in taken] == sorted((quality[i] for i in taken), reverse=True)
    worst = set(sorted(range(200), key=lambda i: quality[i])[:40])
    assert not worst & set(taken) and quality[taken[0]] == max(quality)


def test_faces_of_one_pose_are_one_view() -> None:
    poses = torch.cat((torch.zeros(20, 3), torch.full((3, 3), 20.0))) + torch.rand(23, 3)
    assert len(face_clusters.select_views(poses, [1.0] * 20 + [2.0] * 3, 8)) == 2
    assert face_clusters.select_views(torch.zeros(1, 3), [1.0], 8) == [0]
