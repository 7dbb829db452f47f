"""What EVA-CLIP's stand-in consists of: the image half of EVA02-CLIP-L-14-336 in its authors' names."""

from __future__ import annotations

WIDTH, INNER, BLOCKS, PATCH, POSITIONS, OUT = 1024, 2730, 24, 14, 577, 768


def eva_clip() -> dict[str, tuple[int, ...]]:
    """The shapes of the published checkpoint's image half, without the angles that it keeps."""
    square, norms = (WIDTH, WIDTH), ("norm1", "norm2", "attn.inner_attn_ln")
    block: dict[str, tuple[int, ...]] = {
        "attn.q_bias": (WIDTH,), "attn.v_bias": (WIDTH,), "attn.q_proj.weight": square, "attn.k_proj.weight": square,
        "attn.v_proj.weight": square, "attn.proj.weight": square, "attn.proj.bias": (WIDTH,),
        "mlp.w1.weight": (INNER, WIDTH), "mlp.w1.bias": (INNER,), "mlp.w2.weight": (INNER, WIDTH),
        "mlp.w2.bias": (INNER,), "mlp.w3.weight": (WIDTH, INNER), "mlp.w3.bias": (WIDTH,),
        "mlp.ffn_ln.weight": (INNER,), "mlp.ffn_ln.bias": (INNER,),
        **{f"{norm}.{part}": (WIDTH,) for norm in norms for part in ("weight", "bias")},
    }  # fmt: skip
    whole: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, WIDTH), "pos_embed": (1, POSITIONS, WIDTH),
        "patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH), "patch_embed.proj.bias": (WIDTH,),
        "norm.weight": (WIDTH,), "norm.bias": (WIDTH,), "head.weight": (OUT, WIDTH), "head.bias": (OUT,),
    }  # fmt: skip
    blocks = {f"blocks.{i}.{key}": shape for i in range(BLOCKS) for key, shape in block.items()}
    return {f"visual.{key}": shape for key, shape in (whole | blocks).items()}
