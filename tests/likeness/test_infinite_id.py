"""Infinite-ID: a plain reference of its equations in einsum, against ComfyUI's patched layers; its files."""

from __future__ import annotations

from typing import Any

import comfy.ldm.modules.attention as backends
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfyui_likeness.likeness.attention.grouped_attention import KeyValueBlock
from comfyui_likeness.likeness.methods import infinite_id
from comfyui_likeness.nodes.attention import patch
from comfyui_likeness.nodes.loaders import native_adapters
from support.host_models import all_close, make_conditioning, make_small_model, sample_latent
from support.infinite_id_adapters import (
    NUM_FACE_TOKENS,
    apply_infinite_id,
    make_infinite_id_adapter,
    make_infinite_id_identity,
    make_infinite_id_metadata,
    make_infinite_id_tensors,
)
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear, normalize

BLOCKS = ("input_blocks.1.1", "input_blocks.4.1", "output_blocks.9.1")
NUMBERS = {"SD1.5": (1, 5, 25)}  # of these blocks' cross-attentions in adapter files


@pytest.fixture(scope="module")
def base() -> ModelPatcher:
    return make_small_model()


def capture_layers(model: ModelPatcher, run: Any) -> dict[str, dict[str, Tensor]]:
    """Inputs and outputs of attn1 and attn2 in BLOCKS, for a run with one call of the UNet."""
    out: dict[str, dict[str, Tensor]] = {path: {} for path in BLOCKS}
    hooks = []
    for path in BLOCKS:
        block: Any = model.model.diffusion_model.get_submodule(f"{path}.transformer_blocks.0")
        modules = {"n1": block.norm1, "n2": block.norm2, "o1": block.attn1.to_out, "o2": block.attn2.to_out}
        for name, module in modules.items():
            keep = lambda _m, _g, o, path=path, name=name: out[path].__setitem__(name, o)  # noqa: E731
            hooks.append(module.register_forward_hook(keep))
    try:
        with torch.inference_mode():
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return out


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    q, k, v = (t.unflatten(-1, (heads, -1)) for t in (q, k, v))
    logits = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1), v).flatten(-2)


def normalize_style(style: str, x: Tensor, y: Tensor) -> Tensor:
    if style == "none":
        return x
    mean_x, mean_y = x.mean(1, keepdim=True), y.mean(1, keepdim=True)
    if style == "AdaIN-mean":
        return x - mean_x + mean_y
    deviation_x, deviation_y = (t.var(1, correction=0, keepdim=True).sqrt() for t in (x, y))
    return (x - mean_x) / deviation_x * deviation_y + mean_y


def identity_tokens(weights: dict[str, Tensor]) -> Tensor:
    """c_id of make_infinite_id_identity(), from a file's tensors."""
    face, hidden = (value.float() for value in make_infinite_id_identity().embeddings.values())
    w = {key.removeprefix("projector."): value for key, value in weights.items()}
    clip = linear(
        layer_norm(hidden, (1280,), w["clip.0.weight"], w["clip.0.bias"]), w["clip.1.weight"], w["clip.1.bias"]
    )
    inner = gelu(linear(normalize(face, dim=-1), w["face.proj.0.weight"], w["face.proj.0.bias"]))
    face_tokens = linear(inner, w["face.proj.2.weight"], w["face.proj.2.bias"]).unflatten(-1, (NUM_FACE_TOKENS, -1))
    width = face_tokens.shape[-1]
    return torch.cat((clip, layer_norm(face_tokens, (width,), w["face.norm.weight"], w["face.norm.bias"])), 1)


@pytest.mark.parametrize("backend", ["attention_pytorch", "attention_sub_quad", "attention_split", "attention_basic"])
@pytest.mark.parametrize("style", list(infinite_id.STYLE_NORMALIZATIONS))
@pytest.mark.parametrize("kind", list(infinite_id.SELF_ATTENTION_MODES))
def test_layers_follow_the_equations(
    base: ModelPatcher, kind: str, style: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patch, "optimized_attention", getattr(backends, backend))
    weights = make_infinite_id_tensors()
    model = apply_infinite_id(base, attention=kind, style=style, strength=0.7)
    captured = capture_layers(base, lambda: sample_latent(model, steps=1, cfg=1.0))
    c_id, text = identity_tokens(weights), make_conditioning(1)[0][0]
    for path, n in zip(BLOCKS, NUMBERS["SD1.5"], strict=True):
        block: Any = base.model.diffusion_model.get_submodule(f"{path}.transformer_blocks.0")
        one, two, got = block.attn1, block.attn2, captured[path]
        own, other = got["n1"][:1], got["n1"][1:]  # the rows of the image and of the text stream
        q, k, v = one.to_q(own), one.to_k(own), one.to_v(own)
        if kind != "off":
            k_t, v_t = one.to_k(other), one.to_v(other)
            k, v = normalize_style(style, k, k_t), normalize_style(style, v, v_t)
            k, v = (k_t, v_t) if kind == "mutual" else (torch.cat((k, k_t), 1), torch.cat((v, v_t), 1))
        assert all_close(got["o1"][:1], one.to_out(attention(q, k, v, one.heads)), 1e-5), path
        q, k_t, v_t = two.to_q(got["n2"][:1]), two.to_k(text), two.to_v(text)
        k, v = (linear(c_id, weights[f"layers.{n}.{part}.weight"]) for part in "kv")
        k, v = normalize_style(style, k, k_t), normalize_style(style, v, v_t)
        expected = attention(q, k_t, v_t, two.heads) + 0.7 * attention(q, k, v, two.heads)
        assert all_close(got["o2"][:1], two.to_out(expected), 1e-5), path


def test_adain_mean_only_changes_the_mean() -> None:
    x, y = torch.randn(2, 1, 30, 8, generator=torch.Generator().manual_seed(1)).unbind(0)
    moved = infinite_id.apply_adain_mean(3 * x + 1, y)
    assert torch.allclose(moved.mean(1), y.mean(1), atol=1e-6)
    assert torch.allclose(moved - moved.mean(1, keepdim=True), 3 * (x - x.mean(1, keepdim=True)), atol=1e-5)
    whole = infinite_id.apply_adain(3 * x + 1, y)
    assert torch.allclose(whole.std(1), y.std(1), atol=1e-4) and torch.allclose(whole.mean(1), y.mean(1), atol=1e-6)
    assert infinite_id.apply_adain(torch.ones(1, 4, 2), y[..., :2]).isfinite().all()


def test_text_stream_weights() -> None:
    x, y = (KeyValueBlock(torch.zeros(1, 3, 4), torch.zeros(1, 3, 4)) for _ in range(2))
    mixed, mutual = infinite_id.SELF_ATTENTION_MODES["mixed"], infinite_id.SELF_ATTENTION_MODES["mutual"]
    assert mixed is not None and mutual is not None
    assert (
        len(mixed(x, y, infinite_id.STYLE_NORMALIZATIONS["none"], 1.0)) == 2
        and mixed(x, y, infinite_id.STYLE_NORMALIZATIONS["none"], 1.0)[1].bias is None
    )
    assert mutual(x, y, infinite_id.STYLE_NORMALIZATIONS["none"], 1.0) == (y,)
    halves = mutual(x, y, infinite_id.STYLE_NORMALIZATIONS["none"], 0.25)
    assert [float(b.bias.exp().mean()) for b in halves if b.bias is not None] == pytest.approx([0.75, 0.25])


@pytest.mark.parametrize("family", ["SD1.5", "SDXL"])
def test_a_file_is_loaded_and_reported(family: str) -> None:
    loaded, report = native_adapters.load_native_adapter(
        make_infinite_id_tensors(family), make_infinite_id_metadata(family), "mine.safetensors"
    )
    spec = loaded.spec
    assert spec.kind == "infinite_id" and spec.base == family and spec.tokens == 257 + NUM_FACE_TOKENS
    assert [str(need) for need in spec.needs] == ["arcface.buffalo_l.raw.face112", "clip.vit-h-14.last.face224"]
    assert "Infinite-ID" in report and "steps: 1" in report and "clip.vit-h-14.last.face224" in report


def test_invalid_files_are_rejected() -> None:
    whole = make_infinite_id_tensors()
    for weights, metadata, message in (
        (whole, make_infinite_id_metadata() | {"unconditional": "some"}, "zero or none"),
        (whole, make_infinite_id_metadata() | {"version": 2}, "update the pack"),
        (
            {k: v for k, v in whole.items() if not k.startswith("projector.face.norm")},
            make_infinite_id_metadata(),
            "face.norm.weight",
        ),
        ({k: v for k, v in whole.items() if k != "layers.3.k.weight"}, make_infinite_id_metadata(), "not all matrices"),
        (
            {k: v for k, v in whole.items() if not k.startswith("layers.3.")},
            make_infinite_id_metadata(),
            "15 cross-attentions",
        ),
        (whole | {"else": whole["layers.1.k.weight"]}, make_infinite_id_metadata(), "else"),
    ):
        with pytest.raises(ValueError, match=message):
            native_adapters.load_native_adapter(weights, metadata, "mine.safetensors")


def test_the_adapter_is_loaded_once_for_all_terms(base: ModelPatcher) -> None:
    adapter = make_infinite_id_adapter()
    model = apply_infinite_id(base, adapter)
    assert [i.patchers for i in patch.get_injections(model)] == [[adapter.patcher], []]
