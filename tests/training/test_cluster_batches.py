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
from comfyui_likeness.training.data.clusters import AnnotatedImage, ClusterBatch, crop_and_resize
from comfyui_likeness.training.data.shards import ShardAlbum, write_shards
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


def paint_shards(folder: Path, **options: float) -> list[Path]:
    """The shards that the command writes."""
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    command = [sys.executable, "-m", "portrait_world.paint_shards", str(folder), "--resolution", "32", *words]
    subprocess.run(command, cwd=ROOT, check=True)
    return sorted(folder.glob("*.tar"))


def test_paint_shards_resumes(tmp_path):
    files = paint_shards(tmp_path, people=252, images_per_person=1, first_person=7)
    assert [file.name for file in files] == ["000007.tar", "000257.tar"]
    stamps, contents = [file.stat().st_mtime_ns for file in files], files[1].read_bytes()
    files[1].unlink()
    assert paint_shards(tmp_path, people=252, images_per_person=1, first_person=7) == files
    assert files[0].stat().st_mtime_ns == stamps[0] and files[1].read_bytes() == contents
    album, drawn = ShardAlbum(files, resolution=32), WorldAlbum("train", 32)
    assert len(album) == 252
    for place in (0, 251):
        view, expected = album.load_annotated_image(place, 0), drawn.load_annotated_image(place + 7, 0)
        assert same(view._replace(image=expected.image), expected) and len(view.detailed_captions) > 1
        assert (view.image.int() - expected.image.int()).abs().float().mean() < 4


def test_paint_shards_of_pairs_and_of_poses(tmp_path):
    (pairs,) = paint_shards(tmp_path / "pairs", people=2, images_per_person=1, people_per_image=2)
    pair = ShardAlbum([pairs], resolution=None).load_annotated_image(1, 0)
    assert pair.image.shape == (32, 48, 3) and len(pair.other_faces) == 1
    drawn = WorldAlbum("train", 32, people_per_image=2).load_annotated_image(1, 0)
    assert torch.equal(pair.kps, drawn.kps) and torch.equal(pair.other_faces, drawn.other_faces)
    assert pair.caption == drawn.caption and "person on the right" in " ".join(pair.detailed_captions)
    (views,) = paint_shards(tmp_path / "views", people=2, images_per_person=9, min_pose_distance=8)
    album, apart = ShardAlbum([views], resolution=32), WorldAlbum("train", 32, min_pose_distance=8.0)
    assert album.count_images(1) == 9
    found, expected = ([one.load_annotated_image(1, n).kps for n in range(9)] for one in (album, apart))
    assert torch.equal(torch.stack(found), torch.stack(expected))


def test_crops_have_the_aspect_ratio_and_the_faces_in_them():
    pair = WorldAlbum("train", 64, people_per_image=2).load_annotated_image(0, 0)
    assert crop_and_resize(pair, 64, 1.5) is pair
    small = crop_and_resize(pair, 32, 1.5)
    assert small.image.shape == (32, 48, 3) and small.mask.shape == (32, 48)
    assert torch.allclose(small.kps, (pair.kps + 0.5) / 2 - 0.5) and len(small.other_faces) == 1
    assert small.detailed_captions == pair.detailed_captions
    square = crop_and_resize(pair, 64)
    assert square.image.shape == (64, 64, 3) and torch.equal(square.image, pair.image[:, :64])
    assert torch.equal(square.kps, pair.kps) and len(square.other_faces) == 0  # its middle is outside
    alone = WorldAlbum("train", 66).load_annotated_image(0, 0)
    wide = crop_and_resize(alone, 44, 1.5)
    assert wide.image.shape == (44, 66, 3)
    top = float((alone.kps - wide.kps)[0, 1])
    assert torch.equal(wide.image, alone.image[round(top) : round(top) + 44])


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
    plain, album = WorldAlbum("train", 32, 6), WorldAlbum("train", 32, 6, 8, min_pose_distance=8.0)
    for identity in range(6):
        scenes = [album.find_scene(identity, n) for n in range(8)]
        poses = np.degrees([[s.figures[0].yaw, s.figures[0].pitch, s.figures[0].roll] for s in scenes])
        between = np.abs(poses[:, None] - poses[None]).sum(-1)[~np.eye(8, dtype=bool)]
        assert between.min() >= 8 and len(set(scenes)) == 8
        rolled = [plain.find_scene(identity, n) for n in range(600)]
        places = [rolled.index(scene) for scene in scenes]
        assert places[0] == 0 and places == sorted(places)
        for number in set(range(places[-1])) - set(places):
            taken = [rolled[place] for place in places if place < number]
            assert min(world.measure_pose_difference(rolled[number].figures[0], one.figures[0]) for one in taken) < 8
    whole = [plain.find_scene(2, n) for n in range(600)]
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


def test_unknown_splits_are_rejected():
    with pytest.raises(ValueError, match="got split 'training'; expected train or validation or test"):
        WorldAlbum("training")


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
