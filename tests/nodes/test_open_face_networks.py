"""Load Face Analyzer on folders that are no insightface pack: YuNet or MTCNN, and any ArcFace network beside it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from comfyui_likeness.likeness.faces import alignment, detection
from comfyui_likeness.nodes.loaders import face_analyzer, open_face_networks
from comfyui_likeness.nodes.loaders.face_analyzer import FaceAnalyzer, LoadFaceAnalyzer
from comfyui_likeness.tools.standins.face_networks import OnnxGraphBuilder
from support import open_face_networks as standins
from support.photos import COLLINS_FACE, load_portrait

YUNET, RECOGNIZER = "face_detection_yunet_2023mar.onnx", "fr_feature.onnx"


@pytest.fixture
def pack(models: Path) -> Path:
    """A folder with YuNet and an ArcFace network that no pack of insightface has."""
    folder = models / "free_faces"
    folder.mkdir()
    standins.write_yunet(folder / YUNET)
    (models / "buffalo_l" / "w600k_r50.onnx").rename(folder / RECOGNIZER)
    return folder


@pytest.fixture
def free_analyzer(pack: Path) -> FaceAnalyzer:
    return face_analyzer.load_face_analyzer(pack.name, "cpu")[0]


def test_the_folder_is_listed_and_its_networks_reported(pack: Path) -> None:
    assert pack.name in LoadFaceAnalyzer.INPUT_TYPES()["required"]["model_pack"][1]["options"]
    loaded, report = LoadFaceAnalyzer.execute(pack.name, "auto").args
    assert report.startswith(
        f"free_faces: detector {YUNET} (OpenCV's YuNet), recognizer {RECOGNIZER} (arcface.free_faces), on CPUExecution"
    )
    assert str(loaded.feature) == "arcface.free_faces.raw.face112"


def test_insightface_is_not_needed(pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "insightface", None)
    loaded = face_analyzer.load_face_analyzer(pack.name, "auto")[0]
    photo = standins.make_photo_with_square(5, 7)
    (face,) = loaded.detect(photo, 640)
    assert loaded.embed(photo, face).shape == (512,)


@pytest.mark.parametrize(("column", "row"), [(5, 7), (14, 2)])
def test_yunet_finds_faces_at_their_positions(free_analyzer: FaceAnalyzer, column: int, row: int) -> None:
    (face,) = free_analyzer.detect(standins.make_photo_with_square(column, row), 640)
    side = standins.CELL * 960 / 640
    corner = torch.tensor([column, row]) * side
    assert torch.allclose(face.kps, corner + torch.tensor(standins.KEY_POINTS) * side, atol=0.6)
    assert torch.allclose(face.box, torch.cat((corner - side / 2, corner + side * 1.5)), atol=0.6)
    assert 0.9 < face.score <= 1.01


def test_a_photo_without_a_face_has_none(free_analyzer: FaceAnalyzer) -> None:
    search = detection.find_faces(torch.zeros(300, 40, 3), free_analyzer.detect)
    assert search.faces == () and len(search.attempts) == 2 * len(detection.DETECTION_SIZES)


def test_vectors_are_those_of_insightface(free_analyzer: FaceAnalyzer, pack: Path) -> None:
    from insightface.model_zoo import get_model
    from insightface.utils import face_align

    model = get_model(str(pack / RECOGNIZER), providers=["CPUExecutionProvider"])
    photo = alignment.convert_to_uint8(load_portrait())
    crop = face_align.norm_crop(photo.flip(-1).contiguous().numpy(), COLLINS_FACE.kps.numpy(), 112)
    expected = torch.from_numpy(model.get_feat(crop).flatten())
    vector = free_analyzer.embed(photo, COLLINS_FACE)
    assert vector.dtype == torch.float32 and torch.allclose(vector.norm(), expected.norm(), rtol=1e-3)
    assert torch.cosine_similarity(vector, expected, dim=0) > 0.9999
    assert torch.cosine_similarity(free_analyzer.embed(photo.flip(-1), COLLINS_FACE), expected, dim=0) < 0.99


@pytest.mark.parametrize("first", ["scales pixels", "half precision"])
def test_recognizers_get_the_input_that_they_expect(free_analyzer: FaceAnalyzer, pack: Path, first: str) -> None:
    photo = alignment.convert_to_uint8(load_portrait())
    expected = free_analyzer.embed(photo, COLLINS_FACE)
    standins.write_variant(pack / RECOGNIZER, pack / "other.onnx", first)
    (pack / RECOGNIZER).unlink()
    other = face_analyzer.load_face_analyzer(pack.name, "cpu")[0]
    assert torch.cosine_similarity(other.embed(photo, COLLINS_FACE), expected, dim=0) > 0.9999


def test_yunet_beside_another_detector_is_used(pack: Path, models: Path) -> None:
    (models / "buffalo_l" / "det_10g.onnx").rename(pack / "det_10g.onnx")
    assert f"detector {YUNET}" in face_analyzer.load_face_analyzer(pack.name, "cpu")[1]


def test_networks_of_other_kinds_beside_are_ignored(pack: Path) -> None:
    from onnx import TensorProto, helper

    graph = OnnxGraphBuilder()
    outputs = [graph("Relu", "input", output_name=f"stage_{i}") for i in range(6)]
    shape = [1, 3, 64, 64]
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("input", *outputs)]
    graph.save(pack / "age.onnx", infos[:1], infos[1:])
    assert f"recognizer {RECOGNIZER} (" in face_analyzer.load_face_analyzer(pack.name, "cpu")[1]
    (pack / YUNET).unlink()
    assert not open_face_networks.is_insightface_pack(pack)


def test_without_any_detector_the_error_names_both(pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (pack / YUNET).unlink()
    monkeypatch.setitem(sys.modules, "facenet_pytorch", None)
    with pytest.raises(ValueError, match="no detector among them") as error:
        LoadFaceAnalyzer.execute(pack.name, "auto")
    assert YUNET in str(error.value) and "pip install --no-deps facenet-pytorch" in str(error.value)


def test_without_a_recognizer_the_error_says_so(pack: Path) -> None:
    (pack / RECOGNIZER).unlink()
    with pytest.raises(ValueError, match="no recognizer among them"):
        LoadFaceAnalyzer.execute(pack.name, "auto")
