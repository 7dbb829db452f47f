"""What every injection may rely on: slots beside foreign patches, rows told apart, windows, the host's memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import comfy.ldm.modules.attention as backends
import comfy.model_management
import comfy.samplers
import pytest
import torch
from adapters import adapter, applied, person
from comfy.model_patcher import ModelPatcher
from comfyui_likeness.nodes.attention import patch
from comfyui_likeness.nodes.attention.injection import Bank, Call, Place, Term, Window
from comfyui_likeness.nodes.attention.patch import Slot
from comfyui_likeness.nodes.attention.unet import sites
from models import close, controlnet, patcher, prompt, sample


@pytest.fixture(scope="module")
def base() -> ModelPatcher:
    return patcher()


def test_the_window_never_asks_an_accelerator() -> None:
    sigma = torch.full((2,), 3.0, device="meta")  # reading a meta tensor raises, as a device sync would stall
    assert isinstance(Window(14.0, 1.0).gate(sigma), torch.Tensor)
    assert Window(14.0, 1.0).gate(torch.tensor([3.0])) is True
    assert Window(14.0, 3.0).gate(torch.tensor([3.0])) is False
    assert Window(3.0, 1.0).gate(torch.tensor([3.0])) is True


def test_a_gate_on_the_device_does_what_a_branch_does(base: ModelPatcher, monkeypatch: pytest.MonkeyPatch) -> None:
    model = applied(base, end_percent=0.5)
    branched = sample(model, steps=4)
    monkeypatch.setattr(Window, "gate", lambda self, sigma: (sigma[0] > self.end) & (sigma[0] <= self.start))
    assert torch.equal(sample(model, steps=4), branched)


class Recorder(Term):
    """An injection that adds nothing and notes which rows carry the identity."""

    window, patchers, places = Window(1e9, -1.0), [], [Place("attn2", ("middle", 0), 0, False)]

    def __init__(self) -> None:
        self.bank, self.calls = Bank(), []

    def prepare(self, call: Call) -> dict[Place, None]:
        self.calls.append(call)
        return {self.places[0]: None}

    def term(self, state: None, q: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        return torch.zeros_like(q)


def guided(model: ModelPatcher, guider: Any, **prompts: Any) -> None:
    guider.set_conds(*prompts.values()) if prompts else None
    noise = torch.randn(1, 4, 8, 8)
    with torch.inference_mode():
        guider.sample(
            noise,
            torch.zeros_like(noise),
            comfy.samplers.sampler_object("euler"),
            torch.tensor([14.0, 7.0, 0.0]),
            disable_pbar=True,
            seed=1,
        )


def test_rows_are_told_apart_by_their_prompts_name(base: ModelPatcher) -> None:
    import comfy_extras.nodes_custom_sampler as custom
    import comfy_extras.nodes_perpneg as perpneg

    pos, neg, mid = prompt(1), prompt(2), prompt(3)
    makers = {
        "cfg": (comfy.samplers.CFGGuider, (pos, neg), [True, False]),
        "dual": (custom.Guider_DualCFG, (pos, mid, neg), [True, True, False]),
        "perpneg": (perpneg.Guider_PerpNeg, (pos, neg, mid), [True, False, False]),
    }
    for name, (make, conds, wanted) in makers.items():
        recorder = Recorder()
        guider = make(patch.attach(base, recorder))
        guider.set_conds(*conds)
        guider.set_cfg(*([4.0, 3.0] if name != "cfg" else [4.0]))
        guided(base, guider)
        seen = (
            [c for call in recorder.calls[: len(wanted)] for c in call.conditional]
            if len(recorder.calls[0].conditional) < len(wanted)
            else list(recorder.calls[0].conditional)
        )
        assert sorted(seen) == sorted(wanted), name


def test_foreign_patches_are_kept() -> None:
    xl = patcher("SDXL")
    calls: list[Any] = []

    def foreign(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        calls.append(options["block"])
        return q * 0.5

    theirs = xl.clone()
    theirs.set_model_attn2_replace(foreign, "middle", 0)  # the whole block: all ten transformers
    ours = applied(theirs, adapter(family="SDXL"))
    sample(theirs, "SDXL", steps=1)
    expected, calls[:] = len(calls), []
    out = sample(ours, "SDXL", steps=1)
    assert len(calls) == expected == 10
    assert not torch.equal(out, sample(applied(xl, adapter(family="SDXL")), "SDXL", steps=1))


def test_a_foreign_patch_with_the_exact_key_is_wrapped_too(base: ModelPatcher) -> None:
    """SD1.5 has one transformer a block, which packs name with its depth or without."""
    seen: list[int] = []

    def foreign(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        seen.append(1)
        return patch.host_attention(q, k, v, options)

    theirs = base.clone()
    theirs.set_model_attn2_replace(foreign, "middle", 0, 0)
    given = adapter()
    who = person(given)
    assert close(sample(applied(theirs, given, who)), sample(applied(base, given, who)))
    assert seen


def test_a_pack_that_would_change_a_slot_is_told_what_to_do(base: ModelPatcher) -> None:
    slot = next(iter(applied(base).model_options["transformer_options"]["patches_replace"]["attn2"].values()))
    assert isinstance(slot, Slot)
    with pytest.raises(ValueError, match="before Apply Identity"):
        slot.add(lambda *a, **k: None, weight=1.0)


def test_wrappers_are_missed_loudly(base: ModelPatcher) -> None:
    model = applied(base)
    options = {**model.model_options["transformer_options"], "cond_or_uncond": [0]}
    with pytest.raises(RuntimeError, match="without its wrappers"):
        model.model.diffusion_model(
            torch.zeros(1, 4, 8, 8), torch.tensor([1.0]), context=prompt(1)[0][0], transformer_options=options
        )


def test_the_host_loads_and_frees_the_adapter(base: ModelPatcher) -> None:
    given = adapter()
    model = applied(base, given)
    sample(model)
    loaded = [m.model.model for m in comfy.model_management.current_loaded_models]
    assert any(module is given.patcher.model for module in loaded)
    comfy.model_management.unload_all_models()
    assert torch.equal(sample(model), sample(model.clone()))


def test_a_model_that_is_no_unet_is_refused() -> None:
    with pytest.raises(ValueError, match="expected the UNet"):
        sites(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("backend", ["attention_pytorch", "attention_sub_quad", "attention_split", "attention_basic"])
def test_every_backend_agrees(base: ModelPatcher, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = adapter()
    two = replace(person(given, faces=2), weight=torch.tensor([3.0, 1.0]))
    model = applied(base, given, two)
    expected = sample(model)
    monkeypatch.setattr(patch, "optimized_attention", getattr(backends, backend))
    assert close(sample(model), expected)


def test_a_controlnet_and_the_identity_work_together(base: ModelPatcher) -> None:
    controlled = {"positive": controlnet(prompt(1)), "negative": controlnet(prompt(2))}
    out = sample(applied(base), **controlled)
    assert not close(out, sample(base, **controlled), 1e-4)
    assert not close(out, sample(applied(base)), 1e-4)
    assert torch.equal(sample(applied(base, strength=0.0), **controlled), sample(base, **controlled))


def test_a_copied_prompt_keeps_its_name() -> None:
    named = {"positive": [{"uuid": 1}], "negative": [{"uuid": 2}]}
    assert patch._name(named["negative"], named) == "negative"
    assert patch._name([{"uuid": 2}], named) == "negative" and patch._name([{"uuid": 1}], named) == "positive"
    assert patch._name(None, named) == "" and patch._name([{"uuid": 3}], named) == ""
