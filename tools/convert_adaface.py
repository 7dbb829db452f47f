"""`python -m tools.convert_adaface IN.pt OUT.safetensors`: an AdaFace checkpoint as a file that this pack loads.

The published checkpoints are pickled programs; nothing in them is run. Start it with ComfyUI's Python, or with any that
has torch and safetensors.
"""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

USAGE = "usage: python -m tools.convert_adaface IN.pt OUT.safetensors"


def convert(source: Path, target: Path) -> str:
    """Write `target`, whole or not at all, and say what it holds. Raises ValueError where `source` is no such file."""
    from dataclasses import replace

    import torch
    from safetensors.torch import load_file, save_file

    from likeness import adaface, adaface_checkpoint

    if target.suffix != ".safetensors" or target.exists():
        raise ValueError(f"got {target} to write to; expected a new file of the name *.safetensors; choose another")
    tensors, spec = adaface_checkpoint.read(source)
    notes = {**spec.notes, "sha256": hashlib.sha256(source.read_bytes()).hexdigest()}
    spec = replace(spec, notes=notes)
    part = target.with_name(f".part.{target.name}")
    try:
        save_file(tensors, part, adaface.metadata(spec))
        module = adaface.build(load_file(part), spec, torch.nn, source.name)
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
    copies = ", ".join(str(layer.self_attn.copies) for layer in module.text.layers)
    return f"{target}: {len(tensors)} tensors; keys and values {copies} times as wide, layer by layer"


def main(words: list[str]) -> int:
    if len(words) != 2:
        print(USAGE, file=sys.stderr)
        return 2
    try:
        print(convert(Path(words[0]), Path(words[1])))
    except ImportError as error:
        print(f"error: {error}; run this with ComfyUI's Python", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
