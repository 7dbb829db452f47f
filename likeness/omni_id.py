"""Omni-ID (arXiv 2412.09694): photos of a person, however many, become one set of tokens.

    z = [l_0; l_1; ...; l_M],  l_i = f(x_i)              f: CLIP ViT-H/14, all of it trained        (Sec. 3.1)
    q <- q + Attn(q, z, z),  q <- q + MLP(q)             two cross-attention blocks, z the same in both
    q <- q + Attn(q, q, q),  q <- q + MLP(q)             two self-attention blocks
    l = E(X) = q,  256 x 1280                            from learnable q                           (Sec. 4.1)

Where the paper is silent: f gives its last block's output, class token and patches, without its last LayerNorm; a
LayerNorm stands before each attention (on q, and on z) and each MLP, and after the last block. A photo of weight w
counts w times, by log w on its keys; a photo given twice is read once, as it says nothing new.

File: safetensors, `trunk.*` (OpenCLIP's `visual.*`), `queries` [1, tokens, width], `norm.*`, and `cross.<n>.*` and
`self.<n>.*` of q, k, v, out, norm_q, norm_z (cross alone), norm_mlp, mlp.0, mlp.2. Metadata under `likeness`: kind,
version, base (empty), image_size, heads, states, class_token, activation, notes; the rest is read from the shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from . import faces, keymaps, own_file
from .detect import shapes_of
from .fused import key_bias
from .identity import pictured
from .spec import Feature, Identity, OmniIDSpec

KIND = "omni_id"
FEATURE = Feature("omni_id", "tokens", "face224")  # however large the pictures, they are framed as at 224
CHUNK = 8  # photos that go through the trunk at once
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's
ACTIVATIONS = ("gelu", "quick_gelu")
POSITIONS = "trunk.positional_embedding"

# Of the trunk's hidden states, by the input and the output of its last block, which are read.
STATES: Mapping[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "last": lambda trunk, before, last: last,
    "normed": lambda trunk, before, last: trunk.ln_post(last),
    "penultimate": lambda trunk, before, last: before,
}

# q [B, L, C], k, v [B, N, C], heads, bias on the logits [1, 1, N] or None -> [B, L, C]
Attention = Callable[[Tensor, Tensor, Tensor, int, Tensor | None], Tensor]


class Block(nn.Module):
    """Tokens q [B, L, C] attend to z [B, N, features], or where `features` is None to themselves; then an MLP."""

    def __init__(self, spec: OmniIDSpec, features: int | None, operations: Any, attention: Attention) -> None:
        super().__init__()
        width, source = spec.width, features or spec.width
        self.heads, self.attention = spec.heads, attention
        self.norm_q = operations.LayerNorm(width)
        self.norm_z = None if features is None else operations.LayerNorm(features)
        self.q, self.out = operations.Linear(width, width), operations.Linear(width, width)
        self.k, self.v = operations.Linear(source, width), operations.Linear(source, width)
        self.norm_mlp = operations.LayerNorm(width)
        self.mlp = nn.Sequential(operations.Linear(width, spec.inner), nn.GELU(), operations.Linear(spec.inner, width))

    def forward(self, tokens: Tensor, z: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        x = self.norm_q(tokens)
        y = x if self.norm_z is None else self.norm_z(z)
        tokens = tokens + self.out(self.attention(self.q(x), self.k(y), self.v(y), self.heads, bias))
        return tokens + self.mlp(self.norm_mlp(tokens))

    def matched(self, tokens: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Scaled queries of tokens [1, L, C], and keys of z [1, N, features], by head: [H, L, d] and [H, N, d]."""
        assert self.norm_z is not None
        q, k = self.q(self.norm_q(tokens)), self.k(self.norm_z(z))
        q, k = (part[0].unflatten(-1, (self.heads, -1)).movedim(1, 0).float() for part in (q, k))
        return q * q.shape[-1] ** -0.5, k


class OmniID(nn.Module):
    """The encoder E. `trunk` is open_clip's VisionTransformer, for pictures of the spec's size."""

    def __init__(self, spec: OmniIDSpec, trunk: nn.Module, operations: Any, attention: Attention) -> None:
        super().__init__()
        self.spec, self.trunk = spec, trunk
        self.queries = nn.Parameter(torch.empty(1, spec.tokens, spec.width))
        self.cross = nn.ModuleList(Block(spec, spec.features, operations, attention) for _ in range(spec.cross_blocks))
        self.self = nn.ModuleList(Block(spec, None, operations, attention) for _ in range(spec.self_blocks))
        self.norm = operations.LayerNorm(spec.width)

    def states(self, pixels: Tensor) -> Tensor:
        """f: normalised pictures [n, 3, S, S] -> states [n, S', features], float32."""
        trunk: Any = self.trunk
        out = trunk.forward_intermediates(
            pixels.to(trunk.conv1.weight.dtype),
            indices=2, output_fmt="NLC", output_extra_tokens=True, intermediates_only=True,
        )  # fmt: skip
        pairs = zip(out["image_intermediates_prefix"], out["image_intermediates"], strict=True)
        before, last = (torch.cat(pair, dim=1) for pair in pairs)
        states = STATES[self.spec.states](trunk, before, last)
        return (states if self.spec.class_token else states[:, 1:]).float()

    def read(self, z: Tensor, bias: Tensor | None = None) -> Tensor:
        """All photos' states in a row [B, N, features], and what is added to their keys' logits -> l [B, L, C]."""
        tokens = self.queries.to(z).expand(len(z), -1, -1)
        for block in self.cross:
            tokens = block(tokens, z, bias)
        for block in self.self:
            tokens = block(tokens)
        return self.norm(tokens)

    def forward(self, chunks: Iterable[Tensor], weight: Sequence[float] = ()) -> Tensor:
        """E: l [1, L, C] of pictures (`normed`) in chunks [n, 3, S, S]; `weight` has one above 0 for each, or none."""
        return self.read(*self.joined(chunks, weight))

    def joined(self, chunks: Iterable[Tensor], weight: Sequence[float] = ()) -> tuple[Tensor, Tensor | None]:
        """z [1, N, features] of all pictures, and their weights as a bias [1, 1, N], None where all are equal."""
        z = torch.cat([self.states(chunk) for chunk in chunks]).flatten(0, 1)[None]
        bias = key_bias([one / max(weight) for one in weight], self.spec.states_per_photo)
        return z, None if bias is None else bias.to(z)

    def maps(self, chunks: Iterable[Tensor], weight: Sequence[float] = ()) -> Tensor:
        """How the learned queries attend to the patches of each picture (Fig. 10): [L, n, h, w].

        In the first block, where the queries are still the learned ones; the mean over its heads, of one softmax over
        all pictures: a query's values sum to 1, less what the class tokens get.
        """
        z, bias = self.joined(chunks, weight)
        block: Any = self.cross[0]
        total = z.new_zeros(self.spec.tokens, z.shape[1])
        for q, k in zip(*block.matched(self.queries.to(z), z), strict=True):  # at once they would take H times as much
            logits = q @ k.T
            total += (logits if bias is None else logits + bias[0]).softmax(-1)
        patches = (total / self.spec.heads).unflatten(1, (-1, self.spec.states_per_photo))
        return patches[:, :, int(self.spec.class_token) :].unflatten(-1, (self.spec.side, self.spec.side))


def selectivity(maps: Tensor) -> Tensor:
    """How little of a picture each query attends to, by its maps [L, n, h, w]: [L], 0 for all of it, 1 for one patch.

    One less the entropy over a picture's patches, relative to the largest there is, as the mean over pictures.
    """
    share = maps.flatten(2)
    share = share / share.sum(-1, keepdim=True).clamp(min=torch.finfo(share.dtype).tiny)
    entropy = -torch.xlogy(share, share).sum(-1)
    return 1 - entropy.mean(1) / torch.tensor(float(share.shape[-1])).log()


def distinct(pictures: Tensor, weight: Sequence[float]) -> tuple[list[int], list[float]]:
    """Which of the pictures [n, S, S, 3] are read, and how much each counts.

    Each once, with the largest of its weights, if that is above 0: a photo given twice says nothing new. Raises
    ValueError where none is left.
    """
    found: dict[bytes, int] = {}  # by its pixels, where a picture was first
    counts: dict[int, float] = {}
    for i, (picture, share) in enumerate(zip(pictures, weight, strict=True)):
        if share > 0:
            first = found.setdefault(picture.contiguous().cpu().numpy().tobytes(), i)
            counts[first] = max(share, counts.get(first, 0.0))
    if not counts:
        raise ValueError(
            f"got {len(pictures)} faces, all of weight 0; expected one above it; give one of them a weight"
        )
    return list(counts), list(counts.values())


def stored(identities: Sequence[Identity], size: int) -> tuple[Tensor, list[float]]:
    """The faces of some identities that are read together, [n, size, size, 3], cut from their stored heads, and how
    much each counts (see `distinct`). Raises ValueError where an identity has no crops or none that counts."""
    pictures: list[Tensor] = []
    weight: list[float] = []
    for who in identities:
        crops, kept = pictured(who)
        pictures += [faces.align(crops[i].float() / 255, who.kps[i], size) for i in kept]
        weight += who.weight[kept].tolist()
    read, share = distinct(torch.stack(pictures), weight)
    return torch.stack([pictures[i] for i in read]), share


def normed(pictures: Tensor) -> Tensor:
    """Pictures [n, S, S, 3] in 0..1 as CLIP reads them: [n, 3, S, S]."""
    mean, std = (pictures.new_tensor(values) for values in (MEAN, STD))
    return ((pictures - mean) / std).movedim(-1, 1)


def metadata(spec: OmniIDSpec) -> dict[str, str]:
    """What a file tells of itself, for safetensors."""
    return own_file.metadata(KIND, "", spec.notes, **{name: getattr(spec, name) for name in TOLD})


# What a file's shapes do not tell.
TOLD: Mapping[str, type] = {
    "image_size": int, "heads": int, "states": str, "class_token": bool, "activation": str,
}  # fmt: skip


def read_spec(tensors: Mapping[str, Tensor], told: Mapping[str, Any], file: str) -> OmniIDSpec:
    """The spec of a file's tensors and metadata. Raises ValueError where they are not whole or of a newer version."""
    own_file.check(told, KIND, TOLD, {"states": tuple(STATES), "activation": ACTIVATIONS}, file)
    shapes = shapes_of(tensors)
    try:
        _, tokens, width = shapes["queries"]
        features, _, _, patch = shapes["trunk.conv1.weight"]
        inner, _ = shapes["cross.0.mlp.0.weight"]
        positions, _ = shapes[POSITIONS]
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"got {file}, whose tensors are incomplete or misshapen ({error}); expected those of an Omni-ID encoder; "
            "fetch the file again"
        ) from error
    size, heads = told["image_size"], told["heads"]
    if size < 112 or size % 112 or size % max(patch, 1) or heads < 1 or width % heads:
        raise ValueError(
            f"got {file}, with pictures of {size} pixels, patches of {patch}, and {heads} heads for {width} channels; "
            "expected a multiple of 112 and of the patch, and heads that divide the channels; fetch the file again"
        )
    if positions < 2 or positions != _side(positions) ** 2 + 1:
        raise ValueError(
            f"got {file}, whose trunk has {positions} position embeddings; expected those of a square and one more; "
            "fetch the file again"
        )
    cross, own = (
        len({key.split(".")[1] for key in shapes if key.startswith(f"{part}.")}) for part in ("cross", "self")
    )
    return OmniIDSpec(
        patch=patch, features=features, tokens=tokens, width=width, inner=inner, cross_blocks=cross, self_blocks=own,
        notes=told["notes"], **{name: told[name] for name in TOLD},
    )  # fmt: skip


def _side(positions: int) -> int:
    """Patches along the side of the picture that so many position embeddings are for."""
    return round((positions - 1) ** 0.5)


def fitted(tensors: Mapping[str, Tensor], spec: OmniIDSpec) -> dict[str, Tensor]:
    """The tensors of a file with the trunk's position embeddings for the spec's pictures, interpolated if need be."""
    own = tensors[POSITIONS]
    side = _side(len(own))
    if side == spec.side:
        return dict(tensors)
    grid = own[1:].float().unflatten(0, (side, side)).movedim(-1, 0)[None]
    grid = interpolate(grid, (spec.side, spec.side), mode="bicubic", antialias=True)[0].flatten(1).T
    return {**tensors, POSITIONS: torch.cat((own[:1], grid.to(own.dtype)))}


def build(
    spec: OmniIDSpec, tensors: Mapping[str, Tensor], trunk: nn.Module, operations: Any, attention: Attention
) -> OmniID:
    """The encoder with all of its tensors (see `fitted`), uncopied; `trunk` comes without weights.

    Raises ValueError naming what is missing, unknown or misshapen.
    """
    with torch.device("meta"):
        module = OmniID(spec, trunk, operations, attention)
    keymaps.load(module, tensors)
    return module
