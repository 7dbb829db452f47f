"""Omni-ID's first stage: the encoder E and the Masked Transformer Decoder D (arXiv 2412.09694, Sec. 3.3, App. A.2).

    L_1 = 1/|X_r| sum over X_r of |(D(l, x~) - x) . M_r|_1,   l = E(X_s),   x~ = x . M                     (Eq. 4, 5)

M leaves the decoder few patches of what it has to paint, M_r is the face. As E but for the queries, which come of x~:
D has cross-attention to l, then self-attention, in E's own blocks. L_1 is in parts of white, per pixel of a face.
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

from ...likeness import omni_id
from ...likeness.omni_id import Block, OmniID
from ...likeness.spec import OmniIDSpec
from ..base.source import Source, sheet
from ..data import Album, ShardAlbum, WorldAlbum
from ..task import Batch, Task, start
from . import encoder, views

SHOWN = 8  # people


@dataclass(frozen=True, kw_only=True)
class Settings(encoder.Sizes):
    """Of each person `least` to `most` pictures are read and `targets` reconstructed, of `each` in the shards.

    The decoder sees all but the part `mask` of the target's patches, of `cell` pixels; `crosses` and `selves` count its
    blocks. With `begin` the encoder is that of a file, sizes and all. With `pool` the faces of the first so many
    pictures are cut once. What is drawn is of people of the shards in `strangers`, or of Portrait World's validation
    split, in pictures of `side` pixels. `checkpointing` saves memory.
    """

    least: int = 1
    most: int = 3
    targets: int = 8
    each: int = 8
    mask: float = 0.95
    cell: int = 14
    crosses: int = 6
    selves: int = 2
    begin: str = ""
    people: int = 1 << 30
    pool: int = 0
    side: int = 128
    strangers: str = ""
    checkpointing: bool = False

    def __post_init__(self) -> None:
        views.check(self.least, self.most, self.targets, self.each)
        if not 0 < self.mask < 1 or self.image_size % self.cell:
            raise ValueError(
                f"got mask = {self.mask}, cell = {self.cell} in [task]; expected a part from 0 to 1, and cells that "
                f"fill {self.image_size} pixels"
            )


class MaskedDecoder(nn.Module):
    """D: targets [B, n, 3, S, S] as CLIP reads them, of which cells [B, n, L] are hidden, and l [B, T, C] -> targets.

    All targets of a person are one row of queries to l, as these do not see each other there.
    """

    def __init__(self, spec: OmniIDSpec, settings: Settings) -> None:
        super().__init__()
        self.cell, self.side = settings.cell, spec.image_size // settings.cell
        self.checkpointing = settings.checkpointing
        pixels = 3 * self.cell**2
        self.embed = nn.Linear(pixels, spec.width)
        self.mask_embedding = nn.Parameter(torch.empty(1, 1, spec.width))
        self.position_embedding = nn.Parameter(torch.empty(self.side**2, spec.width))
        self.cross = nn.ModuleList(Block(spec, spec.width, nn, encoder.attention) for _ in range(settings.crosses))
        self.self = nn.ModuleList(Block(spec, None, nn, encoder.attention) for _ in range(settings.selves))
        self.norm, self.out = nn.LayerNorm(spec.width), nn.Linear(spec.width, pixels)

    def forward(self, targets: Tensor, hidden: Tensor, tokens: Tensor) -> Tensor:
        people, each = targets.shape[:2]
        cells = pixel_unshuffle(targets.flatten(0, 1), self.cell).flatten(2).mT
        x = torch.where(hidden.flatten(0, 1)[..., None], self.mask_embedding, self.embed(cells).to(self.mask_embedding))
        x = (x + self.position_embedding).unflatten(0, (people, each)).flatten(1, 2)
        for block in self.cross:
            x = self._through(block, x, tokens)
        x = x.unflatten(1, (each, -1)).flatten(0, 1)
        for block in self.self:
            x = self._through(block, x)
        made = self.out(self.norm(x)).mT.unflatten(2, (self.side, self.side))
        return pixel_shuffle(made, self.cell).unflatten(0, (people, each))

    def _through(self, block: nn.Module, *given: Tensor) -> Tensor:
        saving = self.checkpointing and self.training
        run: Any = partial(checkpoint, block, use_reentrant=False) if saving else block
        return run(*given)


class Masked(Task):
    """Loss: L_1."""

    def __init__(self, settings: Settings, source: Source, seed: int) -> None:
        super().__init__()
        self.settings, self.source = settings, views.shards(source, settings.each)
        self.clusters = views.people(self.source, settings.pool, settings.people, settings.each)
        if settings.begin:
            self.encoder = encoder.trainable(encoder.load(Path(settings.begin)))
        else:
            self.encoder = encoder.fresh(settings, seed)
        trunk: Any = self.encoder.trunk
        trunk.set_grad_checkpointing(settings.checkpointing)
        self.size = self.encoder.spec.image_size
        self.decoder = MaskedDecoder(self.encoder.spec, settings)
        start(self.decoder, seed + 1)
        self.cuts = views.pool(self.source, self.clusters, self.size) if settings.pool else {}

    def batch(self, chance: Generator, size: int) -> Batch:
        told = self.settings
        few, many = views.few_to_many(chance, self.clusters, size, (told.least, told.most), told.targets)
        read, asked = ([[self._cut(number) for number in row] for row in rows] for rows in (few, many))
        seen, targets = (torch.stack([torch.stack(row) for row in rows]) for rows in (read, asked))
        return {"seen": seen[..., :3], "targets": targets, "hidden": self._hidden(chance, size, told.targets)}

    def _cut(self, number: int) -> Tensor:
        return self.cuts[number] if self.cuts else views.face(self.source.view(number), self.size)

    def _hidden(self, chance: Generator, people: int, each: int) -> Tensor:
        """Which cells of each target the decoder does not see [people, each, L]: as many of all, but not all."""
        cells = self.decoder.side**2
        shown = max(1, round(cells * (1 - self.settings.mask)))
        return torch.rand(people, each, cells, generator=chance).argsort(-1) >= shown

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        made = reconstruct(self.encoder, self.decoder, batch["seen"], batch["targets"], batch["hidden"])
        return {"masked": wrong(made, batch["targets"])}

    def draw(self, chance: Generator) -> dict[str, Tensor]:
        """Of strangers a photo that is read, what the decoder sees of another, what it makes of that with 1 and with 3
        photos read, and the other; and L_1 of all that are not read, by the number of those that are."""
        device = self.encoder.queries.device
        album, most = self._strangers(), min(3, self.settings.each - 1)
        cut = [[views.face(album.view(one, n), self.size) for n in range(self.settings.each)] for one in range(SHOWN)]
        faces = torch.stack([torch.stack(row) for row in cut]).to(device)
        targets = faces[:, most:]
        hidden = self._hidden(chance, *targets.shape[:2]).to(device)
        made = {n: reconstruct(self.encoder, self.decoder, faces[:, :n], targets, hidden) for n in (1, most)}
        gone = hidden[:, 0].view(-1, 1, self.decoder.side, self.decoder.side).repeat_interleave(self.decoder.cell, 2)
        left = pictures(targets[:, 0]).masked_fill(gone.repeat_interleave(self.decoder.cell, 3), 0.5)
        rows = (pictures(faces[:, 0]), left, *(one[:, 0] for one in made.values()), pictures(targets[:, 0]))
        return {"reconstructions": sheet(*rows), **{f"l1_of_{n}": wrong(one, targets) for n, one in made.items()}}

    def _strangers(self) -> Album:
        folder, side = self.settings.strangers, self.settings.side
        if folder:
            return ShardAlbum(Path(folder).glob("*.tar"), side=None)
        return WorldAlbum("validation", side, each=self.settings.each, apart=views.APART)

    def save(self, folder: Path, notes: Mapping[str, Any]) -> None:
        encoder.save(self.encoder, folder, notes)


def reconstruct(module: OmniID, decoder: MaskedDecoder, seen: Tensor, targets: Tensor, hidden: Tensor) -> Tensor:
    """Pictures [B, n, 3, S, S], in parts of white, of faces [B, m, S, S, 3 or 4] and [B, n, S, S, 4], uint8."""
    tokens = encoder.tokens(module, encoder.states(module, seen.flatten(0, 1)), len(seen))
    shown = omni_id.normed(targets[..., :3].flatten(0, 1).to(tokens) / 255).unflatten(0, targets.shape[:2])
    made = decoder(shown, hidden, tokens).float()
    mean, std = (made.new_tensor(values)[:, None, None] for values in (omni_id.MEAN, omni_id.STD))
    return made * std + mean


def pictures(faces: Tensor) -> Tensor:
    """Faces [n, S, S, 4] as pictures [n, 3, S, S] from 0 to 1."""
    return faces[..., :3].movedim(-1, 1).float() / 255


def wrong(made: Tensor, targets: Tensor) -> Tensor:
    """L_1 of pictures [B, n, 3, S, S] to faces [B, n, S, S, 4]: the mean over all that is face."""
    asked, inside = (targets.float() / 255).movedim(-1, 2).tensor_split([3], dim=2)
    return ((made - asked).abs() * inside).sum() / (3 * inside.sum()).clamp(min=1)
