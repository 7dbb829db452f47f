"""Faces: alignment against the official code, crops, the search through sizes, the choice, and the report."""

from __future__ import annotations

import pytest
import torch
from comfyui_likeness.likeness import faces
from comfyui_likeness.likeness.spec import CROPS, FACE_SIZES, Face
from comfyui_likeness.tools import standin_faces
from golden import assert_close, cases
from portraits import COLLINS, empty, portrait
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate, pad

GOLDEN = cases("ip_adapter", "preprocess")["face_norm_crop"]
LANDMARKS = GOLDEN.input("landmarks")


def golden_photo() -> Tensor:
    """The case's picture, whole grey levels as float [H, W, 3]."""
    image = GOLDEN.input("image").movedim(-1, 0)[None]
    blur = avg_pool2d(pad(image, (4, 4, 4, 4), mode="replicate"), 9, stride=1)[0].movedim(0, -1) * 9
    return (128 + 50 * blur).clamp(0, 255).round()


def face(x: float, y: float, size: float = 40.0, score: float = 0.8) -> Face:
    box = torch.tensor([x, y, x + size, y + size])
    return Face(box, faces.template(112).float() * size / 112 + torch.tensor([x, y]), score)


@pytest.mark.parametrize("size", [112, 224, 256, 336])
def test_the_matrix_is_the_official_one(size: int) -> None:
    assert_close(faces.similarity(LANDMARKS, faces.template(size)), GOLDEN.outputs()[f"matrix_{size}"])


def test_the_crop_is_the_official_one() -> None:
    off = (faces.align(golden_photo() / 255, LANDMARKS, 112) * 255 - GOLDEN.outputs()["crop_112"]).abs()
    assert off.max() <= 4 and off.mean() <= 0.5


@pytest.mark.parametrize("size", [112, 224, 256, 336])
def test_crops_of_a_photo_are_insightfaces(size: int) -> None:
    from insightface.utils import face_align

    photo, kps = standin_faces.portrait(), COLLINS.kps
    expected = torch.from_numpy(face_align.norm_crop(photo, kps.numpy(), size)).float()
    off = (faces.align(portrait(), kps, size) * 255 - expected).abs()
    assert off.max() <= 4 and off.mean() <= 0.5


def test_a_crop_over_the_edge_is_black_there() -> None:
    crop = faces.align(torch.ones(60, 60, 3), face(-30, 0, 60).kps, 112)
    assert crop[:, :50].max() == 0 and crop[20:90, 70:].min() > 0.99


def test_a_similarity_is_found_again_even_from_mirrored_points() -> None:
    points = LANDMARKS.double()
    angle = torch.tensor(0.4, dtype=torch.float64)
    turn = 1.7 * torch.stack((torch.stack((angle.cos(), -angle.sin())), torch.stack((angle.sin(), angle.cos()))))
    shift = torch.tensor([3.0, -5.0], dtype=torch.float64)
    found = faces.similarity(points, points @ turn.T + shift)
    assert torch.allclose(found, torch.cat((turn, shift[:, None]), dim=1))
    mirrored = faces.similarity(points * torch.tensor([-1.0, 1.0]), points)
    assert torch.linalg.det(mirrored[:, :2]) > 0


def test_256_shows_more_than_224_at_the_same_scale() -> None:
    tight, wide = faces.template(224), faces.template(256)
    assert torch.allclose(wide - tight, torch.tensor([16.0, 0.0], dtype=torch.float64))


def test_other_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="got a face crop of 100 pixels; expected a multiple of 112 or 128"):
        faces.template(100)


@pytest.mark.parametrize("size", [112, 224, 256])
def test_every_aligned_crop_can_be_cut_from_the_head(size: int) -> None:
    crop, inside = faces.head(portrait(), COLLINS)
    assert crop.shape == (faces.HEAD, faces.HEAD, 3) and crop.dtype == torch.uint8
    from_head = faces.align(crop.float() / 255, inside.kps, size)
    assert (from_head - faces.align(portrait(), COLLINS.kps, size)).abs().mean() < 0.01


@pytest.mark.parametrize("size", [512, 2048])
def test_the_ffhq_crop_puts_the_points_where_facexlib_does(size: int) -> None:
    scale = size / 512
    photo = interpolate(portrait().movedim(-1, 0)[None], scale_factor=scale, mode="bilinear")[0].movedim(0, -1)
    kps = (COLLINS.kps + 0.5) * scale - 0.5
    matrix = faces.similarity(COLLINS.kps, torch.tensor(faces.FFHQ))
    found = COLLINS.kps.double() @ matrix[:, :2].T + matrix[:, 2]
    assert (found - torch.tensor(faces.FFHQ)).abs().max() < 12  # of 512: a face is not the mean one
    assert (faces.align_ffhq(photo, kps) - faces.warp(portrait(), matrix, 512)).abs().mean() < 0.01
    beyond = faces.align_ffhq(photo[:, : size // 2], kps)
    assert torch.allclose(beyond[300, -1] * 255, torch.tensor([132.0, 133.0, 135.0]), atol=0.1)


def test_pulid_sees_a_grey_face_on_white() -> None:
    crop, aligned = faces.CUTS["ffhq512"](portrait(), COLLINS.kps), faces.align_ffhq(portrait(), COLLINS.kps)
    assert crop.shape == (512, 512, 3) and torch.equal(crop[..., 0], crop[..., 1]) and torch.equal(crop, crop.flip(-1))
    assert crop[:, :60].min() == 1 and crop[:, -60:].min() == 1 and crop[500:, :].min() == 1
    inner = torch.tensor(faces.FFHQ).round().long()
    grey = aligned @ torch.tensor([0.299, 0.587, 0.114])
    for x, y in inner.tolist():
        assert torch.equal(crop[y, x, 0], grey[y, x])
    assert faces.CUTS.keys() == {*FACE_SIZES, "ffhq512"} == {*CROPS} - {"photo", "black", "head"}


def test_the_head_is_a_square_of_twice_the_box_around_it() -> None:
    crop, inside = faces.head(portrait(), face(200, 100, 64))
    assert torch.allclose(inside.box, torch.tensor([128.0, 128, 384, 384]), atol=0.01)
    assert torch.allclose(inside.kps, faces.template(112).float() * 256 / 112 + 128, atol=0.01)
    around = portrait()[68:197, 168:297].movedim(-1, 0)[None]  # the same place, cut plainly
    expected = interpolate(around, (faces.HEAD + 1,) * 2, mode="bilinear", align_corners=True)[0].movedim(0, -1)
    assert (crop.float() / 255 - expected[:-1, :-1]).abs().max() < 0.01


def test_a_shrunk_head_lies_where_its_points_say() -> None:
    ramp = (torch.arange(2560).float() / 2560).view(1, -1, 1).expand(2048, -1, 3)
    crop, inside = faces.head(ramp, face(700, 600, 1024))
    for x, y in inside.kps.round().int().tolist():
        in_photo = 700 - 512 + x * 4
        assert float(crop[y, x, 0]) / 255 * 2560 == pytest.approx(in_photo, abs=6)
    inner = torch.arange(8, faces.HEAD - 8)
    off = crop[256, inner, 0].float() * 2560 / 255 - (188 + inner * 4)
    assert abs(float(off.mean())) < 0.5  # half a pixel of the crop would be 2


def test_a_head_at_the_edge_of_a_large_photo_is_padded_black() -> None:
    crop, inside = faces.head(torch.ones(2000, 1500, 3), face(0, 0, 800))
    assert crop[:124].max() == 0 and crop[:, :124].max() == 0 and crop[132:500, 132:500].min() == 255
    assert inside.box.tolist() == pytest.approx([128, 128, 384, 384], abs=0.01)


def test_shrinking_to_a_head_does_not_alias() -> None:
    stripes = torch.zeros(2048, 2048, 3)
    stripes[:, ::2] = 1
    crop, _ = faces.head(stripes, face(512, 512, 1024))
    assert (crop[50:-50, 50:-50].float() - 127.5).abs().max() < 16


class Finder:
    """A detector that finds what it is told at certain sizes, and remembers what it was shown."""

    def __init__(self, found: dict[tuple[int, int], list[Face]]) -> None:
        self.found, self.shown = found, list[tuple[int, int, torch.dtype]]()

    def __call__(self, photo: Tensor, size: int) -> list[Face]:
        self.shown.append((photo.shape[0], size, photo.dtype))
        return self.found.get((photo.shape[0], size), [])


def test_sizes_are_tried_until_one_shows_faces_which_come_left_to_right() -> None:
    finder = Finder({(100, 448): [face(50, 0), face(10, 5)]})
    search = faces.find_faces(torch.rand(100, 100, 3), finder)
    assert search.tried == ("640", "512", "448") and [float(f.box[0]) for f in search.faces] == [10, 50]
    assert finder.shown[-1] == (100, 448, torch.uint8)


def test_a_tight_crop_gets_a_margin_and_places_are_the_photos() -> None:
    finder = Finder({(200, 512): [face(60, 70)]})  # 50 pixels wider on every side
    search = faces.find_faces(torch.rand(100, 80, 3), finder)
    assert search.tried[-2:] == ("640 with a margin", "512 with a margin")
    assert len(search.tried) == len(faces.DETECTION_SIZES) + 2
    (found,) = search.faces
    assert torch.allclose(found.box, face(10, 20).box) and torch.allclose(found.kps, face(10, 20).kps, atol=1e-4)


def test_nothing_found_says_all_that_was_tried() -> None:
    search = faces.find_faces(empty(), Finder({}))
    assert search.faces == () and len(search.tried) == 2 * len(faces.DETECTION_SIZES)
    assert set(faces.DETECTION_SIZES) >= {640, 512, 448, 384, 320, 256, 192, 1024}


def test_picks() -> None:
    row = [face(0, 0, 30), face(40, 0, 60), face(120, 0, 20)]
    assert {name: pick(row) for name, pick in faces.PICKS.items()} == {"largest": 1, "leftmost": 0, "rightmost": 2}


def test_most_alike_goes_by_direction_alone() -> None:
    row = [face(0, 0), face(40, 0), face(80, 0)]
    vectors = {0.0: [9.0, 9.0], 40.0: [0.1, 0.01], 80.0: [-5.0, 0.0]}
    shown: list[torch.dtype] = []

    def embed(photo: Tensor, one: Face) -> Tensor:
        shown.append(photo.dtype)
        return torch.tensor(vectors[float(one.box[0])])

    assert faces.most_alike(torch.rand(99, 99, 3), row, embed, torch.tensor([2.0, 0.0])) == 1
    assert set(shown) == {torch.uint8}


def test_a_whole_photo_is_its_own_face() -> None:
    found = faces.whole(torch.zeros(300, 224, 3))
    assert found.box.tolist() == [0, 0, 224, 300] and found.score == 0
    assert torch.allclose(found.kps, faces.template(224).float() + torch.tensor([0.0, 38.0]))
    photo = torch.rand(224, 224, 3)
    assert torch.allclose(faces.align(photo, faces.whole(photo).kps, 224), photo, atol=1e-4)


def test_blur_lowers_the_sharpness_and_is_told() -> None:
    soft = portrait().movedim(-1, 0)[None]
    for _ in range(3):
        soft = avg_pool2d(soft, 5, stride=1, padding=2)
    soft = soft[0].movedim(0, -1)
    assert faces.sharpness(soft, COLLINS) < faces.BLURRED < faces.sharpness(portrait(), COLLINS)
    assert "blurred" in faces.describe(soft, COLLINS) and "mind" not in faces.describe(portrait(), COLLINS)


def test_pose() -> None:
    straight = face(0, 0, 112)
    assert max(map(abs, faces.pose(straight))) < 6
    nose = torch.zeros(5, 2)
    nose[2] = torch.tensor([14.0, 0.0])
    yaw, _, _ = faces.pose(Face(straight.box, straight.kps + nose, 1.0))
    assert yaw > faces.TURNED
    _, pitch, _ = faces.pose(Face(straight.box, straight.kps + nose.flip(1), 1.0))
    assert pitch > faces.TURNED
    turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])  # a quarter, clockwise as seen
    assert faces.pose(Face(straight.box, straight.kps @ turn, 1.0))[2] == pytest.approx(90, abs=1)
    same = Face(straight.box, torch.zeros(5, 2), 1.0)
    assert all(abs(angle) <= 90 for angle in faces.pose(same))


def test_a_line_tells_size_score_and_what_is_wrong() -> None:
    small = Face(COLLINS.box, COLLINS.kps, 0.87)
    line = faces.describe(portrait(), small)
    assert "score 0.87" in line and "102 pixels" in line and "roll 3 degrees" in line
    kps = COLLINS.kps.clone()
    kps[2] = kps[1]
    bad = faces.describe(portrait(), Face(torch.tensor([200.0, 100, 240, 150]), kps, 0.0))
    assert "mind: small (under 64 pixels)" in bad and "turned away" in bad and "score" not in bad
