"""Load Omni-ID Encoder: a file of the pack's own that holds trunk and blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import comfy.model_management
import comfy.ops
from comfy.ldm.modules.attention import optimized_attention_for_device
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from torch import Tensor

from ...likeness import keymaps
from ...likeness import omni_id as math
from ...likeness.spec import OmniIDSpec
from .. import types
from . import care, files, towers

FOLDER = "likeness"
EXPECTED = "an Omni-ID encoder with the whole of its trunk; fetch the file again"


@dataclass(frozen=True, eq=False)
class OmniIDEncoder:
    """An Omni-ID encoder under the host's care (types.OmniEncoder)."""

    spec: OmniIDSpec
    sha256: str
    patcher: ModelPatcher
    file: str

    def encode(self, pictures: Tensor, weight: Sequence[float]) -> Tensor:
        return self._loaded()(self._chunks(pictures), weight).cpu()

    def maps(self, pictures: Tensor, weight: Sequence[float]) -> Tensor:
        return self._loaded().maps(self._chunks(pictures), weight).cpu()

    def _loaded(self) -> math.OmniID:
        # As a whole: the host leaves the trunk's position embeddings behind where it loads a part.
        comfy.model_management.load_models_gpu([self.patcher], force_full_load=True)
        return self.patcher.model  # pyright: ignore[reportReturnType]

    def _chunks(self, pictures: Tensor) -> Iterator[Tensor]:
        for chunk in pictures.split(math.CHUNK):
            comfy.model_management.throw_exception_if_processing_interrupted()
            yield math.normed(chunk.to(self.patcher.load_device))


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, bias: Tensor | None) -> Tensor:
    """The host's choice for this device (math.Attention)."""
    return optimized_attention_for_device(q.device, mask=bias is not None)(q, k, v, heads, mask=bias)


def load(file: str) -> OmniIDEncoder:
    """Read an encoder file. Raises ValueError (see `files.read`, `math.read_spec`, `math.build`)."""
    path = files.find(file, FOLDER)
    told, tensors = files.told(path), files.read(path)
    if told is None:
        raise ValueError(
            f"got {file}, which is no file of this pack; expected an Omni-ID encoder, which says so in its metadata; "
            "load adapters with Load Identity Adapter, image encoders with Load Image Encoder"
        )
    spec = math.read_spec(tensors, told, file)
    tensors = math.fitted(tensors, spec)
    tower = towers.tower_of(keymaps.under(tensors, "trunk."), file, spec.activation, EXPECTED)
    try:
        module = math.build(spec, tensors, tower.module, comfy.ops.manual_cast, attention)
    except ValueError as error:
        raise ValueError(f"got {file}: {error}; fetch the file again") from error
    return OmniIDEncoder(spec, files.sha256(path), care.encoder_of(module), file)


class LoadOmniID(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LikenessLoadOmniID",
            display_name="Load Omni-ID Encoder",
            category="likeness/loaders",
            description="Loads an Omni-ID encoder, which reads any number of photos of a person together and makes one "
            "set of tokens of them, for Encode Identity.",
            search_aliases=["omni id", "omniid", "face encoder"],
            inputs=[
                io.Combo.Input(
                    "file", options=files.names(FOLDER),
                    tooltip="Encoder file from models/likeness (.safetensors), of this pack's own layout.",
                ),
            ],
            outputs=[types.OmniID.Output(display_name="omni_id")],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, file: str) -> tuple[int, int]:
        return files.signature(files.find(file, FOLDER))

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        return io.NodeOutput(load(file))


NODES = [LoadOmniID]
