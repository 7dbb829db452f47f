"""Tile nodes put the rows of several tiles side by side in one model call; the roles repeat with them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from comfyui_likeness.likeness.spec import Person
from support.fused_kv import make_fused_kv_identity, make_stripe_masks
from support.host_models import all_close, make_conditioning, make_small_model, sample_latent
from support.ip_adapters import apply_ip_adapter, make_ip_adapter, make_ip_adapter_identity
from support.method_cases import METHODS, make_method_case
from torch import Tensor

WIDE: dict[str, Any] = {"size": (8, 16), "batch_size": 2}
TILES = (slice(0, 8), slice(8, 16))  # of the width


def take_tiles(value: Any, tiles: tuple[slice, ...]) -> Any:
    """A tensor's part in each tile, side by side; tensors without a width are repeated."""
    if not isinstance(value, Tensor):
        return value
    return torch.cat([value[..., tile] if value.ndim == 4 else value for tile in tiles])


def add_tiles(model: ModelPatcher, tiles_per_call: int) -> ModelPatcher:
    """The model run on two tiles, as tile nodes do it: `cond_or_uncond` is left alone."""

    def run_tiles(apply_model: Any, args: dict[str, Any]) -> Tensor:
        parts: list[Tensor] = []
        for first in range(0, len(TILES), tiles_per_call):
            tiles = TILES[first : first + tiles_per_call]
            x, timestep = (take_tiles(args[name], tiles) for name in ("input", "timestep"))
            c = {key: take_tiles(value, tiles) for key, value in args["c"].items()}
            parts += apply_model(x, timestep, **c).chunk(tiles_per_call)
        return torch.cat(parts, -1)

    model = model.clone()
    model.set_model_unet_function_wrapper(run_tiles)
    return model


@pytest.mark.parametrize("method", METHODS)
def test_tiles_in_one_call_give_what_single_tiles_give(method: str) -> None:
    case = make_method_case(method)
    changes: dict[str, Any] = {"face_position": torch.rand(2, 64, 128).round()} if method == "reference" else {}
    model = case.apply(**changes)
    single = sample_latent(add_tiles(model, 1), **WIDE)
    assert all_close(sample_latent(add_tiles(model, 2), **WIDE), single, 1e-4)
    assert not all_close(single, sample_latent(add_tiles(case.base, 1), **WIDE), 1e-3)


def test_tiles_with_prompts_of_different_lengths() -> None:
    model = make_method_case("fused").apply()
    settings = {**WIDE, "positive": make_conditioning(1, num_tokens=5), "negative": make_conditioning(2, num_tokens=15)}
    single = sample_latent(add_tiles(model, 1), **settings)
    assert all_close(sample_latent(add_tiles(model, 2), **settings), single, 1e-4)


def test_every_image_has_its_face_in_all_tiles() -> None:
    adapter = make_ip_adapter("faceid")
    model = apply_ip_adapter(make_small_model(), adapter, make_ip_adapter_identity(adapter, 2), batch="unfold")
    single = sample_latent(add_tiles(model, 1), **WIDE)
    assert all_close(sample_latent(add_tiles(model, 2), **WIDE), single, 1e-4)


@pytest.mark.parametrize("method", ["fused", "reference"])
def test_a_mask_on_tiles_says_what_to_do(method: str) -> None:
    people = (Person(make_fused_kv_identity(), make_stripe_masks()[0]),)
    changes = {"identity": people} if method == "reference" else {"identity_or_people": people}
    model = make_method_case(method).apply(**changes)
    for tiles_per_call in (1, 2):
        with pytest.raises(ValueError, match="mask instead of an area.*remove the node that splits the image.*8x8"):
            sample_latent(add_tiles(model, tiles_per_call), **WIDE)


def test_rows_that_are_no_multiple_raise() -> None:
    def add_a_row(
        executor: Any, x: Tensor, t: Tensor, c_concat: Any, text: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        x, t, text = (torch.cat((part, part[:1])) for part in (x, t, text))
        return executor(x, t, c_concat, text, *args, **kwargs)[:-1]

    model = make_method_case("decoupled").apply()
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "another pack", add_a_row)
    with pytest.raises(ValueError, match="got 5 rows for 2 prompts of 2 images; expected a multiple of 4"):
        sample_latent(model, batch_size=2)
