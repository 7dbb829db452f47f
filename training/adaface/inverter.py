"""The prompt inverter by face distillation (AdaFace, Sec. 2.1 and 2.2): faces as words that the base model reads.

Only the inverter is trained. The teacher and the base model see the same noise, at several steps one after the other;
from one to the next the teacher denoises (Eq. 2).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate.utils import send_to_device
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor, nn
from torch.nn.functional import mse_loss, normalize

from ...likeness import adaface, arc2face, keymaps, prompts
from ...likeness.clip_text import WIDENS
from ...likeness.spec import PrompterSpec
from ...nodes.loaders.adaface import encoder
from ..base import clip, unet
from ..base.recogniser import VECTOR
from ..base.source import Source
from ..task import Batch
from . import words
from .expand import expanded
from .faces import FaceTask
from .faces import Settings as FaceSettings

HERE = "@"  # stands for the person in a prompt
MIX = "hidden_state_layer_weights"
TRIED = 16  # faces of the batch that tells of progress


@dataclass(frozen=True, kw_only=True)
class Settings(FaceSettings):
    """`teacher` and `teacher_unet` are the files of a teacher that was trained before.

    Of the faces the part `random` is drawn from a Gaussian; its pictures are noise. Each batch takes 1 to `denoise`
    steps. In `prompt` @ stands for the person; in captions, the first of `class_words` that they say. `mix` weighs the
    inverter's last layers at first, the last one last.

    It may `begin` with the file of another run, widened to `copies` values per word in each layer and as many "keys" or
    "queries", as `widens` says; all but the first copy begin with `spread` of noise in parts of the weights' own.
    """

    teacher: str
    teacher_unet: str
    random: float = 0.4
    denoise: int = 3
    prompt: str = "a photo of @"
    class_words: tuple[str, ...] = ("person",)
    mix: tuple[float, ...] = (1.0, 2.0, 4.0)
    begin: str = ""
    copies: tuple[int, ...] = ()
    widens: str = "keys"
    spread: float = 0.1

    def __post_init__(self) -> None:
        if self.widens not in WIDENS:
            raise ValueError(f"got widens = {self.widens!r} in [task]; expected {' or '.join(WIDENS)}")
        if HERE not in self.prompt or self.denoise < 1 or not self.class_words:
            raise ValueError(
                f"got prompt = {self.prompt!r}, denoise = {self.denoise}, {len(self.class_words)} class_words in "
                f"[task]; expected {HERE} in the prompt, a step and a word at least; mend the config"
            )


Told = TypeVar("Told", bound=Settings)


class Teaching:
    """The frozen teacher: no part of the module."""

    def __init__(self, settings: Settings) -> None:
        text, self.spec = encoder(Path(settings.teacher))
        self.text = text.float().eval().requires_grad_(False)
        self.model: Any = unet.load(Path(settings.teacher_unet)).eval().requires_grad_(False)

    def on(self, device: torch.device) -> Teaching:
        self.text.to(device)
        self.model.to(device)
        return self


class FaceDistillation(FaceTask[Told]):
    """Loss: the squared difference of the noise that the base model sees and that the teacher sees, over the steps."""

    def __init__(self, settings: Told, source: Source, seed: int) -> None:
        super().__init__(settings, source)
        clip.keep_for_gradient(self.frozen.text)
        self.teaching = Teaching(settings)
        self.inverter = inverter(self.frozen.text, settings, seed)
        self.asked = words.row(self.tokenizer, prompts.parts(settings.prompt, [HERE]), [words.PLACE] * adaface.VECTORS)
        self._before: Tensor | None = None

    def batch(self, chance: Generator, size: int) -> Batch:
        found = super().batch(chance, size)
        shape = found["noise"].shape
        count = int(torch.randint(1, self.settings.denoise + 1, (), generator=chance))
        steps = self.frozen.model.model_sampling.num_timesteps
        return {
            **found,
            "random": torch.rand(size, generator=chance) < self.settings.random,
            "faces": torch.randn(size, VECTOR, generator=chance),
            "nowhere": torch.randn(shape, generator=chance),
            "times": torch.randint(steps, (count, size), generator=chance).sort(0, descending=True).values,
        }

    def looked(self, batch: Batch) -> Batch:
        """With directions of random people among the real ones, whose pictures are noise."""
        found, drawn = super().looked(batch), batch["random"]
        faces = torch.where(drawn[:, None], normalize(batch["faces"], dim=-1), found["read"])
        nowhere = batch["nowhere"] / self.frozen.model.latent_format.scale_factor
        return {**found, "read": faces, "latents": torch.where(drawn[:, None, None, None], nowhere, found["latents"])}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return {"face": self.distilled(batch)}

    def distilled(self, batch: Batch) -> Tensor:
        """Eq. 2."""
        model = self.frozen.unet.on(batch["noise"].device).model
        with torch.no_grad():
            batch = self.looked(batch)
            taught = self.taught(batch["read"])
            noisy = unet.Noised.of(model, {**batch, "times": batch["times"][0]}).noisy
        text = self.read([self.asked] * len(taught), self.vectors(taught))
        teacher = self.teaching.on(noisy.device).model
        sigmas = [model.model_sampling.sigma(times) for times in batch["times"]]
        total = noisy.new_zeros(())
        for sigma, after in zip(sigmas, [*sigmas[1:], sigmas[-1]], strict=True):
            with torch.no_grad():
                noise = unet.said_noise(teacher, noisy, sigma, c_crossattn=taught)
            total = total + mse_loss(unet.said_noise(model, noisy, sigma, c_crossattn=text), noise)
            noisy = noisy - (sigma - after)[:, None, None, None] * noise
        return total

    def taught(self, faces: Tensor) -> Tensor:
        """What the teacher's UNet reads of directions [n, 512]: [n, 77, width]."""
        return arc2face.tokens(self.teaching.on(faces.device).text, faces)

    def vectors(self, taught: Tensor) -> Tensor:
        """The words [n, K, width] for faces as the teacher reads them."""
        return self.inverter.vectors(taught[:, arc2face.AT : arc2face.AT + adaface.VECTORS])

    def read(self, rows: Sequence[Sequence[int]], vectors: Tensor) -> Tensor:
        """What the base's UNet reads of rows of tokens with people's vectors in them, [n, 77, width]."""
        return words.encode(self.frozen.text.to(vectors.device), rows, vectors)

    def composed(self, captions: Sequence[str], said: Sequence[int] | None = None) -> list[list[int]]:
        """Captions with somebody in the place of their class word, or with `said` there; without one that comes first.

        `said` is otherwise a person's places.
        """
        said = [words.PLACE] * adaface.VECTORS if said is None else said
        rows = []
        for text in captions:
            found = prompts.parts(text, self.settings.class_words)
            rows.append(words.row(self.tokenizer, found, said))
        return rows

    def painter(self) -> Any:
        return self.frozen.model

    def prompts(self, faces: Tensor, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        said = self.read(self.composed(captions), self.vectors(self.taught(faces)))
        return said, self.frozen.words(clip.tokenize(self.tokenizer, [""]), faces.device)

    def draw(self, chance: Generator) -> dict[str, Tensor]:
        return {**self.progress(chance), **super().draw(chance)}

    def progress(self, chance: Generator) -> dict[str, Tensor]:
        """The losses of one batch, the same at all times, and the part by which their sum fell since asked last: where
        that stays near 0, a run with more `copies` may begin."""
        device = next(self.parameters()).device
        losses = self(send_to_device(self.batch(chance, TRIED), device))
        now = torch.stack([*losses.values()]).sum()
        gain = {} if self._before is None else {"gain": 1 - now / self._before}
        self._before = now
        return {**{f"kept_{name}": value for name, value in losses.items()}, **gain}

    def save(self, folder: Path, notes: Mapping[str, Any]) -> None:
        text, mix = self.inverter.text, self.inverter.hidden_state_layer_weights
        spec = PrompterSpec(words.base_of(text), {"l": text.size["width"]}, text.layers[0].self_attn.heads, notes)
        tensors = words.tensors_of(text, adaface.TEXT) | ({} if mix is None else {MIX: mix.detach().contiguous()})
        save_file(tensors, folder / f"{self.settings.file}.safetensors", adaface.metadata(spec))


def inverter(text: Any, settings: Settings, seed: int) -> adaface.PromptInverter:
    """The inverter as it begins: the base's text encoder, or the file of another run, widened."""
    tensors, mix = None, torch.tensor(settings.mix)[:, None]
    if settings.begin:
        found = load_file(settings.begin)
        mix = found.get(MIX, mix[:0])
        tensors = keymaps.under(found, adaface.TEXT)
        tensors.pop("embeddings.token_embedding.known", None)
    if settings.copies:
        own = keymaps.under(text.transformer.state_dict(), words.ENCODER) if tensors is None else tensors
        tensors = expanded(own, settings.copies, settings.spread, seed, settings.widens)
    made = adaface.PromptInverter(words.text_model(text, tensors), {})
    if len(mix):
        delattr(made, MIX)
        made.register_parameter(MIX, nn.Parameter(mix.float()))
    return made
