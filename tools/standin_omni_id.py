"""An Omni-ID encoder in the pack's own layout: the paper's tokens and heads on a trunk of two thin layers."""

from __future__ import annotations

from typing import Any

WIDTH, INNER, TOKENS, PATCH, SIZE, LAYERS = 1280, 1280, 256, 14, 224, 2
TOLD: dict[str, Any] = {
    "kind": "omni_id", "version": 1, "base": "", "image_size": SIZE, "heads": 20, "states": "last", "class_token": True,
    "activation": "gelu", "notes": {"trained": "no"},
}  # fmt: skip

Shapes = dict[str, tuple[int, ...]]

NORM = (WIDTH,)
SQUARE, UP, DOWN = (WIDTH, WIDTH), (INNER, WIDTH), (WIDTH, INNER)
BLOCK: Shapes = {
    "norm_q": NORM, "q": SQUARE, "k": SQUARE, "v": SQUARE, "out": SQUARE, "norm_mlp": NORM, "mlp.0": UP, "mlp.2": DOWN
}  # fmt: skip
LAYER: Shapes = {"ln_1": NORM, "attn.out_proj": SQUARE, "ln_2": NORM, "mlp.c_fc": UP, "mlp.c_proj": DOWN}


def shapes() -> Shapes:
    """The shapes of a file, by name."""
    parts: Shapes = {"norm": NORM, "trunk.ln_pre": NORM, "trunk.ln_post": NORM}
    for n in range(2):
        parts |= {f"cross.{n}.{name}": shape for name, shape in {**BLOCK, "norm_z": NORM}.items()}
        parts |= {f"self.{n}.{name}": shape for name, shape in BLOCK.items()}
    for n in range(LAYERS):
        parts |= {f"trunk.transformer.resblocks.{n}.{name}": shape for name, shape in LAYER.items()}
    out: Shapes = {f"{name}.weight": shape for name, shape in parts.items()}
    out |= {f"{name}.bias": shape[:1] for name, shape in parts.items()}
    for n in range(LAYERS):
        attention = f"trunk.transformer.resblocks.{n}.attn.in_proj"
        out |= {f"{attention}_weight": (3 * WIDTH, WIDTH), f"{attention}_bias": (3 * WIDTH,)}
    return out | {
        "queries": (1, TOKENS, WIDTH),
        "trunk.class_embedding": NORM,
        "trunk.positional_embedding": (1 + (SIZE // PATCH) ** 2, WIDTH),
        "trunk.conv1.weight": (WIDTH, 3, PATCH, PATCH),
        "trunk.proj": (WIDTH, 1024),
    }
