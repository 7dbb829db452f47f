"""Apply Identity (Reference): FlashFace, and reference attention without training."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

import torch
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io, ui
from torch import Tensor

from ....likeness.faces import reference_faces
from ....likeness.identity.merge import parse_weights
from ....likeness.methods import flashface
from ....likeness.spec import Identity, People, Person
from ... import types
from ..face_stream import encode_images_with_vae, hash_tensor
from ..injection import ATTN1_OUTPUT, GuidanceBranch, PatchPlace
from ..patch import attach_injection, get_injections
from ..schedule import Schedule, make_schedule_inputs
from ..unet_layers import UNetLayer, list_unet_layers
from .added_layers import AddedLayersTerm
from .face_position import apply_face_position
from .reference_term import ReferenceAttention, ReferenceFaces, ReferenceSettings, ReferenceTerm

REFERENCE_BLOCK_TYPES = ("middle", "output")  # encoder blocks see no reference (Sec. 3.2)


def find_reference_attentions(
    model: ModelPatcher, reference_net: types.LoadedReferenceNet
) -> dict[PatchPlace, ReferenceAttention]:
    """The attentions of a model that read a reference net. Raises ValueError if the two do not belong together."""
    if reference_net.added_layers is None:
        return _find_self_attentions(model.model, reference_net.patcher.model.diffusion_model)
    for term in get_injections(model):
        if isinstance(term, AddedLayersTerm) and term.patcher is reference_net.added_layers:
            return {place: ReferenceAttention(f.q, f.k, f.v, f.o, True) for place, f in term.layers.items()}
    raise ValueError(
        f"got a model without the layers that read this reference net ({reference_net.file}); expected the model of "
        "the same Load FlashFace; connect it; LoRAs and other patches may come in between"
    )


def _find_self_attentions(base: BaseModel, reference_unet: Any) -> dict[PatchPlace, ReferenceAttention]:
    unet: Any = base.diffusion_model
    layers = list_unet_layers(unet)
    if (
        _describe_unet_layers(list_unet_layers(reference_unet)) != _describe_unet_layers(layers)
        or reference_unet.num_classes is not None
        or reference_unet.in_channels != base.latent_format.latent_channels
    ):
        raise ValueError(
            "got a reference net and a model of different kinds; expected two plain SD1.5 models; connect such models"
        )
    attentions = {
        PatchPlace(ATTN1_OUTPUT, layer.block, layer.depth, layer.is_multi_block): unet.get_submodule(
            f"{layer.module_path}.attn1"
        )
        for layer in layers
        if layer.block[0] in REFERENCE_BLOCK_TYPES
    }
    return {place: ReferenceAttention(a.to_q, a.to_k, a.to_v, a.to_out, False) for place, a in attentions.items()}


def _describe_unet_layers(layers: Sequence[UNetLayer]) -> list[tuple[Any, ...]]:
    return [(layer.block, layer.depth, layer.hidden_size, layer.context_dim) for layer in layers]


def encode_reference_faces(
    model: ModelPatcher, vae: Any, person: Person, min_count: int, face_size: int
) -> tuple[ReferenceFaces, Tensor]:
    """A person's faces for the reference net, and the images [n, size, size, 3] of them."""
    images = reference_faces.make_reference_faces(person.identity, face_size).float() / 255
    latents = encode_images_with_vae(model, vae, images)
    order = tuple(flashface.repeat_reference_indices(len(latents), min_count))
    return ReferenceFaces(latents, order, person.strength, person.mask, hash_tensor(latents)), images


def collect_reference_people(
    identity_or_people: Identity | People, others: Sequence[Identity], weights_text: str
) -> list[Person]:
    """The people to show: identities that share the strength by weight, or people with a strength each."""
    if not isinstance(identity_or_people, Identity):
        if others:
            raise ValueError(
                f"got people and {len(others)} more identities; expected one or the other; add everyone with Person "
                "nodes, or connect identities only"
            )
        return [person for person in identity_or_people if person.strength]
    identities = [identity_or_people, *others]
    weights = parse_weights(weights_text, len(identities))
    return [
        Person(identity, None, weight / sum(weights))
        for identity, weight in zip(identities, weights, strict=True)
        if weight
    ]


class ApplyReference(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        person = types.IdentitySocket.Input("identity", tooltip="Another person, mixed with the others.")
        return io.Schema(
            node_id="LikenessApplyReference",
            display_name="Apply Identity (Reference)",
            category="likeness/apply",
            description="Self-attention also reads the features of the faces, from a reference net: FlashFace, or "
            "reference only. Needs an identity with face crops. With strength 0 or an empty schedule, only the face "
            "position applies.",
            search_aliases=["flashface", "reference only", "apply"],
            inputs=[
                io.Model.Input("model", tooltip="From Load FlashFace, or any SD1.5 model with Model as Reference Net."),
                types.ReferenceNetSocket.Input(
                    "reference_net", tooltip="From Load FlashFace or Model as Reference Net."
                ),
                types.make_identity_input("Needs face crops. For several photos, merge with concatenate."),
                io.Vae.Input("vae", tooltip="The VAE of an SD1.5 checkpoint. It encodes the faces once."),
                io.Float.Input(
                    "strength", default=1.2, min=0.0, max=3.0, step=0.05,
                    tooltip="Scale of the reference attention (lambda_feat), 0 to 3: 0 is off, 1 as trained. 0.9 lets "
                    "the prompt change age or gender.",
                ),
                io.Float.Input(
                    "reference_guidance", default=3.2, min=0.0, max=10.0, step=0.1,
                    tooltip="Guidance scale towards the references, in addition to CFG (lambda_ref), 0 to 10. It needs "
                    "a third row per image. 0 needs none and applies the references to both prompts.",
                ),
                *make_schedule_inputs(),
                io.Mask.Input(
                    "face_position", optional=True,
                    tooltip="Where the face should be: white in a mask with the aspect ratio of the image. "
                    "Unconnected: anywhere.",
                ),
                io.Int.Input(
                    "launch", default=750, min=0, max=1000, optional=True, advanced=True,
                    tooltip="Timestep at which reference guidance starts, 1000 (noise) to 0 (image).",
                ),
                io.Float.Input(
                    "strength_before", default=0.85, min=0.0, max=3.0, step=0.05, optional=True, advanced=True,
                    tooltip="Strength before launch, 0 to 3, for both prompts.",
                ),
                io.Float.Input(
                    "rescale", default=0.5, min=0.0, max=1.0, step=0.05, optional=True, advanced=True,
                    tooltip="How much of the contrast added by guidance is removed, 0 to 1.",
                ),
                io.Int.Input(
                    "show_at_least", default=flashface.DEFAULT_NUM_REFERENCES, min=1, max=16, optional=True,
                    advanced=True,
                    tooltip="Faces are repeated until there are at least this many; more faces have more weight. 4 as "
                    "in the authors' demo, 1 shows each face once.",
                ),
                io.Int.Input(
                    "refresh", default=1, min=1, max=50, optional=True, advanced=True,
                    tooltip="Read the faces again every n steps. 1 is exact, more is faster.",
                ),
                io.Conditioning.Input(
                    "reference_text", optional=True,
                    tooltip="Text for the reference net. Unconnected: the negative prompt.",
                ),
                io.Autogrow.Input(
                    "others", optional=True,
                    template=io.Autogrow.TemplatePrefix(person, prefix="identity_", min=0, max=8),
                    tooltip="Other people, mixed with the first.",
                ),
                io.String.Input(
                    "weights", default="", optional=True,
                    tooltip="One number per person if there are others, separated by commas: 0.7, 0.3. Only their "
                    "ratio matters. Empty: equal.",
                ),
                io.String.Input(
                    "face_box", default="", optional=True, advanced=True,
                    tooltip="Instead of a mask: left, top, right and bottom of the face as fractions of the image, 0 "
                    "to 1: 0.3, 0.1, 0.6, 0.4. It is extended to a square of its longer side.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model")],
        )  # fmt: skip

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        reference_net: types.LoadedReferenceNet,
        identity: Identity | People,
        vae: Any,
        strength: float,
        reference_guidance: float,
        start_percent: float,
        end_percent: float,
        face_position: Tensor | None = None,
        launch: int = 750,
        strength_before: float = 0.85,
        rescale: float = 0.5,
        show_at_least: int = flashface.DEFAULT_NUM_REFERENCES,
        refresh: int = 1,
        reference_text: list[Any] | None = None,
        others: io.Autogrow.Type | None = None,
        weights: str = "",
        face_box: str = "",
    ) -> io.NodeOutput:
        attentions = find_reference_attentions(model, reference_net)
        people = collect_reference_people(identity, list((others or {}).values()), weights)
        faces = [
            encode_reference_faces(model, vae, person, show_at_least, reference_net.spec.face_size) for person in people
        ]
        model = apply_face_position(model, face_position, face_box)
        if not faces:
            return io.NodeOutput(model)
        preview = ui.PreviewImage(torch.cat([images for _, images in faces]), cls=cls)
        if not strength or start_percent >= end_percent:
            return io.NodeOutput(model, ui=preview)
        schedule = Schedule(start_percent, end_percent)
        launch_schedule = Schedule.from_timestep(launch + 0.5)  # sigma may lie between timesteps; the authors round
        name = f"reference {uuid.uuid4().hex}"
        branch = GuidanceBranch(name, reference_guidance, rescale, schedule, launch_schedule)
        text = reference_text[0][0] if reference_text else None
        settings = ReferenceSettings(strength, strength_before, branch, refresh, text)
        term = ReferenceTerm(model, reference_net, attentions, [person for person, _ in faces], settings)
        return io.NodeOutput(attach_injection(model, term, branch), ui=preview)


NODES = [ApplyReference]
