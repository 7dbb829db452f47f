"""A teacher of Arc2Face's kind (Papantoniou et al. 2403.11641): faces become words of a text encoder trained for it.

It begins as the base's text encoder and UNet. There is no text but "photo of a id person"; what is painted is another
picture of the same person.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ...likeness import arc2face, own_file
from ...likeness.spec import Arc2FaceSpec
from ...nodes.loaders import files
from ..base import unet
from ..base.source import Source
from ..task import Batch
from . import words
from .faces import FaceTask
from .faces import Settings as FaceSettings

UNET = "_unet.safetensors"
# What of the UNet is trained, by the names of its parameters.
TRAINS: Mapping[str, Callable[[str], bool]] = {
    "all": lambda _: True, "attentions": lambda name: ".attn2." in name, "nothing": lambda _: False,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Settings(FaceSettings):
    """`trains` says what of the UNet is, a key of TRAINS; `no_face` is the part with the empty prompt.

    The text encoder learns at the part `slower` of the rate: a small one, whose faces disturb the UNet at first, would
    hush them before they tell people apart.
    """

    trains: str = "all"
    slower: float = 1.0
    no_face: float = 0.1

    def __post_init__(self) -> None:
        if self.trains not in TRAINS:
            raise ValueError(f"got trains = {self.trains!r} in [task]; expected {' or '.join(TRAINS)}")


class Teacher(FaceTask[Settings]):
    """Loss: the mean squared difference of the noise and what the model says it is."""

    def __init__(self, settings: Settings, source: Source, _seed: int) -> None:
        super().__init__(settings, source)
        self.text = words.text_model(self.frozen.text)
        self.model: Any = self.frozen.model
        for name, value in self.model.named_parameters():
            value.requires_grad_(TRAINS[settings.trains](name))

    def share(self, name: str) -> float:
        return self.settings.slower if name.startswith("text.") else 1.0

    @property
    def parts(self) -> tuple[float, float, float]:
        return 0.0, self.settings.no_face, 0.0

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        with torch.no_grad():
            batch = self.looked(batch)
            given = unet.Noised.of(self.model, batch)
        faces, nobody = self.prompts(batch["read"], ())
        text = torch.where(batch["faceless"][:, None, None], nobody, faces)
        told = {"counts": batch.get("counts"), "c_crossattn": text}
        return {"noise": unet.wrong_noise(self.model, given, self.settings.snr, **told)}

    def painter(self) -> Any:
        return self.model

    def prompts(self, faces: Tensor, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        return arc2face.tokens(self.text, faces), arc2face.nothing(self.text, faces.device)

    def save(self, folder: Path, notes: Mapping[str, Any]) -> None:
        """The text encoder under the settings' name, for Load AdaFace, and the UNet beside it."""
        heads = self.text.layers[0].self_attn.heads
        spec = Arc2FaceSpec(words.base_of(self.text), heads, (self.reader.feature,), notes)
        name = self.settings.file
        save_file(words.tensors_of(self.text, words.ENCODER), folder / f"{name}.safetensors", arc2face.metadata(spec))
        weights = self.model.diffusion_model.state_dict()
        tensors = {unet.PREFIX + key: value.half().contiguous() for key, value in weights.items()}
        base = files.told(Path(self.settings.unet)) or {}  # whose settings were read when it was loaded
        kept = {key: base["settings"][key] for key in ("config", "prediction") if key in base["settings"]}
        told = {**asdict(self.settings), **kept}
        save_file(tensors, folder / f"{name}{UNET}", own_file.metadata("unet", "SD1.5", notes, settings=told))
