"""Phrases for looks: they are true, they come with pictures, and text encoders and UNets are trained on them."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import stacks
import torch
from comfyui_likeness.training import world
from comfyui_likeness.training.base import clip, portraits, source, unet
from comfyui_likeness.training.data import ShardAlbum, WorldAlbum, write_shards
from comfyui_likeness.training.portrait import looks
from comfyui_likeness.training.task import chance
from safetensors.torch import load_file
from trainings import DISCS, SHADES, Discs, fit

ONE = world.scene(0).figures[0]
MOST = 77  # tokens that a text encoder reads


def phrases(number: int = 0, **values: object) -> tuple[str, ...]:
    who = world.person(number, "train")
    return world.looks([replace(who, **values)], [replace(ONE, yaw=0.0, pitch=0.0, roll=0.0)])


def test_phrases_are_true() -> None:
    found = phrases(
        hair="long", hair_colour="ginger", skin="olive", glasses="round", frames="red", beard="full", face="oval",
        face_width=-1.0, eye_size=1.0, eye_colour="green", eyes="almond", fringe="none", nose_length=0.5, lips=0.0,
        nose_width=-0.5, lip_colour="natural", mark="left scar", earrings="none", eye_gap=0.0,
    )  # fmt: skip
    assert found[:6] == (
        "long ginger hair", "olive skin", "round red glasses", "full beard", "very narrow oval face",
        "very large green almond eyes",
    )  # fmt: skip
    assert {"left scar", "long narrow nose"} <= set(found)
    assert not [phrase for phrase in found if re.search("fringe|lips|set eyes|hoops|studs|turned|leaning", phrase)]
    assert phrases(hair="bald")[0] == "bald head" and "freckles" in phrases(freckles="some")
    assert "freckles" not in phrases(freckles="none")


@pytest.mark.parametrize(
    "yaw, said", [(-0.5, "turned very left"), (-0.3, "turned left"), (0.1, None), (0.3, "turned right")]
)
def test_the_pose_is_said_as_a_viewer_sees_it(yaw: float, said: str | None) -> None:
    found = world.looks([world.person(0, "train")], [replace(ONE, yaw=yaw)])
    assert [phrase for phrase in found if phrase.startswith("turned")] == ([said] if said else [])


def test_two_people_are_told_apart_by_their_sides() -> None:
    scene = world.scene(0, 2)
    found = world.looks([world.person(number, "train") for number in range(2)], scene.figures)
    assert [phrase.split()[0] for phrase in found] == ["left"] * looks.BESIDE + ["right"] * looks.BESIDE


def test_all_words_are_known_and_most_texts_are_read_whole() -> None:
    drawn, used, long = portraits.World("train"), set[str](), 0
    tokenizer = clip.SDTokenizer()
    for number in range(300):
        used |= {word for phrase in drawn.looks(number) for word in phrase.split()}
        (text,) = source.described(drawn, chance(number), [number], 1.0)
        long += len(tokenizer.tokenize_with_weights(text)) > 1
    assert used == set(world.LOOKS)
    assert long < 60


def test_only_a_part_of_captions_is_described() -> None:
    drawn, numbers = portraits.World("train"), list(range(1, 201, 2))
    plain = [drawn.caption(number) for number in numbers]
    assert source.described(drawn, chance(0), numbers, 0.0) == plain
    told = source.described(drawn, chance(0), numbers, 0.5)
    assert all(text.startswith(caption) for text, caption in zip(told, plain, strict=True))
    assert 30 < sum(text != caption for text, caption in zip(told, plain, strict=True)) < 70
    assert told == source.described(drawn, chance(0), numbers, 0.5)


def test_shards_keep_them(tmp_path: Path) -> None:
    album = WorldAlbum("train", 48, 2, 2)
    files = write_shards(album, tmp_path, 2)
    kept = ShardAlbum(files, 32)  # of another size
    assert kept.view(1, 0).looks == album.view(1, 0).looks != ()
    shards = portraits.Shards(tmp_path)
    assert shards.looks(1) == album.view(1, 0).looks
    said = {word for phrase in album.view(1, 0).looks for word in phrase.split()}
    assert shards.words is not None and said <= set(shards.words)


def test_a_text_encoder_learns_new_words_and_the_other_tower_stays(tmp_path: Path) -> None:
    first = tmp_path / "first"
    first.mkdir()
    clip.ClipPair(stacks.TOWERS, Undescribed(), 2).save(first, {})
    told = replace(stacks.TOWERS, begin=str(first), described=1.0)
    begun, new = clip.load_text(first / clip.TEXT), clip.ClipPair(told, DISCS, 3)
    old, table = (text.transformer.get_input_embeddings() for text in (begun, new.text))
    assert set(old.known) < set(table.known)
    tokens = torch.tensor(old.known)
    assert torch.equal(old(tokens), table(tokens)) and torch.equal(old.weight[-1], table.weight[-1])
    folder, _ = fit(lambda: clip.ClipPair(told, DISCS, 3), tmp_path, steps=2, batch=4)
    before, after = load_file(first / clip.TEXT), load_file(folder / clip.TEXT)
    layer = "text_model.encoder.layers.0.mlp.fc1.weight"
    assert not torch.equal(before[layer], after[layer])
    before, after = load_file(first / clip.VISION), load_file(folder / clip.VISION)
    assert all(torch.equal(value, after[key]) for key, value in before.items())


class Undescribed(Discs):
    """Discs whose words are those of the captions alone."""

    words = tuple(word for word in DISCS.words if word not in (*SHADES, "behind"))


def test_the_unet_reads_described_captions(tmp_path: Path) -> None:
    stacks.make(tmp_path)
    parts = {name: str(tmp_path / stacks.FILES[name]) for name in ("vae", "text")}
    plain, told = (
        unet.TextToImage(unet.Settings(**stacks.UNET, **parts, unprompted=0.0, described=part), DISCS, 0)
        for part in (0.0, 1.0)
    )
    (behind,) = clip.tokenize(told.tokenizer, ["behind"])[0][1:2]
    assert not [row for row in plain.batch(chance(1), 20)["tokens"] if behind in row]
    assert 8 < len([row for row in told.batch(chance(1), 20)["tokens"] if behind in row]) < 20  # source.KEPT
