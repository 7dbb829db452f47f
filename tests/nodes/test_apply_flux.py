"""The invariants of decoupled attention in FLUX, with ComfyUI's own models and samplers, for every adapter kind."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import comfy.ldm.modules.attention as backends
import comfy.model_management
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfyui_likeness.likeness.attention import layer_weights
from comfyui_likeness.likeness.identity import merge
from comfyui_likeness.nodes.attention import flux_layers, flux_terms, patch
from comfyui_likeness.nodes.attention.injection import PatchPlace
from comfyui_likeness.nodes.attention.model_call import ModelCall
from comfyui_likeness.nodes.attention.patch import attach_injection, get_injections
from comfyui_likeness.nodes.attention.slots import LIKENESS_KEY, ActiveInjection, CallState
from support.flux_adapters import (
    FLUX_ADAPTER_KINDS,
    FLUX_FAMILY,
    HIDDEN_SIZE,
    HOST_PASSES_QUERIES,
    LATENT_SIZE,
    NUM_DOUBLE_BLOCKS,
    NUM_SINGLE_BLOCKS,
    OMNI_ID_KIND,
    QueryRecorder,
    apply_flux_adapter,
    make_flux_adapter,
    make_flux_identity,
    sample_flux_latent,
)  # fmt: skip
from support.host_models import add_flux_controlnet, all_close, make_conditioning, make_small_model
from support.ip_adapters import make_ip_adapter
from torch import Tensor

pytestmark = pytest.mark.skipif(
    not HOST_PASSES_QUERIES, reason="this ComfyUI does not pass the queries of FLUX to patches"
)

PLACES = (
    flux_terms.FLUX_IMAGE_ATTENTION,
    flux_terms.FLUX_JOINT_ATTENTION,
    flux_terms.FLUX_BLOCK_QUERIES,
    flux_terms.FLUX_BLOCK_STREAM,
)


@pytest.fixture(scope="module")
def base() -> ModelPatcher:
    return make_small_model(FLUX_FAMILY)


def apply_kind(model: ModelPatcher, kind: str, seed: int = 0, **changes: Any) -> ModelPatcher:
    return apply_flux_adapter(model, make_flux_adapter(kind, seed), **changes)


@pytest.mark.parametrize("kind", FLUX_ADAPTER_KINDS)
@pytest.mark.parametrize(
    "changes",
    [{"strength": 0.0}, {"start_percent": 0.5, "end_percent": 0.5}, {"custom_layers": "1:0"}],
    ids=str,
)
def test_strength_0_or_an_empty_schedule_changes_nothing(
    base: ModelPatcher, kind: str, changes: dict[str, Any]
) -> None:
    assert torch.equal(sample_flux_latent(apply_kind(base, kind, **changes)), sample_flux_latent(base))


@pytest.mark.parametrize("kind", FLUX_ADAPTER_KINDS)
def test_the_upstream_model_is_unchanged(base: ModelPatcher, kind: str) -> None:
    before = sample_flux_latent(base)
    first = apply_kind(base, kind)
    once = sample_flux_latent(first)
    second = apply_kind(first, kind, seed=2)
    assert not all_close(once, before, 1e-3)
    assert not all_close(sample_flux_latent(second), once, 1e-3)
    assert torch.equal(sample_flux_latent(first), once)
    assert torch.equal(sample_flux_latent(base), before)


@pytest.mark.parametrize("kind", FLUX_ADAPTER_KINDS)
def test_deep_copied_clones_share_the_weights(base: ModelPatcher, kind: str) -> None:
    model = apply_kind(base, kind)
    deep = model.clone()
    deep.model_options = copy.deepcopy(model.model_options)
    expected = sample_flux_latent(model)
    assert torch.equal(sample_flux_latent(deep), expected)
    stacked = apply_kind(deep, kind, seed=9)
    assert torch.equal(sample_flux_latent(deep), expected) and torch.equal(sample_flux_latent(model), expected)
    assert not all_close(sample_flux_latent(stacked), expected, 1e-3)


@pytest.mark.parametrize("kind", FLUX_ADAPTER_KINDS)
def test_applying_twice_is_the_sum(base: ModelPatcher, kind: str) -> None:
    adapter = make_flux_adapter(kind)
    twice = apply_flux_adapter(apply_flux_adapter(base, adapter, strength=0.4), adapter, strength=0.6)
    assert all_close(sample_flux_latent(twice), sample_flux_latent(apply_flux_adapter(base, adapter)))


def test_order_does_not_matter(base: ModelPatcher) -> None:
    one, other = make_flux_adapter("xlabs", 1), make_flux_adapter("instantx", 2)
    assert all_close(
        sample_flux_latent(apply_flux_adapter(apply_flux_adapter(base, one), other)),
        sample_flux_latent(apply_flux_adapter(apply_flux_adapter(base, other), one)),
    )


@pytest.mark.parametrize("kind", FLUX_ADAPTER_KINDS)
def test_adjacent_windows_equal_the_full_window(base: ModelPatcher, kind: str) -> None:
    adapter, early, late = make_flux_adapter(kind), {"end_percent": 0.5}, {"start_percent": 0.5}
    halves = apply_flux_adapter(apply_flux_adapter(base, adapter, **early), adapter, **late)
    models = [apply_flux_adapter(base, adapter, **window) for window in (early, late, {})]
    first, second, full, plain = (sample_flux_latent(model, steps=4) for model in (*models, base))
    assert torch.equal(sample_flux_latent(halves, steps=4), full)
    assert (
        not all_close(first, plain, 1e-3) and not all_close(second, plain, 1e-3) and not all_close(first, second, 1e-3)
    )
    tail = {"steps": 4, "start_step": 2, "last_step": 4}
    assert torch.equal(sample_flux_latent(models[0], **tail), sample_flux_latent(base, **tail))


@pytest.mark.parametrize("kind", FLUX_ADAPTER_KINDS)
def test_batches_and_odd_sizes(base: ModelPatcher, kind: str) -> None:
    model = apply_kind(base, kind)
    for size in ((8, 8), (9, 11)):
        both = sample_flux_latent(model, batch_size=2, size=size, cfg=3.0)
        assert both.isfinite().all()
        assert all_close(both[:1], sample_flux_latent(model, size=size, cfg=3.0))
        assert not all_close(both, sample_flux_latent(base, batch_size=2, size=size, cfg=3.0), 1e-3)


def sample_negative_rows(base: ModelPatcher, kind: str) -> tuple[Tensor, Tensor]:
    """Predictions for the negative prompt, with the identity and without the node."""
    # At cfg 0 the guider returns the prediction of the negative prompt.
    return sample_flux_latent(apply_kind(base, kind), cfg=0.0, steps=1), sample_flux_latent(base, cfg=0.0, steps=1)


def test_the_negative_prompt_gets_what_each_adapter_defines(base: ModelPatcher) -> None:
    assert all_close(*sample_negative_rows(base, OMNI_ID_KIND), 1e-6)  # no identity tokens
    assert not all_close(*sample_negative_rows(base, "instantx"), 1e-3)  # the identity's tokens, as for all rows
    assert not all_close(*sample_negative_rows(base, "xlabs"), 1e-3)  # tokens of a black image
    adapter, identity = make_flux_adapter("xlabs"), make_flux_identity("xlabs")
    photo, black = identity.embeddings
    black_photo = replace(identity, embeddings={photo: identity.embeddings[black], black: identity.embeddings[black]})
    other = replace(identity, embeddings={photo: -identity.embeddings[photo], black: identity.embeddings[black]})
    rows = [
        sample_flux_latent(apply_flux_adapter(base, adapter, one), cfg=0.0, steps=1)
        for one in (identity, black_photo, other)
    ]
    assert all_close(rows[0], rows[1], 1e-6) and all_close(rows[0], rows[2], 1e-6)


def test_merged_and_mixed_identities_keep_the_black_image(base: ModelPatcher) -> None:
    one, other = make_flux_identity("xlabs", seed=1), make_flux_identity("xlabs", faces=2, seed=2)
    photo, black = one.embeddings
    other = replace(other, embeddings={**other.embeddings, black: one.embeddings[black].repeat(2, 1)})
    for both in (merge.mix_identities([one, other], [1.0, 1.0]), merge.merge_identities([one, other], "mean")[0]):
        assert all_close(both.embeddings[black], one.embeddings[black], 1e-6)
    with pytest.raises(ValueError, match=r"needs clip\.vit-l-14\.projected\.black"):
        apply_flux_adapter(base, make_flux_adapter("xlabs"), replace(one, embeddings={photo: one.embeddings[photo]}))


@pytest.mark.parametrize("error", [comfy.model_management.InterruptProcessingException, ValueError])
def test_an_interrupt_leaves_no_trace(base: ModelPatcher, error: type[BaseException]) -> None:
    before, model = sample_flux_latent(base), apply_flux_adapter(base)
    expected = sample_flux_latent(model)

    def stop(*_: Any) -> None:
        raise error

    with pytest.raises(error):
        sample_flux_latent(model, callback=stop)
    assert all(len(injection.run_cache) == 0 for injection in get_injections(model))
    assert torch.equal(sample_flux_latent(base), before)
    assert torch.equal(sample_flux_latent(model), expected)


@pytest.mark.parametrize(
    ("kind", "name"), [("xlabs", "double_blocks.0"), ("instantx", "0"), (OMNI_ID_KIND, "double_blocks.0")]
)
def test_keys_and_values_are_computed_once_per_run(base: ModelPatcher, kind: str, name: str) -> None:
    adapter = make_flux_adapter(kind)
    counted: list[int] = []
    hook = adapter.patcher.model.layers.get_submodule(name).register_forward_hook(lambda *_: counted.append(1))
    sample_flux_latent(apply_flux_adapter(base, adapter), steps=5)
    assert len(counted) == (1 if kind == "instantx" else 2)  # rows with and without the identity
    hook.remove()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", FLUX_ADAPTER_KINDS)
def test_half_precision_follows_the_base(base: ModelPatcher, kind: str, dtype: torch.dtype) -> None:
    half = base.clone()
    half.set_model_compute_dtype(dtype)
    (out, expected), (bare, exact) = (
        [sample_flux_latent(one(model), steps=1) for model in (half, base)]
        for one in (lambda model: apply_kind(model, kind), lambda model: model)
    )
    assert out.isfinite().all()
    rounding = float((bare - exact).norm() / exact.norm())  # the rounding of such a short random model is large
    assert 0 < float((out - expected).norm() / expected.norm()) < 2 * rounding


def foreign_attention(attn: Tensor, options: dict[str, Any]) -> Tensor:
    return attn * 0.5 if options["block_index"] == 1 else attn


def foreign_block(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    out = extra["original_block"](args)
    return {**out, "img": out["img"] * 1.1}


def add_foreign_patches(model: ModelPatcher) -> ModelPatcher:
    """The model with patches of another pack: of the attention output, and of a block of each kind."""
    foreign_model = model.clone()
    foreign_model.set_model_attn1_output_patch(foreign_attention)
    foreign_model.set_model_patch_replace(foreign_block, "dit", "double_block", 1)
    foreign_model.set_model_patch_replace(foreign_block, "dit", "single_block", 2)
    return foreign_model


@pytest.mark.parametrize("kind", FLUX_ADAPTER_KINDS)
def test_foreign_patches_are_kept(base: ModelPatcher, kind: str) -> None:
    foreign_model = add_foreign_patches(base)
    before = sample_flux_latent(foreign_model)
    patched = apply_kind(foreign_model, kind)
    out = sample_flux_latent(patched)
    assert not all_close(out, before, 1e-3)
    assert not all_close(out, sample_flux_latent(apply_kind(base, kind)), 1e-3)
    assert torch.equal(sample_flux_latent(foreign_model), before)
    assert torch.equal(sample_flux_latent(apply_kind(foreign_model, kind, strength=0.0)), before)
    if kind != "xlabs":  # the order of patches does not matter for terms added to the attention output
        behind = apply_kind(base, kind).clone()
        behind.set_model_attn1_output_patch(lambda attn, options: attn * 1.0)
        assert all_close(sample_flux_latent(behind), sample_flux_latent(apply_kind(base, kind)))


@pytest.mark.parametrize("kind", FLUX_ADAPTER_KINDS)
def test_a_controlnet_and_the_identity_work_together(base: ModelPatcher, kind: str) -> None:
    controlled = {"positive": add_flux_controlnet(make_conditioning(1, FLUX_FAMILY)), "size": (8, 8)}
    out = sample_flux_latent(apply_kind(base, kind), **controlled)
    assert not all_close(out, sample_flux_latent(base, **controlled), 1e-3)
    assert not all_close(out, sample_flux_latent(apply_kind(base, kind), size=(8, 8)), 1e-3)
    assert torch.equal(
        sample_flux_latent(apply_kind(base, kind, strength=0.0), **controlled),
        sample_flux_latent(base, **controlled),
    )


def test_an_attention_mask_and_the_identity_work_together(base: ModelPatcher) -> None:
    rows, columns = LATENT_SIZE[0] // 2, LATENT_SIZE[1] // 2
    mask = torch.zeros(1, 7 + rows * columns, 7 + rows * columns)
    mask[:, 7:, :3] = -1e4  # the image attends to a part of the text only
    masked = {
        "positive": make_conditioning(1, FLUX_FAMILY, attention_mask=mask, attention_mask_img_shape=(rows, columns))
    }
    for kind in FLUX_ADAPTER_KINDS:
        out = sample_flux_latent(apply_kind(base, kind), **masked)
        assert not all_close(out, sample_flux_latent(base, **masked), 1e-3)
        assert not all_close(out, sample_flux_latent(apply_kind(base, kind)), 1e-3)


@pytest.mark.parametrize("block", [("double", 1), ("single", 3)])
@pytest.mark.parametrize("name", PLACES)
def test_a_place_gets_the_image_tokens(base: ModelPatcher, name: str, block: tuple[str, int]) -> None:
    """Without reference images, padded for odd sizes, with text tokens at FLUX_JOINT_ATTENTION only."""
    latents = [torch.randn(1, 16, 6, 6, generator=torch.Generator().manual_seed(3))]
    for size, num_tokens in (((8, 12), 24), ((9, 11), 30)):
        for extra in ({}, {"reference_latents": latents}):
            recorder = QueryRecorder(PatchPlace(name, block))
            settings = {"positive": make_conditioning(1, FLUX_FAMILY, **extra), "size": size, "batch_size": 2}
            out = sample_flux_latent(attach_injection(base, recorder), **settings)
            assert torch.equal(out, sample_flux_latent(base, **settings))
            shape = (2, 2, num_tokens + 7 * (name == flux_terms.FLUX_JOINT_ATTENTION), 128)
            shape = (2, num_tokens, HIDDEN_SIZE) if name == flux_terms.FLUX_BLOCK_STREAM else shape
            assert {tuple(q.shape) for q in recorder.queries} == {shape}
            changed = sample_flux_latent(
                attach_injection(base, QueryRecorder(PatchPlace(name, block), 0.5)), **settings
            )
            assert not all_close(changed, out, 1e-3)


@pytest.mark.parametrize("kind", FLUX_ADAPTER_KINDS)
def test_reference_images_get_no_term(base: ModelPatcher, kind: str) -> None:
    latents = [torch.randn(1, 16, 6, 6, generator=torch.Generator().manual_seed(3))]
    settings = {"positive": make_conditioning(1, FLUX_FAMILY, reference_latents=latents)}
    out = sample_flux_latent(apply_kind(base, kind), **settings)
    assert not all_close(out, sample_flux_latent(base, **settings), 1e-3)
    assert not all_close(out, sample_flux_latent(apply_kind(base, kind)), 1e-3)


def test_the_host_loads_and_frees_the_adapter(base: ModelPatcher) -> None:
    adapter = make_flux_adapter()
    model = apply_flux_adapter(base, adapter)
    expected = sample_flux_latent(model)
    loaded = [m.model.model for m in comfy.model_management.current_loaded_models]
    assert any(module is adapter.patcher.model for module in loaded)
    comfy.model_management.unload_all_models()
    assert torch.equal(sample_flux_latent(model), expected)


def test_weights_of_several_photos(base: ModelPatcher) -> None:
    adapter = make_flux_adapter("instantx")
    two = make_flux_identity("instantx", faces=2)
    first = replace(
        two, box=two.box[:1], kps=two.kps[:1], score=two.score[:1], weight=two.weight[:1],
        embeddings={key: value[:1] for key, value in two.embeddings.items()},
    )  # fmt: skip
    nearly = replace(two, weight=torch.tensor([1.0, 1e-6]))
    assert all_close(
        sample_flux_latent(apply_flux_adapter(base, adapter, nearly)),
        sample_flux_latent(apply_flux_adapter(base, adapter, first)),
        1e-4,
    )
    unfolded = sample_flux_latent(apply_flux_adapter(base, adapter, two, batch="unfold"), batch_size=2)
    assert all_close(unfolded[:1], sample_flux_latent(apply_flux_adapter(base, adapter, first), batch_size=2)[:1])
    assert not all_close(
        unfolded[1:], sample_flux_latent(apply_flux_adapter(base, adapter, first), batch_size=2)[1:], 1e-3
    )


@pytest.mark.parametrize("backend", ["attention_pytorch", "attention_sub_quad", "attention_split", "attention_basic"])
def test_every_backend_agrees(base: ModelPatcher, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    two = replace(make_flux_identity("instantx", faces=2), weight=torch.tensor([3.0, 1.0]))
    model = apply_flux_adapter(base, make_flux_adapter("instantx"), two)
    expected = sample_flux_latent(model)
    monkeypatch.setattr(patch, "optimized_attention", getattr(backends, backend))
    assert all_close(sample_flux_latent(model), expected)


def test_a_host_that_passes_no_queries_raises() -> None:
    recorder = QueryRecorder(PatchPlace(flux_terms.FLUX_BLOCK_QUERIES, ("double", 0)))
    call = ModelCall(("positive",), (0,), torch.float32, torch.device("cpu"), torch.ones(1))
    call_state = CallState(call, {id(recorder): ActiveInjection(recorder.prepare_states(call), None)}, None)
    options = {LIKENESS_KEY: call_state, flux_terms.TOKEN_GRID_OPTION: (2, 2)}
    with pytest.raises(RuntimeError, match="expected 0.18 or newer"):
        flux_terms.add_stream_terms(("double", 0), (recorder,), torch.zeros(1, 4, HIDDEN_SIZE), options)


def test_another_base_model_raises(base: ModelPatcher) -> None:
    with pytest.raises(ValueError, match="got a Flux model; expected the UNet"):
        apply_flux_adapter(base, make_ip_adapter(), make_flux_identity())
    with pytest.raises(ValueError, match="got a UNetModel model; expected FLUX.1"):
        apply_flux_adapter(make_small_model(), make_flux_adapter())
    longer = make_small_model(FLUX_FAMILY, depth=NUM_DOUBLE_BLOCKS + 1)
    for kind in ("xlabs", "instantx"):
        with pytest.raises(
            ValueError,
            match=rf"has {NUM_DOUBLE_BLOCKS + 1} double and {NUM_SINGLE_BLOCKS} single blocks of width {HIDDEN_SIZE}",
        ):
            apply_kind(longer, kind)
    assert not all_close(
        sample_flux_latent(apply_flux_adapter(longer, make_flux_adapter())), sample_flux_latent(longer), 1e-3
    )  # adapters in the native format may leave blocks out
    with pytest.raises(ValueError, match="of width 128"):
        apply_flux_adapter(make_small_model(FLUX_FAMILY, hidden_size=128, num_heads=1), make_flux_adapter())


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("xlabs", "Load CLIP Vision.*vit-l-14"),
        ("instantx", "Load Image Encoder.*SigLIP"),
        (OMNI_ID_KIND, "Load Omni-ID Encoder"),
    ],
)
def test_a_missing_embedding_names_the_node(base: ModelPatcher, kind: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        apply_flux_adapter(
            base, make_flux_adapter(kind), make_flux_identity("instantx" if kind == OMNI_ID_KIND else OMNI_ID_KIND)
        )


def test_layers_are_numbered_as_in_the_adapter(base: ModelPatcher) -> None:
    names = {
        kind: [layer.name for layer in flux_layers.match_flux_layers(make_flux_adapter(kind).spec, base)]
        for kind in FLUX_ADAPTER_KINDS
    }
    assert names["xlabs"] == [f"double_blocks.{i}" for i in range(NUM_DOUBLE_BLOCKS)]
    assert names["instantx"] == [str(i) for i in range(NUM_DOUBLE_BLOCKS + NUM_SINGLE_BLOCKS)]
    assert names[OMNI_ID_KIND] == names["xlabs"] + [f"single_blocks.{i}" for i in range(NUM_SINGLE_BLOCKS)]
    layers = flux_layers.match_flux_layers(make_flux_adapter().spec, base)
    assert [layer.block_type for layer in layers] == ["input"] * 2 + ["middle"] * 2 + ["output"] * 2
    weak = [layer_weights.WEIGHT_TYPES["weak input"](layer.get_layer_position(FLUX_FAMILY)).weight for layer in layers]
    assert weak == [0.2] * 2 + [1.0] * 4


@pytest.mark.parametrize("name", list(layer_weights.WEIGHT_TYPES))
def test_layer_weights(base: ModelPatcher, name: str) -> None:
    if "style" in name or "composition" in name:
        with pytest.raises(ValueError, match="for FLUX.1; expected SD1.5 or SDXL"):
            apply_flux_adapter(base, layer_weights=name)
        return
    out = sample_flux_latent(apply_flux_adapter(base, layer_weights=name), steps=1)
    assert out.isfinite().all()
    assert name == "linear" or not torch.equal(out, sample_flux_latent(apply_flux_adapter(base), steps=1))
