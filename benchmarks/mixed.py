"""Mixed attention in one run: the bare model with one picture and with two, and each kind of text stream."""

from __future__ import annotations

import argparse
from typing import Any

from .compare import Case, compare, part
from .measure import BARE, base_model

TWO = "bare model, two pictures"


def mixed(model: Any, adapter: Any, **changes: Any) -> Any:
    import torch

    spec = part("likeness.spec")
    shapes = {"raw": (512,), "last": (257, 1280)}
    rows = {need.id("0" * 64): torch.ones(1, *shapes[need.layer]) for need in adapter.spec.needs}
    one = torch.ones(1)
    person = spec.Identity("someone", torch.zeros(1, 4), torch.zeros(1, 5, 2), one, one, None, rows, rows)
    settings = {"attention": "mixed", "text_stream": "own", "style": "AdaIN-mean"} | changes
    node = part("nodes.attention.mixed").ApplyMixed
    return node.execute(model, adapter, person, 1.0, start_percent=0.0, end_percent=1.0, **settings).args[0]


def adapter(model: Any, size: str) -> Any:
    """An adapter from seeds that fits the model."""
    models, loader = part("tools.standin_models"), part("nodes.loaders.own")
    tensors = models.infinite_id(models.SD15, 16)
    for site in part("nodes.attention.unet").sites(model.model.diffusion_model):
        shape = (site.hidden, site.context)
        tensors |= {f"layers.{site.number}.{p}.weight": models.weight(f"{site.number}{p}", shape) for p in "kv"}
    told = {"kind": "infinite_id", "version": 1, "base": "SD1.5", "unconditional": "zero", "notes": {"size": size}}
    return loader.load({key: value.float() for key, value in tensors.items()}, told, "seeds")[0]


def cases(size: str, side: int) -> list[Case]:
    nothing, model = (lambda: None), base_model("sd15", size)
    given = adapter(model, size)

    def case(name: str, patched: Any, pictures: int = 1) -> Case:
        return Case(name, patched, nothing, resolution=side, pictures=pictures)

    return [
        case(BARE, model),
        case(TWO, model, 2),
        case("own text stream", mixed(model, given)),
        case("shared text stream", mixed(model, given, text_stream="shared")),
        case("no text stream (off)", mixed(model, given, attention="off")),
    ]


def measure(arguments: argparse.Namespace) -> str:
    return compare(cases(arguments.size, arguments.resolution), arguments.repeats, BARE)
