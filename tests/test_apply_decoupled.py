"""The invariants of every apply node, on the real host, for decoupled attention."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import comfy.model_management
import comfy.samplers
import pytest
import torch
from adapters import adapter, applied, person
from comfy.model_patcher import ModelPatcher
from comfyui_likeness.likeness import curves, decoupled, pulid
from comfyui_likeness.nodes.attention import decoupled as nodes
from models import close, patcher, prompt, sample


@pytest.fixture(scope="module")
def base() -> ModelPatcher:
    return patcher()


# What the invariants are tried on: tokens of one face alone, and PuLID's, which mind what the text's attention gave.
every_kind = pytest.mark.parametrize("kind", ["image", "pulid", "pulid_v1_1"])


@every_kind
@pytest.mark.parametrize(
    "changes", [{"strength": 0.0}, {"start_percent": 0.5, "end_percent": 0.5}, {"custom_layers": "3:0"}]
)
def test_nothing_asked_is_nothing_done(base: ModelPatcher, changes: dict[str, Any], kind: str) -> None:
    assert torch.equal(sample(applied(base, adapter(kind), **changes)), sample(base))
    assert torch.equal(sample(applied(base, adapter("faceid"), **changes)), sample(base))


@every_kind
def test_upstream_stays_untouched(base: ModelPatcher, kind: str) -> None:
    before = sample(base)
    first = applied(base, adapter(kind))
    once = sample(first)
    second = applied(first, adapter("faceid", seed=3))
    assert not torch.equal(once, before)
    assert not torch.equal(sample(second), once)
    assert torch.equal(sample(first), once)
    assert torch.equal(sample(base), before)


@every_kind
def test_clones_that_copy_deeply_share_the_weights(base: ModelPatcher, kind: str) -> None:
    model = applied(base, adapter(kind))
    deep = model.clone()
    deep.model_options = copy.deepcopy(model.model_options)
    assert torch.equal(sample(deep), sample(model))
    for name, slots in model.model_options["transformer_options"]["patches_replace"].items():
        for key, slot in slots.items():
            assert deep.model_options["transformer_options"]["patches_replace"][name][key] is slot
    stacked = applied(deep, adapter(seed=9))
    assert torch.equal(sample(deep), sample(model))
    assert not torch.equal(sample(stacked), sample(model))


@every_kind
def test_applying_twice_is_the_sum(base: ModelPatcher, kind: str) -> None:
    given = adapter(kind)
    who = person(given)
    twice = applied(applied(base, given, who, strength=0.4), given, who, strength=0.6)
    assert close(sample(twice), sample(applied(base, given, who, strength=1.0)))


def test_order_does_not_matter(base: ModelPatcher) -> None:
    a, b, c = adapter("image", seed=1), adapter("portrait", seed=2), adapter("pulid", seed=3)
    assert close(sample(applied(applied(base, a), c)), sample(applied(applied(base, c), a)))
    assert close(sample(applied(applied(base, a), b)), sample(applied(applied(base, b), a)))


@every_kind
def test_windows_that_touch_make_the_whole(base: ModelPatcher, kind: str) -> None:
    given = adapter(kind)
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


@every_kind
def test_the_negative_prompt_gets_the_unconditional_tokens(base: ModelPatcher, kind: str) -> None:
    given = adapter(kind)
    who = person(given)
    model = applied(base, given, who)
    plain_negative = sample(model, cfg=1.0)  # the host skips the negative prompt
    assert close(plain_negative, sample(model, cfg=1.0, negative=prompt(9)))
    zeroed = replace(who, embeddings={k: torch.zeros_like(v) for k, v in who.embeddings.items()})
    same = applied(base, given, zeroed)  # now both kinds of rows read the same tokens
    assert not close(sample(model), sample(same), 1e-4)


@every_kind
def test_prompts_with_areas_and_masks(base: ModelPatcher, kind: str) -> None:
    areas = [*prompt(1, area=(8, 4, 0, 0), strength=1.0), *prompt(3, area=(8, 4, 0, 4), strength=1.0)]
    masked = prompt(1, mask=torch.ones(1, 8, 8), mask_strength=1.0)
    model = applied(base, adapter(kind))
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


@every_kind
def test_keys_and_values_are_computed_once_per_run(base: ModelPatcher, kind: str) -> None:
    given = adapter(kind)
    counted: list[int] = []
    layer = given.patcher.model.layers["1"].k
    hook = layer.register_forward_hook(lambda *_: counted.append(1))
    model = applied(base, given)
    sample(model, steps=5)
    assert len(counted) == 2  # rows with and without the identity
    sample(model, steps=2)
    assert len(counted) == 4
    hook.remove()


@pytest.mark.parametrize("kind", ["faceid", "pulid_v1_1"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_follows_the_base(base: ModelPatcher, dtype: torch.dtype, kind: str) -> None:
    half = base.clone()
    half.set_model_compute_dtype(dtype)
    out = sample(applied(half, adapter(kind)), steps=1)
    whole = sample(applied(base, adapter(kind)), steps=1)
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


def test_pulids_modes_are_those_of_its_version(base: ModelPatcher) -> None:
    made = {}
    for kind, auto in pulid.DEFAULTS.items():
        given = adapter(kind)
        made = {mode: sample(applied(base, given, pulid_mode=mode)) for mode in ("auto", *pulid.MODES)}
        assert torch.equal(made.pop("auto"), made[auto])
        assert all(not close(made[a], made[b], 1e-4) for a in made for b in made if a < b)
    assert torch.equal(sample(applied(base, pulid_mode="style")), sample(applied(base)))


def test_pulid_of_several_photos_is_one_set_of_tokens(base: ModelPatcher) -> None:
    for kind, tokens in (("pulid", 15), ("pulid_v1_1", 6)):
        given = adapter(kind)
        two = person(given, faces=2)
        made = decoupled.tokens(given.patcher.model, given.spec, two, torch.device("cpu"))
        assert made.cond.shape == made.uncond.shape == (1, tokens, given.spec.width) and len(made.weight) == 1
        assert sample(applied(base, given, two)).isfinite().all()


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
