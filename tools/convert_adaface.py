"""`python -m tools.convert_adaface IN.pt OUT.safetensors`: converts an AdaFace checkpoint to the native format.

The published checkpoints are pickles, which could run code; nothing in them is executed. Run it with ComfyUI's Python,
or any Python with torch and safetensors.
"""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

USAGE = "usage: python -m tools.convert_adaface IN.pt OUT.safetensors"


def convert_checkpoint(source: Path, target: Path) -> str:
    """Write `target` atomically, and return a summary. Raises ValueError where `source` is not such a checkpoint."""
    from dataclasses import replace

    import torch
    from safetensors.torch import load_file, save_file

    from likeness.checkpoints import adaface_checkpoint
    from likeness.methods import adaface

    if target.suffix != ".safetensors" or target.exists():
        raise ValueError(f"got {target} to write to; expected a new file with the suffix .safetensors; choose another")
    tensors, spec = adaface_checkpoint.read_adaface_checkpoint(source)
    notes = {**spec.notes, "sha256": hashlib.sha256(source.read_bytes()).hexdigest()}
    spec = replace(spec, notes=notes)
    part_file = target.with_name(f".part.{target.name}")
    try:
        save_file(tensors, part_file, adaface.make_adaface_metadata(spec))
        module = adaface.build_prompt_inverter(load_file(part_file), spec, torch.nn, source.name)
        os.replace(part_file, target)
    finally:
        part_file.unlink(missing_ok=True)
    copies = ", ".join(str(layer.self_attn.num_copies) for layer in module.text.layers)
    return f"{target}: {len(tensors)} tensors; keys and values {copies} times as wide, layer by layer"


def main(arguments: list[str]) -> int:
    if len(arguments) != 2:
        print(USAGE, file=sys.stderr)
        return 2
    try:
        print(convert_checkpoint(Path(arguments[0]), Path(arguments[1])))
    except ImportError as error:
        print(f"error: {error}; run this with ComfyUI's Python", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
