"""Zero-Shot Fused KV: an adapter from the weights of the checkpoint, whatever ran before."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import comfy.hooks
import comfy.model_management
import comfy.sd
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfyui_likeness.nodes.loaders.fused_kv_loader import make_zero_shot_fused_kv
from support.fused_kv import apply_fused_kv, make_zero_shot_adapter
from support.host_models import all_close, make_conditioning, make_small_model, sample_latent
from torch import Tensor

PATH = "input_blocks.1.1.transformer_blocks.0"
LORA_NAMES = ("attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn2.to_q")


def make_zero_shot_tensors(model: ModelPatcher) -> dict[str, Tensor]:
    return make_zero_shot_fused_kv(model, make_conditioning(3), "clean")[1]


def make_lora() -> dict[str, Tensor]:
    """A LoRA as large as the weights that it changes."""
    generator, lora = torch.Generator().manual_seed(1), {}
    for name in LORA_NAMES:
        up, down = (torch.randn(shape, generator=generator) for shape in ((32, 4), (4, 32)))
        key = f"diffusion_model.{PATH}.{name}"
        lora |= {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down}
    return lora


def apply_lora(model: ModelPatcher) -> ModelPatcher:
    patched, _ = comfy.sd.load_lora_for_models(model, None, make_lora(), 1.0, 0.0)
    assert patched is not None
    return patched


@pytest.mark.parametrize("family", ["SD1.5", "SDXL"])
@pytest.mark.parametrize("noise", ["clean", "match"])
def test_zero_shot(family: str, noise: str) -> None:
    base = make_small_model(family)
    out = sample_latent(apply_fused_kv(base, make_zero_shot_adapter(base, family, noise)), family)
    assert out.isfinite().all() and not all_close(out, sample_latent(base, family), 1e-3)


def sample_with_lora(base: ModelPatcher) -> None:
    sample_latent(apply_lora(base), steps=1)


def sample_with_hooked_lora(base: ModelPatcher) -> None:
    hooks = comfy.hooks.create_hook_lora(make_lora(), 1.0, 0.0)
    sample_latent(base, steps=1, cfg=1.0, positive=make_conditioning(1, hooks=hooks))


def load_a_part_with_lora(base: ModelPatcher) -> None:
    """As on a GPU with too little memory: some weights are patched, others when they are used."""
    apply_lora(base).patch_model(torch.device("cpu"), base.model_size() // 2)


def compare_under_hooked_lora(base: ModelPatcher) -> None:
    """The weights of a prompt's hooks stand in the model while it runs."""
    hooks = comfy.hooks.create_hook_lora(make_lora(), 1.0, 0.0)

    def compare(*_: Any) -> None:
        assert_same(make_zero_shot_tensors(base), expected)

    expected = make_zero_shot_tensors(base)
    sample_latent(base, steps=1, cfg=1.0, positive=make_conditioning(1, hooks=hooks), callback=compare)


def assert_same(tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in tensors.items())


@pytest.mark.parametrize(
    "run_before", [sample_with_lora, load_a_part_with_lora, sample_with_hooked_lora, compare_under_hooked_lora]
)
def test_what_ran_before_does_not_matter(run_before: Callable[[ModelPatcher], None]) -> None:
    base = make_small_model()
    expected = make_zero_shot_tensors(base)
    run_before(base)
    assert_same(make_zero_shot_tensors(base), expected)
    assert_same(make_zero_shot_tensors(apply_lora(base)), expected)
    comfy.model_management.unload_all_models()


def quantize_attentions(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The attentions' weights as scaled float8, named as in ComfyUI's files."""
    quantized: dict[str, Tensor] = {}
    for key, weight in weights.items():
        if "attn" in key and key.endswith(".weight"):
            scale = weight.abs().max() / torch.finfo(torch.float8_e4m3fn).max
            name = key.removesuffix("weight")
            quantized[key], quantized[f"{name}weight_scale"] = (weight / scale).to(torch.float8_e4m3fn), scale
            settings = json.dumps({"format": "float8_e4m3fn"}).encode()
            quantized[f"{name}comfy_quant"] = torch.tensor(list(settings), dtype=torch.uint8)
        else:
            quantized[key] = weight
    return quantized


def dequantize(quantized: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        key: weight.float() * quantized.get(f"{key}_scale", 1.0)
        for key, weight in quantized.items()
        if not key.endswith(("_scale", "comfy_quant"))
    }


def test_quantized_weights() -> None:
    quantized = quantize_attentions(make_small_model().model.diffusion_model.state_dict())
    expected = make_zero_shot_tensors(make_small_model(weights=dequantize(quantized)))
    base = make_small_model(weights=quantized)
    assert_same(make_zero_shot_tensors(base), expected)
    apply_lora(base).patch_model(torch.device("cpu"))
    assert_same(make_zero_shot_tensors(base), expected)


def test_weights_of_8_bits() -> None:
    """A checkpoint in float8 without scales gives an adapter in float16, as float8 would round its matrices again."""
    rounded = {
        key: value.to(torch.float8_e4m3fn)
        for key, value in make_small_model().model.diffusion_model.state_dict().items()
    }
    expected = make_zero_shot_tensors(make_small_model(weights={key: value.float() for key, value in rounded.items()}))
    base = make_small_model()
    base.model.diffusion_model.to(torch.float8_e4m3fn)
    for key, tensor in make_zero_shot_tensors(base).items():
        assert key.startswith("text") or (tensor.dtype == torch.float16 and torch.equal(tensor, expected[key].half()))


def test_weights_that_comfyui_does_not_convert_raise() -> None:
    base = make_small_model()
    to_k = base.model.diffusion_model.get_submodule(f"{PATH}.attn1.to_k")
    to_k.weight = torch.nn.Parameter(torch.zeros(512, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match="one of ComfyUI's loaders; got .*attn1.to_k.weight as torch.uint8"):
        make_zero_shot_tensors(base)
