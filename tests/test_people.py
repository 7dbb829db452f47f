"""People: the nodes that place them, the map that shows them, and every apply node that takes them."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from adapters import adapter, applied
from adapters import person as embedded
from comfy.model_patcher import ModelPatcher
from comfyui_likeness.likeness.spec import Person
from comfyui_likeness.nodes import people as nodes
from comfyui_likeness.nodes.attention import patch
from comfyui_likeness.nodes.loaders.face_analyzer import FaceAnalyzer
from flashfaces import latents, loaded, referenced
from flashfaces import person as pictured
from fuseds import fused, halves, person
from fuseds import people as cast
from models import close, patcher, prompt, sample
from portraits import couple, empty, place_of
from torch import Tensor

pytest_plugins = ["analyzers"]


@pytest.fixture(scope="module")
def base() -> ModelPatcher:
    return patcher()


def grown(*items: Any, prefix: str = "identity_") -> dict[str, Any]:
    return {f"{prefix}{i}": item for i, item in enumerate(items)}


def test_persons_chain() -> None:
    left, right = halves()
    first = nodes.MakePerson.execute(person(1), 0.5, left).args[0]
    both = nodes.MakePerson.execute(person(2), 1.0, right[0], people=first, prompt=prompt(3)).args[0]
    assert len(first) == 1 and len(both) == 2 and both[0] is first[0]
    assert both[1].mask.shape == (1, 64, 64) and both[0].strength == 0.5 and both[1].prompt is not None
    with pytest.raises(ValueError, match="empty mask for 'person 1'"):
        nodes.MakePerson.execute(person(1), 1.0, torch.zeros(1, 8, 8))


BOXES: dict[str, Any] = {"width": 128, "height": 64, "feather": 0, "overlap": "exclusive"}


def test_boxes_place_people_from_left_to_right() -> None:
    who = grown(person(1), person(2), person(3))
    drawn = grown({"x": 100, "y": 0, "width": 28, "height": 64}, prefix="box_")
    text = "0.4, 0, 0.6, 1\n0, 0.5, 0.25, 1"
    people = nodes.PeopleFromBoxes.execute(who, text, **BOXES, drawn=drawn).args[0]
    assert [p.identity.name for p in people] == ["person 1", "person 2", "person 3"]
    assert people[0].mask[0, 32:, :32].all() and not people[0].mask[0, :32].any()
    assert people[1].mask.mean() == pytest.approx(0.2, abs=0.01)
    assert people[2].mask[0, :, 100:].all()
    more = nodes.PeopleFromBoxes.execute(grown(person(4)), "0,0,1,1", **BOXES, people=people).args[0]
    assert len(more) == 4
    listed = nodes.PeopleFromBoxes.execute(grown(person(4)), "", **BOXES, drawn={"box_0": list(drawn.values())}).args[0]
    assert torch.equal(listed[0].mask, people[2].mask)


def test_as_many_people_as_places() -> None:
    with pytest.raises(ValueError, match="1 identities for 2 places"):
        nodes.PeopleFromBoxes.execute(grown(person(1)), "0,0,0.5,1\n0.5,0,1,1", **BOXES)
    with pytest.raises(ValueError, match="empty mask"):  # wholly behind the other
        nodes.PeopleFromBoxes.execute(
            grown(person(1), person(2)), "0,0,0.9,1\n0.2,0,0.8,1", **{**BOXES, "overlap": "priority"}
        )


EDGES: dict[str, Any] = {"grow": 1.6, "feather": 0, "overlap": "exclusive"}


def test_faces_of_a_photo_place_people(analyzer: FaceAnalyzer) -> None:
    who = grown(person(1), person(2))
    people, preview = nodes.PeopleFromPhoto.execute(couple()[None], analyzer, who, **EDGES).args
    for i, one in enumerate(people):
        box = place_of(i).int().tolist()
        assert one.identity.name == f"person {i + 1}"
        assert one.mask[0, box[1] + 8 : box[3] - 8, box[0] + 8 : box[2] - 8].float().mean() > 0.95
        assert one.mask[0].mean() < 0.3
    assert preview.shape == (1, 512, 512, 3) and not torch.equal(preview[0], couple())
    with pytest.raises(ValueError, match=r"0 face\(s\).*People from Boxes"):
        nodes.PeopleFromPhoto.execute(empty()[None], analyzer, who, **EDGES)


def test_the_map_shows_who_owns_what() -> None:
    left, right = halves()
    small = torch.zeros(1, 64, 64)
    small[:, :4, :4] = 1
    people = (Person(person(1), left), Person(person(2), right), Person(person(3), small), Person(person(4)))
    image, report = nodes.PreviewPeople.execute(people, 128, 64).args
    assert image.shape == (5, 64, 128, 3)
    assert len({tuple(image[0, y, x].tolist()) for y, x in ((40, 20), (40, 100), (2, 2))}) == 3
    lines = report.splitlines()
    assert (
        lines[0].startswith("1: person 1, red, strength 1, 50.0 %") and "stretched" in lines[1]
    )  # a square mask on a wide picture
    assert "too small" in report and lines[-1].endswith("everywhere")
    nobody = nodes.PreviewPeople.execute((Person(person(1), small),), 64, 64).args[0]
    assert torch.equal(nobody[0, 40, 40], nobody[0, 63, 63]) and float(nobody[0, 40, 40].max()) < 0.3


def test_each_person_may_have_a_prompt(base: ModelPatcher) -> None:
    left, right = halves(8, 8)
    people = (Person(person(1), left, prompt=prompt(5)), Person(person(2), right), Person(person(3), prompt=prompt(6)))
    given = nodes.PromptsOfPeople.execute(prompt(1), people, 1.0).args[0]
    assert len(given) == 3 and torch.equal(given[1][1]["mask"], left) and "mask" not in given[2][1]
    assert nodes.PromptsOfPeople.execute(prompt(1), people, 0.0).args[0][0][0].equal(prompt(1)[0][0])
    own = nodes.PromptsOfPeople.execute(prompt(1), people[:2], 1.0).args[0]
    plain, said = sample(base, steps=1), sample(base, steps=1, positive=own)
    assert close(said[..., 6:], plain[..., 6:], 1e-4) and not close(said[..., :4], plain[..., :4], 1e-2)
    assert sample(fused(base, who=cast(halves())), positive=own).isfinite().all()


@pytest.mark.parametrize("kind", ["image", "pulid"])
def test_decoupled_terms_are_weighted_by_region(base: ModelPatcher, kind: str) -> None:
    given, (left, right) = adapter(kind), halves()
    a, b = embedded(given, seed=1), embedded(given, seed=2)
    both = applied(base, given, (Person(a, left), Person(b, right, 0.5)))
    apart = applied(applied(base, given, (Person(a, left),)), given, (Person(b, right),), strength=0.5)
    assert close(sample(both), sample(apart))
    whole = (Person(a, torch.ones(1, 64, 64)),)
    assert close(sample(applied(base, given, whole)), sample(applied(base, given, a)))
    halved = (Person(a, torch.full((1, 8, 8), 0.5)),)
    assert close(sample(applied(base, given, halved)), sample(applied(base, given, a, strength=0.5)))
    assert torch.equal(sample(applied(base, given, (Person(a, left, 0.0),))), sample(base))


def first_layer(model: ModelPatcher, run: Any) -> Tensor:
    """What the first cross-attention gives in the picture's pass."""
    seen: list[Tensor] = []
    layer: Any = model.model.diffusion_model.get_submodule("input_blocks.1.1.transformer_blocks.0.attn2.to_out")
    hook = layer.register_forward_hook(lambda _m, _g, out: seen.append(out))
    try:
        run()
    finally:
        hook.remove()
    return seen[-1]


@pytest.mark.parametrize("kind", ["image", "pulid_v1_1"])
def test_a_decoupled_person_changes_nothing_inside_another_ones_mask(base: ModelPatcher, kind: str) -> None:
    given, (left, right) = adapter(kind), halves()
    outs = []
    for seed in (1, 2):
        who = (Person(embedded(given, seed=seed), left), Person(embedded(given, seed=9), right))
        outs.append(first_layer(base, lambda who=who: sample(applied(base, given, who), steps=1, cfg=1.0)))
    changed = (outs[0] != outs[1]).any(dim=-1).view(8, 8)
    assert changed[:, :4].all() and not changed[:, 4:].any()


SETTINGS: dict[str, Any] = {"reference_guidance": 0.0, "rescale": 0.0, "launch": 1000, "strength": 1.0}


def test_references_are_masked_by_region() -> None:
    model, net = loaded()
    left, right = halves()
    a, b = pictured(seed=1), pictured(seed=2)

    def shown(*people: Person, **changes: Any) -> Tensor:
        return sample(referenced(model, net, latents(seed=3), identity=tuple(people), **{**SETTINGS, **changes}))

    alone = shown(Person(a))
    assert close(alone, sample(referenced(model, net, latents(seed=3), identity=a, **SETTINGS)))
    assert close(shown(Person(a, torch.ones(1, 64, 64))), alone)
    assert close(shown(Person(a, left), Person(b, right)), alone, 1e-4)  # the same latents, once in each half
    assert not close(shown(Person(a, left)), alone, 1e-3)
    assert close(shown(Person(a, None, 0.5)), shown(Person(a), strength=0.5, strength_before=0.5), 1e-4)
    assert torch.equal(shown(Person(a, left, 0.0)), sample(model))
    guided = shown(Person(a, left), reference_guidance=3.0, launch=900)
    assert guided.isfinite().all() and not close(guided, shown(Person(a, left)), 1e-3)
    with pytest.raises(ValueError, match="people and 1 further"):
        referenced(model, net, latents(), identity=(Person(a),), others=grown(b))


def test_batched_masks_place_each_pictures_person(base: ModelPatcher) -> None:
    given, (left, right) = adapter(), halves()
    who, (model, net) = embedded(given), loaded()
    swap = torch.cat((left, right))
    for make in (
        lambda mask: sample(applied(base, given, (Person(who, mask),)), batch=3),
        lambda mask: sample(
            referenced(model, net, latents(), identity=(Person(pictured(), mask),), **SETTINGS), batch=3
        ),
    ):
        both, alone = make(swap), (make(left), make(right))
        for i in range(3):
            assert close(both[i], alone[i % 2][i], 1e-4)


def test_what_is_off_about_a_mask_is_said(base: ModelPatcher, caplog: pytest.LogCaptureFixture) -> None:
    small = torch.zeros(1, 64, 128)
    small[:, 10:14, 10:14] = 1
    with caplog.at_level(logging.WARNING):
        out = sample(fused(base, who=(Person(person(1), small),), outside="none"))
    assert out.isfinite().all() and not close(out, sample(base), 1e-4)
    said = [record.getMessage() for record in caplog.records]
    assert any("128x64 and is stretched" in line for line in said)
    assert any("covers half of no cell where layers are 8x8" in line for line in said)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        sample(fused(base, who=cast(halves())), size=(16, 16))
    assert not caplog.records


def test_a_mask_of_another_shape_is_the_same_mask_stretched(base: ModelPatcher) -> None:
    given, left = adapter(), halves()[0]
    wide = halves(64, 256)[0]
    who = embedded(given)
    assert close(sample(applied(base, given, (Person(who, wide),))), sample(applied(base, given, (Person(who, left),))))


def test_an_upstream_branch_stays_as_it_was(base: ModelPatcher) -> None:
    before = sample(base)
    first = fused(base, who=cast(halves()))
    once = sample(first)
    given = adapter()
    second = applied(first, given, (Person(embedded(given), halves()[0]),))
    assert not close(sample(second), once, 1e-3)
    assert torch.equal(sample(first), once) and torch.equal(sample(base), before)
    assert len(patch.injections(second)) == 2


def test_people_without_masks_are_the_sum_of_terms(base: ModelPatcher) -> None:
    given = adapter()
    a, b = embedded(given, seed=1), embedded(given, seed=2)
    both = applied(base, given, (Person(a), Person(b)))
    assert close(sample(both), sample(applied(applied(base, given, a), given, b)))
