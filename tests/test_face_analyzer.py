"""Load Face Analyzer on real ONNX files through insightface: packs, providers, vectors, and spoilt files."""

from __future__ import annotations

import hashlib
import socket
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from comfyui_likeness.likeness import faces
from comfyui_likeness.nodes.loaders import face_analyzer
from comfyui_likeness.nodes.loaders.face_analyzer import LoadFaceAnalyzer
from comfyui_likeness.tools import standin_faces
from portraits import COLLINS, couple, empty, place_of, portrait

pytest_plugins = ["analyzers"]

DETECTOR, RECOGNISER = "det_10g.onnx", "w600k_r50.onnx"


def combo() -> list[str]:
    return LoadFaceAnalyzer.INPUT_TYPES()["required"]["model_pack"][1]["options"]


def test_the_node_gives_an_analyzer_and_says_what_runs_where(models: Path) -> None:
    out = LoadFaceAnalyzer.execute("buffalo_l", "auto").args
    assert isinstance(out[0], face_analyzer.FaceAnalyzer)
    for word in ("buffalo_l", DETECTOR, RECOGNISER, "arcface.buffalo_l", "on CPUExecutionProvider"):
        assert word in out[1]
    assert out[0].sha256 == hashlib.sha256((models / "buffalo_l" / RECOGNISER).read_bytes()).hexdigest()
    assert str(out[0].feature) == "arcface.buffalo_l.raw.face112"


def test_faces_are_found_where_they_are(analyzer: face_analyzer.FaceAnalyzer) -> None:
    (found,) = analyzer.detect(faces.pixels(portrait()), 640)
    assert torch.allclose(found.box, COLLINS.box, atol=8) and torch.allclose(found.kps, COLLINS.kps, atol=8)
    assert 0.5 < found.score <= 1 and found.box.dtype == found.kps.dtype == torch.float32
    both = sorted(analyzer.detect(faces.pixels(couple()), 640), key=lambda face: float(face.box[0]))
    assert len(both) == 2
    for i, face in enumerate(both):
        assert torch.allclose(face.box, place_of(i), atol=10)
    assert analyzer.detect(faces.pixels(empty()), 640) == []


def test_the_detector_sees_every_size_that_is_tried(analyzer: face_analyzer.FaceAnalyzer) -> None:
    inputs: list[tuple[int, ...]] = []
    forward = analyzer.detector.forward

    def spy(image: Any, *rest: Any) -> Any:
        inputs.append(image.shape[:2])
        return forward(image, *rest)

    analyzer.detector.forward = spy
    plain = torch.full((64, 64, 3), 127, dtype=torch.uint8)
    for size in faces.DETECTION_SIZES:
        analyzer.detect(plain, size)
    assert inputs == [(size, size) for size in faces.DETECTION_SIZES]


@pytest.mark.parametrize(("scale", "margin", "size"), [(1, 0, 640), (2, 0, 640), (1, -51, 512), (0.5, 77, 1024)])
def test_the_search_finds_faces_of_other_sizes(
    analyzer: face_analyzer.FaceAnalyzer, scale: float, margin: int, size: int
) -> None:
    photo = torch.nn.functional.interpolate(portrait().movedim(-1, 0)[None], scale_factor=scale, mode="area")
    photo = torch.nn.functional.pad(photo, (margin,) * 4, value=0.5)[0].movedim(0, -1)
    search = faces.find_faces(photo, analyzer.detect)
    assert search.tried[-1] == str(size)
    (found,) = search.faces
    assert torch.allclose(found.box, COLLINS.box * scale + margin, atol=12 * max(1, scale))


def test_vectors_are_insightfaces_own(analyzer: face_analyzer.FaceAnalyzer, models: Path) -> None:
    from insightface.app import FaceAnalysis

    app = FaceAnalysis(str(models / "buffalo_l"), providers=["CPUExecutionProvider"])
    app.prepare(ctx_id=-1, det_size=(640, 640))
    (expected,) = app.get(np.ascontiguousarray(standin_faces.portrait()[..., ::-1]))
    photo = faces.pixels(portrait())
    (found,) = analyzer.detect(photo, 640)
    vector = analyzer.embed(photo, found)
    assert vector.shape == (512,) and vector.dtype == torch.float32
    assert torch.allclose(vector, torch.from_numpy(expected.embedding), atol=1e-4)
    assert vector.norm() == pytest.approx(standin_faces.LENGTH, rel=0.01)  # raw, not normalised
    swapped = analyzer.embed(photo.flip(-1), found)
    assert torch.cosine_similarity(vector, swapped, dim=0) < 0.99


def test_the_network_is_named_by_its_file(models: Path) -> None:
    (models / "antelopev2").rename(models / "My Pack")
    (models / "buffalo_l" / RECOGNISER).rename(models / "buffalo_l" / "other.onnx")
    assert face_analyzer.load("My Pack", "cpu")[0].network == "arcface.antelopev2"
    assert face_analyzer.load("buffalo_l", "cpu")[0].network == "arcface.buffalo_l"


def test_a_pack_unzipped_into_itself_is_found(models: Path) -> None:
    inner = models / "antelopev2"
    inner.rename(models / "moved")
    inner.mkdir()
    (models / "moved").rename(inner / "antelopev2")
    assert combo() == ["antelopev2", "buffalo_l"]
    assert face_analyzer.load("antelopev2", "cpu")[0].network == "arcface.antelopev2"


def test_without_packs_the_node_is_there_and_says_where_they_go(folder: Path) -> None:
    assert combo() == [face_analyzer.NONE_FOUND]
    with pytest.raises(ValueError, match="buffalo_l, antelopev2") as error:
        LoadFaceAnalyzer.execute(face_analyzer.NONE_FOUND, "auto")
    assert str(folder / "insightface" / "models") in str(error.value)


def test_without_insightface_the_node_is_there_and_says_what_to_install(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "insightface.app", None)
    assert "buffalo_l" in combo()
    with pytest.raises(ValueError, match="pip install -r requirements.txt"):
        LoadFaceAnalyzer.execute("buffalo_l", "auto")


def test_nothing_goes_over_the_network(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError(f"connects to {args}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert face_analyzer.load("buffalo_l", "cpu")[0].sha256
    (models / "buffalo_l" / DETECTOR).unlink()
    with pytest.raises(ValueError, match="no detector"):
        face_analyzer.load("buffalo_l", "cpu")


def test_a_provider_that_is_not_there_is_an_error_with_the_way_out() -> None:
    with pytest.raises(ValueError, match="onnxruntime here has CPUExecutionProvider; install onnxruntime-directml"):
        face_analyzer._wanted("directml", ["CPUExecutionProvider"])
    assert face_analyzer._wanted("rocm", ["ROCMExecutionProvider"]) == ["ROCMExecutionProvider"]
    have = ["CPUExecutionProvider", "OpenVINOExecutionProvider", "CUDAExecutionProvider"]
    assert face_analyzer._wanted("auto", have) == [have[2], have[1], have[0]]


def test_a_provider_that_onnxruntime_dropped_is_an_error(analyzer: face_analyzer.FaceAnalyzer) -> None:
    wanted = ["CUDAExecutionProvider"]
    with pytest.raises(ValueError, match="fell back to CPUExecutionProvider; expected CUDAExecutionProvider"):
        face_analyzer._used("cuda", wanted, analyzer.detector, analyzer.recogniser)
    assert face_analyzer._used("auto", wanted, analyzer.detector, analyzer.recogniser) == "CPUExecutionProvider"


def test_providers_of_this_machine_run_or_are_refused(models: Path) -> None:
    import onnxruntime

    there = onnxruntime.get_available_providers()
    for choice, (names, _) in face_analyzer.PROVIDERS.items():
        if not set(names) & set(there):
            with pytest.raises(ValueError, match=f"got provider {choice}"):
                face_analyzer.load("buffalo_l", choice)
    assert "on CPUExecutionProvider." in face_analyzer.load("buffalo_l", "cpu")[1]


def test_auto_runs_on_the_cpu_where_the_better_one_breaks(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    # The list claims what this machine has not: onnxruntime itself then refuses or drops it.
    claimed = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("there is a CUDA provider here")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: claimed)
    report = face_analyzer.load("buffalo_l", "auto")[1]
    assert "on CPUExecutionProvider." in report and "CUDAExecutionProvider, but it did not start" in report
    with pytest.raises(ValueError, match="got "):
        face_analyzer.load("buffalo_l", "cuda")


def test_two_builds_of_onnxruntime_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, models: Path) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for name in ("onnxruntime", "onnxruntime-gpu", "onnx"):
        info = tmp_path / f"{name.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        lines = face_analyzer._both_packages()
        assert bool(lines) == (name != "onnxruntime")
    assert "pip uninstall -y onnxruntime onnxruntime-gpu, then pip install onnxruntime-gpu" in lines[0]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


SPOIL: dict[str, Any] = {
    "detector cut short": lambda pack: cut(pack / DETECTOR),
    "recogniser cut short": lambda pack: cut(pack / RECOGNISER),
    "empty": lambda pack: (pack / RECOGNISER).write_bytes(b""),
    "a web page": lambda pack: (pack / RECOGNISER).write_text("<html>Sign in</html>"),
    "a pointer": lambda pack: (pack / DETECTOR).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0"),
    "noise": lambda pack: (pack / DETECTOR).write_bytes(bytes(range(256)) * 40),
    "no detector": lambda pack: (pack / DETECTOR).unlink(),
    "no recogniser": lambda pack: (pack / RECOGNISER).unlink(),
}


@pytest.mark.parametrize("how", SPOIL)
def test_a_spoilt_pack_is_one_error(models: Path, how: str) -> None:
    SPOIL[how](models / "buffalo_l")
    with pytest.raises(ValueError, match="got the model pack buffalo_l") as error:
        LoadFaceAnalyzer.execute("buffalo_l", "auto")
    assert "unpack the pack again" in str(error.value) and "\n" not in str(error.value)
    assert ("no detector" in str(error.value)) == (how == "no detector")


def test_the_host_reloads_a_pack_that_has_changed(models: Path) -> None:
    before = LoadFaceAnalyzer.fingerprint_inputs("buffalo_l", "auto")
    assert before == LoadFaceAnalyzer.fingerprint_inputs("buffalo_l", "auto")
    cut(models / "buffalo_l" / RECOGNISER)
    assert before != LoadFaceAnalyzer.fingerprint_inputs("buffalo_l", "auto")
