"""Folders of photos to shards: who is kept, what is told of the others, and that nothing is done twice."""

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
from collected import ROOT, Knowing
from comfyui_likeness.likeness import faces
from comfyui_likeness.likeness.spec import Face
from comfyui_likeness.tools import standins
from comfyui_likeness.training.collect import folders, run, work
from comfyui_likeness.training.data import ShardAlbum
from PIL import Image
from portraits import portrait, stranger

# To the small recogniser people are more alike than to ArcFace: there are strangers at 0.6.
PLAN = work.Plan("demo", face=16, similarity=0.7)
EVE, BOB, OTHER = 0, 1, 9
# By folder: who is in each photo.
PHOTOS = {
    "eve": [[EVE]] * 6 + [[EVE, OTHER], [4], [5]],
    "films/bob": [[BOB]] * 4 + [[EVE], [6]],
}  # fmt: skip


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Knowing, dict[str, list[int]]]:
    """The photos of PHOTOS, the analyzer that knows them, and who is in each file."""
    root, analyzer, who, number = tmp_path_factory.mktemp("photos"), Knowing(), dict[str, list[int]](), 700
    for folder, photos in PHOTOS.items():
        for people in photos:
            number += 1
            analyzer.draw(root / folder / f"{number}.png", people, number)
            who[f"{number}.png"] = people
    return root, analyzer, who


def collected(root: Path, analyzer: Knowing, out: Path, plan: work.Plan = PLAN) -> dict[str, dict[str, Any]]:
    out.mkdir(exist_ok=True)
    return {one.name: work.collect(one, plan, analyzer, out) for one in folders.candidates(root)}


def rates(kept: list[str], person: int, who: dict[str, list[int]], among: int) -> tuple[float, float]:
    """Precision and recall of kept photos."""
    right = sum(person in who[name] for name in kept)
    return right / len(kept), right / among


def test_each_folder_is_its_person_without_the_strangers(drawn, tmp_path):
    root, analyzer, who = drawn
    told = collected(root, analyzer, tmp_path)
    assert list(told) == ["eve", "films/bob"]
    assert rates(told["eve"]["kept"]["eve"], EVE, who, 7) == (1, 1)
    assert rates(told["films/bob"]["kept"]["films/bob"], BOB, who, 4) == (1, 1)
    assert told["eve"]["dropped"] == {"708.png": "not the person", "709.png": "not the person"}
    assert told["eve"]["photos"] == 9 and told["eve"]["faces"] == 10


def test_a_flat_folder_is_everybody_in_it(drawn, tmp_path):
    root, analyzer, who = drawn
    flat = tmp_path / "flat"
    flat.mkdir()
    for file in root.rglob("*.png"):
        (flat / file.name).write_bytes(file.read_bytes())
    (told,) = collected(flat, analyzer, tmp_path / "out").values()
    assert sorted(told["kept"]) == ["flat-00000", "flat-00001"]
    sizes = {"flat-00000": (EVE, 8), "flat-00001": (BOB, 4)}
    assert all(rates(told["kept"][name], one, who, count) == (1, 1) for name, (one, count) in sizes.items())
    assert set(told["dropped"].values()) == {"nobody who is in 2 photos"}
    album = ShardAlbum([tmp_path / "out" / f"{told['key']}.tar"])
    assert [(album.name(n), album.pictures(n)) for n in range(2)] == [("flat-00000", 8), ("flat-00001", 4)]


def test_the_shard_is_one_that_training_reads(drawn, tmp_path):
    root, analyzer, _ = drawn
    told = collected(root, analyzer, tmp_path)["eve"]
    album = ShardAlbum(tmp_path.glob("*.tar"), side=None)
    assert [album.name(n) for n in range(len(album))] == ["eve", "films/bob"]
    for number, name in enumerate(told["kept"]["eve"]):
        view = album.view(0, number)
        photo = work.read(root / "eve" / name, 1024)
        found = analyzer.known[photo.numpy().tobytes()]
        assert (view.picture.int() - photo.int()).abs().float().mean() < 4 and view.caption == ""
        own = min(found, key=lambda face: float((face.kps - view.kps).abs().sum()))
        assert torch.allclose(view.kps, own.kps, atol=1e-4) and torch.allclose(view.box, own.box, atol=1e-4)
        assert len(view.others) == len(found) - 1
    with tarfile.open(tmp_path / f"{told['key']}.tar") as tar:
        assert {name.split(".", 1)[1] for name in tar.getnames()} == {"jpg", "json"}


def test_a_second_run_reads_what_the_first_has_written(drawn, tmp_path):
    root, analyzer, _ = drawn
    first = collected(root, analyzer, tmp_path)
    looked, stamps = analyzer.looked, {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    again = collected(root, analyzer, tmp_path, replace(PLAN, provider="cpu"))
    assert again == first and analyzer.looked == looked
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")} == stamps
    shard = tmp_path / f"{first['eve']['key']}.tar"
    shard.unlink()
    assert collected(root, analyzer, tmp_path) == first and shard.is_file() and analyzer.looked > looked
    looked, other = analyzer.looked, replace(PLAN, similarity=0.75)
    keys = {one["key"] for one in collected(root, analyzer, tmp_path, other).values()}
    assert not keys & {one["key"] for one in first.values()} and analyzer.looked > looked


def test_every_photo_is_accounted_for(drawn, tmp_path):
    root, analyzer, _ = drawn
    folder = tmp_path / "in" / "eve"
    folder.mkdir(parents=True)
    whole = [file.read_bytes() for file in sorted((root / "eve").glob("*.png"))[:4]]
    for number, data in enumerate([*whole, whole[0], whole[1][:300], b"no picture"]):
        (folder / f"{number}.png").write_bytes(data)
    Image.new("RGB", (64, 64)).save(folder / "7.png")
    Image.new("RGB", (4, 64)).save(folder / "8.png")
    (folder / ".9.png").write_bytes(whole[2])
    (folder / "notes.txt").write_text("no photo")
    (told,) = collected(tmp_path / "in", analyzer, tmp_path / "out").values()
    assert told["kept"] == {"eve": told["kept"]["eve"]} and sorted(told["kept"]["eve"]) == [
        f"{n}.png" for n in range(4)
    ]
    assert told["dropped"] == {
        "4.png": "the same file again", "5.png": "cannot be read", "6.png": "cannot be read", "7.png": "no face",
        "8.png": "no face",
    }  # fmt: skip
    (small,) = collected(tmp_path / "in", analyzer, tmp_path / "out", replace(PLAN, face=500)).values()
    assert small["kept"] == {} and small["dropped"]["0.png"] == "face below 500 pixels"
    assert not (tmp_path / "out" / f"{small['key']}.tar").exists()
    (few,) = collected(tmp_path / "in", analyzer, tmp_path / "out", replace(PLAN, least=5)).values()
    assert few["kept"] == {} and few["dropped"]["0.png"] == "fewer than 5 of the person"


def test_views_are_of_different_poses(drawn, tmp_path):
    root, analyzer, _ = drawn
    told = collected(root, analyzer, tmp_path, replace(PLAN, views=3))
    album = ShardAlbum(tmp_path.glob("*.tar"), side=None)
    assert told["films/bob"]["photos"] == len(told["films/bob"]["dropped"]) + 3 * len(told["films/bob"]["kept"])
    assert album.name(0) == "eve" and album.pictures(0) == 3
    shown = [album.view(0, n) for n in range(3)]
    poses = [torch.tensor(faces.pose(Face(view.box, view.kps, 1.0))) for view in shown]
    assert all(float((poses[a] - poses[b]).abs().sum()) > 15 for a, b in ((0, 1), (0, 2), (1, 2)))
    assert set(told["eve"]["dropped"].values()) == {"not the person", "quality or pose"}


def test_photos_are_read_as_the_camera_was_held(tmp_path):
    picture = np.zeros((30, 60, 3), np.uint8)
    picture[:, :30] = 255
    exif = Image.Exif()
    exif[0x112] = 6  # turned by a quarter
    Image.fromarray(picture).save(tmp_path / "x.png", exif=exif)
    photo = work.read(tmp_path / "x.png", 1024)
    assert photo.shape == (60, 30, 3) and photo[:28].min() == 255 and photo[32:].max() == 0
    assert work.read(tmp_path / "x.png", 20).shape == (20, 10, 3)


@pytest.fixture
def known(drawn, monkeypatch) -> Iterator[tuple[Path, Knowing]]:
    monkeypatch.setattr(work, "analyzer", lambda pack, provider: drawn[1])
    yield drawn[0], drawn[1]


def report(out: Path) -> dict[str, Any]:
    return json.loads((out / "report.json").read_text())


def test_the_whole_and_its_report(known, tmp_path):
    out, photos = tmp_path / "out", tmp_path / "photos"
    for file in known[0].rglob("*.png"):
        target = photos / file.relative_to(known[0])
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    words = [str(photos), str(out), "--workers", "1", "--face", "16"]
    run.main(words)
    told = report(out)
    assert told["sizes"] == {"eve": 7, "films/bob": 4} and told["dropped"] == {"not the person": 4}
    assert (told["photos"], told["kept"], told["faces"]) == (15, 11, 16)
    page = (out / "report.md").read_text()
    assert "| photos | 15 |" in page and "| not the person | 4 |" in page and "| 7 | 1 |" in page
    shards = set(out.glob("*.tar"))
    assert {file.name for file in shards} == set(told["shards"].values())
    sorted((photos / "eve").glob("*.png"))[0].unlink()
    run.main(words)
    assert report(out)["sizes"] == {"eve": 6, "films/bob": 4}
    assert len(set(out.glob("*.tar")) & shards) == 1 and len([*out.glob("*.tar")]) == 2
    assert len([*(out / folders.DONE).glob("*.json")]) == 2


def test_ray_gets_the_same_function(known, tmp_path, monkeypatch):
    """A stand-in with the calls of Ray Data that are used."""
    begun: list[dict[str, Any]] = []

    def from_items(items: list[Any]) -> Any:
        return SimpleNamespace(map=lambda f: SimpleNamespace(iter_rows=lambda: map(f, items)))

    data = SimpleNamespace(from_items=from_items)
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(init=lambda **told: begun.append(told), data=data))
    monkeypatch.setitem(sys.modules, "ray.data", data)
    run.main([str(known[0]), str(tmp_path), "--ray", "--face", "16"])
    assert report(tmp_path)["sizes"] == {"eve": 7, "films/bob": 4}
    assert begun[0]["address"] == "auto" and "COMFYUI_PATH" in begun[0]["runtime_env"]["env_vars"]


def test_without_ray_it_says_so(known, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"got no Ray .*pip install 'ray\[data\]'"):
        run.main([str(known[0]), str(tmp_path), "--ray"])


def test_folders_and_plans_that_cannot_be(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="without a photo"):
        folders.candidates(tmp_path)
    for wrong in ({"similarity": 1.5}, {"views": 17}, {"least": 0}, {"longest": 8}):
        with pytest.raises(ValueError, match="expected"):
            work.Plan("demo", **wrong)


def test_the_command_line_with_several_processes(tmp_path):
    """By the packs' own detector and recogniser, as insightface runs them."""
    standins.make(tmp_path / "base", [])
    for number, light in enumerate((1.0, 0.9, 0.8)):
        for name, photo in (("eileen", portrait()), ("other", stranger())):
            file = tmp_path / "photos" / name / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(faces.pixels(photo * light).numpy()).save(file)
    pack = tmp_path / "base" / "models" / "insightface" / "models" / "buffalo_l"
    words = [tmp_path / "photos", tmp_path / "out", "--pack", pack, "--provider", "cpu", "--workers", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "training.collect", *map(str, words)], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "COMFYUI_PYTHON": sys.executable},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert report(tmp_path / "out")["sizes"] == {"eileen": 3, "other": 3}
    assert len(ShardAlbum((tmp_path / "out").glob("*.tar"))) == 2
