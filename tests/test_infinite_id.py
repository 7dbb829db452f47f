"""Infinite-ID by its equations: a plain reference in einsum, against the patched layers of the host; its files."""

from __future__ import annotations

from typing import Any

import comfy.ldm.modules.attention as backends
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfyui_likeness.likeness import infinite_id as math
from comfyui_likeness.likeness.blocks import Block
from comfyui_likeness.nodes.attention import patch
from comfyui_likeness.nodes.loaders import own as loader
from mixeds import TOKENS, adapter, mixed, person, tensors, told
from models import close, patcher, prompt, sample
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear, normalize

BLOCKS = ("input_blocks.1.1", "input_blocks.4.1", "output_blocks.9.1")
NUMBERS = {"SD1.5": (1, 5, 25)}  # of these blocks' cross-attentions in adapter files


@pytest.fixture(scope="module")
def base() -> ModelPatcher:
    return patcher()


def seen(model: ModelPatcher, run: Any) -> dict[str, dict[str, Tensor]]:
    """What attn1 and attn2 of some blocks read and gave in a run of one call."""
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


def manner(style: str, x: Tensor, y: Tensor) -> Tensor:
    if style == "none":
        return x
    mean_x, mean_y = x.mean(1, keepdim=True), y.mean(1, keepdim=True)
    if style == "AdaIN-mean":
        return x - mean_x + mean_y
    deviation_x, deviation_y = (t.var(1, correction=0, keepdim=True).sqrt() for t in (x, y))
    return (x - mean_x) / deviation_x * deviation_y + mean_y


def identity_tokens(weights: dict[str, Tensor]) -> Tensor:
    """c_id of `person()`, from the file's tensors."""
    face, hidden = (value.float() for value in person().embeddings.values())
    w = {key.removeprefix("projector."): value for key, value in weights.items()}
    clip = linear(
        layer_norm(hidden, (1280,), w["clip.0.weight"], w["clip.0.bias"]), w["clip.1.weight"], w["clip.1.bias"]
    )
    inner = gelu(linear(normalize(face, dim=-1), w["face.proj.0.weight"], w["face.proj.0.bias"]))
    made = linear(inner, w["face.proj.2.weight"], w["face.proj.2.bias"]).unflatten(-1, (TOKENS, -1))
    width = made.shape[-1]
    return torch.cat((clip, layer_norm(made, (width,), w["face.norm.weight"], w["face.norm.bias"])), 1)


@pytest.mark.parametrize("backend", ["attention_pytorch", "attention_sub_quad", "attention_split", "attention_basic"])
@pytest.mark.parametrize("style", list(math.STYLES))
@pytest.mark.parametrize("kind", list(math.ATTENTIONS))
def test_layers_follow_the_equations(
    base: ModelPatcher, kind: str, style: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patch, "optimized_attention", getattr(backends, backend))
    weights = tensors()
    model = mixed(base, attention=kind, style=style, strength=0.7)
    found = seen(base, lambda: sample(model, steps=1, cfg=1.0))
    c_id, text = identity_tokens(weights), prompt(1)[0][0]
    for path, n in zip(BLOCKS, NUMBERS["SD1.5"], strict=True):
        block: Any = base.model.diffusion_model.get_submodule(f"{path}.transformer_blocks.0")
        one, two, got = block.attn1, block.attn2, found[path]
        own, other = got["n1"][:1], got["n1"][1:]  # the picture's row, and the text stream's behind it
        q, k, v = one.to_q(own), one.to_k(own), one.to_v(own)
        if kind != "off":
            k_t, v_t = one.to_k(other), one.to_v(other)
            k, v = manner(style, k, k_t), manner(style, v, v_t)
            k, v = (k_t, v_t) if kind == "mutual" else (torch.cat((k, k_t), 1), torch.cat((v, v_t), 1))
        assert close(got["o1"][:1], one.to_out(attention(q, k, v, one.heads)), 1e-5), path
        q, k_t, v_t = two.to_q(got["n2"][:1]), two.to_k(text), two.to_v(text)
        k, v = (linear(c_id, weights[f"layers.{n}.{part}.weight"]) for part in "kv")
        k, v = manner(style, k, k_t), manner(style, v, v_t)
        expected = attention(q, k_t, v_t, two.heads) + 0.7 * attention(q, k, v, two.heads)
        assert close(got["o2"][:1], two.to_out(expected), 1e-5), path


def test_adain_mean_moves_the_mean_alone() -> None:
    x, y = torch.randn(2, 1, 30, 8, generator=torch.Generator().manual_seed(1)).unbind(0)
    moved = math.adain_mean(3 * x + 1, y)
    assert torch.allclose(moved.mean(1), y.mean(1), atol=1e-6)
    assert torch.allclose(moved - moved.mean(1, keepdim=True), 3 * (x - x.mean(1, keepdim=True)), atol=1e-5)
    whole = math.adain(3 * x + 1, y)
    assert torch.allclose(whole.std(1), y.std(1), atol=1e-4) and torch.allclose(whole.mean(1), y.mean(1), atol=1e-6)
    assert math.adain(torch.ones(1, 4, 2), y[..., :2]).isfinite().all()


def test_weights_of_the_text_stream() -> None:
    x, y = (Block(torch.zeros(1, 3, 4), torch.zeros(1, 3, 4)) for _ in range(2))
    mixed_, mutual = math.ATTENTIONS["mixed"], math.ATTENTIONS["mutual"]
    assert mixed_ is not None and mutual is not None
    assert len(mixed_(x, y, math.STYLES["none"], 1.0)) == 2 and mixed_(x, y, math.STYLES["none"], 1.0)[1].bias is None
    assert mutual(x, y, math.STYLES["none"], 1.0) == (y,)
    halves = mutual(x, y, math.STYLES["none"], 0.25)
    assert [float(b.bias.exp().mean()) for b in halves if b.bias is not None] == pytest.approx([0.75, 0.25])


@pytest.mark.parametrize("family", ["SD1.5", "SDXL"])
def test_a_file_says_what_it_is(family: str) -> None:
    loaded, report = loader.load(tensors(family), told(family), "mine.safetensors")
    spec = loaded.spec
    assert spec.kind == "infinite_id" and spec.base == family and spec.tokens == 257 + TOKENS
    assert [str(need) for need in spec.needs] == ["arcface.buffalo_l.raw.face112", "clip.vit-h-14.last.face224"]
    assert "Infinite-ID" in report and "steps: 1" in report and "clip.vit-h-14.last.face224" in report


def test_what_is_off_in_a_file_is_said() -> None:
    whole = tensors()
    for weights, about, message in (
        (whole, told() | {"unconditional": "some"}, "zero or none"),
        (whole, told() | {"version": 2}, "update the pack"),
        ({k: v for k, v in whole.items() if not k.startswith("projector.face.norm")}, told(), "face.norm.weight"),
        ({k: v for k, v in whole.items() if k != "layers.3.k.weight"}, told(), "not all matrices"),
        ({k: v for k, v in whole.items() if not k.startswith("layers.3.")}, told(), "15 cross-attentions"),
        (whole | {"else": whole["layers.1.k.weight"]}, told(), "else"),
    ):
        with pytest.raises(ValueError, match=message):
            loader.load(weights, about, "mine.safetensors")


def test_the_adapter_is_loaded_once_for_all_terms(base: ModelPatcher) -> None:
    given = adapter()
    model = mixed(base, given)
    assert [i.patchers for i in patch.injections(model)] == [[given.patcher], []]
