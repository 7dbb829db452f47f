"""`python -m portrait_world.publish_weights` copies the weights of finished runs into weights/."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RUNS_FOLDER, WEIGHTS_FOLDER = ROOT / "artifacts" / "portrait_world", ROOT / "weights"
MAX_TOTAL_BYTES = 40_000_000  # of weights/, so that a clone stays small
# A finished run's file -> its folder in weights/. Runs for comparisons are not published.
PUBLISHED_FILES: Mapping[str, str] = {
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


def find_finished_files(runs: Path) -> dict[str, Path]:
    """The finished files by their path in weights/."""
    files = {runs / name: folder for name, folder in PUBLISHED_FILES.items()}
    return {f"{folder}/{file.name}": file for file, folder in files.items() if file.is_file()}


def copy_finished_weights(runs: Path, weights: Path) -> list[str]:
    """Copy the finished files. Returns a line with the size of each file in weights/, and one with the total.

    Raises ValueError, and copies nothing, if the total would be too large.
    """
    new = find_finished_files(runs)
    existing = {file.relative_to(weights).as_posix(): file for file in weights.rglob("*") if file.is_file()}
    sizes = {path: file.stat().st_size for path, file in (existing | new).items()}
    total = sum(sizes.values())
    if total > MAX_TOTAL_BYTES:
        raise ValueError(
            f"got {total / 1e6:.1f} MB of weights; expected at most {MAX_TOTAL_BYTES / 1e6:.0f}; train smaller ones"
        )
    for path, file in new.items():
        (weights / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, weights / path)
    lines = [f"{size / 1e6:6.2f} MB  {path}{' (new)' * (path in new)}" for path, size in sorted(sizes.items())]
    return [*lines, f"{total / 1e6:6.2f} MB  in total"]


def main() -> int:
    try:
        lines = copy_finished_weights(RUNS_FOLDER, WEIGHTS_FOLDER)
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
