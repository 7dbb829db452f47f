"""The invariants of decoupled attention in FLUX's blocks, on the real host, for every kind of adapter."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import comfy.ldm.modules.attention as backends
import comfy.model_management
import pytest
import torch
from adapters import adapter as unet_adapter
from comfy.model_patcher import ModelPatcher
from comfyui_likeness.likeness import curves
from comfyui_likeness.likeness import identity as identities
from comfyui_likeness.nodes.attention import dit, flux, patch
from comfyui_likeness.nodes.attention.injection import Call, Place
from comfyui_likeness.nodes.attention.patch import attach, injections
from comfyui_likeness.nodes.attention.slots import KEY, Active, Now
from fluxes import (
    DOUBLES,
    FAMILY,
    HIDDEN,
    KINDS,
    OMNI,
    SHOWN,
    SINGLES,
    SIZE,
    Recorder,
    adapter,
    applied,
    person,
    sample,
)  # fmt: skip
from models import close, flux_controlnet, patcher, prompt
from torch import Tensor

pytestmark = pytest.mark.skipif(not SHOWN, reason="the host shows FLUX's queries to no patch")

PLACES = (dit.PICTURE, dit.EVERYTHING, dit.QUERIED, dit.STREAM)


@pytest.fixture(scope="module")
def base() -> ModelPatcher:
    return patcher(FAMILY)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "changes",
    [{"strength": 0.0}, {"start_percent": 0.5, "end_percent": 0.5}, {"custom_layers": "1:0"}],
    ids=str,
)
def test_nothing_asked_is_nothing_done(base: ModelPatcher, kind: str, changes: dict[str, Any]) -> None:
    assert torch.equal(sample(applied(base, adapter(kind), **changes)), sample(base))


@pytest.mark.parametrize("kind", KINDS)
def test_upstream_stays_untouched(base: ModelPatcher, kind: str) -> None:
    before = sample(base)
    first = applied(base, adapter(kind))
    once = sample(first)
    second = applied(first, adapter(kind, seed=2))
    assert not close(once, before, 1e-3)
    assert not close(sample(second), once, 1e-3)
    assert torch.equal(sample(first), once)
    assert torch.equal(sample(base), before)


@pytest.mark.parametrize("kind", KINDS)
def test_clones_that_copy_deeply_share_the_weights(base: ModelPatcher, kind: str) -> None:
    model = applied(base, adapter(kind))
    deep = model.clone()
    deep.model_options = copy.deepcopy(model.model_options)
    whole = sample(model)
    assert torch.equal(sample(deep), whole)
    stacked = applied(deep, adapter(kind, seed=9))
    assert torch.equal(sample(deep), whole) and torch.equal(sample(model), whole)
    assert not close(sample(stacked), whole, 1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_applying_twice_is_the_sum(base: ModelPatcher, kind: str) -> None:
    given = adapter(kind)
    twice = applied(applied(base, given, strength=0.4), given, strength=0.6)
    assert close(sample(twice), sample(applied(base, given)))


def test_order_does_not_matter(base: ModelPatcher) -> None:
    one, other = adapter("xlabs", 1), adapter("instantx", 2)
    assert close(sample(applied(applied(base, one), other)), sample(applied(applied(base, other), one)))


@pytest.mark.parametrize("kind", KINDS)
def test_windows_that_touch_make_the_whole(base: ModelPatcher, kind: str) -> None:
    given = adapter(kind)
    halves = applied(applied(base, given, end_percent=0.5), given, start_percent=0.5)
    assert torch.equal(sample(halves, steps=4), sample(applied(base, given), steps=4))
    early = sample(applied(base, given, end_percent=0.5), steps=4)
    late = sample(applied(base, given, start_percent=0.5), steps=4)
    plain = sample(base, steps=4)
    assert not close(early, plain, 1e-3) and not close(late, plain, 1e-3) and not close(early, late, 1e-3)
    tail = {"steps": 4, "start_step": 2, "last_step": 4}
    assert torch.equal(sample(applied(base, given, end_percent=0.5), **tail), sample(base, **tail))


@pytest.mark.parametrize("kind", KINDS)
def test_batches_and_odd_sizes(base: ModelPatcher, kind: str) -> None:
    model = applied(base, adapter(kind))
    for size in ((8, 8), (9, 11)):
        both = sample(model, batch=2, size=size, cfg=3.0)
        assert both.isfinite().all()
        assert close(both[:1], sample(model, size=size, cfg=3.0))
        assert not close(both, sample(base, batch=2, size=size, cfg=3.0), 1e-3)


def negative_rows(base: ModelPatcher, kind: str) -> tuple[Tensor, Tensor]:
    """What the model makes of the negative prompt alone, with the identity and without the node."""
    # At cfg 0 the guider gives the negative prompt's prediction.
    return sample(applied(base, adapter(kind)), cfg=0.0, steps=1), sample(base, cfg=0.0, steps=1)


def test_the_negative_prompt_gets_what_each_publisher_gives_it(base: ModelPatcher) -> None:
    assert close(*negative_rows(base, OMNI), 1e-6)  # nothing
    assert not close(*negative_rows(base, "instantx"), 1e-3)  # the identity's tokens, as every row
    assert not close(*negative_rows(base, "xlabs"), 1e-3)  # those of a black picture
    given, who = adapter("xlabs"), person("xlabs")
    photo, black = who.embeddings
    shown = replace(who, embeddings={photo: who.embeddings[black], black: who.embeddings[black]})
    other = replace(who, embeddings={photo: -who.embeddings[photo], black: who.embeddings[black]})
    rows = [sample(applied(base, given, one), cfg=0.0, steps=1) for one in (who, shown, other)]
    assert close(rows[0], rows[1], 1e-6) and close(rows[0], rows[2], 1e-6)


def test_merged_and_mixed_people_keep_the_black_picture(base: ModelPatcher) -> None:
    one, other = person("xlabs", seed=1), person("xlabs", faces=2, seed=2)
    photo, black = one.embeddings
    other = replace(other, embeddings={**other.embeddings, black: one.embeddings[black].repeat(2, 1)})
    for both in (identities.mix([one, other], [1.0, 1.0]), identities.merge([one, other], "mean")[0]):
        assert close(both.embeddings[black], one.embeddings[black], 1e-6)
    with pytest.raises(ValueError, match=r"needs clip\.vit-l-14\.projected\.black"):
        applied(base, adapter("xlabs"), replace(one, embeddings={photo: one.embeddings[photo]}))


@pytest.mark.parametrize("error", [comfy.model_management.InterruptProcessingException, ValueError])
def test_an_interrupt_leaves_no_trace(base: ModelPatcher, error: type[BaseException]) -> None:
    before, model = sample(base), applied(base)
    whole = sample(model)

    def stop(*_: Any) -> None:
        raise error

    with pytest.raises(error):
        sample(model, callback=stop)
    assert all(len(injection.bank) == 0 for injection in injections(model))
    assert torch.equal(sample(base), before)
    assert torch.equal(sample(model), whole)


@pytest.mark.parametrize(("kind", "name"), [("xlabs", "double_blocks.0"), ("instantx", "0"), (OMNI, "double_blocks.0")])
def test_keys_and_values_are_computed_once_per_run(base: ModelPatcher, kind: str, name: str) -> None:
    given = adapter(kind)
    counted: list[int] = []
    hook = given.patcher.model.layers.get_submodule(name).register_forward_hook(lambda *_: counted.append(1))
    sample(applied(base, given), steps=5)
    assert len(counted) == (1 if kind == "instantx" else 2)  # rows with and without the identity
    hook.remove()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_follows_the_base(base: ModelPatcher, kind: str, dtype: torch.dtype) -> None:
    half = base.clone()
    half.set_model_compute_dtype(dtype)
    (out, whole), (bare, exact) = (
        [sample(one(model), steps=1) for model in (half, base)]
        for one in (lambda model: applied(model, adapter(kind)), lambda model: model)
    )
    assert out.isfinite().all()
    rounding = float((bare - exact).norm() / exact.norm())  # so short a model of noise rounds much
    assert 0 < float((out - whole).norm() / whole.norm()) < 2 * rounding


def foreign_attention(attn: Tensor, options: dict[str, Any]) -> Tensor:
    return attn * 0.5 if options["block_index"] == 1 else attn


def foreign_block(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    out = extra["original_block"](args)
    return {**out, "img": out["img"] * 1.1}


def foreign(model: ModelPatcher) -> ModelPatcher:
    """The model with another pack's patches: one of the attention's results, one around each kind of block."""
    theirs = model.clone()
    theirs.set_model_attn1_output_patch(foreign_attention)
    theirs.set_model_patch_replace(foreign_block, "dit", "double_block", 1)
    theirs.set_model_patch_replace(foreign_block, "dit", "single_block", 2)
    return theirs


@pytest.mark.parametrize("kind", KINDS)
def test_foreign_patches_are_kept(base: ModelPatcher, kind: str) -> None:
    theirs = foreign(base)
    before = sample(theirs)
    ours = applied(theirs, adapter(kind))
    out = sample(ours)
    assert not close(out, before, 1e-3)
    assert not close(out, sample(applied(base, adapter(kind))), 1e-3)
    assert torch.equal(sample(theirs), before)
    assert torch.equal(sample(applied(theirs, adapter(kind), strength=0.0)), before)
    if kind != "xlabs":  # what adds to the attention's result may stand on either side
        behind = applied(base, adapter(kind)).clone()
        behind.set_model_attn1_output_patch(lambda attn, options: attn * 1.0)
        assert close(sample(behind), sample(applied(base, adapter(kind))))


@pytest.mark.parametrize("kind", KINDS)
def test_a_controlnet_and_the_identity_work_together(base: ModelPatcher, kind: str) -> None:
    controlled = {"positive": flux_controlnet(prompt(1, FAMILY)), "size": (8, 8)}
    out = sample(applied(base, adapter(kind)), **controlled)
    assert not close(out, sample(base, **controlled), 1e-3)
    assert not close(out, sample(applied(base, adapter(kind)), size=(8, 8)), 1e-3)
    assert torch.equal(sample(applied(base, adapter(kind), strength=0.0), **controlled), sample(base, **controlled))


def test_an_attention_mask_and_the_identity_work_together(base: ModelPatcher) -> None:
    rows, columns = SIZE[0] // 2, SIZE[1] // 2
    mask = torch.zeros(1, 7 + rows * columns, 7 + rows * columns)
    mask[:, 7:, :3] = -1e4  # the picture reads but a part of the text
    masked = {"positive": prompt(1, FAMILY, attention_mask=mask, attention_mask_img_shape=(rows, columns))}
    for kind in KINDS:
        out = sample(applied(base, adapter(kind)), **masked)
        assert not close(out, sample(base, **masked), 1e-3)
        assert not close(out, sample(applied(base, adapter(kind))), 1e-3)


@pytest.mark.parametrize("block", [("double", 1), ("single", 3)])
@pytest.mark.parametrize("name", PLACES)
def test_a_place_sees_the_pictures_own_tokens(base: ModelPatcher, name: str, block: tuple[str, int]) -> None:
    """Reference pictures follow them, odd sizes fill the last cell up, the text is before them at one place alone."""
    latents = [torch.randn(1, 16, 6, 6, generator=torch.Generator().manual_seed(3))]
    for size, cells in (((8, 12), 24), ((9, 11), 30)):
        for extra in ({}, {"reference_latents": latents}):
            recorder = Recorder(Place(name, block))
            given = {"positive": prompt(1, FAMILY, **extra), "size": size, "batch": 2}
            out = sample(attach(base, recorder), **given)
            assert torch.equal(out, sample(base, **given))
            shape = (2, cells, HIDDEN) if name == dit.STREAM else (2, 2, cells + 7 * (name == dit.EVERYTHING), 128)
            assert {tuple(q.shape) for q in recorder.read} == {shape}
            moved = sample(attach(base, Recorder(Place(name, block), 0.5)), **given)
            assert not close(moved, out, 1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_reference_pictures_get_nothing(base: ModelPatcher, kind: str) -> None:
    latents = [torch.randn(1, 16, 6, 6, generator=torch.Generator().manual_seed(3))]
    given = {"positive": prompt(1, FAMILY, reference_latents=latents)}
    out = sample(applied(base, adapter(kind)), **given)
    assert not close(out, sample(base, **given), 1e-3)
    assert not close(out, sample(applied(base, adapter(kind))), 1e-3)


def test_the_host_loads_and_frees_the_adapter(base: ModelPatcher) -> None:
    given = adapter()
    model = applied(base, given)
    whole = sample(model)
    loaded = [m.model.model for m in comfy.model_management.current_loaded_models]
    assert any(module is given.patcher.model for module in loaded)
    comfy.model_management.unload_all_models()
    assert torch.equal(sample(model), whole)


def test_several_photos_weigh_as_they_should(base: ModelPatcher) -> None:
    given = adapter("instantx")
    two = person("instantx", faces=2)
    first = replace(
        two, box=two.box[:1], kps=two.kps[:1], score=two.score[:1], weight=two.weight[:1],
        embeddings={key: value[:1] for key, value in two.embeddings.items()},
    )  # fmt: skip
    nearly = replace(two, weight=torch.tensor([1.0, 1e-6]))
    assert close(sample(applied(base, given, nearly)), sample(applied(base, given, first)), 1e-4)
    unfolded = sample(applied(base, given, two, batch="unfold"), batch=2)
    assert close(unfolded[:1], sample(applied(base, given, first), batch=2)[:1])
    assert not close(unfolded[1:], sample(applied(base, given, first), batch=2)[1:], 1e-3)


@pytest.mark.parametrize("backend", ["attention_pytorch", "attention_sub_quad", "attention_split", "attention_basic"])
def test_every_backend_agrees(base: ModelPatcher, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    two = replace(person("instantx", faces=2), weight=torch.tensor([3.0, 1.0]))
    model = applied(base, adapter("instantx"), two)
    expected = sample(model)
    monkeypatch.setattr(patch, "optimized_attention", getattr(backends, backend))
    assert close(sample(model), expected)


def test_a_host_that_shows_no_queries_is_told_so() -> None:
    recorder = Recorder(Place(dit.QUERIED, ("double", 0)))
    call = Call(("positive",), 1, torch.float32, torch.device("cpu"), torch.ones(1), None, None)
    now = Now(call, {id(recorder): Active(recorder.prepare(call), None)}, None)
    with pytest.raises(RuntimeError, match="expected 0.18 or newer"):
        dit.behind(("double", 0), (recorder,), torch.zeros(1, 4, HIDDEN), {KEY: now, dit.CELLS: (2, 2)})


def test_a_foreign_base_is_refused(base: ModelPatcher) -> None:
    with pytest.raises(ValueError, match="got a Flux model; expected the UNet"):
        applied(base, unet_adapter(), person())
    with pytest.raises(ValueError, match="got a UNetModel model; expected FLUX.1"):
        applied(patcher(), adapter())
    longer = patcher(FAMILY, depth=DOUBLES + 1)
    for kind in ("xlabs", "instantx"):
        with pytest.raises(
            ValueError, match=rf"has {DOUBLES + 1} double and {SINGLES} single blocks of width {HIDDEN}"
        ):
            applied(longer, adapter(kind))
    assert not close(sample(applied(longer, adapter())), sample(longer), 1e-3)  # ours may leave blocks out
    with pytest.raises(ValueError, match="of width 128"):
        applied(patcher(FAMILY, hidden_size=128, num_heads=1), adapter())


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("xlabs", "Load CLIP Vision.*vit-l-14"),
        ("instantx", "Load Image Encoder.*SigLIP"),
        (OMNI, "Load Omni-ID Encoder"),
    ],
)
def test_a_missing_embedding_names_the_node(base: ModelPatcher, kind: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        applied(base, adapter(kind), person("instantx" if kind == OMNI else OMNI))


def test_layers_are_counted_as_the_adapter_has_them(base: ModelPatcher) -> None:
    names = {kind: [site.name for site in flux.fitting(adapter(kind).spec, base)] for kind in KINDS}
    assert names["xlabs"] == [f"double_blocks.{i}" for i in range(DOUBLES)]
    assert names["instantx"] == [str(i) for i in range(DOUBLES + SINGLES)]
    assert names[OMNI] == names["xlabs"] + [f"single_blocks.{i}" for i in range(SINGLES)]
    sites = flux.fitting(adapter().spec, base)
    assert [site.side for site in sites] == ["input"] * 2 + ["middle"] * 2 + ["output"] * 2
    weak = [curves.LAYER_WEIGHTS["weak input"](site.layer(FAMILY)).weight for site in sites]
    assert weak == [0.2] * 2 + [1.0] * 4


@pytest.mark.parametrize("name", list(curves.LAYER_WEIGHTS))
def test_layer_weights(base: ModelPatcher, name: str) -> None:
    if "style" in name or "composition" in name:
        with pytest.raises(ValueError, match="for FLUX.1; expected them for SD1.5 or SDXL"):
            applied(base, layer_weights=name)
        return
    out = sample(applied(base, layer_weights=name), steps=1)
    assert out.isfinite().all()
    assert name == "linear" or not torch.equal(out, sample(applied(base), steps=1))
