"""FlashFace (arXiv 2403.17008): the Face ReferenceNet and the added attention layers, on clusters of N + 1 pictures.

The second UNet begins as the base model, the added layers as copies of the self-attentions that they stand in (so does
the authors' code). With `tuned` the UNet that paints is trained too, as published, with a further input channel for
the face's place. Without, it is frozen and the file serves any base model; the added layers' outputs begin at 0 then,
as nothing would make up for a self-attention that counts twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import comfy.ops
import torch
from comfy.model_base import BaseModel, ModelType
from comfy.model_patcher import ModelPatcher
from torch import Generator, Tensor, nn
from torch.nn.functional import pad

from ...likeness import flashface as math
from ...likeness import own_flashface, reference_faces
from ...likeness.bank import MemoryBank
from ...likeness.spec import FlashFaceSpec
from ...nodes.attention import reference
from ...nodes.attention.added import with_added
from ...nodes.attention.injection import ALWAYS, OUTPUT, Place
from ...nodes.attention.patch import inputs
from ...nodes.attention.unet import Site, sites
from ...nodes.loaders.flashface import host_model, with_place
from ...nodes.types import LoadedReferenceNet
from ..base import clip
from ..base.source import Source
from ..data import fit
from ..task import Batch
from . import stack
from .readers import References

FORGETS = 0  # bytes: no two steps read the same faces
FIRST = "input_blocks.0.0.weight"  # reads the latent, and beside it the face's place
# Where the added layers stand (Table 4): the middle has one always.
PLACEMENTS: Mapping[str, tuple[str, ...]] = {
    "encoder": ("input", "middle"), "decoder": ("middle", "output"), "both": ("input", "middle", "output"),
}  # fmt: skip
PARTS = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}


@dataclass(frozen=True, kw_only=True)
class Settings(stack.Settings):
    """`placement` is one of PLACEMENTS. Each row sees from 1 to `references` faces, `face` pixels a side.

    `no_face` is the part without them, `no_place` that without the face's place, each by itself, as is `no_text`.
    `tuned` is in the module's docstring.
    """

    placement: str = "decoder"
    face: int = reference_faces.SIDE
    references: int = math.REFERENCES
    no_face: float = 0.1
    no_place: float = 0.1
    tuned: bool = False

    def __post_init__(self) -> None:
        if self.placement not in PLACEMENTS:
            raise ValueError(
                f"got placement = {self.placement!r} in [task]; expected one of {', '.join(PLACEMENTS)}; choose one"
            )


class FlashFace(stack.AdapterTask[Settings]):
    """No chance is in how it begins."""

    def __init__(self, settings: Settings, source: Source, _seed: int) -> None:
        super().__init__(settings, source)
        self.eye = References(Path(settings.vae), self.frozen.autoencoder, settings.face)
        self.read_pool(Path(settings.vae))
        self.text = self.frozen.words(clip.tokenize(self.tokenizer, [""]), torch.get_default_device()).detach()
        base = self.frozen.model
        if settings.tuned and base.model_type != ModelType.EPS:
            raise ValueError(
                f"got tuned in [task] for {settings.unet}, which says no noise; expected a UNet that does, as every "
                "FlashFace file's; leave tuned out"
            )
        self.spec = FlashFaceSpec(heads=base.model_config.unet_config["num_heads"], face_size=settings.face)
        self.net, self.added = build(base, settings, self.spec.heads)
        self.main = tuned(base, self.spec.heads) if settings.tuned else None
        self.eyes, self.layers = stack.Held(self.net), stack.Held(self.added)
        self.unet = self.frozen.unet if self.main is None else stack.Held(self.main)
        self.begin()

    @property
    def reader(self) -> References:
        return self.eye

    @property
    def parts(self) -> tuple[float, float, float]:
        text, face = self.settings.no_text, self.settings.no_face
        return text * (1 - face), face * (1 - text), text * face

    def count(self, chance: Generator) -> int:
        return 1 + int(torch.randint(self.settings.references, (1,), generator=chance))

    def batch(self, chance: Generator, size: int) -> Batch:
        batch = super().batch(chance, size)
        if self.main is None:
            return batch
        side = self.settings.side
        boxes = [fit(self.source.view(number), side).box / side for number in batch["made"]]
        places = torch.stack([reference_faces.position(box.tolist(), side, side) for box in boxes])[:, None]
        known = torch.rand(size, generator=chance) >= self.settings.no_place
        return {**batch, "place": places * known[:, None, None, None]}

    def painter(self, device: torch.device) -> ModelPatcher:
        model = self.unet.on(device)
        return with_added(model if self.main is None else with_place(model), self.layers.on(device))

    def told(self, batch: Batch) -> dict[str, Tensor]:
        return super().told(batch) | ({} if self.main is None else {"c_concat": batch["place"]})

    def bound(self, model: ModelPatcher, batch: Batch) -> reference.Reference:
        seen = ~batch["faceless"][:, None, None]
        return self.injection(model, batch["read"], seen.float())

    def injection(self, model: ModelPatcher, read: Tensor, seen: Tensor | None = None) -> reference.Reference:
        """Bound to the next faces of [rows * n, 4, h, w] for each row, where `seen` [rows, 1, 1] does not say 0."""
        device = model.load_device
        eyes, layers = self.eyes.on(device), self.layers.on(device)
        net = LoadedReferenceNet(eyes, layers, MemoryBank(FORGETS), self.settings.file, self.spec)
        return shown(model, net, read, seen, self.text.to(device))

    def file(self, notes: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
        main = {} if self.main is None else self.main.diffusion_model.state_dict()
        tensors = own_flashface.tensors(self.net.diffusion_model.state_dict(), self.added, main)
        return tensors, own_flashface.metadata(replace(self.spec, notes=notes))


def shown(
    model: ModelPatcher, net: LoadedReferenceNet, read: Tensor, seen: Tensor | None, text: Tensor
) -> reference.Reference:
    """What FlashFace.injection gives, of its parts; the faces are read with this text [1, T, C]."""
    latents = model.model.process_latent_in(read.float())
    return reference.Reference(
        net=net, layers=reference.readers(model, net), people=[reference.Shown(latents, (), 1.0, seen, "")],
        strength=1.0, before=1.0, on=ALWAYS, launch=ALWAYS, guided=False, refresh=1, text=text,
        read_by=net.patcher, separate=True, name="", unfold=True,
    )  # fmt: skip


def build(base: BaseModel, settings: Settings, heads: int) -> tuple[BaseModel, math.AddedLayers]:
    """The second UNet and the added layers as they begin."""
    unet: Any = base.diffusion_model
    chosen = [site for site in sites(unet) if site.block[0] in PLACEMENTS[settings.placement]]
    net = copied(weights(base), heads)
    freeze_unread(net.diffusion_model, chosen)
    own = {
        f"{site.key}.{part}.{key}": value.detach().clone()
        for site in chosen
        for part, name in PARTS.items()
        for key, value in unet.get_submodule(f"{site.key}.attn1.{name}").state_dict().items()
    }
    added = math.AddedLayers(own, comfy.ops.disable_weight_init).requires_grad_(True)
    if not settings.tuned:
        with torch.no_grad():
            for name, value in added.named_parameters():
                value.mul_(".o." not in name)
    return net, added


def tuned(base: BaseModel, heads: int) -> BaseModel:
    """The UNet that paints, to train: of what it reads beside the latent it knows nothing at first."""
    own = weights(base)
    return copied({**own, FIRST: pad(own[FIRST], (0, 0, 0, 0, 0, 1))}, heads).requires_grad_(True)


def weights(model: BaseModel) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in model.diffusion_model.state_dict().items()}


def copied(tensors: Mapping[str, Tensor], heads: int) -> BaseModel:
    """A UNet with these weights, as the loader of the file that is made will build it."""
    model: Any = host_model(tensors, heads).model
    return model.requires_grad_(True)


def freeze_unread(unet: nn.Module, chosen: Iterable[Site]) -> None:
    """Freeze what has no part in what is read at these sites: all behind the last of them."""
    places = [Place(OUTPUT, site.block, site.depth, site.deep) for site in chosen]
    first: Any = unet.get_parameter(FIRST)
    context = next(site.context for site in chosen)
    given = torch.zeros(1, 4, 16, 16).to(first), torch.zeros(1).to(first), torch.zeros(1, 1, context).to(first)
    seen = inputs(unet, *given, places)
    parameters = list(unet.parameters())
    found = torch.autograd.grad([x.sum() for x in seen.values()], parameters, allow_unused=True)
    for value, gradient in zip(parameters, found, strict=True):
        value.requires_grad_(gradient is not None)
