"""torch.compile of the diffusion model, by ComfyUI's own node and as other packs do it: equal to not compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras.nodes_torch_compile import skip_torch_compile_dict
from comfyui_likeness.likeness.checkpoints import checkpoint_detection
from comfyui_likeness.nodes.loaders.flashface_loader import ModelAsReferenceNet
from support import host_models
from support.flashface_models import FLASHFACE_CASES, apply_flashface, load_flashface, make_face_latents
from support.flux_adapters import (
    FLUX_ADAPTER_KINDS,
    FLUX_FAMILY,
    apply_flux_adapter,
    make_flux_adapter,
    sample_flux_latent,
)
from support.fused_kv import apply_fused_kv, make_fused_kv_adapter
from support.host_models import all_close, make_small_model, sample_latent
from support.infinite_id_adapters import apply_infinite_id
from support.ip_adapters import apply_ip_adapter

# One attention in each part of the UNet, as tracing takes long.
TINY_CONFIG: dict[str, Any] = {
    "num_res_blocks": [1], "channel_mult": [1], "transformer_depth": [1], "transformer_depth_output": [1, 0],
}  # fmt: skip
NUM_LAYERS = 3
COMFYUI_OPTIONS = {"guard_filter_fn": skip_torch_compile_dict}


@pytest.fixture(autouse=True)
def tiny_model(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for key, value in TINY_CONFIG.items():
        monkeypatch.setitem(host_models.SD15_CONFIG, key, value)
    monkeypatch.setitem(checkpoint_detection.BASES_BY_LAYER_COUNT, NUM_LAYERS, "SD1.5")
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def apply_reference(model: ModelPatcher) -> ModelPatcher:
    net = ModelAsReferenceNet.execute(model, 64).args[0]
    return apply_flashface(model, net, make_face_latents(), reference_guidance=2.0, launch=900)


APPLY_NODES: dict[str, Callable[[ModelPatcher], ModelPatcher]] = {
    "decoupled, in the first step": lambda model: apply_ip_adapter(model, end_percent=0.5),
    "fused": lambda model: apply_fused_kv(model, make_fused_kv_adapter(stream_noise="match")),
    "mixed": apply_infinite_id,
    "mixed, shared": lambda model: apply_infinite_id(model, text_stream="shared"),
    "reference": apply_reference,
}


def compile_model(model: ModelPatcher, options: dict[str, Any] | None, keys: tuple[str, ...] = ()) -> ModelPatcher:
    compiled = model.clone()
    set_torch_compile_wrapper(model=compiled, backend="eager", options=options, keys=list(keys))
    return compiled


@pytest.mark.parametrize("options", [COMFYUI_OPTIONS, None], ids=["ComfyUI's node", "without guard filter"])
@pytest.mark.parametrize("method", APPLY_NODES)
def test_compiled_equals_not_compiled(method: str, options: dict[str, Any] | None) -> None:
    model = APPLY_NODES[method](make_small_model())
    expected = sample_latent(model)
    compiled = compile_model(model, options)
    assert all_close(sample_latent(compiled), expected)
    assert all_close(sample_latent(compiled), expected)  # with what was compiled in the first run


@pytest.mark.parametrize("options", [COMFYUI_OPTIONS, None], ids=["ComfyUI's node", "without guard filter"])
def test_compiled_flashface(options: dict[str, Any] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        host_models.SD15_CONFIG, "context_dim", FLASHFACE_CASES["models"]["tiny_a"]["config"]["context_dim"]
    )
    model = apply_flashface(*load_flashface("tiny_a"))
    expected = sample_latent(model)
    assert all_close(sample_latent(compile_model(model, options)), expected)


def name_blocks(model: ModelPatcher) -> tuple[str, ...]:
    flux = model.model.diffusion_model
    kinds = {"double_blocks": flux.double_blocks, "single_blocks": flux.single_blocks}
    return tuple(f"diffusion_model.{kind}.{i}" for kind, blocks in kinds.items() for i in range(len(blocks)))


@pytest.mark.parametrize(
    ("in_blocks", "options"),
    [(False, COMFYUI_OPTIONS), (False, None), (True, None)],
    ids=["ComfyUI's node", "without guard filter", "by block"],
)
@pytest.mark.parametrize("kind", FLUX_ADAPTER_KINDS)
def test_compiled_flux(kind: str, in_blocks: bool, options: dict[str, Any] | None) -> None:
    base = make_small_model(FLUX_FAMILY)
    model = apply_flux_adapter(base, make_flux_adapter(kind), end_percent=0.5)
    tail = {"start_step": 1, "last_step": 2}
    assert torch.equal(sample_flux_latent(model, **tail), sample_flux_latent(base, **tail))  # off in the second step
    expected = sample_flux_latent(model)
    compiled = compile_model(model, options, name_blocks(model) if in_blocks else ())
    assert all_close(sample_flux_latent(compiled), expected)
    assert all_close(sample_flux_latent(compiled), expected)
