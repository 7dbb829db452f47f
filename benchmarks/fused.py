"""Fused KV in one run: the bare model, clean and matching faces, first and later pictures, two people by masks.

The dense way is emulated on the same weights: one attention with a mask of queries x keys for every layer.
"""

from __future__ import annotations

import argparse
from typing import Any

from .compare import Case, compare, part
from .measure import BARE, base_model


class Faces:
    """A VAE whose pictures have random latents."""

    def encode(self, pictures: Any) -> Any:
        import torch

        size = (len(pictures), 4, pictures.shape[1] // 8, pictures.shape[2] // 8)
        return torch.randn(size, generator=torch.Generator().manual_seed(1)) / 0.18215


def person(seed: int) -> Any:
    import torch

    crop = torch.full((1, 512, 512, 3), seed, dtype=torch.uint8)
    one = torch.ones(1)
    return part("likeness.spec").Identity("someone", torch.zeros(1, 4), torch.zeros(1, 5, 2), one, one, crop)


def couple(side: int) -> tuple[Any, ...]:
    """Two people, each in a half of the picture."""
    import torch

    left = torch.zeros(1, side, side)
    left[..., : side // 2] = 1
    make = part("likeness.spec").Person
    return make(person(1), left), make(person(2), 1 - left)


def fused(model: Any, adapter: Any, who: Any, side: int) -> Any:
    node = part("nodes.attention.fused").ApplyFused
    return node.execute(model, adapter, who, Faces(), 1.0, 0.0, 1.0, "all", side).args[0]


def dense(model: Any, adapter: Any, who: Any, side: int) -> Any:
    """The same picture with Eq. 7 as a mask of queries x keys, as the paper writes it."""
    import torch

    slots = part("nodes.attention.slots")
    made = fused(model, adapter, who, side)

    def attend(q: Any, blocks: Any, _groups: Any, attend: Any) -> Any:
        k, v = (
            torch.cat([x.expand(len(q), -1, -1) for x in xs], 1)
            for xs in zip(*((b.k, b.v) for b in blocks), strict=True)
        )
        masks = [q.new_zeros(1, q.shape[1], b.k.shape[1]) for b in blocks]
        for mask, block in zip(masks, blocks, strict=True):
            if block.seen is not None:
                mask.masked_fill_(~block.seen[..., None].to(q.device), -torch.inf)
        return attend(q, k, v, torch.cat(masks, 2))

    def around(executor: Any, *args: Any, **kwargs: Any) -> Any:
        ours, slots.attend_blocks = slots.attend_blocks, attend
        try:
            return executor(*args, **kwargs)
        finally:
            slots.attend_blocks = ours

    made = made.clone()
    made.add_wrapper_with_key("outer_sample", "dense", around)
    return made


def cases(size: str, side: int) -> list[Case]:
    import torch

    nothing, model = (lambda: None), base_model("sd15", size)
    loader = part("nodes.loaders.fused")
    empty = [[torch.zeros(1, 77, 768), {}]]
    clean, match = (loader.build(*loader.zero_shot(model, empty, noise), noise) for noise in ("clean", "match"))

    def case(name: str, adapter: Any, who: Any, before: Any = nothing, make: Any = fused) -> Case:
        return Case(name, make(model, adapter, who, side), before, resolution=side)

    return [
        Case(BARE, model, nothing, resolution=side),
        case("clean", clean, person(1)),
        case("match, first picture", match, person(1), match.bank.clear),
        case("match, from the second picture on", match, person(1)),
        case("clean, two people by masks", clean, couple(side)),
        case("the same with a dense mask", clean, couple(side), make=dense),
    ]


def measure(arguments: argparse.Namespace) -> str:
    return compare(cases(arguments.size, arguments.resolution), arguments.repeats, BARE)
