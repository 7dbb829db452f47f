"""Faces: alignment against insightface and facexlib, crops, detection, selection, quality."""

from __future__ import annotations

import pytest
import torch
from comfyui_likeness.likeness.faces import alignment, detection, landmarks, quality
from comfyui_likeness.likeness.spec import CROP_NAMES, FACE_CROP_SIZES, Face
from comfyui_likeness.tools.standins import face_networks
from support.golden import assert_close, read_golden_cases
from support.photos import COLLINS_FACE, load_portrait, make_empty_photo
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate, pad

GOLDEN = read_golden_cases("ip_adapter", "preprocess")["face_norm_crop"]
LANDMARKS = GOLDEN.build_input("landmarks")


def golden_photo() -> Tensor:
    """The image of the golden case, integer gray levels as float [H, W, 3]."""
    image = GOLDEN.build_input("image").movedim(-1, 0)[None]
    blur = avg_pool2d(pad(image, (4, 4, 4, 4), mode="replicate"), 9, stride=1)[0].movedim(0, -1) * 9
    return (128 + 50 * blur).clamp(0, 255).round()


def face(x: float, y: float, size: float = 40.0, score: float = 0.8) -> Face:
    box = torch.tensor([x, y, x + size, y + size])
    return Face(box, alignment.make_arcface_template(112).float() * size / 112 + torch.tensor([x, y]), score)


@pytest.mark.parametrize("size", [112, 224, 256, 336])
def test_transform_matches_insightface(size: int) -> None:
    assert_close(
        alignment.estimate_similarity_transform(LANDMARKS, alignment.make_arcface_template(size)),
        GOLDEN.load_outputs()[f"matrix_{size}"],
    )


def test_crop_matches_the_golden_case() -> None:
    off = (alignment.align_face(golden_photo() / 255, LANDMARKS, 112) * 255 - GOLDEN.load_outputs()["crop_112"]).abs()
    assert off.max() <= 4 and off.mean() <= 0.5


@pytest.mark.parametrize("size", [112, 224, 256, 336])
def test_crops_match_insightface(size: int) -> None:
    from insightface.utils import face_align

    photo, kps = face_networks.load_portrait(), COLLINS_FACE.kps
    expected = torch.from_numpy(face_align.norm_crop(photo, kps.numpy(), size)).float()
    off = (alignment.align_face(load_portrait(), kps, size) * 255 - expected).abs()
    assert off.max() <= 4 and off.mean() <= 0.5


def test_crop_is_black_outside_the_photo() -> None:
    crop = alignment.align_face(torch.ones(60, 60, 3), face(-30, 0, 60).kps, 112)
    assert crop[:, :50].max() == 0 and crop[20:90, 70:].min() > 0.99


def test_similarity_transform_is_recovered_without_reflection() -> None:
    points = LANDMARKS.double()
    angle = torch.tensor(0.4, dtype=torch.float64)
    turn = 1.7 * torch.stack((torch.stack((angle.cos(), -angle.sin())), torch.stack((angle.sin(), angle.cos()))))
    shift = torch.tensor([3.0, -5.0], dtype=torch.float64)
    found = alignment.estimate_similarity_transform(points, points @ turn.T + shift)
    assert torch.allclose(found, torch.cat((turn, shift[:, None]), dim=1))
    mirrored = alignment.estimate_similarity_transform(points * torch.tensor([-1.0, 1.0]), points)
    assert torch.linalg.det(mirrored[:, :2]) > 0


def test_256_shows_more_than_224_at_the_same_scale() -> None:
    tight, wide = alignment.make_arcface_template(224), alignment.make_arcface_template(256)
    assert torch.allclose(wide - tight, torch.tensor([16.0, 0.0], dtype=torch.float64))


def test_other_sizes_are_rejected() -> None:
    with pytest.raises(ValueError, match="got a face crop of 100 pixels; expected a multiple of 112 or 128"):
        alignment.make_arcface_template(100)


@pytest.mark.parametrize("size", [112, 224, 256])
def test_the_head_crop_contains_every_aligned_crop(size: int) -> None:
    crop, inside = alignment.crop_head(load_portrait(), COLLINS_FACE)
    assert crop.shape == (alignment.HEAD_CROP_SIZE, alignment.HEAD_CROP_SIZE, 3) and crop.dtype == torch.uint8
    from_head = alignment.align_face(crop.float() / 255, inside.kps, size)
    assert (from_head - alignment.align_face(load_portrait(), COLLINS_FACE.kps, size)).abs().mean() < 0.01


@pytest.mark.parametrize("size", [512, 2048])
def test_ffhq_crop_matches_facexlib(size: int) -> None:
    scale = size / 512
    photo = interpolate(load_portrait().movedim(-1, 0)[None], scale_factor=scale, mode="bilinear")[0].movedim(0, -1)
    kps = (COLLINS_FACE.kps + 0.5) * scale - 0.5
    matrix = alignment.estimate_similarity_transform(COLLINS_FACE.kps, torch.tensor(alignment.FFHQ_TEMPLATE))
    found = COLLINS_FACE.kps.double() @ matrix[:, :2].T + matrix[:, 2]
    assert (found - torch.tensor(alignment.FFHQ_TEMPLATE)).abs().max() < 12  # of 512: a face is not the mean one
    assert (
        alignment.align_face_ffhq(photo, kps) - alignment.warp_photo(load_portrait(), matrix, 512)
    ).abs().mean() < 0.01
    beyond = alignment.align_face_ffhq(photo[:, : size // 2], kps)
    assert torch.allclose(beyond[300, -1] * 255, torch.tensor([132.0, 133.0, 135.0]), atol=0.1)


def test_pulid_crop_is_gray_on_white() -> None:
    crop, aligned = (
        alignment.CROP_FUNCTIONS["ffhq512"](load_portrait(), COLLINS_FACE.kps),
        alignment.align_face_ffhq(load_portrait(), COLLINS_FACE.kps),
    )
    assert crop.shape == (512, 512, 3) and torch.equal(crop[..., 0], crop[..., 1]) and torch.equal(crop, crop.flip(-1))
    assert crop[:, :60].min() == 1 and crop[:, -60:].min() == 1 and crop[500:, :].min() == 1
    inner = torch.tensor(alignment.FFHQ_TEMPLATE).round().long()
    gray = aligned @ torch.tensor([0.299, 0.587, 0.114])
    for x, y in inner.tolist():
        assert torch.equal(crop[y, x, 0], gray[y, x])
    assert (
        alignment.CROP_FUNCTIONS.keys() == {*FACE_CROP_SIZES, "ffhq512"} == {*CROP_NAMES} - {"photo", "black", "head"}
    )


def test_head_crop_is_twice_the_box() -> None:
    crop, inside = alignment.crop_head(load_portrait(), face(200, 100, 64))
    assert torch.allclose(inside.box, torch.tensor([128.0, 128, 384, 384]), atol=0.01)
    assert torch.allclose(inside.kps, alignment.make_arcface_template(112).float() * 256 / 112 + 128, atol=0.01)
    around = load_portrait()[68:197, 168:297].movedim(-1, 0)[None]  # the same place, cut plainly
    expected = interpolate(around, (alignment.HEAD_CROP_SIZE + 1,) * 2, mode="bilinear", align_corners=True)[0].movedim(
        0, -1
    )
    assert (crop.float() / 255 - expected[:-1, :-1]).abs().max() < 0.01


def test_keypoints_of_a_downscaled_head_crop() -> None:
    ramp = (torch.arange(2560).float() / 2560).view(1, -1, 1).expand(2048, -1, 3)
    crop, inside = alignment.crop_head(ramp, face(700, 600, 1024))
    for x, y in inside.kps.round().int().tolist():
        in_photo = 700 - 512 + x * 4
        assert float(crop[y, x, 0]) / 255 * 2560 == pytest.approx(in_photo, abs=6)
    inner = torch.arange(8, alignment.HEAD_CROP_SIZE - 8)
    off = crop[256, inner, 0].float() * 2560 / 255 - (188 + inner * 4)
    assert abs(float(off.mean())) < 0.5  # half a pixel of the crop would be 2


def test_head_crop_is_black_outside_the_photo() -> None:
    crop, inside = alignment.crop_head(torch.ones(2000, 1500, 3), face(0, 0, 800))
    assert crop[:124].max() == 0 and crop[:, :124].max() == 0 and crop[132:500, 132:500].min() == 255
    assert inside.box.tolist() == pytest.approx([128, 128, 384, 384], abs=0.01)


def test_downscaled_head_crop_does_not_alias() -> None:
    stripes = torch.zeros(2048, 2048, 3)
    stripes[:, ::2] = 1
    crop, _ = alignment.crop_head(stripes, face(512, 512, 1024))
    assert (crop[50:-50, 50:-50].float() - 127.5).abs().max() < 16


class FakeDetector:
    """A detector that returns given faces for given (photo height, detector size) pairs and records its calls."""

    def __init__(self, found: dict[tuple[int, int], list[Face]]) -> None:
        self.found, self.calls = found, list[tuple[int, int, torch.dtype]]()

    def __call__(self, photo: Tensor, size: int) -> list[Face]:
        self.calls.append((photo.shape[0], size, photo.dtype))
        return self.found.get((photo.shape[0], size), [])


def test_detector_sizes_are_tried_in_order() -> None:
    finder = FakeDetector({(100, 448): [face(50, 0), face(10, 5)]})
    search = detection.find_faces(torch.rand(100, 100, 3), finder)
    assert search.attempts == ("640", "512", "448") and [float(f.box[0]) for f in search.faces] == [10, 50]
    assert finder.calls[-1] == (100, 448, torch.uint8)


def test_tight_crops_are_padded() -> None:
    finder = FakeDetector({(200, 512): [face(60, 70)]})  # 50 pixels wider on every side
    search = detection.find_faces(torch.rand(100, 80, 3), finder)
    assert search.attempts[-2:] == ("640 with a margin", "512 with a margin")
    assert len(search.attempts) == len(detection.DETECTION_SIZES) + 2
    (found,) = search.faces
    assert torch.allclose(found.box, face(10, 20).box) and torch.allclose(found.kps, face(10, 20).kps, atol=1e-4)


def detect_white_square(photo: Tensor) -> list[Face]:
    """Finds a white square on black in photos that have a margin."""
    white = (photo.amin(-1) > 127).nonzero()
    if photo[0, 0, 0] != 127 or not len(white):
        return []
    y0, x0 = white.amin(0).tolist()
    return [face(x0, y0, int(white[:, 1].max()) - x0)]


@pytest.mark.parametrize(
    ("width", "height", "box"),
    [(16000, 800, (9000, 100, 9600, 700)), (800, 16000, (50, 9000, 650, 9600)), (6000, 16, (3000, 0, 3010, 10))],
)
def test_a_panorama_is_shrunk_before_it_gets_a_margin(width: int, height: int, box: tuple[int, ...]) -> None:
    photo = torch.zeros(height, width, 3)
    x0, y0, x1, y1 = box
    photo[y0 : y1 + 1, x0 : x1 + 1] = 1
    sizes: list[int] = []

    def detect(image: Tensor, size: int) -> list[Face]:
        sizes.append(max(image.shape[:2]))
        return detect_white_square(image)

    search = detection.find_faces(photo, detect)
    largest = max(detection.DETECTION_SIZES)
    assert set(sizes) == {max(width, height), sizes[-1]}
    if height > 16:
        assert sizes[-1] <= largest + 1
        (found,) = search.faces
        pixel = max(width, height) / (largest / 2)  # of the photo, in one pixel of the shrunk photo
        assert torch.allclose(found.box, torch.tensor(box).float(), atol=pixel)


def test_all_attempts_are_listed() -> None:
    search = detection.find_faces(make_empty_photo(), FakeDetector({}))
    assert search.faces == () and len(search.attempts) == 2 * len(detection.DETECTION_SIZES)
    assert set(detection.DETECTION_SIZES) >= {640, 512, 448, 384, 320, 256, 192, 1024}


def test_picks() -> None:
    row = [face(0, 0, 30), face(40, 0, 60), face(120, 0, 20)]
    assert {name: pick(row) for name, pick in detection.FACE_PICKERS.items()} == {
        "largest": 1,
        "leftmost": 0,
        "rightmost": 2,
    }


def test_pick_most_similar_face() -> None:
    row = [face(0, 0), face(40, 0), face(80, 0)]
    vectors = {0.0: [9.0, 9.0], 40.0: [0.1, 0.01], 80.0: [-5.0, 0.0]}
    shown: list[torch.dtype] = []

    def embed(photo: Tensor, one: Face) -> Tensor:
        shown.append(photo.dtype)
        return torch.tensor(vectors[float(one.box[0])])

    assert detection.pick_most_similar_face(torch.rand(99, 99, 3), row, embed, torch.tensor([2.0, 0.0])) == 1
    assert set(shown) == {torch.uint8}


def test_whole_photo_face() -> None:
    found = alignment.make_whole_photo_face(torch.zeros(300, 224, 3))
    assert found.box.tolist() == [0, 0, 224, 300] and found.score == 0
    assert torch.allclose(found.kps, alignment.make_arcface_template(224).float() + torch.tensor([0.0, 38.0]))
    photo = torch.rand(224, 224, 3)
    assert torch.allclose(
        alignment.align_face(photo, alignment.make_whole_photo_face(photo).kps, 224), photo, atol=1e-4
    )


def test_blur_gives_a_warning() -> None:
    soft = load_portrait().movedim(-1, 0)[None]
    for _ in range(3):
        soft = avg_pool2d(soft, 5, stride=1, padding=2)
    soft = soft[0].movedim(0, -1)
    assert (
        quality.compute_sharpness(soft, COLLINS_FACE)
        < quality.MIN_SHARPNESS
        < quality.compute_sharpness(load_portrait(), COLLINS_FACE)
    )
    assert "blurred" in quality.describe_face(soft, COLLINS_FACE) and "warning" not in quality.describe_face(
        load_portrait(), COLLINS_FACE
    )


def test_pose() -> None:
    straight = face(0, 0, 112)
    assert max(map(abs, quality.estimate_pose(straight))) < 6
    nose = torch.zeros(5, 2)
    nose[2] = torch.tensor([14.0, 0.0])
    yaw, _, _ = quality.estimate_pose(Face(straight.box, straight.kps + nose, 1.0))
    assert yaw > quality.MAX_FRONTAL_ANGLE
    _, pitch, _ = quality.estimate_pose(Face(straight.box, straight.kps - nose.flip(1), 1.0))
    assert pitch > quality.MAX_FRONTAL_ANGLE
    turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])  # a quarter, clockwise as seen
    assert quality.estimate_pose(Face(straight.box, straight.kps @ turn, 1.0))[2] == pytest.approx(90, abs=1)
    same = Face(straight.box, torch.zeros(5, 2), 1.0)
    assert all(abs(angle) <= 90 for angle in quality.estimate_pose(same))


def test_a_smile_is_no_nod() -> None:
    for yaw in (0.0, -25.0):
        level = landmarks.make_posed_keypoints(112, (56, 56), yaw, 0, 0)
        smile = level.clone()
        smile[3:] += torch.tensor([[-5.0, -10.0], [5.0, -10.0]])  # the corners of the mouth move up and apart
        pitches = [quality.estimate_pose(Face(torch.zeros(4), kps, 1.0))[1] for kps in (level, smile)]
        assert pitches == pytest.approx([0, 0], abs=1)


@pytest.mark.parametrize("roll", [0.0, 40.0])
def test_the_signs_of_the_pose_are_those_of_the_template_key_points(roll: float) -> None:
    def estimate(yaw: float, pitch: float) -> tuple[float, float, float]:
        kps = landmarks.make_posed_keypoints(112, (56, 56), yaw, pitch, roll)
        return quality.estimate_pose(Face(torch.zeros(4), kps, 1.0))

    for yaw, pitch in ((20.0, 0.0), (-20.0, 0.0), (0.0, 20.0), (0.0, 40.0), (0.0, -15.0)):
        assert estimate(yaw, pitch) == pytest.approx((yaw, pitch, roll), abs=5)
    assert abs(estimate(75, 0)[1]) < 5  # almost in profile: the eyes are close together


def test_describe_face() -> None:
    small = Face(COLLINS_FACE.box, COLLINS_FACE.kps, 0.87)
    line = quality.describe_face(load_portrait(), small)
    assert "score 0.87" in line and "102 pixels" in line and "roll 3 degrees" in line
    kps = COLLINS_FACE.kps.clone()
    kps[2] = kps[1]
    bad = quality.describe_face(load_portrait(), Face(torch.tensor([200.0, 100, 240, 150]), kps, 0.0))
    assert "warning: small (under 64 pixels)" in bad and "turned away" in bad and "score" not in bad
