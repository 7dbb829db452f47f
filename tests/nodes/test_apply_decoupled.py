"""The invariants of Apply nodes with ComfyUI's own models and samplers: decoupled attention."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import comfy.model_management
import comfy.samplers
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfyui_likeness.likeness.attention import layer_weights
from comfyui_likeness.likeness.methods import ip_adapter, pulid
from comfyui_likeness.nodes.attention import apply_decoupled
from support.host_models import all_close, make_conditioning, make_small_model, sample_latent
from support.ip_adapters import apply_ip_adapter, make_ip_adapter, make_ip_adapter_identity


@pytest.fixture(scope="module")
def base() -> ModelPatcher:
    return make_small_model()


# Tokens of a single face, and PuLID, whose term depends on the output of the text's attention.
every_kind = pytest.mark.parametrize("kind", ["image", "pulid", "pulid_v1_1"])


@every_kind
@pytest.mark.parametrize(
    "changes", [{"strength": 0.0}, {"start_percent": 0.5, "end_percent": 0.5}, {"custom_layers": "3:0"}]
)
def test_strength_0_or_an_empty_schedule_changes_nothing(
    base: ModelPatcher, changes: dict[str, Any], kind: str
) -> None:
    assert torch.equal(sample_latent(apply_ip_adapter(base, make_ip_adapter(kind), **changes)), sample_latent(base))
    assert torch.equal(sample_latent(apply_ip_adapter(base, make_ip_adapter("faceid"), **changes)), sample_latent(base))


@every_kind
def test_the_upstream_model_is_unchanged(base: ModelPatcher, kind: str) -> None:
    before = sample_latent(base)
    first = apply_ip_adapter(base, make_ip_adapter(kind))
    once = sample_latent(first)
    second = apply_ip_adapter(first, make_ip_adapter("faceid", seed=3))
    assert not torch.equal(once, before)
    assert not torch.equal(sample_latent(second), once)
    assert torch.equal(sample_latent(first), once)
    assert torch.equal(sample_latent(base), before)


@every_kind
def test_deep_copied_clones_share_the_weights(base: ModelPatcher, kind: str) -> None:
    model = apply_ip_adapter(base, make_ip_adapter(kind))
    deep = model.clone()
    deep.model_options = copy.deepcopy(model.model_options)
    assert torch.equal(sample_latent(deep), sample_latent(model))
    for name, slots in model.model_options["transformer_options"]["patches_replace"].items():
        for key, slot in slots.items():
            assert deep.model_options["transformer_options"]["patches_replace"][name][key] is slot
    stacked = apply_ip_adapter(deep, make_ip_adapter(seed=9))
    assert torch.equal(sample_latent(deep), sample_latent(model))
    assert not torch.equal(sample_latent(stacked), sample_latent(model))


@every_kind
def test_applying_twice_is_the_sum(base: ModelPatcher, kind: str) -> None:
    adapter = make_ip_adapter(kind)
    identity = make_ip_adapter_identity(adapter)
    twice = apply_ip_adapter(apply_ip_adapter(base, adapter, identity, strength=0.4), adapter, identity, strength=0.6)
    assert all_close(sample_latent(twice), sample_latent(apply_ip_adapter(base, adapter, identity, strength=1.0)))


def test_order_does_not_matter(base: ModelPatcher) -> None:
    a, b, c = make_ip_adapter("image", seed=1), make_ip_adapter("portrait", seed=2), make_ip_adapter("pulid", seed=3)
    assert all_close(
        sample_latent(apply_ip_adapter(apply_ip_adapter(base, a), c)),
        sample_latent(apply_ip_adapter(apply_ip_adapter(base, c), a)),
    )
    assert all_close(
        sample_latent(apply_ip_adapter(apply_ip_adapter(base, a), b)),
        sample_latent(apply_ip_adapter(apply_ip_adapter(base, b), a)),
    )


@every_kind
def test_adjacent_windows_equal_the_full_window(base: ModelPatcher, kind: str) -> None:
    adapter = make_ip_adapter(kind)
    identity = make_ip_adapter_identity(adapter)
    halves = apply_ip_adapter(
        apply_ip_adapter(base, adapter, identity, end_percent=0.5), adapter, identity, start_percent=0.5
    )
    assert torch.equal(
        sample_latent(halves, steps=4), sample_latent(apply_ip_adapter(base, adapter, identity), steps=4)
    )
    early = sample_latent(apply_ip_adapter(base, adapter, identity, end_percent=0.5), steps=4)
    late = sample_latent(apply_ip_adapter(base, adapter, identity, start_percent=0.5), steps=4)
    plain = sample_latent(base, steps=4)
    assert not torch.equal(early, plain) and not torch.equal(late, plain) and not torch.equal(early, late)


def test_steps_outside_the_window_equal_the_base_model(base: ModelPatcher) -> None:
    model = apply_ip_adapter(base, end_percent=0.5)
    sigmas = comfy.samplers.calculate_sigmas(base.get_model_object("model_sampling"), "normal", 4)
    assert torch.equal(
        sample_latent(model, steps=4, start_step=2, last_step=4),
        sample_latent(base, steps=4, start_step=2, last_step=4),
    )
    assert float(sigmas[2]) <= model.get_model_object("model_sampling").percent_to_sigma(0.5)


@pytest.mark.parametrize("family", ["SD1.5", "SDXL"])
def test_batches_and_odd_sizes(family: str) -> None:
    model = apply_ip_adapter(make_small_model(family), make_ip_adapter(family=family))
    for size in ((8, 8), (9, 11)):
        both = sample_latent(model, family, batch_size=2, size=size)
        assert all_close(both[:1], sample_latent(model, family, size=size))
        assert both.isfinite().all()
        assert not all_close(both, sample_latent(make_small_model(family), family, batch_size=2, size=size), 1e-4)


def test_unfold_gives_each_image_its_face(base: ModelPatcher) -> None:
    adapter = make_ip_adapter()
    two = make_ip_adapter_identity(adapter, faces=2)
    unfolded = sample_latent(apply_ip_adapter(base, adapter, two, batch="unfold"), batch_size=3)
    rows = [{key: value[i : i + 1] for key, value in two.embeddings.items()} for i in (0, 1)]
    for i, face in enumerate((0, 1, 1)):
        alone = replace(
            two, box=two.box[:1], kps=two.kps[:1], score=two.score[:1], weight=two.weight[:1], embeddings=rows[face]
        )
        assert all_close(unfolded[i], sample_latent(apply_ip_adapter(base, adapter, alone), batch_size=3)[i])


def test_a_face_of_weight_0_is_ignored(base: ModelPatcher) -> None:
    adapter = make_ip_adapter()
    two = make_ip_adapter_identity(adapter, faces=2)
    first = replace(
        two,
        box=two.box[:1],
        kps=two.kps[:1],
        score=two.score[:1],
        weight=two.weight[:1],
        embeddings={k: v[:1] for k, v in two.embeddings.items()},
    )
    without = replace(two, weight=torch.tensor([1.0, 0.0]))
    assert torch.equal(
        sample_latent(apply_ip_adapter(base, adapter, without)), sample_latent(apply_ip_adapter(base, adapter, first))
    )
    nearly = replace(two, weight=torch.tensor([1.0, 1e-6]))
    assert all_close(
        sample_latent(apply_ip_adapter(base, adapter, nearly)),
        sample_latent(apply_ip_adapter(base, adapter, first)),
        1e-4,
    )
    with pytest.raises(ValueError, match="weight 0"):
        sample_latent(apply_ip_adapter(base, adapter, replace(two, weight=torch.zeros(2))))


@every_kind
def test_the_negative_prompt_gets_the_unconditional_tokens(base: ModelPatcher, kind: str) -> None:
    adapter = make_ip_adapter(kind)
    identity = make_ip_adapter_identity(adapter)
    model = apply_ip_adapter(base, adapter, identity)
    plain_negative = sample_latent(model, cfg=1.0)  # ComfyUI skips the negative prompt
    assert all_close(plain_negative, sample_latent(model, cfg=1.0, negative=make_conditioning(9)))
    zeroed = replace(identity, embeddings={k: torch.zeros_like(v) for k, v in identity.embeddings.items()})
    same = apply_ip_adapter(base, adapter, zeroed)  # now both kinds of rows read the same tokens
    assert not all_close(sample_latent(model), sample_latent(same), 1e-4)


@every_kind
def test_prompts_with_areas_and_masks(base: ModelPatcher, kind: str) -> None:
    areas = [
        *make_conditioning(1, area=(8, 4, 0, 0), strength=1.0),
        *make_conditioning(3, area=(8, 4, 0, 4), strength=1.0),
    ]
    masked = make_conditioning(1, mask=torch.ones(1, 8, 8), mask_strength=1.0)
    model = apply_ip_adapter(base, make_ip_adapter(kind))
    for positive in (areas, masked):
        out = sample_latent(model, positive=positive)
        assert out.isfinite().all() and not all_close(out, sample_latent(base, positive=positive), 1e-4)


@pytest.mark.parametrize("error", [comfy.model_management.InterruptProcessingException, ValueError])
def test_an_interrupt_leaves_no_trace(base: ModelPatcher, error: type[BaseException]) -> None:
    before, model = sample_latent(base), apply_ip_adapter(base, make_ip_adapter("faceid"))
    expected = sample_latent(model)

    def stop(*_: Any) -> None:
        raise error

    injection = next(iter(model.model_options["transformer_options"]["patches_replace"]["attn2"].values())).injections[
        0
    ]
    with pytest.raises(error):
        sample_latent(model, callback=stop)
    assert len(injection.run_cache) == 0
    assert torch.equal(sample_latent(base), before)
    assert torch.equal(sample_latent(model), expected)


@every_kind
def test_keys_and_values_are_computed_once_per_run(base: ModelPatcher, kind: str) -> None:
    adapter = make_ip_adapter(kind)
    counted: list[int] = []
    layer = adapter.patcher.model.layers["1"].k
    hook = layer.register_forward_hook(lambda *_: counted.append(1))
    model = apply_ip_adapter(base, adapter)
    sample_latent(model, steps=5)
    assert len(counted) == 2  # rows with and without the identity
    sample_latent(model, steps=2)
    assert len(counted) == 4
    hook.remove()


@pytest.mark.parametrize("kind", ["faceid", "pulid_v1_1"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_follows_the_base(base: ModelPatcher, dtype: torch.dtype, kind: str) -> None:
    half = base.clone()
    half.set_model_compute_dtype(dtype)
    out = sample_latent(apply_ip_adapter(half, make_ip_adapter(kind)), steps=1)
    expected = sample_latent(apply_ip_adapter(base, make_ip_adapter(kind)), steps=1)
    assert out.isfinite().all()
    assert float((out - expected).norm() / expected.norm()) < 0.1


def test_the_lora_of_the_file_is_applied_to_a_clone(base: ModelPatcher) -> None:
    adapter, before = make_ip_adapter("faceid"), sample_latent(base)
    identity = make_ip_adapter_identity(adapter)
    with_lora, without = (
        sample_latent(apply_ip_adapter(base, adapter, identity)),
        sample_latent(apply_ip_adapter(base, adapter, identity, lora_strength=0.0)),
    )
    assert not all_close(with_lora, without, 1e-4)
    assert torch.equal(sample_latent(base), before)
    layers = apply_decoupled.match_adapter_layers(adapter.spec, base)
    comfy.model_management.unload_all_models()
    patched = apply_decoupled.apply_adapter_lora(base, adapter, layers, 1.0)
    assert len(patched.patches) == 8 * len(layers)
    key = f"diffusion_model.{layers[-1].module_path}.attn2.to_out.0.weight"
    n = layers[-1].file_index
    weight = base.model.state_dict()[key] + adapter.lora[f"{n}.out.up"] @ adapter.lora[f"{n}.out.down"]
    patched.patch_model()
    assert all_close(patched.model.state_dict()[key], weight)
    patched.unpatch_model()


def test_another_base_model_raises(base: ModelPatcher) -> None:
    with pytest.raises(ValueError, match=r"adapter for SDXL .* 16 of text width 64"):
        apply_ip_adapter(base, make_ip_adapter(family="SDXL"))


def test_a_missing_embedding_names_the_node(base: ModelPatcher) -> None:
    adapter = make_ip_adapter("faceid")
    with pytest.raises(ValueError, match="Load Face Analyzer with the model pack buffalo_l"):
        apply_ip_adapter(base, adapter, make_ip_adapter_identity(make_ip_adapter("image")))
    with pytest.raises(ValueError, match="Load CLIP Vision.*vit-h-14"):
        apply_ip_adapter(base, make_ip_adapter("image"), make_ip_adapter_identity(adapter))


def test_pulid_modes_follow_the_version(base: ModelPatcher) -> None:
    results = {}
    for kind, auto in pulid.DEFAULT_MODES.items():
        adapter = make_ip_adapter(kind)
        results = {
            mode: sample_latent(apply_ip_adapter(base, adapter, pulid_mode=mode))
            for mode in ("auto", *pulid.PULID_MODES)
        }
        assert torch.equal(results.pop("auto"), results[auto])
        assert all(not all_close(results[a], results[b], 1e-4) for a in results for b in results if a < b)
    assert torch.equal(sample_latent(apply_ip_adapter(base, pulid_mode="style")), sample_latent(apply_ip_adapter(base)))


def test_pulid_makes_one_set_of_tokens_of_several_photos(base: ModelPatcher) -> None:
    for kind, tokens in (("pulid", 15), ("pulid_v1_1", 6)):
        adapter = make_ip_adapter(kind)
        two = make_ip_adapter_identity(adapter, faces=2)
        results = ip_adapter.project_identity(adapter.patcher.model, adapter.spec, two, torch.device("cpu"))
        assert (
            results.cond.shape == results.uncond.shape == (1, tokens, adapter.spec.width) and len(results.weight) == 1
        )
        assert sample_latent(apply_ip_adapter(base, adapter, two)).isfinite().all()


@pytest.mark.parametrize("scaling", list(ip_adapter.STRENGTH_SCALINGS))
def test_scalings(base: ModelPatcher, scaling: str) -> None:
    out = sample_latent(apply_ip_adapter(base, scaling=scaling, strength=0.7))
    assert out.isfinite().all()
    assert scaling == "V only" or not torch.equal(out, sample_latent(apply_ip_adapter(base, strength=0.7)))


@pytest.mark.parametrize("name", list(layer_weights.WEIGHT_TYPES))
def test_layer_weights(base: ModelPatcher, name: str) -> None:
    out = sample_latent(apply_ip_adapter(base, layer_weights=name), steps=1)
    assert out.isfinite().all()
    assert name == "linear" or not torch.equal(out, sample_latent(apply_ip_adapter(base), steps=1))
