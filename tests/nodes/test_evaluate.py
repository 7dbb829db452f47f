"""Compare Images and Evaluate Identity, on images with known metrics."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from comfyui_likeness.likeness.faces import detection, landmarks
from comfyui_likeness.likeness.identity import metrics
from comfyui_likeness.likeness.spec import Face, Identity
from comfyui_likeness.nodes.encode import EncodeIdentity
from comfyui_likeness.nodes.evaluate import METRIC_FORMATS, CompareImages, EvaluateIdentity
from comfyui_likeness.nodes.loaders.face_analyzer import FaceAnalyzer
from comfyui_likeness.nodes.measure import MeasureLikeness
from support import adaface_models, vision_towers
from support.photos import load_portrait, make_couple_photo, make_empty_photo, make_stranger_photo
from torch import Tensor


@pytest.fixture
def eileen(analyzer: FaceAnalyzer) -> Identity:
    return EncodeIdentity.execute({"photo_0": load_portrait()[None]}, "Eileen", "largest", "stop", analyzer).args[0]


def test_psnr_of_known_noise() -> None:
    image = torch.full((1, 64, 48, 3), 0.5)
    noisy = image + 0.1 * torch.where(torch.arange(48) % 2 == 0, 1.0, -1.0)[:, None]
    psnr, ssim, report = CompareImages.execute(noisy, image).args
    assert psnr == pytest.approx(20, abs=1e-3) and -0.1 < ssim < 0.2
    assert report == f"image 1: PSNR 20.00 dB, SSIM {ssim:.4f}"


def test_ssim_of_constant_images() -> None:
    """For two constant images, SSIM depends only on the means: (2 a b + C1) / (a^2 + b^2 + C1)."""
    a, b, c = 0.4, 0.6, 0.01**2
    images = [torch.full((1, 32, 32, 3), value) for value in (a, b)]
    assert CompareImages.execute(*images).args[1] == pytest.approx((2 * a * b + c) / (a * a + b * b + c), abs=1e-5)


def test_one_reference_serves_all_images() -> None:
    images = torch.stack((load_portrait(), make_stranger_photo()))
    psnr, ssim, report = CompareImages.execute(images, load_portrait()[None]).args
    other = CompareImages.execute(make_stranger_photo()[None], load_portrait()[None]).args
    assert psnr == pytest.approx((100 + other[0]) / 2) and ssim == pytest.approx((1 + other[1]) / 2)
    assert CompareImages.execute(images, images).args[:2] == (100, 1) and len(report.splitlines()) == 2
    with pytest.raises(ValueError, match="got 2 image.s. and 3 at reference"):
        CompareImages.execute(images, images[[0, 0, 1]])
    with pytest.raises(ValueError, match="got images of 512 x 512 and references of 256 x 512 pixels"):
        CompareImages.execute(images, images[:, :, :256])


def evaluate(*args: object, **kwargs: object) -> tuple[dict[str, float], str]:
    *numbers, report = EvaluateIdentity.execute(*args, **kwargs).args
    return dict(zip(METRIC_FORMATS, numbers, strict=True)), report


def test_outputs_are_named_after_the_metrics() -> None:
    assert [output.display_name for output in EvaluateIdentity.define_schema().outputs] == [*METRIC_FORMATS, "report"]


def test_without_a_target_only_sim_ref_is_measured(analyzer: FaceAnalyzer, eileen: Identity) -> None:
    found, report = evaluate(make_couple_photo()[None], eileen, analyzer)
    assert found["sim_ref"] == pytest.approx(
        MeasureLikeness.execute(make_couple_photo()[None], eileen, analyzer).args[0]
    )
    assert [found[name] for name in list(METRIC_FORMATS)[1:]] == [0] * 5
    first, last = report.splitlines()
    assert first == f"image 1: Sim_ref {found['sim_ref']:.3f}"
    assert last == "Not measured (output is 0): sim_target, paste, clip_i, clip_t, pose_error."


def test_a_copied_photo_has_a_high_paste_score(analyzer: FaceAnalyzer, eileen: Identity) -> None:
    """The stranger's photo stands for a target photo of the same person."""
    found, report = evaluate(load_portrait()[None], eileen, analyzer, target=make_stranger_photo()[None])
    similarity = MeasureLikeness.execute(make_stranger_photo()[None], eileen, analyzer).args[0]
    assert found["sim_ref"] == pytest.approx(1, abs=1e-4) and found["sim_target"] == pytest.approx(similarity, abs=1e-4)
    assert found["paste"] == pytest.approx(1 - similarity, abs=1e-4)
    (generated,), (target,) = (
        detection.find_faces(photo, analyzer.detect).faces for photo in (load_portrait(), make_stranger_photo())
    )
    assert (
        found["pose_error"] == pytest.approx(metrics.compute_pose_error(generated, target), abs=1e-4)
        and found["pose_error"] > 5
    )
    assert report.splitlines()[0].startswith("image 1: Sim_ref 1.000, Sim_target ")
    same, _ = evaluate(load_portrait()[None], eileen, analyzer, target=load_portrait()[None])
    assert same["paste"] == same["pose_error"] == pytest.approx(0, abs=1e-4)


def test_every_photo_of_the_identity_is_compared(analyzer: FaceAnalyzer, eileen: Identity) -> None:
    (key,) = eileen.embeddings
    other = EncodeIdentity.execute({"photo_0": make_stranger_photo()[None]}, "x", "largest", "stop", analyzer).args[0]
    rows = torch.cat((eileen.embeddings[key], other.embeddings[key]))
    both = replace(
        EncodeIdentity.execute(
            {"photo_0": torch.stack((load_portrait(), make_stranger_photo()))}, "both", "largest", "stop", analyzer
        ).args[0],
        embeddings={key: rows},
    )  # fmt: skip
    assert evaluate(make_stranger_photo()[None], both, analyzer)[0]["sim_ref"] == pytest.approx(1, abs=1e-4)


def test_images_without_a_face_have_similarity_0(analyzer: FaceAnalyzer, eileen: Identity) -> None:
    images = torch.stack((load_portrait(), torch.full((512, 512, 3), 0.5)))
    found, report = evaluate(images, eileen, analyzer, target=load_portrait()[None])
    assert found["sim_ref"] == pytest.approx(0.5, abs=1e-4) and found["sim_target"] == pytest.approx(0.5, abs=1e-4)
    assert found["pose_error"] == pytest.approx(0, abs=1e-4) and report.splitlines()[1].endswith("; no face found")
    nothing, _ = evaluate(make_empty_photo()[None], eileen, analyzer, target=load_portrait()[None])
    assert nothing["sim_ref"] == nothing["pose_error"] == 0
    with pytest.raises(ValueError, match="got 1 image.s. and 2 at target"):
        evaluate(load_portrait()[None], eileen, analyzer, target=images)


def normalize_rows(rows: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows.double(), dim=-1)


@torch.inference_mode()
def test_clip_similarity_to_target_and_text(analyzer: FaceAnalyzer, eileen: Identity) -> None:
    vision = vision_towers.convert_to_clip_vision(vision_towers.make_open_clip_tower())
    clip = adaface_models.make_clip(width=vision_towers.PROJECTION_WIDTH, num_heads=4, layers=2)
    inputs = {"target": make_stranger_photo()[None], "clip_vision": vision, "clip": clip, "text": "a woman in space"}
    with pytest.raises(ValueError, match="got a text encoder without a text projection"):
        evaluate(load_portrait()[None], eileen, analyzer, **inputs)
    weight = clip.cond_stage_model.clip_l.transformer.text_projection.weight
    weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    found, report = evaluate(load_portrait()[None], eileen, analyzer, **inputs)
    generated, target = (
        vision.encode_image(one[None])["image_embeds"] for one in (load_portrait(), make_stranger_photo())
    )
    tokens = [[token for token, _ in row] for row in clip.tokenize("a woman in space")["l"]]
    clip.cond_stage_model.reset_clip_options()
    projected = clip.cond_stage_model.clip_l.transformer(torch.tensor(tokens), dtype=torch.float32)[2]
    assert found["clip_i"] == pytest.approx(float(normalize_rows(generated) @ normalize_rows(target).T), abs=1e-4)
    assert found["clip_t"] == pytest.approx(float(normalize_rows(generated) @ normalize_rows(projected).T), abs=1e-4)
    assert "Not measured" not in report and "CLIP-I" in report
    other = adaface_models.make_clip(width=64, num_heads=4, layers=2)
    other.cond_stage_model.clip_l.transformer.text_projection.weight.mul_(2)
    with pytest.raises(ValueError, match="got image embeddings of width 48 and text embeddings of width 64"):
        evaluate(load_portrait()[None], eileen, analyzer, **inputs | {"clip": other})


def test_pose_error_in_degrees() -> None:
    def make_turned_face(*angles: float) -> Face:
        kps = landmarks.make_posed_keypoints(112, (56, 56), *angles)
        return Face(torch.tensor([0.0, 0, 112, 112]), kps, 1.0)

    straight = make_turned_face(0, 0, 0)
    assert metrics.compute_pose_error(straight, straight) == 0
    assert metrics.compute_pose_error(straight, make_turned_face(0, 0, 30)) == pytest.approx(
        10, abs=0.1
    )  # a third of it
    assert metrics.compute_pose_error(make_turned_face(0, 0, 175), make_turned_face(0, 0, -175)) == pytest.approx(
        10 / 3, abs=0.1
    )
    errors = [metrics.compute_pose_error(straight, make_turned_face(yaw, 0, 0)) for yaw in (0, 10, 20, 30)]
    assert errors == sorted(errors) and errors[3] > 6
    assert not math.isnan(metrics.compute_pose_error(straight, make_turned_face(90, 0, 0)))
