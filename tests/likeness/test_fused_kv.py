"""Fused KV: a plain reference of its equations in einsum, against ComfyUI's patched layers."""

from __future__ import annotations

from collections.abc import Sequence
from math import log as math_log
from typing import Any

import comfy.ldm.modules.attention as backends
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfyui_likeness.likeness.attention.grouped_attention import KeyValueBlock, QueryGrouping, attend_blocks
from comfyui_likeness.likeness.methods import fused_kv
from comfyui_likeness.likeness.spec import Person
from comfyui_likeness.nodes.attention import patch
from comfyui_likeness.nodes.loaders import fused_kv_loader
from support.fused_kv import (
    PixelVAE,
    apply_fused_kv,
    make_fused_kv_adapter,
    make_fused_kv_identity,
    make_fused_kv_tensors,
    make_stripe_masks,
)
from support.host_models import all_close, make_conditioning, make_small_model, sample_latent
from support.ip_adapters import make_ip_adapter
from torch import Tensor

BACKENDS = ("attention_pytorch", "attention_sub_quad", "attention_split", "attention_basic")
LAYERS = ("input_blocks.1.1", "input_blocks.4.1", "output_blocks.9.1")


@pytest.fixture(scope="module")
def base() -> ModelPatcher:
    return make_small_model()


def capture_layers(model: ModelPatcher, run: Any) -> list[dict[str, tuple[Tensor, Tensor]]]:
    """Inputs and outputs of the cross-attentions in LAYERS, for each pass of the UNet in `run`."""
    passes: list[dict[str, tuple[Tensor, Tensor]]] = []
    inputs: dict[str, Tensor] = {}
    hooks = []
    for path in LAYERS:
        block: Any = model.model.diffusion_model.get_submodule(f"{path}.transformer_blocks.0")

        def capture_input(_module: Any, _args: Any, out: Tensor, path: str = path) -> None:
            if path == LAYERS[0]:
                passes.append({})
            inputs[path] = out

        def capture_output(_module: Any, _args: Any, out: Tensor, path: str = path) -> None:
            passes[-1][path] = inputs[path], out

        hooks += [
            block.norm2.register_forward_hook(capture_input),
            block.attn2.to_out.register_forward_hook(capture_output),
        ]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return passes


WEIGHTS = (1.0, 0.5, 2.0, 1.0)


def reference(
    model: ModelPatcher,
    adapter: Any,
    path: str,
    hidden: Tensor,
    faces: Sequence[Tensor],
    regions: Sequence[Tensor | None],
) -> Tensor:
    """Eq. 1-7 for one layer: hidden [1, N, C], faces [n_i, T, C] per identity, regions [h, w] of booleans.

    A key of weight w has log w added to its logits.
    """
    attn: Any = model.model.diffusion_model.get_submodule(f"{path}.transformer_blocks.0.attn2")
    text = make_conditioning(1)[0][0]
    layer = adapter.patcher.model.get_layer(f"{path}.transformer_blocks.0")
    q = attn.to_q(hidden)[0]
    keys, values, owner = [attn.to_k(text)[0]], [attn.to_v(text)[0]], [torch.full((text.shape[1],), -1)]
    for i, h in enumerate(faces):
        for face in h:
            keys.append(face @ layer.to_k_f.weight.T)
            values.append(face @ layer.to_v_f.weight.T)
            owner.append(torch.full((len(face),), i))
    k, v, owners = torch.cat(keys), torch.cat(values), torch.cat(owner)
    m = torch.zeros(len(q), len(k))
    for query in range(len(q)):
        for key in range(len(k)):
            i = int(owners[key])
            m[query, key] = math_log(WEIGHTS[i]) if i >= 0 else 0.0
            inside = [j for j, r in enumerate(regions) if r is not None and bool(r.flatten()[query])]
            if i >= 0 and any(j != i for j in inside):
                m[query, key] = -torch.inf
    heads = attn.heads
    split = [t.view(len(t), heads, -1) for t in (q, k, v)]
    logits = torch.einsum("qhd,khd->hqk", split[0], split[1]) * split[0].shape[-1] ** -0.5 + m
    h = torch.einsum("hqk,khd->qhd", logits.softmax(-1), split[2]).flatten(1)
    return attn.to_out(h)[None]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_layers_follow_the_equations(
    base: ModelPatcher, count: int, masked: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patch, "optimized_attention", getattr(backends, backend))
    adapter = make_fused_kv_adapter()
    identities = [make_fused_kv_identity(seed=i, faces=1 + i % 2) for i in range(count)]
    masks = list(make_stripe_masks(64, 64, count)) if masked else [None] * count
    masks[-1] = None if count == 3 else masks[-1]  # one of three has no mask
    people = tuple(Person(*person) for person in zip(identities, masks, WEIGHTS[:count], strict=True))
    model = apply_fused_kv(base, adapter, people)
    unet, text = base.model.diffusion_model, adapter.patcher.model.text[None]
    hidden = []
    for identity in identities:
        x = base.model.process_latent_in(PixelVAE().encode(fused_kv.get_face_crops(identity)[0].float() / 255))
        run = lambda x=x: unet(x, torch.zeros(len(x)), context=text.expand(len(x), -1, -1), transformer_options={})  # noqa: E731
        hidden.append({path: n for path, (n, _) in capture_layers(base, run)[0].items()})
    with torch.inference_mode():
        passes = capture_layers(base, lambda: sample_latent(model, steps=1, cfg=1.0))
    for path, (n, out) in passes[-1].items():  # after the passes over the faces
        side = round(n.shape[1] ** 0.5)
        cells = [
            None if m is None else m[0].view(side, 64 // side, side, 64 // side).mean((1, 3)) >= 0.5 for m in masks
        ]
        expected = reference(base, adapter, path, n, [h[path] for h in hidden], cells)
        assert all_close(out, expected, 1e-5), path


def test_an_identity_changes_nothing_inside_another_ones_mask(base: ModelPatcher) -> None:
    """Inside B's mask alone, a layer's output does not depend on A's photo, bit for bit."""
    adapter, masks = make_fused_kv_adapter(), make_stripe_masks()
    captured = []
    for seed in (1, 2):
        people = (Person(make_fused_kv_identity(seed=seed), masks[0]), Person(make_fused_kv_identity(seed=9), masks[1]))
        model = apply_fused_kv(base, adapter, people)
        with torch.inference_mode():
            passes = capture_layers(base, lambda model=model: sample_latent(model, steps=1, cfg=1.0))
        captured.append(passes[-1][LAYERS[0]])  # the first layer that sees a face
    (first_input, first), (second_input, second) = captured
    assert torch.equal(first_input, second_input)
    changed = (first != second).any(dim=-1).view(8, 8)
    assert not changed[:, 4:].any()
    assert changed[:, :4].all()


def test_no_mask_of_queries_by_keys_is_made(base: ModelPatcher, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mask of the attention backend has at most one number per key, for any number of heads, layers and regions."""
    sizes: list[tuple[int, int]] = []
    real = patch.optimized_attention

    def record_sizes(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, **rest: Any) -> Tensor:
        sizes.append((0 if mask is None else mask.numel(), k.shape[1]))
        return real(q, k, v, heads, mask, **rest)

    monkeypatch.setattr(patch, "optimized_attention", record_sizes)
    people = tuple(
        Person(make_fused_kv_identity(seed=i), mask, 0.5 + i) for i, mask in enumerate(make_stripe_masks(count=4))
    )
    sample_latent(apply_fused_kv(base, make_fused_kv_adapter(), people), batch_size=2, steps=1)
    assert sizes and all(numbers <= keys for numbers, keys in sizes) and any(numbers for numbers, _ in sizes)


def dense(q: Tensor, blocks: Sequence[KeyValueBlock]) -> Tensor:
    """The same attention with a mask of queries x keys, one head."""
    k, v = (
        torch.cat([part.expand(len(q), -1, -1) for part in parts], 1)
        for parts in zip(*((b.k, b.v) for b in blocks), strict=True)
    )
    m = []
    for b in blocks:
        bias = torch.zeros(1, 1, b.k.shape[1]) if b.bias is None else b.bias
        visible = torch.ones(1, q.shape[1], dtype=torch.bool) if b.visible_queries is None else b.visible_queries
        rows = visible[torch.arange(len(q)) % len(visible)]
        m.append(bias.expand(len(q), q.shape[1], -1).masked_fill(~rows[..., None], -torch.inf))
    return (q @ k.mT * q.shape[-1] ** -0.5 + torch.cat(m, 2)).softmax(-1) @ v


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    return (q @ k.mT * q.shape[-1] ** -0.5 + (0 if bias is None else bias)).softmax(-1) @ v


@pytest.mark.parametrize("rows", [1, 2, 3, 5])
@pytest.mark.parametrize("images", [1, 2, 3])
def test_query_groups_equal_a_mask(rows: int, images: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    q = torch.randn(rows, 30, 8, generator=generator)
    blocks = [KeyValueBlock(torch.randn(rows, 7, 8, generator=generator), torch.randn(rows, 7, 8, generator=generator))]
    for i in range(3):
        visible = None if i == 2 else torch.rand(1 if i else images, 30, generator=generator) > 0.5
        bias = torch.tensor([0.5, 2.0, 1.0, 1.0]).log()[None, None] if i else None
        k, v = (torch.randn(1, 4, 8, generator=generator) for _ in "kv")
        blocks.append(KeyValueBlock(k, v, bias, visible))
    groups = QueryGrouping([b.visible_queries for b in blocks], q.device).group_rows(range(rows))
    out = attend_blocks(q, blocks, groups, attend)
    assert torch.allclose(out, dense(q, blocks), atol=1e-6)
    assert sum(1 if g.queries is None else len(g.queries) for g in groups) <= 30 * rows


def test_weight_two_is_two_keys_and_weight_zero_is_none() -> None:
    q, k, v = torch.randn(3, 1, 6, 8, generator=torch.Generator().manual_seed(1)).unbind(0)
    text = KeyValueBlock(k, v)
    twice = [text, KeyValueBlock(k, v, fused_kv.compute_key_bias([2.0], 6))]
    assert torch.allclose(dense(q, twice), dense(q, [text, KeyValueBlock(k, v), KeyValueBlock(k, v)]), atol=1e-6)
    assert fused_kv.compute_key_bias([1.0, 1.0], 6) is None


def test_metadata_round_trip() -> None:
    import json

    from support.fused_kv import make_fused_kv_spec

    tensors = make_fused_kv_tensors()
    spec = make_fused_kv_spec(tensors, stream_noise="match")
    metadata = json.loads(fused_kv.make_fused_kv_metadata(spec)["likeness"])
    loaded, report = fused_kv_loader.load_fused_kv(tensors, metadata, "mine.safetensors")
    assert loaded.spec == spec
    assert "16 cross-attentions" in report and "steps: 1" in report
    path = "middle_block.1.transformer_blocks.0"
    assert torch.equal(loaded.patcher.model.get_layer(path).to_v_f.weight, tensors[f"{path}.attn2.to_v_f.weight"])


METADATA = {
    "kind": "fused_kv",
    "version": 1,
    "base": "SD1.5",
    "stream_noise": "clean",
    "face_size": 64,
    "notes": {},
}
BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "another kind": ({"kind": "mixed"}, "mixed"),
    "newer": ({"version": 2}, "update the pack"),
    "no base": ({"base": None}, "base"),
    "odd noise": ({"stream_noise": "some"}, "match or clean"),
    "odd size": ({"face_size": 100}, "multiple of 8"),
}


@pytest.mark.parametrize("name", list(BROKEN))
def test_invalid_metadata_is_rejected(name: str) -> None:
    change, message = BROKEN[name]
    with pytest.raises(ValueError, match=message):
        fused_kv.read_fused_kv_spec(make_fused_kv_tensors(), METADATA | change, "mine.safetensors")


def test_invalid_tensors_are_rejected() -> None:
    whole = make_fused_kv_tensors()
    key = next(key for key in whole if key.endswith("to_k_f.weight"))
    for wrong, message in (
        ({k: v for k, v in whole.items() if k != key}, "misses"),
        (whole | {key: whole[key][:, :3]}, "misshapen"),
        (whole | {"else": whole[key]}, "'else'"),
        ({k: v for k, v in whole.items() if k != "text.hidden"}, "text.hidden"),
    ):
        with pytest.raises(ValueError, match=message):
            fused_kv_loader.load_fused_kv(wrong, METADATA, "mine.safetensors")


def test_zero_shot_equals_self_attention_if_query_and_output_matrices_agree() -> None:
    """With equal query and output matrices in both attentions, the projections are those of the self-attention."""
    generator = torch.Generator().manual_seed(0)
    own = {name: torch.randn(32, 32, generator=generator).double() for name in ("q1", "k1", "v1", "o1")}
    to_k, to_v = fused_kv.solve_zero_shot_projections({**own, "q2": own["q1"], "o2": own["o1"]}, 4)
    assert all_close(to_k.float(), own["k1"].float(), 1e-4) and all_close(to_v.float(), own["v1"].float(), 1e-4)
    other = {"q2": torch.randn(32, 32, generator=generator), "o2": torch.randn(32, 32, generator=generator)}
    to_k, to_v = fused_kv.solve_zero_shot_projections({**own, **other}, 4)
    for h in range(4):
        rows = slice(8 * h, 8 * h + 8)
        target = own["q1"].float()[rows].T @ own["k1"].float()[rows]
        # The residual is orthogonal to what the queries can reach.
        residual = target - other["q2"][rows].T @ to_k.float()[rows]
        assert (other["q2"][rows] @ residual).abs().max() < 1e-3 * target.abs().max()


def test_adapters_of_other_methods_are_rejected(base: ModelPatcher) -> None:
    with pytest.raises(ValueError, match="not a fused KV adapter"):
        apply_fused_kv(base, make_ip_adapter())  # pyright: ignore[reportArgumentType]
    from support.ip_adapters import apply_ip_adapter

    with pytest.raises(ValueError, match="IP-Adapter family"):
        apply_ip_adapter(base, make_fused_kv_adapter(), make_fused_kv_identity())  # pyright: ignore[reportArgumentType]
