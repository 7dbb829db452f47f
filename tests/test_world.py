"""Portrait World: who is painted where, that it can be seen, and that every machine paints the same."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from comfyui_likeness.likeness import faces
from comfyui_likeness.likeness.spec import Face
from comfyui_likeness.training import world
from comfyui_likeness.training.portrait import people, scenes
from comfyui_likeness.training.world import Figure, Painted, Person, Scene
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = ROOT / "tests" / "data" / "world.png"  # small, from the painter itself: `tiny` writes it
STYLES = tuple(scenes.STYLES)
SIDE = 128

# Someone on whom every attribute shows.
SHOWN = replace(
    world.person(0, "train"),
    hair="short", fringe="none", hair_colour="chestnut", skin="peach", beard="none", glasses="round", frames="red",
    earrings="hoops", freckles="none", mark="none", age="smooth", cheeks="pale", eyes="round", brows="arched",
)  # fmt: skip
FIGURE = Figure(0.5, 0.47, 0.34, 0.2, 0.05, 0.05, 0.0, "neutral", "shirt", "blue")


def scene(style: str = "photo", **changes: float | str) -> Scene:
    figure = replace(FIGURE, **changes)
    return Scene(7, style, "plain", "close", 0.4, 0.1, 0.5, (figure,), (1, 1, 1, 1, 1))


def painted(person: Person, given: Scene) -> Painted:
    return world.paint([person], given, SIDE)


def changed(one: Painted, other: Painted, least: int = 8) -> np.ndarray:
    """Where two pictures differ by more than `least` levels of 255, [side, side]."""
    return np.abs(one.image.astype(int) - other.image).max(-1) > least


def without(**changes: object) -> Person:
    return replace(SHOWN, glasses="none", **changes)


def pose(given: Painted) -> tuple[float, float, float]:
    return faces.pose(Face(torch.from_numpy(given.box[0]), torch.from_numpy(given.kps[0]), 1.0))


def tiny() -> Image.Image:
    """Scenes with one person and with two, at an eighth of their size."""
    pictures = [
        world.paint([world.person(n + other, "test") for other in range(count)], world.scene(n, count), SIDE).image
        for count in (1, 2)
        for n in range(12)
    ]
    return world.sheet([pictures[:12], pictures[12:]]).reduce(8)


def test_more_than_a_million_people_of_16_attributes():
    assert people.PEOPLE > 10**6 and len(people.ATTRIBUTES) >= 16
    assert set(people.ATTRIBUTES) == set(Person.__dataclass_fields__)
    found = [world.person(number, "train") for number in range(3000)]
    assert len(set(found)) == len(found)
    for name, values in people.ATTRIBUTES.items():
        assert {getattr(one, name) for one in found} == set(values), name


def test_nobody_is_in_two_splits():
    found = {split: {world.person(number, split) for number in range(800)} for split in people.SPLITS}
    for split, them in found.items():
        assert {one.split for one in them} == {split} and len(them) == 800
    # The split is read off the looks, and every remainder has one: no two splits can share a person.
    assert sorted(rest for rests in people.SPLITS.values() for rest in rests) == list(range(people.MODULUS))
    assert not found["train"] & found["test"] and not found["train"] & found["validation"]


@pytest.mark.parametrize(("number", "split"), [(0, "real"), (-1, "test")])
def test_a_person_that_is_not_there(number, split):
    with pytest.raises(ValueError, match="expected one from 0 of train, validation, test"):
        world.person(number, split)


def test_looks_that_are_not_there():
    with pytest.raises(ValueError, match="got 'plaid' for skin; expected one of porcelain"):
        _ = replace(SHOWN, skin="plaid").levels


def test_a_crowd_is_refused():
    with pytest.raises(ValueError, match="for 3 people"):
        world.scene(0, 3)
    with pytest.raises(ValueError, match="got 2 people for a scene of 1"):
        world.paint([SHOWN, SHOWN], world.scene(0))


def test_the_same_pictures_in_another_process(tmp_path):
    out = tmp_path / "sheet.png"
    words = [out, "--split", "validation", "--people", "3", "--scenes", "4", "--side", "64"]
    subprocess.run([sys.executable, "-m", "training.world", *map(str, words)], cwd=ROOT, check=True)
    rows = [
        [world.paint([world.person(n, "validation")], world.scene(m), 64).image for m in range(4)] for n in range(3)
    ]
    assert np.array_equal(np.asarray(Image.open(out)), np.asarray(world.sheet(rows)))


def test_the_same_pictures_on_every_machine():
    """Pillow may move an edge from one version to the next; a different picture is further off."""
    expected, found = np.asarray(Image.open(REFERENCE)).astype(int), np.asarray(tiny()).astype(int)
    assert np.abs(expected - found).mean() < 1.0
    for picture in range(1, 12):
        moved = np.roll(expected, picture * SIDE // 8, axis=1)
        assert np.abs(moved - found).mean() > 15


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", people.ATTRIBUTES)
def test_every_attribute_shows_in_every_style(style, name):
    """At least at its ends; each of its values, in the photo."""
    values = list(people.ATTRIBUTES[name])
    given = scene(style)
    first = painted(replace(SHOWN, **{name: values[0]}), given)
    for value in values[1:] if style == "photo" else values[-1:]:
        other = painted(replace(SHOWN, **{name: value}), given)
        seen = changed(first, other, 6)
        near = first.head[0] | other.head[0]
        assert (seen & near).sum() >= 8, value
        assert (seen & near).sum() > 0.3 * seen.sum(), value


@pytest.mark.parametrize("yaw", [-0.5, 0.0, 0.5])
@pytest.mark.parametrize("roll", [-0.2, 0.2])
def test_key_points_lie_on_eyes_and_mouth(yaw, roll):
    given = scene(yaw=yaw, roll=roll)
    one, other = (painted(without(eye_colour=colour), given) for colour in ("black", "blue"))
    y, x = np.nonzero(changed(one, other, 12))
    left, right = one.kps[0, :2]
    nearer_left = np.hypot(x - left[0], y - left[1]) < np.hypot(x - right[0], y - right[1])
    for eye, mine in ((left, nearer_left), (right, ~nearer_left)):
        assert np.hypot(x[mine].mean() - eye[0], y[mine].mean() - eye[1]) < 1.5
    one, other = (painted(without(lip_colour=colour), given) for colour in ("berry", "natural"))
    y, x = np.nonzero(changed(one, other, 12))
    for corner, end in ((one.kps[0, 3], x.argmin()), (one.kps[0, 4], x.argmax())):
        assert math.hypot(x[end] - corner[0], y[end] - corner[1]) < 3.5
    one, other = (painted(without(nose_tip=tip), given) for tip in (-1.0, 1.0))
    y, x = np.nonzero(changed(one, other, 12))
    assert math.hypot(x.mean() - one.kps[0, 2, 0], y.mean() - one.kps[0, 2, 1]) < 5


@pytest.mark.parametrize("yaw", [-0.55, 0.55])
def test_the_nearer_eye_is_the_larger(yaw):
    given = scene(yaw=yaw, roll=0.0)
    one, other = (painted(without(eye_colour=colour), given) for colour in ("black", "blue"))
    y, x = np.nonzero(changed(one, other, 12))
    middle = one.kps[0, :2, 0].mean()
    left, right = (x < middle).sum(), (x > middle).sum()
    assert (left > 1.15 * right) if yaw > 0 else (right > 1.15 * left)
    assert (one.kps[0, 2, 0] > middle) == (yaw > 0)


def test_the_pose_is_read_back():
    straight, turned, tilted = (
        pose(painted(SHOWN, scene(yaw=yaw, pitch=0.0, roll=roll))) for yaw, roll in ((0.0, 0.0), (0.5, 0.0), (0.0, 0.2))
    )
    assert abs(straight[0]) < 1 and abs(straight[2]) < 1 and turned[0] > 12
    assert tilted[2] == pytest.approx(math.degrees(0.2), abs=1)


def test_an_aligned_face_has_its_eyes_where_arcface_has_them():
    given = scene(yaw=0.1, roll=-0.15)
    crops = [world.aligned(painted(without(eye_colour=colour), given), 0) for colour in ("black", "blue")]
    assert crops[0].shape == (112, 112, 3) and crops[0].dtype == np.uint8
    y, x = np.nonzero(np.abs(crops[0].astype(int) - crops[1]).max(-1) > 12)
    for (eye_x, eye_y), mine in zip(faces.ARCFACE[:2], (x < 56, x > 56), strict=True):
        assert math.hypot(x[mine].mean() - eye_x, y[mine].mean() - eye_y) < 4.5


@pytest.mark.parametrize("style", STYLES)
def test_masks_and_boxes_are_the_faces(style):
    given = replace(world.scene(2, 2), style=style)
    both = [replace(SHOWN, hair="long"), world.person(4, "test")]
    one = world.paint(both, given, SIDE)
    assert one.face.shape == one.head.shape == (2, SIDE, SIDE) and one.image.shape == (SIDE, SIDE, 3)
    assert not (one.head[0] & one.head[1]).any() and not (one.face & ~one.head).any()
    for face, box in zip(one.face, one.box, strict=True):
        y, x = np.nonzero(face)
        inside = (x >= box[0] - 1) & (x <= box[2] + 1) & (y >= box[1] - 1) & (y <= box[3] + 1)
        assert inside.mean() > 0.9 and face.sum() > 0.4 * (box[2] - box[0]) * (box[3] - box[1])
    other = world.paint([replace(both[0], hair_colour="white"), both[1]], given, SIDE)
    hair = one.head[0] & ~one.face[0]
    assert changed(one, other)[hair].mean() > 0.5 and changed(one, other)[one.head[1]].mean() < 0.02


@pytest.mark.parametrize("style", ["photo", "line art", "pencil"])
def test_what_is_behind_people_says_nothing_of_them(style):
    given = replace(world.scene(1), style=style)
    drawn = [painted(world.person(number, "train"), given) for number in range(6)]
    corner = np.s_[: SIDE // 4, : SIDE // 8]  # beside any head
    assert given.place != "plain" and drawn[0].image[corner].std() > 1
    assert all(np.array_equal(one.image[corner], drawn[0].image[corner]) for one in drawn)
    assert len({one.image.tobytes() for one in drawn}) == 6


@pytest.mark.parametrize("count", [1, 2])
def test_faces_are_whole_and_apart(count):
    for number in range(40):
        given = world.scene(number, count)
        one = world.paint([world.person(number + n, "train") for n in range(count)], given, 64)
        assert (one.box >= -0.5).all() and (one.box <= 63.5).all()
        assert (one.kps >= 0).all() and (one.kps <= 63).all()
        if count == 2:
            assert one.box[0, 2] < one.box[1, 0]


SAID = {  # what a sentence says only of these places
    "forest": "forest", "city": "city", "beach": "beach", "snow": "snow", "room": "room", "mountains": "mountains",
    "meadow": "meadow", "desert": "desert", "night": "night",
}  # fmt: skip


def test_captions_are_true_and_closed():
    used: set[str] = set()
    for number in range(3000):
        count = 1 + number % 2
        given = world.scene(number, count)
        words = world.caption(given).replace(",", "").split()
        used |= set(words)
        assert set(words) <= set(world.WORDS)
        assert ("two" in words) == (count == 2) and ("people" in words) == (count == 2)
        assert all((word in words) == (given.place == place) for word, place in SAID.items())
        assert all(word in words for word in given.style.split() if word != "art")
        assert ("close" not in words or given.framing == "close") and ("afar" not in words or given.framing == "wide")
        told = {word for word in words if word in scenes.COLOURS}
        assert told <= {figure.colour for figure in given.figures}
        shown = {figure.expression for figure in given.figures}
        assert {word for word in words if word in scenes.EXPRESSIONS} == (
            shown - {"neutral"} if len(shown) == 1 else set()
        )
        assert ("warm" not in words or given.warmth > 0) and ("cold" not in words or given.warmth < 0)
    assert used == set(world.WORDS)


def test_a_sentence():
    given = replace(scene("watercolour", expression="smiling"), place="forest", framing="bust")
    assert world.caption(replace(given, wording=(1, 0, 0, 0, 0))) == "a watercolour of a smiling person in a forest"
    two = replace(given, style="line art", place="beach", figures=(FIGURE, FIGURE), wording=(0, 0, 0, 0, 0))
    assert world.caption(two) == "two people at a beach, line art"
