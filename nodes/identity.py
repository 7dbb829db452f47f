"""Merge Identities, Mix Identities, Save Identity and Load Identity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from comfy_api.latest import io, ui

from ..likeness.identity import identity_file, merge
from ..likeness.methods.omni_id import OMNI_ID_FEATURE, align_stored_faces
from ..likeness.spec import Identity
from . import types
from .loaders import files

IDENTITIES_FOLDER = "identities"
MAX_PREVIEW_FACES = 16


def _make_identities_input(tooltip: str) -> io.Autogrow.Input:
    identity = types.IdentitySocket.Input("identity", tooltip="From Encode Identity, Load Identity, Merge or Mix.")
    template = io.Autogrow.TemplatePrefix(identity, prefix="identity_", min=1, max=16)
    return io.Autogrow.Input("identities", template=template, tooltip=tooltip)


def encode_identities_jointly(
    identities: Sequence[Identity], omni_id_encoder: types.OmniIDEncoderProtocol
) -> list[Identity]:
    """Encode the stored faces of all identities jointly, and give every identity these Omni-ID tokens.

    Raises ValueError if an identity holds no face crops (see omni_id.align_stored_faces).
    """
    key = OMNI_ID_FEATURE.format_encoder_id(omni_id_encoder.sha256)
    tokens = omni_id_encoder.encode(*align_stored_faces(identities, omni_id_encoder.spec.image_size)).half()
    return [
        replace(
            identity,
            joint_embeddings={key: tokens},
            hashes={**identity.hashes, key: omni_id_encoder.sha256},
        )
        for identity in identities
    ]


class MergeIdentities(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LikenessMergeIdentities",
            display_name="Merge Identities",
            category="likeness/identity",
            description="Merges several identities of the same person into one. Only embeddings that all of them hold "
            "are kept. The report lists those that were dropped, how similar the faces are, and outliers.",
            search_aliases=["average faces", "combine identities"],
            inputs=[
                _make_identities_input("1 to 16 identities of the same person, each from one or more photos."),
                io.Combo.Input(
                    "method",
                    options=list(merge.MERGE_METHODS),
                    default="mean",
                    tooltip="mean: average of all faces. concatenate: keeps every face. quality-weighted: average "
                    "weighted by detector score and agreement with the other faces. geometric median: robust against a "
                    "photo that does not fit.",
                ),
                types.OmniIDSocket.Input(
                    "omni_id",
                    optional=True,
                    tooltip="From Load Omni-ID Encoder: encodes the stored face crops of all identities jointly, "
                    "instead of averaging the tokens of each identity.",
                ),
            ],
            outputs=[
                types.IdentitySocket.Output(display_name="identity"),
                io.String.Output(
                    display_name="report", tooltip="Dropped embeddings, cosine similarities (-1 to 1), outliers."
                ),
            ],
        )

    @classmethod
    def execute(
        cls, identities: io.Autogrow.Type, method: str, omni_id: types.OmniIDEncoderProtocol | None = None
    ) -> io.NodeOutput:
        identity_list = list(identities.values())
        if omni_id is not None:
            identity_list = encode_identities_jointly(identity_list, omni_id)
        return io.NodeOutput(*merge.merge_identities(identity_list, method))


class MixIdentities(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LikenessMixIdentities",
            display_name="Mix Identities",
            category="likeness/identity",
            description="Interpolates between the identities of several people. Face embeddings are interpolated on "
            "the unit sphere, image tokens linearly. Each identity counts as one face.",
            search_aliases=["blend faces", "slerp"],
            inputs=[
                _make_identities_input("1 to 16 identities, of different people."),
                io.String.Input(
                    "weights",
                    default="",
                    tooltip="One number per identity, 0 or more, separated by commas, e.g. 0.7, 0.3. Only the ratio "
                    "matters; 0 leaves an identity out. Empty: equal weights.",
                ),
            ],
            outputs=[types.IdentitySocket.Output(display_name="identity")],
        )

    @classmethod
    def execute(cls, identities: io.Autogrow.Type, weights: str) -> io.NodeOutput:
        identity_list = list(identities.values())
        shares = merge.parse_weights(weights, len(identity_list))
        mixed = merge.mix_identities(identity_list, shares)
        return io.NodeOutput(mixed, ui=ui.PreviewText(merge.describe_mix(identity_list, shares)))


class SaveIdentity(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LikenessSaveIdentity",
            display_name="Save Identity",
            category="likeness/identity",
            description="Saves an identity as models/identities/<name>.safetensors. An existing file is overwritten.",
            search_aliases=["store identity", "save embeds"],
            is_output_node=True,
            inputs=[
                types.IdentitySocket.Input("identity", tooltip="The identity to save, from Encode, Merge or Mix."),
                io.String.Input(
                    "name",
                    default="",
                    tooltip="File name of up to 120 characters: letters, digits, spaces, - _ . and / for a subfolder, "
                    "e.g. family/anna. Empty: the name of the identity.",
                ),
                io.Boolean.Input(
                    "include_crops",
                    default=True,
                    tooltip="Store the face crops in the file. Without them, the file is smaller and contains no "
                    "images of the person; methods that need only embeddings still work.",
                ),
            ],
            outputs=[],
        )

    @classmethod
    def execute(cls, identity: Identity, name: str, include_crops: bool) -> io.NodeOutput:
        path = get_identity_path(name.strip() or identity.name)
        identity_file.save_identity(identity, path, include_crops)
        size = path.stat().st_size / 1e6
        return io.NodeOutput(ui=ui.PreviewText(f"{identity.name}: saved as {path} ({size:.2f} MB)"))


def get_identity_path(name: str) -> Path:
    """The file of an identity of this name. Raises ValueError if the name could leave the folder."""
    stem = identity_file.check_identity_name(name.removesuffix(identity_file.IDENTITY_FILE_SUFFIX))
    return files.list_folder_paths(IDENTITIES_FOLDER)[0] / f"{stem}{identity_file.IDENTITY_FILE_SUFFIX}"


class LoadIdentity(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LikenessLoadIdentity",
            display_name="Load Identity",
            category="likeness/identity",
            description="Loads an identity from a file made by Save Identity, and previews its faces if the file "
            "holds them.",
            search_aliases=["load embeds", "load person"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=[
                        name
                        for name in files.list_weight_files(IDENTITIES_FOLDER)
                        if files.has_suffix(name, identity_file.IDENTITY_FILE_SUFFIX)
                    ],
                    tooltip="Identity file from models/identities (.safetensors). Press R to refresh the list.",
                ),
            ],
            outputs=[types.IdentitySocket.Output(display_name="identity")],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str) -> tuple[int, int]:
        return files.get_file_signature(files.find_model_file(file, IDENTITIES_FOLDER))

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        identity = identity_file.load_identity(files.find_model_file(file, IDENTITIES_FOLDER))
        if identity.crop is None:
            return io.NodeOutput(identity)
        return io.NodeOutput(identity, ui=ui.PreviewImage(identity.crop[:MAX_PREVIEW_FACES].float() / 255, cls=cls))


NODES = [MergeIdentities, MixIdentities, SaveIdentity, LoadIdentity]
