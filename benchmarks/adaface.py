"""AdaFace in one run: a step of the bare model with a person in the prompt, and what putting the person there costs."""

from __future__ import annotations

import argparse
import time
from functools import partial
from typing import Any

from .compare import Case, compare, part
from .measure import BARE, base_model, count


def prompter() -> Any:
    """Arc2Face's encoder and an inverter of their real size, from seeds."""
    import comfy.ops

    models, math, types = part("tools.standin_models"), part("likeness.adaface"), part("nodes.types")
    care, operations = part("nodes.loaders.care"), comfy.ops.manual_cast
    tensors, told = models.adaface(), part("tools.standins").TOLD["adaface_sd15.safetensors"]
    spec = math.read_spec(told, "seeds")
    text = models.clip_text("sd1_clip_config.json", "", tensors["hidden_state_layer_weights"].dtype)
    encoder = care.patcher_of(math.text_model(text, "text_model.", 12, operations))
    inverter = care.patcher_of(math.build(tensors, spec, operations, "seeds"))
    return types.LoadedPrompter(encoder, inverter, spec, "seeds")


def person() -> Any:
    import torch

    spec, face = part("likeness.spec"), part("likeness.arc2face").FACES[0]
    one = torch.ones(1)
    rows = {face.id("0" * 64): torch.ones(1, 512)}
    return spec.Identity("someone", torch.zeros(1, 4), torch.zeros(1, 5, 2), one, one, None, rows)


def words(given: Any) -> Any:
    made = part("nodes.prompt").word_vectors(given, person(), part("likeness.adaface").Wording())
    return made["l"]


def measure(arguments: argparse.Namespace) -> str:
    import torch

    model, given = base_model("sd15", arguments.size), prompter()
    rows = words(given)
    flops = count(partial(words, given))
    began = time.perf_counter()
    words(given)
    seconds = time.perf_counter() - began
    text = torch.full((1, 77, 768), 0.1)
    text[:, 4 : 4 + len(rows)] = rows
    side, nothing = arguments.resolution, (lambda: None)
    found = [
        Case(BARE, model, nothing, resolution=side),
        Case("a person in the prompt", model, nothing, resolution=side, prompt=text),
    ]
    once = f"Once per prompt: {flops / 1e9:.1f} GFLOPs, {seconds:.2f} seconds."
    return f"{compare(found, arguments.repeats, BARE)}\n\n{once}"
