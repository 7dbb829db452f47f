"""The invariants of every apply node, on the real host, for reference attention."""

from __future__ import annotations

import copy
from typing import Any

import comfy.model_management
import comfy.samplers
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfyui_likeness.nodes.attention import patch, reference
from comfyui_likeness.nodes.attention.reference import Reference
from comfyui_likeness.nodes.loaders.flashface import ModelAsReferenceNet
from comfyui_likeness.nodes.types import LoadedReferenceNet
from flashfaces import Latents, latents, loaded, look, person, referenced
from models import close, controlnet, patcher, prompt, sample
from torch import Tensor

PLAIN: dict[str, Any] = {"reference_guidance": 0.0, "rescale": 0.0, "launch": 1000}


@pytest.fixture(scope="module")
def model() -> ModelPatcher:
    return loaded()[0]


@pytest.fixture
def net() -> LoadedReferenceNet:
    found = loaded()[1]
    found.bank.clear()
    return found


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of references of every pass of a reference net."""
    seen: list[int] = []
    real = reference.inputs

    def counting(unet: Any, x: Tensor, *args: Any) -> Any:
        seen.append(len(x))
        return real(unet, x, *args)

    monkeypatch.setattr(reference, "inputs", counting)
    return seen


@pytest.mark.parametrize("changes", [{"strength": 0.0}, {"start_percent": 0.5, "end_percent": 0.5}])
def test_nothing_asked_is_nothing_done(model: ModelPatcher, net: LoadedReferenceNet, changes: dict[str, Any]) -> None:
    assert torch.equal(sample(referenced(model, net, **changes)), sample(model))


def test_the_reference_is_seen_and_upstream_stays_untouched(model: ModelPatcher, net: LoadedReferenceNet) -> None:
    before = sample(model)
    first = referenced(model, net)
    once = sample(first)
    second = referenced(first, net, latents(seed=3))
    assert not close(once, before, 1e-3)
    assert not torch.equal(sample(second), once)
    assert torch.equal(sample(first), once)
    assert torch.equal(sample(model), before)


def test_clones_that_copy_deeply_share_the_weights(model: ModelPatcher, net: LoadedReferenceNet) -> None:
    first = referenced(model, net)
    deep = first.clone()
    deep.model_options = copy.deepcopy(first.model_options)
    assert torch.equal(sample(deep), sample(first))
    assert patch.injections(deep) == patch.injections(first)


def test_applying_twice_is_the_sum(model: ModelPatcher, net: LoadedReferenceNet) -> None:
    once = referenced(model, net, strength=1.0, **PLAIN)
    twice = referenced(referenced(model, net, strength=0.4, **PLAIN), net, strength=0.6, **PLAIN)
    assert close(sample(twice), sample(once))
    guided = {"strength": 0.8, "rescale": 0.0}
    once = referenced(model, net, reference_guidance=3.0, **guided)
    twice = referenced(referenced(model, net, reference_guidance=1.0, **guided), net, reference_guidance=2.0, **guided)
    assert close(sample(twice, start_step=1, steps=4), sample(once, start_step=1, steps=4), 1e-4)


def test_mixing_is_the_weighted_sum(model: ModelPatcher, net: LoadedReferenceNet) -> None:
    """Supplement, Eq. 1: the weights of several people sum to 1."""
    both = torch.cat((latents(seed=1), latents(seed=2)))

    class Two(Latents):
        def encode(self, pictures: Tensor) -> Tensor:
            self.latents, now = self.latents[1:], self.latents[:1]
            return now / 0.18215

    settings = {"strength": 1.0, "start_percent": 0.0, "end_percent": 1.0, "show_at_least": 1, **PLAIN}
    mixed = reference.ApplyReference.execute(
        model, net, person(), Two(both), others={"identity_0": person(seed=1)}, weights="3, 7", **settings
    ).args[0]
    stacked = referenced(model, net, both[:1], strength=0.3, strength_before=0.3, **PLAIN)
    stacked = referenced(stacked, net, both[1:], strength=0.7, strength_before=0.7, **PLAIN)
    assert close(sample(mixed), sample(stacked))


def test_windows_that_touch_make_the_whole(model: ModelPatcher, net: LoadedReferenceNet) -> None:
    early, late = {"end_percent": 0.5}, {"start_percent": 0.5}
    halves = referenced(referenced(model, net, **early), net, **late)
    assert torch.equal(sample(halves, steps=4), sample(referenced(model, net), steps=4))
    tail = {"steps": 4, "start_step": 2, "last_step": 4}
    assert torch.equal(sample(referenced(model, net, **early), **tail), sample(model, **tail))
    assert not torch.equal(sample(referenced(model, net, **late), **tail), sample(model, **tail))


@pytest.mark.parametrize("size", [(8, 8), (9, 11), (7, 16)], ids=str)
def test_batches_and_odd_sizes(model: ModelPatcher, net: LoadedReferenceNet, size: tuple[int, int]) -> None:
    ours = referenced(model, net, latents(2))
    both = sample(ours, batch=2, size=size)
    assert both.isfinite().all()
    assert close(both[:1], sample(ours, size=size), 1e-4)


@pytest.mark.parametrize("faces", [1, 3, 4, 5, 8])
def test_any_number_of_references(model: ModelPatcher, net: LoadedReferenceNet, faces: int) -> None:
    shown = referenced(model, net, latents(faces), show_at_least=4)
    injection = patch.injections(shown)[-1]
    assert isinstance(injection, Reference) and len(injection.people[0].order) == max(faces, 4)
    assert not close(sample(shown), sample(model), 1e-3)


def test_repeats_weigh_more_and_are_read_once(model: ModelPatcher, net: LoadedReferenceNet, passes: list[int]) -> None:
    four = sample(referenced(model, net, show_at_least=4))
    assert passes == [1, 1]  # two steps
    assert close(four, sample(referenced(model, net, latents().expand(4, -1, -1, -1))), 1e-4)
    assert not close(four, sample(referenced(model, net)), 1e-4)


def test_one_pass_a_step_serves_all_rows_and_no_later_picture_needs_one(
    model: ModelPatcher, net: LoadedReferenceNet, passes: list[int]
) -> None:
    ours = referenced(model, net, latents(2))
    first = sample(ours, steps=3, batch=2)
    assert passes == [2] * 3
    assert torch.equal(sample(ours, steps=3, batch=2), first)
    sample(ours, steps=3, positive=prompt(8))
    assert torch.equal(sample(referenced(model, net, latents(2)), steps=3, batch=2), first)  # the node ran again
    assert passes == [2] * 3
    sample(ours, steps=3, negative=prompt(9))
    assert passes == [2] * 6  # it reads the negative prompt
    net.bank.clear()
    assert torch.equal(sample(ours, steps=3, batch=2), first)


def test_a_second_pass_at_half_the_noise(model: ModelPatcher, net: LoadedReferenceNet, passes: list[int]) -> None:
    ours = referenced(model, net)
    sample(ours, steps=4)
    sample(ours, steps=4, start_step=2, size=(16, 16))
    assert len(passes) == 4  # the same noise levels


@pytest.mark.parametrize(("refresh", "wanted"), [(1, 6), (2, 3), (3, 2), (50, 1)])
def test_refresh(model: ModelPatcher, net: LoadedReferenceNet, passes: list[int], refresh: int, wanted: int) -> None:
    ours = referenced(model, net, refresh=refresh)
    first = sample(ours, steps=6)
    assert len(passes) == wanted
    assert torch.equal(sample(ours, steps=6), first) and len(passes) == wanted
    exact = sample(referenced(model, net), steps=6)
    assert torch.equal(first, exact) == (refresh == 1)


def test_what_the_launch_changes(model: ModelPatcher, net: LoadedReferenceNet) -> None:
    x, (positive, negative) = torch.randn(1, 4, 8, 8), (prompt(1)[0][0], prompt(2)[0][0])

    def rows(ours: ModelPatcher, t: int) -> list[Tensor]:
        return look(ours, x, t, positive, negative)[1]

    guided = referenced(model, net, launch=600)
    plain = {t: rows(model, t) for t in (601, 600)}
    before, after = rows(guided, 601), rows(guided, 600)
    assert len(before) == 2 and not any(torch.equal(a, b) for a, b in zip(before, plain[601], strict=True))
    assert len(after) == 3  # the prompts' own rows see no reference, to the bit
    assert close(after[0], plain[600][0], 1e-6) and close(after[1], plain[600][1], 1e-6)
    assert not close(after[2], after[0], 1e-3)
    unguided = rows(referenced(model, net, launch=600, reference_guidance=0.0), 600)
    assert len(unguided) == 2 and not any(close(a, b, 1e-3) for a, b in zip(unguided, plain[600], strict=True))


def test_cfg_1_needs_no_negative_rows(model: ModelPatcher, net: LoadedReferenceNet) -> None:
    ours = referenced(model, net, launch=1000)
    out = sample(ours, cfg=1.0)
    assert out.isfinite().all() and not close(out, sample(model, cfg=1.0), 1e-3)


def test_other_guiders(model: ModelPatcher, net: LoadedReferenceNet) -> None:
    import comfy_extras.nodes_custom_sampler as custom
    import comfy_extras.nodes_perpneg as perpneg

    noise, sampler = torch.randn(1, 4, 8, 8), comfy.samplers.sampler_object("euler")

    def run(guider: Any) -> Tensor:
        with torch.inference_mode():
            sigmas = torch.tensor([14.0, 3.0, 0.0])
            return guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, disable_pbar=True, seed=1)

    def dual(model: ModelPatcher) -> Any:
        guider = custom.Guider_DualCFG(model)
        guider.set_conds(prompt(1), prompt(3), prompt(2))
        guider.set_cfg(4.0, 3.0)
        return guider

    def perp(model: ModelPatcher) -> Any:
        guider = perpneg.Guider_PerpNeg(model)
        guider.set_conds(prompt(1), prompt(2), prompt(3))
        guider.set_cfg(4.0, 1.0)
        return guider

    for make in (dual, perp):
        assert not close(run(make(referenced(model, net))), run(make(model)), 1e-3)
    basic = custom.Guider_Basic(referenced(model, net))
    basic.set_conds(prompt(1))
    with pytest.raises(ValueError, match="reference_text"):
        run(basic)
    basic = custom.Guider_Basic(referenced(model, net, reference_text=prompt(2)))
    basic.set_conds(prompt(1))
    assert run(basic).isfinite().all()


def test_other_packs_guidance_goes_on_working(model: ModelPatcher, net: LoadedReferenceNet) -> None:
    from comfy_extras.nodes_model_advanced import RescaleCFG

    def doubled(args: dict[str, Any]) -> Tensor:
        return args["denoised"] * 2

    ours = referenced(model, net)
    (rescaled,) = RescaleCFG().patch(ours, 0.7)
    (before,) = RescaleCFG().patch(model, 0.7)
    post = ours.clone()
    post.set_model_sampler_post_cfg_function(doubled)
    outs = [sample(m) for m in (ours, rescaled, referenced(before, net), post)]
    assert not close(outs[0], outs[1], 1e-3) and not close(outs[0], outs[3], 1e-3)
    assert torch.equal(outs[1], outs[2])


def test_areas_controlnets_and_half_precision(model: ModelPatcher, net: LoadedReferenceNet) -> None:
    ours = referenced(model, net)
    areas = [*prompt(1, area=(8, 4, 0, 0), strength=1.0), *prompt(3, area=(8, 4, 0, 4), strength=1.0)]
    controlled = {"positive": controlnet(prompt(1), channel_mult=[1, 2, 4, 4])}
    for options in ({"positive": areas}, controlled):
        assert not close(sample(ours, **options), sample(model, **options), 1e-3)
    half = referenced(model, net).clone()
    half.set_model_compute_dtype(torch.bfloat16)
    assert sample(half).isfinite().all()


@pytest.mark.parametrize("error", [comfy.model_management.InterruptProcessingException, ValueError])
def test_an_interrupt_leaves_no_trace(model: ModelPatcher, net: LoadedReferenceNet, error: type[BaseException]) -> None:
    before, ours = sample(model), referenced(model, net)

    def stop(*_: Any) -> None:
        raise error

    with pytest.raises(error):
        sample(ours, callback=stop)
    assert all(len(injection.bank) == 0 for injection in patch.injections(ours))
    assert torch.equal(sample(model), before)
    whole = sample(ours)
    net.bank.clear()
    assert torch.equal(sample(ours), whole)


def test_models_that_are_loaded_in_part(
    model: ModelPatcher, net: LoadedReferenceNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU under --novram: weights stay where they are and are brought layer by layer."""
    management = comfy.model_management
    ours = referenced(model, net)
    whole = sample(ours)
    management.unload_all_models()
    net.bank.clear()
    monkeypatch.setattr(management, "is_device_cpu", lambda device: False)
    monkeypatch.setattr(management, "vram_state", management.VRAMState.NO_VRAM)
    in_part = sample(ours)
    assert all(patcher.model.model_lowvram for patcher in (model, net.patcher, net.added))
    assert torch.equal(in_part, whole)
    monkeypatch.undo()
    management.unload_all_models()
    assert torch.equal(sample(ours), whole)


def test_a_position_per_picture_and_none_afterwards(model: ModelPatcher, net: LoadedReferenceNet) -> None:
    masks = torch.zeros(2, 64, 64)
    masks[0, :32], masks[1, 32:] = 1, 1
    plain = sample(model, batch=2)
    both = sample(referenced(model, net, face_position=masks), batch=2)
    for i in (0, 1):
        alone = sample(referenced(model, net, face_position=masks[i : i + 1]), batch=2)
        assert close(both[i], alone[i]) and not close(both[1 - i], alone[1 - i], 1e-3)
    assert torch.equal(sample(model, batch=2), plain)  # another clone's channel is not ours


def test_a_box_is_the_authors_mask(model: ModelPatcher, net: LoadedReferenceNet) -> None:
    mask = torch.zeros(1, 64, 64)
    mask[:, 16:32, 24:40] = 1
    boxed = referenced(model, net, face_box="0.375, 0.25, 0.625, 0.5")
    assert torch.equal(sample(boxed), sample(referenced(model, net, face_position=mask)))
    for wrong in ("0.3, 0.1", "a, b, c, d", "0.6, 0, 0.3, 1", "0, 0, 1, 7"):
        with pytest.raises(ValueError, match="0.3, 0.1, 0.6, 0.4"):
            referenced(model, net, face_box=wrong)
    with pytest.raises(ValueError, match="one of them"):
        referenced(model, net, face_box="0, 0, 1, 1", face_position=mask)


def test_reference_only(net: LoadedReferenceNet) -> None:
    base, other = patcher(), patcher(weights=patcher().model.diffusion_model.state_dict())
    before = sample(base)
    own = ModelAsReferenceNet.execute(base).args[0]
    ours = referenced(base, own, strength=0.5, **PLAIN)
    assert torch.equal(sample(referenced(base, own, strength=0.0)), before)
    seen = sample(ours)
    assert not close(seen, before, 1e-3)
    assert close(sample(referenced(base, ModelAsReferenceNet.execute(other).args[0], strength=0.5, **PLAIN)), seen)
    twice = referenced(referenced(base, own, strength=0.2, **PLAIN), own, strength=0.3, **PLAIN)
    assert close(sample(twice), seen)
    assert torch.equal(sample(base), before)


def test_what_does_not_fit_is_refused(model: ModelPatcher, net: LoadedReferenceNet) -> None:
    base = patcher()
    with pytest.raises(ValueError, match="same Load FlashFace"):
        referenced(base, net)
    with pytest.raises(ValueError, match="two plain SD1.5 models"):
        referenced(base, ModelAsReferenceNet.execute(patcher("SDXL")).args[0])
    with pytest.raises(ValueError, match="4 channels"):
        referenced(model, net, torch.randn(1, 16, 28, 28))
    own = ModelAsReferenceNet.execute(base).args[0]
    with pytest.raises(ValueError, match="4 input channels"):
        referenced(base, own, face_position=torch.ones(1, 64, 64))
    with pytest.raises(ValueError, match="NaN"):
        referenced(model, net, face_position=torch.full((1, 64, 64), float("nan")))
    with pytest.raises(ValueError, match="include_crops"):
        who = person()
        referenced(model, net, identity=type(who)(who.name, who.box, who.kps, who.score, who.weight))
