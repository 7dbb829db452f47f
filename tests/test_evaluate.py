"""Compare Pictures and Evaluate Identity, on pictures whose numbers are known."""

from __future__ import annotations

import math
from dataclasses import replace

import prompters
import pytest
import torch
import towers
from comfyui_likeness.likeness import faces, measures, pose
from comfyui_likeness.likeness.spec import Face, Identity
from comfyui_likeness.nodes.encode import EncodeIdentity
from comfyui_likeness.nodes.evaluate import NAMES, ComparePictures, EvaluateIdentity
from comfyui_likeness.nodes.loaders.face_analyzer import FaceAnalyzer
from comfyui_likeness.nodes.measure import MeasureLikeness
from portraits import couple, empty, portrait, stranger
from torch import Tensor

pytest_plugins = ["analyzers"]


@pytest.fixture
def eileen(analyzer: FaceAnalyzer) -> Identity:
    return EncodeIdentity.execute({"photo_0": portrait()[None]}, "Eileen", "largest", "stop", analyzer).args[0]


def test_noise_of_a_known_size_has_its_psnr() -> None:
    picture = torch.full((1, 64, 48, 3), 0.5)
    noisy = picture + 0.1 * torch.where(torch.arange(48) % 2 == 0, 1.0, -1.0)[:, None]
    psnr, ssim, report = ComparePictures.execute(noisy, picture).args
    assert psnr == pytest.approx(20, abs=1e-3) and -0.1 < ssim < 0.2
    assert report == f"picture 1: PSNR 20.00 dB, SSIM {ssim:.4f}"


def test_ssim_is_that_of_the_paper() -> None:
    """Of two even pictures only the means count: (2 a b + C1) / (a^2 + b^2 + C1)."""
    a, b, c = 0.4, 0.6, 0.01**2
    pictures = [torch.full((1, 32, 32, 3), value) for value in (a, b)]
    assert ComparePictures.execute(*pictures).args[1] == pytest.approx((2 * a * b + c) / (a * a + b * b + c), abs=1e-5)


def test_one_reference_is_for_all_pictures() -> None:
    pictures = torch.stack((portrait(), stranger()))
    psnr, ssim, report = ComparePictures.execute(pictures, portrait()[None]).args
    other = ComparePictures.execute(stranger()[None], portrait()[None]).args
    assert psnr == pytest.approx((100 + other[0]) / 2) and ssim == pytest.approx((1 + other[1]) / 2)
    assert ComparePictures.execute(pictures, pictures).args[:2] == (100, 1) and len(report.splitlines()) == 2
    with pytest.raises(ValueError, match="got 2 pictures and 3 at reference"):
        ComparePictures.execute(pictures, pictures[[0, 0, 1]])
    with pytest.raises(ValueError, match="got pictures of 512 x 512 and 256 x 512 pixels"):
        ComparePictures.execute(pictures, pictures[:, :, :256])


def values(*given: object, **told: object) -> tuple[dict[str, float], str]:
    *numbers, report = EvaluateIdentity.execute(*given, **told).args
    return dict(zip(NAMES, numbers, strict=True)), report


def test_the_outputs_are_named_as_the_numbers() -> None:
    assert [output.display_name for output in EvaluateIdentity.define_schema().outputs] == [*NAMES, "report"]


def test_without_a_target_it_is_likeness_alone(analyzer: FaceAnalyzer, eileen: Identity) -> None:
    found, report = values(couple()[None], eileen, analyzer)
    assert found["sim_ref"] == pytest.approx(MeasureLikeness.execute(couple()[None], eileen, analyzer).args[0])
    assert [found[name] for name in list(NAMES)[1:]] == [0] * 5
    first, last = report.splitlines()
    assert first == f"picture 1: Sim_ref {found['sim_ref']:.3f}"
    assert last == "Not measured, and 0: sim_target, paste, clip_i, clip_t, pose_error."


def test_a_copied_photo_is_pasted(analyzer: FaceAnalyzer, eileen: Identity) -> None:
    """The stranger stands for another photo of hers, which was to be made."""
    found, report = values(portrait()[None], eileen, analyzer, target=stranger()[None])
    alike = MeasureLikeness.execute(stranger()[None], eileen, analyzer).args[0]
    assert found["sim_ref"] == pytest.approx(1, abs=1e-4) and found["sim_target"] == pytest.approx(alike, abs=1e-4)
    assert found["paste"] == pytest.approx(1 - alike, abs=1e-4)
    (mine,), (theirs,) = (faces.find_faces(photo, analyzer.detect).faces for photo in (portrait(), stranger()))
    assert found["pose_error"] == pytest.approx(measures.pose_error(mine, theirs), abs=1e-4) and found["pose_error"] > 5
    assert report.splitlines()[0].startswith("picture 1: Sim_ref 1.000, Sim_target ")
    same, _ = values(portrait()[None], eileen, analyzer, target=portrait()[None])
    assert same["paste"] == same["pose_error"] == pytest.approx(0, abs=1e-4)


def test_every_photo_of_the_identity_counts(analyzer: FaceAnalyzer, eileen: Identity) -> None:
    (key,) = eileen.embeddings
    other = EncodeIdentity.execute({"photo_0": stranger()[None]}, "x", "largest", "stop", analyzer).args[0]
    rows = torch.cat((eileen.embeddings[key], other.embeddings[key]))
    both = replace(
        EncodeIdentity.execute(
            {"photo_0": torch.stack((portrait(), stranger()))}, "both", "largest", "stop", analyzer
        ).args[0],
        embeddings={key: rows},
    )  # fmt: skip
    assert values(stranger()[None], both, analyzer)[0]["sim_ref"] == pytest.approx(1, abs=1e-4)


def test_a_picture_without_a_face_is_like_nobody(analyzer: FaceAnalyzer, eileen: Identity) -> None:
    pictures = torch.stack((portrait(), torch.full((512, 512, 3), 0.5)))
    found, report = values(pictures, eileen, analyzer, target=portrait()[None])
    assert found["sim_ref"] == pytest.approx(0.5, abs=1e-4) and found["sim_target"] == pytest.approx(0.5, abs=1e-4)
    assert found["pose_error"] == pytest.approx(0, abs=1e-4) and report.splitlines()[1].endswith("; no face found")
    nothing, _ = values(empty()[None], eileen, analyzer, target=portrait()[None])
    assert nothing["sim_ref"] == nothing["pose_error"] == 0
    with pytest.raises(ValueError, match="got 1 pictures and 2 at target"):
        values(portrait()[None], eileen, analyzer, target=pictures)


def unit(rows: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows.double(), dim=-1)


@torch.inference_mode()
def test_clip_compares_to_the_target_and_to_the_text(analyzer: FaceAnalyzer, eileen: Identity) -> None:
    vision = towers.twin(towers.open_clip())
    clip = prompters.clip(width=towers.OUT, heads=4, layers=2)
    given = {"target": stranger()[None], "clip_vision": vision, "clip": clip, "text": "a woman in space"}
    with pytest.raises(ValueError, match="got a text encoder without a text projection"):
        values(portrait()[None], eileen, analyzer, **given)
    weight = clip.cond_stage_model.clip_l.transformer.text_projection.weight
    weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    found, report = values(portrait()[None], eileen, analyzer, **given)
    mine, theirs = (vision.encode_image(one[None])["image_embeds"] for one in (portrait(), stranger()))
    tokens = [[token for token, _ in row] for row in clip.tokenize("a woman in space")["l"]]
    clip.cond_stage_model.reset_clip_options()
    projected = clip.cond_stage_model.clip_l.transformer(torch.tensor(tokens), dtype=torch.float32)[2]
    assert found["clip_i"] == pytest.approx(float(unit(mine) @ unit(theirs).T), abs=1e-4)
    assert found["clip_t"] == pytest.approx(float(unit(mine) @ unit(projected).T), abs=1e-4)
    assert "Not measured" not in report and "CLIP-I" in report
    other = prompters.clip(width=64, heads=4, layers=2)
    other.cond_stage_model.clip_l.transformer.text_projection.weight.mul_(2)
    with pytest.raises(ValueError, match="got 48 numbers of a picture and 64 of the text"):
        values(portrait()[None], eileen, analyzer, **given | {"clip": other})


def test_turns_are_told_in_degrees() -> None:
    def turned(*angles: float) -> Face:
        kps = pose.key_points(112, (56, 56), *angles)
        return Face(torch.tensor([0.0, 0, 112, 112]), kps, 1.0)

    straight = turned(0, 0, 0)
    assert measures.pose_error(straight, straight) == 0
    assert measures.pose_error(straight, turned(0, 0, 30)) == pytest.approx(10, abs=0.1)  # a third of it
    assert measures.pose_error(turned(0, 0, 175), turned(0, 0, -175)) == pytest.approx(10 / 3, abs=0.1)
    errors = [measures.pose_error(straight, turned(yaw, 0, 0)) for yaw in (0, 10, 20, 30)]
    assert errors == sorted(errors) and errors[3] > 6
    assert not math.isnan(measures.pose_error(straight, turned(90, 0, 0)))
