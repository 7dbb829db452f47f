"""One key map per published checkpoint layout; renaming keys and loading modules."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

KeyRules = Sequence[tuple[str, str]]

# IP-Adapter, FaceID, Portrait, InstantID, PuLID. Layers keep the file's numbers: attention processors in the order
# down, up, middle, of which the odd ones are cross-attentions. `lora.` is FaceID's LoRA of the base model's attentions.
IP_ADAPTER: KeyRules = (
    (r"(?:image_proj|image_proj_model|id_adapter|pulid_encoder)\.(.+)", r"projector.\1"),
    (r"(?:ip_adapter|adapter_modules)\.(\d+)\.to_([kv])_ip\.weight", r"layers.\1.\2.weight"),
    (r"id_adapter_attn_layers\.(\d+)\.id_to_([kv])\.weight", r"layers.\1.\2.weight"),
    (r"pulid_ca\.(\d+)\.(.+)", r"layers.\1.\2"),
    (r"(?:ip_adapter|adapter_modules)\.(\d+)\.to_(q|k|v|out)_lora\.(down|up)\.weight", r"lora.\1.\2.\3"),
    (r"ip_adapter_proj_model\.(.+)", r"projector.\1"),
    (
        r"double_blocks\.(\d+)\.processor\.ip_adapter_double_stream_([kv])_proj\.(weight|bias)",
        r"layers.double_blocks.\1.\2.\3",
    ),
)

# EVA-CLIP's vision tower, in its authors' and in OpenCLIP's layout, to timm's names.
EVA_CLIP: KeyRules = (
    (r"(?:trunk\.)?(.+)\.attn\.([qv])_bias", r"\1.attn.\2_proj.bias"),
    (r"(?:trunk\.)?(.+)\.attn\.inner_attn_ln\.(\w+)", r"\1.attn.norm.\2"),
    (r"(?:trunk\.)?(.+)\.mlp\.w1\.(\w+)", r"\1.mlp.fc1_g.\2"),
    (r"(?:trunk\.)?(.+)\.mlp\.w2\.(\w+)", r"\1.mlp.fc1_x.\2"),
    (r"(?:trunk\.)?(.+)\.mlp\.w3\.(\w+)", r"\1.mlp.fc2.\2"),
    (r"(?:trunk\.)?(.+)\.mlp\.ffn_ln\.(\w+)", r"\1.mlp.norm.\2"),
    (r"(?:trunk\.)?(.+)", r"\1"),
)

# A CLIP vision tower in the transformers layout, to OpenCLIP's names, except q, k and v, which OpenCLIP fuses.
CLIP_VISION: KeyRules = (
    (r"vision_model\.embeddings\.class_embedding", "class_embedding"),
    (r"vision_model\.embeddings\.patch_embedding\.weight", "conv1.weight"),
    (r"vision_model\.embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"vision_model\.(pre|post)_lay\w*norm\.(\w+)", r"ln_\1.\2"),
    (r"vision_model\.encoder\.layers\.(\d+)\.layer_norm(\d)\.(\w+)", r"transformer.resblocks.\1.ln_\2.\3"),
    (r"vision_model\.encoder\.layers\.(\d+)\.mlp\.fc1\.(\w+)", r"transformer.resblocks.\1.mlp.c_fc.\2"),
    (r"vision_model\.encoder\.layers\.(\d+)\.mlp\.fc2\.(\w+)", r"transformer.resblocks.\1.mlp.c_proj.\2"),
    (r"vision_model\.encoder\.layers\.(\d+)\.self_attn\.out_proj\.(\w+)", r"transformer.resblocks.\1.attn.out_proj.\2"),
    (r"vision_model\.encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(\w+)", r"transformer.resblocks.\1.attn.\2_\3"),
    (r"visual_projection\.weight", "proj"),
)

# FlashFace's names for one UNet, to ComfyUI's: first inside the blocks, then the blocks.
FLASHFACE_LAYERS: KeyRules = (
    (r"(.+)\.layer1\.([02])\.(\w+)", r"\1.in_layers.\2.\3"),
    (r"(.+)\.embedding\.1\.(\w+)", r"\1.emb_layers.1.\2"),
    (r"(.+)\.layer2\.([03])\.(\w+)", r"\1.out_layers.\2.\3"),
    (r"(.+)\.shortcut\.(\w+)", r"\1.skip_connection.\2"),
    (r"(.+)\.blocks\.(\d+)\.self_attn\.self_attn_first\.([qkvo]\.\w+)", r"\1.transformer_blocks.\2.reference.\3"),
    (r"(.+)\.blocks\.(\d+)\.self_attn\.([qkv])\.(\w+)", r"\1.transformer_blocks.\2.attn1.to_\3.\4"),
    (r"(.+)\.blocks\.(\d+)\.self_attn\.o\.(\w+)", r"\1.transformer_blocks.\2.attn1.to_out.0.\3"),
    (r"(.+)\.blocks\.(\d+)\.cross_attn\.([qkv])\.(\w+)", r"\1.transformer_blocks.\2.attn2.to_\3.\4"),
    (r"(.+)\.blocks\.(\d+)\.cross_attn\.o\.(\w+)", r"\1.transformer_blocks.\2.attn2.to_out.0.\3"),
    (r"(.+)\.blocks\.(\d+)\.ffn\.(0\.proj|2)\.(\w+)", r"\1.transformer_blocks.\2.ff.net.\3.\4"),
    (r"(.+)\.blocks\.(\d+)\.(norm[123])\.(\w+)", r"\1.transformer_blocks.\2.\3.\4"),
    (r"(.+)\.norm1\.(\w+)", r"\1.norm.\2"),
    (r"(.+)\.conv1\.(\w+)", r"\1.proj_in.\2"),
    (r"(.+)\.conv2\.(\w+)", r"\1.proj_out.\2"),
    (r"encoder\.0\.(\w+)", r"encoder.0.0.\1"),
    (r"encoder\.(\d+)\.(\w+)", r"encoder.\1.0.op.\2"),
    (r"decoder\.(\d+)\.(\d)\.1\.(\w+)", r"decoder.\1.\2.conv.\3"),
    (r"((?:time_embedding|head)\.\d\.\w+)", r"\1"),
)
FLASHFACE_BLOCKS: KeyRules = (
    (r"time_embedding\.(.+)", r"time_embed.\1"),
    (r"encoder\.(.+)", r"input_blocks.\1"),
    (r"middle\.(.+)", r"middle_block.\1"),
    (r"decoder\.(.+)", r"output_blocks.\1"),
    (r"head\.(.+)", r"out.\1"),
)


def rename_keys(tensors: Mapping[str, Tensor], rules: KeyRules) -> dict[str, Tensor]:
    """Rename every tensor by the first rule whose pattern matches the full key.

    Raises ValueError where no rule matches, or where two keys get the same name.
    """
    out: dict[str, Tensor] = {}
    for key, value in tensors.items():
        matches = ((re.fullmatch(pattern, key), name) for pattern, name in rules)
        new = next((match.expand(name) for match, name in matches if match), None)
        if new is None:
            raise ValueError(
                f"got the key {key!r}, which no table of this pack knows; expected the tensor of an adapter"
            )
        if new in out:
            raise ValueError(
                f"got two keys for {new!r}, one of them {key!r}; expected each once; the file mixes two layouts"
            )
        out[new] = value
    return out


def select_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names have a prefix, with the prefix removed."""
    return {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}


def load_module_weights(module: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Load a complete state dict, or raise ValueError naming the keys that are missing, unknown or misshapen."""
    expected = module.state_dict()
    missing, unexpected = sorted(expected.keys() - state_dict.keys()), sorted(state_dict.keys() - expected.keys())
    misshapen = [
        f"{key} {list(state_dict[key].shape)} for {list(value.shape)}"
        for key, value in expected.items()
        if key in state_dict and state_dict[key].shape != value.shape
    ]
    for problem, keys in (("misses", missing), ("has unknown", unexpected), ("has misshapen", misshapen)):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise ValueError(
                f"the file {problem} {', '.join(keys[:3])}{more}; "
                f"expected every tensor of a {type(module).__name__}, once"
            )
    module.load_state_dict(dict(state_dict), strict=True, assign=True)
