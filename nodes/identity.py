"""Merge Identities, Mix Identities, Save Identity, Load Identity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from comfy_api.latest import io, ui

from ..likeness import identity as math
from ..likeness import identity_file
from ..likeness import omni_id as omni_math
from ..likeness.spec import Identity
from . import types
from .loaders import files

FOLDER = "identities"
PREVIEW_MAX = 16


def _identities(tooltip: str) -> io.Autogrow.Input:
    one = types.Identity.Input("identity", tooltip="From Encode Identity, Load Identity, Merge or Mix.")
    template = io.Autogrow.TemplatePrefix(one, prefix="identity_", min=1, max=16)
    return io.Autogrow.Input("identities", template=template, tooltip=tooltip)


def together(identities: Sequence[Identity], encoder: types.OmniEncoder) -> list[Identity]:
    """The identities, each with the tokens of all their stored faces together. Raises ValueError (omni_math.stored)."""
    key = omni_math.FEATURE.id(encoder.sha256)
    tokens = encoder.encode(*omni_math.stored(identities, encoder.spec.image_size)).half()
    return [replace(who, joint={key: tokens}, hashes={**who.hashes, key: encoder.sha256}) for who in identities]


class MergeIdentities(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LikenessMergeIdentities",
            display_name="Merge Identities",
            category="likeness/identity",
            description="Makes one identity of several of the same person. Only the embeddings that all of them hold "
            "survive; the report says which do not, how alike the faces are, and which face does not fit.",
            search_aliases=["average faces", "combine identities"],
            inputs=[
                _identities("1 to 16 identities of the same person, of one photo or many."),
                io.Combo.Input(
                    "method",
                    options=list(math.METHODS),
                    default="mean",
                    tooltip="mean: average of all faces. concatenate: keeps every face. quality-weighted: average by "
                    "detector score and agreement with the others. geometric median: hardly moved by a photo that "
                    "does not fit.",
                ),
                types.OmniID.Input(
                    "omni_id",
                    optional=True,
                    tooltip="Load Omni-ID Encoder: makes the tokens anew, of all the identities' stored face pictures "
                    "together, instead of averaging what each of them holds.",
                ),
            ],
            outputs=[
                types.Identity.Output(display_name="identity"),
                io.String.Output(display_name="report", tooltip="What was dropped, cosines (-1 to 1), outliers."),
            ],
        )

    @classmethod
    def execute(
        cls, identities: io.Autogrow.Type, method: str, omni_id: types.OmniEncoder | None = None
    ) -> io.NodeOutput:
        people = list(identities.values())
        return io.NodeOutput(*math.merge(people if omni_id is None else together(people, omni_id), method))


class MixIdentities(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LikenessMixIdentities",
            display_name="Mix Identities",
            category="likeness/identity",
            description="Makes a person between several people. Face vectors are blended along the sphere they live "
            "on, image tokens linearly. Each identity counts as one face.",
            search_aliases=["blend faces", "slerp"],
            inputs=[
                _identities("1 to 16 identities, of different people."),
                io.String.Input(
                    "weights",
                    default="",
                    tooltip="One number per identity, 0 or more, parted by commas: 0.7, 0.3. Only their ratio counts; "
                    "0 leaves one out. Empty: equal.",
                ),
            ],
            outputs=[types.Identity.Output(display_name="identity")],
        )

    @classmethod
    def execute(cls, identities: io.Autogrow.Type, weights: str) -> io.NodeOutput:
        people = list(identities.values())
        numbers = math.parse_weights(weights, len(people))
        mixed = math.mix(people, numbers)
        return io.NodeOutput(mixed, ui=ui.PreviewText(math.mix_report(people, numbers)))


class SaveIdentity(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LikenessSaveIdentity",
            display_name="Save Identity",
            category="likeness/identity",
            description="Keeps an identity as models/identities/<name>.safetensors. A file of that name is replaced.",
            search_aliases=["store identity", "save embeds"],
            is_output_node=True,
            inputs=[
                types.Identity.Input("identity", tooltip="From Encode, Merge or Mix."),
                io.String.Input(
                    "name",
                    default="",
                    tooltip="File name of up to 120 letters, digits, blanks, - _ . with / for a subfolder, as "
                    "family/anna. Empty: the identity's own name.",
                ),
                io.Boolean.Input(
                    "include_crops",
                    default=True,
                    tooltip="Keep the face pictures in the file. Without them it is smaller and shows nobody, and "
                    "still drives every method that needs embeddings alone.",
                ),
            ],
            outputs=[],
        )

    @classmethod
    def execute(cls, identity: Identity, name: str, include_crops: bool) -> io.NodeOutput:
        path = path_of(name.strip() or identity.name)
        identity_file.save(identity, path, include_crops)
        size = path.stat().st_size / 1e6
        return io.NodeOutput(ui=ui.PreviewText(f"{identity.name}: saved as {path} ({size:.2f} MB)"))


def path_of(name: str) -> Path:
    """Where an identity of this name is kept. Raises ValueError on a name that could leave the folder."""
    plain = identity_file.check_name(name.removesuffix(identity_file.SUFFIX))
    return files.roots(FOLDER)[0] / f"{plain}{identity_file.SUFFIX}"


class LoadIdentity(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LikenessLoadIdentity",
            display_name="Load Identity",
            category="likeness/identity",
            description="Reads an identity that Save Identity has kept, and shows its faces if they are in the file.",
            search_aliases=["load embeds", "load person"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=[name for name in files.names(FOLDER) if name.endswith(identity_file.SUFFIX)],
                    tooltip="Identity file from models/identities (.safetensors). Press R to see new files.",
                ),
            ],
            outputs=[types.Identity.Output(display_name="identity")],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str) -> tuple[int, int]:
        return files.signature(files.find(file, FOLDER))

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        identity = identity_file.load(files.find(file, FOLDER))
        if identity.crop is None:
            return io.NodeOutput(identity)
        return io.NodeOutput(identity, ui=ui.PreviewImage(identity.crop[:PREVIEW_MAX].float() / 255, cls=cls))


NODES = [MergeIdentities, MixIdentities, SaveIdentity, LoadIdentity]
