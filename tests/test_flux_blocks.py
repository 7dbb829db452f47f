"""FLUX's blocks with terms in them against their equations in plain torch, einsum by einsum."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfyui_likeness.likeness.decoupled import tokens
from comfyui_likeness.nodes.types import LoadedAdapter
from fluxes import DOUBLES, FAMILY, OMNI, SHOWN, adapter, applied, person
from models import close, patcher, sample
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, silu

pytestmark = pytest.mark.skipif(not SHOWN, reason="the host shows FLUX's queries to no patch")

HEADS, TEXT = 2, 7


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(C)) v of [B, H, N, C], the heads side by side."""
    weights = (torch.einsum("bhnc,bhmc->bhnm", q, k) / q.shape[-1] ** 0.5).softmax(-1)
    return torch.einsum("bhnm,bhmc->bnhc", weights, v).flatten(2)


def split(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def rotated(x: Tensor, pe: Tensor) -> Tensor:
    """Pairs of channels turned by the rotations pe [B, 1, N, C / 2, 2, 2]."""
    return torch.einsum("bhncij,bhncj->bhnci", pe.expand(-1, HEADS, -1, -1, -1, -1), x.unflatten(-1, (-1, 2))).flatten(
        -2
    )


def rms(x: Tensor, weight: Tensor | float, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def norm(x: Tensor) -> Tensor:
    return layer_norm(x, x.shape[-1:], eps=1e-6)


class Weights:
    """A block's tensors by name, and its linear layers."""

    def __init__(self, block: torch.nn.Module) -> None:
        self.of = block.state_dict()

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.of[f"{name}.weight"].T + self.of[f"{name}.bias"]

    def modulation(self, name: str, vec: Tensor, parts: int) -> tuple[Tensor, ...]:
        return self.linear(name, silu(vec))[:, None].chunk(parts, -1)

    def qkv(self, packed: Tensor, path: str) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (split(part) for part in packed.chunk(3, -1))
        return (
            rms(q, self.of[f"{path}.query_norm.weight"], 1e-6), rms(k, self.of[f"{path}.key_norm.weight"], 1e-6), v,
        )  # fmt: skip


def term(given: LoadedAdapter, name: str, q: Tensor) -> Tensor:
    """The second attention of a layer: K' and V' of the identity's tokens, by the file's matrices."""
    module = given.patcher.model
    made = tokens(module, given.spec, person(given.spec.kind), torch.device("cpu")).cond
    weights = module.layers.get_submodule(name).state_dict()
    k, v = (split(made @ weights[f"{part}.weight"].T + weights.get(f"{part}.bias", 0)) for part in "kv")
    if given.spec.kind == "instantx":
        k, v = rms(k, 1.0, 1e-5), rms(v, 1.0, 1e-5)
    return attend(q, k.expand(len(q), -1, -1, -1), v.expand(len(q), -1, -1, -1))


def double(block: Any, args: dict[str, Any], given: LoadedAdapter, name: str) -> Tensor:
    """The stream of pictures behind a double block."""
    w, img, txt, vec = Weights(block), args["img"], args["txt"], args["vec"]
    shift, scale, gate, shift2, scale2, gate2 = w.modulation("img_mod.lin", vec, 6)
    text_shift, text_scale, *_ = w.modulation("txt_mod.lin", vec, 6)
    own = w.qkv(w.linear("img_attn.qkv", norm(img) * (1 + scale) + shift), "img_attn.norm")
    text = w.qkv(w.linear("txt_attn.qkv", norm(txt) * (1 + text_scale) + text_shift), "txt_attn.norm")
    q, k, v = (torch.cat(pair, dim=2) for pair in zip(text, own, strict=True))
    attn = attend(rotated(q, args["pe"]), rotated(k, args["pe"]), v)[:, TEXT:]
    added = term(given, name, own[0])
    attn = attn if given.spec.kind == "xlabs" else attn + added
    img = img + gate * w.linear("img_attn.proj", attn)
    inner = gelu(w.linear("img_mlp.0", norm(img) * (1 + scale2) + shift2), approximate="tanh")
    img = img + gate2 * w.linear("img_mlp.2", inner)
    return img + added if given.spec.kind == "xlabs" else img


def single(block: Any, args: dict[str, Any], given: LoadedAdapter, name: str) -> Tensor:
    """Both streams behind a single block."""
    w, x = Weights(block), args["img"]
    shift, scale, gate = w.modulation("modulation.lin", args["vec"], 3)
    packed = w.linear("linear1", norm(x) * (1 + scale) + shift)
    q, k, v = w.qkv(packed[..., : 3 * x.shape[-1]], "norm")
    attn = attend(rotated(q, args["pe"]), rotated(k, args["pe"]), v)
    start = TEXT if given.spec.kind == OMNI else 0
    attn = torch.cat((attn[:, :start], attn[:, start:] + term(given, name, q[:, :, start:])), dim=1)
    inner = gelu(packed[..., 3 * x.shape[-1] :], approximate="tanh")
    return x + gate * w.linear("linear2", torch.cat((attn, inner), dim=-1))


def run(model: ModelPatcher, side: str, index: int) -> tuple[dict[str, Any], Tensor]:
    """What one block was given and what it made of it, in the host's own sampling."""
    seen: list[Any] = []
    options = model.model_options["transformer_options"]
    found = options.get("patches_replace", {}).get("dit", {}).get((f"{side}_block", index))

    def look(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        given = {key: value.clone() if isinstance(value, Tensor) else value for key, value in args.items()}
        out = extra["original_block"](args) if found is None else found(args, extra)
        seen.append((given, out["img"].clone()))
        return out

    watched = model.clone()
    watched.set_model_patch_replace(look, "dit", f"{side}_block", index)
    sample(watched, FAMILY, steps=1, cfg=1.0, batch=2)
    return seen[0]


@pytest.mark.parametrize("kind", ["xlabs", "instantx", OMNI])
def test_double_block(kind: str) -> None:
    base, given = patcher(FAMILY), adapter(kind)
    name = "1" if kind == "instantx" else "double_blocks.1"
    args, out = run(applied(base, given, custom_layers="1:1"), "double", 1)
    expected = double(base.model.diffusion_model.double_blocks[1], args, given, name)
    assert close(out, expected)
    assert not close(run(base, "double", 1)[1], expected, 1e-3)


@pytest.mark.parametrize("kind", ["instantx", OMNI])
def test_single_block(kind: str) -> None:
    base, given = patcher(FAMILY), adapter(kind)
    name = f"{DOUBLES + 2}" if kind == "instantx" else "single_blocks.2"
    args, out = run(applied(base, given, custom_layers=f"{DOUBLES + 2}:1"), "single", 2)
    expected = single(base.model.diffusion_model.single_blocks[2], args, given, name)
    assert close(out, expected)
    assert not close(run(base, "single", 2)[1], expected, 1e-3)
