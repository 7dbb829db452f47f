"""PuLID's encoders and attention, against the outputs of the official code."""

from __future__ import annotations

import comfy.ops
import pytest
import torch
from comfyui_likeness.likeness.checkpoints import checkpoint_detection, key_maps
from comfyui_likeness.likeness.methods import pulid
from comfyui_likeness.nodes.loaders import vision_towers
from comfyui_likeness.tools.standins import eva_clip
from support.golden import GoldenCase, assert_close, read_golden_cases
from torch import Tensor, nn

PROJECTORS = read_golden_cases("ip_adapter", "projector")
ATTENTION = read_golden_cases("ip_adapter", "attention")
OPERATIONS = comfy.ops.manual_cast


def build_encoder(case: GoldenCase) -> nn.Module:
    weights = key_maps.select_prefix(key_maps.rename_keys(case.build_weights(), key_maps.IP_ADAPTER), "projector.")
    shapes = checkpoint_detection.get_tensor_shapes(weights)
    if case.config["class"] == "IDEncoder":
        module = pulid.IDEncoder(shapes, OPERATIONS)
    else:
        module = pulid.IDFormer(shapes, OPERATIONS, case.config["dim_head"])
    key_maps.load_module_weights(module, weights)
    return module.requires_grad_(False)


def build_inputs(case: GoldenCase) -> tuple[Tensor, Tensor, Tensor]:
    """One photo per row: face [n, 512], EVA-CLIP embedding of any length [n, 768], levels [n, 5, L, W]."""
    levels = torch.stack([case.build_input(f"vit_{i}") for i in range(5)], dim=1)
    return case.build_input("id_ante"), 7 * case.build_input("id_vit"), levels


@pytest.mark.parametrize("name", ["proj_pulid_idencoder_v1", "proj_pulid_idformer", "proj_pulid_idformer_tiny"])
def test_encoders(name: str) -> None:
    case = PROJECTORS[name]
    module, stored = build_encoder(case), case.load_outputs()
    rows = [row[:, None] for row in build_inputs(case)]
    assert_close(module(*rows), stored["cond"])
    assert_close(module(*(torch.zeros_like(row) for row in rows)), stored["uncond"])


def test_several_photos_are_one_sequence() -> None:
    case = PROJECTORS["proj_pulid_idformer_multi"]
    assert_close(build_encoder(case)(*(row[None] for row in build_inputs(case))), case.load_outputs()["cond"])


def test_v1_only_uses_the_id_vector_of_further_photos() -> None:
    case = PROJECTORS["proj_pulid_idencoder_v1"]
    module, rows = build_encoder(case), [torch.cat((row, row.roll(1, -1)))[None] for row in build_inputs(case)]
    both, first, second = (module(*(row[:, part] for row in rows)) for part in (slice(0, 2), slice(0, 1), slice(1, 2)))
    assert both.shape == (1, 15, 2048)
    assert_close(both[:, :10], first)
    assert_close(both[:, 10:], second[:, :5])


@pytest.mark.parametrize("name", ["attn_pulid_ca", "attn_pulid_ca_tiny"])
def test_flux_attention(name: str) -> None:
    case = PROJECTORS[name]
    size = case.config
    module = pulid.PuLIDFluxAttention(size["kv_dim"], size["dim"], OPERATIONS, size["heads"], size["dim_head"])
    key_maps.load_module_weights(module, key_maps.select_prefix(case.build_weights(), "pulid_ca.0."))
    module.requires_grad_(False)
    assert_close(
        module.attend_identity(case.build_input("img"), *module(case.build_input("id_tokens"))),
        case.load_outputs()["out"],
    )


@pytest.mark.parametrize("mode", pulid.PULID_MODES.values(), ids=pulid.PULID_MODES.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_zero_channel_has_no_projection(mode: pulid.PuLIDMode, dtype: torch.dtype) -> None:
    o, i, q = torch.randn(3, 2, 9, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    o[..., 3] = 0
    out = mode.orthogonalize(o, i, q, mode.append_zero_tokens(i), 2)
    assert out.dtype == dtype and out.isfinite().all()
    assert torch.equal(out[..., 3], i[..., 3])
    assert mode.append_zero_tokens(i).shape == (2, 9 + mode.num_zero_tokens, 8) and (
        mode.orthogonalize is pulid.PLAIN_MODE.orthogonalize
    ) == torch.equal(out, i)


def test_the_eva_clip_standin_has_the_published_layout() -> None:
    shapes = eva_clip.get_eva_clip_shapes()
    published = read_golden_cases("ip_adapter", "encoder")["eva_clip_tiny"].build_weights().keys()
    beyond = tuple(f"visual.blocks.{i}." for i in range(21, 24))  # the golden case has 21 blocks
    assert {key for key in shapes if not key.startswith(beyond)} == published
    meta = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    tower = vision_towers.build_vision_tower(key_maps.select_prefix(meta, "visual."), "EVA.pt", "auto")
    key_maps.load_module_weights(tower.module, tower.weights)
    assert tower.architecture == "eva02-l-14-336"
