"""What all adapters are trained on: a frozen base stack, and pictures of people by clusters.

The face is read from another picture of the same person than the one that is to be made, so that what an adapter
learns is who somebody is, and not to copy a picture.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from comfy.model_patcher import ModelPatcher
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor, nn

from ...nodes.attention.injection import Injection
from ...nodes.attention.patch import attach, directly
from ...nodes.loaders import small
from ..base import clip, latents, portraits, sdxl, unet, vae
from ..base.source import Source, pictures, sheet, some
from ..data import Album, ShardAlbum, View, WorldAlbum
from ..task import Batch, Task
from .readers import Reader

SHOWN = 6

Told = TypeVar("Told", bound="Settings")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """`vae`, `text` and `unet` are files trained before, or all one checkpoint of SDXL; `side` in pixels; `file` is the
    name of what is made.

    Of `people`, `each` has so many pictures among the first `pool` of the shards, whose latents and faces are read
    once; without a pool all are read at every step. With `other`, the face is another picture's. The caption is
    dropped in the part `no_text`. `snr` and `heads_count` are as the UNet's. What is drawn is of people of the shards
    in `strangers`, or of Portrait World's validation split. It may `begin` with the file of another run.
    """

    vae: str
    text: str
    unet: str
    file: str
    side: int = 128
    pool: int = 0
    people: int = 1 << 30
    each: int = 6
    other: bool = True
    no_text: float = 0.1
    snr: float = 5.0
    heads_count: float = 1.0
    strangers: str = ""
    begin: str = ""


class Held:
    """A module under the host's care, on whatever device it is wanted."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._patchers: dict[torch.device, ModelPatcher] = {}

    def on(self, device: torch.device) -> ModelPatcher:
        if device not in self._patchers:
            self._patchers[device] = ModelPatcher(self.module, device, device)
        self.module.to(device)
        return self._patchers[device]


class Stack(unet.Frozen):
    """The trained base stack, and what is read of a pool: latents, and faces by their pictures' numbers."""

    def __init__(self, settings: Settings) -> None:
        parts: tuple[Any, Any, Any]
        if settings.vae == settings.text == settings.unet:
            parts = sdxl.load(Path(settings.unet))
        else:
            parts = clip.load_text(Path(settings.text)), vae.load(Path(settings.vae)), unet.load(Path(settings.unet))
        text, autoencoder, model = (part.eval().requires_grad_(False) for part in parts)
        super().__init__(text, autoencoder)
        self.model = model
        self.unet = Held(self.model)
        self.faces: dict[int, Tensor] = {}

    def told(self, tokens: clip.Tokens, side: int, device: torch.device) -> dict[str, Tensor]:
        """What the model reads beside the text: SDXL's, the projected text and the picture's size."""
        if not self.model.adm_channels:
            return {}
        projected = self.text.to(device)(tokens)[1]
        return {"y": self.model.encode_adm(pooled_output=projected, width=side, height=side).to(device)}


class PeopleTask(Task, Generic[Told]):
    """Batches of pairs: a picture to make, and a face of the same person.

    Subclasses hold the trained weights; nothing of the base stack is part of the module.
    """

    def __init__(self, settings: Told, source: Source) -> None:
        super().__init__()
        self.settings, self.source = settings, portraits.shards(source)
        self.tokenizer = clip.SDTokenizer()
        self.frozen = Stack(settings)
        self.counts = unet.counting(self.source, settings.side, settings.heads_count)
        found = settings.pool or len(self.source)
        self.clusters = self.source.clusters(found, settings.people, settings.each)
        if not self.clusters:
            raise ValueError(f"got nobody with two of the first {settings.pool} pictures; expected some; raise pool")
        if settings.pool:
            autoencoder = self.frozen.autoencoder
            self.frozen.pool = latents.pool(self.source, Path(settings.vae), autoencoder, settings.side, settings.pool)

    @property
    @abstractmethod
    def reader(self) -> Reader:
        """What reads the faces."""

    @property
    def parts(self) -> tuple[float, float, float]:
        """The parts that are trained without the text, without the face, and without both."""
        return self.settings.no_text, 0.0, 0.0

    def read_pool(self, file: Path) -> None:
        """Read the faces of a pool, once and for all, into a folder beside the reader's file."""
        if not self.settings.pool:
            return
        order = [number for numbers in self.clusters for number in numbers]
        first = self.source.view(order[0]).picture.numpy().tobytes()
        digest = hashlib.sha256(f"{self.reader.hash} {order}".encode() + first).hexdigest()[:8]

        def make(places: range) -> Tensor:
            return self.look([self.source.view(order[place % len(order)]) for place in places])

        read = latents.kept(file.parent / f"faces-{digest}", len(order), make)
        self.frozen.faces = dict(zip(order, read, strict=True))

    def look(self, views: Sequence[View]) -> Tensor:
        """The faces of some pictures as they are read."""
        device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
        return self.reader.read(torch.stack([self.reader.cut(view) for view in views]), device)

    def batch(self, chance: Generator, size: int) -> Batch:
        latent = self.settings.side // 8
        faces = self.count(chance)
        turns = zip(some(chance, size, len(self.clusters)), some(chance, size), some(chance, size), strict=True)
        rows = [self._row(self.clusters[who], first, second, faces) for who, first, second in turns]
        made, seen = [row[0] for row in rows], [number for row in rows for number in row[1:]]
        no_text, no_face, neither = torch.tensor(self.parts).cumsum(0).tolist()
        die = torch.rand(size, generator=chance)
        faceless = (die >= no_text) & (die < neither)
        silent = ((die < no_text) | ((die >= no_face) & (die < neither))).tolist()
        texts = ["" if gone else self.source.caption(number) for number, gone in zip(made, silent, strict=True)]
        return {
            **self._shown(made, seen), "made": made, "faceless": faceless,
            "tokens": clip.tokenize(self.tokenizer, texts),
            "noise": torch.randn(size, 4, latent, latent, generator=chance),
            "times": torch.randint(self.frozen.model.model_sampling.num_timesteps, (size,), generator=chance),
        }  # fmt: skip

    def _shown(self, made: Sequence[int], seen: Sequence[int]) -> Batch:
        """Pictures to make and faces to read, as they are or as a pool has them; how much each place counts."""
        counts = self.counts(made)
        if self.frozen.pool is None:
            cuts = torch.stack([self.reader.cut(self.source.view(number)) for number in seen])
            return {"pictures": pictures(self.source, made, self.settings.side), "cuts": cuts, **counts}
        read = torch.stack([self.frozen.faces[number] for number in seen])
        return {"latents": self.frozen.pool[list(made)].float(), "read": read.float(), **counts}

    def count(self, chance: Generator) -> int:
        """How many faces each row of a batch is shown."""
        return 1

    def _row(self, numbers: Sequence[int], first: int, second: int, faces: int) -> list[int]:
        """A picture to make, and those to read faces from: none twice before all have had their turn."""
        here = first % len(numbers)
        others = [*numbers[here + 1 :], *numbers[:here]] if self.settings.other else [numbers[here]]
        row, left = [numbers[here]], list[int]()
        for _ in range(faces):
            left = left or [*others]
            second, place = divmod(second, len(left))
            row.append(left.pop(place))
        return row

    def draw(self, chance: Generator) -> dict[str, Tensor]:
        """Photos of people who are no part of the training, above pictures of them by the host's own sampler."""
        album, side = self._strangers(), self.settings.side
        who = [some(chance, 1, len(album))[0] for _ in range(SHOWN)]
        views = [[album.view(one, number % album.pictures(one)) for number in some(chance, 2)] for one in who]
        photos, others = zip(*views, strict=True)
        noise = torch.randn(SHOWN, 4, side // 8, side // 8, generator=chance)
        device = next(self.parameters()).device
        made = self.painted(self.look(photos).to(device), [other.caption for other in others], noise)
        above = torch.stack([photo.picture for photo in photos]).to(device).movedim(-1, 1).float() / 255
        return {"pictures": sheet(above, latents.decode(self.frozen.autoencoder, made.to(device)))}

    @abstractmethod
    def painted(self, read: Tensor, captions: Sequence[str], noise: Tensor) -> Tensor:
        """Latents that the host's sampler makes of noise, of faces as they were read, each with a caption."""

    def _strangers(self) -> Album:
        folder, side = self.settings.strangers, self.settings.side
        return ShardAlbum(Path(folder).glob("*.tar"), side) if folder else WorldAlbum("validation", side)


class AdapterTask(PeopleTask[Told]):
    """Loss: the mean squared difference of the noise and what the host's model says it is, with the adapter in it."""

    @abstractmethod
    def file(self, notes: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What a file holds, by name, with the trained tensors themselves, and its metadata."""

    @torch.no_grad()
    def begin(self) -> None:
        """Take over what another run has trained. Raises ValueError where its file has not all that is trained here."""
        if not self.settings.begin:
            return
        with small.reading(Path(self.settings.begin), "an adapter that another run has made"):
            found = load_file(self.settings.begin)
        trained = {value.data_ptr() for value in self.parameters() if value.requires_grad}
        for key, value in self.file({})[0].items():
            if value.data_ptr() not in trained:
                continue
            if key not in found or found[key].shape != value.shape:
                there = f"of the shape {[*found[key].shape]}" if key in found else "absent"
                raise ValueError(
                    f"got {self.settings.begin}, in which {key} is {there}; expected the shape {[*value.shape]}; begin "
                    "with a file of the same method and sizes"
                )
            value.copy_(found[key])

    def save(self, folder: Path, notes: Mapping[str, Any]) -> None:
        tensors, told = self.file(notes)
        halves = {key: value.half().contiguous() for key, value in tensors.items()}
        save_file(halves, folder / f"{self.settings.file}.safetensors", told)

    @abstractmethod
    def injection(self, model: ModelPatcher, read: Tensor) -> Injection:
        """The adapter bound to faces as they were read [n, ...], face i in row i."""

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        device = batch["noise"].device
        with torch.no_grad():
            if "latents" not in batch:
                made = latents.encode(self.frozen.autoencoder, batch["pictures"])
                batch = {**batch, "latents": made, "read": self.reader.read(batch["cuts"], device)}
            text = self.frozen.words(batch["tokens"], device)
            held = self.painter(device)
            given = unet.Noised.of(held.model, batch)
        patched = attach(held, self.bound(held, batch))
        told = {"c_crossattn": text, **self.told(batch), **directly(patched, float(given.sigma.max()))}
        return {"noise": unet.wrong_noise(held.model, given, self.settings.snr, batch.get("counts"), **told)}

    def painter(self, device: torch.device) -> ModelPatcher:
        """The model that paints, as it is without a face."""
        return self.frozen.unet.on(device)

    def told(self, batch: Batch) -> dict[str, Tensor]:
        """What the model is given besides, text apart."""
        return self.frozen.told(batch["tokens"], self.settings.side, batch["noise"].device)

    def bound(self, model: ModelPatcher, batch: Batch) -> Injection:
        """The adapter bound to the faces of a batch."""
        return self.injection(model, self.faces(batch))

    def faces(self, batch: Batch) -> Tensor:
        """The faces of a batch as they were read; what stands for none where it is to be `faceless`."""
        return batch["read"]

    def applied(self, model: ModelPatcher, read: Tensor) -> ModelPatcher:
        """The model as it paints the faces, face i in row i."""
        return attach(model, self.injection(model, read))

    def painted(self, read: Tensor, captions: Sequence[str], noise: Tensor) -> Tensor:
        model = self.painter(read.device)
        prompts = [self._prompt(texts, read.device) for texts in (captions, [""])]
        seen = self.faces({"read": read, "faceless": torch.zeros(len(noise)).bool()})
        return unet.sample(self.applied(model, seen), noise, *prompts)

    def _prompt(self, texts: Sequence[str], device: torch.device) -> list[Any]:
        """Texts as the host's samplers take them."""
        words, projected = self.frozen.text.to(device)(clip.tokenize(self.tokenizer, texts))[:2]
        return [[words, {"pooled_output": projected}]]
