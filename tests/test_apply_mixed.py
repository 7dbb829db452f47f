"""The invariants of every apply node, on the real host, for mixed attention."""

from __future__ import annotations

import copy
from typing import Any

import comfy.model_management
import comfy.samplers
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from comfyui_likeness.likeness.spec import Person
from comfyui_likeness.nodes.attention import patch
from fuseds import halves
from mixeds import adapter, mixed, person
from models import close, controlnet, patcher, prompt, sample
from torch import Tensor

STREAMS = ("own", "shared")


@pytest.fixture(scope="module")
def base() -> ModelPatcher:
    return patcher()


def text_rows(model: ModelPatcher, **changes: Any) -> Tensor:
    """The text stream's picture at the end of a run."""
    whole: list[Tensor] = []

    def look(executor: Any, *args: Any, **kwargs: Any) -> Tensor:
        whole.append(executor(*args, **kwargs))
        return whole[0]

    watched = model.clone()
    watched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "watching", look)  # behind ours, where rows are doubled
    out = sample(watched, **changes)
    rows = whole[0].shape[0] // 2
    assert close(whole[0][:rows], out, 1e-6)
    return whole[0][rows:]


NOTHING: list[dict[str, Any]] = [
    {"strength": 0.0},
    {"start_percent": 0.5, "end_percent": 0.5},
    {"who": (Person(person(), strength=0.0),)},
]


@pytest.mark.parametrize("changes", NOTHING, ids=str)
def test_nothing_asked_is_nothing_done(base: ModelPatcher, changes: dict[str, Any]) -> None:
    assert torch.equal(sample(mixed(base, **changes)), sample(base))


@pytest.mark.parametrize("stream", STREAMS)
def test_the_face_is_seen_and_upstream_stays_untouched(base: ModelPatcher, stream: str) -> None:
    before = sample(base)
    first = mixed(base, text_stream=stream)
    once = sample(first)
    second = mixed(first, adapter(seed=2), person(seed=3), text_stream=stream)
    assert not close(once, before, 1e-3)
    assert not close(sample(second), once, 1e-3)
    assert torch.equal(sample(first), once)
    assert torch.equal(sample(base), before)


@pytest.mark.parametrize("sampler", ["euler", "ddim", "dpmpp_2m", "heun", "lms", "uni_pc", "deis", "res_multistep"])
def test_the_text_stream_is_a_run_without_the_node(base: ModelPatcher, sampler: str) -> None:
    given = {"sampler_name": sampler, "steps": 3, "batch": 2}
    assert close(text_rows(mixed(base), **given), sample(base, **given))


def test_the_text_stream_is_the_prompts_own_with_everything_around(base: ModelPatcher) -> None:
    """ControlNet, noise mask, other injections: its rows are those of a run without any identity."""
    from adapters import adapter as other
    from adapters import applied
    from adapters import person as embedded
    from fuseds import fused

    more = {"positive": controlnet(prompt(1)), "negative": prompt(2)}
    assert close(text_rows(mixed(base), **more), sample(base, **more))
    masked = {"noise_mask": (torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(1)) > 0.5).float()}
    assert close(text_rows(mixed(base), **masked), sample(base, **masked))
    stacked = fused(applied(mixed(base), other(), embedded(other())))
    assert close(text_rows(stacked), sample(base))
    assert not close(sample(stacked), sample(mixed(base)), 1e-3)


def test_flashfaces_own_layers_belong_to_the_text_stream_too() -> None:
    from flashfaces import latents, loaded, referenced

    model, net = loaded()
    both = mixed(referenced(model, net, latents(), reference_guidance=0.0, launch=1000), given=_fitting(model))
    assert close(text_rows(both), sample(model))


def _fitting(model: ModelPatcher) -> Any:
    """An adapter for FlashFace's small UNet."""
    import mixeds
    from comfyui_likeness.nodes.attention.unet import sites

    found, generator = sites(model.model.diffusion_model), torch.Generator().manual_seed(0)
    tensors = {key: value for key, value in mixeds.tensors().items() if not key.startswith("layers.")}
    width = found[0].context
    for key, value in tensors.items():
        shape = [width if size == 64 and key != "projector.face.proj.0.weight" else size for size in value.shape]
        shape = [mixeds.TOKENS * width if size == mixeds.TOKENS * 64 else size for size in shape]
        tensors[key] = torch.randn(shape, generator=generator) * 0.05
    tensors["projector.face.proj.0.weight"] = torch.randn(64, 512, generator=generator) * 0.05
    tensors["projector.face.proj.0.bias"] = torch.zeros(64)
    tensors["projector.face.proj.2.weight"] = torch.randn(mixeds.TOKENS * width, 64, generator=generator) * 0.05
    for site in found:
        for part in "kv":
            tensors[f"layers.{site.number}.{part}.weight"] = torch.randn(site.hidden, width, generator=generator) * 0.05
    return mixeds.loader.load(tensors, mixeds.told(), "small")[0]


@pytest.mark.parametrize("sampler", comfy.samplers.SAMPLER_NAMES)
def test_every_sampler_gives_the_users_batch(base: ModelPatcher, sampler: str) -> None:
    """Latents and previews are the picture's alone, whatever the sampler does with the rows behind them."""
    shown: list[tuple[int, ...]] = []

    def callback(step: int, x0: Tensor, x: Tensor, total: int) -> None:
        shown.append((x0.shape[0], x.shape[0]))

    out = sample(mixed(base), batch=3, sampler_name=sampler, callback=callback)
    assert out.shape == (3, 4, 8, 8) and out.isfinite().all()
    assert shown and set(shown) == {(3, 3)}


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("family", ["SD1.5", "SDXL"])
def test_batches_and_odd_sizes(family: str, stream: str) -> None:
    base = patcher(family)
    model = mixed(base, adapter(family), text_stream=stream)
    for size in ((8, 8), (9, 11), (7, 16)):
        both = sample(model, family, batch=2, size=size, steps=1)
        assert both.isfinite().all()
        assert close(both[:1], sample(model, family, size=size, steps=1))
        assert not close(both, sample(base, family, batch=2, size=size, steps=1), 1e-3)


def test_clones_that_copy_deeply_share_the_weights(base: ModelPatcher) -> None:
    model = mixed(base)
    deep = model.clone()
    deep.model_options = copy.deepcopy(model.model_options)
    assert torch.equal(sample(deep), sample(model))
    assert patch.injections(deep) == patch.injections(model)


@pytest.mark.parametrize("stream", STREAMS)
def test_windows_that_touch_make_the_whole(base: ModelPatcher, stream: str) -> None:
    given, early, late = adapter(), {"end_percent": 0.5}, {"start_percent": 0.5}
    settings = {"text_stream": stream}
    halved = mixed(mixed(base, given, **early, **settings), given, **late, **settings)
    assert close(sample(halved, steps=4), sample(mixed(base, given, **settings), steps=4))
    tail = {"steps": 4, "start_step": 2, "last_step": 4}
    assert close(sample(mixed(base, given, **early, **settings), **tail), sample(base, **tail))
    assert not close(sample(mixed(base, given, **late, **settings), **tail), sample(base, **tail), 1e-3)


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("error", [comfy.model_management.InterruptProcessingException, ValueError])
def test_an_interrupt_leaves_no_trace(base: ModelPatcher, error: type[BaseException], stream: str) -> None:
    before, model = sample(base), mixed(base, text_stream=stream)
    whole = sample(model)

    def stop(*_: Any) -> None:
        raise error

    with pytest.raises(error):
        sample(model, callback=stop)
    assert all(len(injection.bank) == 0 for injection in patch.injections(model))
    assert torch.equal(sample(base), before)
    assert torch.equal(sample(model), whole)


def test_the_cross_attention_twice_is_the_sum(base: ModelPatcher) -> None:
    given = adapter()
    twice = mixed(mixed(base, given, strength=0.4, attention="off"), given, strength=0.6, attention="off")
    assert close(sample(twice), sample(mixed(base, given, attention="off")))


def test_mixed_twice_counts_the_text_stream_twice(base: ModelPatcher) -> None:
    """Keys of weight w count as w keys: two nodes' text streams are one, and their weights add up."""
    given = adapter()
    half = {"strength": 0.5, "self_attention": 0.5}
    twice = mixed(mixed(base, given, **half), given, **half)
    assert close(sample(twice), sample(mixed(base, given)))


def test_off_needs_no_stream(base: ModelPatcher) -> None:
    off, zero = mixed(base, attention="off"), mixed(base, self_attention=0.0)
    assert torch.equal(sample(off), sample(zero))
    rows: list[int] = []
    watched = off.clone()
    watched.add_wrapper_with_key(
        WrappersMP.OUTER_SAMPLE, "w", lambda e, *a, **k: (rows.append(len(a[0])), e(*a, **k))[1]
    )
    sample(watched)
    assert rows == [1]


def test_attentions_and_styles_differ(base: ModelPatcher) -> None:
    outs = [
        sample(mixed(base, attention=a, style=s))
        for a in ("mixed", "mutual", "off")
        for s in ("none", "AdaIN-mean", "AdaIN")
    ]
    assert all(out.isfinite().all() for out in outs)
    assert all(not close(a, b, 1e-4) for i, a in enumerate(outs) for b in outs[:i])
    assert close(sample(mixed(base, attention="mutual", self_attention=1.0)), sample(mixed(base, attention="mutual")))
    assert not close(
        sample(mixed(base, attention="mutual", self_attention=0.5)), sample(mixed(base, attention="mutual")), 1e-4
    )


def test_shared_and_own_are_two_streams(base: ModelPatcher) -> None:
    own, shared = mixed(base), mixed(base, text_stream="shared")
    assert close(sample(own, steps=1), sample(shared, steps=1))  # the first step starts from the same noise
    assert not close(sample(own, steps=3), sample(shared, steps=3), 1e-4)


def test_identities_are_mixed(base: ModelPatcher) -> None:
    given = adapter()
    a, b = Person(person(1)), Person(person(2))
    outs = [sample(mixed(base, given, who)) for who in ((a,), (b,), (a, b))]
    assert all(not close(x, y, 1e-4) for i, x in enumerate(outs) for y in outs[:i])
    between = sample(mixed(base, given, (a, b), mixing="interpolated"))
    assert not close(between, outs[2], 1e-4)
    twice = (a, Person(person(1)))
    for mixing in ("stacked", "interpolated"):
        assert close(sample(mixed(base, given, twice, mixing=mixing)), outs[0], 1e-4)
    nearly = (a, Person(person(2), strength=1e-7))
    for mixing in ("stacked", "interpolated"):
        assert close(sample(mixed(base, given, nearly, mixing=mixing)), outs[0], 1e-3)


def test_people_have_regions(base: ModelPatcher) -> None:
    given, (left, right) = adapter(), halves()
    a, b = person(1), person(2)
    both = mixed(base, given, (Person(a, left), Person(b, right, 0.5)), attention="off")
    apart = mixed(
        mixed(base, given, (Person(a, left),), attention="off"), given, (Person(b, right, 0.5),), attention="off"
    )
    assert close(sample(both), sample(apart))
    whole = (Person(a, torch.ones(1, 64, 64)),)
    assert close(sample(mixed(base, given, whole)), sample(mixed(base, given, a)))
    swap = torch.cat((left, right))
    many = sample(mixed(base, given, (Person(a, swap),)), batch=2)
    for i, mask in enumerate((left, right)):
        assert close(many[i], sample(mixed(base, given, (Person(a, mask),)), batch=2)[i], 1e-4)


def test_the_negative_prompt_sees_the_tokens_of_no_face_or_none(base: ModelPatcher) -> None:
    rows: list[Tensor] = []

    def keep(args: dict[str, Any]) -> Tensor:
        rows.append(args["uncond_denoised"][:1])
        return args["denoised"]

    for model in (
        base,
        mixed(base, adapter(unconditional="none"), attention="off"),
        mixed(base, adapter(), attention="off"),
        mixed(base, adapter(unconditional="none")),
    ):
        watched = model.clone()
        watched.set_model_sampler_post_cfg_function(keep)
        sample(watched, steps=1)
    assert close(rows[1], rows[0], 1e-6) and not close(rows[2], rows[0], 1e-3)
    assert close(rows[3], rows[0], 1e-5)  # without an identity both streams are the same, and so is their mix


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_follows_the_base(base: ModelPatcher, dtype: torch.dtype) -> None:
    half = base.clone()
    half.set_model_compute_dtype(dtype)
    out, whole = (sample(mixed(m, style="AdaIN-mean"), steps=1) for m in (half, base))
    assert out.isfinite().all()
    assert float((out - whole).norm() / whole.norm()) < 0.1


def test_a_controlnet_works_in_both_streams(base: ModelPatcher) -> None:
    for stream in STREAMS:
        controlled = {"positive": controlnet(prompt(1)), "negative": controlnet(prompt(2)), "batch": 2}
        out = sample(mixed(base, text_stream=stream), **controlled)
        assert out.isfinite().all() and not close(out, sample(base, **controlled), 1e-3)
        assert close(sample(mixed(base, text_stream=stream, strength=0.0), **controlled), sample(base, **controlled), 0)


def test_keys_and_values_are_computed_once_per_run(base: ModelPatcher) -> None:
    given = adapter()
    counted: list[int] = []
    hook = given.patcher.model.layers["1"].k.register_forward_hook(lambda *_: counted.append(1))
    sample(mixed(base, given), steps=5)
    hook.remove()
    assert len(counted) == 2  # rows with and without the identity


def test_what_does_not_fit_is_refused(base: ModelPatcher) -> None:
    from adapters import adapter as other
    from adapters import applied
    from adapters import person as embedded

    with pytest.raises(ValueError, match=r"adapter for SDXL \(70"):
        mixed(base, adapter("SDXL"))
    with pytest.raises(ValueError, match="no Infinite-ID adapter"):
        mixed(base, other())
    with pytest.raises(ValueError, match="IP-Adapter family"):
        applied(base, adapter(), person())
    with pytest.raises(ValueError, match="clip.vit-h-14.last.face224"):
        mixed(base, who=embedded(other("faceid")))
