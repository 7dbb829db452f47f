"""The invariants of every apply node, on the real host, for fused KV."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import comfy.hooks
import comfy.model_management
import comfy.sd
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfyui_likeness.likeness.spec import Person
from comfyui_likeness.nodes.attention import fused as nodes
from comfyui_likeness.nodes.attention import patch
from fuseds import adapter, fused, halves, people, person, zero_shot
from models import close, controlnet, patcher, prompt, sample
from torch import Tensor


@pytest.fixture(scope="module")
def base() -> ModelPatcher:
    return patcher()


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of faces of every pass of a face stream."""
    seen: list[int] = []
    real = nodes.inputs

    def counting(unet: Any, x: Tensor, *args: Any, **given: Any) -> Any:
        seen.append(len(x))
        return real(unet, x, *args, **given)

    monkeypatch.setattr(nodes, "inputs", counting)
    return seen


NOTHING: list[dict[str, Any]] = [
    {"strength": 0.0},
    {"start_percent": 0.5, "end_percent": 0.5},
    {"who": people([None], strength=0.0)},
]


@pytest.mark.parametrize("changes", NOTHING, ids=str)
def test_nothing_asked_is_nothing_done(base: ModelPatcher, changes: dict[str, Any]) -> None:
    assert torch.equal(sample(fused(base, **changes)), sample(base))


@pytest.mark.parametrize("noise", ["clean", "match"])
def test_the_face_is_seen_and_upstream_stays_untouched(base: ModelPatcher, noise: str) -> None:
    before, given = sample(base), adapter(noise=noise)
    first = fused(base, given)
    once = sample(first)
    second = fused(first, given, person(seed=3))
    assert not close(once, before, 1e-3)
    assert not close(sample(second), once, 1e-3)
    assert torch.equal(sample(first), once)
    assert torch.equal(sample(base), before)


def test_clones_that_copy_deeply_share_the_weights(base: ModelPatcher) -> None:
    model = fused(base)
    deep = model.clone()
    deep.model_options = copy.deepcopy(model.model_options)
    assert torch.equal(sample(deep), sample(model))
    assert patch.injections(deep) == patch.injections(model)


def test_applying_twice_is_the_sum(base: ModelPatcher) -> None:
    """A key of weight w counts as w keys, so that 0.4 and 0.6 of the same faces are 1."""
    given = adapter()
    twice = fused(fused(base, given, strength=0.4), given, strength=0.6)
    assert close(sample(twice), sample(fused(base, given)))


def test_order_does_not_matter(base: ModelPatcher) -> None:
    from adapters import adapter as other
    from adapters import applied

    a, b, c = adapter(), adapter(seed=2), other()
    first = applied(fused(fused(base, a), b, person(seed=2)), c)
    second = fused(fused(applied(base, c), b, person(seed=2)), a)
    assert close(sample(first), sample(second))


def test_regions_of_two_nodes_work_together(base: ModelPatcher) -> None:
    """Two nodes with a region each: what each queries' group sees is both nodes' rule."""
    given, who = adapter(), people(halves())
    together = fused(base, given, who, outside="none")
    apart = fused(fused(base, given, who[:1], outside="none"), given, who[1:], outside="none")
    assert close(sample(apart, size=(16, 16)), sample(together, size=(16, 16)))


def test_foreign_patches_are_kept(base: ModelPatcher) -> None:
    """What another pack's patch makes of the attention is added to what the faces make of it."""

    def foreign(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
        return patch.host_attention(q, k, v, options) + 0.1 * q

    theirs = base.clone()
    theirs.set_model_attn2_replace(foreign, "middle", 0)
    both = sample(fused(theirs))
    assert not close(both, sample(theirs), 1e-3) and not close(both, sample(fused(base)), 1e-3)

    def same(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
        return patch.host_attention(q, k, v, options)

    theirs = base.clone()
    theirs.set_model_attn2_replace(same, "middle", 0)
    assert close(sample(fused(theirs)), sample(fused(base)))


@pytest.mark.parametrize("noise", ["clean", "match"])
def test_windows_that_touch_make_the_whole(base: ModelPatcher, noise: str) -> None:
    given = adapter(noise=noise)
    early, late = {"end_percent": 0.5}, {"start_percent": 0.5}
    halved = fused(fused(base, given, **early), given, **late)
    assert torch.equal(sample(halved, steps=4), sample(fused(base, given), steps=4))
    tail = {"steps": 4, "start_step": 2, "last_step": 4}
    assert torch.equal(sample(fused(base, given, **early), **tail), sample(base, **tail))
    assert not torch.equal(sample(fused(base, given, **late), **tail), sample(base, **tail))


@pytest.mark.parametrize("family", ["SD1.5", "SDXL"])
@pytest.mark.parametrize("masked", [False, True])
def test_batches_and_odd_sizes(family: str, masked: bool) -> None:
    base = patcher(family)
    who = people(halves() if masked else [None, None])
    model = fused(base, adapter(family), who)
    for size in ((8, 8), (9, 11), (7, 16)):
        both = sample(model, family, batch=2, size=size, steps=1)
        assert both.isfinite().all()
        assert close(both[:1], sample(model, family, size=size, steps=1))
        assert not close(both, sample(base, family, batch=2, size=size, steps=1), 1e-3)


def test_each_picture_of_a_batch_has_its_own_mask(base: ModelPatcher) -> None:
    left, right = halves()
    swap = [torch.cat((left, right)), torch.cat((right, left))]
    both = sample(fused(base, adapter(), people(swap)), batch=3)
    for i, masks in enumerate(([left, right], [right, left], [left, right])):
        alone = sample(fused(base, adapter(), people(masks)), batch=3)
        assert close(both[i], alone[i])
    assert not close(both[1], both[0], 1e-3)


def test_the_negative_prompt_sees_nobody(base: ModelPatcher) -> None:
    """Its prediction is the bare model's, so that guidance pushes towards the person."""
    rows: list[Tensor] = []

    def keep(args: dict[str, Any]) -> Tensor:
        rows.append(args["uncond_denoised"])
        return args["denoised"]

    for model in (base, fused(base, who=people(halves()))):
        watched = model.clone()
        watched.set_model_sampler_post_cfg_function(keep)
        sample(watched, steps=1)
    assert close(rows[0], rows[1], 1e-6)


def test_faces_and_people_of_no_weight_are_absent(base: ModelPatcher) -> None:
    given, two = adapter(), person(faces=2)
    first = replace(
        two, box=two.box[:1], kps=two.kps[:1], score=two.score[:1], weight=two.weight[:1], crop=two.crop[:1]
    )
    without = replace(two, weight=torch.tensor([1.0, 0.0]))
    assert torch.equal(sample(fused(base, given, without)), sample(fused(base, given, first)))
    alone, absent = Person(person(seed=1)), Person(person(seed=2), strength=0.0)
    assert torch.equal(sample(fused(base, given, (alone, absent))), sample(fused(base, given, (alone,))))
    nearly = Person(person(seed=2), strength=1e-9)
    assert close(sample(fused(base, given, (alone, nearly))), sample(fused(base, given, (alone,))))


def test_unmasked_people_morph(base: ModelPatcher) -> None:
    a, b = people([None, None])
    mixed = sample(fused(base, adapter(), (a, b)))
    for one in (a, b):
        assert not close(mixed, sample(fused(base, adapter(), (one,))), 1e-3)
    assert close(mixed, sample(fused(base, adapter(), (b, a))))
    three = sample(fused(base, adapter(), (replace(a, strength=3.0), b)))
    more = sample(fused(base, adapter(), (replace(a, strength=1e4), b)))
    alone = sample(fused(base, adapter(), (replace(a, strength=1e4),)))
    assert not close(three, mixed, 1e-3)
    assert close(more, alone, 1e-2)


def test_a_clean_face_is_read_once_and_serves_later_pictures(base: ModelPatcher, passes: list[int]) -> None:
    given = adapter()
    model = fused(base, given, person(faces=2))
    first = sample(model, steps=3, batch=2)
    assert passes == [2]
    assert torch.equal(sample(model, steps=3, batch=2), first)
    assert torch.equal(sample(fused(base, given, person(faces=2)), steps=3, batch=2), first)  # the node ran again
    sample(model, steps=3, positive=prompt(8), negative=prompt(9))
    assert passes == [2]
    given.bank.clear()
    assert torch.equal(sample(model, steps=3, batch=2), first)


def test_a_matching_face_is_read_once_a_step(base: ModelPatcher, passes: list[int]) -> None:
    model = fused(base, adapter(noise="match"))
    first = sample(model, steps=3, batch=2)
    assert passes == [1] * 3
    assert torch.equal(sample(model, steps=3, batch=2), first)
    assert passes == [1] * 3


def test_a_lora_behind_the_node_reads_the_face_anew(base: ModelPatcher, passes: list[int]) -> None:
    """The bank goes by the weights that run, not by those that the node was given."""
    model = fused(base)
    plain = sample(model, steps=1)
    later = model.clone()
    key = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_v.weight"
    more = torch.randn(32, 32, generator=torch.Generator().manual_seed(1))
    later.add_patches({key: ("diff", (more,))}, 1.0)
    changed = sample(later, steps=1)
    assert passes == [1, 1] and not close(changed, plain, 1e-3)
    fresh = base.clone()
    fresh.add_patches({key: ("diff", (more,))}, 1.0)
    assert torch.equal(sample(fused(fresh), steps=1), changed)
    comfy.model_management.unload_all_models()
    assert torch.equal(sample(model, steps=1), plain)


@pytest.mark.parametrize("error", [comfy.model_management.InterruptProcessingException, ValueError])
def test_an_interrupt_leaves_no_trace(base: ModelPatcher, error: type[BaseException]) -> None:
    before, model = sample(base), fused(base, who=people(halves()))
    whole = sample(model)

    def stop(*_: Any) -> None:
        raise error

    with pytest.raises(error):
        sample(model, callback=stop)
    assert len(patch.injections(model)[0].bank) == 0
    assert torch.equal(sample(base), before)
    assert torch.equal(sample(model), whole)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_follows_the_base(base: ModelPatcher, dtype: torch.dtype) -> None:
    half = base.clone()
    half.set_model_compute_dtype(dtype)
    who = people(halves(), strength=0.7)
    out, whole = sample(fused(half, who=who), steps=1), sample(fused(base, who=who), steps=1)
    assert out.isfinite().all()
    assert float((out - whole).norm() / whole.norm()) < 0.1


def test_a_controlnet_and_the_face_work_together(base: ModelPatcher) -> None:
    controlled = {"positive": controlnet(prompt(1)), "negative": controlnet(prompt(2))}
    out = sample(fused(base), **controlled)
    assert not close(out, sample(base, **controlled), 1e-3)
    assert not close(out, sample(fused(base)), 1e-3)
    assert torch.equal(sample(fused(base, strength=0.0), **controlled), sample(base, **controlled))


def test_prompts_with_masks_and_areas(base: ModelPatcher) -> None:
    masked = prompt(1, mask=torch.ones(1, 8, 8), mask_strength=1.0)
    assert sample(fused(base, who=people(halves())), positive=masked).isfinite().all()
    areas = [*prompt(1), *prompt(3, area=(8, 4, 0, 4), strength=1.0)]
    assert sample(fused(base), positive=areas).isfinite().all()
    with pytest.raises(ValueError, match="mask instead of an area"):
        sample(fused(base, who=people(halves())), positive=areas)


@pytest.mark.parametrize("family", ["SD1.5", "SDXL"])
@pytest.mark.parametrize("noise", ["clean", "match"])
def test_zero_shot(family: str, noise: str) -> None:
    base = patcher(family)
    out = sample(fused(base, zero_shot(base, family, noise)), family)
    assert out.isfinite().all() and not close(out, sample(base, family), 1e-3)


def test_the_side_of_the_face_can_be_chosen(base: ModelPatcher) -> None:
    small = fused(base, face_size=32)
    assert not close(sample(small), sample(fused(base)), 1e-3)


def test_what_does_not_fit_is_refused(base: ModelPatcher) -> None:
    with pytest.raises(ValueError, match=r"adapter for SDXL \(70 cross-attentions up to 64 wide\); .* has 16"):
        fused(base, adapter("SDXL"))
    with pytest.raises(ValueError, match="9 input channels"):
        fused(patcher(in_channels=9))
    with pytest.raises(ValueError, match="holds no face pictures"):
        fused(base, who=replace(person(), crop=None))
    with pytest.raises(ValueError, match="faces of weight 0"):
        fused(base, who=replace(person(), weight=torch.zeros(1)))


def test_the_host_loads_and_frees_the_adapter(base: ModelPatcher) -> None:
    given = adapter()
    model = fused(base, given)
    out = sample(model)
    loaded = [m.model.model for m in comfy.model_management.current_loaded_models]
    assert any(module is given.patcher.model for module in loaded)
    comfy.model_management.unload_all_models()
    assert torch.equal(sample(model), out)


def test_models_that_are_loaded_in_part(base: ModelPatcher, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU under --novram: weights stay where they are and are brought layer by layer."""
    management, given = comfy.model_management, adapter()
    model = fused(base, given)
    whole = sample(model)
    management.unload_all_models()
    given.bank.clear()
    monkeypatch.setattr(management, "is_device_cpu", lambda device: False)
    monkeypatch.setattr(management, "vram_state", management.VRAMState.NO_VRAM)
    in_part = sample(model)
    assert base.model.model_lowvram and given.patcher.model.model_lowvram
    assert torch.equal(in_part, whole)
    monkeypatch.undo()
    management.unload_all_models()


def test_a_prompts_own_lora_reads_the_face_too(base: ModelPatcher) -> None:
    """LoRAs that the host hooks to a prompt change the weights within a step: nothing is kept of the faces then."""
    name, generator = (
        "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_v",
        torch.Generator().manual_seed(1),
    )
    up, down = (torch.randn(shape, generator=generator) for shape in ((32, 4), (4, 32)))
    lora = {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}
    hooked = prompt(1, hooks=comfy.hooks.create_hook_lora(lora, 1.0, 0.0))
    given = adapter()
    both = sample(fused(base, given), positive=hooked, cfg=1.0)
    later, _ = comfy.sd.load_lora_for_models(base, None, lora, 1.0, 0.0)
    assert later is not None
    expected = sample(fused(later, adapter()), cfg=1.0)
    plain = sample(fused(base, given), cfg=1.0)
    assert close(both, expected, 1e-4) and not close(both, plain, 1e-3)


def test_reference_attention_and_fused_keys_work_together(base: ModelPatcher) -> None:
    from comfyui_likeness.nodes.loaders.flashface import ModelAsReferenceNet
    from flashfaces import latents, referenced

    net = ModelAsReferenceNet.execute(base, 64).args[0]
    settings = {"strength": 0.5, "reference_guidance": 2.0, "launch": 900}
    first = fused(referenced(base, net, latents(), **settings))
    second = referenced(fused(base), net, latents(), **settings)
    out = sample(first)
    assert close(out, sample(second), 1e-4)
    assert not close(out, sample(fused(base)), 1e-3) and not close(out, sample(referenced(base, net, latents())), 1e-3)
