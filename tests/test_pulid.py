"""PuLID's encoders, its attention in all modes and whole models, against the official code's outputs."""

from __future__ import annotations

import comfy.ops
import pytest
import torch
from comfyui_likeness.likeness import detect, keymaps, pulid
from comfyui_likeness.nodes.loaders import towers
from comfyui_likeness.tools import standin_eva
from golden import Case, assert_close, cases
from torch import Tensor, nn

PROJECTORS = cases("ip_adapter", "projector")
ATTENTION = cases("ip_adapter", "attention")
OPERATIONS = comfy.ops.manual_cast


def encoder(case: Case) -> nn.Module:
    weights = keymaps.under(keymaps.rename(case.weights(), keymaps.IP_ADAPTER), "projector.")
    shapes = detect.shapes_of(weights)
    if case.config["class"] == "IDEncoder":
        module = pulid.IDEncoder(shapes, OPERATIONS)
    else:
        module = pulid.IDFormer(shapes, OPERATIONS, case.config["dim_head"])
    keymaps.load(module, weights)
    return module.requires_grad_(False)


def given(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """One photo a row: face [n, 512], EVA-CLIP's embedding at any length [n, 768], levels [n, 5, L, W]."""
    levels = torch.stack([case.input(f"vit_{i}") for i in range(5)], dim=1)
    return case.input("id_ante"), 7 * case.input("id_vit"), levels


@pytest.mark.parametrize("name", ["proj_pulid_idencoder_v1", "proj_pulid_idformer", "proj_pulid_idformer_tiny"])
def test_encoders(name: str) -> None:
    case = PROJECTORS[name]
    module, stored = encoder(case), case.outputs()
    rows = [row[:, None] for row in given(case)]
    assert_close(module(*rows), stored["cond"])
    assert_close(module(*(torch.zeros_like(row) for row in rows)), stored["uncond"])


def test_several_photos_are_one_sequence() -> None:
    case = PROJECTORS["proj_pulid_idformer_multi"]
    assert_close(encoder(case)(*(row[None] for row in given(case))), case.outputs()["cond"])


def test_of_further_photos_v1_reads_the_id_vector_alone() -> None:
    case = PROJECTORS["proj_pulid_idencoder_v1"]
    module, rows = encoder(case), [torch.cat((row, row.roll(1, -1)))[None] for row in given(case)]
    both, first, second = (module(*(row[:, part] for row in rows)) for part in (slice(0, 2), slice(0, 1), slice(1, 2)))
    assert both.shape == (1, 15, 2048)
    assert_close(both[:, :10], first)
    assert_close(both[:, 10:], second[:, :5])


@pytest.mark.parametrize("name", ["attn_pulid_ca", "attn_pulid_ca_tiny"])
def test_flux_attention(name: str) -> None:
    case = PROJECTORS[name]
    size = case.config
    module = pulid.FluxAttention(size["kv_dim"], size["dim"], OPERATIONS, size["heads"], size["dim_head"])
    keymaps.load(module, keymaps.under(case.weights(), "pulid_ca.0."))
    module.requires_grad_(False)
    assert_close(module.read(case.input("img"), *module(case.input("id_tokens"))), case.outputs()["out"])


@pytest.mark.parametrize("mode", pulid.MODES.values(), ids=pulid.MODES.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_channel_that_is_zero_has_no_part_along_it(mode: pulid.Mode, dtype: torch.dtype) -> None:
    o, i, q = torch.randn(3, 2, 9, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    o[..., 3] = 0
    out = mode.mix(o, i, q, mode.drained(i), 2)
    assert out.dtype == dtype and out.isfinite().all()
    assert torch.equal(out[..., 3], i[..., 3])
    assert mode.drained(i).shape == (2, 9 + mode.zeros, 8) and (mode.mix is pulid.PLAIN.mix) == torch.equal(out, i)


def test_eva_clips_stand_in_is_of_the_published_layout() -> None:
    shapes = standin_eva.eva_clip()
    published = cases("ip_adapter", "encoder")["eva_clip_tiny"].weights().keys()
    beyond = tuple(f"visual.blocks.{i}." for i in range(21, 24))  # the case has 21 blocks
    assert {key for key in shapes if not key.startswith(beyond)} == published
    meta = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    tower = towers.tower_of(keymaps.under(meta, "visual."), "EVA.pt", "auto")
    keymaps.load(tower.module, tower.weights)
    assert tower.architecture == "eva02-l-14-336"
