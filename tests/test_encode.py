"""Encode Identity: features on the right crops under the right names, the choice of a face, and what bad input gets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import towers
from comfyui_likeness.likeness import clip, draw, faces
from comfyui_likeness.likeness.spec import Feature, Identity, parse_encoder_id
from comfyui_likeness.nodes import encode
from comfyui_likeness.nodes.encode import EncodeIdentity, HostEncoder
from comfyui_likeness.nodes.loaders import image_encoder
from comfyui_likeness.nodes.loaders.face_analyzer import FaceAnalyzer
from golden import assert_close, cases
from portraits import couple, empty, place_of, portrait, stranger
from torch import Tensor

pytest_plugins = ["analyzers"]

H = {
    "projected.photo", "penultimate.photo", "projected.head", "penultimate.head", "penultimate.face224",
    "penultimate.face256", "last.face224",
}  # fmt: skip


@pytest.fixture
def vision(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A CLIP_VISION that goes for ViT-H/14."""
    monkeypatch.setitem(clip.ARCHITECTURES, towers.NUMBERS, "vit-h-14")
    return towers.twin(towers.open_clip())


def run(*photos: Tensor, pick: str = "largest", **options: Any) -> tuple[Identity, Tensor, str]:
    given: dict[str, Any] = {"name": "Eileen", "on_missing": "stop"} | options
    batches = {f"photo_{i}": photo if photo.ndim == 4 else photo[None] for i, photo in enumerate(photos)}
    with torch.inference_mode():
        return EncodeIdentity.execute(photos=batches, pick=pick, **given).args


def layers_of(identity: Identity) -> set[str]:
    ids = (parse_encoder_id(key)[0] for key in identity.embeddings)
    return {f"{feature.layer}.{feature.crop}" for feature in ids if feature.network.startswith("clip.")}


def test_a_photo_and_an_analyzer_give_a_vector(analyzer: FaceAnalyzer) -> None:
    identity, preview, report = run(portrait(), face_analyzer=analyzer, name=" Eileen ")
    key = Feature("arcface.buffalo_l", "raw", "face112").id(analyzer.sha256)
    assert list(identity.embeddings) == [key] and identity.hashes == {key: analyzer.sha256}
    (face,) = analyzer.detect(faces.pixels(portrait()), 640)
    assert torch.equal(identity.embeddings[key], analyzer.embed(faces.pixels(portrait()), face)[None])
    assert identity.name == "Eileen" and len(identity) == 1 and float(identity.score[0]) == pytest.approx(face.score)
    assert identity.crop is not None and identity.crop.shape == (1, 512, 512, 3)
    assert identity.sources == ("photo 1, 512x512",) and identity.weight.tolist() == [1.0]
    crop, inside = faces.head(portrait(), face)
    assert torch.equal(identity.crop[0], crop) and torch.equal(identity.kps[0], inside.kps)
    assert torch.equal(identity.box[0], inside.box)
    assert preview.shape == (1, 512, 512, 3)
    for word in ("photo 1: 1 face(s) at detector size 640", "took 1", "sharpness", "yaw", key):
        assert word in report


@torch.inference_mode()
def test_every_feature_is_made_of_its_own_crop(analyzer: FaceAnalyzer, vision: Any) -> None:
    identity, _, _ = run(portrait(), stranger(), face_analyzer=analyzer, image_encoder=vision)
    assert layers_of(identity) == H
    encoder = HostEncoder(vision)
    zero = encoder.zero()
    for i, photo in enumerate((portrait(), stranger())):
        (face,) = analyzer.detect(faces.pixels(photo), 640)
        crops = {
            "photo": photo,
            "head": faces.head(photo, face)[0].float() / 255,
            "face224": faces.align(photo, face.kps, 224),
            "face256": faces.align(photo, face.kps, 256),
        }
        for name in H:
            layer, crop = name.split(".")
            key = Feature("clip.vit-h-14", layer, crop).id(encoder.sha256)
            stored = identity.embeddings[key]
            assert stored.dtype == torch.float16 and stored.shape[0] == 2 and identity.hashes[key] == encoder.sha256
            assert_close(stored[i], encoder.encode(crops[crop][None])[layer][0], 2e-3)
            assert_close(identity.zeros[key], zero[layer], 2e-3)
    tokens = identity.embeddings[Feature("clip.vit-h-14", "penultimate", "face224").id(encoder.sha256)]
    assert tokens.shape == (2, 17, towers.WIDTH)


def test_crops_go_through_the_encoder_together_and_large_photos_alone() -> None:
    small, large = torch.zeros(224, 224, 3), torch.zeros(2000, 1500, 3)
    assert [len(batch) for batch in encode.batches([small] * 5)] == [5]
    assert [len(batch) for batch in encode.batches([large] * 2 + [small] * 2)] == [1, 1, 2]


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("vit-bigg-14", {"projected.photo", "projected.head"}),
        ("vit-l-14-336", {"penultimate.photo", "penultimate.face336"}),
        ("vit-b-32", {"projected.photo", "penultimate.photo"}),
    ],
)
def test_other_encoders_give_what_their_adapters_read(
    analyzer: FaceAnalyzer, monkeypatch: pytest.MonkeyPatch, name: str, wanted: set[str]
) -> None:
    monkeypatch.setitem(clip.ARCHITECTURES, towers.NUMBERS, name)
    encoder = HostEncoder(towers.twin(towers.open_clip()))
    assert layers_of(run(portrait(), face_analyzer=analyzer, image_encoder=encoder)[0]) == wanted


@torch.inference_mode()
def test_clip_l_sees_a_black_picture_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """What XLabs' adapter gives the negative prompt: the embedding of a black picture, once for each face."""
    monkeypatch.setitem(clip.ARCHITECTURES, towers.NUMBERS, "vit-l-14")
    encoder = HostEncoder(towers.twin(towers.open_clip()))
    identity, _, _ = run(portrait(), portrait(), pick="whole photo", image_encoder=encoder)
    assert layers_of(identity) == {"projected.photo", "penultimate.photo", "projected.black"}
    rows = identity.embeddings[identity.find(Feature("clip.vit-l-14", "projected", "black")) or ""]
    black = encoder.encode(torch.zeros(1, 64, 64, 3))["projected"]
    assert torch.equal(rows[0], rows[1]) and torch.allclose(
        rows[:1].float(), black, atol=2e-3 * float(black.abs().max())
    )


@torch.inference_mode()
def test_pulids_features_are_levels_of_the_grey_face(
    analyzer: FaceAnalyzer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = cases("ip_adapter", "encoder")["eva_clip_tiny"]
    torch.save(case.weights(), folder / "clip_vision" / "EVA.pt")
    monkeypatch.setitem(clip.HEAD_WIDTHS, 32, 16)
    monkeypatch.setitem(clip.EVA, (32, 21, 14, 42), "eva02-l-14-336")
    encoder = image_encoder.load("EVA.pt")
    identity, _, _ = run(portrait(), stranger(), face_analyzer=analyzer, image_encoder=encoder)
    assert layers_of(identity) == {"projected.ffhq512", "levels.ffhq512"} and identity.zeros == {}
    for i, photo in enumerate((portrait(), stranger())):
        (face,) = analyzer.detect(faces.pixels(photo), 640)
        made = encoder.encode(faces.grey_on_white(photo, face.kps)[None])
        for layer, size in (("projected", (24,)), ("levels", (5, 10, 32))):
            key = Feature("clip.eva02-l-14-336", layer, "ffhq512").id(encoder.sha256)
            assert identity.embeddings[key].shape == (2, *size)
            assert_close(identity.embeddings[key][i], made[layer][0], 2e-3)


def test_without_an_analyzer_only_the_photo_is_encoded(vision: Any) -> None:
    identity, preview, report = run(empty(), image_encoder=vision)
    assert layers_of(identity) == {"projected.photo", "penultimate.photo"} and identity.score.tolist() == [0.0]
    assert torch.equal(preview[0], empty()) and "no face was looked for" in report


@torch.inference_mode()
def test_a_whole_photo_is_taken_as_the_face(analyzer: FaceAnalyzer, vision: Any) -> None:
    photo = portrait()[60:172, 168:280]
    identity, _, _ = run(photo, pick="whole photo", face_analyzer=analyzer, image_encoder=vision)
    assert layers_of(identity) == H and any(key.startswith("arcface.") for key in identity.embeddings)
    encoder = HostEncoder(vision)
    key = Feature("clip.vit-h-14", "last", "face224").id(encoder.sha256)
    crop = faces.align(photo, faces.whole(photo).kps, 224)
    assert_close(identity.embeddings[key][0], encoder.encode(crop[None])["last"][0], 2e-3)
    assert identity.crop is not None and abs(identity.crop[0].float().mean() / 255 - photo.mean()) < 0.01


def test_photos_of_unlike_sizes_and_batches_are_all_taken(analyzer: FaceAnalyzer) -> None:
    two = torch.stack((portrait(), stranger()))
    identity, preview, report = run(two, portrait()[:, :480], face_analyzer=analyzer)
    assert len(identity) == 3 and preview.shape == (3, 512, 512, 3)
    assert identity.sources == ("photo 1, 512x512", "photo 2, 512x512", "photo 3, 480x512")
    assert "cosines between the faces from" in report


@pytest.mark.parametrize(
    ("pick", "nth", "wanted"), [("leftmost", 1, 0), ("rightmost", 1, 1), ("nth", 1, 0), ("nth", 2, 1)]
)
def test_the_picked_face_is_the_one_taken(analyzer: FaceAnalyzer, pick: str, nth: int, wanted: int) -> None:
    identity, preview, report = run(couple(), pick=pick, nth=nth, face_analyzer=analyzer)
    assert f"2 face(s) at detector size 640 (tried 1), took {wanted + 1}" in report
    crop, _ = faces.head(couple(), sorted(analyzer.detect(faces.pixels(couple()), 640), key=place)[wanted])
    assert identity.crop is not None and torch.equal(identity.crop[0], crop)
    for i in (0, 1):  # each box is drawn, in green where taken
        x0, y0, x1, y1 = place_of(i).int().tolist()
        around = preview[0, y0 - 12 : y1 + 12, x0 - 12 : x1 + 12]
        for colour in (draw.CHOSEN, draw.FOUND):
            inked = (around == torch.tensor(colour)).all(-1).any()
            assert bool(inked) == ((colour == draw.CHOSEN) == (i == wanted))


def place(face: faces.Face) -> float:
    return float(face.box[0])


@pytest.mark.parametrize(("who", "wanted"), [(portrait, 1), (stranger, 2)])
def test_the_face_most_like_someone_is_found(analyzer: FaceAnalyzer, who: Any, wanted: int) -> None:
    like = run(who(), face_analyzer=analyzer)[0]
    report = run(couple(), pick="most alike", like=like, face_analyzer=analyzer)[2]
    assert f"took {wanted}:" in report


def test_missing_faces_stop_with_the_photo_and_the_sizes(analyzer: FaceAnalyzer) -> None:
    with pytest.raises(ValueError, match=r"got no face in photo 2 \(detector sizes tried: 640, 512, .*with a margin"):
        run(portrait(), empty(), face_analyzer=analyzer)
    with pytest.raises(ValueError, match="2 face.s. in photo 1, so there is no face 3"):
        run(couple(), pick="nth", nth=3, face_analyzer=analyzer)


def test_missing_faces_are_skipped_where_asked(analyzer: FaceAnalyzer) -> None:
    identity, preview, report = run(empty(), portrait(), face_analyzer=analyzer, on_missing="skip")
    assert len(identity) == 1 and preview.shape[0] == 1 and identity.sources == ("photo 2, 512x512",)
    assert "skipped: no face in photo 1" in report
    with pytest.raises(ValueError, match="got no face in any photo: skipped: no face in photo 1"):
        run(empty(), face_analyzer=analyzer, on_missing="skip")


def test_someone_else_among_the_photos_is_told(analyzer: FaceAnalyzer) -> None:
    her = [portrait().roll(i, 0) * (1 - 0.02 * i) for i in range(3)]
    assert "no outliers" in run(*her, face_analyzer=analyzer)[2]
    blue = stranger() * 0.5 + torch.tensor([0.0, 0.0, 0.5])
    assert "probably someone else: photo 3" in run(her[0], her[1], blue, her[2], face_analyzer=analyzer)[2]


@pytest.mark.parametrize(
    ("photo", "options", "message"),
    [
        (portrait(), {}, "got neither a face analyzer nor an image encoder"),
        (portrait() * torch.nan, {"analyzer": True}, "got photo 1 with NaN or infinite pixels"),
        (torch.zeros(4, 900, 3), {"analyzer": True}, "got a photo of 900x4 pixels; expected 16 a side"),
        (portrait(), {"analyzer": True, "pick": "most alike"}, "got no identity; expected one with arcface.buffalo_l"),
    ],
)
def test_bad_input_is_one_error(analyzer: FaceAnalyzer, photo: Tensor, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        given = {key: value for key, value in options.items() if key != "analyzer"}
        run(photo, **given, face_analyzer=analyzer if "analyzer" in options else None)


def test_an_identity_of_another_network_is_no_likeness(analyzer: FaceAnalyzer, vision: Any) -> None:
    like = run(portrait(), image_encoder=vision)[0]
    with pytest.raises(ValueError, match="got identity 'Eileen' with clip.vit-h-14.*expected one with arcface.buffalo"):
        run(couple(), pick="most alike", like=like, face_analyzer=analyzer)


def test_an_image_encoder_that_is_no_clip_is_refused() -> None:
    vision = towers.twin(towers.open_clip())
    vision.model_type = "siglip_vision_model"
    with pytest.raises(ValueError, match="of the kind siglip_vision_model; expected a CLIP image encoder"):
        run(portrait(), image_encoder=vision)


def test_the_schema_is_the_contract() -> None:
    given = EncodeIdentity.INPUT_TYPES()
    assert {"name", "pick", "on_missing"} <= set(given["required"])
    assert given["required"]["pick"][1]["options"] == [
        "largest", "leftmost", "rightmost", "nth", "most alike", "whole photo"
    ]  # fmt: skip
    assert given["optional"]["image_encoder"][0] == "LIKENESS_IMAGE_ENCODER,CLIP_VISION"
    assert set(given["optional"]) >= {"face_analyzer", "image_encoder", "nth", "like"}
    assert EncodeIdentity.RETURN_TYPES == ["LIKENESS_IDENTITY", "IMAGE", "STRING"]
