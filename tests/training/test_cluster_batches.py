"""Batches of several images per person: equal from Portrait World and its shards, with workers and when resuming."""

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
from comfyui_likeness.portrait_world import world
from comfyui_likeness.portrait_world.drawing import people
from comfyui_likeness.portrait_world.world_album import WorldAlbum
from comfyui_likeness.training.data.cluster_batches import ClusterConfig, ClusterDataset
from comfyui_likeness.training.data.clusters import AnnotatedImage, ClusterBatch, measure_smallest_face
from comfyui_likeness.training.data.shards import ShardAlbum, write_shard, write_shards
from PIL import Image
from torch.utils.data import DataLoader

ROOT = Path(__file__).resolve().parents[2]
RESOLUTION, NUM_PEOPLE = 48, 9
ALBUM = WorldAlbum("validation", RESOLUTION, NUM_PEOPLE, 12)
CONFIG = ClusterConfig(batch_size=2, min_images=2, max_images=4, seed=5)


def same(one: AnnotatedImage | ClusterBatch, other: AnnotatedImage | ClusterBatch) -> bool:
    pairs = zip(one, other, strict=True)
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else list(a) == list(b) for a, b in pairs)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_shards(ALBUM, tmp_path_factory.mktemp("shards"), images_per_person=12, per_shard=4, lossless=True)


def test_shards_hold_the_painted_images(shards):
    album = ShardAlbum(shards, RESOLUTION)
    assert len(shards) == 3 and len(album) == NUM_PEOPLE
    for identity in range(NUM_PEOPLE):
        assert album.get_name(identity) == ALBUM.get_name(identity) and album.count_images(identity) == 12
        assert all(
            same(album.load_annotated_image(identity, n), ALBUM.load_annotated_image(identity, n)) for n in range(12)
        )
    view = album.load_annotated_image(2, 11)
    assert view.image.shape == (RESOLUTION, RESOLUTION, 3) and view.image.dtype == torch.uint8
    assert view.kps.shape == (5, 2) and view.box.shape == (4,) and view.mask.dtype == torch.bool


def test_the_same_batches_from_both(shards):
    drawn = ClusterDataset(ALBUM, CONFIG, 6)
    stored = ClusterDataset(ShardAlbum(shards, RESOLUTION), CONFIG, 6)
    assert all(same(drawn[step], stored[step]) for step in range(6))


def test_paint_shards_resumes(tmp_path):
    words = [
        sys.executable,
        "-m",
        "portrait_world.paint_shards",
        tmp_path,
        "--people",
        2,
        "--images-per-person",
        3,
        "--pairs",
        2,
        "--resolution",
        32,
    ]
    subprocess.run([*map(str, words)], cwd=ROOT, check=True)
    files = sorted(tmp_path.glob("*.tar"))
    assert [file.name for file in files] == ["alone-000000.tar", "pairs-000000.tar"]
    album = ShardAlbum(files, resolution=32)
    assert [album.count_images(number) for number in range(len(album))] == [3, 3, 1, 1]
    (alone, pair), stamps = (
        (album.load_annotated_image(1, 2), album.load_annotated_image(3, 0)),
        [file.stat().st_mtime_ns for file in files],
    )
    for view, world_album, place in (
        (alone, WorldAlbum("train", 32), (1, 2)),
        (pair, WorldAlbum("train", 32, people_per_image=2), (1, 0)),
    ):
        drawn = world_album.load_annotated_image(*place)
        assert view.caption == drawn.caption and torch.equal(view.kps, drawn.kps)
        assert (
            torch.equal(view.other_faces, drawn.other_faces)
            and len(view.other_faces) == world_album.people_per_image - 1
        )
        assert (view.image.int() - drawn.image.int()).abs().float().mean() < 4
    assert "two" in pair.caption and "two" not in alone.caption
    options = (["--min-pose-distance", "15", "--pairs", "0", "--framing", "close"], tmp_path / "views")
    subprocess.run([*map(str, words[:3]), str(options[1]), *map(str, words[4:]), *options[0]], cwd=ROOT, check=True)
    views = ShardAlbum((tmp_path / "views").glob("*.tar"), resolution=32)
    close = WorldAlbum("train", 32, min_pose_distance=15.0, framing="close")
    framings = [{album.find_scene(1, n).framing for n in range(9)} for album in (close, WorldAlbum("train"))]
    assert framings[0] == {"close"} < framings[1]
    assert len(views) == 2 and [views.load_annotated_image(1, n).caption for n in range(3)] == [
        close.load_annotated_image(1, n).caption for n in range(3)
    ]
    files[0].unlink()
    subprocess.run([*map(str, words)], cwd=ROOT, check=True)
    again = [file.stat().st_mtime_ns for file in sorted(tmp_path.glob("*.tar"))]
    assert again[0] > stamps[0] and again[1] == stamps[1]


def test_images_with_small_faces_are_skipped(tmp_path):
    heights = [measure_smallest_face(ALBUM.load_annotated_image(1, number)) for number in range(12)]
    min_height = sorted(heights)[5]
    path = write_shard(ALBUM, range(1, 2), tmp_path / "one.tar", 12, lossless=True, min_face_height=min_height)
    album, kept = ShardAlbum([path], RESOLUTION), [number for number in range(12) if heights[number] >= min_height]
    assert 0 < len(kept) < 12 and album.count_images(0) == len(kept)
    assert all(
        same(album.load_annotated_image(0, place), ALBUM.load_annotated_image(1, number))
        for place, number in enumerate(kept)
    )
    pair = WorldAlbum("validation", RESOLUTION, 4, 1, people_per_image=2)
    for view in (pair.load_annotated_image(number, 0) for number in range(4)):
        low, high = sorted([view.box[3] - view.box[1], view.other_faces[0, 1, 1] - view.other_faces[0, 0, 1]])
        assert measure_smallest_face(view) == pytest.approx(float(low)) and low < high


def test_webdataset_reads_the_shards(shards):
    import webdataset

    found = list(webdataset.WebDataset([str(path) for path in shards], shardshuffle=False))
    assert [sample["__key__"] for sample in found[:12]] == [f"{ALBUM.get_name(0)}/{n}" for n in range(12)]
    assert len(found) == NUM_PEOPLE * 12
    image = np.asarray(Image.open(io.BytesIO(found[1]["png"])))
    assert np.array_equal(image, ALBUM.load_annotated_image(0, 1).image) and "mask.png" in found[1]
    assert json.loads(found[1]["json"])["caption"] == ALBUM.load_annotated_image(0, 1).caption


def test_jpegs_are_close(tmp_path):
    album = WorldAlbum("test", RESOLUTION, 2)
    stored = ShardAlbum(write_shards(album, tmp_path, 3), RESOLUTION)
    for number in range(3):
        one, other = album.load_annotated_image(1, number), stored.load_annotated_image(1, number)
        assert (one.image.float() - other.image.float()).abs().mean() < 4
        assert same(one._replace(image=other.image), other)


def test_writing_twice_gives_the_same_bytes(tmp_path, shards):
    again = write_shards(ALBUM, tmp_path, images_per_person=12, per_shard=4, lossless=True)
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in shards]


def test_a_row_of_a_batch_is_one_persons_images():
    batch = ClusterDataset(ALBUM, CONFIG, 3)[1]
    count = batch.images.shape[1]
    assert batch.images.shape == (2, count, RESOLUTION, RESOLUTION, 3) and batch.kps.shape == (2, count, 5, 2)
    assert batch.boxes.shape == (2, count, 4) and batch.masks.shape == (2, count, RESOLUTION, RESOLUTION)
    assert [len(row) for row in batch.captions] == [count, count] and len(set(batch.identities)) == 2
    for name, row in zip(batch.identities, batch.images, strict=True):
        found = {image.numpy().tobytes() for image in row}
        everyone = {ALBUM.get_name(identity): list_image_bytes(identity) for identity in range(NUM_PEOPLE)}
        assert len(found) == count
        assert {other for other, theirs in everyone.items() if found & theirs} == {name} and found <= everyone[name]


def list_image_bytes(identity: int) -> set[bytes]:
    return {ALBUM.load_annotated_image(identity, n).image.numpy().tobytes() for n in range(ALBUM.images_per_person)}


def test_the_number_of_images_varies_by_step():
    sizes = {len(ClusterDataset(ALBUM, CONFIG, 40)[step].captions[0]) for step in range(0, 40, 2)}
    assert sizes == {2, 3, 4}


def test_an_epoch_has_everyone_once():
    """Nine people in steps of two on two processes: four to a step, an epoch ends within a step."""
    configs = [replace(CONFIG, num_processes=2, process_index=process) for process in range(2)]
    batches = [ClusterDataset(ALBUM, config, 9) for config in configs]
    seen = [name for step in range(9) for one in batches for name in one[step].identities]
    everyone = {ALBUM.get_name(identity) for identity in range(NUM_PEOPLE)}
    epochs = [seen[start : start + NUM_PEOPLE] for start in range(0, 36, NUM_PEOPLE)]
    assert all(set(epoch) == everyone for epoch in epochs) and epochs[0] != epochs[1]
    assert all(len(batches[0][step].captions[0]) == len(batches[1][step].captions[0]) for step in range(9))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resumed_run_gets_the_same_batches(num_workers, shards):
    batches = ClusterDataset(ShardAlbum(shards, RESOLUTION), CONFIG, 6)
    expected = [batches[step] for step in range(6)]
    rest = list(DataLoader(batches, batch_size=None, sampler=range(3, 6), num_workers=num_workers))
    assert len(rest) == 3
    assert all(same(one, ClusterBatch(*other)) for one, other in zip(expected[3:], rest, strict=True))
    assert not torch.equal(expected[0].kps[:, 0], expected[1].kps[:, 0])


def test_another_seed_gives_another_order():
    steps = range(4)
    one, other = (ClusterDataset(ALBUM, replace(CONFIG, seed=seed), 4) for seed in (1, 2))
    assert [one[step].identities for step in steps] != [other[step].identities for step in steps]


def test_no_person_is_in_two_splits():
    names = {
        split: {WorldAlbum(split, num_people=50).get_name(n) for n in range(50)} for split in people.SPLIT_REMAINDERS
    }
    assert len(set.union(*names.values())) == 150
    looks = [{world.make_person(n, split) for n in range(50)} for split in people.SPLIT_REMAINDERS]
    assert len(set.union(*looks)) == 150
    captions = [
        tuple(WorldAlbum(split, 16).load_annotated_image(0, n).caption for n in range(8))
        for split in people.SPLIT_REMAINDERS
    ]
    assert len(set(captions)) == 3  # the scenes differ too


def test_poses_have_the_minimum_distance():
    """Only poses that are too close are skipped, and everything else is as without a minimum distance."""
    plain, album = WorldAlbum("train", 32, 6), WorldAlbum("train", 32, 6, 8, min_pose_distance=15.0)
    for identity in range(6):
        scenes = [album.find_scene(identity, n) for n in range(8)]
        poses = np.degrees([[s.figures[0].yaw, s.figures[0].pitch, s.figures[0].roll] for s in scenes])
        between = np.abs(poses[:, None] - poses[None]).sum(-1)[~np.eye(8, dtype=bool)]
        assert between.min() >= 15 and len({scene.seed for scene in scenes}) == 8
        rolled = [plain.find_scene(identity, n) for n in range(60)]
        places = [rolled.index(scene) for scene in scenes]
        assert places[0] == 0 and places == sorted(places)
        for number in set(range(places[-1])) - set(places):
            taken = [rolled[place] for place in places if place < number]
            assert min(world.measure_pose_difference(rolled[number].figures[0], one.figures[0]) for one in taken) < 15
    whole = [plain.find_scene(2, n) for n in range(60)]
    place = whole.index(album.find_scene(2, 7))
    assert (
        place > 7
        and same(album.load_annotated_image(2, 7), plain.load_annotated_image(2, place))
        and plain.count_images(2) > album.count_images(2) == 8
    )
    with pytest.raises(
        ValueError, match=r"got min_pose_distance = 170.0 for 2 images of train-0000003; expected at most 1"
    ):
        WorldAlbum("train", 32, min_pose_distance=170.0).find_scene(3, 1)


def write_tar(folder: Path, files: dict[str, bytes], name: str = "x.tar") -> Path:
    with tarfile.open(folder / name, "w") as tar:
        for file, content in files.items():
            about = tarfile.TarInfo(file)
            about.size = len(content)
            tar.addfile(about, io.BytesIO(content))
    return folder / name


def encode_jpeg(image: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(image).save(out, "jpeg", quality=98, subsampling=0)
    return out.getvalue()


@pytest.mark.parametrize(("height", "width"), [(120, 200), (200, 120), (96, 96)])
def test_photos_of_any_size_are_cropped_around_the_face(tmp_path, height, width):
    """White spots on the key points of a face in the corner stay on them; without a mask the box is used."""
    image = np.zeros((height, width, 3), dtype=np.uint8)
    right, low = width - 40, height - 40
    kps = [(right, low), (right + 20, low), (right + 10, low + 10), (right + 2, low + 20), (right + 18, low + 20)]
    for x, y in kps:
        image[y - 2 : y + 3, x - 2 : x + 3] = 255
    about = {"caption": "a person", "kps": kps, "box": [right - 6, low - 10, right + 26, low + 28]}
    shard = write_tar(tmp_path, {"eve/3.jpg": encode_jpeg(image), "eve/3.json": json.dumps(about).encode()})
    album = ShardAlbum([shard], 64)
    view = album.load_annotated_image(0, 0)
    assert album.get_name(0) == "eve" and view.image.shape == (64, 64, 3) and view.caption == "a person"
    grey = view.image.float().mean(-1)
    y, x = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    for at_x, at_y in view.kps.tolist():
        near = ((x - at_x).abs() < 3) & ((y - at_y).abs() < 3)
        weight = grey * near
        assert float((weight * x).sum() / weight.sum()) == pytest.approx(at_x, abs=0.35)
        assert float((weight * y).sum() / weight.sum()) == pytest.approx(at_y, abs=0.35)
    rows, columns = torch.nonzero(view.mask, as_tuple=True)
    edges = torch.stack((columns.min(), rows.min(), columns.max(), rows.max()))
    assert torch.allclose(edges.float(), view.box, atol=1.1)


def test_unknown_splits_and_framings_are_rejected():
    for wrong in ({"split": "training"}, {"framing": "far"}):
        with pytest.raises(ValueError, match="expected train or validation or test, and close or bust or wide"):
            WorldAlbum(**{"split": "train", **wrong})


def test_wrong_shards_are_rejected(tmp_path):
    with pytest.raises(ValueError, match="got 0 shards without an image"):
        ShardAlbum([])
    lonely = write_tar(tmp_path, {"eve/1.jpg": encode_jpeg(np.zeros((8, 8, 3), dtype=np.uint8))})
    with pytest.raises(ValueError, match="got eve/1 with jpg; expected an image and its .json"):
        ShardAlbum([lonely])


def test_wrong_configs_are_rejected(shards):
    with pytest.raises(ValueError, match="got nobody with 13 images among 9 people"):
        ClusterDataset(ShardAlbum(shards, RESOLUTION), replace(CONFIG, max_images=13), 1)
    for wrong in ({"batch_size": 0}, {"min_images": 0}, {"min_images": 5}, {"process_index": 1}):
        with pytest.raises(ValueError, match="expected a batch_size"):
            replace(CONFIG, **wrong)
    with pytest.raises(IndexError):
        ClusterDataset(ALBUM, CONFIG, 3)[3]
