"""The CLIP pair (Radford et al. 2103.00020): ComfyUI's text encoder of SD1.5 and its vision tower, in any size.

The text encoder uses ComfyUI's tokenizer, with token embeddings for the words of the captions and a shared one for all
other words. Captions say too little about faces for the vision tower to learn them, so images are contrasted with each
other too, as in SLIP (Mu et al. 2112.12750), but with two heads of a person in place of two crops of an image.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
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

from ...likeness.checkpoints import native_metadata
from ...likeness.encoders import token_embedding
from ...likeness.faces import alignment
from ...nodes.loaders.native_models import build_text_encoder, load_text_encoder
from ..data import shard_source
from ..data.image_source import ImageSource, sample_captions
from ..task import Batch, Task, init_weights

TEXT_FILE, VISION_FILE = "text.safetensors", "vision.safetensors"
INITIAL_LOGIT_SCALE, MAX_LOGIT_SCALE = 2.6593, 4.6052  # log(1 / 0.07) and log(100), as published
NUM_CHECK_CAPTIONS = 64  # for the retrieval accuracy among the samples
COMMON_TOKENS = ", ."  # known tokens of any closed vocabulary
MAX_HEAD_CROPS_PER_PERSON = 8
HEAD_CROP_SHARE = 0.5  # of the images with a detailed caption

TokenRows = list[list[int]]


@dataclass(frozen=True)
class CLIPConfig:
    """The sizes of both towers; `resolution` and `patch` are in pixels. `token_dropout` is the probability that a token
    is replaced by the unknown one.

    `text` is the file of a text encoder that stays frozen, except for its projection (LiT, Zhai et al. 2111.07991);
    without it a new one learns. The share `detailed_share` of the captions describes the people, too, and belongs to a
    head crop in place of the whole image as often as not.

    `head_contrast_weight` is the weight of the contrastive loss between head crops: one pair for every two captions,
    from the first `cached_samples` images (0: all).
    """

    width: int = 128
    layers: int = 4
    num_heads: int = 4
    vision_width: int = 128
    vision_layers: int = 6
    vision_num_heads: int = 4
    resolution: int = 128
    patch: int = 16
    token_dropout: float = 0.02
    text: str = ""
    detailed_share: float = 0.0
    head_contrast_weight: float = 0.0
    cached_samples: int = 0


class CLIPPair(Task):
    """Losses: CLIP's contrastive loss over the batch of all processes, optionally also between head crops."""

    def __init__(self, settings: CLIPConfig, source: ImageSource, seed: int) -> None:
        super().__init__()
        self.settings, self.source = settings, source
        self.tokenizer = SDTokenizer()
        self.text = self._make_text_encoder(seed)
        self.vision: Any = CLIPVisionModelProjection(
            build_vision_config(settings), torch.float32, torch.get_default_device(), comfy.ops.disable_weight_init
        )
        init_weights(self.vision, seed + 1)
        with torch.no_grad():
            self.vision.vision_model.embeddings.class_embedding.zero_()
            self.text.logit_scale.fill_(INITIAL_LOGIT_SCALE)
        self.head_crops: HeadCrops | None = None
        if settings.head_contrast_weight or settings.detailed_share:
            self.head_crops = HeadCrops(
                shard_source.require_shards(source), settings.cached_samples, settings.resolution
            )
        if settings.head_contrast_weight:
            self.alike = nn.Linear(settings.vision_width, settings.width, bias=False)
            init_weights(self.alike, seed + 2)
        clone_norm_inputs(self)
        self.contrast: nn.Module | None = None

    def _make_text_encoder(self, seed: int) -> Any:
        if not self.settings.text:
            text_encoder = build_text_encoder(
                self._text_config, list_known_tokens(self.tokenizer, self.source.caption_words)
            )
            init_weights(text_encoder, seed)
            return text_encoder
        text_encoder = load_text_encoder(Path(self.settings.text))
        for value in (text_encoder.transformer.text_projection.weight, text_encoder.logit_scale):
            value.requires_grad_(True)
        return text_encoder

    @property
    def _text_config(self) -> dict[str, Any]:
        return build_text_config(self.settings.width, self.settings.layers, self.settings.num_heads)

    def make_batch(self, generator: Generator, batch_size: int) -> Batch:
        """Pairs with different captions. Raises ValueError if the source has too few."""
        pairs = self._make_pairs(generator, batch_size)
        if len(pairs["tokens"]) < batch_size:
            raise ValueError(
                f"got {len(pairs['tokens'])} different captions; expected {batch_size}; lower batch_size in [run]"
            )
        if self.head_crops is None or not self.settings.head_contrast_weight:
            return pairs
        return {**pairs, "head_crops": self.head_crops.sample_pairs(generator, batch_size // 2)}

    def _make_pairs(self, generator: Generator, batch_size: int) -> Batch:
        rows = sample_captions(self.source, generator, batch_size)
        texts, images = [], []
        for caption, number in rows.items():
            describe, crop, choice = torch.rand(3, generator=generator).tolist()
            detailed = self.source.load_detailed_captions(number) if describe < self.settings.detailed_share else ()
            texts.append(detailed[int(choice * len(detailed))] if detailed else caption)
            if detailed and crop < HEAD_CROP_SHARE and self.head_crops is not None:
                images.append(self.head_crops.crop(number))
            else:
                images.append(self.source.load_image(number, self.settings.resolution))
        tokens = tokenize_texts(self.tokenizer, texts)
        dropped = torch.rand(len(tokens), len(tokens[0]), generator=generator) < self.settings.token_dropout
        stacked = clip_preprocess(torch.stack(images).float() / 255, self.settings.resolution)
        return {"images": stacked, "tokens": drop_tokens(tokens, dropped)}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        scale = self.text.logit_scale.clamp(max=MAX_LOGIT_SCALE).exp()
        texts, images = self._encode_pairs(batch)
        heads = self._encode_heads(batch["head_crops"].to(images.device)) if "head_crops" in batch else None
        with torch.autocast(images.device.type, enabled=False):
            contrastive_loss = self._get_contrastive_loss()
            losses = {"contrastive": contrastive_loss(images, texts, scale)}
            if heads is not None:
                losses["head_contrast"] = self.settings.head_contrast_weight * contrastive_loss(*heads, scale)
            return losses

    def make_samples(self, generator: Generator) -> dict[str, Tensor]:
        """Top-1 retrieval accuracy: of an image's caption, and of a caption's image."""
        texts, images = self._encode_pairs(self._make_pairs(generator, NUM_CHECK_CAPTIONS))
        cosines = images @ texts.T
        correct = torch.arange(len(cosines), device=cosines.device)
        return {
            "caption_found": (cosines.argmax(1) == correct).float().mean(),
            "image_found": (cosines.argmax(0) == correct).float().mean(),
        }

    def save_model(self, folder: Path, notes: Mapping[str, Any]) -> None:
        settings = {**asdict(self.settings), "config": self._text_config}
        save_text_encoder(self.text, folder, notes, settings)
        vision = {key: value.half() for key, value in self.vision.state_dict().items()}
        settings = {**asdict(self.settings), "config": build_vision_config(self.settings)}
        metadata = native_metadata.make_native_metadata("clip_vision", "SD1.5", notes, settings=settings)
        save_file(make_contiguous(vision), folder / VISION_FILE, metadata)

    def _encode_pairs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Unit embeddings of the texts and of the images, [n, width] each."""
        device = self.vision.visual_projection.weight.device
        texts = self.text(batch["tokens"])[1]
        images = self.vision(batch["images"].to(device))[2]
        return normalize(texts.float(), dim=-1), normalize(images.float(), dim=-1)

    def _encode_heads(self, crops: Tensor) -> tuple[Tensor, Tensor]:
        """Unit embeddings of two head crops per person [2, n, 3, resolution, resolution]: [n, width] each."""
        pooled = self.vision.vision_model(crops.flatten(0, 1))[2]
        first, second = normalize(self.alike(pooled).float(), dim=-1).chunk(2)
        return first, second

    def _get_contrastive_loss(self) -> nn.Module:
        if self.contrast is None:
            from open_clip.loss import ClipLoss
            from torch import distributed

            is_distributed = distributed.is_initialized()
            rank, size = (distributed.get_rank(), distributed.get_world_size()) if is_distributed else (0, 1)
            self.contrast = ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=size)
        return self.contrast


class HeadCrops:
    """Head crops as the vision tower reads them, each made once."""

    def __init__(self, source: shard_source.ShardSource, max_images: int, resolution: int) -> None:
        self.source, self.resolution = source, resolution
        self.clusters = source.list_clusters(max_images or len(source), len(source), MAX_HEAD_CROPS_PER_PERSON)
        self.crop = functools.cache(self._crop_head)

    def sample_pairs(self, generator: Generator, count: int) -> Tensor:
        """Two head crops of each of `count` people, [2, count, 3, resolution, resolution]."""
        people = torch.randperm(len(self.clusters), generator=generator)[:count].tolist()
        clusters = [self.clusters[person] for person in people]
        pairs = [torch.randperm(len(cluster), generator=generator)[:2].tolist() for cluster in clusters]
        crops = torch.stack(
            [
                torch.stack([self.crop(cluster[pair[turn]]) for cluster, pair in zip(clusters, pairs, strict=True)])
                for turn in range(2)
            ]
        )
        return clip_preprocess(crops.flatten(0, 1).float() / 255, self.resolution).unflatten(0, (2, -1))

    def _crop_head(self, number: int) -> Tensor:
        crop = shard_source.crop_head(self.source.load_original_image(number))[None].movedim(-1, 1).float()
        resized = common_upscale(crop, self.resolution, self.resolution, "bicubic", "disabled")[0].movedim(0, -1)
        return alignment.convert_to_uint8(resized / 255)


def build_text_config(width: int, layers: int, num_heads: int) -> dict[str, Any]:
    """ComfyUI's config of the CLIP-L text encoder."""
    return {
        "hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers,
        "num_attention_heads": num_heads,
    }  # fmt: skip


def build_vision_config(settings: CLIPConfig) -> dict[str, Any]:
    """ComfyUI's config of the vision tower, which projects to the text encoder's width."""
    width = settings.vision_width
    return {
        "hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": settings.vision_layers,
        "num_attention_heads": settings.vision_num_heads, "image_size": settings.resolution,
        "patch_size": settings.patch, "num_channels": 3, "projection_dim": settings.width, "hidden_act": "quick_gelu",
        "model_type": "clip_vision_model",
    }  # fmt: skip


def save_text_encoder(text_encoder: Any, folder: Path, notes: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Write a text encoder; its `config` is among the settings."""
    tensors = {key: value.half() for key, value in text_encoder.transformer.state_dict().items()}
    known_tokens = text_encoder.transformer.get_input_embeddings().known_tokens
    tensors[token_embedding.KNOWN_TOKENS_NAME] = torch.tensor(known_tokens)
    metadata = native_metadata.make_native_metadata("clip_text", "SD1.5", notes, settings=settings)
    save_file(make_contiguous(tensors), folder / TEXT_FILE, metadata)


def list_known_tokens(tokenizer: SDTokenizer, words: Sequence[str] | None) -> Sequence[int]:
    """The tokens of captions made of these words; all tokens for free text (None)."""
    if words is None:
        return range(token_embedding.VOCABULARY_SIZE)
    return sorted({token for row in tokenize_texts(tokenizer, [*words, COMMON_TOKENS]) for token in row})


def tokenize_texts(tokenizer: SDTokenizer, texts: Sequence[str]) -> TokenRows:
    """The first 77 tokens of each text, by ComfyUI's tokenizer."""
    return [[token for token, _ in tokenizer.tokenize_with_weights(text)[0]] for text in texts]


def drop_tokens(tokens: TokenRows, dropped: Tensor) -> TokenRows:
    """Replace the `dropped` tokens [n, 77] by an unknown one, except start and end tokens."""
    unknown = token_embedding.VOCABULARY_SIZE - 3  # the last word of the vocabulary, which no caption contains
    return [
        [unknown if drop and token < unknown else token for token, drop in zip(row, mask, strict=True)]
        for row, mask in zip(tokens, dropped.tolist(), strict=True)
    ]


def clone_norm_inputs(module: nn.Module) -> None:
    """Clone the inputs of the norms in ComfyUI's CLIP layers, which the layers change in place before the backward
    pass needs them."""

    def clone(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0].clone(),)

    for name, submodule in module.named_modules():
        if name.endswith(("layer_norm1", "layer_norm2")):
            submodule.register_forward_pre_hook(clone)


def make_contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.contiguous() for key, value in tensors.items()}
