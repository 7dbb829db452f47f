"""Adapters for FLUX from seeds, in their published layouts or the pack's own, and identities for them."""

from __future__ import annotations

import inspect
import json
from typing import Any

import comfy.ldm.flux.layers
import comfy.ops
import torch
from adapters import PULID, projector
from comfy.model_patcher import ModelPatcher
from comfyui_likeness.likeness import detect, keymaps, omni_adapter
from comfyui_likeness.likeness.spec import AdapterSpec, Identity
from comfyui_likeness.nodes.attention import decoupled as nodes
from comfyui_likeness.nodes.attention.injection import ALWAYS, Bank, Call, Place, Term
from comfyui_likeness.nodes.loaders import own as loader
from comfyui_likeness.nodes.types import LoadedAdapter
from identities import identity
from models import FLUX
from models import sample as sample_family
from torch import Tensor

FAMILY = "FLUX.1"
# Older hosts show FLUX's queries to no patch, and nothing but PuLID-FLUX can work there.
SHOWN = "attn1_patch" in inspect.getsource(comfy.ldm.flux.layers)
HIDDEN, DOUBLES, SINGLES = FLUX["hidden_size"], FLUX["depth"], FLUX["depth_single_blocks"]
SIZE = (8, 12)  # of the latent
WIDTH, INNER = 48, 64  # of what keys read, inside the projector
OMNI = omni_adapter.KIND
KINDS = ("xlabs", "instantx", "pulid_flux", OMNI)
XLABS = "double_blocks.{}.processor.ip_adapter_double_stream_{}_proj"


def _xlabs() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "ip_adapter_proj_model.proj.weight": (4 * WIDTH, 768), "ip_adapter_proj_model.proj.bias": (4 * WIDTH,),
        "ip_adapter_proj_model.norm.weight": (WIDTH,), "ip_adapter_proj_model.norm.bias": (WIDTH,),
    }  # fmt: skip
    for i in range(DOUBLES):
        for part in "kv":
            shapes |= {f"{XLABS.format(i, part)}.weight": (HIDDEN, WIDTH), f"{XLABS.format(i, part)}.bias": (HIDDEN,)}
    return shapes


def _instantx() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "image_proj.proj.0.weight": (INNER, 1152), "image_proj.proj.0.bias": (INNER,),
        "image_proj.proj.2.weight": (8 * WIDTH, INNER), "image_proj.proj.2.bias": (8 * WIDTH,),
        "image_proj.norm.weight": (WIDTH,), "image_proj.norm.bias": (WIDTH,),
    }  # fmt: skip
    numbers = range(DOUBLES + SINGLES)
    return shapes | {f"ip_adapter.{n}.to_{part}_ip.weight": (HIDDEN, WIDTH) for n in numbers for part in "kv"}


def _omni() -> dict[str, tuple[int, ...]]:
    names = [f"double_blocks.{i}" for i in range(DOUBLES)] + [f"single_blocks.{i}" for i in range(SINGLES)]
    return {f"layers.{name}.{part}.weight": (HIDDEN, WIDTH) for name in names for part in "kv"}


def _pulid() -> dict[str, tuple[int, ...]]:
    inner = 2048  # heads as in the published file, whose number no shape tells
    layer = {
        "norm1.weight": (WIDTH,), "norm1.bias": (WIDTH,), "norm2.weight": (HIDDEN,), "norm2.bias": (HIDDEN,),
        "to_q.weight": (inner, HIDDEN), "to_kv.weight": (2 * inner, WIDTH), "to_out.weight": (HIDDEN, inner),
    }  # fmt: skip
    count = -(-DOUBLES // 2) + -(-SINGLES // 4)
    layers = {f"pulid_ca.{n}.{key}": shape for n in range(count) for key, shape in layer.items()}
    return {f"pulid_encoder.{key}": shape for key, shape in projector("pulid_v1_1", WIDTH).items()} | layers


SHAPES = {"xlabs": _xlabs, "instantx": _instantx, "pulid_flux": _pulid, OMNI: _omni}


def tensors(kind: str = OMNI, seed: int = 0) -> dict[str, Tensor]:
    """A file's tensors under their names."""
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(shape, generator=generator) / shape[-1] ** 0.5 for key, shape in SHAPES[kind]().items()}


def told(base: str = FAMILY, unconditional: str = "none") -> dict[str, Any]:
    spec = AdapterSpec(OMNI, base, 6, 0, (), (), unconditional=unconditional)
    return json.loads(omni_adapter.metadata(spec, {"steps": 1})["likeness"])


def adapter(kind: str = OMNI, seed: int = 0) -> LoadedAdapter:
    """The same, loaded as the loader node does it."""
    if kind == OMNI:
        return loader.load(tensors(kind, seed), told(), f"{kind} {seed}")[0]
    renamed = keymaps.rename(tensors(kind, seed), keymaps.IP_ADAPTER)
    spec, _ = detect.read_spec(renamed)
    module = detect.build(spec, renamed, comfy.ops.manual_cast).requires_grad_(False)
    return LoadedAdapter(spec, ModelPatcher(module, torch.device("cpu"), torch.device("cpu")), {}, f"{kind} {seed}")


def person(kind: str = OMNI, faces: int = 1, seed: int = 0) -> Identity:
    """An identity that holds what the adapter reads."""
    if kind == "instantx":
        return identity((detect.SIGLIP,), ((1152,),), faces, seed)
    if kind == "xlabs":
        return identity((detect.CLIP_L, detect.BLACK), ((768,), (768,)), faces, seed)
    if kind == "pulid_flux":
        return identity(detect.NEEDS[kind]({}), PULID, faces, seed)
    one = identity((omni_adapter.TOKENS,), ((6, WIDTH),), 1, seed)
    return type(one)(
        one.name, one.box.repeat(faces, 1), one.kps.repeat(faces, 1, 1), one.score.repeat(faces),
        one.weight.repeat(faces), joint=one.embeddings,
    )  # fmt: skip


SETTINGS: dict[str, Any] = {
    "strength": 1.0, "start_percent": 0.0, "end_percent": 1.0, "layer_weights": "linear", "scaling": "V only",
}  # fmt: skip


def applied(model: ModelPatcher, given: LoadedAdapter | None = None, who: Any = None, **changes: Any) -> ModelPatcher:
    """The model with people in it, by the node."""
    given = given or adapter()
    return nodes.ApplyDecoupled.execute(model, given, who or person(given.spec.kind), **{**SETTINGS, **changes}).args[0]


def sample(model: ModelPatcher, **changes: Any) -> Tensor:
    """A latent as FLUX is sampled: one prompt, no CFG."""
    return sample_family(model, FAMILY, **{"cfg": 1.0, "scheduler": "simple", "size": SIZE, **changes})


class Recorder(Term):
    """A term that notes what it reads and adds as much as it is told, at one place."""

    window, patchers, places = ALWAYS, [], []

    def __init__(self, place: Place, scale: float = 0.0) -> None:
        self.bank, self.places, self.scale, self.read = Bank(), [place], scale, []

    def prepare(self, call: Call) -> dict[Place, bool]:
        return dict.fromkeys(self.places, True)

    def term(self, state: Any, q: Tensor, options: dict[str, Any]) -> Tensor:
        self.read.append(q.clone())
        tokens = q if q.ndim == 3 else q.transpose(1, 2).flatten(2)
        return self.scale * tokens.roll(1, dims=-1)  # the last norm would undo a mere factor
