"""Omni-ID's encoder against its formulas, on a small trunk of open_clip's own kind; what its tokens depend on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import omnis
import pytest
import torch
from comfy.clip_model import clip_preprocess
from comfyui_likeness.likeness import keymaps, omni_id
from comfyui_likeness.likeness.spec import OmniIDSpec
from comfyui_likeness.nodes.loaders import towers
from golden import assert_close
from omnis import SPEC, encoded, encoder, photos
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear

Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def module() -> omni_id.OmniID:
    return encoder()


def normal(w: Weights, name: str, x: Tensor) -> Tensor:
    return layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])


def dense(w: Weights, name: str, x: Tensor) -> Tensor:
    return linear(x, w[f"{name}.weight"], w[f"{name}.bias"])


def attended(w: Weights, at: str, x: Tensor, z: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """An attention of queries x [L, C] to z [N, .], whose rows count `share` [N]: its result and weights [H, L, N]."""
    q, k, v = (dense(w, f"{at}.{part}", given) for part, given in (("q", x), ("k", z), ("v", z)))
    q, k, v = (part.view(len(part), SPEC.heads, -1) for part in (q, k, v))
    power = torch.einsum("lhd,nhd->hln", q, k) / q.shape[-1] ** 0.5
    weights = power.exp() * share
    weights = weights / weights.sum(-1, keepdim=True)
    return dense(w, f"{at}.out", torch.einsum("hln,nhd->lhd", weights, v).flatten(1)), weights


def reference(w: Weights, states: list[Tensor], share: list[float]) -> tuple[Tensor, Tensor]:
    """l and the first block's attention, of photos' states [n, .] and weights, by the formulas of Sec. 3.1."""
    z = torch.cat(states)
    shares = torch.cat([torch.full((len(one),), weight) for one, weight in zip(states, share, strict=True)])
    q, first = w["queries"][0], torch.empty(0)
    for n in range(SPEC.cross_blocks):
        at = f"cross.{n}"
        out, weights = attended(w, at, normal(w, f"{at}.norm_q", q), normal(w, f"{at}.norm_z", z), shares)
        first = first if n else weights
        q = q + out
        q = q + dense(w, f"{at}.mlp.2", gelu(dense(w, f"{at}.mlp.0", normal(w, f"{at}.norm_mlp", q))))
    for n in range(SPEC.self_blocks):
        at = f"self.{n}"
        x = normal(w, f"{at}.norm_q", q)
        q = q + attended(w, at, x, x, torch.ones(len(x)))[0]
        q = q + dense(w, f"{at}.mlp.2", gelu(dense(w, f"{at}.mlp.0", normal(w, f"{at}.norm_mlp", q))))
    return normal(w, "norm", q), first


def hidden(module: omni_id.OmniID, pictures: Tensor) -> dict[str, Tensor]:
    """The trunk's hidden states as open_clip's own forward passes them on."""
    trunk: Any = module.trunk
    seen: dict[str, Tensor] = {}
    block = trunk.transformer.resblocks[-1]
    hooks = [
        block.register_forward_pre_hook(lambda _m, given: seen.update(penultimate=given[0])),
        block.register_forward_hook(lambda _m, _given, out: seen.update(last=out)),
        trunk.ln_post.register_forward_hook(lambda _m, _given, out: seen.update(normed=out)),
    ]
    trunk(omni_id.normed(pictures))
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("share", [[1.0, 1.0, 1.0], [0.5, 2.0, 1.0]])
def test_the_tokens_are_those_of_the_formulas(module: omni_id.OmniID, share: list[float]) -> None:
    pictures = photos(3)
    states = list(hidden(module, pictures)["last"])
    expected, first = reference(omnis.tensors(), states, share)
    assert_close(encoded(module, pictures, share)[0], expected)
    maps = module.maps([omni_id.normed(pictures)], share)
    assert_close(maps, first.mean(0).view(SPEC.tokens, 3, 17)[:, :, 1:].unflatten(-1, (4, 4)))


@pytest.mark.parametrize("count", [1, 2, 9, 20])
def test_their_number_is_fixed(module: omni_id.OmniID, count: int) -> None:
    made = encoded(module, photos(count))
    assert made.shape == (1, SPEC.tokens, SPEC.width) and made.isfinite().all()


def test_the_papers_size_and_heads() -> None:
    made = encoded(encoder(omnis.WHOLE), photos(2))
    assert made.shape == (1, 256, 1280) and omnis.WHOLE.heads == 20
    assert OmniIDSpec().tokens == 256 and OmniIDSpec().width == 1280 and OmniIDSpec().states_per_photo == 257


def test_the_order_of_photos_does_not_matter_and_the_photos_do(module: omni_id.OmniID) -> None:
    pictures = photos(4)
    made = encoded(module, pictures)
    assert_close(encoded(module, pictures[[2, 0, 3, 1]]), made)
    assert_close(encoded(module, pictures[[3, 2, 1, 0]], [4.0, 3, 2, 1]), encoded(module, pictures, [1.0, 2, 3, 4]))
    for other in (pictures[:3], torch.cat((pictures[:3], photos(1, 9)))):
        assert not torch.allclose(encoded(module, other), made, atol=1e-2)


def test_a_photo_given_twice_changes_nothing(module: omni_id.OmniID) -> None:
    pictures = photos(3)
    made = encoded(module, pictures)
    for order in ([0, 0, 1, 2], [2, 1, 0, 1, 1], [0, 1, 2] * 4):
        assert_close(encoded(module, pictures[order]), made)
    heavy = encoded(module, pictures, [1.0, 3.0, 1.0])
    assert_close(encoded(module, pictures[[1, 0, 1, 2]], [1.0, 1.0, 3.0, 1.0]), heavy)
    # A photo that is nearly the same is another one, and is read.
    near = pictures[:1] + 1e-3
    assert omni_id.distinct(torch.cat((pictures, near)), [1.0] * 4)[0] == [0, 1, 2, 3]
    assert not torch.allclose(encoded(module, torch.cat((pictures, near))), made, atol=1e-3)


def test_weight_0_equals_absence_and_weight_2_counts_twice(module: omni_id.OmniID) -> None:
    pictures = photos(3)
    assert torch.equal(encoded(module, pictures, [1.0, 0.0, 2.0]), encoded(module, pictures[[0, 2]], [1.0, 2.0]))
    states = module.states(omni_id.normed(pictures))
    twice = module.read(torch.cat((states[0], states[1], states[1], states[2]))[None])
    assert_close(encoded(module, pictures, [1.0, 2.0, 1.0]), twice)
    assert_close(encoded(module, pictures, [7.0] * 3), encoded(module, pictures))
    assert_close(encoded(module, pictures, [1e-30, 1.0, 1.0]), encoded(module, pictures[1:]))
    with pytest.raises(ValueError, match="got 3 faces, all of weight 0; expected one above it"):
        omni_id.distinct(pictures, [0.0] * 3)


def test_memory_grows_with_the_photos_and_no_faster() -> None:
    """No more than a chunk goes through the trunk at once, and attention gets its parts whole, to do as it can."""
    at_once: list[int] = []
    asked: list[tuple[int, int]] = []

    def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, bias: Tensor | None) -> Tensor:
        asked.append((q.shape[1], k.shape[1]))
        assert bias is None or bias.shape == (1, 1, k.shape[1])
        return omnis.attention(q, k, v, heads, bias)

    module = encoder(attention=attention)
    trunk: Any = module.trunk
    trunk.conv1.register_forward_hook(lambda _m, given, _out: at_once.append(len(given[0])))
    encoded(module, photos(20), [1.0, *[2.0] * 19])
    assert at_once == [8, 8, 4]
    assert asked == [(24, 20 * 17)] * 2 + [(24, 24)] * 2


@pytest.mark.parametrize("states", omni_id.STATES)
@pytest.mark.parametrize("class_token", [True, False])
def test_which_states_are_read_is_the_specs(states: str, class_token: bool) -> None:
    spec = replace(SPEC, states=states, class_token=class_token)
    module, pictures = encoder(spec), photos(2)
    expected = hidden(module, pictures)[states][:, int(not class_token) :]
    assert_close(module.states(omni_id.normed(pictures)), expected)
    assert expected.shape[1] == spec.states_per_photo == 16 + class_token
    assert module.maps([omni_id.normed(pictures)]).shape == (SPEC.tokens, 2, 4, 4)
    assert encoded(module, pictures, [1.0, 2.0]).shape == (1, SPEC.tokens, SPEC.width)


def test_position_embeddings_are_interpolated_as_open_clip_does_it() -> None:
    from open_clip.model import resize_pos_embed

    class Larger(torch.nn.Module):
        def __init__(self, trunk: torch.nn.Module) -> None:
            super().__init__()
            self.visual = trunk

    spec = replace(SPEC, image_size=224)
    given = omnis.tensors(spec)
    module = encoder(spec, given=given)
    state = {"visual.positional_embedding": given[omni_id.POSITIONS].clone()}
    resize_pos_embed(state, Larger(module.trunk))
    trunk: Any = module.trunk
    assert_close(trunk.positional_embedding, state["visual.positional_embedding"])
    assert trunk.positional_embedding.shape == (65, SPEC.features)
    assert encoded(module, photos(2, size=224)).shape == (1, SPEC.tokens, SPEC.width)
    assert module.maps([omni_id.normed(photos(2, size=224))]).shape == (SPEC.tokens, 2, 8, 8)
    same = omni_id.fitted(given, SPEC)
    assert all(same[key] is value for key, value in given.items())


def test_pixels_are_normalised_as_the_host_does_it() -> None:
    pictures = (photos(2) * 255).round() / 255
    assert_close(omni_id.normed(pictures), clip_preprocess(pictures, size=SPEC.image_size))


def test_it_can_be_trained() -> None:
    module = encoder().requires_grad_(True)
    encoded(module, photos(2), [1.0, 2.0]).square().mean().backward()
    idle = {name for name, weight in module.named_parameters() if weight.grad is None or not weight.grad.any()}
    assert idle == {"trunk.ln_post.weight", "trunk.ln_post.bias", "trunk.proj"}
    batch = module.states(omni_id.normed(photos(4))).view(2, 34, -1)  # two people of two photos
    assert_close(module.read(batch)[1:].detach(), encoded(module, photos(4)[2:]).detach())


def test_maps_go_with_their_photos_and_sum_to_what_the_class_tokens_leave(module: omni_id.OmniID) -> None:
    pictures = photos(3)
    maps = module.maps([omni_id.normed(pictures)])
    assert_close(module.maps([omni_id.normed(pictures[[1, 2, 0]])]), maps[:, [1, 2, 0]])
    total = maps.sum((1, 2, 3))
    assert bool((total < 1).all()) and bool((total > 0.5).all())
    bare = encoder(replace(SPEC, class_token=False))
    assert_close(bare.maps([omni_id.normed(pictures)]).sum((1, 2, 3)), torch.ones(SPEC.tokens))
    # In one photo, the marked patch alone changes, and with it what is looked at there.
    marked = pictures.clone()
    marked[0, 28:56, 56:84] = 1.0
    changed = (module.maps([omni_id.normed(marked)]) - maps).abs().mean(0)[0]
    assert changed.flatten().argmax() == 1 * 4 + 2


def test_queries_that_look_at_little_are_selective() -> None:
    one, half, all_of_it = torch.zeros(2, 4, 4), torch.zeros(2, 4, 4), torch.full((2, 4, 4), 0.01)
    one[0, 1, 1] = one[1, 3, 0] = 0.2
    half[:, :2] = 0.3
    uneven = torch.stack((one[0], all_of_it[0]))
    got = omni_id.selectivity(torch.stack((half, one, all_of_it, uneven, torch.zeros(2, 4, 4))))
    assert got[:4].tolist() == pytest.approx([0.25, 1.0, 0.0, 0.5], abs=1e-6) and got.isfinite().all()


def test_a_file_says_what_its_tensors_cannot() -> None:
    for spec in (SPEC, replace(SPEC, image_size=224, states="normed", class_token=False, activation="quick_gelu")):
        assert omni_id.read_spec(omnis.tensors(spec), omnis.told(spec), "a file") == spec
    assert omnis.told()["kind"] == "omni_id" and omnis.told()["base"] == ""
    quick = encoder(replace(SPEC, activation="quick_gelu"))
    assert not torch.allclose(encoded(quick, photos(1)), encoded(encoder(), photos(1)), atol=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "of version 2; this pack reads up to version 1; update the pack"),
        ({"kind": "fused_kv"}, "not that of the kind omni_id"),
        ({"states": "first"}, "states 'first'.*states: last or normed or penultimate"),
        ({"activation": "relu"}, "activation 'relu'"),
        ({"class_token": 1}, r"\(class_token\)"),
        ({"heads": None}, r"\(heads\)"),
        ({"image_size": 120}, "pictures of 120 pixels, patches of 28.*expected a multiple of 112"),
        ({"image_size": 0}, "pictures of 0 pixels"),
        ({"heads": 7}, "7 heads for 160 channels"),
        ({"heads": 0}, "0 heads"),
    ],
)
def test_other_metadata_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"got a file,.*{message}"):
        omni_id.read_spec(omnis.tensors(), omnis.told() | changes, "a file")


def without(name: str) -> Callable[[Weights], Weights]:
    return lambda weights: {key: value for key, value in weights.items() if key != name}


def other(name: str, *shape: int) -> Callable[[Weights], Weights]:
    return lambda weights: weights | {name: torch.zeros(shape)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("queries"), "incomplete or misshapen .'queries'"),
        (other("queries", 24, 160), "incomplete or misshapen"),
        (without("trunk.conv1.weight"), "incomplete or misshapen .'trunk.conv1.weight'"),
        (without("trunk.positional_embedding"), "incomplete or misshapen .'trunk.positional_embedding'"),
        (other("trunk.positional_embedding", 17), "incomplete or misshapen"),
        (
            other("trunk.positional_embedding", 12, 64),
            "whose trunk has 12 position embeddings; expected those of a square",
        ),
        (other("trunk.positional_embedding", 1, 64), "whose trunk has 1 position embeddings"),
        (other("trunk.positional_embedding", 17, 63), "has misshapen trunk.positional_embedding"),
        (without("trunk.transformer.resblocks.1.ln_2.bias"), "misses trunk.transformer.resblocks.1.ln_2.bias"),
        (without("cross.1.norm_z.bias"), "misses cross.1.norm_z.bias"),
        (without("self.0.mlp.2.weight"), "misses self.0.mlp.2.weight"),
        (other("self.1.norm_z.weight", 160), "has unknown self.1.norm_z.weight"),
        (other("cross.0.k.weight", 160, 65), r"has misshapen cross.0.k.weight \[160, 65\] for \[160, 64\]"),
        (other("norm.weight", 3), r"has misshapen norm.weight \[3\] for \[160\]"),
    ],
)
def test_tensors_are_checked(change: Callable[[Weights], Weights], message: str) -> None:
    given = change(omnis.tensors())
    with pytest.raises(ValueError, match=message):
        spec = omni_id.read_spec(given, omnis.told(), "a file")
        encoder(spec, given=given)


def test_the_papers_encoder_on_open_clips_own_vit_h() -> None:
    from open_clip import get_model_config
    from open_clip.transformer import VisionTransformer

    config = get_model_config("ViT-H-14")
    assert config is not None
    vision, spec = config["vision_cfg"], OmniIDSpec()
    width = vision["width"]
    with torch.device("meta"):
        trunk = VisionTransformer(
            vision["image_size"], vision["patch_size"], width, vision["layers"], width // vision["head_width"], 4.0,
            output_dim=config["embed_dim"],
        )  # fmt: skip
        whole = omni_id.OmniID(spec, trunk, torch.nn, omnis.attention)
    given = whole.state_dict()
    assert omni_id.read_spec(given, omnis.told(spec), "a file") == spec
    tower = towers.tower_of(keymaps.under(given, "trunk."), "a file", spec.activation)
    module = omni_id.build(spec, given, tower.module, torch.nn, omnis.attention)
    mine: Any = tower.module
    heads = [block.attn.num_heads for tower in (mine, trunk) for block in tower.transformer.resblocks]
    assert tower.architecture == "vit-h-14" and set(heads) == {16} and len(heads) == 64
    parts = {name: sum(w.numel() for w in part.parameters()) // 10**6 for name, part in module.named_children()}
    assert parts == {"trunk": 632, "cross": 39, "self": 39, "norm": 0}


def test_nothing_is_copied_while_it_is_built() -> None:
    given = omnis.tensors()
    held = encoder(given=given).state_dict()
    assert held.keys() == given.keys()
    assert all(held[key].data_ptr() == value.data_ptr() for key, value in given.items())
    assert set(keymaps.under(given, "trunk.")) == set(encoder().trunk.state_dict())
