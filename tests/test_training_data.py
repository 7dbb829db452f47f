"""Clusters of pictures by identity: the world and shards give the same, in an order that workers and restarts keep."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from comfyui_likeness.training import world
from comfyui_likeness.training.data import (
    ClusterBatches,
    Clusters,
    Plan,
    ShardAlbum,
    View,
    WorldAlbum,
    lowest,
    write_shard,
    write_shards,
)
from comfyui_likeness.training.portrait import people
from PIL import Image
from torch.utils.data import DataLoader

ROOT = Path(__file__).resolve().parents[1]
SIDE, MANY = 48, 9
ALBUM = WorldAlbum("validation", SIDE, MANY, 12)
PLAN = Plan(batch=2, least=2, most=4, seed=5)


def same(one: View | Clusters, other: View | Clusters) -> bool:
    pairs = zip(one, other, strict=True)
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else list(a) == list(b) for a, b in pairs)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_shards(ALBUM, tmp_path_factory.mktemp("shards"), pictures=12, per_shard=4, lossless=True)


def test_shards_give_back_what_was_drawn(shards):
    album = ShardAlbum(shards, SIDE)
    assert len(shards) == 3 and len(album) == MANY
    for identity in range(MANY):
        assert album.name(identity) == ALBUM.name(identity) and album.pictures(identity) == 12
        assert all(same(album.view(identity, n), ALBUM.view(identity, n)) for n in range(12))
    view = album.view(2, 11)
    assert view.picture.shape == (SIDE, SIDE, 3) and view.picture.dtype == torch.uint8
    assert view.kps.shape == (5, 2) and view.box.shape == (4,) and view.mask.dtype == torch.bool


def test_the_same_clusters_from_both(shards):
    drawn = ClusterBatches(ALBUM, PLAN, 6)
    stored = ClusterBatches(ShardAlbum(shards, SIDE), PLAN, 6)
    assert all(same(drawn[step], stored[step]) for step in range(6))


def test_portrait_world_as_shards_is_painted_once(tmp_path):
    words = [sys.executable, "-m", "training.shards", tmp_path, "--people", 2, "--each", 3, "--pairs", 2, "--side", 32]
    subprocess.run([*map(str, words)], cwd=ROOT, check=True)
    files = sorted(tmp_path.glob("*.tar"))
    assert [file.name for file in files] == ["alone-000000.tar", "pairs-000000.tar"]
    album = ShardAlbum(files, side=32)
    assert [album.pictures(number) for number in range(len(album))] == [3, 3, 1, 1]
    (alone, pair), stamps = ((album.view(1, 2), album.view(3, 0)), [file.stat().st_mtime_ns for file in files])
    for view, of, who in ((alone, WorldAlbum("train", 32), (1, 2)), (pair, WorldAlbum("train", 32, figures=2), (1, 0))):
        drawn = of.view(*who)
        assert view.caption == drawn.caption and torch.equal(view.kps, drawn.kps)
        assert torch.equal(view.others, drawn.others) and len(view.others) == of.figures - 1
        assert (view.picture.int() - drawn.picture.int()).abs().float().mean() < 4
    assert "two" in pair.caption and "two" not in alone.caption
    options = (["--apart", "15", "--pairs", "0", "--framing", "close"], tmp_path / "views")
    subprocess.run([*map(str, words[:3]), str(options[1]), *map(str, words[4:]), *options[0]], cwd=ROOT, check=True)
    views = ShardAlbum((tmp_path / "views").glob("*.tar"), side=32)
    told = WorldAlbum("train", 32, apart=15.0, framing="close")
    framings = [{album.scene(1, n).framing for n in range(9)} for album in (told, WorldAlbum("train"))]
    assert framings[0] == {"close"} < framings[1]
    assert len(views) == 2 and [views.view(1, n).caption for n in range(3)] == [
        told.view(1, n).caption for n in range(3)
    ]
    files[0].unlink()
    subprocess.run([*map(str, words)], cwd=ROOT, check=True)
    again = [file.stat().st_mtime_ns for file in sorted(tmp_path.glob("*.tar"))]
    assert again[0] > stamps[0] and again[1] == stamps[1]


def test_pictures_with_low_faces_are_left_out(tmp_path):
    heights = [lowest(ALBUM.view(1, number)) for number in range(12)]
    least = sorted(heights)[5]
    path = write_shard(ALBUM, range(1, 2), tmp_path / "one.tar", 12, lossless=True, least=least)
    album, kept = ShardAlbum([path], SIDE), [number for number in range(12) if heights[number] >= least]
    assert 0 < len(kept) < 12 and album.pictures(0) == len(kept)
    assert all(same(album.view(0, place), ALBUM.view(1, number)) for place, number in enumerate(kept))
    pair = WorldAlbum("validation", SIDE, 4, 1, figures=2)
    for view in (pair.view(number, 0) for number in range(4)):
        low, high = sorted([view.box[3] - view.box[1], view.others[0, 1, 1] - view.others[0, 0, 1]])
        assert lowest(view) == pytest.approx(float(low)) and low < high


def test_webdataset_reads_the_shards(shards):
    import webdataset

    found = list(webdataset.WebDataset([str(path) for path in shards], shardshuffle=False))
    assert [sample["__key__"] for sample in found[:12]] == [f"{ALBUM.name(0)}/{n}" for n in range(12)]
    assert len(found) == MANY * 12
    picture = np.asarray(Image.open(io.BytesIO(found[1]["png"])))
    assert np.array_equal(picture, ALBUM.view(0, 1).picture) and "mask.png" in found[1]
    assert json.loads(found[1]["json"])["caption"] == ALBUM.view(0, 1).caption


def test_jpegs_are_close(tmp_path):
    album = WorldAlbum("test", SIDE, 2)
    stored = ShardAlbum(write_shards(album, tmp_path, 3), SIDE)
    for number in range(3):
        one, other = album.view(1, number), stored.view(1, number)
        assert (one.picture.float() - other.picture.float()).abs().mean() < 4
        assert same(one._replace(picture=other.picture), other)


def test_writing_twice_gives_the_same_bytes(tmp_path, shards):
    again = write_shards(ALBUM, tmp_path, pictures=12, per_shard=4, lossless=True)
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in shards]


def test_a_cluster_is_one_persons_pictures():
    batch = ClusterBatches(ALBUM, PLAN, 3)[1]
    count = batch.pictures.shape[1]
    assert batch.pictures.shape == (2, count, SIDE, SIDE, 3) and batch.kps.shape == (2, count, 5, 2)
    assert batch.boxes.shape == (2, count, 4) and batch.masks.shape == (2, count, SIDE, SIDE)
    assert [len(row) for row in batch.captions] == [count, count] and len(set(batch.identities)) == 2
    for name, row in zip(batch.identities, batch.pictures, strict=True):
        found = {picture.numpy().tobytes() for picture in row}
        everyone = {ALBUM.name(identity): pictures_of(identity) for identity in range(MANY)}
        assert len(found) == count
        assert {other for other, theirs in everyone.items() if found & theirs} == {name} and found <= everyone[name]


def pictures_of(identity: int) -> set[bytes]:
    return {ALBUM.view(identity, n).picture.numpy().tobytes() for n in range(ALBUM.each)}


def test_sizes_differ_from_step_to_step():
    sizes = {len(ClusterBatches(ALBUM, PLAN, 40)[step].captions[0]) for step in range(0, 40, 2)}
    assert sizes == {2, 3, 4}


def test_nobody_twice_before_everyones_turn():
    """Nine people in steps of two on two processes: four to a step, an epoch ends within a step."""
    plans = [replace(PLAN, processes=2, process=process) for process in range(2)]
    batches = [ClusterBatches(ALBUM, plan, 9) for plan in plans]
    seen = [name for step in range(9) for one in batches for name in one[step].identities]
    everyone = {ALBUM.name(identity) for identity in range(MANY)}
    epochs = [seen[start : start + MANY] for start in range(0, 36, MANY)]
    assert all(set(epoch) == everyone for epoch in epochs) and epochs[0] != epochs[1]
    assert all(len(batches[0][step].captions[0]) == len(batches[1][step].captions[0]) for step in range(9))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_goes_on_where_it_was_broken_off(workers, shards):
    batches = ClusterBatches(ShardAlbum(shards, SIDE), PLAN, 6)
    whole = [batches[step] for step in range(6)]
    rest = list(DataLoader(batches, batch_size=None, sampler=range(3, 6), num_workers=workers))
    assert len(rest) == 3
    assert all(same(one, Clusters(*other)) for one, other in zip(whole[3:], rest, strict=True))
    assert not torch.equal(whole[0].kps[:, 0], whole[1].kps[:, 0])


def test_another_seed_is_another_order():
    steps = range(4)
    one, other = (ClusterBatches(ALBUM, replace(PLAN, seed=seed), 4) for seed in (1, 2))
    assert [one[step].identities for step in steps] != [other[step].identities for step in steps]


def test_splits_share_nobody():
    names = {split: {WorldAlbum(split, people=50).name(n) for n in range(50)} for split in people.SPLITS}
    assert len(set.union(*names.values())) == 150
    looks = [{world.person(n, split) for n in range(50)} for split in people.SPLITS]
    assert len(set.union(*looks)) == 150
    said = [tuple(WorldAlbum(split, 16).view(0, n).caption for n in range(8)) for split in people.SPLITS]
    assert len(set(said)) == 3  # nor do they share scenes


def test_poses_are_as_far_apart_as_told():
    """Far apart by pose, none left out that would fit, and everything else as it is without."""
    plain, album = WorldAlbum("train", 32, 6), WorldAlbum("train", 32, 6, 8, apart=15.0)
    for identity in range(6):
        scenes = [album.scene(identity, n) for n in range(8)]
        poses = np.degrees([[s.figures[0].yaw, s.figures[0].pitch, s.figures[0].roll] for s in scenes])
        between = np.abs(poses[:, None] - poses[None]).sum(-1)[~np.eye(8, dtype=bool)]
        assert between.min() >= 15 and len({scene.seed for scene in scenes}) == 8
        rolled = [plain.scene(identity, n) for n in range(60)]
        places = [rolled.index(scene) for scene in scenes]
        assert places[0] == 0 and places == sorted(places)
        for number in set(range(places[-1])) - set(places):
            taken = [rolled[place] for place in places if place < number]
            assert min(world.turned(rolled[number].figures[0], one.figures[0]) for one in taken) < 15
    whole = [plain.scene(2, n) for n in range(60)]
    place = whole.index(album.scene(2, 7))
    assert place > 7 and same(album.view(2, 7), plain.view(2, place)) and plain.pictures(2) > album.pictures(2) == 8
    with pytest.raises(ValueError, match=r"got apart = 170.0 for 2 pictures of train-0000003; expected at most 1"):
        WorldAlbum("train", 32, apart=170.0).scene(3, 1)


def photo(folder: Path, files: dict[str, bytes], name: str = "x.tar") -> Path:
    with tarfile.open(folder / name, "w") as tar:
        for file, content in files.items():
            about = tarfile.TarInfo(file)
            about.size = len(content)
            tar.addfile(about, io.BytesIO(content))
    return folder / name


def jpeg(picture: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(picture).save(out, "jpeg", quality=98, subsampling=0)
    return out.getvalue()


@pytest.mark.parametrize(("height", "width"), [(120, 200), (200, 120), (96, 96)])
def test_photos_of_any_size_are_cut_around_the_face(tmp_path, height, width):
    """White spots on the key points of a face in the corner are still on them afterwards; a box stands for a mask."""
    picture = np.zeros((height, width, 3), dtype=np.uint8)
    right, low = width - 40, height - 40
    kps = [(right, low), (right + 20, low), (right + 10, low + 10), (right + 2, low + 20), (right + 18, low + 20)]
    for x, y in kps:
        picture[y - 2 : y + 3, x - 2 : x + 3] = 255
    about = {"caption": "a person", "kps": kps, "box": [right - 6, low - 10, right + 26, low + 28]}
    shard = photo(tmp_path, {"eve/3.jpg": jpeg(picture), "eve/3.json": json.dumps(about).encode()})
    album = ShardAlbum([shard], 64)
    view = album.view(0, 0)
    assert album.name(0) == "eve" and view.picture.shape == (64, 64, 3) and view.caption == "a person"
    grey = view.picture.float().mean(-1)
    y, x = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    for at_x, at_y in view.kps.tolist():
        near = ((x - at_x).abs() < 3) & ((y - at_y).abs() < 3)
        weight = grey * near
        assert float((weight * x).sum() / weight.sum()) == pytest.approx(at_x, abs=0.35)
        assert float((weight * y).sum() / weight.sum()) == pytest.approx(at_y, abs=0.35)
    rows, columns = torch.nonzero(view.mask, as_tuple=True)
    edges = torch.stack((columns.min(), rows.min(), columns.max(), rows.max()))
    assert torch.allclose(edges.float(), view.box, atol=1.1)


def test_shards_that_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match="got 0 shards without a picture"):
        ShardAlbum([])
    lonely = photo(tmp_path, {"eve/1.jpg": jpeg(np.zeros((8, 8, 3), dtype=np.uint8))})
    with pytest.raises(ValueError, match="got eve/1 with jpg; expected a picture and a .json"):
        ShardAlbum([lonely])


def test_plans_that_cannot_be(shards):
    with pytest.raises(ValueError, match="got nobody with 13 pictures of 9 people"):
        ClusterBatches(ShardAlbum(shards, SIDE), replace(PLAN, most=13), 1)
    for wrong in ({"batch": 0}, {"least": 0}, {"least": 5}, {"process": 1}):
        with pytest.raises(ValueError, match="expected a batch"):
            replace(PLAN, **wrong)
    with pytest.raises(IndexError):
        ClusterBatches(ALBUM, PLAN, 3)[3]
