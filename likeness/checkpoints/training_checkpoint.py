"""Checkpoints of an adapter's training run: the adapter's tensors under their published names, without the rest.

IP-Adapter's training scripts save the UNet with the adapter in it. A tensor that several modules share is stored under
one name or all of them: `adapter_modules.<n>.`, as published, or the attention processor's path in diffusers' UNet.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

WRAPPER_NAMES = ("module", "_orig_mod")  # of DistributedDataParallel and torch.compile, at any depth
CONTAINER_PREFIX = re.compile(r"^(?:(?:model|state_dict)\.)+")
# Networks that the adapter was trained with, and the state of the training loop. A LoRA in one of them is a part of the
# adapter that the pack does not know.
TRAINING_STATE = re.compile(
    r"(unet|vae|text_encoder\w*|image_encoder|optimizer\w*|lr_scheduler\w*|scheduler|scaler)\.(?!.*lora).*"
)
PROCESSOR_TENSOR = re.compile(
    r"(?:unet\.)?(?P<block>(?:down_blocks|up_blocks|mid_block)\..*transformer_blocks\.\d+)\.attn(?P<attention>[12])"
    r"\.processor\.(?P<name>to_(?:[kv]_ip|(?:q|k|v|out)_lora\.(?:down|up)))(?:\.0)?\.weight"
)
UNET_STAGES = ("down_blocks", "up_blocks", "mid_block")  # in the order in which published files count


def extract_adapter_tensors(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of an adapter, and the names of the parts of the checkpoint that were left out.

    A file that holds nothing but an adapter is returned as it is. Counters, such as the step, are left out without
    mention. Raises ValueError if two keys have one name without the wrappers around the modules.
    """
    unwrapped: dict[str, Tensor] = {}
    for key, value in tensors.items():
        name = _remove_wrappers(key)
        if name in unwrapped:
            raise ValueError(f"save the checkpoint anew: got two keys for {name!r}, one of them {key!r}; expected one")
        if not _is_counter(value):
            unwrapped[name] = value
    numbers = _number_blocks(unwrapped)
    out: dict[str, Tensor] = {}
    left_out: list[str] = []
    for key, value in unwrapped.items():
        match, state = PROCESSOR_TENSOR.fullmatch(key), TRAINING_STATE.fullmatch(key)
        if match:
            number = 2 * numbers[match["block"]] + int(match["attention"]) - 1
            if f"adapter_modules.{number}.{match['name']}.weight" not in unwrapped:
                out[f"adapter_modules.{number}.{match['name']}.weight"] = value
        elif state:
            left_out.append(state[1])
        else:
            out[key] = value
    return out, list(dict.fromkeys(left_out))


def _remove_wrappers(key: str) -> str:
    return CONTAINER_PREFIX.sub("", ".".join(part for part in key.split(".") if part not in WRAPPER_NAMES))


def _is_counter(value: Tensor) -> bool:
    return value.ndim == 0 or (value.numel() == 1 and not value.is_floating_point())


def _number_blocks(keys: Iterable[str]) -> dict[str, int]:
    """The position of each transformer block with an attention processor, counted as in published files."""

    def sort_key(block: str) -> tuple[int, list[int]]:
        return UNET_STAGES.index(block.partition(".")[0]), [int(number) for number in re.findall(r"\d+", block)]

    blocks = {match["block"] for match in map(PROCESSOR_TENSOR.fullmatch, keys) if match}
    return {block: i for i, block in enumerate(sorted(blocks, key=sort_key))}
