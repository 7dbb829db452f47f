"""The invariants of Apply nodes with ComfyUI's own models and samplers: mixed attention."""

from __future__ import annotations

import copy
from typing import Any

import comfy.model_management
import comfy.samplers
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfyui_likeness.likeness.spec import Person
from comfyui_likeness.nodes.attention import patch
from support.fused_kv import make_stripe_masks
from support.host_models import add_controlnet, all_close, make_conditioning, make_small_model, sample_latent
from support.infinite_id_adapters import apply_infinite_id, make_infinite_id_adapter, make_infinite_id_identity
from torch import Tensor

STREAMS = ("own", "shared")


@pytest.fixture(scope="module")
def base() -> ModelPatcher:
    return make_small_model()


def sample_with_text_rows(model: ModelPatcher, **changes: Any) -> tuple[Tensor, Tensor]:
    """The latents of all rows of the sampler, and of the image, at the end of a run."""
    outputs: list[Tensor] = []
    sample = comfy.samplers.KSAMPLER.sample

    def record(sampler: Any, guider: Any, *args: Any, **kwargs: Any) -> Tensor:
        samples = sample(sampler, guider, *args, **kwargs)
        outputs.append(guider.inner_model.process_latent_out(samples))
        return samples

    with pytest.MonkeyPatch.context() as watched:
        watched.setattr(comfy.samplers.KSAMPLER, "sample", record)
        out = sample_latent(model, **changes)
    return outputs[0], out


def sample_text_rows(model: ModelPatcher, **changes: Any) -> Tensor:
    """The latent of the text stream at the end of a run."""
    both, out = sample_with_text_rows(model, **changes)
    rows = len(both) // 2
    assert all_close(both[:rows], out, 1e-6)
    return both[rows:]


NO_EFFECT: list[dict[str, Any]] = [
    {"strength": 0.0},
    {"start_percent": 0.5, "end_percent": 0.5},
    {"identity_or_people": (Person(make_infinite_id_identity(), strength=0.0),)},
]


@pytest.mark.parametrize("changes", NO_EFFECT, ids=str)
def test_strength_0_or_an_empty_schedule_changes_nothing(base: ModelPatcher, changes: dict[str, Any]) -> None:
    assert torch.equal(sample_latent(apply_infinite_id(base, **changes)), sample_latent(base))


@pytest.mark.parametrize("stream", STREAMS)
def test_the_face_changes_the_image_and_upstream_is_unchanged(base: ModelPatcher, stream: str) -> None:
    before = sample_latent(base)
    first = apply_infinite_id(base, text_stream=stream)
    once = sample_latent(first)
    second = apply_infinite_id(
        first, make_infinite_id_adapter(seed=2), make_infinite_id_identity(seed=3), text_stream=stream
    )
    assert not all_close(once, before, 1e-3)
    assert not all_close(sample_latent(second), once, 1e-3)
    assert torch.equal(sample_latent(first), once)
    assert torch.equal(sample_latent(base), before)


@pytest.mark.parametrize("sampler", ["euler", "ddim", "dpmpp_2m", "heun", "lms", "uni_pc", "deis", "res_multistep"])
def test_the_text_stream_equals_a_run_without_the_node(base: ModelPatcher, sampler: str) -> None:
    settings = {"sampler_name": sampler, "steps": 3, "batch_size": 2}
    assert all_close(sample_text_rows(apply_infinite_id(base), **settings), sample_latent(base, **settings))


def test_the_text_stream_is_independent_of_other_injections(base: ModelPatcher) -> None:
    """With a ControlNet, a noise mask or other injections, its rows equal those of a run without an identity."""
    from support.fused_kv import apply_fused_kv
    from support.ip_adapters import apply_ip_adapter

    controlled = {"positive": add_controlnet(make_conditioning(1)), "negative": make_conditioning(2)}
    assert all_close(sample_text_rows(apply_infinite_id(base), **controlled), sample_latent(base, **controlled))
    masked = {"noise_mask": (torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(1)) > 0.5).float()}
    assert all_close(sample_text_rows(apply_infinite_id(base), **masked), sample_latent(base, **masked))
    stacked = apply_fused_kv(apply_ip_adapter(apply_infinite_id(base)))
    assert all_close(sample_text_rows(stacked), sample_latent(base))
    assert not all_close(sample_latent(stacked), sample_latent(apply_infinite_id(base)), 1e-3)


def test_the_added_layers_of_flashface_run_in_the_text_stream() -> None:
    from support.flashface_models import apply_flashface, load_flashface, make_face_latents

    model, net = load_flashface()
    both = apply_infinite_id(
        apply_flashface(model, net, make_face_latents(), reference_guidance=0.0, launch=1000),
        loaded_adapter=make_adapter_for(model),
    )
    assert all_close(sample_text_rows(both), sample_latent(model))


def make_adapter_for(model: ModelPatcher) -> Any:
    """An adapter that fits the small FlashFace UNet."""
    from comfyui_likeness.nodes.attention.unet_layers import list_unet_layers
    from support import infinite_id_adapters

    layers, generator = list_unet_layers(model.model.diffusion_model), torch.Generator().manual_seed(0)
    tensors = {
        key: value
        for key, value in infinite_id_adapters.make_infinite_id_tensors().items()
        if not key.startswith("layers.")
    }
    width = layers[0].context_dim
    for key, value in tensors.items():
        shape = [width if size == 64 and key != "projector.face.proj.0.weight" else size for size in value.shape]
        shape = [
            infinite_id_adapters.NUM_FACE_TOKENS * width if size == infinite_id_adapters.NUM_FACE_TOKENS * 64 else size
            for size in shape
        ]
        tensors[key] = torch.randn(shape, generator=generator) * 0.05
    tensors["projector.face.proj.0.weight"] = torch.randn(64, 512, generator=generator) * 0.05
    tensors["projector.face.proj.0.bias"] = torch.zeros(64)
    tensors["projector.face.proj.2.weight"] = (
        torch.randn(infinite_id_adapters.NUM_FACE_TOKENS * width, 64, generator=generator) * 0.05
    )
    for layer in layers:
        for part in "kv":
            tensors[f"layers.{layer.file_index}.{part}.weight"] = (
                torch.randn(layer.hidden_size, width, generator=generator) * 0.05
            )
    metadata = infinite_id_adapters.make_infinite_id_metadata()
    return infinite_id_adapters.native_adapters.load_native_adapter(tensors, metadata, "small")[0]


@pytest.mark.parametrize("sampler", comfy.samplers.SAMPLER_NAMES)
def test_every_sampler_returns_the_image_rows(base: ModelPatcher, sampler: str) -> None:
    """Latents and previews are those of the image, whatever the sampler does with the text stream."""
    row_counts: list[tuple[int, ...]] = []

    def callback(step: int, x0: Tensor, x: Tensor, total: int) -> None:
        row_counts.append((x0.shape[0], x.shape[0]))

    out = sample_latent(apply_infinite_id(base), batch_size=3, sampler_name=sampler, callback=callback)
    assert out.shape == (3, 4, 8, 8) and out.isfinite().all()
    assert row_counts and set(row_counts) == {(3, 3)}


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("family", ["SD1.5", "SDXL"])
def test_batches_and_odd_sizes(family: str, stream: str) -> None:
    base = make_small_model(family)
    model = apply_infinite_id(base, make_infinite_id_adapter(family), text_stream=stream)
    for size in ((8, 8), (9, 11), (7, 16)):
        both = sample_latent(model, family, batch_size=2, size=size, steps=1)
        assert both.isfinite().all()
        assert all_close(both[:1], sample_latent(model, family, size=size, steps=1))
        assert not all_close(both, sample_latent(base, family, batch_size=2, size=size, steps=1), 1e-3)


def test_deep_copied_clones_share_the_weights(base: ModelPatcher) -> None:
    model = apply_infinite_id(base)
    deep = model.clone()
    deep.model_options = copy.deepcopy(model.model_options)
    assert torch.equal(sample_latent(deep), sample_latent(model))
    assert patch.get_injections(deep) == patch.get_injections(model)


@pytest.mark.parametrize("stream", STREAMS)
def test_adjacent_windows_equal_the_full_window(base: ModelPatcher, stream: str) -> None:
    adapter, early, late = make_infinite_id_adapter(), {"end_percent": 0.5}, {"start_percent": 0.5}
    settings = {"text_stream": stream}
    halved = apply_infinite_id(apply_infinite_id(base, adapter, **early, **settings), adapter, **late, **settings)
    assert all_close(
        sample_latent(halved, steps=4), sample_latent(apply_infinite_id(base, adapter, **settings), steps=4)
    )
    tail = {"steps": 4, "start_step": 2, "last_step": 4}
    assert all_close(
        sample_latent(apply_infinite_id(base, adapter, **early, **settings), **tail), sample_latent(base, **tail)
    )
    assert not all_close(
        sample_latent(apply_infinite_id(base, adapter, **late, **settings), **tail), sample_latent(base, **tail), 1e-3
    )


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("error", [comfy.model_management.InterruptProcessingException, ValueError])
def test_an_interrupt_leaves_no_trace(base: ModelPatcher, error: type[BaseException], stream: str) -> None:
    before, model = sample_latent(base), apply_infinite_id(base, text_stream=stream)
    expected = sample_latent(model)

    def stop(*_: Any) -> None:
        raise error

    with pytest.raises(error):
        sample_latent(model, callback=stop)
    assert all(len(injection.run_cache) == 0 for injection in patch.get_injections(model))
    assert torch.equal(sample_latent(base), before)
    assert torch.equal(sample_latent(model), expected)


def test_the_cross_attention_twice_is_the_sum(base: ModelPatcher) -> None:
    adapter = make_infinite_id_adapter()
    twice = apply_infinite_id(
        apply_infinite_id(base, adapter, strength=0.4, attention="off"), adapter, strength=0.6, attention="off"
    )
    assert all_close(sample_latent(twice), sample_latent(apply_infinite_id(base, adapter, attention="off")))


def test_text_stream_weights_of_two_nodes_add_up(base: ModelPatcher) -> None:
    """Keys of weight w act like w keys, and two nodes share one text stream, so their weights add up."""
    adapter = make_infinite_id_adapter()
    half = {"strength": 0.5, "self_attention": 0.5}
    twice = apply_infinite_id(apply_infinite_id(base, adapter, **half), adapter, **half)
    assert all_close(sample_latent(twice), sample_latent(apply_infinite_id(base, adapter)))


def test_off_runs_no_text_stream(base: ModelPatcher) -> None:
    off, zero = apply_infinite_id(base, attention="off"), apply_infinite_id(base, self_attention=0.0)
    assert torch.equal(sample_latent(off), sample_latent(zero))
    assert len(sample_with_text_rows(off)[0]) == 1


def test_attentions_and_styles_differ(base: ModelPatcher) -> None:
    outs = [
        sample_latent(apply_infinite_id(base, attention=a, style=s))
        for a in ("mixed", "mutual", "off")
        for s in ("none", "AdaIN-mean", "AdaIN")
    ]
    assert all(out.isfinite().all() for out in outs)
    assert all(not all_close(a, b, 1e-4) for i, a in enumerate(outs) for b in outs[:i])
    assert all_close(
        sample_latent(apply_infinite_id(base, attention="mutual", self_attention=1.0)),
        sample_latent(apply_infinite_id(base, attention="mutual")),
    )
    assert not all_close(
        sample_latent(apply_infinite_id(base, attention="mutual", self_attention=0.5)),
        sample_latent(apply_infinite_id(base, attention="mutual")),
        1e-4,
    )


def test_shared_and_own_streams_differ(base: ModelPatcher) -> None:
    own_stream, shared_stream = apply_infinite_id(base), apply_infinite_id(base, text_stream="shared")
    assert all_close(
        sample_latent(own_stream, steps=1), sample_latent(shared_stream, steps=1)
    )  # the first step starts from the same noise
    assert not all_close(sample_latent(own_stream, steps=3), sample_latent(shared_stream, steps=3), 1e-4)


def test_identities_are_mixed(base: ModelPatcher) -> None:
    adapter = make_infinite_id_adapter()
    a, b = Person(make_infinite_id_identity(1)), Person(make_infinite_id_identity(2))
    outs = [sample_latent(apply_infinite_id(base, adapter, people)) for people in ((a,), (b,), (a, b))]
    assert all(not all_close(x, y, 1e-4) for i, x in enumerate(outs) for y in outs[:i])
    between = sample_latent(apply_infinite_id(base, adapter, (a, b), mixing="interpolated"))
    assert not all_close(between, outs[2], 1e-4)
    twice = (a, Person(make_infinite_id_identity(1)))
    for mixing in ("stacked", "interpolated"):
        assert all_close(sample_latent(apply_infinite_id(base, adapter, twice, mixing=mixing)), outs[0], 1e-4)
    nearly = (a, Person(make_infinite_id_identity(2), strength=1e-7))
    for mixing in ("stacked", "interpolated"):
        assert all_close(sample_latent(apply_infinite_id(base, adapter, nearly, mixing=mixing)), outs[0], 1e-3)


def test_people_have_regions(base: ModelPatcher) -> None:
    adapter, (left, right) = make_infinite_id_adapter(), make_stripe_masks()
    a, b = make_infinite_id_identity(1), make_infinite_id_identity(2)
    both = apply_infinite_id(base, adapter, (Person(a, left), Person(b, right, 0.5)), attention="off")
    apart = apply_infinite_id(
        apply_infinite_id(base, adapter, (Person(a, left),), attention="off"),
        adapter,
        (Person(b, right, 0.5),),
        attention="off",
    )
    assert all_close(sample_latent(both), sample_latent(apart))
    expected = (Person(a, torch.ones(1, 64, 64)),)
    assert all_close(
        sample_latent(apply_infinite_id(base, adapter, expected)), sample_latent(apply_infinite_id(base, adapter, a))
    )
    swap = torch.cat((left, right))
    many = sample_latent(apply_infinite_id(base, adapter, (Person(a, swap),)), batch_size=2)
    for i, mask in enumerate((left, right)):
        assert all_close(
            many[i], sample_latent(apply_infinite_id(base, adapter, (Person(a, mask),)), batch_size=2)[i], 1e-4
        )


def test_the_negative_prompt_sees_unconditional_tokens_or_none(base: ModelPatcher) -> None:
    rows: list[Tensor] = []

    def keep(args: dict[str, Any]) -> Tensor:
        rows.append(args["uncond_denoised"][:1])
        return args["denoised"]

    for model in (
        base,
        apply_infinite_id(base, make_infinite_id_adapter(unconditional="none"), attention="off"),
        apply_infinite_id(base, make_infinite_id_adapter(), attention="off"),
        apply_infinite_id(base, make_infinite_id_adapter(unconditional="none")),
    ):
        watched = model.clone()
        watched.set_model_sampler_post_cfg_function(keep)
        sample_latent(watched, steps=1)
    assert all_close(rows[1], rows[0], 1e-6) and not all_close(rows[2], rows[0], 1e-3)
    assert all_close(rows[3], rows[0], 1e-5)  # without an identity both streams are the same


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_follows_the_base(base: ModelPatcher, dtype: torch.dtype) -> None:
    half = base.clone()
    half.set_model_compute_dtype(dtype)
    out, expected = (sample_latent(apply_infinite_id(m, style="AdaIN-mean"), steps=1) for m in (half, base))
    assert out.isfinite().all()
    assert float((out - expected).norm() / expected.norm()) < 0.1


def test_a_controlnet_works_in_both_streams(base: ModelPatcher) -> None:
    for stream in STREAMS:
        controlled = {
            "positive": add_controlnet(make_conditioning(1)),
            "negative": add_controlnet(make_conditioning(2)),
            "batch_size": 2,
        }
        out = sample_latent(apply_infinite_id(base, text_stream=stream), **controlled)
        assert out.isfinite().all() and not all_close(out, sample_latent(base, **controlled), 1e-3)
        assert all_close(
            sample_latent(apply_infinite_id(base, text_stream=stream, strength=0.0), **controlled),
            sample_latent(base, **controlled),
            0,
        )


def test_keys_and_values_are_computed_once_per_run(base: ModelPatcher) -> None:
    adapter = make_infinite_id_adapter()
    counted: list[int] = []
    hook = adapter.patcher.model.layers["1"].k.register_forward_hook(lambda *_: counted.append(1))
    sample_latent(apply_infinite_id(base, adapter), steps=5)
    hook.remove()
    assert len(counted) == 2  # rows with and without the identity


def test_unsuitable_inputs_raise(base: ModelPatcher) -> None:
    from support.ip_adapters import apply_ip_adapter, make_ip_adapter, make_ip_adapter_identity

    with pytest.raises(ValueError, match=r"adapter for SDXL \(70"):
        apply_infinite_id(base, make_infinite_id_adapter("SDXL"))
    with pytest.raises(ValueError, match="not an Infinite-ID adapter"):
        apply_infinite_id(base, make_ip_adapter())
    with pytest.raises(ValueError, match="IP-Adapter family"):
        apply_ip_adapter(base, make_infinite_id_adapter(), make_infinite_id_identity())
    with pytest.raises(ValueError, match="clip.vit-h-14.last.face224"):
        apply_infinite_id(base, identity_or_people=make_ip_adapter_identity(make_ip_adapter("faceid")))
