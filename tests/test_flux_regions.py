"""Regions in FLUX: where a person's terms count among the tokens of text, picture and reference pictures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfyui_likeness.likeness.spec import Person
from comfyui_likeness.nodes.attention import dit
from comfyui_likeness.nodes.attention.injection import Call, Place
from comfyui_likeness.nodes.attention.patch import attach, injections
from fluxes import DOUBLES, FAMILY, KINDS, OMNI, SHOWN, SIZE, Recorder, adapter, applied, person, sample
from models import close, patcher, prompt
from torch import Tensor

pytestmark = pytest.mark.skipif(not SHOWN, reason="the host shows FLUX's queries to no patch")


@pytest.fixture(scope="module")
def base() -> ModelPatcher:
    return patcher(FAMILY)


def people(kind: str, size: tuple[int, int] = SIZE) -> tuple[Person, ...]:
    """Two people, one in either half of the picture."""
    left = torch.zeros(1, 8 * size[0], 8 * size[1])
    left[:, :, : 4 * size[1]] = 1
    return Person(person(kind, seed=1), left), Person(person(kind, seed=2), 1 - left)


@pytest.mark.parametrize("kind", KINDS)
def test_inside_the_others_region_nothing_of_a_person_is_added(base: ModelPatcher, kind: str) -> None:
    first, second = people(kind)
    layer = {"custom_layers": "0:1"}
    seen: list[Tensor] = []

    def look(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        seen.append(args["img"].clone().view(1, SIZE[0] // 2, SIZE[1] // 2, -1))
        return extra["original_block"](args)

    for who in ((), (first,), (first, second)):
        model = applied(base, adapter(kind), who, **layer).clone() if who else base.clone()
        model.set_model_patch_replace(look, "dit", "double_block", 1)
        sample(model, steps=1)
    none, one, both = seen
    half = SIZE[1] // 4
    assert torch.equal(one[:, :, half:], none[:, :, half:])
    assert not close(one[:, :, :half], none[:, :, :half], 1e-3)
    assert torch.equal(both[:, :, :half], one[:, :, :half])
    assert not close(both[:, :, half:], none[:, :, half:], 1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_regions_with_references_batches_and_odd_sizes(base: ModelPatcher, kind: str) -> None:
    latents = [torch.randn(1, 16, 6, 6, generator=torch.Generator().manual_seed(3))]
    given = {"positive": prompt(1, FAMILY, reference_latents=latents), "size": (9, 11), "cfg": 3.0}
    who = people(kind, (9, 11))
    both = sample(applied(base, adapter(kind), who), batch=2, **given)
    assert close(both[:1], sample(applied(base, adapter(kind), who), **given))
    assert not close(both, sample(applied(base, adapter(kind), who[:1]), batch=2, **given), 1e-3)


def test_a_region_leaves_the_text_alone(base: ModelPatcher) -> None:
    """InstantX adds to the text's tokens too, which lie in no region."""
    given, (first, _) = adapter("instantx"), people("instantx")
    place, only = Place(dit.EVERYTHING, ("single", 0)), {"custom_layers": f"{DOUBLES}:1"}
    whole, masked = (injections(applied(base, given, who, **only))[0] for who in ((Person(first.identity),), (first,)))
    seen: list[Tensor] = []

    class Watched(Recorder):
        def term(self, state: Any, q: Tensor, options: dict[str, Any]) -> Tensor:
            call = Call(("positive",), 1, q.dtype, q.device, torch.ones(1), None, None)
            seen.extend(one.term(one.prepare(call)[place], q, options) for one in (whole, masked))
            return torch.zeros_like(seen[0])

    sample(attach(base, Watched(place)), steps=1)
    assert not (seen[0][:, :7] == 0).any() and (seen[1][:, :7] == 0).all()
    own = [one[:, 7:].view(1, SIZE[0] // 2, SIZE[1] // 2, -1) for one in seen]
    assert torch.equal(own[0][:, :, : SIZE[1] // 4], own[1][:, :, : SIZE[1] // 4])
    assert (own[1][:, :, SIZE[1] // 4 :] == 0).all()


def test_a_prompt_for_an_area_and_a_region_do_not_go_together(base: ModelPatcher) -> None:
    areas = prompt(1, FAMILY, area=(4, 4, 0, 0), strength=1.0)
    assert not close(sample(applied(base), positive=areas), sample(base, positive=areas), 1e-4)
    with pytest.raises(ValueError, match="expected prompts for the whole picture"):
        sample(applied(base, who=people(OMNI)), positive=areas)
