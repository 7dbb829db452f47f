"""Encode Identity: features of the right crops under the right names, face selection, and errors on bad input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from comfyui_likeness.likeness.encoders import clip_vision
from comfyui_likeness.likeness.faces import alignment, drawing
from comfyui_likeness.likeness.spec import Feature, Identity, parse_encoder_id
from comfyui_likeness.nodes import encode
from comfyui_likeness.nodes.encode import ClipVisionEncoder, EncodeIdentity
from comfyui_likeness.nodes.loaders import image_encoder
from comfyui_likeness.nodes.loaders.face_analyzer import FaceAnalyzer
from support import vision_towers
from support.golden import assert_close, read_golden_cases
from support.photos import (
    get_couple_face_box,
    load_portrait,
    make_couple_photo,
    make_empty_photo,
    make_stranger_photo,
)
from torch import Tensor

VIT_H_FEATURES = {
    "projected.photo", "penultimate.photo", "projected.head", "penultimate.head", "penultimate.face224",
    "penultimate.face256", "last.face224",
}  # fmt: skip


@pytest.fixture
def vision(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A small CLIP_VISION that counts as ViT-H/14."""
    monkeypatch.setitem(clip_vision.VIT_ARCHITECTURES, vision_towers.ARCHITECTURE_KEY, "vit-h-14")
    return vision_towers.convert_to_clip_vision(vision_towers.make_open_clip_tower())


def encode_photos(*photos: Tensor, pick: str = "largest", **options: Any) -> tuple[Identity, Tensor, str]:
    settings: dict[str, Any] = {"name": "Eileen", "on_missing": "stop"} | options
    batches = {f"photo_{i}": photo if photo.ndim == 4 else photo[None] for i, photo in enumerate(photos)}
    with torch.inference_mode():
        return EncodeIdentity.execute(photos=batches, pick=pick, **settings).args


def list_clip_layers(identity: Identity) -> set[str]:
    ids = (parse_encoder_id(key)[0] for key in identity.embeddings)
    return {f"{feature.layer}.{feature.crop}" for feature in ids if feature.network.startswith("clip.")}


def test_a_photo_and_an_analyzer_give_a_vector(analyzer: FaceAnalyzer) -> None:
    identity, preview, report = encode_photos(load_portrait(), face_analyzer=analyzer, name=" Eileen ")
    key = Feature("arcface.buffalo_l", "raw", "face112").format_encoder_id(analyzer.sha256)
    assert list(identity.embeddings) == [key] and identity.hashes == {key: analyzer.sha256}
    (face,) = analyzer.detect(alignment.convert_to_uint8(load_portrait()), 640)
    assert torch.equal(
        identity.embeddings[key], analyzer.embed(alignment.convert_to_uint8(load_portrait()), face)[None]
    )
    assert identity.name == "Eileen" and len(identity) == 1 and float(identity.score[0]) == pytest.approx(face.score)
    assert identity.crop is not None and identity.crop.shape == (1, 512, 512, 3)
    assert identity.sources == ("photo 1, 512x512",) and identity.weight.tolist() == [1.0]
    crop, inside = alignment.crop_head(load_portrait(), face)
    assert torch.equal(identity.crop[0], crop) and torch.equal(identity.kps[0], inside.kps)
    assert torch.equal(identity.box[0], inside.box)
    assert preview.shape == (1, 512, 512, 3)
    for word in ("photo 1: 1 face(s) at detector size 640", "selected face 1", "sharpness", "yaw", key):
        assert word in report


@torch.inference_mode()
def test_every_feature_is_computed_from_its_crop(analyzer: FaceAnalyzer, vision: Any) -> None:
    identity, _, _ = encode_photos(load_portrait(), make_stranger_photo(), face_analyzer=analyzer, image_encoder=vision)
    assert list_clip_layers(identity) == VIT_H_FEATURES
    encoder = ClipVisionEncoder(vision)
    zero = encoder.encode_zero_image()
    for i, photo in enumerate((load_portrait(), make_stranger_photo())):
        (face,) = analyzer.detect(alignment.convert_to_uint8(photo), 640)
        crops = {
            "photo": photo,
            "head": alignment.crop_head(photo, face)[0].float() / 255,
            "face224": alignment.align_face(photo, face.kps, 224),
            "face256": alignment.align_face(photo, face.kps, 256),
        }
        for name in VIT_H_FEATURES:
            layer, crop = name.split(".")
            key = Feature("clip.vit-h-14", layer, crop).format_encoder_id(encoder.sha256)
            stored = identity.embeddings[key]
            assert stored.dtype == torch.float16 and stored.shape[0] == 2 and identity.hashes[key] == encoder.sha256
            assert_close(stored[i], encoder.encode(crops[crop][None])[layer][0], 2e-3)
            assert_close(identity.zero_embeddings[key], zero[layer], 2e-3)
    tokens = identity.embeddings[Feature("clip.vit-h-14", "penultimate", "face224").format_encoder_id(encoder.sha256)]
    assert tokens.shape == (2, 17, vision_towers.TOWER_WIDTH)


def test_crops_are_batched_and_large_photos_are_not() -> None:
    small, large = torch.zeros(224, 224, 3), torch.zeros(2000, 1500, 3)
    assert [len(batch) for batch in encode.batch_by_size([small] * 5)] == [5]
    assert [len(batch) for batch in encode.batch_by_size([large] * 2 + [small] * 2)] == [1, 1, 2]


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("vit-bigg-14", {"projected.photo", "projected.head"}),
        ("vit-l-14-336", {"penultimate.photo", "penultimate.face336"}),
        ("vit-b-32", {"projected.photo", "penultimate.photo"}),
    ],
)
def test_other_encoders_compute_the_layers_of_their_adapters(
    analyzer: FaceAnalyzer, monkeypatch: pytest.MonkeyPatch, name: str, wanted: set[str]
) -> None:
    monkeypatch.setitem(clip_vision.VIT_ARCHITECTURES, vision_towers.ARCHITECTURE_KEY, name)
    encoder = ClipVisionEncoder(vision_towers.convert_to_clip_vision(vision_towers.make_open_clip_tower()))
    assert list_clip_layers(encode_photos(load_portrait(), face_analyzer=analyzer, image_encoder=encoder)[0]) == wanted


@torch.inference_mode()
def test_clip_l_encodes_a_black_image_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """XLabs' adapter uses the embedding of a black image for the negative prompt, once per face."""
    monkeypatch.setitem(clip_vision.VIT_ARCHITECTURES, vision_towers.ARCHITECTURE_KEY, "vit-l-14")
    encoder = ClipVisionEncoder(vision_towers.convert_to_clip_vision(vision_towers.make_open_clip_tower()))
    identity, _, _ = encode_photos(load_portrait(), load_portrait(), pick="whole photo", image_encoder=encoder)
    assert list_clip_layers(identity) == {"projected.photo", "penultimate.photo", "projected.black"}
    rows = identity.embeddings[identity.find_embedding(Feature("clip.vit-l-14", "projected", "black")) or ""]
    black = encoder.encode(torch.zeros(1, 64, 64, 3))["projected"]
    assert torch.equal(rows[0], rows[1]) and torch.allclose(
        rows[:1].float(), black, atol=2e-3 * float(black.abs().max())
    )


@torch.inference_mode()
def test_pulid_features_are_levels_of_the_grey_face(
    analyzer: FaceAnalyzer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = read_golden_cases("ip_adapter", "encoder")["eva_clip_tiny"]
    torch.save(case.build_weights(), folder / "clip_vision" / "EVA.pt")
    monkeypatch.setitem(clip_vision.HEAD_DIMS, 32, 16)
    monkeypatch.setitem(clip_vision.EVA_ARCHITECTURES, (32, 21, 14, 42), "eva02-l-14-336")
    encoder = image_encoder.load_image_encoder("EVA.pt")
    identity, _, _ = encode_photos(
        load_portrait(), make_stranger_photo(), face_analyzer=analyzer, image_encoder=encoder
    )
    assert list_clip_layers(identity) == {"projected.ffhq512", "levels.ffhq512"} and identity.zero_embeddings == {}
    for i, photo in enumerate((load_portrait(), make_stranger_photo())):
        (face,) = analyzer.detect(alignment.convert_to_uint8(photo), 640)
        expected = encoder.encode(alignment.make_gray_face_on_white(photo, face.kps)[None])
        for layer, size in (("projected", (24,)), ("levels", (5, 10, 32))):
            key = Feature("clip.eva02-l-14-336", layer, "ffhq512").format_encoder_id(encoder.sha256)
            assert identity.embeddings[key].shape == (2, *size)
            assert_close(identity.embeddings[key][i], expected[layer][0], 2e-3)


def test_without_an_analyzer_only_the_photo_is_encoded(vision: Any) -> None:
    identity, preview, report = encode_photos(make_empty_photo(), image_encoder=vision)
    assert list_clip_layers(identity) == {"projected.photo", "penultimate.photo"} and identity.score.tolist() == [0.0]
    assert torch.equal(preview[0], make_empty_photo()) and "without face detection" in report


@torch.inference_mode()
def test_a_whole_photo_is_taken_as_the_face(analyzer: FaceAnalyzer, vision: Any) -> None:
    photo = load_portrait()[60:172, 168:280]
    identity, _, _ = encode_photos(photo, pick="whole photo", face_analyzer=analyzer, image_encoder=vision)
    assert list_clip_layers(identity) == VIT_H_FEATURES and any(
        key.startswith("arcface.") for key in identity.embeddings
    )
    encoder = ClipVisionEncoder(vision)
    key = Feature("clip.vit-h-14", "last", "face224").format_encoder_id(encoder.sha256)
    crop = alignment.align_face(photo, alignment.make_whole_photo_face(photo).kps, 224)
    assert_close(identity.embeddings[key][0], encoder.encode(crop[None])["last"][0], 2e-3)
    assert identity.crop is not None and abs(identity.crop[0].float().mean() / 255 - photo.mean()) < 0.01


def test_photos_of_different_sizes_are_all_used(analyzer: FaceAnalyzer) -> None:
    two = torch.stack((load_portrait(), make_stranger_photo()))
    identity, preview, report = encode_photos(two, load_portrait()[:, :480], face_analyzer=analyzer)
    assert len(identity) == 3 and preview.shape == (3, 512, 512, 3)
    assert identity.sources == ("photo 1, 512x512", "photo 2, 512x512", "photo 3, 480x512")
    assert "lowest cosine between the faces" in report


@pytest.mark.parametrize(
    ("pick", "nth", "wanted"), [("leftmost", 1, 0), ("rightmost", 1, 1), ("nth", 1, 0), ("nth", 2, 1)]
)
def test_the_picked_face_is_selected(analyzer: FaceAnalyzer, pick: str, nth: int, wanted: int) -> None:
    identity, preview, report = encode_photos(make_couple_photo(), pick=pick, nth=nth, face_analyzer=analyzer)
    assert f"2 face(s) at detector size 640 (attempt 1), selected face {wanted + 1}" in report
    crop, _ = alignment.crop_head(
        make_couple_photo(),
        sorted(analyzer.detect(alignment.convert_to_uint8(make_couple_photo()), 640), key=get_left_edge)[wanted],
    )
    assert identity.crop is not None and torch.equal(identity.crop[0], crop)
    for i in (0, 1):  # each box is drawn, the selected one in green
        x0, y0, x1, y1 = get_couple_face_box(i).int().tolist()
        around = preview[0, y0 - 12 : y1 + 12, x0 - 12 : x1 + 12]
        for color in (drawing.SELECTED_COLOR, drawing.DETECTED_COLOR):
            drawn = (around == torch.tensor(color)).all(-1).any()
            assert bool(drawn) == ((color == drawing.SELECTED_COLOR) == (i == wanted))


def get_left_edge(face: alignment.Face) -> float:
    return float(face.box[0])


@pytest.mark.parametrize(("make_photo", "wanted"), [(load_portrait, 1), (make_stranger_photo, 2)])
def test_the_most_similar_face_is_found(analyzer: FaceAnalyzer, make_photo: Any, wanted: int) -> None:
    like = encode_photos(make_photo(), face_analyzer=analyzer)[0]
    report = encode_photos(make_couple_photo(), pick="most alike", like=like, face_analyzer=analyzer)[2]
    assert f"selected face {wanted}:" in report


def test_missing_faces_stop_with_the_photo_and_the_sizes(analyzer: FaceAnalyzer) -> None:
    with pytest.raises(ValueError, match=r"got no face in photo 2 \(detector sizes tried: 640, 512, .*with a margin"):
        encode_photos(load_portrait(), make_empty_photo(), face_analyzer=analyzer)
    with pytest.raises(ValueError, match="only 2 face.s. in photo 1, but face 3 was requested"):
        encode_photos(make_couple_photo(), pick="nth", nth=3, face_analyzer=analyzer)


def test_missing_faces_are_skipped_on_request(analyzer: FaceAnalyzer) -> None:
    identity, preview, report = encode_photos(
        make_empty_photo(), load_portrait(), face_analyzer=analyzer, on_missing="skip"
    )
    assert len(identity) == 1 and preview.shape[0] == 1 and identity.sources == ("photo 2, 512x512",)
    assert "skipped: no face in photo 1" in report
    with pytest.raises(ValueError, match="got no face in any photo: skipped: no face in photo 1"):
        encode_photos(make_empty_photo(), face_analyzer=analyzer, on_missing="skip")


def test_outliers_are_reported(analyzer: FaceAnalyzer) -> None:
    portraits = [load_portrait().roll(i, 0) * (1 - 0.02 * i) for i in range(3)]
    assert "no outliers" in encode_photos(*portraits, face_analyzer=analyzer)[2]
    blue = make_stranger_photo() * 0.5 + torch.tensor([0.0, 0.0, 0.5])
    assert (
        "probably someone else: photo 3"
        in encode_photos(portraits[0], portraits[1], blue, portraits[2], face_analyzer=analyzer)[2]
    )


@pytest.mark.parametrize(
    ("photo", "options", "message"),
    [
        (load_portrait(), {}, "got no face analyzer, image encoder or Omni-ID encoder"),
        (load_portrait() * torch.nan, {"analyzer": True}, "got photo 1 with NaN or infinite pixels"),
        (torch.zeros(4, 900, 3), {"analyzer": True}, "got a photo of 900x4 pixels; expected at least 16 per side"),
        (
            load_portrait(),
            {"analyzer": True, "pick": "most alike"},
            "got no identity; expected an identity with arcface.buffalo_l",
        ),
    ],
)
def test_bad_input_is_refused(analyzer: FaceAnalyzer, photo: Tensor, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings = {key: value for key, value in options.items() if key != "analyzer"}
        encode_photos(photo, **settings, face_analyzer=analyzer if "analyzer" in options else None)


def test_an_identity_of_another_network_is_refused(analyzer: FaceAnalyzer, vision: Any) -> None:
    like = encode_photos(load_portrait(), image_encoder=vision)[0]
    with pytest.raises(
        ValueError, match="got identity 'Eileen' with clip.vit-h-14.*expected an identity with arcface.buffalo"
    ):
        encode_photos(make_couple_photo(), pick="most alike", like=like, face_analyzer=analyzer)


def test_clip_vision_of_another_type_is_refused() -> None:
    vision = vision_towers.convert_to_clip_vision(vision_towers.make_open_clip_tower())
    vision.model_type = "siglip_vision_model"
    with pytest.raises(ValueError, match="of type siglip_vision_model; expected a CLIP image encoder"):
        encode_photos(load_portrait(), image_encoder=vision)


def test_schema_inputs_and_outputs() -> None:
    inputs = EncodeIdentity.INPUT_TYPES()
    assert {"name", "pick", "on_missing"} <= set(inputs["required"])
    assert inputs["required"]["pick"][1]["options"] == [
        "largest", "leftmost", "rightmost", "nth", "most alike", "whole photo"
    ]  # fmt: skip
    assert inputs["optional"]["image_encoder"][0] == "LIKENESS_IMAGE_ENCODER,CLIP_VISION"
    assert set(inputs["optional"]) >= {"face_analyzer", "image_encoder", "nth", "like"}
    assert EncodeIdentity.RETURN_TYPES == ["LIKENESS_IDENTITY", "IMAGE", "STRING"]
