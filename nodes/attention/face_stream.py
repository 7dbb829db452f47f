"""The face stream: a UNet pass over each person's faces, whose attention inputs become keys and values.

Fused KV and reference attention use it. The pass runs inside the model call, before the first layer of the image.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...likeness.attention.feature_cache import CachedTensors, ReferenceFeatureCache
from .injection import Injection, PatchPlace
from .model_call import ModelCall


class EncodedFaces(Protocol):
    """One person's faces as latents [n, c, h, w], and a digest of them."""

    @property
    def latents(self) -> Tensor: ...

    @property
    def digest(self) -> str: ...


Faces = TypeVar("Faces", bound=EncodedFaces)


@dataclass
class FaceRunState:
    """The projected faces of all people, as last computed in a run, and what they depend on."""

    key: Hashable = None
    projections: dict[PatchPlace, list[Any]] = field(default_factory=dict)


class FaceStreamInjection(Injection, Generic[Faces]):
    """An injection that reads faces by a UNet pass per person and projects the attention inputs at its places.

    Attention inputs are cached beyond the run in `feature_cache`, projections in the run state, until their key
    changes. Nothing is cached while hooks change the weights between the prompts of a step.
    """

    people: Sequence[Faces]

    @property
    def run_state(self) -> FaceRunState:
        return self.run_cache.get_state(FaceRunState)

    @property
    @abstractmethod
    def feature_cache(self) -> ReferenceFeatureCache:
        """Attention inputs by cache key and person."""

    @abstractmethod
    def make_cache_key(self, call: ModelCall) -> tuple[Hashable, ...]:
        """What a pass depends on besides the faces. The first entry is get_weights_key of the UNet."""

    @abstractmethod
    def read_faces(self, person: Faces, call: ModelCall) -> CachedTensors:
        """The pass over a person's faces: the attention input at each place, [n, tokens, C]."""

    @abstractmethod
    def project_faces(self, place: PatchPlace, attention_input: Tensor, person: Faces, call: ModelCall) -> Any:
        """Keys and values of a person's faces at a place."""

    def project_people(self, call: ModelCall) -> Mapping[PatchPlace, list[Any]]:
        """Keys and values of every person at every place."""
        state, key = self.run_state, self.make_cache_key(call)
        if state.key != (key, call.device) or key[0] is None:
            state.key, state.projections = None, {}  # free those of the last step first
            projections: dict[PatchPlace, list[Any]] = {place: [] for place in self.places}
            for person in self.people:
                attention_inputs = self._get_attention_inputs(person, key, call)
                for place, projected in projections.items():
                    projected.append(self.project_faces(place, attention_inputs[place], person, call))
            state.key, state.projections = (key, call.device), projections
        return state.projections

    def _get_attention_inputs(self, person: Faces, key: tuple[Hashable, ...], call: ModelCall) -> CachedTensors:
        if key[0] is None:
            return self.read_faces(person, call)
        return self.feature_cache.get_or_compute(
            (*key, person.digest), call.device, lambda: self.read_faces(person, call)
        )


def hash_tensor(tensor: Tensor) -> str:
    """A digest of a tensor's values."""
    return hashlib.blake2b(tensor.float().cpu().contiguous().numpy().tobytes(), digest_size=16).hexdigest()


def encode_images_with_vae(model: ModelPatcher, vae: Any, images: Tensor) -> Tensor:
    """Images [n, H, W, 3] in 0..1 as latents of the model [n, c, H / 8, W / 8], float32 on the CPU.

    Raises ValueError if the VAE makes other latents.
    """
    latents, channels = vae.encode(images), model.model.latent_format.latent_channels
    if latents.ndim != 4 or latents.shape[1] != channels:
        raise ValueError(
            f"got a VAE whose latents of {len(images)} faces are {list(latents.shape)}; expected {channels} "
            "channels; connect the VAE of the model's checkpoint"
        )
    return model.model.process_latent_in(latents).float().cpu()


def get_weights_key(model: ModelPatcher) -> Hashable:
    """Identifies the weights that run now, as LoRAs may follow an Apply node. None while hooks change them."""
    current = getattr(model.model, "current_patcher", None) or model
    return None if getattr(current, "current_hooks", None) else current.patches_uuid
