"""Omni-ID's encoder against its formulas, with a small open_clip trunk; what its tokens depend on."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy.clip_model import clip_preprocess
from comfyui_likeness.likeness.checkpoints import key_maps
from comfyui_likeness.likeness.methods import omni_id
from comfyui_likeness.likeness.spec import OmniIDSpec
from comfyui_likeness.nodes.loaders import omni_id_loader, vision_towers
from safetensors.torch import save_file
from support import omni_id_encoders
from support.golden import assert_close
from support.omni_id_encoders import SMALL_SPEC, encode_face_images, make_face_images, make_omni_id_encoder
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear

Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def module() -> omni_id.OmniIDModel:
    return make_omni_id_encoder()


def apply_norm(w: Weights, name: str, x: Tensor) -> Tensor:
    return layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])


def apply_linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return linear(x, w[f"{name}.weight"], w[f"{name}.bias"])


def attend(w: Weights, at: str, x: Tensor, z: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of x [L, C] to z [N, .] with weights `share` [N] of its rows: output and attention [H, L, N]."""
    q, k, v = (apply_linear(w, f"{at}.{part}", given) for part, given in (("q", x), ("k", z), ("v", z)))
    q, k, v = (part.view(len(part), SMALL_SPEC.heads, -1) for part in (q, k, v))
    power = torch.einsum("lhd,nhd->hln", q, k) / q.shape[-1] ** 0.5
    weights = power.exp() * share
    weights = weights / weights.sum(-1, keepdim=True)
    return apply_linear(w, f"{at}.out", torch.einsum("hln,nhd->lhd", weights, v).flatten(1)), weights


def reference(w: Weights, states: list[Tensor], share: list[float]) -> tuple[Tensor, Tensor]:
    """l and the first block's attention, by the formulas of Sec. 3.1, from photos' states [n, .] and weights."""
    z = torch.cat(states)
    shares = torch.cat([torch.full((len(one),), weight) for one, weight in zip(states, share, strict=True)])
    q, first = w["queries"][0], torch.empty(0)
    for n in range(SMALL_SPEC.cross_blocks):
        at = f"cross.{n}"
        out, weights = attend(w, at, apply_norm(w, f"{at}.norm_q", q), apply_norm(w, f"{at}.norm_z", z), shares)
        first = first if n else weights
        q = q + out
        q = q + apply_linear(w, f"{at}.mlp.2", gelu(apply_linear(w, f"{at}.mlp.0", apply_norm(w, f"{at}.norm_mlp", q))))
    for n in range(SMALL_SPEC.self_blocks):
        at = f"self.{n}"
        x = apply_norm(w, f"{at}.norm_q", q)
        q = q + attend(w, at, x, x, torch.ones(len(x)))[0]
        q = q + apply_linear(w, f"{at}.mlp.2", gelu(apply_linear(w, f"{at}.mlp.0", apply_norm(w, f"{at}.norm_mlp", q))))
    return apply_norm(w, "norm", q), first


def capture_states(module: omni_id.OmniIDModel, images: Tensor) -> dict[str, Tensor]:
    """The trunk's hidden states in open_clip's own forward."""
    trunk: Any = module.trunk
    states: dict[str, Tensor] = {}
    block = trunk.transformer.resblocks[-1]
    hooks = [
        block.register_forward_pre_hook(lambda _m, args: states.update(penultimate=args[0])),
        block.register_forward_hook(lambda _m, _args, out: states.update(last=out)),
        trunk.ln_post.register_forward_hook(lambda _m, _args, out: states.update(normed=out)),
    ]
    trunk(omni_id.normalize_images(images))
    for hook in hooks:
        hook.remove()
    return states


@pytest.mark.parametrize("share", [[1.0, 1.0, 1.0], [0.5, 2.0, 1.0]])
def test_tokens_follow_the_formulas(module: omni_id.OmniIDModel, share: list[float]) -> None:
    images = make_face_images(3)
    states = list(capture_states(module, images)["last"])
    expected, first = reference(omni_id_encoders.make_encoder_tensors(), states, share)
    assert_close(encode_face_images(module, images, share)[0], expected)
    maps = module.compute_attention_maps([omni_id.normalize_images(images)], share)
    assert_close(maps, first.mean(0).view(SMALL_SPEC.tokens, 3, 17)[:, :, 1:].unflatten(-1, (4, 4)))


@pytest.mark.parametrize("count", [1, 2, 9, 20])
def test_the_number_of_tokens_is_fixed(module: omni_id.OmniIDModel, count: int) -> None:
    made = encode_face_images(module, make_face_images(count))
    assert made.shape == (1, SMALL_SPEC.tokens, SMALL_SPEC.width) and made.isfinite().all()


def test_the_sizes_of_the_paper() -> None:
    made = encode_face_images(make_omni_id_encoder(omni_id_encoders.FULL_WIDTH_SPEC), make_face_images(2))
    assert made.shape == (1, 256, 1280) and omni_id_encoders.FULL_WIDTH_SPEC.heads == 20
    assert OmniIDSpec().tokens == 256 and OmniIDSpec().width == 1280 and OmniIDSpec().states_per_photo == 257


def test_tokens_depend_on_the_photos_but_not_on_their_order(module: omni_id.OmniIDModel) -> None:
    images = make_face_images(4)
    made = encode_face_images(module, images)
    assert_close(encode_face_images(module, images[[2, 0, 3, 1]]), made)
    assert_close(
        encode_face_images(module, images[[3, 2, 1, 0]], [4.0, 3, 2, 1]),
        encode_face_images(module, images, [1.0, 2, 3, 4]),
    )
    for other in (images[:3], torch.cat((images[:3], make_face_images(1, 9)))):
        assert not torch.allclose(encode_face_images(module, other), made, atol=1e-2)


def test_duplicate_photos_change_nothing(module: omni_id.OmniIDModel) -> None:
    images = make_face_images(3)
    made = encode_face_images(module, images)
    for order in ([0, 0, 1, 2], [2, 1, 0, 1, 1], [0, 1, 2] * 4):
        assert_close(encode_face_images(module, images[order]), made)
    heavy = encode_face_images(module, images, [1.0, 3.0, 1.0])
    assert_close(encode_face_images(module, images[[1, 0, 1, 2]], [1.0, 1.0, 3.0, 1.0]), heavy)
    # A nearly identical photo is not a duplicate.
    near = images[:1] + 1e-3
    assert omni_id.select_distinct_images(torch.cat((images, near)), [1.0] * 4)[0] == [0, 1, 2, 3]
    assert not torch.allclose(encode_face_images(module, torch.cat((images, near))), made, atol=1e-3)


def test_weight_0_equals_absence_and_weight_2_counts_twice(module: omni_id.OmniIDModel) -> None:
    images = make_face_images(3)
    assert torch.equal(
        encode_face_images(module, images, [1.0, 0.0, 2.0]), encode_face_images(module, images[[0, 2]], [1.0, 2.0])
    )
    states = module.extract_states(omni_id.normalize_images(images))
    twice = module.encode_states(torch.cat((states[0], states[1], states[1], states[2]))[None])
    assert_close(encode_face_images(module, images, [1.0, 2.0, 1.0]), twice)
    assert_close(encode_face_images(module, images, [7.0] * 3), encode_face_images(module, images))
    assert_close(encode_face_images(module, images, [1e-30, 1.0, 1.0]), encode_face_images(module, images[1:]))
    with pytest.raises(ValueError, match="got 3 faces, all of weight 0; expected one above it"):
        omni_id.select_distinct_images(images, [0.0] * 3)


def test_memory_grows_linearly_with_the_photos() -> None:
    """The trunk gets one chunk at a time; attention gets all queries and keys, to split them as it can."""
    chunk_sizes: list[int] = []
    lengths: list[tuple[int, int]] = []

    def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, bias: Tensor | None) -> Tensor:
        lengths.append((q.shape[1], k.shape[1]))
        assert bias is None or bias.shape == (1, 1, k.shape[1])
        return omni_id_encoders.plain_attention(q, k, v, heads, bias)

    module = make_omni_id_encoder(attention=attention)
    trunk: Any = module.trunk
    trunk.conv1.register_forward_hook(lambda _m, args, _out: chunk_sizes.append(len(args[0])))
    encode_face_images(module, make_face_images(20), [1.0, *[2.0] * 19])
    assert chunk_sizes == [8, 8, 4]
    assert lengths == [(24, 20 * 17)] * 2 + [(24, 24)] * 2


@pytest.mark.parametrize("states", omni_id.TRUNK_STATES)
@pytest.mark.parametrize("class_token", [True, False])
def test_the_spec_selects_the_states(states: str, class_token: bool) -> None:
    spec = replace(SMALL_SPEC, states=states, class_token=class_token)
    module, images = make_omni_id_encoder(spec), make_face_images(2)
    expected = capture_states(module, images)[states][:, int(not class_token) :]
    assert_close(module.extract_states(omni_id.normalize_images(images)), expected)
    assert expected.shape[1] == spec.states_per_photo == 16 + class_token
    assert module.compute_attention_maps([omni_id.normalize_images(images)]).shape == (SMALL_SPEC.tokens, 2, 4, 4)
    assert encode_face_images(module, images, [1.0, 2.0]).shape == (1, SMALL_SPEC.tokens, SMALL_SPEC.width)


def test_position_embeddings_are_interpolated_as_in_open_clip() -> None:
    from open_clip.model import resize_pos_embed

    class Larger(torch.nn.Module):
        def __init__(self, trunk: torch.nn.Module) -> None:
            super().__init__()
            self.visual = trunk

    spec = replace(SMALL_SPEC, image_size=224)
    tensors = omni_id_encoders.make_encoder_tensors(spec)
    module = make_omni_id_encoder(spec, state_dict=tensors)
    state = {"visual.positional_embedding": tensors[omni_id.POSITION_EMBEDDING_NAME].clone()}
    resize_pos_embed(state, Larger(module.trunk))
    trunk: Any = module.trunk
    assert_close(trunk.positional_embedding, state["visual.positional_embedding"])
    assert trunk.positional_embedding.shape == (65, SMALL_SPEC.trunk_width)
    assert encode_face_images(module, make_face_images(2, size=224)).shape == (1, SMALL_SPEC.tokens, SMALL_SPEC.width)
    assert module.compute_attention_maps([omni_id.normalize_images(make_face_images(2, size=224))]).shape == (
        SMALL_SPEC.tokens,
        2,
        8,
        8,
    )
    same = omni_id.interpolate_position_embeddings(tensors, SMALL_SPEC)
    assert all(same[key] is value for key, value in tensors.items())


def test_pixels_are_normalised_as_in_comfyui() -> None:
    images = (make_face_images(2) * 255).round() / 255
    assert_close(omni_id.normalize_images(images), clip_preprocess(images, size=SMALL_SPEC.image_size))


def test_gradients_reach_all_used_weights() -> None:
    module = make_omni_id_encoder().requires_grad_(True)
    encode_face_images(module, make_face_images(2), [1.0, 2.0]).square().mean().backward()
    unused = {name for name, weight in module.named_parameters() if weight.grad is None or not weight.grad.any()}
    assert unused == {"trunk.ln_post.weight", "trunk.ln_post.bias", "trunk.proj"}
    batch = module.extract_states(omni_id.normalize_images(make_face_images(4))).view(
        2, 34, -1
    )  # two people of two photos
    assert_close(module.encode_states(batch)[1:].detach(), encode_face_images(module, make_face_images(4)[2:]).detach())


def test_maps_follow_their_photos_and_sum_to_one_minus_the_class_tokens(module: omni_id.OmniIDModel) -> None:
    images = make_face_images(3)
    maps = module.compute_attention_maps([omni_id.normalize_images(images)])
    assert_close(module.compute_attention_maps([omni_id.normalize_images(images[[1, 2, 0]])]), maps[:, [1, 2, 0]])
    total = maps.sum((1, 2, 3))
    assert bool((total < 1).all()) and bool((total > 0.5).all())
    bare = make_omni_id_encoder(replace(SMALL_SPEC, class_token=False))
    assert_close(
        bare.compute_attention_maps([omni_id.normalize_images(images)]).sum((1, 2, 3)), torch.ones(SMALL_SPEC.tokens)
    )
    # Only the attention to the marked patch of one photo changes.
    marked = images.clone()
    marked[0, 28:56, 56:84] = 1.0
    changed = (module.compute_attention_maps([omni_id.normalize_images(marked)]) - maps).abs().mean(0)[0]
    assert changed.flatten().argmax() == 1 * 4 + 2


def test_selectivity_of_queries() -> None:
    one, half, all_of_it = torch.zeros(2, 4, 4), torch.zeros(2, 4, 4), torch.full((2, 4, 4), 0.01)
    one[0, 1, 1] = one[1, 3, 0] = 0.2
    half[:, :2] = 0.3
    uneven = torch.stack((one[0], all_of_it[0]))
    got = omni_id.compute_selectivity(torch.stack((half, one, all_of_it, uneven, torch.zeros(2, 4, 4))))
    assert got[:4].tolist() == pytest.approx([0.25, 1.0, 0.0, 0.5], abs=1e-6) and got.isfinite().all()


def test_metadata_round_trip() -> None:
    for spec in (
        SMALL_SPEC,
        replace(SMALL_SPEC, image_size=224, states="normed", class_token=False, activation="quick_gelu"),
    ):
        assert (
            omni_id.read_omni_id_spec(
                omni_id_encoders.make_encoder_tensors(spec), omni_id_encoders.make_encoder_metadata(spec), "a file"
            )
            == spec
        )
    assert (
        omni_id_encoders.make_encoder_metadata()["kind"] == "omni_id"
        and omni_id_encoders.make_encoder_metadata()["base"] == ""
    )
    quick = make_omni_id_encoder(replace(SMALL_SPEC, activation="quick_gelu"))
    assert not torch.allclose(
        encode_face_images(quick, make_face_images(1)),
        encode_face_images(make_omni_id_encoder(), make_face_images(1)),
        atol=1e-3,
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "of version 2; this pack reads up to version 1; update the pack"),
        ({"kind": "fused_kv"}, "not that of the kind omni_id"),
        ({"states": "first"}, "states 'first'.*states: last or normed or penultimate"),
        ({"activation": "relu"}, "activation 'relu'"),
        ({"class_token": 1}, r"\(class_token\)"),
        ({"heads": None}, r"\(heads\)"),
        ({"image_size": 120}, "images of 120 pixels, patches of 28.*expected a multiple of 112"),
        ({"image_size": 0}, "images of 0 pixels"),
        ({"heads": 7}, "7 heads for 160 channels"),
        ({"heads": 0}, "0 heads"),
    ],
)
def test_invalid_metadata_is_rejected(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"got a file,.*{message}"):
        omni_id.read_omni_id_spec(
            omni_id_encoders.make_encoder_tensors(), omni_id_encoders.make_encoder_metadata() | changes, "a file"
        )


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
    tensors = change(omni_id_encoders.make_encoder_tensors())
    with pytest.raises(ValueError, match=message):
        spec = omni_id.read_omni_id_spec(tensors, omni_id_encoders.make_encoder_metadata(), "a file")
        make_omni_id_encoder(spec, state_dict=tensors)


def test_the_encoder_of_the_paper_on_open_clips_vit_h() -> None:
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
        whole = omni_id.OmniIDModel(spec, trunk, torch.nn, omni_id_encoders.plain_attention)
    tensors = whole.state_dict()
    assert omni_id.read_omni_id_spec(tensors, omni_id_encoders.make_encoder_metadata(spec), "a file") == spec
    tower = vision_towers.build_vision_tower(key_maps.select_prefix(tensors, "trunk."), "a file", spec.activation)
    module = omni_id.build_omni_id_model(spec, tensors, tower.module, torch.nn, omni_id_encoders.plain_attention)
    mine: Any = tower.module
    heads = [block.attn.num_heads for tower in (mine, trunk) for block in tower.transformer.resblocks]
    assert tower.architecture == "vit-h-14" and set(heads) == {16} and len(heads) == 64
    parts = {name: sum(w.numel() for w in part.parameters()) // 10**6 for name, part in module.named_children()}
    assert parts == {"trunk": 632, "cross": 39, "self": 39, "norm": 0}


def test_weights_are_not_copied() -> None:
    tensors = omni_id_encoders.make_encoder_tensors()
    state_dict = make_omni_id_encoder(state_dict=tensors).state_dict()
    assert state_dict.keys() == tensors.keys()
    assert all(state_dict[key].data_ptr() == value.data_ptr() for key, value in tensors.items())
    assert set(key_maps.select_prefix(tensors, "trunk.")) == set(make_omni_id_encoder().trunk.state_dict())


def test_the_file_says_how_many_heads_its_trunk_has(folder: Path) -> None:
    """Older files do not, and have those of published towers; a trunk of another width is refused."""
    file = omni_id_encoders.write_encoder_file(folder / "likeness" / "omni.safetensors")
    trunk: Any = omni_id_loader.load_omni_id_encoder(file.name).patcher.model.trunk
    assert {block.attn.num_heads for block in trunk.transformer.resblocks} == {2}
    spec, metadata = omni_id_encoders.SMALL_SPEC, omni_id_encoders.make_encoder_metadata()
    del metadata["trunk_heads"]
    for width in (128, 64):
        tensors = omni_id_encoders.make_encoder_tensors(replace(spec, trunk_width=width))
        save_file(tensors, folder / "likeness" / f"{width}.safetensors", {"likeness": json.dumps(metadata)})
    older: Any = omni_id_loader.load_omni_id_encoder("128.safetensors").patcher.model.trunk
    assert {block.attn.num_heads for block in older.transformer.resblocks} == {4}
    with pytest.raises(ValueError, match="got 64.safetensors, of width 64, whose number of attention heads"):
        omni_id_loader.load_omni_id_encoder("64.safetensors")
