"""Omni-ID (arXiv 2412.09694): encodes any number of photos of a person jointly into one set of tokens.

    z = [l_0; l_1; ...; l_M],  l_i = f(x_i)              f: CLIP ViT-H/14, fully trained            (Sec. 3.1)
    q <- q + Attn(q, z, z),  q <- q + MLP(q)             two cross-attention blocks, z the same in both
    q <- q + Attn(q, q, q),  q <- q + MLP(q)             two self-attention blocks
    l = E(X) = q,  256 x 1280                            from learnable q                           (Sec. 4.1)

Where the paper is silent: f returns the output of its last block, class token and patches, without the final LayerNorm;
there is a LayerNorm before each attention (on q, and on z), before each MLP, and after the last block. A photo of
weight w counts w times, by log w on the logits of its keys; duplicate photos are read once, as they add nothing.

File: safetensors, `trunk.*` (OpenCLIP's `visual.*`), `queries` [1, tokens, width], `norm.*`, and `cross.<n>.*` and
`self.<n>.*` of q, k, v, out, norm_q, norm_z (cross alone), norm_mlp, mlp.0, mlp.2. Metadata under `likeness`: kind,
version, base (empty), image_size, heads, states, class_token, activation, notes, and trunk_heads if they are not those
of published towers of the trunk's width; the rest follows from the shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from ..checkpoints import key_maps, native_metadata
from ..checkpoints.checkpoint_detection import get_tensor_shapes
from ..faces import alignment
from ..identity.merge import get_weighted_crops
from ..spec import Feature, Identity, OmniIDSpec
from .fused_kv import compute_key_bias

KIND = "omni_id"
OMNI_ID_FEATURE = Feature("omni_id", "tokens", "face224")  # larger images are framed as at 224
PHOTOS_PER_CHUNK = 8  # in one call of the trunk
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
POSITION_EMBEDDING_NAME = "trunk.positional_embedding"

# The trunk's hidden states that are read, of the input and the output of its last block.
TRUNK_STATES: Mapping[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "last": lambda trunk, penultimate, last: last,
    "normed": lambda trunk, penultimate, last: trunk.ln_post(last),
    "penultimate": lambda trunk, penultimate, last: penultimate,
}

# q [B, L, C], k, v [B, N, C], number of heads, bias on the logits [1, 1, N] or None -> [B, L, C]
MultiHeadAttentionFunction = Callable[[Tensor, Tensor, Tensor, int, Tensor | None], Tensor]


class OmniIDBlock(nn.Module):
    """Tokens q [B, L, C] attend to z [B, N, features], or to themselves if `features` is None; then an MLP."""

    def __init__(
        self, spec: OmniIDSpec, features: int | None, operations: Any, attention_function: MultiHeadAttentionFunction
    ) -> None:
        super().__init__()
        width, source = spec.width, features or spec.width
        self.num_heads, self.attention_function = spec.heads, attention_function
        self.norm_q = operations.LayerNorm(width)
        self.norm_z = None if features is None else operations.LayerNorm(features)
        self.q, self.out = operations.Linear(width, width), operations.Linear(width, width)
        self.k, self.v = operations.Linear(source, width), operations.Linear(source, width)
        self.norm_mlp = operations.LayerNorm(width)
        self.mlp = nn.Sequential(
            operations.Linear(width, spec.mlp_width), nn.GELU(), operations.Linear(spec.mlp_width, width)
        )

    def forward(self, tokens: Tensor, z: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        x = self.norm_q(tokens)
        y = x if self.norm_z is None else self.norm_z(z)
        tokens = tokens + self.out(self.attention_function(self.q(x), self.k(y), self.v(y), self.num_heads, bias))
        return tokens + self.mlp(self.norm_mlp(tokens))

    def compute_queries_keys(self, tokens: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Scaled queries of tokens [1, L, C] and keys of z [1, N, features], per head: [H, L, d] and [H, N, d]."""
        assert self.norm_z is not None
        q, k = self.q(self.norm_q(tokens)), self.k(self.norm_z(z))
        q, k = (part[0].unflatten(-1, (self.num_heads, -1)).movedim(1, 0).float() for part in (q, k))
        return q * q.shape[-1] ** -0.5, k


class OmniIDModel(nn.Module):
    """The encoder E. `trunk` is open_clip's VisionTransformer, for images of the spec's size."""

    def __init__(
        self, spec: OmniIDSpec, trunk: nn.Module, operations: Any, attention_function: MultiHeadAttentionFunction
    ) -> None:
        super().__init__()
        self.spec, self.trunk = spec, trunk
        self.queries = nn.Parameter(torch.empty(1, spec.tokens, spec.width))
        self.cross = nn.ModuleList(
            OmniIDBlock(spec, spec.trunk_width, operations, attention_function) for _ in range(spec.cross_blocks)
        )
        self.self = nn.ModuleList(
            OmniIDBlock(spec, None, operations, attention_function) for _ in range(spec.self_blocks)
        )
        self.norm = operations.LayerNorm(spec.width)

    def extract_states(self, pixels: Tensor) -> Tensor:
        """f: normalised images [n, 3, S, S] -> states [n, S', features], float32."""
        trunk: Any = self.trunk
        out = trunk.forward_intermediates(
            pixels.to(trunk.conv1.weight.dtype),
            indices=2, output_fmt="NLC", output_extra_tokens=True, intermediates_only=True,
        )  # fmt: skip
        pairs = zip(out["image_intermediates_prefix"], out["image_intermediates"], strict=True)
        penultimate, last = (torch.cat(pair, dim=1) for pair in pairs)
        states = TRUNK_STATES[self.spec.states](trunk, penultimate, last)
        return (states if self.spec.class_token else states[:, 1:]).float()

    def encode_states(self, z: Tensor, bias: Tensor | None = None) -> Tensor:
        """z [B, N, features], the states of all photos, and the bias on the logits of their keys -> l [B, L, C]."""
        tokens = self.queries.to(z).expand(len(z), -1, -1)
        for block in self.cross:
            tokens = block(tokens, z, bias)
        for block in self.self:
            tokens = block(tokens)
        return self.norm(tokens)

    def forward(self, chunks: Iterable[Tensor], weights: Sequence[float] = ()) -> Tensor:
        """E: normalised images in chunks [n, 3, S, S] -> l [1, L, C]. `weights`, if any, has one above 0 per image."""
        return self.encode_states(*self.join_states(chunks, weights))

    def join_states(self, chunks: Iterable[Tensor], weights: Sequence[float] = ()) -> tuple[Tensor, Tensor | None]:
        """z [1, N, features] of all images, and their weights as a bias [1, 1, N], None where all are equal."""
        z = torch.cat([self.extract_states(chunk) for chunk in chunks]).flatten(0, 1)[None]
        bias = compute_key_bias([weight / max(weights) for weight in weights], self.spec.states_per_photo)
        return z, None if bias is None else bias.to(z)

    def compute_attention_maps(self, chunks: Iterable[Tensor], weights: Sequence[float] = ()) -> Tensor:
        """Attention of the learned queries to the patches of each image (Fig. 10): [L, n, h, w].

        Taken from the first block, whose queries are still the learned ones, as the mean over heads of one softmax over
        all images: the values of a query sum to 1, minus what the class tokens get.
        """
        z, bias = self.join_states(chunks, weights)
        block: Any = self.cross[0]
        total = z.new_zeros(self.spec.tokens, z.shape[1])
        queries, keys = block.compute_queries_keys(self.queries.to(z), z)
        for q, k in zip(queries, keys, strict=True):  # head by head, to need 1/H of the memory
            logits = q @ k.T
            total += (logits if bias is None else logits + bias[0]).softmax(-1)
        patches = (total / self.spec.heads).unflatten(1, (-1, self.spec.states_per_photo))
        return patches[:, :, int(self.spec.class_token) :].unflatten(
            -1, (self.spec.patches_per_side, self.spec.patches_per_side)
        )


def compute_selectivity(attention_maps: Tensor) -> Tensor:
    """How selective each query is, by its maps [L, n, h, w]: [L], 0 for the full image, 1 for a single patch.

    One minus the entropy over the patches of an image, relative to its maximum, averaged over images.
    """
    share = attention_maps.flatten(2)
    share = share / share.sum(-1, keepdim=True).clamp(min=torch.finfo(share.dtype).tiny)
    entropy = -torch.xlogy(share, share).sum(-1)
    return 1 - entropy.mean(1) / torch.tensor(float(share.shape[-1])).log()


def select_distinct_images(images: Tensor, weights: Sequence[float]) -> tuple[list[int], list[float]]:
    """The indices of the distinct images of [n, S, S, 3] with a weight above 0, and their weights.

    Of duplicates the first is kept, with their largest weight. Raises ValueError where none is left.
    """
    first_index: dict[bytes, int] = {}  # by the pixels
    selected: dict[int, float] = {}
    for i, (image, weight) in enumerate(zip(images, weights, strict=True)):
        if weight > 0:
            first = first_index.setdefault(image.contiguous().cpu().numpy().tobytes(), i)
            selected[first] = max(weight, selected.get(first, 0.0))
    if not selected:
        raise ValueError(f"got {len(images)} faces, all of weight 0; expected one above it; give one of them a weight")
    return list(selected), list(selected.values())


def align_stored_faces(identities: Sequence[Identity], size: int) -> tuple[Tensor, list[float]]:
    """The aligned faces of identities that are encoded jointly, [n, size, size, 3], and their weights.

    See select_distinct_images. Raises ValueError where an identity has no crops, or only crops of weight 0.
    """
    images: list[Tensor] = []
    weights: list[float] = []
    for identity in identities:
        crops, kept = get_weighted_crops(identity)
        images += [alignment.align_face(crops[i].float() / 255, identity.kps[i], size) for i in kept]
        weights += identity.weight[kept].tolist()
    selected, selected_weights = select_distinct_images(torch.stack(images), weights)
    return torch.stack([images[i] for i in selected]), selected_weights


def normalize_images(images: Tensor) -> Tensor:
    """Images [n, S, S, 3] in 0..1, normalised for CLIP: [n, 3, S, S]."""
    mean, std = (images.new_tensor(values) for values in (CLIP_MEAN, CLIP_STD))
    return ((images - mean) / std).movedim(-1, 1)


@dataclass(frozen=True)
class OmniIDMetadata(native_metadata.NativeMetadata):
    """What the shapes of a file's tensors do not determine. An encoder is for no base model: `base` is empty."""

    kind = KIND
    image_size: int
    heads: int
    states: Literal["last", "normed", "penultimate"]
    class_token: bool
    activation: Literal["gelu", "quick_gelu"]
    trunk_heads: int


def make_omni_id_metadata(spec: OmniIDSpec) -> dict[str, str]:
    """The metadata of an encoder's safetensors file."""
    return native_metadata.encode_metadata(OmniIDMetadata, spec, base="")


def read_omni_id_spec(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], file: str) -> OmniIDSpec:
    """The spec of a file's tensors and metadata. Raises ValueError where they are incomplete or of a newer version."""
    stored = native_metadata.decode_metadata(OmniIDMetadata, {"trunk_heads": 0, **metadata}, file)
    shapes = get_tensor_shapes(tensors)
    try:
        _, tokens, width = shapes["queries"]
        trunk_width, _, _, patch = shapes["trunk.conv1.weight"]
        mlp_width, _ = shapes["cross.0.mlp.0.weight"]
        positions, _ = shapes[POSITION_EMBEDDING_NAME]
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"got {file}, whose tensors are incomplete or misshapen ({error}); expected those of an Omni-ID encoder; "
            "fetch the file again"
        ) from error
    size, heads, trunk_heads = stored.image_size, stored.heads, stored.trunk_heads
    has_whole_heads = heads > 0 and not width % heads and trunk_heads >= 0 and not trunk_width % (trunk_heads or 1)
    if size < 112 or size % 112 or size % max(patch, 1) or not has_whole_heads:
        raise ValueError(
            f"got {file}, with images of {size} pixels, patches of {patch}, {heads} heads for {width} channels, and "
            f"{trunk_heads} for {trunk_width} in its trunk; expected a multiple of 112 and of the patch, and heads "
            "that divide the channels; fetch the file again"
        )
    if positions < 2 or positions != _patches_per_side(positions) ** 2 + 1:
        raise ValueError(
            f"got {file}, whose trunk has {positions} position embeddings; expected those of a square and one more; "
            "fetch the file again"
        )
    cross_blocks, self_blocks = (
        len({key.split(".")[1] for key in shapes if key.startswith(f"{name}.")}) for name in ("cross", "self")
    )
    return OmniIDSpec(
        image_size=size, patch_size=patch, trunk_width=trunk_width, states=stored.states, tokens=tokens, width=width,
        class_token=stored.class_token, activation=stored.activation, heads=heads, mlp_width=mlp_width,
        cross_blocks=cross_blocks, self_blocks=self_blocks, trunk_heads=trunk_heads, notes=stored.notes,
    )  # fmt: skip


def _patches_per_side(num_positions: int) -> int:
    """Patches along the side of the image that has this many position embeddings."""
    return round((num_positions - 1) ** 0.5)


def interpolate_position_embeddings(tensors: Mapping[str, Tensor], spec: OmniIDSpec) -> dict[str, Tensor]:
    """The tensors of a file, with the trunk's position embeddings interpolated to the spec's image size if needed."""
    positions = tensors[POSITION_EMBEDDING_NAME]
    side, target = _patches_per_side(len(positions)), spec.patches_per_side
    if side == target:
        return dict(tensors)
    grid = positions[1:].float().unflatten(0, (side, side)).movedim(-1, 0)[None]
    grid = interpolate(grid, (target, target), mode="bicubic", antialias=True)[0].flatten(1).T
    return {**tensors, POSITION_EMBEDDING_NAME: torch.cat((positions[:1], grid.to(positions.dtype)))}


def build_omni_id_model(
    spec: OmniIDSpec,
    tensors: Mapping[str, Tensor],
    trunk: nn.Module,
    operations: Any,
    attention_function: MultiHeadAttentionFunction,
) -> OmniIDModel:
    """The encoder with its weights, not copied, of tensors from interpolate_position_embeddings; `trunk` has none yet.

    Raises ValueError naming missing, unknown or misshapen tensors.
    """
    with torch.device("meta"):
        module = OmniIDModel(spec, trunk, operations, attention_function)
    key_maps.load_module_weights(module, tensors)
    return module
