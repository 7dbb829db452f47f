"""`python -m training.ship`: copies what the configs for two cores have trained to its place in weights/."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RUNS, WEIGHTS = ROOT / "artifacts" / "training" / "two_cores", ROOT / "weights"
LIMIT = 40_000_000  # bytes in all, so that a clone stays small
# A finished run's file -> its folder in weights/; what is only there to be compared stays where it is.
PLACES: Mapping[str, str] = {
    "vae/model/vae.safetensors": "demo",
    "clip/model/text.safetensors": "demo",
    "clip/model/vision.safetensors": "demo",
    "unet/model/unet.safetensors": "demo",
    "judge/model/judge.onnx": "demo",
    "recogniser/model/recogniser.onnx": "insightface/models/demo",
    "detector/model/detector.onnx": "insightface/models/demo",
    "decoupled_arcface/model/demo_faceid.safetensors": "ipadapter",
    "decoupled_image/model/demo_plus_face.safetensors": "ipadapter",
    "fused/model/demo_fused.safetensors": "likeness",
    "infinite_id/model/demo_infinite_id.safetensors": "likeness",
    "omni_flow/model/omni_id.safetensors": "likeness",
    "omni_adapter/model/demo_omni_id.safetensors": "likeness",
    "arc2face/model/demo_arc2face.safetensors": "likeness",
    "adaface_compose/model/demo_adaface.safetensors": "likeness",
    "flashface/model/demo_flashface.safetensors": "likeness",
}


def found(runs: Path) -> dict[str, Path]:
    """The finished files, by their place in weights/."""
    files = {runs / name: folder for name, folder in PLACES.items()}
    return {f"{folder}/{file.name}": file for file, folder in files.items() if file.is_file()}


def ship(runs: Path, weights: Path) -> list[str]:
    """Copy them; a line for each file of weights/, with its size, and one for all.

    Raises ValueError, and copies nothing, where these would be too large together.
    """
    new = found(runs)
    there = {file.relative_to(weights).as_posix(): file for file in weights.rglob("*") if file.is_file()}
    sizes = {place: file.stat().st_size for place, file in (there | new).items()}
    total = sum(sizes.values())
    if total > LIMIT:
        raise ValueError(f"got {total / 1e6:.1f} MB of weights; expected at most {LIMIT / 1e6:.0f}; train smaller ones")
    for place, file in new.items():
        (weights / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, weights / place)
    lines = [f"{size / 1e6:6.2f} MB  {place}{' (new)' * (place in new)}" for place, size in sorted(sizes.items())]
    return [*lines, f"{total / 1e6:6.2f} MB  in all"]


def main() -> int:
    try:
        lines = ship(RUNS, WEIGHTS)
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
