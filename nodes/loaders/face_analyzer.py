"""Load Face Analyzer: insightface's detector and recogniser from a model pack on disk. Nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ...likeness.spec import Face, Feature
from .. import types
from . import files

NONE_FOUND = "none found"
CPU = "CPUExecutionProvider"

# What each choice means to onnxruntime, best first, and the package that brings it.
PROVIDERS: dict[str, tuple[tuple[str, ...], str]] = {
    "cpu": ((CPU,), "onnxruntime"),
    "cuda": (("CUDAExecutionProvider",), "onnxruntime-gpu"),
    "rocm": (("MIGraphXExecutionProvider", "ROCMExecutionProvider"), "onnxruntime-migraphx"),
    "coreml": (("CoreMLExecutionProvider",), "onnxruntime (on a Mac)"),
    "directml": (("DmlExecutionProvider",), "onnxruntime-directml"),
    "openvino": (("OpenVINOExecutionProvider",), "onnxruntime-openvino"),
}
AUTO = ("cuda", "rocm", "coreml", "directml", "openvino", "cpu")

# Several packs share a recogniser, and packs get renamed: the network is named by its file where that is known.
RECOGNISERS = {
    "w600k_r50.onnx": "buffalo_l", "glintr100.onnx": "antelopev2", "w600k_mbf.onnx": "buffalo_s",
    "arcface.onnx": "arc2face",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class FaceAnalyzer:
    """What goes through LIKENESS_FACE_ANALYZER: finds faces and makes ArcFace vectors.

    `network` names the recogniser as in encoder ids, `arcface.<pack>`; `sha256` is its file's.
    """

    network: str
    sha256: str
    detector: Any
    recogniser: Any

    @property
    def feature(self) -> Feature:
        return Feature(self.network, "raw", "face112")

    def detect(self, photo: Tensor, size: int) -> list[Face]:
        """The faces of a photo, uint8 RGB [H, W, 3], seen by the detector at `size` pixels."""
        boxes, points = self.detector.detect(_bgr(photo), input_size=(size, size))
        if points is None:
            raise ValueError(
                "got a detector without key points; expected one with five; choose buffalo_l or antelopev2"
            )
        return [
            Face(torch.from_numpy(box[:4].copy()).float(), torch.from_numpy(kps.copy()).float(), float(box[4]))
            for box, kps in zip(boxes, points, strict=True)
        ]

    def embed(self, photo: Tensor, face: Face) -> Tensor:
        """The raw ArcFace vector [512] of a face of a photo, uint8 RGB [H, W, 3], on insightface's own crop."""
        from insightface.utils import face_align

        crop = face_align.norm_crop(_bgr(photo), face.kps.numpy(), self.recogniser.input_size[0])
        return torch.from_numpy(self.recogniser.get_feat(crop).flatten().copy()).float()


def _bgr(photo: Tensor) -> Any:
    return photo.flip(-1).contiguous().numpy()


def packs() -> dict[str, Path]:
    """The model packs on disk, by the name of their folder; a pack unzipped into itself counts as one."""
    found: dict[str, Path] = {}
    for root in files.roots("insightface"):
        for folder in sorted(path for path in (root / "models").glob("*") if path.is_dir()):
            place = next((p for p in (folder, folder / folder.name) if any(p.glob("*.onnx"))), None)
            if place is not None:
                found.setdefault(folder.name, place)
    return found


def pack(name: str) -> Path:
    """Where a model pack lies. Raises ValueError saying where to put one."""
    there = packs()
    if name not in there:
        place = files.roots("insightface")[0] / "models"
        raise ValueError(
            f"got the model pack {name!r}; expected one of {', '.join(there) or 'none that is there'}; "
            f"put the folder of .onnx files (buffalo_l, antelopev2) into {place} and press R"
        )
    return there[name]


def load(name: str, provider: str) -> tuple[FaceAnalyzer, str]:
    """A model pack on a provider, and the report. Raises ValueError where either is not to be had."""
    return open_pack(pack(name), provider)


def open_pack(folder: Path, provider: str) -> tuple[FaceAnalyzer, str]:
    """The same of a folder of .onnx files anywhere; its name is the pack's."""
    try:
        import onnxruntime
        from insightface.app import FaceAnalysis
    except ImportError as error:
        raise ValueError(
            f"got no insightface ({error}); expected insightface 2 or newer beside ComfyUI; "
            "run pip install -r requirements.txt in this pack's folder with ComfyUI's Python"
        ) from error
    wanted = _wanted(provider, onnxruntime.get_available_providers())
    detector, recogniser = _start(FaceAnalysis, folder, wanted, spare=provider == "auto")
    used = _used(provider, wanted, detector, recogniser)
    path = Path(recogniser.model_file)
    network = f"arcface.{RECOGNISERS.get(path.name, folder.name.lower())}"
    analyzer = FaceAnalyzer(network, files.sha256(path), detector, recogniser)
    names = f"detector {Path(detector.model_file).name}, recogniser {path.name} ({network})"
    lines = [f"{folder.name}: {names}, on {used}."]
    if wanted[0] not in used:  # only auto comes here
        lines.append(f"Warning: onnxruntime offers {wanted[0]}, but it did not start; check the driver for more speed.")
    return analyzer, "\n".join([*lines, *_both_packages()])


def _start(analysis: Callable[..., Any], folder: Path, wanted: Sequence[str], spare: bool) -> tuple[Any, Any]:
    """A pack's detector and recogniser on these providers, or with `spare` on the CPU where those break.

    Raises ValueError where a file is broken or missing.
    """
    failed: Exception | None = None
    for providers in (wanted, [CPU]) if spare else (wanted,):
        try:
            names = list(dict.fromkeys((*providers, CPU)))
            app = analysis(str(folder), allowed_modules=["detection", "recognition"], providers=names)
            app.prepare(ctx_id=0, det_size=(640, 640))
            return app.models["detection"], app.models["recognition"]
        except Exception as error:
            failed = failed or error
    there = ", ".join(path.name for path in sorted(folder.glob("*.onnx")))
    known = {"": "no detector among them", "'recognition'": "no recogniser among them"}
    why = known.get(str(failed)) or str(failed).splitlines()[0][:160]
    raise ValueError(
        f"got the model pack {folder.name} with {there}, which cannot be loaded ({why}); expected a detector and an "
        "ArcFace recogniser; one may be cut short: unpack the pack again"
    ) from failed


def _wanted(provider: str, available: Sequence[str]) -> list[str]:
    """The onnxruntime providers to ask for. Raises ValueError where it has none of them."""
    choices = AUTO if provider == "auto" else (provider,)
    wanted = [name for choice in choices for name in PROVIDERS[choice][0] if name in available]
    if not wanted:
        raise ValueError(
            f"got provider {provider}; onnxruntime here has {', '.join(available)}; "
            f"install {PROVIDERS[provider][1]} in place of the present onnxruntime, or choose auto"
        )
    return wanted


def _used(provider: str, wanted: Sequence[str], *models: Any) -> str:
    """The provider that really runs. Raises ValueError where onnxruntime left the chosen one without saying so."""
    used = [model.session.get_providers()[0] for model in models]
    fallen = next((name for name in used if provider != "auto" and name not in wanted), None)
    if fallen is not None:
        raise ValueError(
            f"got provider {provider}, but onnxruntime fell back to {fallen}; expected {', '.join(wanted)}; "
            f"check the driver and {PROVIDERS[provider][1]}, or choose auto or cpu"
        )
    return ", ".join(dict.fromkeys(used))


def _both_packages() -> list[str]:
    """A warning where two builds of onnxruntime overwrite each other's files."""
    names = {(dist.metadata["Name"] or "").lower() for dist in metadata.distributions()}
    builds = sorted(name for name in names if name == "onnxruntime" or name.startswith("onnxruntime-"))
    if len(builds) < 2:
        return []
    keep = next(name for name in builds if name != "onnxruntime")
    return [
        f"Warning: {' and '.join(builds)} are installed together and overwrite each other. "
        f"Keep one: pip uninstall -y {' '.join(builds)}, then pip install {keep}."
    ]


class LoadFaceAnalyzer(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LikenessLoadFaceAnalyzer",
            display_name="Load Face Analyzer",
            category="likeness/loaders",
            description="Loads an insightface model pack: finds faces and makes the vectors that FaceID and InstantID "
            "read. The report says on what it really runs.",
            search_aliases=["insightface", "buffalo", "antelope", "arcface"],
            inputs=[
                io.Combo.Input(
                    "model_pack",
                    options=list(packs()) or [NONE_FOUND],
                    tooltip="Folder in models/insightface/models. FaceID and Portrait need buffalo_l, "
                    "InstantID antelopev2.",
                ),
                io.Combo.Input(
                    "provider",
                    options=["auto", *PROVIDERS],
                    default="auto",
                    tooltip="What the networks run on. auto takes the best there is; any other choice is an error "
                    "where it is not to be had.",
                ),
            ],
            outputs=[
                types.FaceAnalyzer.Output(display_name="face_analyzer"),
                io.String.Output(display_name="report", tooltip="Which networks run, and on what."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, model_pack: str, provider: str) -> list[tuple[int, int]]:
        return [files.signature(path) for path in sorted(pack(model_pack).glob("*.onnx"))]

    @classmethod
    def execute(cls, model_pack: str, provider: str) -> io.NodeOutput:
        return io.NodeOutput(*load(model_pack, provider))


NODES = [LoadFaceAnalyzer]
