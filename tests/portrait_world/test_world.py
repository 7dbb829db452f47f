"""Portrait World: annotations match the images, attributes are visible, and all machines paint the same."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from comfyui_likeness.likeness.faces import alignment, quality
from comfyui_likeness.likeness.spec import Face
from comfyui_likeness.portrait_world import world
from comfyui_likeness.portrait_world.drawing import canvas, people, places, scenes
from comfyui_likeness.portrait_world.world import Figure, PaintedImage, Person, Scene
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = ROOT / "tests" / "data" / "world.png"  # made by make_small_sheet
STYLES = scenes.STYLE_NAMES
IMAGE_SIZE = 128

# A person on whom every attribute is visible.
VISIBLE = replace(
    world.make_person(0, "train"),
    hair="short", fringe="none", hair_colour="chestnut", skin="peach", beard="none", glasses="round", frames="red",
    earrings="hoops", freckles="none", mark="none", age="smooth", cheeks="pale", eyes="round", brows="arched",
)  # fmt: skip
FIGURE = Figure(0.5, 0.5, 0.31, 0.2, 0.05, 0.05, "neutral", "shirt", "blue")


def make_photo_scene(style: str = "photo", **changes: float | str) -> Scene:
    return Scene(style, "plain", False, "right", (replace(FIGURE, **changes),))


def paint(person: Person, scene: Scene) -> PaintedImage:
    return world.paint_scene([person], scene, IMAGE_SIZE)


def find_differences(first: PaintedImage, second: PaintedImage, threshold: int = 8) -> np.ndarray:
    """The pixels in which two images differ by more than `threshold` levels of 255, [H, W]."""
    return np.abs(first.image.astype(int) - second.image).max(-1) > threshold


def make_variant(**changes: object) -> Person:
    return replace(VISIBLE, glasses="none", **changes)


def estimate_pose(painted: PaintedImage) -> tuple[float, float, float]:
    return quality.estimate_pose(Face(torch.from_numpy(painted.boxes[0]), torch.from_numpy(painted.key_points[0]), 1.0))


def make_small_sheet() -> Image.Image:
    """Scenes with one person and with two, reduced to an eighth of their size."""
    alone, pairs = (
        [
            world.paint_scene(
                [world.make_person(n + other, "test") for other in range(count)], world.make_scene(n, count), IMAGE_SIZE
            ).image
            for n in range(round(12 / scenes.IMAGE_WIDTHS[count]))
        ]
        for count in (1, 2)
    )
    return world.make_contact_sheet([alone, pairs]).reduce(8)


def test_number_of_people_and_attributes():
    assert people.NUM_POSSIBLE_PEOPLE > 10**6 and len(people.PERSON_ATTRIBUTES) >= 16
    assert set(people.PERSON_ATTRIBUTES) == set(Person.__dataclass_fields__)
    sample = [world.make_person(number, "train") for number in range(3000)]
    assert len(set(sample)) == len(sample)
    for name, values in people.PERSON_ATTRIBUTES.items():
        assert {getattr(person, name) for person in sample} == set(values), name


def test_splits_share_no_person():
    members = {split: {world.make_person(number, split) for number in range(800)} for split in people.SPLIT_REMAINDERS}
    for split, persons in members.items():
        assert {person.split for person in persons} == {split} and len(persons) == 800
    # The attributes determine the split, and every remainder belongs to exactly one.
    remainders = [remainder for group in people.SPLIT_REMAINDERS.values() for remainder in group]
    assert sorted(remainders) == list(range(people.SPLIT_MODULUS))
    assert not members["train"] & members["test"] and not members["train"] & members["validation"]


@pytest.mark.parametrize(("number", "split"), [(0, "real"), (-1, "test")])
def test_unknown_person_is_an_error(number, split):
    with pytest.raises(ValueError, match="expected a number from 0 and one of train, validation, test"):
        world.make_person(number, split)


def test_unknown_attribute_value_is_an_error():
    with pytest.raises(ValueError, match="got 'plaid' for skin; expected one of porcelain"):
        _ = replace(VISIBLE, skin="plaid").attribute_indices


def test_wrong_number_of_people_is_an_error():
    with pytest.raises(ValueError, match="for 3 people"):
        world.make_scene(0, 3)
    with pytest.raises(ValueError, match="got 2 people for a scene of 1"):
        world.paint_scene([VISIBLE, VISIBLE], world.make_scene(0))


def test_images_are_equal_in_another_process(tmp_path):
    out = tmp_path / "sheet.png"
    words = [out, "--split", "validation", "--people", "3", "--scenes", "4", "--resolution", "64"]
    subprocess.run([sys.executable, "-m", "portrait_world.world", *map(str, words)], cwd=ROOT, check=True)
    rows = [
        [world.paint_scene([world.make_person(n, "validation")], world.make_scene(m), 64).image for m in range(4)]
        for n in range(3)
    ]
    assert np.array_equal(np.asarray(Image.open(out)), np.asarray(world.make_contact_sheet(rows)))


def test_images_match_the_reference():
    """Pillow versions may shift edges slightly; a different image differs much more."""
    expected, actual = np.asarray(Image.open(REFERENCE)).astype(int), np.asarray(make_small_sheet()).astype(int)
    assert np.abs(expected - actual).mean() < 1.0
    for shift in range(1, 4):  # by the width of three images of one person, or of two of two people
        shifted = np.roll(expected, shift * 3 * IMAGE_SIZE // 8, axis=1)
        assert np.abs(shifted - actual).mean() > 15


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", people.PERSON_ATTRIBUTES)
def test_every_attribute_is_visible_in_every_style(style, name):
    """All values in the photo style; only the first and the last in the others."""
    values = list(people.PERSON_ATTRIBUTES[name])
    scene = make_photo_scene(style)
    first = paint(replace(VISIBLE, **{name: values[0]}), scene)
    for value in values[1:] if style == "photo" else values[-1:]:
        other = paint(replace(VISIBLE, **{name: value}), scene)
        difference = find_differences(first, other, 6)
        head = first.head_masks[0] | other.head_masks[0]
        assert (difference & head).sum() >= 8, value
        assert (difference & head).sum() > 0.3 * difference.sum(), value


@pytest.mark.parametrize("yaw", [-0.45, 0.0, 0.45])
@pytest.mark.parametrize("roll", [-0.2, 0.2])
def test_key_points_lie_on_eyes_and_mouth(yaw, roll):
    scene = make_photo_scene(yaw=yaw, roll=roll)
    one, other = (paint(make_variant(eye_colour=colour), scene) for colour in ("black", "blue"))
    y, x = np.nonzero(find_differences(one, other, 12))
    left, right = one.key_points[0, :2]
    nearer_left = np.hypot(x - left[0], y - left[1]) < np.hypot(x - right[0], y - right[1])
    for eye, mask in ((left, nearer_left), (right, ~nearer_left)):
        assert np.hypot(x[mask].mean() - eye[0], y[mask].mean() - eye[1]) < 1.5
    one, other = (paint(make_variant(lip_colour=colour), scene) for colour in ("berry", "natural"))
    y, x = np.nonzero(find_differences(one, other, 12))
    for corner, end in ((one.key_points[0, 3], x.argmin()), (one.key_points[0, 4], x.argmax())):
        assert math.hypot(x[end] - corner[0], y[end] - corner[1]) < 3.5
    one, other = (paint(make_variant(nose_tip=tip), scene) for tip in (-1.0, 1.0))
    y, x = np.nonzero(find_differences(one, other, 12))
    assert math.hypot(x.mean() - one.key_points[0, 2, 0], y.mean() - one.key_points[0, 2, 1]) < 5


@pytest.mark.parametrize("yaw", [-0.45, 0.45])
def test_nearer_eye_is_larger(yaw):
    scene = make_photo_scene(yaw=yaw, roll=0.0)
    one, other = (paint(make_variant(eye_colour=colour), scene) for colour in ("black", "blue"))
    y, x = np.nonzero(find_differences(one, other, 12))
    middle = one.key_points[0, :2, 0].mean()
    left, right = (x < middle).sum(), (x > middle).sum()
    assert (left > 1.15 * right) if yaw > 0 else (right > 1.15 * left)
    assert (one.key_points[0, 2, 0] > middle) == (yaw > 0)


def test_estimated_pose_matches_the_scene():
    straight, turned, tilted = (
        estimate_pose(paint(VISIBLE, make_photo_scene(yaw=yaw, pitch=0.0, roll=roll)))
        for yaw, roll in ((0.0, 0.0), (0.5, 0.0), (0.0, 0.2))
    )
    assert abs(straight[0]) < 1 and abs(straight[2]) < 1 and turned[0] > 12
    assert tilted[2] == pytest.approx(math.degrees(0.2), abs=1)


def test_aligned_face_has_its_eyes_at_the_arcface_template():
    scene = make_photo_scene(yaw=0.1, roll=-0.15)
    crops = [world.align_painted_face(paint(make_variant(eye_colour=colour), scene), 0) for colour in ("black", "blue")]
    assert crops[0].shape == (112, 112, 3) and crops[0].dtype == np.uint8
    y, x = np.nonzero(np.abs(crops[0].astype(int) - crops[1]).max(-1) > 12)
    for (eye_x, eye_y), mask in zip(alignment.ARCFACE_TEMPLATE[:2], (x < 56, x > 56), strict=True):
        assert math.hypot(x[mask].mean() - eye_x, y[mask].mean() - eye_y) < 4.5


@pytest.mark.parametrize("style", STYLES)
def test_masks_and_boxes_match_the_faces(style):
    scene = replace(world.make_scene(2, 2), style=style)
    both = [replace(VISIBLE, hair="long"), world.make_person(4, "test")]
    one = world.paint_scene(both, scene, IMAGE_SIZE)
    assert one.image.shape == (IMAGE_SIZE, 1.5 * IMAGE_SIZE, 3)
    assert one.face_masks.shape == one.head_masks.shape == (2, IMAGE_SIZE, 1.5 * IMAGE_SIZE)
    assert not (one.head_masks[0] & one.head_masks[1]).any() and not (one.face_masks & ~one.head_masks).any()
    for face, box in zip(one.face_masks, one.boxes, strict=True):
        y, x = np.nonzero(face)
        inside = (x >= box[0] - 1) & (x <= box[2] + 1) & (y >= box[1] - 1) & (y <= box[3] + 1)
        assert inside.mean() > 0.9 and face.sum() > 0.4 * (box[2] - box[0]) * (box[3] - box[1])
    other = world.paint_scene([replace(both[0], hair_colour="white"), both[1]], scene, IMAGE_SIZE)
    hair = one.head_masks[0] & ~one.face_masks[0]
    assert (
        find_differences(one, other)[hair].mean() > 0.5
        and find_differences(one, other)[one.head_masks[1]].mean() < 0.02
    )


@pytest.mark.parametrize("place", scenes.PLACE_NAMES)
def test_a_place_is_the_same_in_every_scene(place):
    """Except for light and mirroring."""
    in_place = [scene for number in range(400) if (scene := world.make_scene(number)).place == place]
    for style, mirrored, light in (("photo", False, "left"), ("photo", True, "right"), ("bronze", True, "left")):
        alike = [scene for scene in in_place if (scene.mirrored, scene.light) == (mirrored, light)][:3]
        images = [
            world.paint_scene([world.make_person(n, "train")], replace(scene, style=style), 64).image
            for n, scene in enumerate(alike)
        ]
        corner = np.s_[:16, :8]  # beside any head
        assert all(np.array_equal(image[corner], images[0][corner]) for image in images)
        assert len({image.tobytes() for image in images}) == 3


@pytest.mark.parametrize("place", scenes.PLACE_NAMES)
def test_mirrored_and_wide_places_show_the_same_set(place):
    def draw(mirrored: bool, width: float = 1.0) -> np.ndarray:
        backdrop = canvas.Canvas(32, canvas.Medium(), width)
        places.draw_place(backdrop, place, mirrored)
        return np.asarray(backdrop.image)

    plain, wide = draw(False), draw(False, 1.5)
    assert np.array_equal(plain, draw(True)[:, ::-1]) and np.array_equal(wide, draw(True, 1.5)[:, ::-1])
    edge = (wide.shape[1] - plain.shape[1]) // 2
    assert np.array_equal(wide[:, edge:-edge], plain)
    assert np.array_equal(wide[:, :edge], plain[:, :edge][:, ::-1])
    assert np.array_equal(wide[:, -edge:], plain[:, -edge:][:, ::-1])


@pytest.mark.parametrize("style", STYLES)
def test_media_have_no_noise(style):
    """Each channel changes by a level or two from pixel to pixel, and never up and down again."""
    corner = paint(VISIBLE, make_photo_scene(style)).image[: IMAGE_SIZE // 4, : IMAGE_SIZE // 8].astype(int)
    for axis in (0, 1):
        steps = np.diff(corner, axis=axis)
        assert np.abs(steps).max() <= 3
        assert (steps.max(axis) <= 0).all() or (np.diff(corner, n=2, axis=axis) ** 2).mean() < 1


def test_light_falls_from_either_side():
    left, right = (
        paint(VISIBLE, replace(make_photo_scene(yaw=0.0, roll=0.0), light=light)).image.astype(int)
        for light in ("left", "right")
    )
    brighter = (left - right).sum(-1)
    assert brighter[:, : IMAGE_SIZE // 2].mean() > 10 and brighter[:, IMAGE_SIZE // 2 :].mean() < -10
    assert {world.make_scene(number).light for number in range(20)} == {"left", "right"}


def test_heads_have_one_size_and_few_poses():
    figures = [figure for count in (1, 2) for n in range(300) for figure in world.make_scene(n, count).figures]
    assert max(abs(figure.yaw) for figure in figures) <= 0.45
    levels = [min(scenes.YAW_LEVELS, key=lambda level: abs(level - figure.yaw)) for figure in figures]
    assert set(levels) == set(scenes.YAW_LEVELS)
    assert all(abs(figure.yaw - level) <= 0.05 for figure, level in zip(figures, levels, strict=True))
    sizes = [figure.head_size for figure in figures]
    assert max(sizes) < 1.07 * min(sizes)


def test_people_are_as_large_in_pairs_as_alone():
    def measure_heights(count: int) -> np.ndarray:
        boxes = [world.paint_scene([VISIBLE] * count, world.make_scene(n, count), 64).boxes for n in range(20)]
        return np.concatenate([box[:, 3] - box[:, 1] for box in boxes])

    alone, pairs = measure_heights(1), measure_heights(2)
    assert pairs.mean() == pytest.approx(alone.mean(), rel=0.02)
    assert world.make_scene(0).image_width == 1 and world.make_scene(0, 2).image_width == 1.5


@pytest.mark.parametrize("count", [1, 2])
def test_faces_are_inside_the_image_and_do_not_overlap(count):
    for number in range(40):
        scene = world.make_scene(number, count)
        one = world.paint_scene([world.make_person(number + n, "train") for n in range(count)], scene, 64)
        right = one.image.shape[1] - 1
        assert (one.boxes >= -0.5).all() and (one.boxes <= (right + 0.5, 63.5) * 2).all()
        assert (one.key_points >= 0).all() and (one.key_points <= (right, 63)).all()
        if count == 2:
            assert one.boxes[0, 2] < one.boxes[1, 0]
