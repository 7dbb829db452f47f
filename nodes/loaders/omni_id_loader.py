"""Load Omni-ID Encoder: a file in the native format with the trunk and the attention blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import comfy.model_management
import comfy.ops
from comfy.ldm.modules.attention import optimized_attention_for_device
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from torch import Tensor

from ...likeness.checkpoints import file_kinds, key_maps
from ...likeness.methods import omni_id
from ...likeness.spec import OmniIDSpec
from .. import types
from . import files, model_management, vision_towers

OMNI_ID_FOLDER = "likeness"
EXPECTED_TRUNK = "an Omni-ID encoder with its complete trunk; download the file again"


@dataclass(frozen=True, eq=False)
class OmniIDEncoder:
    """An Omni-ID encoder in a ModelPatcher (types.OmniIDEncoderProtocol)."""

    spec: OmniIDSpec
    sha256: str
    patcher: ModelPatcher
    file: str

    def encode(self, images: Tensor, weight: Sequence[float]) -> Tensor:
        return self._load_network()(self._iterate_chunks(images), weight).cpu()

    def compute_attention_maps(self, images: Tensor, weight: Sequence[float]) -> Tensor:
        return self._load_network().compute_attention_maps(self._iterate_chunks(images), weight).cpu()

    def _load_network(self) -> omni_id.OmniIDModel:
        # A partial load would leave the trunk's position embeddings on the offload device.
        comfy.model_management.load_models_gpu([self.patcher], force_full_load=True)
        return self.patcher.model  # pyright: ignore[reportReturnType]

    def _iterate_chunks(self, images: Tensor) -> Iterator[Tensor]:
        for chunk in images.split(omni_id.PHOTOS_PER_CHUNK):
            comfy.model_management.throw_exception_if_processing_interrupted()
            yield omni_id.normalize_images(chunk.to(self.patcher.load_device))


def run_optimized_attention(q: Tensor, k: Tensor, v: Tensor, num_heads: int, bias: Tensor | None) -> Tensor:
    """ComfyUI's attention function for this device (omni_id.MultiHeadAttentionFunction)."""
    return optimized_attention_for_device(q.device, mask=bias is not None)(q, k, v, num_heads, mask=bias)


def load_omni_id_encoder(file: str) -> OmniIDEncoder:
    """Load an encoder file. Raises ValueError if it is damaged or of another kind."""
    path = files.find_model_file(file, OMNI_ID_FOLDER)
    metadata, tensors = files.read_native_metadata(path), files.load_weights(path, file_kinds.OMNI_ID)
    if metadata is None:
        raise ValueError(
            f"choose another file: got {file}, which is not in this pack's format; expected an Omni-ID encoder"
        )
    spec = omni_id.read_omni_id_spec(tensors, metadata, file)
    tensors = omni_id.interpolate_position_embeddings(tensors, spec)
    tower = vision_towers.build_vision_tower(
        key_maps.select_prefix(tensors, "trunk."), file, spec.activation, EXPECTED_TRUNK, spec.trunk_heads
    )
    try:
        module = omni_id.build_omni_id_model(
            spec, tensors, tower.module, comfy.ops.manual_cast, run_optimized_attention
        )
    except ValueError as error:
        raise ValueError(f"got {file}: {error}; download the file again") from error
    return OmniIDEncoder(spec, files.hash_file(path), model_management.make_encoder_patcher(module), file)


class LoadOmniID(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LikenessLoadOmniID",
            display_name="Load Omni-ID Encoder",
            category="likeness/loaders",
            description="Loads an Omni-ID encoder for Encode Identity. It encodes any number of photos of a person "
            "jointly into one set of tokens.",
            search_aliases=["omni id", "omniid", "face encoder"],
            inputs=[
                io.Combo.Input(
                    "file", options=files.list_weight_files(OMNI_ID_FOLDER),
                    tooltip="Encoder file from models/likeness (.safetensors), trained with this pack.",
                ),
            ],
            outputs=[types.OmniIDSocket.Output(display_name="omni_id")],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, file: str) -> tuple[int, int]:
        return files.get_file_signature(files.find_model_file(file, OMNI_ID_FOLDER))

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        return io.NodeOutput(load_omni_id_encoder(file))


NODES = [LoadOmniID]
