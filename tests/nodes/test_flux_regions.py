"""Regions in FLUX: which tokens of the text, the image and reference images get a person's term."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfyui_likeness.likeness.spec import Person
from comfyui_likeness.nodes.attention import flux_terms
from comfyui_likeness.nodes.attention.injection import AttentionTerm, PatchPlace
from comfyui_likeness.nodes.attention.model_call import ModelCall
from comfyui_likeness.nodes.attention.patch import attach_injection, get_injections
from support.flux_adapters import (
    FLUX_ADAPTER_KINDS,
    FLUX_FAMILY,
    HOST_PASSES_QUERIES,
    LATENT_SIZE,
    NUM_DOUBLE_BLOCKS,
    OMNI_ID_KIND,
    QueryRecorder,
    apply_flux_adapter,
    make_flux_adapter,
    make_flux_identity,
    sample_flux_latent,
)
from support.host_models import all_close, make_conditioning, make_small_model
from torch import Tensor

pytestmark = pytest.mark.skipif(
    not HOST_PASSES_QUERIES, reason="this ComfyUI does not pass the queries of FLUX to patches"
)


@pytest.fixture(scope="module")
def base() -> ModelPatcher:
    return make_small_model(FLUX_FAMILY)


def make_two_people(kind: str, size: tuple[int, int] = LATENT_SIZE) -> tuple[Person, ...]:
    """Two people, one in each half of the image."""
    left = torch.zeros(1, 8 * size[0], 8 * size[1])
    left[:, :, : 4 * size[1]] = 1
    return Person(make_flux_identity(kind, seed=1), left), Person(make_flux_identity(kind, seed=2), 1 - left)


@pytest.mark.parametrize("kind", FLUX_ADAPTER_KINDS)
def test_no_term_is_added_inside_another_persons_region(base: ModelPatcher, kind: str) -> None:
    first, second = make_two_people(kind)
    layer = {"custom_layers": "0:1"}
    captured: list[Tensor] = []

    def record(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        captured.append(args["img"].clone().view(1, LATENT_SIZE[0] // 2, LATENT_SIZE[1] // 2, -1))
        return extra["original_block"](args)

    for visible in ((), (first,), (first, second)):
        model = apply_flux_adapter(base, make_flux_adapter(kind), visible, **layer).clone() if visible else base.clone()
        model.set_model_patch_replace(record, "dit", "double_block", 1)
        sample_flux_latent(model, steps=1)
    none, one, both = captured
    half = LATENT_SIZE[1] // 4
    assert torch.equal(one[:, :, half:], none[:, :, half:])
    assert not all_close(one[:, :, :half], none[:, :, :half], 1e-3)
    assert torch.equal(both[:, :, :half], one[:, :, :half])
    assert not all_close(both[:, :, half:], none[:, :, half:], 1e-3)


@pytest.mark.parametrize("kind", FLUX_ADAPTER_KINDS)
def test_regions_with_references_batches_and_odd_sizes(base: ModelPatcher, kind: str) -> None:
    latents = [torch.randn(1, 16, 6, 6, generator=torch.Generator().manual_seed(3))]
    settings = {"positive": make_conditioning(1, FLUX_FAMILY, reference_latents=latents), "size": (9, 11), "cfg": 3.0}
    people = make_two_people(kind, (9, 11))
    both = sample_flux_latent(apply_flux_adapter(base, make_flux_adapter(kind), people), batch_size=2, **settings)
    assert all_close(
        both[:1], sample_flux_latent(apply_flux_adapter(base, make_flux_adapter(kind), people), **settings)
    )
    assert not all_close(
        both,
        sample_flux_latent(apply_flux_adapter(base, make_flux_adapter(kind), people[:1]), batch_size=2, **settings),
        1e-3,
    )


def test_regions_do_not_cover_text_tokens(base: ModelPatcher) -> None:
    """InstantX also adds to the text tokens, which no region covers."""
    adapter, (first, _) = make_flux_adapter("instantx"), make_two_people("instantx")
    place = PatchPlace(flux_terms.FLUX_JOINT_ATTENTION, ("single", 0))
    custom_layers = f"{NUM_DOUBLE_BLOCKS}:1"
    unmasked, masked = (
        get_injections(apply_flux_adapter(base, adapter, person, custom_layers=custom_layers))[0]
        for person in ((Person(first.identity),), (first,))
    )
    captured: list[Tensor] = []

    class TermRecorder(QueryRecorder):
        def compute_term(self, state: Any, q: Tensor, options: dict[str, Any]) -> Tensor:
            call = ModelCall(("positive",), (0,), q.dtype, q.device, torch.ones(1))
            for injection in (unmasked, masked):
                assert isinstance(injection, AttentionTerm)
                captured.append(injection.compute_term(injection.prepare_states(call)[place], q, options))
            return torch.zeros_like(captured[0])

    sample_flux_latent(attach_injection(base, TermRecorder(place)), steps=1)
    assert not (captured[0][:, :7] == 0).any() and (captured[1][:, :7] == 0).all()
    images = [one[:, 7:].view(1, LATENT_SIZE[0] // 2, LATENT_SIZE[1] // 2, -1) for one in captured]
    assert torch.equal(images[0][:, :, : LATENT_SIZE[1] // 4], images[1][:, :, : LATENT_SIZE[1] // 4])
    assert (images[1][:, :, LATENT_SIZE[1] // 4 :] == 0).all()


def test_area_prompts_with_regions_raise(base: ModelPatcher) -> None:
    areas = make_conditioning(1, FLUX_FAMILY, area=(4, 4, 0, 0), strength=1.0)
    assert not all_close(
        sample_flux_latent(apply_flux_adapter(base), positive=areas), sample_flux_latent(base, positive=areas), 1e-4
    )
    with pytest.raises(ValueError, match="expected the full image"):
        sample_flux_latent(apply_flux_adapter(base, identity_or_people=make_two_people(OMNI_ID_KIND)), positive=areas)
