"""Omni-ID's first stage: the encoder E and the Masked Transformer Decoder D (arXiv 2412.09694, Sec. 3.3, App. A.2).

    L_1 = 1/|X_r| sum over X_r of |(D(l, x~) - x) . M_r|_1,   l = E(X_s),   x~ = x . M                     (Eq. 4, 5)

M leaves the decoder few patches of the target, M_r is the face mask. D is built like E, from the same blocks: first
cross-attention to l, then self-attention; its queries come from x~. L_1 is the mean over the pixels of the face, on the
scale of 0 (black) to 1 (white).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle
from torch.utils.checkpoint import checkpoint

from ...likeness.methods import omni_id
from ...likeness.methods.omni_id import OmniIDBlock, OmniIDModel
from ...likeness.spec import OmniIDSpec
from ..data.clusters import Album
from ..data.image_source import ImageSource, make_image_grid, open_album
from ..task import Batch, Task, init_weights
from . import encoder, views

NUM_SHOWN_PEOPLE = 8


@dataclass(frozen=True, kw_only=True)
class MaskedStageConfig(encoder.OmniIDEncoderConfig):
    """Each person in a batch has `min_images` to `max_images` input images and `num_targets` target images, out of
    `images_per_person` in the shards, of at most `max_people` people.

    `mask_ratio` is the fraction of a target's patches that are hidden from the decoder; these have `decoder_patch_size`
    pixels. `init_from` is an encoder file to start from, which also sets the encoder's sizes. With `cached_samples`,
    only the first so many images are used, and their faces are cropped once. Samples show people of
    `validation_data`: a folder of shards, or the path of a function that returns an album (image_source.open_album),
    here with images of `resolution` pixels. `gradient_checkpointing` saves memory.
    """

    min_images: int = 1
    max_images: int = 3
    num_targets: int = 8
    images_per_person: int = 8
    mask_ratio: float = 0.95
    decoder_patch_size: int = 14
    decoder_cross_blocks: int = 6
    decoder_self_blocks: int = 2
    init_from: str = ""
    max_people: int = 1 << 30
    cached_samples: int = 0
    resolution: int = 128
    validation_data: str = "portrait_world.world_album:open_validation_album"
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        views.check_view_counts(self.min_images, self.max_images, self.num_targets, self.images_per_person)
        if not 0 < self.mask_ratio < 1 or self.image_size % self.decoder_patch_size:
            raise ValueError(
                f"got mask_ratio = {self.mask_ratio}, decoder_patch_size = {self.decoder_patch_size} in [task]; "
                f"expected a mask_ratio between 0 and 1, and a decoder_patch_size that divides {self.image_size}"
            )


class MaskedDecoder(nn.Module):
    """D: targets [B, n, 3, S, S] in CLIP's normalization, hidden patches [B, n, L] and l [B, T, C] to targets.

    In cross-attention the patches of all targets of a person form one row: there they do not attend to each other.
    """

    def __init__(self, spec: OmniIDSpec, settings: MaskedStageConfig) -> None:
        super().__init__()
        self.patch_size = settings.decoder_patch_size
        self.patches_per_side = spec.image_size // self.patch_size
        self.gradient_checkpointing = settings.gradient_checkpointing
        pixels = 3 * self.patch_size**2
        self.embed = nn.Linear(pixels, spec.width)
        self.mask_embedding = nn.Parameter(torch.empty(1, 1, spec.width))
        self.position_embedding = nn.Parameter(torch.empty(self.patches_per_side**2, spec.width))
        self.cross = nn.ModuleList(
            OmniIDBlock(spec, spec.width, nn, encoder.run_pytorch_attention)
            for _ in range(settings.decoder_cross_blocks)
        )
        self.self = nn.ModuleList(
            OmniIDBlock(spec, None, nn, encoder.run_pytorch_attention) for _ in range(settings.decoder_self_blocks)
        )
        self.norm, self.out = nn.LayerNorm(spec.width), nn.Linear(spec.width, pixels)

    def forward(self, targets: Tensor, hidden: Tensor, tokens: Tensor) -> Tensor:
        num_people, num_targets = targets.shape[:2]
        patches = pixel_unshuffle(targets.flatten(0, 1), self.patch_size).flatten(2).mT
        embedded = self.embed(patches).to(self.mask_embedding)
        x = torch.where(hidden.flatten(0, 1)[..., None], self.mask_embedding, embedded)
        x = (x + self.position_embedding).unflatten(0, (num_people, num_targets)).flatten(1, 2)
        for block in self.cross:
            x = self._run_block(block, x, tokens)
        x = x.unflatten(1, (num_targets, -1)).flatten(0, 1)
        for block in self.self:
            x = self._run_block(block, x)
        out = self.out(self.norm(x)).mT.unflatten(2, (self.patches_per_side, self.patches_per_side))
        return pixel_shuffle(out, self.patch_size).unflatten(0, (num_people, num_targets))

    def _run_block(self, block: nn.Module, *inputs: Tensor) -> Tensor:
        saves_memory = self.gradient_checkpointing and self.training
        run: Any = partial(checkpoint, block, use_reentrant=False) if saves_memory else block
        return run(*inputs)


class MaskedStageTask(Task):
    """Trains encoder and decoder. Loss: L_1."""

    def __init__(self, settings: MaskedStageConfig, source: ImageSource, seed: int) -> None:
        super().__init__()
        self.settings, self.source = settings, views.require_view_shards(source, settings.images_per_person)
        self.clusters = views.list_complete_clusters(
            self.source, settings.cached_samples, settings.max_people, settings.images_per_person
        )
        if settings.init_from:
            self.encoder = encoder.make_encoder_trainable(encoder.load_encoder_file(Path(settings.init_from)))
        else:
            self.encoder = encoder.build_trainable_encoder(settings, seed)
        trunk: Any = self.encoder.trunk
        trunk.set_grad_checkpointing(settings.gradient_checkpointing)
        self.face_size = self.encoder.spec.image_size
        self.decoder = MaskedDecoder(self.encoder.spec, settings)
        init_weights(self.decoder, seed + 1)
        self.cached_faces = (
            views.cache_aligned_faces(self.source, self.clusters, self.face_size) if settings.cached_samples else {}
        )

    def make_batch(self, generator: Generator, batch_size: int) -> Batch:
        config = self.settings
        indices = views.sample_few_to_many(
            generator, self.clusters, batch_size, (config.min_images, config.max_images), config.num_targets
        )
        inputs, targets = (
            torch.stack([torch.stack([self._load_face(index) for index in row]) for row in rows]) for rows in indices
        )
        return {
            "input_faces": inputs[..., :3],
            "targets": targets,
            "hidden_patches": self._sample_hidden_patches(generator, batch_size, config.num_targets),
        }

    def _load_face(self, index: int) -> Tensor:
        if self.cached_faces:
            return self.cached_faces[index]
        return views.crop_view_face(self.source.load_original_image(index), self.face_size)

    def _sample_hidden_patches(self, generator: Generator, num_people: int, num_targets: int) -> Tensor:
        """Patches hidden from the decoder, bool [num_people, num_targets, L]: equally many per target, never all."""
        num_patches = self.decoder.patches_per_side**2
        num_visible = max(1, round(num_patches * (1 - self.settings.mask_ratio)))
        return torch.rand(num_people, num_targets, num_patches, generator=generator).argsort(-1) >= num_visible

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        images = reconstruct_faces(
            self.encoder, self.decoder, batch["input_faces"], batch["targets"], batch["hidden_patches"]
        )
        return {"masked": masked_l1_loss(images, batch["targets"])}

    def make_samples(self, generator: Generator) -> dict[str, Tensor]:
        """For validation people: an input photo, the visible patches of a target, its reconstructions from 1 and from
        3 input photos, and the target; and L_1 of all targets by number of input photos.
        """
        device = self.encoder.queries.device
        album, max_inputs = self._open_validation_album(), min(3, self.settings.images_per_person - 1)
        crops = [
            [
                views.crop_view_face(album.load_annotated_image(person, number), self.face_size)
                for number in range(self.settings.images_per_person)
            ]
            for person in range(NUM_SHOWN_PEOPLE)
        ]
        faces = torch.stack([torch.stack(row) for row in crops]).to(device)
        targets = faces[:, max_inputs:]
        hidden = self._sample_hidden_patches(generator, *targets.shape[:2]).to(device)
        images = {
            n: reconstruct_faces(self.encoder, self.decoder, faces[:, :n], targets, hidden) for n in (1, max_inputs)
        }
        patch_size, patches_per_side = self.decoder.patch_size, self.decoder.patches_per_side
        hidden_pixels = hidden[:, 0].view(-1, 1, patches_per_side, patches_per_side)
        hidden_pixels = hidden_pixels.repeat_interleave(patch_size, 2).repeat_interleave(patch_size, 3)
        first_targets = convert_faces_to_images(targets[:, 0])
        rows = (
            convert_faces_to_images(faces[:, 0]),
            first_targets.masked_fill(hidden_pixels, 0.5),
            *(reconstructions[:, 0] for reconstructions in images.values()),
            first_targets,
        )
        return {
            "reconstructions": make_image_grid(*rows),
            **{f"l1_with_{n}_photos": masked_l1_loss(made, targets) for n, made in images.items()},
        }

    def _open_validation_album(self) -> Album:
        return open_album(
            self.settings.validation_data,
            self.settings.resolution,
            keep_size=True,
            images_per_person=self.settings.images_per_person,
            min_pose_distance=views.MIN_POSE_DISTANCE,
        )

    def save_model(self, folder: Path, notes: Mapping[str, Any]) -> None:
        encoder.save_encoder_file(self.encoder, folder, notes)


def reconstruct_faces(
    encoder_module: OmniIDModel, decoder: MaskedDecoder, faces: Tensor, targets: Tensor, hidden: Tensor
) -> Tensor:
    """Images [B, n, 3, S, S] from 0 to 1, from input faces [B, m, S, S, 3 or 4] and targets [B, n, S, S, 4], uint8."""
    states = encoder.extract_face_states(encoder_module, faces.flatten(0, 1))
    tokens = encoder.encode_face_tokens(encoder_module, states, len(faces))
    inputs = omni_id.normalize_images(targets[..., :3].flatten(0, 1).to(tokens) / 255).unflatten(0, targets.shape[:2])
    images = decoder(inputs, hidden, tokens).float()
    mean, std = (images.new_tensor(values)[:, None, None] for values in (omni_id.CLIP_MEAN, omni_id.CLIP_STD))
    return images * std + mean


def convert_faces_to_images(faces: Tensor) -> Tensor:
    """Faces [n, S, S, 4], uint8, to images [n, 3, S, S] from 0 to 1, without the mask."""
    return faces[..., :3].movedim(-1, 1).float() / 255


def masked_l1_loss(images: Tensor, targets: Tensor) -> Tensor:
    """L_1 between images [B, n, 3, S, S] and faces [B, n, S, S, 4]: the mean over the face mask."""
    expected, mask = (targets.float() / 255).movedim(-1, 2).tensor_split([3], dim=2)
    return ((images - expected).abs() * mask).sum() / (3 * mask.sum()).clamp(min=1)
