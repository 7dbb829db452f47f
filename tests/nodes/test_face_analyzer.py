"""Load Face Analyzer on real ONNX files with insightface: packs, providers, vectors, and damaged files."""

from __future__ import annotations

import hashlib
import re
import socket
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from comfyui_likeness.likeness.faces import alignment, detection, recognizers
from comfyui_likeness.likeness.methods.ip_adapter import project_identity
from comfyui_likeness.nodes.encode import EncodeIdentity
from comfyui_likeness.nodes.identity import LoadIdentity, MergeIdentities, MixIdentities, SaveIdentity
from comfyui_likeness.nodes.loaders import face_analyzer
from comfyui_likeness.nodes.loaders.face_analyzer import LoadFaceAnalyzer
from comfyui_likeness.nodes.measure import MeasureLikeness
from comfyui_likeness.tools.standins import face_networks
from support.ip_adapters import make_ip_adapter
from support.photos import COLLINS_FACE, get_couple_face_box, load_portrait, make_couple_photo, make_empty_photo

DETECTOR, RECOGNIZER = "det_10g.onnx", "w600k_r50.onnx"


def list_pack_options() -> list[str]:
    return LoadFaceAnalyzer.INPUT_TYPES()["required"]["model_pack"][1]["options"]


def test_report_names_networks_and_provider(models: Path) -> None:
    out = LoadFaceAnalyzer.execute("buffalo_l", "auto").args
    assert isinstance(out[0], face_analyzer.FaceAnalyzer)
    for word in ("buffalo_l", DETECTOR, RECOGNIZER, "arcface.buffalo_l", "on CPUExecutionProvider"):
        assert word in out[1]
    assert out[0].sha256 == hashlib.sha256((models / "buffalo_l" / RECOGNIZER).read_bytes()).hexdigest()
    assert str(out[0].feature) == "arcface.buffalo_l.raw.face112"


def test_faces_are_found_at_their_positions(analyzer: face_analyzer.FaceAnalyzer) -> None:
    (face,) = analyzer.detect(alignment.convert_to_uint8(load_portrait()), 640)
    assert torch.allclose(face.box, COLLINS_FACE.box, atol=8) and torch.allclose(face.kps, COLLINS_FACE.kps, atol=8)
    assert 0.5 < face.score <= 1 and face.box.dtype == face.kps.dtype == torch.float32
    couple = sorted(
        analyzer.detect(alignment.convert_to_uint8(make_couple_photo()), 640), key=lambda face: float(face.box[0])
    )
    assert len(couple) == 2
    for i, face in enumerate(couple):
        assert torch.allclose(face.box, get_couple_face_box(i), atol=10)
    assert analyzer.detect(alignment.convert_to_uint8(make_empty_photo()), 640) == []


def test_the_detector_runs_at_every_size(analyzer: face_analyzer.FaceAnalyzer) -> None:
    inputs: list[tuple[int, ...]] = []
    model: Any = analyzer.detector.model
    forward = model.forward

    def spy(image: Any, *rest: Any) -> Any:
        inputs.append(image.shape[:2])
        return forward(image, *rest)

    model.forward = spy
    plain = torch.full((64, 64, 3), 127, dtype=torch.uint8)
    for size in detection.DETECTION_SIZES:
        analyzer.detect(plain, size)
    assert inputs == [(size, size) for size in detection.DETECTION_SIZES]


@pytest.mark.parametrize(("scale", "margin", "size"), [(1, 0, 640), (2, 0, 640), (1, -51, 512), (0.5, 77, 1024)])
def test_the_search_finds_faces_of_other_sizes(
    analyzer: face_analyzer.FaceAnalyzer, scale: float, margin: int, size: int
) -> None:
    photo = torch.nn.functional.interpolate(load_portrait().movedim(-1, 0)[None], scale_factor=scale, mode="area")
    photo = torch.nn.functional.pad(photo, (margin,) * 4, value=0.5)[0].movedim(0, -1)
    search = detection.find_faces(photo, analyzer.detect)
    assert search.attempts[-1] == str(size)
    (found,) = search.faces
    assert torch.allclose(found.box, COLLINS_FACE.box * scale + margin, atol=12 * max(1, scale))


def test_vectors_equal_those_of_insightface(analyzer: face_analyzer.FaceAnalyzer, models: Path) -> None:
    from insightface.app import FaceAnalysis

    app = FaceAnalysis(str(models / "buffalo_l"), providers=["CPUExecutionProvider"])
    app.prepare(ctx_id=-1, det_size=(640, 640))
    (expected,) = app.get(np.ascontiguousarray(face_networks.load_portrait()[..., ::-1]))
    photo = alignment.convert_to_uint8(load_portrait())
    (face,) = analyzer.detect(photo, 640)
    vector = analyzer.embed(photo, face)
    assert vector.shape == (512,) and vector.dtype == torch.float32
    assert torch.allclose(vector, torch.from_numpy(expected.embedding), atol=1e-4)
    assert vector.norm() == pytest.approx(face_networks.EMBEDDING_NORM, rel=0.01)  # raw, not normalised
    swapped = analyzer.embed(photo.flip(-1), face)
    assert torch.cosine_similarity(vector, swapped, dim=0) < 0.99


def test_a_published_recognizer_is_known_by_its_hash(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """AuraFace's recognizer is named as antelopev2's, and users rename packs."""
    own = (models / "antelopev2" / "glintr100.onnx").read_bytes()
    hashes = recognizers.PUBLISHED_RECOGNIZERS
    assert all(len(key) == 64 and int(key, 16) for key in hashes) and len(set(hashes.values())) == len(hashes)
    monkeypatch.setitem(hashes, hashlib.sha256(own).hexdigest(), "antelopev2")
    assert face_analyzer.load_face_analyzer("antelopev2", "cpu")[0].network == "arcface.antelopev2"
    (models / "antelopev2").rename(models / "My Pack")
    analyzer, report = face_analyzer.load_face_analyzer("My Pack", "cpu")
    assert analyzer.network == "arcface.antelopev2" and "named after its folder" not in report

    face_networks.write_recognizer(models / "My Pack" / "glintr100.onnx", seed=9)
    auraface = (models / "My Pack" / "glintr100.onnx").read_bytes()
    monkeypatch.setitem(hashes, hashlib.sha256(auraface).hexdigest(), "auraface")
    (models / "My Pack").rename(models / "antelopev2")
    assert face_analyzer.load_face_analyzer("antelopev2", "cpu")[0].network == "arcface.auraface"


def test_another_recognizer_is_named_after_its_folder(models: Path) -> None:
    (models / "antelopev2").rename(models / "other")
    analyzer, report = face_analyzer.load_face_analyzer("other", "cpu")
    assert analyzer.network == "arcface.other"
    assert "glintr100.onnx is none of the published files that this pack knows: named after its folder" in report
    (models / "other").rename(models / "antelopev2")
    assert face_analyzer.load_face_analyzer("antelopev2", "cpu")[0].network == "arcface.antelopev2"
    # Arc2Face's authors put their recognizer into antelopev2 in place of its own.
    (models / "antelopev2" / "glintr100.onnx").rename(models / "antelopev2" / "arcface.onnx")
    assert face_analyzer.load_face_analyzer("antelopev2", "cpu")[0].network == "arcface.arc2face"


@pytest.mark.parametrize("name", ["My Pack (v2) {fp16}, a.b", "顔認識モデル", "модель", "Visa\u0304ge's"])
def test_any_folder_name_survives_save_merge_and_apply(models: Path, name: str) -> None:
    (models / "buffalo_l").rename(models / name)
    analyzer = face_analyzer.load_face_analyzer(name, "cpu")[0]
    identity = EncodeIdentity.execute(
        photos={"photo_0": load_portrait()[None]}, name="anna", pick="largest", on_missing="stop",
        face_analyzer=analyzer,
    ).args[0]  # fmt: skip
    SaveIdentity.execute(identity, "", True)
    loaded = LoadIdentity.execute("anna.safetensors").args[0]
    merged, report = MergeIdentities.execute({"a": identity, "b": loaded}, "mean").args
    mixed = MixIdentities.execute({"a": merged, "b": loaded}, "").args[0]
    assert "Dropped" not in report
    similarity = MeasureLikeness.execute(load_portrait()[None], mixed, analyzer).args[0]
    assert similarity == pytest.approx(1, abs=1e-4)
    adapter = make_ip_adapter("faceid")
    reader = replace(adapter, spec=replace(adapter.spec, needs=(analyzer.feature,)))
    tokens = [
        project_identity(reader.patcher.model, reader.spec, one, torch.device("cpu")).cond for one in (identity, mixed)
    ]
    assert torch.allclose(*tokens, atol=1e-3)
    with pytest.raises(ValueError, match=f"holds {re.escape(str(analyzer.feature))}; this adapter needs arcface.buff"):
        project_identity(adapter.patcher.model, adapter.spec, mixed, torch.device("cpu"))


def test_a_folder_that_insightface_cannot_list_is_refused(models: Path) -> None:
    (models / "buffalo_l").rename(models / "pack [v2]")
    with pytest.raises(ValueError, match=r"rename the folder .*pack \[v2\]: insightface finds no files"):
        face_analyzer.load_face_analyzer("pack [v2]", "cpu")


def test_a_pack_unzipped_into_itself_is_found(models: Path) -> None:
    inner = models / "antelopev2"
    inner.rename(models / "moved")
    inner.mkdir()
    (models / "moved").rename(inner / "antelopev2")
    assert list_pack_options() == ["antelopev2", "buffalo_l"]
    assert face_analyzer.load_face_analyzer("antelopev2", "cpu")[0].network == "arcface.antelopev2"


def test_without_packs_the_error_names_the_folder(folder: Path) -> None:
    assert list_pack_options() == [face_analyzer.NO_MODEL_PACK]
    with pytest.raises(ValueError, match="buffalo_l, antelopev2") as error:
        LoadFaceAnalyzer.execute(face_analyzer.NO_MODEL_PACK, "auto")
    assert str(folder / "insightface" / "models") in str(error.value)


def test_without_insightface_the_error_says_what_to_install(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "insightface.app", None)
    assert "buffalo_l" in list_pack_options()
    with pytest.raises(ValueError, match="pip install -r requirements.txt"):
        LoadFaceAnalyzer.execute("buffalo_l", "auto")


def test_no_network_access(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError(f"connects to {args}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert face_analyzer.load_face_analyzer("buffalo_l", "cpu")[0].sha256
    monkeypatch.setitem(sys.modules, "facenet_pytorch", None)
    (models / "buffalo_l" / DETECTOR).unlink()
    with pytest.raises(ValueError, match="no detector"):
        face_analyzer.load_face_analyzer("buffalo_l", "cpu")


def test_unavailable_providers_are_refused() -> None:
    with pytest.raises(ValueError, match="this onnxruntime has CPUExecutionProvider; install onnxruntime-directml"):
        face_analyzer._select_providers("directml", ["CPUExecutionProvider"])
    assert face_analyzer._select_providers("rocm", ["ROCMExecutionProvider"]) == ["ROCMExecutionProvider"]
    available = ["CPUExecutionProvider", "OpenVINOExecutionProvider", "CUDAExecutionProvider"]
    assert face_analyzer._select_providers("auto", available) == [available[2], available[1], available[0]]


def test_silent_fallback_of_onnxruntime_is_an_error(analyzer: face_analyzer.FaceAnalyzer) -> None:
    requested = ["CUDAExecutionProvider"]
    with pytest.raises(ValueError, match="fell back to CPUExecutionProvider; expected CUDAExecutionProvider"):
        face_analyzer._get_running_providers("cuda", requested, analyzer.detector, analyzer.recognizer)
    assert (
        face_analyzer._get_running_providers("auto", requested, analyzer.detector, analyzer.recognizer)
        == "CPUExecutionProvider"
    )


def test_available_providers_run_and_others_are_refused(models: Path) -> None:
    import onnxruntime

    available = onnxruntime.get_available_providers()
    for choice, (names, _) in face_analyzer.EXECUTION_PROVIDERS.items():
        if not set(names) & set(available):
            with pytest.raises(ValueError, match=f"got provider {choice}"):
                face_analyzer.load_face_analyzer("buffalo_l", choice)
    assert "on CPUExecutionProvider." in face_analyzer.load_face_analyzer("buffalo_l", "cpu")[1]


def test_auto_falls_back_to_the_cpu(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    # Claim a provider that this machine does not have: onnxruntime refuses or drops it.
    claimed = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("there is a CUDA provider here")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: claimed)
    report = face_analyzer.load_face_analyzer("buffalo_l", "auto")[1]
    assert "on CPUExecutionProvider." in report and "CUDAExecutionProvider is available but did not start" in report
    with pytest.raises(ValueError, match="got "):
        face_analyzer.load_face_analyzer("buffalo_l", "cuda")


def test_two_builds_of_onnxruntime_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, models: Path) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for name in ("onnxruntime", "onnxruntime-gpu", "onnx"):
        info = tmp_path / f"{name.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        lines = face_analyzer._warn_about_duplicate_onnxruntime()
        assert bool(lines) == (name != "onnxruntime")
    assert "pip uninstall -y onnxruntime onnxruntime-gpu, then pip install onnxruntime-gpu" in lines[0]


def cut_file(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES: dict[str, Any] = {
    "detector cut short": lambda pack: cut_file(pack / DETECTOR),
    "recognizer cut short": lambda pack: cut_file(pack / RECOGNIZER),
    "empty": lambda pack: (pack / RECOGNIZER).write_bytes(b""),
    "a web page": lambda pack: (pack / RECOGNIZER).write_text("<html>Sign in</html>"),
    "a pointer": lambda pack: (pack / DETECTOR).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0"),
    "noise": lambda pack: (pack / DETECTOR).write_bytes(bytes(range(256)) * 40),
    "no detector": lambda pack: (pack / DETECTOR).unlink(),
    "no recognizer": lambda pack: (pack / RECOGNIZER).unlink(),
}


@pytest.mark.parametrize("how", DAMAGES)
def test_damaged_packs_are_refused(models: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "facenet_pytorch", None)
    DAMAGES[how](models / "buffalo_l")
    with pytest.raises(ValueError, match="got the model pack buffalo_l") as error:
        LoadFaceAnalyzer.execute("buffalo_l", "auto")
    assert "unpack the pack again" in str(error.value) and "\n" not in str(error.value)
    assert ("no detector" in str(error.value)) == (how == "no detector")


def test_changed_packs_are_loaded_again(models: Path) -> None:
    before = LoadFaceAnalyzer.fingerprint_inputs("buffalo_l", "auto")
    assert before == LoadFaceAnalyzer.fingerprint_inputs("buffalo_l", "auto")
    cut_file(models / "buffalo_l" / RECOGNIZER)
    assert before != LoadFaceAnalyzer.fingerprint_inputs("buffalo_l", "auto")
