"""FLUX in one run: the bare model, and each kind of adapter in its blocks, without CFG as FLUX dev is sampled."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .compare import Case, compare, part
from .measure import BARE

TEXT = {"small": 64, "full": 512}  # tokens of the prompt
# The published sizes; small is a fifth as wide and as much shorter, its adapters cut to fit.
CONFIGS: dict[str, dict[str, Any]] = {
    "small": {"hidden_size": 640, "num_heads": 5, "depth": 4, "depth_single_blocks": 8, "context_in_dim": 768},
    "full": {"hidden_size": 3072, "num_heads": 24, "depth": 19, "depth_single_blocks": 38, "context_in_dim": 4096},
}
LAYOUTS = {
    "XLabs v2": "xlabs_flux_ip_adapter_v2", "InstantX": "instantx_flux_ip_adapter", "PuLID-FLUX": "pulid_flux_v0.9.x",
}  # fmt: skip
NARROWED = ("XLabs v2", "InstantX")  # in the small size, whose keys would read more than the model is wide
OMNI_ID = "Omni-ID"
# What each kind reads of an identity, feature by feature; the last is the black picture's.
READS: dict[str, tuple[tuple[int, ...], ...]] = {
    "xlabs": ((768,), (768,)), "instantx": ((1152,), (768,)), "omni_id_adapter": ((256, 1280), (768,)),
    "pulid_flux": ((512,), (768,), (5, 577, 1024), (768,)),
}  # fmt: skip


@dataclass(frozen=True)
class FluxCase(Case):
    """A case that is sampled with one prompt of so many tokens, `width` wide."""

    tokens: int = 64
    width: int = 768

    def run(self, steps: int, callback: Callable[..., None] | None = None) -> Any:
        import comfy.samplers
        import comfy_extras.nodes_custom_sampler as custom
        import torch

        self.before()
        guider: Any = custom.Guider_Basic(self.model)
        guider.set_conds([[torch.full((1, self.tokens, self.width), 0.1), {"pooled_output": torch.zeros(1, 768)}]])
        latent = torch.zeros(self.pictures, 16, self.resolution // 8, self.resolution // 8)
        sampling = self.model.get_model_object("model_sampling")
        sigmas = comfy.samplers.calculate_sigmas(sampling, "simple", steps)
        with torch.inference_mode():
            noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(2))
            sampler = comfy.samplers.sampler_object("euler")
            return guider.sample(noise, latent, sampler, sigmas, callback=callback, disable_pbar=True, seed=1)


def config_of(size: str) -> dict[str, Any]:
    return part("tools.standin_flux").FLUX | CONFIGS[size]


def base_model(size: str) -> Any:
    """FLUX of the host with random weights, in half precision on a GPU."""
    import comfy.model_base
    import comfy.model_management
    import comfy.supported_models
    import torch
    from comfy.model_patcher import ModelPatcher

    device = comfy.model_management.get_torch_device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    settings = comfy.supported_models.Flux({"image_model": "flux", **config_of(size)})
    settings.set_inference_dtype(dtype, None)
    model = comfy.model_base.Flux(settings, device=torch.device("cpu"))
    shapes = {key: tuple(value.shape) for key, value in model.diffusion_model.state_dict().items()}
    model.diffusion_model.load_state_dict(part("tools.standin_models").fill(shapes, dtype), assign=True)
    model.diffusion_model.eval().requires_grad_(False)
    return ModelPatcher(model, device, torch.device("cpu"))


def adapter(kind: str, size: str) -> Any:
    """An adapter of that kind from seeds, in its published layout or the pack's own, fitting the model."""
    import comfy.ops

    models, cut = part("tools.standin_models"), part("tools.standin_flux")
    if kind == OMNI_ID:
        told = part("tools.standins").TOLD["omni_id_flux.safetensors"]
        return part("nodes.loaders.own").load(models.fill(cut.omni_id(config_of(size))), told, kind)[0]
    text = 256 if size == "small" and kind in NARROWED else cut.TEXT
    flat = models.fill(cut.fitted(models.layout_of(LAYOUTS[kind]), config_of(size), text))
    detect, keymaps = part("likeness.detect"), part("likeness.keymaps")
    tensors = keymaps.rename(flat, keymaps.IP_ADAPTER)
    about, _ = detect.read_spec(tensors)
    held = part("nodes.loaders.care").patcher_of(detect.build(about, tensors, comfy.ops.manual_cast))
    return part("nodes.types").LoadedAdapter(about, held, {}, kind)


def with_identity(model: Any, given: Any) -> Any:
    import torch

    spec = part("likeness.spec")
    needs = (*given.spec.needs, part("likeness.detect").BLACK)
    shapes = zip(needs, READS[given.spec.kind], strict=True)
    rows = {need.id("0" * 64): torch.ones(1, *shape) for need, shape in shapes}
    one = torch.ones(1)
    person = spec.Identity("someone", torch.zeros(1, 4), torch.zeros(1, 5, 2), one, one, embeddings=rows)
    node = part("nodes.attention.decoupled").ApplyDecoupled
    return node.execute(model, given, person, 1.0, 0.0, 1.0, "linear", "V only").args[0]


def cases(size: str, side: int) -> list[Case]:
    model, width = base_model(size), CONFIGS[size]["context_in_dim"]
    models = {BARE: model}
    models |= {kind: with_identity(model, adapter(kind, size)) for kind in (*LAYOUTS, OMNI_ID)}
    return [
        FluxCase(name, patched, lambda: None, resolution=side, tokens=TEXT[size], width=width)
        for name, patched in models.items()
    ]


def measure(arguments: argparse.Namespace) -> str:
    return compare(cases(arguments.size, arguments.resolution), arguments.repeats, BARE)
