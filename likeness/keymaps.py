"""One remapping table per published layout, and the two ways to use it: rename keys, load a module."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

Rules = Sequence[tuple[str, str]]

# IP-Adapter, FaceID, Portrait, InstantID. The number is the file's own: attention processors in the order down, up,
# middle; odd ones are cross-attentions. `lora.` holds what FaceID trained into the base model's attentions.
IP_ADAPTER: Rules = (
    (r"image_proj\.(.+)", r"projector.\1"),
    (r"(?:ip_adapter|adapter_modules)\.(\d+)\.to_([kv])_ip\.weight", r"layers.\1.\2.weight"),
    (r"(?:ip_adapter|adapter_modules)\.(\d+)\.to_(q|k|v|out)_lora\.(down|up)\.weight", r"lora.\1.\2.\3"),
)


def rename(tensors: Mapping[str, Tensor], rules: Rules) -> dict[str, Tensor]:
    """Give every tensor the name of the first rule that matches its whole key.

    Raises ValueError where no rule matches, or where two keys would get the same name.
    """
    out: dict[str, Tensor] = {}
    for key, value in tensors.items():
        matches = ((re.fullmatch(pattern, key), name) for pattern, name in rules)
        new = next((match.expand(name) for match, name in matches if match), None)
        if new is None:
            raise ValueError(f"got the key {key!r}, which no table of this pack knows; expected an adapter's")
        if new in out:
            raise ValueError(
                f"got two keys for {new!r}, one of them {key!r}; expected each once: the file mixes two layouts"
            )
        out[new] = value
    return out


def under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors below a prefix, without it."""
    return {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}


def load(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give a module all of its tensors, or raise ValueError naming the keys that are missing, unknown or misshapen."""
    expected = module.state_dict()
    missing, unexpected = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    misshapen = [
        f"{key} {list(tensors[key].shape)} for {list(value.shape)}"
        for key, value in expected.items()
        if key in tensors and tensors[key].shape != value.shape
    ]
    for what, keys in (("misses", missing), ("has unknown", unexpected), ("has misshapen", misshapen)):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise ValueError(
                f"the file {what} {', '.join(keys[:3])}{more}; expected every tensor of a {type(module).__name__}, once"
            )
    module.load_state_dict(dict(tensors), strict=True, assign=True)
