"""People: the nodes that place them, the region preview, and every Apply node with people."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfyui_likeness.likeness.spec import Person
from comfyui_likeness.nodes.attention import patch
from comfyui_likeness.nodes.loaders.face_analyzer import FaceAnalyzer
from comfyui_likeness.nodes.people import (
    MakePerson,
    PeopleFromBoxes,
    PeopleFromPhoto,
    PreviewPeople,
    PromptsOfPeople,
)
from support.flashface_models import apply_flashface, load_flashface, make_face_latents, make_flashface_identity
from support.fused_kv import apply_fused_kv, make_fused_kv_identity, make_people, make_stripe_masks
from support.host_models import all_close, make_conditioning, make_small_model, sample_latent
from support.ip_adapters import apply_ip_adapter, make_ip_adapter, make_ip_adapter_identity
from support.photos import get_couple_face_box, make_couple_photo, make_empty_photo
from torch import Tensor


@pytest.fixture(scope="module")
def base() -> ModelPatcher:
    return make_small_model()


def number_inputs(*items: Any, prefix: str = "identity_") -> dict[str, Any]:
    return {f"{prefix}{i}": item for i, item in enumerate(items)}


def test_persons_chain() -> None:
    left, right = make_stripe_masks()
    first = MakePerson.execute(make_fused_kv_identity(1), 0.5, left).args[0]
    both = MakePerson.execute(make_fused_kv_identity(2), 1.0, right[0], people=first, prompt=make_conditioning(3)).args[
        0
    ]
    assert len(first) == 1 and len(both) == 2 and both[0] is first[0]
    assert both[1].mask.shape == (1, 64, 64) and both[0].strength == 0.5 and both[1].prompt is not None
    with pytest.raises(ValueError, match="'person 1' may appear.*got a black mask"):
        MakePerson.execute(make_fused_kv_identity(1), 1.0, torch.zeros(1, 8, 8))


BOXES: dict[str, Any] = {"width": 128, "height": 64, "feather": 0, "overlap": "exclusive"}


def test_boxes_place_people_from_left_to_right() -> None:
    identities = number_inputs(make_fused_kv_identity(1), make_fused_kv_identity(2), make_fused_kv_identity(3))
    drawn = number_inputs({"x": 100, "y": 0, "width": 28, "height": 64}, prefix="box_")
    text = "0.4, 0, 0.6, 1\n0, 0.5, 0.25, 1"
    people = PeopleFromBoxes.execute(identities, text, **BOXES, drawn=drawn).args[0]
    assert [p.identity.name for p in people] == ["person 1", "person 2", "person 3"]
    assert people[0].mask[0, 32:, :32].all() and not people[0].mask[0, :32].any()
    assert people[1].mask.mean() == pytest.approx(0.2, abs=0.01)
    assert people[2].mask[0, :, 100:].all()
    more = PeopleFromBoxes.execute(number_inputs(make_fused_kv_identity(4)), "0,0,1,1", **BOXES, people=people).args[0]
    assert len(more) == 4
    listed = PeopleFromBoxes.execute(
        number_inputs(make_fused_kv_identity(4)), "", **BOXES, drawn={"box_0": list(drawn.values())}
    ).args[0]
    assert torch.equal(listed[0].mask, people[2].mask)


def test_number_of_identities_must_match_the_boxes() -> None:
    with pytest.raises(ValueError, match="1 identities for 2 boxes"):
        PeopleFromBoxes.execute(number_inputs(make_fused_kv_identity(1)), "0,0,0.5,1\n0.5,0,1,1", **BOXES)
    with pytest.raises(ValueError, match="got a black mask"):  # completely hidden by the other
        PeopleFromBoxes.execute(
            number_inputs(make_fused_kv_identity(1), make_fused_kv_identity(2)),
            "0,0,0.9,1\n0.2,0,0.8,1",
            **{**BOXES, "overlap": "priority"},
        )


EDGES: dict[str, Any] = {"grow": 1.6, "feather": 0, "overlap": "exclusive"}


def test_faces_of_a_photo_place_people(analyzer: FaceAnalyzer) -> None:
    identities = number_inputs(make_fused_kv_identity(1), make_fused_kv_identity(2))
    people, preview = PeopleFromPhoto.execute(make_couple_photo()[None], analyzer, identities, **EDGES).args
    for i, person in enumerate(people):
        box = get_couple_face_box(i).int().tolist()
        assert person.identity.name == f"person {i + 1}"
        assert person.mask[0, box[1] + 8 : box[3] - 8, box[0] + 8 : box[2] - 8].float().mean() > 0.95
        assert person.mask[0].mean() < 0.3
    assert preview.shape == (1, 512, 512, 3) and not torch.equal(preview[0], make_couple_photo())
    with pytest.raises(ValueError, match=r"0 face\(s\).*People from Boxes"):
        PeopleFromPhoto.execute(make_empty_photo()[None], analyzer, identities, **EDGES)


def test_region_map_and_report() -> None:
    left, right = make_stripe_masks()
    small = torch.zeros(1, 64, 64)
    small[:, :4, :4] = 1
    people = (
        Person(make_fused_kv_identity(1), left),
        Person(make_fused_kv_identity(2), right),
        Person(make_fused_kv_identity(3), small),
        Person(make_fused_kv_identity(4)),
    )
    image, report = PreviewPeople.execute(people, 128, 64).args
    assert image.shape == (5, 64, 128, 3)
    assert len({tuple(image[0, y, x].tolist()) for y, x in ((40, 20), (40, 100), (2, 2))}) == 3
    lines = report.splitlines()
    assert (
        lines[0].startswith("1: person 1, red, strength 1, 50.0 %") and "stretched" in lines[1]
    )  # a square mask on a wide image
    assert "too small" in report and lines[-1].endswith("whole image")
    region_map = PreviewPeople.execute((Person(make_fused_kv_identity(1), small),), 64, 64).args[0]
    assert torch.equal(region_map[0, 40, 40], region_map[0, 63, 63]) and float(region_map[0, 40, 40].max()) < 0.3


def test_prompts_of_people_are_masked(base: ModelPatcher) -> None:
    left, right = make_stripe_masks(8, 8)
    people = (
        Person(make_fused_kv_identity(1), left, prompt=make_conditioning(5)),
        Person(make_fused_kv_identity(2), right),
        Person(make_fused_kv_identity(3), prompt=make_conditioning(6)),
    )
    conditioning = PromptsOfPeople.execute(make_conditioning(1), people, 1.0).args[0]
    assert len(conditioning) == 3 and torch.equal(conditioning[1][1]["mask"], left)
    assert "mask" not in conditioning[2][1]
    assert PromptsOfPeople.execute(make_conditioning(1), people, 0.0).args[0][0][0].equal(make_conditioning(1)[0][0])
    with_prompts = PromptsOfPeople.execute(make_conditioning(1), people[:2], 1.0).args[0]
    plain, prompted = sample_latent(base, steps=1), sample_latent(base, steps=1, positive=with_prompts)
    assert all_close(prompted[..., 6:], plain[..., 6:], 1e-4) and not all_close(prompted[..., :4], plain[..., :4], 1e-2)
    assert (
        sample_latent(apply_fused_kv(base, identity_or_people=make_people(make_stripe_masks())), positive=with_prompts)
        .isfinite()
        .all()
    )


@pytest.mark.parametrize("kind", ["image", "pulid"])
def test_decoupled_terms_are_weighted_by_region(base: ModelPatcher, kind: str) -> None:
    adapter, (left, right) = make_ip_adapter(kind), make_stripe_masks()
    a, b = make_ip_adapter_identity(adapter, seed=1), make_ip_adapter_identity(adapter, seed=2)
    both = apply_ip_adapter(base, adapter, (Person(a, left), Person(b, right, 0.5)))
    separate = apply_ip_adapter(
        apply_ip_adapter(base, adapter, (Person(a, left),)), adapter, (Person(b, right),), strength=0.5
    )
    assert all_close(sample_latent(both), sample_latent(separate))
    everywhere = (Person(a, torch.ones(1, 64, 64)),)
    assert all_close(
        sample_latent(apply_ip_adapter(base, adapter, everywhere)), sample_latent(apply_ip_adapter(base, adapter, a))
    )
    half = (Person(a, torch.full((1, 8, 8), 0.5)),)
    assert all_close(
        sample_latent(apply_ip_adapter(base, adapter, half)),
        sample_latent(apply_ip_adapter(base, adapter, a, strength=0.5)),
    )
    assert torch.equal(sample_latent(apply_ip_adapter(base, adapter, (Person(a, left, 0.0),))), sample_latent(base))


def capture_first_layer(model: ModelPatcher, run: Any) -> Tensor:
    """The output of the first cross-attention in the image's pass."""
    outputs: list[Tensor] = []
    layer: Any = model.model.diffusion_model.get_submodule("input_blocks.1.1.transformer_blocks.0.attn2.to_out")
    hook = layer.register_forward_hook(lambda _module, _args, output: outputs.append(output))
    try:
        run()
    finally:
        hook.remove()
    return outputs[-1]


@pytest.mark.parametrize("kind", ["image", "pulid_v1_1"])
def test_a_decoupled_person_has_no_effect_inside_another_mask(base: ModelPatcher, kind: str) -> None:
    adapter, (left, right) = make_ip_adapter(kind), make_stripe_masks()
    outputs = []
    for seed in (1, 2):
        people = (
            Person(make_ip_adapter_identity(adapter, seed=seed), left),
            Person(make_ip_adapter_identity(adapter, seed=9), right),
        )
        outputs.append(
            capture_first_layer(
                base, lambda people=people: sample_latent(apply_ip_adapter(base, adapter, people), steps=1, cfg=1.0)
            )
        )
    changed = (outputs[0] != outputs[1]).any(dim=-1).view(8, 8)
    assert changed[:, :4].all() and not changed[:, 4:].any()


SETTINGS: dict[str, Any] = {"reference_guidance": 0.0, "rescale": 0.0, "launch": 1000, "strength": 1.0}


def test_references_are_masked_by_region() -> None:
    model, net = load_flashface()
    left, right = make_stripe_masks()
    a, b = make_flashface_identity(seed=1), make_flashface_identity(seed=2)

    def sample_people(*people: Person, **changes: Any) -> Tensor:
        return sample_latent(
            apply_flashface(model, net, make_face_latents(seed=3), identity=tuple(people), **{**SETTINGS, **changes})
        )

    unmasked = sample_people(Person(a))
    assert all_close(
        unmasked, sample_latent(apply_flashface(model, net, make_face_latents(seed=3), identity=a, **SETTINGS))
    )
    assert all_close(sample_people(Person(a, torch.ones(1, 64, 64))), unmasked)
    assert all_close(
        sample_people(Person(a, left), Person(b, right)), unmasked, 1e-4
    )  # the same latents, once in each half
    assert not all_close(sample_people(Person(a, left)), unmasked, 1e-3)
    assert all_close(
        sample_people(Person(a, None, 0.5)), sample_people(Person(a), strength=0.5, strength_before=0.5), 1e-4
    )
    assert torch.equal(sample_people(Person(a, left, 0.0)), sample_latent(model))
    guided = sample_people(Person(a, left), reference_guidance=3.0, launch=900)
    assert guided.isfinite().all() and not all_close(guided, sample_people(Person(a, left)), 1e-3)
    with pytest.raises(ValueError, match="people and 1 more identities"):
        apply_flashface(model, net, make_face_latents(), identity=(Person(a),), others=number_inputs(b))


def test_batched_masks_apply_to_their_images(base: ModelPatcher) -> None:
    adapter, (left, right) = make_ip_adapter(), make_stripe_masks()
    identity, (model, net) = make_ip_adapter_identity(adapter), load_flashface()
    alternating = torch.cat((left, right))
    for make in (
        lambda mask: sample_latent(apply_ip_adapter(base, adapter, (Person(identity, mask),)), batch_size=3),
        lambda mask: sample_latent(
            apply_flashface(
                model, net, make_face_latents(), identity=(Person(make_flashface_identity(), mask),), **SETTINGS
            ),
            batch_size=3,
        ),
    ):
        both, alone = make(alternating), (make(left), make(right))
        for i in range(3):
            assert all_close(both[i], alone[i % 2][i], 1e-4)


def test_problems_of_masks_are_logged(base: ModelPatcher, caplog: pytest.LogCaptureFixture) -> None:
    small = torch.zeros(1, 64, 128)
    small[:, 10:14, 10:14] = 1
    with caplog.at_level(logging.WARNING):
        output = sample_latent(
            apply_fused_kv(base, identity_or_people=(Person(make_fused_kv_identity(1), small),), outside="none")
        )
    assert output.isfinite().all() and not all_close(output, sample_latent(base), 1e-4)
    messages = [record.getMessage() for record in caplog.records]
    assert any("128x64 and is stretched" in line for line in messages)
    assert any("covers no cell of the 8x8 latent grid by half" in line for line in messages)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        sample_latent(apply_fused_kv(base, identity_or_people=make_people(make_stripe_masks())), size=(16, 16))
    assert not caplog.records


def test_masks_of_another_shape_are_stretched(base: ModelPatcher) -> None:
    adapter, left = make_ip_adapter(), make_stripe_masks()[0]
    wide = make_stripe_masks(64, 256)[0]
    identity = make_ip_adapter_identity(adapter)
    assert all_close(
        sample_latent(apply_ip_adapter(base, adapter, (Person(identity, wide),))),
        sample_latent(apply_ip_adapter(base, adapter, (Person(identity, left),))),
    )


def test_the_upstream_branch_is_unchanged(base: ModelPatcher) -> None:
    before = sample_latent(base)
    first = apply_fused_kv(base, identity_or_people=make_people(make_stripe_masks()))
    once = sample_latent(first)
    adapter = make_ip_adapter()
    second = apply_ip_adapter(first, adapter, (Person(make_ip_adapter_identity(adapter), make_stripe_masks()[0]),))
    assert not all_close(sample_latent(second), once, 1e-3)
    assert torch.equal(sample_latent(first), once) and torch.equal(sample_latent(base), before)
    assert len(patch.get_injections(second)) == 2


def test_people_without_masks_add_up(base: ModelPatcher) -> None:
    adapter = make_ip_adapter()
    a, b = make_ip_adapter_identity(adapter, seed=1), make_ip_adapter_identity(adapter, seed=2)
    both = apply_ip_adapter(base, adapter, (Person(a), Person(b)))
    assert all_close(
        sample_latent(both), sample_latent(apply_ip_adapter(apply_ip_adapter(base, adapter, a), adapter, b))
    )
