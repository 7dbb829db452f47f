"""Omni-ID is trained as the paper has it: few views to many, a masked decoder, a frozen generator, a frozen encoder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import stacks
import torch
from analyzers import folder as folder
from comfyui_likeness.likeness import omni_id
from comfyui_likeness.nodes import encode
from comfyui_likeness.nodes.loaders import adapter
from comfyui_likeness.nodes.loaders import omni_id as loader
from comfyui_likeness.training import data
from comfyui_likeness.training.adapters import readers
from comfyui_likeness.training.base import clip
from comfyui_likeness.training.base.portraits import Shards
from comfyui_likeness.training.omni_id import encoder, flow, masked, views
from comfyui_likeness.training.task import chance
from safetensors.torch import load_file
from stacks import taken, trained
from torch import Tensor
from torch.testing import assert_close
from trainings import DISCS, fit, values

EACH = 4
SIZES: dict[str, Any] = {"features": 64, "patch": 28, "layers": 2, "tokens": 6, "width": 32, "heads": 2, "inner": 32}
TOLD = masked.Settings(**SIZES, each=EACH, targets=EACH, cell=28, crosses=2, selves=1, mask=0.8)


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stacks.make(tmp_path_factory.mktemp("stack"))


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    """Four views each of three people."""
    place = tmp_path_factory.mktemp("views")
    data.write_shards(data.WorldAlbum("train", 64, 3, EACH, apart=15.0), place, EACH, lossless=True)
    return Shards(place)


def test_few_are_read_and_many_are_made(faces: Shards) -> None:
    clusters = views.people(faces, 0, 9, EACH)
    of = {number: person for person, numbers in enumerate(clusters) for number in numbers}
    counts, both = set(), 0
    for seed in range(40):
        few, many = views.few_to_many(chance(seed), clusters, 5, (1, 3), EACH)
        counts.add(len(few[0]))
        for read, made in zip(few, many, strict=True):
            assert len(read) == len(few[0]) and len({*read}) == len(read) and {*made} == {*clusters[of[read[0]]]}
        _, (one,) = views.few_to_many(chance(seed), clusters, 1, (1, 1), 1)
        both += len(one)
    assert counts == {1, 2, 3} and both == 40
    assert views.people(faces, 0, 2, EACH) == clusters[:2] and views.people(faces, 11, 9, 3) != clusters


def test_faces_are_cut_as_the_encoder_reads_them(faces: Shards) -> None:
    view = faces.view(2)
    cut = views.face(view, 112)
    one = taken(view)
    assert torch.equal(cut[..., :3], (encode.faces.align(one.photo, view.kps, 112) * 255).round().to(torch.uint8))
    inside = cut[..., 3] > 127
    where = omni_id.faces.template(112).round().long()
    assert inside[where[:, 1], where[:, 0]].all() and not inside[0, 0] and 0.2 < float(inside.float().mean()) < 0.95


def loss(task: masked.Masked) -> float:
    with torch.no_grad():
        return float(task(task.batch(chance(5), 3))["masked"])


def test_the_encoder_learns_and_its_file_is_the_nodes(faces: Shards, folder: Path, tmp_path: Path) -> None:
    made: list[masked.Masked] = []

    def make() -> masked.Masked:
        made.append(masked.Masked(TOLD, faces, 1))
        return made[0]

    fit(make, tmp_path, steps=30, batch=3, rate=3e-3, warmup=0, draw_every=30, ema=0.0)
    (task,), new = made, masked.Masked(TOLD, faces, 1)
    assert loss(task) < 0.8 * loss(new)
    own = trained(task)
    assert [name for name, value in trained(new).items() if torch.equal(own[name], value)] == []
    assert {name for name, value in task.named_parameters() if not value.requires_grad} == {
        "encoder.trunk.proj", "encoder.trunk.ln_post.weight", "encoder.trunk.ln_post.bias"
    }  # fmt: skip
    assert len(list((tmp_path / "drawn").glob("reconstructions-*.png"))) == 1
    assert 0 < values(tmp_path, "l1_of_1")[29] < 1 and 0 < values(tmp_path, "l1_of_3")[29] < 1
    task.save(folder / "likeness", {"steps": 30})
    loaded = loader.load(encoder.FILE)
    assert loaded.spec == replace(TOLD.spec, notes={"steps": 30})
    photos = [taken(faces.view(number)) for number in (0, 3)]
    with torch.no_grad():
        cuts = torch.stack([views.face(faces.view(number), 112) for number in (0, 3)])
        expected = encoder.tokens(task.encoder, encoder.states(task.encoder, cuts), 1)
    (tokens,) = encode.joint(photos, loaded)[0].values()
    assert (tokens.float() - expected).norm() < 1e-2 * expected.norm()
    begun = masked.Masked(replace(TOLD, begin=str(folder / "likeness" / encoder.FILE), tokens=99), faces, 2)
    assert begun.encoder.spec.tokens == 6 and all(value.requires_grad for value in begun.encoder.cross.parameters())
    assert torch.allclose(begun.encoder.queries, task.encoder.queries, atol=1e-3)


def test_the_decoder_sees_what_is_not_hidden_and_paints_inside_the_face(faces: Shards) -> None:
    task = masked.Masked(TOLD, faces, 1)
    batch = task.batch(chance(1), 2)
    assert batch["hidden"].shape == (2, EACH, 16) and (batch["hidden"].sum(-1) == 13).all()
    assert len({tuple(row.tolist()) for row in batch["hidden"].flatten(0, 1)}) > 4
    hidden, targets = batch["hidden"], batch["targets"]
    cells = hidden.view(2, EACH, 4, 4).repeat_interleave(28, 2).repeat_interleave(28, 3)

    def made(targets: Tensor, seen: Tensor = batch["seen"]) -> Tensor:
        with torch.no_grad():
            return masked.reconstruct(task.encoder, task.decoder, seen, targets, hidden)

    before = made(targets)
    assert torch.equal(made(torch.where(cells[..., None], 255 - targets, targets)), before)
    other = made(torch.where(cells[..., None], targets, 255 - targets))
    assert not torch.allclose(other, before, atol=1e-3)
    assert not torch.allclose(made(targets, 255 - batch["seen"]), before, atol=1e-4)
    asked = targets[..., :3].movedim(-1, 2).float() / 255
    assert float(masked.wrong(asked, targets)) == 0.0
    outside = (targets[..., 3] == 0)[:, :, None]
    assert float(masked.wrong(torch.where(outside, asked + 1, asked), targets)) == 0.0
    assert float(masked.wrong(asked + 0.25, targets)) == pytest.approx(0.25, abs=1e-4)


@pytest.mark.parametrize(("mask", "shown"), [(0.85, 10), (0.95, 3), (0.99, 1)])
def test_the_mask_hides_its_part_and_never_all(faces: Shards, mask: float, shown: int) -> None:
    task = masked.Masked(replace(TOLD, mask=mask, cell=14), faces, 1)
    assert ((~task._hidden(chance(1), 3, 8)).sum(-1) == shown).all()


def test_a_row_of_targets_is_its_persons(faces: Shards) -> None:
    """All targets of a person share one l, and no person's are painted of another's."""
    task = masked.Masked(TOLD, faces, 1)
    batch = task.batch(chance(1), 2)
    seen, targets, hidden = (batch[name] for name in ("seen", "targets", "hidden"))

    def made(*given: Tensor) -> Tensor:
        with torch.no_grad():
            return masked.reconstruct(task.encoder, task.decoder, *given)

    both, alone = made(seen, targets, hidden), made(seen[1:], targets[1:], hidden[1:])
    swapped, one = made(seen.flip(0), targets, hidden), made(seen, targets[:, 2:3], hidden[:, 2:3])
    assert torch.allclose(both[1:], alone, atol=1e-5) and torch.allclose(both[:, 2:3], one, atol=1e-5)
    assert not torch.allclose(swapped, both, atol=1e-4)


def test_less_memory_makes_no_other_gradient(faces: Shards) -> None:
    tasks = [masked.Masked(replace(TOLD, checkpointing=less), faces, 1) for less in (False, True)]
    for task in tasks:
        task(task.batch(chance(2), 2))["masked"].backward()
    one, other = (trained(task) for task in tasks)
    assert all(torch.allclose(value.grad, other[name].grad, atol=1e-7) for name, value in one.items())


def test_faces_of_a_pool_are_cut_once(faces: Shards) -> None:
    pooled, whole = (masked.Masked(replace(TOLD, pool=pool), faces, 1) for pool in (12, 0))
    one, other = (task.batch(chance(3), 2) for task in (pooled, whole))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    (file,) = faces.folder.glob("faces-*/*.safetensors")
    stamp = file.stat().st_mtime_ns
    masked.Masked(replace(TOLD, pool=12), faces, 1)
    assert file.stat().st_mtime_ns == stamp


def test_the_trunk_may_be_that_of_a_checkpoint(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    small = encoder.Sizes(**SIZES)
    source = encoder.fresh(replace(small, image_size=224), 3).trunk.state_dict()
    file = tmp_path / "clip.safetensors"
    save_file({f"visual.{key}": value.half() for key, value in source.items()}, file)
    made, plain = (encoder.fresh(replace(small, trunk=trunk), 7) for trunk in (str(file), ""))
    own = made.trunk.state_dict()
    assert own["positional_embedding"].shape == (17, 64) and source["positional_embedding"].shape == (65, 64)
    assert all(torch.allclose(own[key], value, atol=2e-3) for key, value in source.items() if "positional" not in key)
    assert torch.equal(made.queries, plain.queries) and made.trunk.conv1.weight.requires_grad
    with pytest.raises(ValueError, match="another network than .task. says"):
        encoder.fresh(replace(small, trunk=str(file), layers=3), 7)
    with pytest.raises(ValueError, match="expected a CLIP vision tower"):
        encoder.fresh(replace(small, trunk=str(tmp_path / "none")), 7)


def test_the_trunk_may_be_a_tower_in_the_transformers_layout(stack: Path) -> None:
    tower, told = readers.Vision(stack / clip.VISION, "last"), stacks.TOWERS
    sizes = encoder.Sizes(
        image_size=told.side, patch=told.patch, features=told.vision_width, layers=told.vision_layers,
        projection=told.width, activation="quick_gelu", trunk=str(stack / clip.VISION),
    )  # fmt: skip
    made = encoder.fresh(sizes, 1)
    pictures = torch.randint(256, (2, told.side, told.side, 3), dtype=torch.uint8, generator=chance(4))
    with torch.no_grad():
        assert_close(encoder.states(made, pictures), tower.read(pictures, torch.device("cpu")))


def flowing(stack: Path, **told: Any) -> flow.Flow:
    task = stacks.task("flow", stack, **told)
    assert isinstance(task, flow.Flow)
    return task


def test_the_encoder_learns_through_the_frozen_generator(stack: Path, folder: Path, tmp_path: Path) -> None:
    made: list[flow.Flow] = []

    def make() -> flow.Flow:
        made.append(flowing(stack, pool=10))
        return made[0]

    fit(make, tmp_path, steps=8, batch=2, rate=3e-3, warmup=0, draw_every=8, ema=0.0)
    (task,), new = made, flowing(stack, pool=10)
    batch = new.batch(chance(9), 3)
    with torch.no_grad():
        after, before = (float(one(batch)["noise"]) for one in (task, new))
    assert after < 0.99 * before
    own, first = trained(task), trained(new)
    assert {name.partition(".")[0] for name in first} == {"adapter", "trained"}
    assert [name for name, value in first.items() if torch.equal(own[name], value)] == []
    kept, now = new.frozen.model.state_dict(), task.frozen.model.state_dict()
    assert all(torch.equal(value, now[name]) for name, value in kept.items())
    assert len(list((tmp_path / "drawn").glob("pictures-*.png"))) == 1
    task.save(folder / "likeness", {"steps": 8})
    assert not torch.equal(
        load_file(folder / "likeness" / encoder.FILE)["queries"], load_file(stack / encoder.FILE)["queries"]
    )
    _, report = adapter.load("made.safetensors")
    assert "Omni-ID for SD1.5, 6 tokens per identity, 16 layers" in report
    assert "The negative prompt sees no tokens" in report
    flowing(stack, pool=10, made="omni_id_3_1").save(folder / "likeness", {"steps": 0})
    assert (folder / "likeness" / "omni_id_3_1.safetensors").is_file()


def test_the_generator_is_not_disturbed_at_first_and_the_encoder_is_slower(stack: Path) -> None:
    task = flowing(stack, pool=10, slower=0.25)
    one, other = task.batch(chance(1), 2), task.batch(chance(2), 2)
    losses = [task({**one, "cuts": cuts})["noise"] for cuts in (one["cuts"], other["cuts"])]
    assert torch.equal(*losses) and losses[0] > 0
    shares = {name: task.share(name) for name in trained(task)}
    assert {share for name, share in shares.items() if name.startswith("adapter.")} == {1.0}
    assert {share for name, share in shares.items() if name.startswith("trained.")} == {0.25}


def test_all_pictures_of_a_person_are_made_of_the_same_tokens(stack: Path) -> None:
    pooled, whole = flowing(stack, pool=10), flowing(stack)
    batch, other = pooled.batch(chance(1), 2), whole.batch(chance(1), 2)
    assert len(batch["noise"]) == 6 and not batch["faceless"].any()
    text = clip.tokenize(pooled.tokenizer, ["photo of a person"])[0]
    assert batch["tokens"] == [text] * 6 == other["tokens"]
    tokens = pooled.faces(batch)
    assert tokens.requires_grad and torch.equal(batch["cuts"][..., :3], other["cuts"].float())
    assert all(torch.equal(tokens[0], row) for row in tokens[:3])
    assert not torch.allclose(tokens[3], tokens[0], atol=1e-4) and torch.equal(tokens[3], tokens[5])
    losses = [float(task(given)["noise"].detach()) for task, given in ((pooled, batch), (whole, other))]
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)


def test_photos_of_one_person_are_read_as_one(stack: Path) -> None:
    task = stacks.task("omni", stack, pool=10)
    rows = {len(batch["read"]) // 4 for batch in (task.batch(chance(seed), 4) for seed in range(8))}
    assert rows == {1, 2}
    batch = task.batch(chance(3), 4)
    tokens, reader = task.faces(batch), task.reader
    assert isinstance(reader, readers.Omni) and tokens.shape == (4, 6, 32)
    each = len(batch["read"]) // 4
    present = [row for row in range(4) if not batch["faceless"][row]]
    for row in present:
        states = batch["read"][row * each : (row + 1) * each]
        assert torch.allclose(tokens[row], reader.joined(states, 1)[0], atol=1e-5)
    nobody = task.faces({**batch, "faceless": torch.ones(4, dtype=torch.bool)})
    assert not nobody.any() and present


def test_what_cannot_be_trained_is_said(faces: Shards, stack: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected a folder of shards.*--apart 15 --each 4"):
        masked.Masked(TOLD, DISCS, 0)
    with pytest.raises(ValueError, match="got nobody with 5 of the first 12 pictures"):
        masked.Masked(replace(TOLD, each=5), faces, 0)
    with pytest.raises(ValueError, match="expected 1 <= least <= most <= each"):
        replace(TOLD, most=5)
    with pytest.raises(ValueError, match="cells that fill 112 pixels"):
        replace(TOLD, cell=15)
    with pytest.raises(
        ValueError, match=r"got photos = 3 with reads = 'image' in .task.; expected 1, or more that omni"
    ):
        replace(stacks.task("image", stack).settings, photos=3)
    with pytest.raises(ValueError, match="expected omni, whose encoder is trained"):
        replace(stacks.task("flow", stack).settings, reads="image")
    with pytest.raises(ValueError, match="train omni_masked first"):
        encoder.load(tmp_path / "none")
