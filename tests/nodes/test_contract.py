"""What the pack expects of ComfyUI: COMFYUI_PATH=<folder> python -m pytest tests/nodes/test_contract.py"""

from __future__ import annotations

from typing import Any

import pytest
from comfyui_likeness.nodes import host_contract
from support.host_models import make_small_model, sample_latent

UNET_KEYS = {"block", "n_heads", "attn_precision", "activations_shape", "cond_or_uncond", "uuids", "sigmas", "wrappers"}
FLUX_KEYS = {"block_type", "block_index", "img_slice", "cond_or_uncond", "uuids", "sigmas", "wrappers"}


def test_this_comfyui_has_what_the_pack_expects(caplog: pytest.LogCaptureFixture) -> None:
    assert host_contract.find_mismatches() == []
    host_contract.warn_about_mismatches()
    assert not caplog.records


@pytest.mark.parametrize(("family", "expected"), [("SD1.5", UNET_KEYS), ("SDXL", UNET_KEYS), ("FLUX.1", FLUX_KEYS)])
def test_patches_get_their_options_and_arguments(family: str, expected: set[str]) -> None:
    model, keys, seen = make_small_model(family), set[str](), list[Any]()

    def keep_keys(n: Any, options: dict[str, Any]) -> Any:
        keys.update(options)
        return n

    def run_block(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        seen.append({"img", "transformer_options"} <= set(args))
        return extra["original_block"](args)

    model.set_model_attn1_output_patch(keep_keys)
    for kind in ("double_block", "single_block") if family == "FLUX.1" else ():
        model.set_model_patch_replace(run_block, "dit", kind, 0)
    sample_latent(model, family, steps=1)
    assert expected <= keys and all(seen) and bool(seen) == (family == "FLUX.1")


def test_a_mismatch_is_one_warning(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(host_contract, "CALLS", {"comfy.utils.common_upscale": (99, ""), "comfy.gone.f": (0, "")})
    monkeypatch.setattr(host_contract, "WRAPPED", {"GONE": ("comfy.samplers.calc_cond_batch", "model")})
    monkeypatch.setattr(host_contract, "OPTION_KEYS", {"comfy.samplers": "uuids no_such_key"})
    host_contract.warn_about_mismatches()
    (record,) = caplog.records
    found = "comfy.utils.common_upscale, comfy.gone.f, comfy.samplers.calc_cond_batch, 'no_such_key' in comfy.samplers"
    assert record.levelname == "WARNING" and f"({found})" in record.getMessage()
