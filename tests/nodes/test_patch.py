"""What all injections share: slots and foreign patches, roles of rows, windows, ComfyUI's memory management."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import comfy.ldm.modules.attention as backends
import comfy.model_management
import comfy.samplers
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfyui_likeness.nodes.attention import patch
from comfyui_likeness.nodes.attention.injection import AttentionTerm, PatchPlace, RunCache
from comfyui_likeness.nodes.attention.model_call import ModelCall
from comfyui_likeness.nodes.attention.prompt_batch import find_prompt_name
from comfyui_likeness.nodes.attention.schedule import ALWAYS_ON, SigmaWindow
from comfyui_likeness.nodes.attention.slots import AttentionSlot
from comfyui_likeness.nodes.attention.unet_layers import list_unet_layers
from support.host_models import add_controlnet, all_close, make_conditioning, make_small_model, sample_latent
from support.ip_adapters import apply_ip_adapter, make_ip_adapter, make_ip_adapter_identity


@pytest.fixture(scope="module")
def base() -> ModelPatcher:
    return make_small_model()


def test_the_window_does_not_sync_with_the_device() -> None:
    sigma = torch.full((2,), 3.0, device="meta")  # reading a meta tensor raises
    assert isinstance(SigmaWindow(14.0, 1.0).compute_gate(sigma), torch.Tensor)
    assert SigmaWindow(14.0, 1.0).compute_gate(torch.tensor([3.0])) is True
    assert SigmaWindow(14.0, 3.0).compute_gate(torch.tensor([3.0])) is False
    assert SigmaWindow(3.0, 1.0).compute_gate(torch.tensor([3.0])) is True


def test_a_gate_on_the_device_equals_a_branch(base: ModelPatcher, monkeypatch: pytest.MonkeyPatch) -> None:
    model = apply_ip_adapter(base, end_percent=0.5)
    branched = sample_latent(model, steps=4)
    monkeypatch.setattr(
        SigmaWindow, "compute_gate", lambda self, sigma: (sigma[0] > self.end_sigma) & (sigma[0] <= self.start_sigma)
    )
    assert torch.equal(sample_latent(model, steps=4), branched)


class CallRecorder(AttentionTerm):
    """An injection that adds nothing and records the model calls."""

    schedule, patchers, places = ALWAYS_ON, [], [PatchPlace("attn2", ("middle", 0), 0, False)]

    def __init__(self) -> None:
        self.run_cache, self.calls = RunCache(), []

    def prepare_states(self, call: ModelCall) -> dict[PatchPlace, None]:
        self.calls.append(call)
        return {self.places[0]: None}

    def compute_term(self, state: None, q: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        return torch.zeros_like(q)


def sample_with_guider(model: ModelPatcher, guider: Any, **prompts: Any) -> None:
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


def test_rows_are_assigned_by_the_names_of_prompts(base: ModelPatcher) -> None:
    import comfy_extras.nodes_custom_sampler as custom
    import comfy_extras.nodes_perpneg as perpneg

    pos, neg, mid = make_conditioning(1), make_conditioning(2), make_conditioning(3)
    makers = {
        "cfg": (comfy.samplers.CFGGuider, (pos, neg), [True, False]),
        "dual": (custom.Guider_DualCFG, (pos, mid, neg), [True, True, False]),
        "perpneg": (perpneg.Guider_PerpNeg, (pos, neg, mid), [True, False, False]),
    }
    for name, (make, conds, wanted) in makers.items():
        recorder = CallRecorder()
        guider = make(patch.attach_injection(base, recorder))
        guider.set_conds(*conds)
        guider.set_cfg(*([4.0, 3.0] if name != "cfg" else [4.0]))
        sample_with_guider(base, guider)
        conditional = (
            [c for call in recorder.calls[: len(wanted)] for c in call.is_conditional]
            if len(recorder.calls[0].is_conditional) < len(wanted)
            else list(recorder.calls[0].is_conditional)
        )
        assert sorted(conditional) == sorted(wanted), name


def test_foreign_patches_are_kept() -> None:
    xl = make_small_model("SDXL")
    calls: list[Any] = []

    def foreign(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        calls.append(options["block"])
        return q * 0.5

    foreign_model = xl.clone()
    foreign_model.set_model_attn2_replace(foreign, "middle", 0)  # all ten transformers of the block
    patched = apply_ip_adapter(foreign_model, make_ip_adapter(family="SDXL"))
    sample_latent(foreign_model, "SDXL", steps=1)
    expected, calls[:] = len(calls), []
    out = sample_latent(patched, "SDXL", steps=1)
    assert len(calls) == expected == 10
    assert not torch.equal(out, sample_latent(apply_ip_adapter(xl, make_ip_adapter(family="SDXL")), "SDXL", steps=1))


def test_a_foreign_patch_with_the_exact_key_is_wrapped_too(base: ModelPatcher) -> None:
    """SD1.5 has one transformer per block, which packs address with or without its depth."""
    calls: list[int] = []

    def foreign(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        calls.append(1)
        return patch.run_attention_backend(q, k, v, options)

    foreign_model = base.clone()
    foreign_model.set_model_attn2_replace(foreign, "middle", 0, 0)
    adapter = make_ip_adapter()
    identity = make_ip_adapter_identity(adapter)
    assert all_close(
        sample_latent(apply_ip_adapter(foreign_model, adapter, identity)),
        sample_latent(apply_ip_adapter(base, adapter, identity)),
    )
    assert calls


def test_changing_a_slot_in_place_raises(base: ModelPatcher) -> None:
    slot = next(iter(apply_ip_adapter(base).model_options["transformer_options"]["patches_replace"]["attn2"].values()))
    assert isinstance(slot, AttentionSlot)
    with pytest.raises(ValueError, match="before Apply Identity"):
        slot.add(lambda *a, **k: None, weight=1.0)


def test_a_call_without_wrappers_raises(base: ModelPatcher) -> None:
    model = apply_ip_adapter(base)
    options = {**model.model_options["transformer_options"], "cond_or_uncond": [0]}
    with pytest.raises(RuntimeError, match="without its wrappers"):
        model.model.diffusion_model(
            torch.zeros(1, 4, 8, 8),
            torch.tensor([1.0]),
            context=make_conditioning(1)[0][0],
            transformer_options=options,
        )


def test_the_host_loads_and_frees_the_adapter(base: ModelPatcher) -> None:
    adapter = make_ip_adapter()
    model = apply_ip_adapter(base, adapter)
    sample_latent(model)
    loaded = [m.model.model for m in comfy.model_management.current_loaded_models]
    assert any(module is adapter.patcher.model for module in loaded)
    comfy.model_management.unload_all_models()
    assert torch.equal(sample_latent(model), sample_latent(model.clone()))


def test_other_models_than_unets_raise() -> None:
    with pytest.raises(ValueError, match="expected the UNet"):
        list_unet_layers(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("backend", ["attention_pytorch", "attention_sub_quad", "attention_split", "attention_basic"])
def test_every_backend_agrees(base: ModelPatcher, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = make_ip_adapter()
    two = replace(make_ip_adapter_identity(adapter, faces=2), weight=torch.tensor([3.0, 1.0]))
    model = apply_ip_adapter(base, adapter, two)
    expected = sample_latent(model)
    monkeypatch.setattr(patch, "optimized_attention", getattr(backends, backend))
    assert all_close(sample_latent(model), expected)


def test_a_controlnet_and_the_identity_work_together(base: ModelPatcher) -> None:
    controlled = {"positive": add_controlnet(make_conditioning(1)), "negative": add_controlnet(make_conditioning(2))}
    out = sample_latent(apply_ip_adapter(base), **controlled)
    assert not all_close(out, sample_latent(base, **controlled), 1e-4)
    assert not all_close(out, sample_latent(apply_ip_adapter(base)), 1e-4)
    assert torch.equal(
        sample_latent(apply_ip_adapter(base, strength=0.0), **controlled), sample_latent(base, **controlled)
    )


def test_a_copied_prompt_keeps_its_name() -> None:
    named = {"positive": [{"uuid": 1}], "negative": [{"uuid": 2}]}
    assert find_prompt_name(named["negative"], named) == "negative"
    assert find_prompt_name([{"uuid": 2}], named) == "negative" and find_prompt_name([{"uuid": 1}], named) == "positive"
    assert find_prompt_name(None, named) == "" and find_prompt_name([{"uuid": 3}], named) == ""
