"""The invariants of every apply node, on the real host, for decoupled attention."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import comfy.ldm.modules.attention as backends
import comfy.model_management
import comfy.samplers
import pytest
import torch
from adapters import adapter
from comfy.model_patcher import ModelPatcher
from comfyui_likeness.likeness import curves, decoupled
from comfyui_likeness.likeness.spec import Identity
from comfyui_likeness.nodes.attention import decoupled as nodes
from comfyui_likeness.nodes.attention import patch
from comfyui_likeness.nodes.attention.patch import Bank, Slot, Window
from comfyui_likeness.nodes.types import LoadedAdapter
from identities import identity
from models import patcher, prompt, sample

SHAPES = {"image": (1024,), "faceid": (512,), "portrait": (512,)}


@pytest.fixture(scope="module")
def base() -> ModelPatcher:
    return patcher()


def person(given: LoadedAdapter, faces: int = 1, seed: int = 0) -> Identity:
    return identity(given.spec.needs, (SHAPES[given.file.split()[0]],), faces, seed)


def applied(
    model: ModelPatcher, given: LoadedAdapter | None = None, who: Identity | None = None, **changes: Any
) -> ModelPatcher:
    given = given or adapter()
    values: dict[str, Any] = {
        "strength": 1.0,
        "start_percent": 0.0,
        "end_percent": 1.0,
        "layer_weights": "linear",
        "scaling": "V only",
        **changes,
    }
    return nodes.ApplyDecoupled.execute(model, given, who or person(given), **values).args[0]


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> bool:
    """Equal up to the rounding of float32 through a few steps, relative to the largest value."""
    return float((a - b).abs().max()) <= tolerance * float(b.abs().max())


@pytest.mark.parametrize(
    "changes", [{"strength": 0.0}, {"start_percent": 0.5, "end_percent": 0.5}, {"custom_layers": "3:0"}]
)
def test_nothing_asked_is_nothing_done(base: ModelPatcher, changes: dict[str, Any]) -> None:
    assert torch.equal(sample(applied(base, **changes)), sample(base))
    assert torch.equal(sample(applied(base, adapter("faceid"), **changes)), sample(base))


def test_upstream_stays_untouched(base: ModelPatcher) -> None:
    before = sample(base)
    first = applied(base)
    once = sample(first)
    second = applied(first, adapter("faceid", seed=3))
    assert not torch.equal(once, before)
    assert not torch.equal(sample(second), once)
    assert torch.equal(sample(first), once)
    assert torch.equal(sample(base), before)


def test_clones_that_copy_deeply_share_the_weights(base: ModelPatcher) -> None:
    model = applied(base)
    deep = model.clone()
    deep.model_options = copy.deepcopy(model.model_options)
    assert torch.equal(sample(deep), sample(model))
    for name, slots in model.model_options["transformer_options"]["patches_replace"].items():
        for key, slot in slots.items():
            assert deep.model_options["transformer_options"]["patches_replace"][name][key] is slot
    stacked = applied(deep, adapter(seed=9))
    assert torch.equal(sample(deep), sample(model))
    assert not torch.equal(sample(stacked), sample(model))


def test_applying_twice_is_the_sum(base: ModelPatcher) -> None:
    given = adapter()
    who = person(given)
    twice = applied(applied(base, given, who, strength=0.4), given, who, strength=0.6)
    assert close(sample(twice), sample(applied(base, given, who, strength=1.0)))


def test_order_does_not_matter(base: ModelPatcher) -> None:
    a, b = adapter("image", seed=1), adapter("portrait", seed=2)
    assert close(sample(applied(applied(base, a), b)), sample(applied(applied(base, b), a)))


def test_windows_that_touch_make_the_whole(base: ModelPatcher) -> None:
    given = adapter()
    who = person(given)
    halves = applied(applied(base, given, who, end_percent=0.5), given, who, start_percent=0.5)
    assert torch.equal(sample(halves, steps=4), sample(applied(base, given, who), steps=4))
    early = sample(applied(base, given, who, end_percent=0.5), steps=4)
    late = sample(applied(base, given, who, start_percent=0.5), steps=4)
    plain = sample(base, steps=4)
    assert not torch.equal(early, plain) and not torch.equal(late, plain) and not torch.equal(early, late)


def test_outside_its_window_a_step_is_the_bare_models(base: ModelPatcher) -> None:
    model = applied(base, end_percent=0.5)
    sigmas = comfy.samplers.calculate_sigmas(base.get_model_object("model_sampling"), "normal", 4)
    assert torch.equal(
        sample(model, steps=4, start_step=2, last_step=4), sample(base, steps=4, start_step=2, last_step=4)
    )
    assert float(sigmas[2]) <= model.get_model_object("model_sampling").percent_to_sigma(0.5)


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


@pytest.mark.parametrize("family", ["SD1.5", "SDXL"])
def test_batches_and_odd_sizes(family: str) -> None:
    model = applied(patcher(family), adapter(family=family))
    for size in ((8, 8), (9, 11)):
        both = sample(model, family, batch=2, size=size)
        assert close(both[:1], sample(model, family, size=size))
        assert both.isfinite().all()
        assert not close(both, sample(patcher(family), family, batch=2, size=size), 1e-4)


def test_unfold_gives_each_picture_its_face(base: ModelPatcher) -> None:
    given = adapter()
    two = person(given, faces=2)
    unfolded = sample(applied(base, given, two, batch="unfold"), batch=3)
    rows = [{key: value[i : i + 1] for key, value in two.embeddings.items()} for i in (0, 1)]
    for i, face in enumerate((0, 1, 1)):
        alone = replace(
            two, box=two.box[:1], kps=two.kps[:1], score=two.score[:1], weight=two.weight[:1], embeddings=rows[face]
        )
        assert close(unfolded[i], sample(applied(base, given, alone), batch=3)[i])


def test_a_face_of_no_weight_is_no_face(base: ModelPatcher) -> None:
    given = adapter()
    two = person(given, faces=2)
    first = replace(
        two,
        box=two.box[:1],
        kps=two.kps[:1],
        score=two.score[:1],
        weight=two.weight[:1],
        embeddings={k: v[:1] for k, v in two.embeddings.items()},
    )
    without = replace(two, weight=torch.tensor([1.0, 0.0]))
    assert torch.equal(sample(applied(base, given, without)), sample(applied(base, given, first)))
    nearly = replace(two, weight=torch.tensor([1.0, 1e-6]))
    assert close(sample(applied(base, given, nearly)), sample(applied(base, given, first)), 1e-4)
    with pytest.raises(ValueError, match="weight 0"):
        sample(applied(base, given, replace(two, weight=torch.zeros(2))))


class Recorder:
    """An injection that adds nothing and notes which rows carry the identity."""

    window, patchers, places = Window(1e9, -1.0), [], [patch.Place("attn2", ("middle", 0), 0, False)]

    def __init__(self) -> None:
        self.bank, self.calls = Bank(), []

    def prepare(self, call: patch.Call) -> dict[patch.Place, None]:
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


def test_the_negative_prompt_gets_the_unconditional_tokens(base: ModelPatcher) -> None:
    given = adapter()
    who = person(given)
    model = applied(base, given, who)
    plain_negative = sample(model, cfg=1.0)  # the host skips the negative prompt
    assert close(plain_negative, sample(model, cfg=1.0, negative=prompt(9)))
    zeroed = replace(who, embeddings={k: torch.zeros_like(v) for k, v in who.embeddings.items()})
    same = applied(base, given, zeroed)  # now both kinds of rows read the same tokens
    assert not close(sample(model), sample(same), 1e-4)


def test_prompts_with_areas_and_masks(base: ModelPatcher) -> None:
    areas = [*prompt(1, area=(8, 4, 0, 0), strength=1.0), *prompt(3, area=(8, 4, 0, 4), strength=1.0)]
    masked = prompt(1, mask=torch.ones(1, 8, 8), mask_strength=1.0)
    model = applied(base)
    for positive in (areas, masked):
        out = sample(model, positive=positive)
        assert out.isfinite().all() and not close(out, sample(base, positive=positive), 1e-4)


@pytest.mark.parametrize("error", [comfy.model_management.InterruptProcessingException, ValueError])
def test_an_interrupt_leaves_no_trace(base: ModelPatcher, error: type[BaseException]) -> None:
    before, model = sample(base), applied(base, adapter("faceid"))
    whole = sample(model)

    def stop(*_: Any) -> None:
        raise error

    injection = next(iter(model.model_options["transformer_options"]["patches_replace"]["attn2"].values())).injections[
        0
    ]
    with pytest.raises(error):
        sample(model, callback=stop)
    assert len(injection.bank) == 0
    assert torch.equal(sample(base), before)
    assert torch.equal(sample(model), whole)


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


def test_keys_and_values_are_computed_once_per_run(base: ModelPatcher) -> None:
    given = adapter()
    counted: list[int] = []
    layer = given.patcher.model.layers["1"].k
    hook = layer.register_forward_hook(lambda *_: counted.append(1))
    model = applied(base, given)
    sample(model, steps=5)
    assert len(counted) == 2  # rows with and without the identity
    sample(model, steps=2)
    assert len(counted) == 4
    hook.remove()


def test_the_host_loads_and_frees_the_adapter(base: ModelPatcher) -> None:
    given = adapter()
    model = applied(base, given)
    sample(model)
    loaded = [m.model.model for m in comfy.model_management.current_loaded_models]
    assert any(module is given.patcher.model for module in loaded)
    comfy.model_management.unload_all_models()
    assert torch.equal(sample(model), sample(model.clone()))


@pytest.mark.parametrize("backend", ["attention_pytorch", "attention_sub_quad", "attention_split", "attention_basic"])
def test_every_backend_agrees(base: ModelPatcher, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = adapter()
    two = replace(person(given, faces=2), weight=torch.tensor([3.0, 1.0]))
    model = applied(base, given, two)
    expected = sample(model)
    monkeypatch.setattr(patch, "optimized_attention", getattr(backends, backend))
    assert close(sample(model), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_follows_the_base(base: ModelPatcher, dtype: torch.dtype) -> None:
    half = base.clone()
    half.set_model_compute_dtype(dtype)
    out = sample(applied(half, adapter("faceid")), steps=1)
    whole = sample(applied(base, adapter("faceid")), steps=1)
    assert out.isfinite().all()
    assert float((out - whole).norm() / whole.norm()) < 0.1


def test_the_files_own_lora_is_used_and_leaves_no_trace(base: ModelPatcher) -> None:
    given, before = adapter("faceid"), sample(base)
    who = person(given)
    with_lora, without = sample(applied(base, given, who)), sample(applied(base, given, who, lora_strength=0.0))
    assert not close(with_lora, without, 1e-4)
    assert torch.equal(sample(base), before)
    found = nodes.fitting(given.spec, base)
    comfy.model_management.unload_all_models()
    patched = nodes.with_lora(base, given, found, 1.0)
    assert len(patched.patches) == 8 * len(found)
    key = f"diffusion_model.{found[-1].key}.attn2.to_out.0.weight"
    n = found[-1].number
    weight = base.model.state_dict()[key] + given.lora[f"{n}.out.up"] @ given.lora[f"{n}.out.down"]
    patched.patch_model()
    assert close(patched.model.state_dict()[key], weight)
    patched.unpatch_model()


def test_a_foreign_base_is_refused(base: ModelPatcher) -> None:
    with pytest.raises(ValueError, match=r"adapter for SDXL .* 16 of text width 64"):
        applied(base, adapter(family="SDXL"))


def test_a_missing_embedding_names_the_node(base: ModelPatcher) -> None:
    given = adapter("faceid")
    with pytest.raises(ValueError, match="Load Face Analyzer with the model pack buffalo_l"):
        applied(base, given, person(adapter("image")))
    with pytest.raises(ValueError, match="Load CLIP Vision.*vit-h-14"):
        applied(base, adapter("image"), person(given))


def test_a_model_that_is_no_unet_is_refused() -> None:
    with pytest.raises(ValueError, match="expected the UNet"):
        nodes.sites(torch.nn.Linear(2, 2))


def test_wrappers_are_missed_loudly(base: ModelPatcher) -> None:
    model = applied(base)
    options = {**model.model_options["transformer_options"], "cond_or_uncond": [0]}
    with pytest.raises(RuntimeError, match="without its wrappers"):
        model.model.diffusion_model(
            torch.zeros(1, 4, 8, 8), torch.tensor([1.0]), context=prompt(1)[0][0], transformer_options=options
        )


@pytest.mark.parametrize("scaling", list(decoupled.SCALINGS))
def test_scalings(base: ModelPatcher, scaling: str) -> None:
    out = sample(applied(base, scaling=scaling, strength=0.7))
    assert out.isfinite().all()
    assert scaling == "V only" or not torch.equal(out, sample(applied(base, strength=0.7)))


@pytest.mark.parametrize("name", list(curves.LAYER_WEIGHTS))
def test_layer_weights(base: ModelPatcher, name: str) -> None:
    out = sample(applied(base, layer_weights=name), steps=1)
    assert out.isfinite().all()
    assert name == "linear" or not torch.equal(out, sample(applied(base), steps=1))
