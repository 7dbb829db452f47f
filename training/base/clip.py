"""The CLIP pair (Radford et al. 2103.00020): the host's text encoder of SD1.5 and its vision tower, both small.

The text encoder keeps the host's tokens; it has embeddings for those of the captions, and one for all other words.
Captions that say little of a person teach a tower little of faces: pictures are contrasted with each other, too, as in
SLIP (Mu et al. 2112.12750), but two heads of one person instead of two cuts of one picture.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import comfy.ops
import torch
from comfy.clip_model import CLIPVisionModelProjection, clip_preprocess
from comfy.sd1_clip import SDTokenizer
from comfy.utils import common_upscale
from safetensors.torch import save_file
from torch import Generator, Tensor, nn
from torch.nn.functional import normalize

from ...likeness import faces, own_file, vocabulary
from ...nodes.loaders import small
from ...nodes.loaders.small import load_text as load_text
from ...nodes.loaders.small import text_encoder
from ..task import Batch, Task, start
from . import portraits
from .source import Source, captions, pictures

TEXT, VISION = "text.safetensors", "vision.safetensors"
FIRST_SCALE, LARGEST_SCALE = 2.6593, 4.6052  # logarithms of 1 / 0.07 and of 100, as published
TRIED = 64  # captions of the check
ALWAYS = ", ."  # tokens that any prompt may have
MOST = 8  # heads of a person

Tokens = list[list[int]]


@dataclass(frozen=True)
class Settings:
    """Both towers' sizes; `side` and `patch` in pixels; `forget` is the part of words that become unknown.

    `heads_alike` is the weight of the contrast of heads, two for every second caption, of the first `pool` pictures.
    The pair may `begin` as that in another run's folder, whose text encoder then stays as it is (LiT, Zhai et al.
    2111.07991).
    """

    width: int = 128
    layers: int = 4
    heads: int = 4
    vision_width: int = 128
    vision_layers: int = 6
    vision_heads: int = 4
    side: int = 128
    patch: int = 16
    forget: float = 0.02
    heads_alike: float = 0.0
    pool: int = 0
    begin: str = ""


class ClipPair(Task):
    """Loss: the cross entropy of which caption belongs to which picture, both ways, over the batch of all processes."""

    def __init__(self, settings: Settings, source: Source, seed: int) -> None:
        super().__init__()
        self.settings, self.source = settings, source
        self.tokenizer = SDTokenizer()
        self.text = text_encoder(text_config(settings), tokens_of(self.tokenizer, source.words))
        self.vision: Any = CLIPVisionModelProjection(
            vision_config(settings), torch.float32, torch.get_default_device(), comfy.ops.disable_weight_init
        )
        start(self.text, seed)
        start(self.vision, seed + 1)
        with torch.no_grad():
            self.vision.vision_model.embeddings.class_embedding.zero_()
            self.text.logit_scale.fill_(FIRST_SCALE)
        if settings.begin:
            self._begin(Path(settings.begin))
        self.heads: Heads | None = None
        if settings.heads_alike:
            self.heads = Heads(portraits.shards(source), settings.pool, settings.side)
            self.alike = nn.Linear(settings.vision_width, settings.width, bias=False)
            start(self.alike, seed + 2)
        keep_for_gradient(self)
        self.contrast: nn.Module | None = None

    def _begin(self, folder: Path) -> None:
        self.text.transformer = load_text(folder / TEXT).transformer
        self.vision.load_state_dict(small.load_vision(folder / VISION).model.float().state_dict())

    def batch(self, chance: Generator, size: int) -> Batch:
        """Pairs of which no two have the same caption. Raises ValueError where there are not so many captions."""
        pairs = self._pairs(chance, size)
        if len(pairs["tokens"]) < size:
            raise ValueError(
                f"got {len(pairs['tokens'])} different captions; expected {size}; take a smaller batch in [run]"
            )
        return pairs if self.heads is None else {**pairs, "heads": self.heads.pairs(chance, size // 2)}

    def _pairs(self, chance: Generator, size: int) -> Batch:
        found = captions(self.source, chance, size)
        tokens = tokenize(self.tokenizer, list(found))
        forgotten = torch.rand(len(tokens), len(tokens[0]), generator=chance) < self.settings.forget
        return {"pictures": self._read(list(found.values())), "tokens": forget(tokens, forgotten)}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        scale = self.text.logit_scale.clamp(max=LARGEST_SCALE).exp()
        texts, seen = self._features(batch)
        alike = self._heads(batch["heads"].to(seen.device)) if "heads" in batch else None
        with torch.autocast(seen.device.type, enabled=False):
            losses = {"contrastive": self._contrast()(seen, texts, scale)}
            if alike is not None:
                losses["heads"] = self.settings.heads_alike * self._contrast()(*alike, scale)
            return losses

    def draw(self, chance: Generator) -> dict[str, Tensor]:
        """How often the likest caption, and the likest picture, of some is the right one."""
        texts, seen = self._features(self._pairs(chance, TRIED))
        cosines = seen @ texts.T
        right = torch.arange(len(cosines), device=cosines.device)
        return {
            "caption_found": (cosines.argmax(1) == right).float().mean(),
            "picture_found": (cosines.argmax(0) == right).float().mean(),
        }

    def save(self, folder: Path, notes: Mapping[str, Any]) -> None:
        told = {**asdict(self.settings), "config": text_config(self.settings)}
        text = {key: value.half() for key, value in self.text.transformer.state_dict().items()}
        text[vocabulary.KNOWN] = torch.tensor(self.text.transformer.get_input_embeddings().known)
        save_file(contiguous(text), folder / TEXT, own_file.metadata("clip_text", "SD1.5", notes, settings=told))
        told = {**asdict(self.settings), "config": vision_config(self.settings)}
        vision = {key: value.half() for key, value in self.vision.state_dict().items()}
        save_file(contiguous(vision), folder / VISION, own_file.metadata("clip_vision", "SD1.5", notes, settings=told))

    def _read(self, numbers: Sequence[int]) -> Tensor:
        side = self.settings.side
        return clip_preprocess(pictures(self.source, numbers, side).movedim(1, -1), side)

    def _features(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Directions of the texts and of the pictures, [n, width] each."""
        device = self.vision.visual_projection.weight.device
        texts = self.text(batch["tokens"])[1]
        seen = self.vision(batch["pictures"].to(device))[2]
        return normalize(texts.float(), dim=-1), normalize(seen.float(), dim=-1)

    def _heads(self, heads: Tensor) -> tuple[Tensor, Tensor]:
        """Directions of one and the other head of some people [2, n, 3, side, side]: [n, width] each."""
        pooled = self.vision.vision_model(heads.flatten(0, 1))[2]
        first, second = normalize(self.alike(pooled).float(), dim=-1).chunk(2)
        return first, second

    def _contrast(self) -> nn.Module:
        if self.contrast is None:
            from open_clip.loss import ClipLoss
            from torch import distributed

            several = distributed.is_initialized()
            rank, size = (distributed.get_rank(), distributed.get_world_size()) if several else (0, 1)
            self.contrast = ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=size)
        return self.contrast


class Heads:
    """People's heads as the tower reads them, each cut once."""

    def __init__(self, source: portraits.Shards, pool: int, side: int) -> None:
        self.source, self.side = source, side
        self.clusters = source.clusters(pool or len(source), len(source), MOST)
        self.cut = functools.cache(self._cut)

    def pairs(self, chance: Generator, count: int) -> Tensor:
        """Two of each of so many people, [2, count, 3, side, side]."""
        who = torch.randperm(len(self.clusters), generator=chance)[:count].tolist()
        shown = [torch.randperm(len(self.clusters[one]), generator=chance)[:2].tolist() for one in who]
        turns = zip(*([self.clusters[one][i] for i in two] for one, two in zip(who, shown, strict=True)), strict=True)
        cuts = torch.stack([torch.stack([self.cut(number) for number in turn]) for turn in turns])
        return clip_preprocess(cuts.flatten(0, 1).float() / 255, self.side).unflatten(0, (2, -1))

    def _cut(self, number: int) -> Tensor:
        crop = portraits.head(self.source.view(number))[None].movedim(-1, 1).float()
        return faces.pixels(common_upscale(crop, self.side, self.side, "bicubic", "disabled")[0].movedim(0, -1) / 255)


def text_config(settings: Settings) -> dict[str, Any]:
    """What the host's text encoder of CLIP-L is told to be."""
    return {
        "hidden_size": settings.width, "intermediate_size": 4 * settings.width, "num_hidden_layers": settings.layers,
        "num_attention_heads": settings.heads,
    }  # fmt: skip


def vision_config(settings: Settings) -> dict[str, Any]:
    """What the host's ClipVisionModel is made of; it projects to the text encoder's width."""
    width = settings.vision_width
    return {
        "hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": settings.vision_layers,
        "num_attention_heads": settings.vision_heads, "image_size": settings.side, "patch_size": settings.patch,
        "num_channels": 3, "projection_dim": settings.width, "hidden_act": "quick_gelu",
        "model_type": "clip_vision_model",
    }  # fmt: skip


def tokens_of(tokenizer: SDTokenizer, words: Sequence[str] | None) -> Sequence[int]:
    """The tokens that captions of these words consist of; all of them for any words."""
    if words is None:
        return range(vocabulary.TOKENS)
    return sorted({token for row in tokenize(tokenizer, [*words, ALWAYS]) for token in row})


def tokenize(tokenizer: SDTokenizer, texts: Sequence[str]) -> Tokens:
    """The first 77 tokens of each text, as the host makes them."""
    return [[token for token, _ in tokenizer.tokenize_with_weights(text)[0]] for text in texts]


def forget(tokens: Tokens, which: Tensor) -> Tokens:
    """Tokens of which these, [n, 77], are unknown; starts and ends stay."""
    never = vocabulary.TOKENS - 3  # the last word of the tokenizer's list, in no caption
    return [
        [never if gone and token < never else token for token, gone in zip(row, mask, strict=True)]
        for row, mask in zip(tokens, which.tolist(), strict=True)
    ]


def keep_for_gradient(module: nn.Module) -> None:
    """Give the norms of the host's CLIP layers copies to read: the layers add to what these have kept, in place."""
    copy: Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]] = lambda _, given: (given[0].clone(),)  # noqa: E731
    for name, part in module.named_modules():
        if name.endswith(("layer_norm1", "layer_norm2")):
            part.register_forward_pre_hook(copy)


def contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.contiguous() for key, value in tensors.items()}
