"""The stand-in for an Omni-ID encoder, in native format: the paper's tokens and heads, two image encoder layers."""

from __future__ import annotations

from typing import Any

WIDTH, MLP_WIDTH, NUM_TOKENS, PATCH_SIZE, IMAGE_SIZE, NUM_LAYERS = 1280, 1280, 256, 14, 224, 2
METADATA: dict[str, Any] = {
    "kind": "omni_id",
    "version": 1,
    "base": "",
    "image_size": IMAGE_SIZE,
    "heads": 20,
    "states": "last",
    "class_token": True,
    "activation": "gelu",
    "notes": {"trained": "no"},
}

Shapes = dict[str, tuple[int, ...]]

NORM_SHAPE = (WIDTH,)
SQUARE_SHAPE, UP_SHAPE, DOWN_SHAPE = (WIDTH, WIDTH), (MLP_WIDTH, WIDTH), (WIDTH, MLP_WIDTH)
BLOCK_SHAPES: Shapes = {
    "norm_q": NORM_SHAPE,
    "q": SQUARE_SHAPE,
    "k": SQUARE_SHAPE,
    "v": SQUARE_SHAPE,
    "out": SQUARE_SHAPE,
    "norm_mlp": NORM_SHAPE,
    "mlp.0": UP_SHAPE,
    "mlp.2": DOWN_SHAPE,
}
LAYER_SHAPES: Shapes = {
    "ln_1": NORM_SHAPE,
    "attn.out_proj": SQUARE_SHAPE,
    "ln_2": NORM_SHAPE,
    "mlp.c_fc": UP_SHAPE,
    "mlp.c_proj": DOWN_SHAPE,
}


def get_omni_id_encoder_shapes() -> Shapes:
    """The shapes of its tensors by key."""
    parts: Shapes = {"norm": NORM_SHAPE, "trunk.ln_pre": NORM_SHAPE, "trunk.ln_post": NORM_SHAPE}
    for n in range(2):
        parts |= {f"cross.{n}.{name}": shape for name, shape in {**BLOCK_SHAPES, "norm_z": NORM_SHAPE}.items()}
        parts |= {f"self.{n}.{name}": shape for name, shape in BLOCK_SHAPES.items()}
    for n in range(NUM_LAYERS):
        parts |= {f"trunk.transformer.resblocks.{n}.{name}": shape for name, shape in LAYER_SHAPES.items()}
    out: Shapes = {f"{name}.weight": shape for name, shape in parts.items()}
    out |= {f"{name}.bias": shape[:1] for name, shape in parts.items()}
    for n in range(NUM_LAYERS):
        attention = f"trunk.transformer.resblocks.{n}.attn.in_proj"
        out |= {f"{attention}_weight": (3 * WIDTH, WIDTH), f"{attention}_bias": (3 * WIDTH,)}
    return out | {
        "queries": (1, NUM_TOKENS, WIDTH),
        "trunk.class_embedding": NORM_SHAPE,
        "trunk.positional_embedding": (1 + (IMAGE_SIZE // PATCH_SIZE) ** 2, WIDTH),
        "trunk.conv1.weight": (WIDTH, 3, PATCH_SIZE, PATCH_SIZE),
        "trunk.proj": (WIDTH, 1024),
    }
