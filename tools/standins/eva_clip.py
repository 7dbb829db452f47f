"""The stand-in for EVA-CLIP: the image encoder of EVA02-CLIP-L-14-336 with the keys of the original checkpoint."""

from __future__ import annotations

WIDTH, MLP_WIDTH, NUM_BLOCKS, PATCH_SIZE, NUM_POSITIONS, OUTPUT_WIDTH = 1024, 2730, 24, 14, 577, 768


def get_eva_clip_shapes() -> dict[str, tuple[int, ...]]:
    """The shapes of the published image encoder, without the buffers of its rotary embedding."""
    square, norms = (WIDTH, WIDTH), ("norm1", "norm2", "attn.inner_attn_ln")
    block: dict[str, tuple[int, ...]] = {
        "attn.q_bias": (WIDTH,),
        "attn.v_bias": (WIDTH,),
        "attn.q_proj.weight": square,
        "attn.k_proj.weight": square,
        "attn.v_proj.weight": square,
        "attn.proj.weight": square,
        "attn.proj.bias": (WIDTH,),
        "mlp.w1.weight": (MLP_WIDTH, WIDTH),
        "mlp.w1.bias": (MLP_WIDTH,),
        "mlp.w2.weight": (MLP_WIDTH, WIDTH),
        "mlp.w2.bias": (MLP_WIDTH,),
        "mlp.w3.weight": (WIDTH, MLP_WIDTH),
        "mlp.w3.bias": (WIDTH,),
        "mlp.ffn_ln.weight": (MLP_WIDTH,),
        "mlp.ffn_ln.bias": (MLP_WIDTH,),
        **{f"{norm}.{part}": (WIDTH,) for norm in norms for part in ("weight", "bias")},
    }
    stem: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, WIDTH),
        "pos_embed": (1, NUM_POSITIONS, WIDTH),
        "patch_embed.proj.weight": (WIDTH, 3, PATCH_SIZE, PATCH_SIZE),
        "patch_embed.proj.bias": (WIDTH,),
        "norm.weight": (WIDTH,),
        "norm.bias": (WIDTH,),
        "head.weight": (OUTPUT_WIDTH, WIDTH),
        "head.bias": (OUTPUT_WIDTH,),
    }
    blocks = {f"blocks.{i}.{key}": shape for i in range(NUM_BLOCKS) for key, shape in block.items()}
    return {f"visual.{key}": shape for key, shape in (stem | blocks).items()}
