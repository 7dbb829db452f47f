"""Fused KV by its equations: a plain reference in einsum, against the patched layers of the host."""

from __future__ import annotations

from collections.abc import Sequence
from math import log as math_log
from typing import Any

import comfy.ldm.modules.attention as backends
import pytest
import torch
from adapters import adapter as decoupled_adapter
from comfy.model_patcher import ModelPatcher
from comfyui_likeness.likeness import fused as math
from comfyui_likeness.likeness.blocks import Block, attend_blocks, group
from comfyui_likeness.likeness.spec import Person
from comfyui_likeness.nodes.attention import patch
from comfyui_likeness.nodes.loaders import fused as loader
from fuseds import Vae, adapter, fused, halves, person, tensors
from models import close, patcher, prompt, sample
from torch import Tensor

BACKENDS = ("attention_pytorch", "attention_sub_quad", "attention_split", "attention_basic")
LAYERS = ("input_blocks.1.1", "input_blocks.4.1", "output_blocks.9.1")


@pytest.fixture(scope="module")
def base() -> ModelPatcher:
    return patcher()


def seen_by(model: ModelPatcher, run: Any) -> list[dict[str, tuple[Tensor, Tensor]]]:
    """What every cross-attention of LAYERS read and gave in each pass of the UNet that `run` makes."""
    passes: list[dict[str, tuple[Tensor, Tensor]]] = []
    read: dict[str, Tensor] = {}
    hooks = []
    for path in LAYERS:
        block: Any = model.model.diffusion_model.get_submodule(f"{path}.transformer_blocks.0")

        def reads(_module: Any, _given: Any, out: Tensor, path: str = path) -> None:
            if path == LAYERS[0]:
                passes.append({})
            read[path] = out

        def gives(_module: Any, _given: Any, out: Tensor, path: str = path) -> None:
            passes[-1][path] = read[path], out

        hooks += [block.norm2.register_forward_hook(reads), block.attn2.to_out.register_forward_hook(gives)]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return passes


WEIGHTS = (1.0, 0.5, 2.0, 1.0)


def reference(
    model: ModelPatcher,
    given: Any,
    path: str,
    hidden: Tensor,
    faces: Sequence[Tensor],
    regions: Sequence[Tensor | None],
) -> Tensor:
    """Eq. 1-7 for one layer: hidden [1, N, C], faces [n_i, T, C] per identity, regions [h, w] of booleans.

    A key of weight w has log w added to its logits.
    """
    attn: Any = model.model.diffusion_model.get_submodule(f"{path}.transformer_blocks.0.attn2")
    text = prompt(1)[0][0]
    ours = given.patcher.model.at(f"{path}.transformer_blocks.0")
    q = attn.to_q(hidden)[0]
    keys, values, owner = [attn.to_k(text)[0]], [attn.to_v(text)[0]], [torch.full((text.shape[1],), -1)]
    for i, h in enumerate(faces):
        for face in h:
            keys.append(face @ ours.to_k_f.weight.T)
            values.append(face @ ours.to_v_f.weight.T)
            owner.append(torch.full((len(face),), i))
    k, v, of = torch.cat(keys), torch.cat(values), torch.cat(owner)
    m = torch.zeros(len(q), len(k))
    for query in range(len(q)):
        for key in range(len(k)):
            i = int(of[key])
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
    given, who = adapter(), [person(seed=i, faces=1 + i % 2) for i in range(count)]
    masks = list(halves(64, 64, count)) if masked else [None] * count
    masks[-1] = None if count == 3 else masks[-1]  # one of three may be anywhere
    model = fused(base, given, tuple(Person(*one) for one in zip(who, masks, WEIGHTS[:count], strict=True)))
    unet, text = base.model.diffusion_model, given.patcher.model.text[None]
    hidden = []
    for one in who:
        x = base.model.process_latent_in(Vae().encode(math.faces(one)[0].float() / 255))
        run = lambda x=x: unet(x, torch.zeros(len(x)), context=text.expand(len(x), -1, -1), transformer_options={})  # noqa: E731
        hidden.append({path: n for path, (n, _) in seen_by(base, run)[0].items()})
    with torch.inference_mode():
        seen = seen_by(base, lambda: sample(model, steps=1, cfg=1.0))[-1]  # behind the passes over the faces
    for path, (n, out) in seen.items():
        side = round(n.shape[1] ** 0.5)
        cells = [
            None if m is None else m[0].view(side, 64 // side, side, 64 // side).mean((1, 3)) >= 0.5 for m in masks
        ]
        expected = reference(base, given, path, n, [h[path] for h in hidden], cells)
        assert close(out, expected, 1e-5), path


def test_an_identity_changes_nothing_inside_another_ones_mask(base: ModelPatcher) -> None:
    """Inside B's mask alone, a layer's output does not depend on A's photo, bit for bit."""
    given, masks = adapter(), halves()
    outs = []
    for seed in (1, 2):
        who = (Person(person(seed=seed), masks[0]), Person(person(seed=9), masks[1]))
        model = fused(base, given, who)
        with torch.inference_mode():
            passes = seen_by(base, lambda model=model: sample(model, steps=1, cfg=1.0))
        outs.append(passes[-1][LAYERS[0]])  # nothing before this layer has seen a face
    (read, first), (again, second) = outs
    assert torch.equal(read, again)
    changed = (first != second).any(dim=-1).view(8, 8)
    assert not changed[:, 4:].any()
    assert changed[:, :4].all()


def test_no_mask_of_queries_by_keys_is_made(base: ModelPatcher, monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes to the backend beside q, k and v has a number per key at most, whatever the heads, layers, regions."""
    seen: list[tuple[int, int]] = []
    real = patch.optimized_attention

    def watching(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, **rest: Any) -> Tensor:
        seen.append((0 if mask is None else mask.numel(), k.shape[1]))
        return real(q, k, v, heads, mask, **rest)

    monkeypatch.setattr(patch, "optimized_attention", watching)
    people = tuple(Person(person(seed=i), mask, 0.5 + i) for i, mask in enumerate(halves(count=4)))
    sample(fused(base, adapter(), people), batch=2, steps=1)
    assert seen and all(numbers <= keys for numbers, keys in seen) and any(numbers for numbers, _ in seen)


def dense(q: Tensor, blocks: Sequence[Block]) -> Tensor:
    """The same attention with a mask of queries x keys, one head."""
    k, v = (
        torch.cat([part.expand(len(q), -1, -1) for part in parts], 1)
        for parts in zip(*((b.k, b.v) for b in blocks), strict=True)
    )
    m = []
    for b in blocks:
        bias = torch.zeros(1, 1, b.k.shape[1]) if b.bias is None else b.bias
        seen = torch.ones(1, q.shape[1], dtype=torch.bool) if b.seen is None else b.seen
        rows = seen[torch.arange(len(q)) % len(seen)]
        m.append(bias.expand(len(q), q.shape[1], -1).masked_fill(~rows[..., None], -torch.inf))
    return (q @ k.mT * q.shape[-1] ** -0.5 + torch.cat(m, 2)).softmax(-1) @ v


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    return (q @ k.mT * q.shape[-1] ** -0.5 + (0 if bias is None else bias)).softmax(-1) @ v


@pytest.mark.parametrize("rows", [1, 2, 3, 5])
@pytest.mark.parametrize("pictures", [1, 2, 3])
def test_groups_are_the_mask(rows: int, pictures: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    q = torch.randn(rows, 30, 8, generator=generator)
    blocks = [Block(torch.randn(rows, 7, 8, generator=generator), torch.randn(rows, 7, 8, generator=generator))]
    for i in range(3):
        seen = None if i == 2 else torch.rand(1 if i else pictures, 30, generator=generator) > 0.5
        bias = torch.tensor([0.5, 2.0, 1.0, 1.0]).log()[None, None] if i else None
        k, v = (torch.randn(1, 4, 8, generator=generator) for _ in "kv")
        blocks.append(Block(k, v, bias, seen))
    groups = group([b.seen for b in blocks], rows, q.device)
    out = attend_blocks(q, blocks, groups, attend)
    assert torch.allclose(out, dense(q, blocks), atol=1e-6)
    assert sum(1 if g.queries is None else len(g.queries) for g in groups) <= 30 * rows


def test_weight_two_is_two_keys_and_weight_zero_is_none() -> None:
    q, k, v = torch.randn(3, 1, 6, 8, generator=torch.Generator().manual_seed(1)).unbind(0)
    text = Block(k, v)
    twice = [text, Block(k, v, math.key_bias([2.0], 6))]
    assert torch.allclose(dense(q, twice), dense(q, [text, Block(k, v), Block(k, v)]), atol=1e-6)
    assert math.key_bias([1.0, 1.0], 6) is None


def test_a_file_says_what_it_is_and_comes_back() -> None:
    import json

    from fuseds import spec

    given = tensors()
    told = json.loads(math.metadata(spec(given, noise="match"))["likeness"])
    loaded, report = loader.load(given, told, "mine.safetensors")
    assert loaded.spec == spec(given, noise="match")
    assert "16 cross-attentions" in report and "steps: 1" in report
    path = "middle_block.1.transformer_blocks.0"
    assert torch.equal(loaded.patcher.model.at(path).to_v_f.weight, given[f"{path}.attn2.to_v_f.weight"])


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "another kind": ({"kind": "mixed"}, "mixed"),
    "newer": ({"version": 2}, "update the pack"),
    "no base": ({"base": None}, "base"),
    "odd noise": ({"stream_noise": "some"}, "match or clean"),
    "odd size": ({"face_size": 100}, "multiple of 8"),
}


@pytest.mark.parametrize("name", list(BROKEN))
def test_metadata_that_is_off_is_refused(name: str) -> None:
    change, message = BROKEN[name]
    told = {"kind": "fused_kv", "version": 1, "base": "SD1.5", "stream_noise": "clean", "face_size": 64, "notes": {}}
    with pytest.raises(ValueError, match=message):
        math.read_spec(tensors(), told | change, "mine.safetensors")


def test_tensors_that_are_off_are_refused() -> None:
    told = {"kind": "fused_kv", "version": 1, "base": "SD1.5", "stream_noise": "clean", "face_size": 64, "notes": {}}
    whole = tensors()
    key = next(key for key in whole if key.endswith("to_k_f.weight"))
    for wrong, message in (
        ({k: v for k, v in whole.items() if k != key}, "misses"),
        (whole | {key: whole[key][:, :3]}, "misshapen"),
        (whole | {"else": whole[key]}, "'else'"),
        ({k: v for k, v in whole.items() if k != "text.hidden"}, "text.hidden"),
    ):
        with pytest.raises(ValueError, match=message):
            loader.load(wrong, told, "mine.safetensors")


def test_zero_shot_is_the_blocks_own_self_attention_where_the_coordinates_agree() -> None:
    """With the cross-attention's query and output matrices equal to the self-attention's, it is that exactly."""
    generator = torch.Generator().manual_seed(0)
    own = {name: torch.randn(32, 32, generator=generator).double() for name in ("q1", "k1", "v1", "o1")}
    to_k, to_v = math.zero_shot({**own, "q2": own["q1"], "o2": own["o1"]}, 4)
    assert close(to_k.float(), own["k1"].float(), 1e-4) and close(to_v.float(), own["v1"].float(), 1e-4)
    other = {"q2": torch.randn(32, 32, generator=generator), "o2": torch.randn(32, 32, generator=generator)}
    to_k, to_v = math.zero_shot({**own, **other}, 4)
    for h in range(4):
        rows = slice(8 * h, 8 * h + 8)
        target = own["q1"].float()[rows].T @ own["k1"].float()[rows]
        rest = target - other["q2"][rows].T @ to_k.float()[rows]
        assert (other["q2"][rows] @ rest).abs().max() < 1e-3 * target.abs().max()  # nothing is left that it could reach


def test_adapters_of_other_methods_are_told_apart(base: ModelPatcher) -> None:
    with pytest.raises(ValueError, match="no fused KV adapter"):
        fused(base, decoupled_adapter())  # pyright: ignore[reportArgumentType]
    from adapters import applied

    with pytest.raises(ValueError, match="IP-Adapter family"):
        applied(base, adapter(), person())  # pyright: ignore[reportArgumentType]
