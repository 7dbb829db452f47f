"""Shards from folders of photos: which photos are kept, the report on the others, and resuming."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from comfyui_likeness.likeness.faces import alignment, quality
from comfyui_likeness.likeness.spec import Face
from comfyui_likeness.tools.standins import build
from comfyui_likeness.training.build_dataset import build as build_dataset_build
from comfyui_likeness.training.build_dataset import person_worker, photo_folders
from comfyui_likeness.training.data.shards import ShardAlbum
from PIL import Image
from support.photo_folders import ROOT, DrawnFaceAnalyzer
from support.photos import load_portrait, make_stranger_photo

# The small recognizer separates people less than ArcFace: strangers reach a cosine of 0.6.
CONFIG = person_worker.DatasetBuildConfig("demo", min_face_size=16, min_similarity=0.7)
EVE, BOB, OTHER = 0, 1, 9
# The people in each photo, by folder.
PHOTOS = {
    "eve": [[EVE]] * 6 + [[EVE, OTHER], [4], [5]],
    "films/bob": [[BOB]] * 4 + [[EVE], [6]],
}  # fmt: skip


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DrawnFaceAnalyzer, dict[str, list[int]]]:
    """The folder of photos, the analyzer that knows them, and the people in each file."""
    root, analyzer, people_by_photo, number = (
        tmp_path_factory.mktemp("photos"),
        DrawnFaceAnalyzer(),
        dict[str, list[int]](),
        700,
    )
    for folder, photos in PHOTOS.items():
        for people in photos:
            number += 1
            analyzer.draw_photo(root / folder / f"{number}.png", people, number)
            people_by_photo[f"{number}.png"] = people
    return root, analyzer, people_by_photo


def build_shards(
    root: Path, analyzer: DrawnFaceAnalyzer, out: Path, config: person_worker.DatasetBuildConfig = CONFIG
) -> dict[str, dict[str, Any]]:
    out.mkdir(exist_ok=True)
    return {
        one.name: person_worker.build_candidate_shard(one, config, analyzer, out)
        for one in photo_folders.find_candidates(root)
    }


def measure_kept(
    kept: list[str], person: int, people_by_photo: dict[str, list[int]], num_photos: int
) -> tuple[float, float]:
    """Precision and recall of kept photos."""
    correct = sum(person in people_by_photo[name] for name in kept)
    return correct / len(kept), correct / num_photos


def test_strangers_in_a_folder_are_dropped(drawn, tmp_path):
    root, analyzer, people_by_photo = drawn
    results = build_shards(root, analyzer, tmp_path)
    assert list(results) == ["eve", "films/bob"]
    assert measure_kept(results["eve"]["kept"]["eve"], EVE, people_by_photo, 7) == (1, 1)
    assert measure_kept(results["films/bob"]["kept"]["films/bob"], BOB, people_by_photo, 4) == (1, 1)
    assert results["eve"]["dropped"] == {"708.png": "another person", "709.png": "another person"}
    assert results["eve"]["photos"] == 9 and results["eve"]["faces"] == 10


def test_a_flat_folder_gives_everyone_in_it(drawn, tmp_path):
    root, analyzer, people_by_photo = drawn
    flat = tmp_path / "flat"
    flat.mkdir()
    for file in root.rglob("*.png"):
        (flat / file.name).write_bytes(file.read_bytes())
    (result,) = build_shards(flat, analyzer, tmp_path / "out").values()
    assert sorted(result["kept"]) == ["flat-00000", "flat-00001"]
    sizes = {"flat-00000": (EVE, 8), "flat-00001": (BOB, 4)}
    assert all(
        measure_kept(result["kept"][name], person, people_by_photo, count) == (1, 1)
        for name, (person, count) in sizes.items()
    )
    assert set(result["dropped"].values()) == {"person in fewer than 2 photos"}
    album = ShardAlbum([tmp_path / "out" / f"{result['key']}.tar"])
    assert [(album.get_name(n), album.count_images(n)) for n in range(2)] == [("flat-00000", 8), ("flat-00001", 4)]


def test_training_reads_the_shards(drawn, tmp_path):
    root, analyzer, _ = drawn
    result = build_shards(root, analyzer, tmp_path)["eve"]
    album = ShardAlbum(tmp_path.glob("*.tar"), resolution=None)
    assert [album.get_name(n) for n in range(len(album))] == ["eve", "films/bob"]
    for number, name in enumerate(result["kept"]["eve"]):
        view = album.load_annotated_image(0, number)
        photo = person_worker.read_photo(root / "eve" / name, 1024)
        found = analyzer.faces_by_photo[photo.numpy().tobytes()]
        assert (view.image.int() - photo.int()).abs().float().mean() < 4 and view.caption == ""
        face = min(found, key=lambda one: float((one.kps - view.kps).abs().sum()))
        assert torch.allclose(view.kps, face.kps, atol=1e-4) and torch.allclose(view.box, face.box, atol=1e-4)
        assert len(view.other_faces) == len(found) - 1
    with tarfile.open(tmp_path / f"{result['key']}.tar") as tar:
        assert {name.split(".", 1)[1] for name in tar.getnames()} == {"jpg", "json"}


def test_a_second_run_reuses_the_results(drawn, tmp_path):
    root, analyzer, _ = drawn
    first = build_shards(root, analyzer, tmp_path)
    calls, stamps = analyzer.detect_calls, {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    again = build_shards(root, analyzer, tmp_path, replace(CONFIG, provider="cpu"))
    assert again == first and analyzer.detect_calls == calls
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")} == stamps
    shard = tmp_path / f"{first['eve']['key']}.tar"
    shard.unlink()
    assert build_shards(root, analyzer, tmp_path) == first and shard.is_file() and analyzer.detect_calls > calls
    calls, other = analyzer.detect_calls, replace(CONFIG, min_similarity=0.75)
    keys = {one["key"] for one in build_shards(root, analyzer, tmp_path, other).values()}
    assert not keys & {one["key"] for one in first.values()} and analyzer.detect_calls > calls


def test_every_dropped_photo_has_a_reason(drawn, tmp_path):
    root, analyzer, _ = drawn
    folder = tmp_path / "in" / "eve"
    folder.mkdir(parents=True)
    photos = [file.read_bytes() for file in sorted((root / "eve").glob("*.png"))[:4]]
    for number, data in enumerate([*photos, photos[0], photos[1][:300], b"no image"]):
        (folder / f"{number}.png").write_bytes(data)
    Image.new("RGB", (64, 64)).save(folder / "7.png")
    Image.new("RGB", (4, 64)).save(folder / "8.png")
    (folder / ".9.png").write_bytes(photos[2])
    (folder / "notes.txt").write_text("no photo")
    (result,) = build_shards(tmp_path / "in", analyzer, tmp_path / "out").values()
    assert result["kept"] == {"eve": result["kept"]["eve"]} and sorted(result["kept"]["eve"]) == [
        f"{n}.png" for n in range(4)
    ]
    assert result["dropped"] == {
        "4.png": "duplicate file", "5.png": "cannot be read", "6.png": "cannot be read", "7.png": "no face",
        "8.png": "no face",
    }  # fmt: skip
    (small,) = build_shards(tmp_path / "in", analyzer, tmp_path / "out", replace(CONFIG, min_face_size=500)).values()
    assert small["kept"] == {} and small["dropped"]["0.png"] == "face smaller than 500 pixels"
    assert not (tmp_path / "out" / f"{small['key']}.tar").exists()
    (few,) = build_shards(tmp_path / "in", analyzer, tmp_path / "out", replace(CONFIG, min_photos=5)).values()
    assert few["kept"] == {} and few["dropped"]["0.png"] == "fewer than 5 photos of the person"


def test_views_have_different_poses(drawn, tmp_path):
    root, analyzer, _ = drawn
    results = build_shards(root, analyzer, tmp_path, replace(CONFIG, num_views=3))
    album = ShardAlbum(tmp_path.glob("*.tar"), resolution=None)
    assert results["films/bob"]["photos"] == len(results["films/bob"]["dropped"]) + 3 * len(
        results["films/bob"]["kept"]
    )
    assert album.get_name(0) == "eve" and album.count_images(0) == 3
    shown = [album.load_annotated_image(0, n) for n in range(3)]
    poses = [torch.tensor(quality.estimate_pose(Face(view.box, view.kps, 1.0))) for view in shown]
    assert all(float((poses[a] - poses[b]).abs().sum()) > 15 for a, b in ((0, 1), (0, 2), (1, 2)))
    assert set(results["eve"]["dropped"].values()) == {"another person", "quality or pose"}


def test_photos_are_rotated_by_their_exif_orientation(tmp_path):
    image = np.zeros((30, 60, 3), np.uint8)
    image[:, :30] = 255
    exif = Image.Exif()
    exif[0x112] = 6  # a quarter turn
    Image.fromarray(image).save(tmp_path / "x.png", exif=exif)
    photo = person_worker.read_photo(tmp_path / "x.png", 1024)
    assert photo.shape == (60, 30, 3) and photo[:28].min() == 255 and photo[32:].max() == 0
    assert person_worker.read_photo(tmp_path / "x.png", 20).shape == (20, 10, 3)


@pytest.fixture
def known_photos(drawn, monkeypatch) -> Iterator[tuple[Path, DrawnFaceAnalyzer]]:
    monkeypatch.setattr(person_worker, "open_analyzer", lambda pack, provider: drawn[1])
    yield drawn[0], drawn[1]


def read_report(out: Path) -> dict[str, Any]:
    return json.loads((out / "report.json").read_text())


def test_the_report(known_photos, tmp_path):
    out, photos = tmp_path / "out", tmp_path / "photos"
    for file in known_photos[0].rglob("*.png"):
        target = photos / file.relative_to(known_photos[0])
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    words = [str(photos), str(out), "--workers", "1", "--min-face-size", "16"]
    build_dataset_build.main(words)
    totals = read_report(out)
    assert totals["sizes"] == {"eve": 7, "films/bob": 4} and totals["dropped"] == {"another person": 4}
    assert (totals["photos"], totals["kept"], totals["faces"]) == (15, 11, 16)
    page = (out / "report.md").read_text()
    assert "| photos | 15 |" in page and "| another person | 4 |" in page and "| 7 | 1 |" in page
    shards = set(out.glob("*.tar"))
    assert {file.name for file in shards} == set(totals["shards"].values())
    sorted((photos / "eve").glob("*.png"))[0].unlink()
    build_dataset_build.main(words)
    assert read_report(out)["sizes"] == {"eve": 6, "films/bob": 4}
    assert len(set(out.glob("*.tar")) & shards) == 1 and len([*out.glob("*.tar")]) == 2
    assert len([*(out / photo_folders.RESULTS_FOLDER).glob("*.json")]) == 2


def test_ray_runs_the_same_function(known_photos, tmp_path, monkeypatch):
    """With a stand-in for the calls of Ray Data that are used."""
    init_calls: list[dict[str, Any]] = []

    def from_items(items: list[Any]) -> Any:
        return SimpleNamespace(map=lambda f: SimpleNamespace(iter_rows=lambda: map(f, items)))

    data = SimpleNamespace(from_items=from_items)
    monkeypatch.setitem(
        sys.modules, "ray", SimpleNamespace(init=lambda **options: init_calls.append(options), data=data)
    )
    monkeypatch.setitem(sys.modules, "ray.data", data)
    build_dataset_build.main([str(known_photos[0]), str(tmp_path), "--ray", "--min-face-size", "16"])
    assert read_report(tmp_path)["sizes"] == {"eve": 7, "films/bob": 4}
    assert init_calls[0]["address"] == "auto" and "COMFYUI_PATH" in init_calls[0]["runtime_env"]["env_vars"]


def test_missing_ray_is_reported(known_photos, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"got no Ray .*pip install 'ray\[data\]'"):
        build_dataset_build.main([str(known_photos[0]), str(tmp_path), "--ray"])


def test_wrong_folders_and_configs_are_rejected(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="without a photo"):
        photo_folders.find_candidates(tmp_path)
    for wrong in ({"min_similarity": 1.5}, {"num_views": 17}, {"min_photos": 0}, {"max_photo_size": 8}):
        with pytest.raises(ValueError, match="expected"):
            person_worker.DatasetBuildConfig("demo", **wrong)


def test_the_command_line_with_several_processes(tmp_path):
    """With a model pack's detector and recognizer, as insightface runs them."""
    build.write_standins(tmp_path / "base", [])
    for number, light in enumerate((1.0, 0.9, 0.8)):
        for name, photo in (("eileen", load_portrait()), ("other", make_stranger_photo())):
            file = tmp_path / "photos" / name / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(alignment.convert_to_uint8(photo * light).numpy()).save(file)
    pack = tmp_path / "base" / "models" / "insightface" / "models" / "buffalo_l"
    words = [tmp_path / "photos", tmp_path / "out", "--pack", pack, "--provider", "cpu", "--workers", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "training.build_dataset", *map(str, words)], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "COMFYUI_PYTHON": sys.executable},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert read_report(tmp_path / "out")["sizes"] == {"eileen": 3, "other": 3}
    assert len(ShardAlbum((tmp_path / "out").glob("*.tar"))) == 2
