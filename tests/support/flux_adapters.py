"""Random adapters for FLUX, in published or native formats, and identities for them."""

from __future__ import annotations

import inspect
import json
from typing import Any

import comfy.ldm.flux.layers
import comfy.ops
import torch
from comfy.model_patcher import ModelPatcher
from comfyui_likeness.likeness.checkpoints import checkpoint_detection, key_maps, native_omni_adapter
from comfyui_likeness.likeness.methods import omni_id
from comfyui_likeness.likeness.spec import AdapterSpec, Identity
from comfyui_likeness.nodes.attention import apply_decoupled
from comfyui_likeness.nodes.attention.injection import AttentionTerm, PatchPlace, RunCache
from comfyui_likeness.nodes.attention.model_call import ModelCall
from comfyui_likeness.nodes.attention.schedule import ALWAYS_ON
from comfyui_likeness.nodes.loaders import native_adapters
from comfyui_likeness.nodes.types import LoadedAdapter
from torch import Tensor

from support.host_models import FLUX_CONFIG, sample_latent
from support.identities import make_identity
from support.ip_adapters import PULID_SHAPES, make_projector_shapes

FLUX_FAMILY = "FLUX.1"
# Older versions of ComfyUI do not pass the queries of FLUX to patches; only PuLID-FLUX works with them.
HOST_PASSES_QUERIES = "attn1_patch" in inspect.getsource(comfy.ldm.flux.layers)
HIDDEN_SIZE, NUM_DOUBLE_BLOCKS, NUM_SINGLE_BLOCKS = (
    FLUX_CONFIG["hidden_size"],
    FLUX_CONFIG["depth"],
    FLUX_CONFIG["depth_single_blocks"],
)
LATENT_SIZE = (8, 12)  # height and width
TOKEN_WIDTH, PROJECTOR_WIDTH = 48, 64  # of the identity tokens, inside the projector
OMNI_ID_KIND = native_omni_adapter.KIND
FLUX_ADAPTER_KINDS = ("xlabs", "instantx", "pulid_flux", OMNI_ID_KIND)
XLABS_KEY = "double_blocks.{}.processor.ip_adapter_double_stream_{}_proj"


def _xlabs_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "ip_adapter_proj_model.proj.weight": (4 * TOKEN_WIDTH, 768),
        "ip_adapter_proj_model.proj.bias": (4 * TOKEN_WIDTH,),
        "ip_adapter_proj_model.norm.weight": (TOKEN_WIDTH,), "ip_adapter_proj_model.norm.bias": (TOKEN_WIDTH,),
    }  # fmt: skip
    for i in range(NUM_DOUBLE_BLOCKS):
        for part in "kv":
            shapes |= {
                f"{XLABS_KEY.format(i, part)}.weight": (HIDDEN_SIZE, TOKEN_WIDTH),
                f"{XLABS_KEY.format(i, part)}.bias": (HIDDEN_SIZE,),
            }
    return shapes


def _instantx_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "image_proj.proj.0.weight": (PROJECTOR_WIDTH, 1152), "image_proj.proj.0.bias": (PROJECTOR_WIDTH,),
        "image_proj.proj.2.weight": (8 * TOKEN_WIDTH, PROJECTOR_WIDTH), "image_proj.proj.2.bias": (8 * TOKEN_WIDTH,),
        "image_proj.norm.weight": (TOKEN_WIDTH,), "image_proj.norm.bias": (TOKEN_WIDTH,),
    }  # fmt: skip
    numbers = range(NUM_DOUBLE_BLOCKS + NUM_SINGLE_BLOCKS)
    return shapes | {
        f"ip_adapter.{n}.to_{part}_ip.weight": (HIDDEN_SIZE, TOKEN_WIDTH) for n in numbers for part in "kv"
    }


def _omni_id_shapes() -> dict[str, tuple[int, ...]]:
    names = [f"double_blocks.{i}" for i in range(NUM_DOUBLE_BLOCKS)] + [
        f"single_blocks.{i}" for i in range(NUM_SINGLE_BLOCKS)
    ]
    return {f"layers.{name}.{part}.weight": (HIDDEN_SIZE, TOKEN_WIDTH) for name in names for part in "kv"}


def _pulid_flux_shapes() -> dict[str, tuple[int, ...]]:
    inner = 2048  # as in the published file: the number of heads cannot be read from shapes
    layer = {
        "norm1.weight": (TOKEN_WIDTH,), "norm1.bias": (TOKEN_WIDTH,),
        "norm2.weight": (HIDDEN_SIZE,), "norm2.bias": (HIDDEN_SIZE,),
        "to_q.weight": (inner, HIDDEN_SIZE), "to_kv.weight": (2 * inner, TOKEN_WIDTH),
        "to_out.weight": (HIDDEN_SIZE, inner),
    }  # fmt: skip
    count = -(-NUM_DOUBLE_BLOCKS // 2) + -(-NUM_SINGLE_BLOCKS // 4)
    layers = {f"pulid_ca.{n}.{key}": shape for n in range(count) for key, shape in layer.items()}
    return {
        f"pulid_encoder.{key}": shape for key, shape in make_projector_shapes("pulid_v1_1", TOKEN_WIDTH).items()
    } | layers


SHAPES_BY_KIND = {
    "xlabs": _xlabs_shapes,
    "instantx": _instantx_shapes,
    "pulid_flux": _pulid_flux_shapes,
    OMNI_ID_KIND: _omni_id_shapes,
}


def make_flux_adapter_tensors(kind: str = OMNI_ID_KIND, seed: int = 0) -> dict[str, Tensor]:
    """The tensors of a file, by name."""
    generator = torch.Generator().manual_seed(seed)
    return {
        key: torch.randn(shape, generator=generator) / shape[-1] ** 0.5 for key, shape in SHAPES_BY_KIND[kind]().items()
    }


def make_omni_adapter_metadata(base: str = FLUX_FAMILY, unconditional: str = "none") -> dict[str, Any]:
    spec = AdapterSpec(OMNI_ID_KIND, base, 6, 0, (), (), unconditional=unconditional)
    return json.loads(native_omni_adapter.make_omni_adapter_metadata(spec, {"steps": 1})["likeness"])


def make_flux_adapter(kind: str = OMNI_ID_KIND, seed: int = 0) -> LoadedAdapter:
    """The adapter, loaded as the loader node does."""
    if kind == OMNI_ID_KIND:
        return native_adapters.load_native_adapter(
            make_flux_adapter_tensors(kind, seed), make_omni_adapter_metadata(), f"{kind} {seed}"
        )[0]
    renamed = key_maps.rename_keys(make_flux_adapter_tensors(kind, seed), key_maps.IP_ADAPTER)
    spec, _ = checkpoint_detection.detect_adapter_spec(renamed)
    module = checkpoint_detection.build_ip_adapter(spec, renamed, comfy.ops.manual_cast).requires_grad_(False)
    return LoadedAdapter(spec, ModelPatcher(module, torch.device("cpu"), torch.device("cpu")), {}, f"{kind} {seed}")


def make_flux_identity(kind: str = OMNI_ID_KIND, faces: int = 1, seed: int = 0) -> Identity:
    """An identity with the embeddings that the adapter needs."""
    if kind == "instantx":
        return make_identity((checkpoint_detection.SIGLIP_POOLED,), ((1152,),), faces, seed)
    if kind == "xlabs":
        return make_identity(
            (checkpoint_detection.CLIP_L_PHOTO, checkpoint_detection.CLIP_L_BLACK), ((768,), (768,)), faces, seed
        )
    if kind == "pulid_flux":
        return make_identity(checkpoint_detection.REQUIRED_FEATURES[kind]({}), PULID_SHAPES, faces, seed)
    identity = make_identity((omni_id.OMNI_ID_FEATURE,), ((6, TOKEN_WIDTH),), 1, seed)
    return type(identity)(
        identity.name, identity.box.repeat(faces, 1), identity.kps.repeat(faces, 1, 1), identity.score.repeat(faces),
        identity.weight.repeat(faces), joint_embeddings=identity.embeddings,
    )  # fmt: skip


APPLY_DECOUPLED_DEFAULTS: dict[str, Any] = {
    "strength": 1.0, "start_percent": 0.0, "end_percent": 1.0, "layer_weights": "linear", "scaling": "V only",
}  # fmt: skip


def apply_flux_adapter(
    model: ModelPatcher, loaded_adapter: LoadedAdapter | None = None, identity_or_people: Any = None, **changes: Any
) -> ModelPatcher:
    """The model with people applied by the node."""
    loaded_adapter = loaded_adapter or make_flux_adapter()
    return apply_decoupled.ApplyDecoupled.execute(
        model,
        loaded_adapter,
        identity_or_people or make_flux_identity(loaded_adapter.spec.kind),
        **{**APPLY_DECOUPLED_DEFAULTS, **changes},
    ).args[0]


def sample_flux_latent(model: ModelPatcher, **changes: Any) -> Tensor:
    """A latent sampled with one prompt and no CFG, as usual for FLUX."""
    return sample_latent(model, FLUX_FAMILY, **{"cfg": 1.0, "scheduler": "simple", "size": LATENT_SIZE, **changes})


class QueryRecorder(AttentionTerm):
    """A term at one place that records its queries and adds `scale` times their rolled channels."""

    schedule, patchers, places = ALWAYS_ON, [], []

    def __init__(self, place: PatchPlace, scale: float = 0.0) -> None:
        self.run_cache, self.places, self.scale, self.queries = RunCache(), [place], scale, []

    def prepare_states(self, call: ModelCall) -> dict[PatchPlace, bool]:
        return dict.fromkeys(self.places, True)

    def compute_term(self, state: Any, q: Tensor, options: dict[str, Any]) -> Tensor:
        self.queries.append(q.clone())
        tokens = q if q.ndim == 3 else q.transpose(1, 2).flatten(2)
        return self.scale * tokens.roll(1, dims=-1)  # a plain factor would cancel out in the last norm
