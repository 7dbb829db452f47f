"""FlashFace in one run: the bare model, the authors' way of computing it, and ours, for a first and a second picture.

The authors' way, emulated on the same weights: the second UNet runs whole at every step, and every row, also those
that see no reference, projects the references and attends to them.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from .compare import Case, compare, part

FACES = 4
AUTHORS = "the authors' way"
ALIASES = ("encoder.", "middle.", "decoder.")
COUNTED = 3  # steps, so that a refresh of 3 is counted fairly


def load(size: str) -> tuple[Any, Any]:
    """MODEL and REFERENCE_NET of a checkpoint from seeds; full: as published."""
    import torch
    from comfy import model_management as management

    models, loader = part("tools.standin_models"), part("nodes.loaders.flashface")
    tensors = models.flashface(5, 320 if size == "full" else 32)
    dtype = torch.float16 if management.get_torch_device().type == "cuda" else torch.float32
    once = {key: value.to(dtype) for key, value in tensors.items() if not key.startswith(ALIASES)}
    return loader.build(once, "seeds", bank())


def bank() -> Any:
    return part("likeness.bank").MemoryBank()


class Faces:
    """A VAE whose pictures have random latents."""

    def encode(self, pictures: Any) -> Any:
        import torch

        generator = torch.Generator().manual_seed(1)
        return torch.randn(len(pictures), 4, 28, 28, generator=generator) / 0.18215


def referenced(model: Any, net: Any, **changes: Any) -> Any:
    import torch

    spec = part("likeness.spec")
    person = spec.Identity(
        "someone", torch.tensor([[128.0, 128.0, 384.0, 384.0]]).repeat(FACES, 1), torch.ones(FACES, 5, 2),
        torch.ones(FACES), torch.ones(FACES), torch.zeros(FACES, 512, 512, 3, dtype=torch.uint8),
    )  # fmt: skip
    settings = {"strength": 1.2, "reference_guidance": 3.2, "start_percent": 0.0, "end_percent": 1.0, "launch": 1000}
    node = part("nodes.attention.reference").ApplyReference
    return node.execute(model, net, person, Faces(), **settings, **changes).args[0]


def official(model: Any, net: Any) -> Any:
    """The same model with its reference attention computed as the authors do."""
    import torch

    reference, patch = part("nodes.attention.reference"), part("nodes.attention.patch")

    @dataclass(frozen=True, eq=False)
    class Official(reference.Reference):
        def prepare(self, call: Any) -> Mapping[Any, Any]:
            (person,) = self.people
            unet, n = self.net.patcher.model.diffusion_model, len(person.latents)
            x, time_, text = person.latents.to(call.device, call.dtype), call.timesteps[:1], call.text
            context = text.to(call.device, call.dtype).expand(n, -1, -1)
            never = [*self.places, reference.Place("attn1_output", ("never", 0), 0, False)]
            seen = patch.inputs(unet, x, time_.expand(n), context, never)  # never is never seen: all of it runs
            strengths = torch.tensor(self.strengths(call), device=call.device).repeat_interleave(call.rows)
            return {place: (layer, seen[place], strengths) for place, layer in self.layers.items()}

        def term(self, state: Any, q: Any, options: dict[str, Any]) -> Any:
            layer, seen, strengths = state
            both = torch.cat((q, seen.flatten(0, 1)[None].expand(len(q), -1, -1)), 1)
            out = reference.attend(options)(layer.q(q), layer.k(both), layer.v(both))
            return strengths.to(q.dtype)[:, None, None] * (layer.o(out) - options[reference.HEARD].own)

    ours = referenced(model, net)
    injection, branch = patch.injections(ours)[-1], patch.branches(ours)[-1]
    copied = {field.name: getattr(injection, field.name) for field in fields(reference.Reference)}
    return patch.attach(model, Official(**copied), branch)


def cases(model: Any, net: Any, resolution: int) -> list[Case]:
    nothing, ours = (lambda: None), referenced(model, net)
    return [
        Case("bare model, two rows", model, nothing, False, resolution),
        Case("bare model, three rows", model, nothing, True, resolution),
        Case(AUTHORS, official(model, net), nothing, False, resolution),
        Case("ours, first picture", ours, net.bank.clear, False, resolution),
        Case("ours, from the second picture on", ours, nothing, False, resolution),
        Case("ours, first picture, refresh 3", referenced(model, net, refresh=3), net.bank.clear, False, resolution),
    ]


def measure(arguments: argparse.Namespace) -> str:
    """The table. A second picture follows a first one of as many steps, as it does with an artist."""
    return compare(cases(*load(arguments.size), arguments.resolution), arguments.repeats, AUTHORS)
