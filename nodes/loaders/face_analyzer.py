"""Load Face Analyzer: a face detector and a recognizer from a folder on disk. Downloads nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

from comfy_api.latest import io
from torch import Tensor

from ...likeness.faces.recognizers import PUBLISHED_RECOGNIZERS, name_recognizer
from ...likeness.spec import Face, Feature
from .. import types
from . import files, insightface_networks, open_face_networks

NO_MODEL_PACK = "none found"
CPU_PROVIDER = "CPUExecutionProvider"

# Choice -> onnxruntime providers, best first, and the package that provides them.
EXECUTION_PROVIDERS: dict[str, tuple[tuple[str, ...], str]] = {
    "cpu": ((CPU_PROVIDER,), "onnxruntime"),
    "cuda": (("CUDAExecutionProvider",), "onnxruntime-gpu"),
    "rocm": (("MIGraphXExecutionProvider", "ROCMExecutionProvider"), "onnxruntime-migraphx"),
    "coreml": (("CoreMLExecutionProvider",), "onnxruntime (on a Mac)"),
    "directml": (("DmlExecutionProvider",), "onnxruntime-directml"),
    "openvino": (("OpenVINOExecutionProvider",), "onnxruntime-openvino"),
}
AUTO_PROVIDER_ORDER = ("cuda", "rocm", "coreml", "directml", "openvino", "cpu")


class FaceDetector(Protocol):
    """Detects faces; photos are uint8 RGB [H, W, 3]. `session` is onnxruntime's, or None if another library runs it."""

    @property
    def name(self) -> str: ...

    @property
    def session(self) -> Any: ...

    def detect(self, photo: Tensor, size: int) -> list[Face]: ...


class FaceRecognizer(Protocol):
    """Computes ArcFace vectors [512]; photos are uint8 RGB [H, W, 3]. `session` is onnxruntime's."""

    @property
    def path(self) -> Path: ...

    @property
    def session(self) -> Any: ...

    def embed(self, photo: Tensor, face: Face) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class FaceAnalyzer:
    """Detects faces and computes ArcFace vectors (types.FaceAnalyzerProtocol).

    `network` names the recognizer as encoder ids do, `arcface.<pack>`; `sha256` is the hash of its file.
    """

    network: str
    sha256: str
    detector: FaceDetector
    recognizer: FaceRecognizer

    @property
    def feature(self) -> Feature:
        return Feature(self.network, "raw", "face112")

    def detect(self, photo: Tensor, size: int) -> list[Face]:
        return self.detector.detect(photo, size)

    def embed(self, photo: Tensor, face: Face) -> Tensor:
        return self.recognizer.embed(photo, face)


def list_model_packs() -> dict[str, Path]:
    """The model packs on disk by folder name, including packs unzipped into a subfolder of the same name."""
    packs: dict[str, Path] = {}
    for root in files.list_folder_paths("insightface"):
        for folder in sorted(path for path in (root / "models").glob("*") if path.is_dir()):
            path = next((path for path in (folder, folder / folder.name) if any(path.glob("*.onnx"))), None)
            if path is not None:
                packs.setdefault(folder.name, path)
    return packs


def find_model_pack(name: str) -> Path:
    """The folder of a model pack. Raises ValueError if it is missing."""
    packs = list_model_packs()
    if name not in packs:
        target = files.list_folder_paths("insightface")[0] / "models"
        raise ValueError(
            f"got the model pack {name!r}; found {', '.join(packs) or 'no model packs'}; "
            f"put the folder with its .onnx files (buffalo_l, antelopev2) into {target} and press R to refresh"
        )
    return packs[name]


def load_face_analyzer(name: str, provider: str) -> tuple[FaceAnalyzer, str]:
    """Load a model pack, with a report. Raises ValueError if the pack or the provider is not available."""
    return open_model_pack(find_model_pack(name), provider)


def open_model_pack(folder: Path, provider: str) -> tuple[FaceAnalyzer, str]:
    """Load a model pack from any folder of .onnx files, whose name is the pack's."""
    try:
        import onnxruntime

        requested = _select_providers(provider, onnxruntime.get_available_providers())
        detector, recognizer = _load_networks(folder, requested, fall_back_to_cpu=provider == "auto")
    except ImportError as error:
        raise ValueError(
            f"could not import the libraries that run face networks ({error}); expected insightface 2 or newer and "
            "onnxruntime; run pip install -r requirements.txt in this pack's folder with ComfyUI's Python"
        ) from error
    running = _get_running_providers(provider, requested, detector, recognizer)
    path = recognizer.path
    sha256 = files.hash_file(path)
    network = f"arcface.{name_recognizer(folder.name, path.name, sha256)}"
    analyzer = FaceAnalyzer(network, sha256, detector, recognizer)
    names = f"detector {detector.name}, recognizer {path.name} ({network})"
    lines = [f"{folder.name}: {names}, on {running}."]
    if requested[0] not in running:  # only with auto
        lines.append(f"Warning: {requested[0]} is available but did not start, which is slower; check the driver.")
    if sha256 not in PUBLISHED_RECOGNIZERS:
        lines.append(f"{path.name} is none of the published files that this pack knows: named after its folder.")
    return analyzer, "\n".join([*lines, *_warn_about_duplicate_onnxruntime()])


def _load_networks(
    folder: Path, requested: Sequence[str], fall_back_to_cpu: bool
) -> tuple[FaceDetector, FaceRecognizer]:
    """A folder's detector and recognizer on the requested providers, optionally on the CPU if those fail.

    Raises ValueError if a file is damaged or missing, and ImportError.
    """
    load_networks = (
        insightface_networks.load_insightface_networks
        if open_face_networks.is_insightface_pack(folder)
        else open_face_networks.load_open_face_networks
    )
    first_error: Exception | None = None
    for providers in (requested, [CPU_PROVIDER]) if fall_back_to_cpu else (requested,):
        try:
            return load_networks(folder, list(dict.fromkeys((*providers, CPU_PROVIDER))))
        except ImportError:
            raise
        except Exception as error:
            first_error = first_error or error
    names = ", ".join(path.name for path in sorted(folder.glob("*.onnx")))
    reason = (str(first_error) or "no detector among them").splitlines()[0][:240]
    raise ValueError(
        f"got the model pack {folder.name} with {names}, which cannot be loaded ({reason}); expected a detector and an "
        "ArcFace recognizer; a file may be cut short: unpack the pack again"
    ) from first_error


def _select_providers(provider: str, available: Sequence[str]) -> list[str]:
    """The onnxruntime providers to request. Raises ValueError if none of them is available."""
    choices = AUTO_PROVIDER_ORDER if provider == "auto" else (provider,)
    requested = [name for choice in choices for name in EXECUTION_PROVIDERS[choice][0] if name in available]
    if not requested:
        raise ValueError(
            f"got provider {provider}; this onnxruntime has {', '.join(available)}; "
            f"install {EXECUTION_PROVIDERS[provider][1]} in place of the installed onnxruntime, or choose auto"
        )
    return requested


def _get_running_providers(provider: str, requested: Sequence[str], *networks: FaceDetector | FaceRecognizer) -> str:
    """The providers that are in use. Raises ValueError if onnxruntime silently fell back from the chosen one."""
    running = [network.session.get_providers()[0] for network in networks if network.session is not None]
    fallback = next((name for name in running if provider != "auto" and name not in requested), None)
    if fallback is not None:
        raise ValueError(
            f"got provider {provider}, but onnxruntime fell back to {fallback}; expected {', '.join(requested)}; "
            f"check the driver and {EXECUTION_PROVIDERS[provider][1]}, or choose auto or cpu"
        )
    return ", ".join(dict.fromkeys(running))


def _warn_about_duplicate_onnxruntime() -> list[str]:
    """A warning if several builds of onnxruntime are installed and overwrite each other's files."""
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
            description="Loads a model pack that detects faces and computes face embeddings: insightface's for FaceID, "
            "InstantID and PuLID, or another detector and ArcFace network. The report shows the networks and the "
            "provider in use.",
            search_aliases=["insightface", "buffalo", "antelope", "arcface", "yunet", "mtcnn"],
            inputs=[
                io.Combo.Input(
                    "model_pack",
                    options=list(list_model_packs()) or [NO_MODEL_PACK],
                    tooltip="Folder of .onnx files in models/insightface/models. FaceID and Portrait need buffalo_l; "
                    "InstantID and PuLID need antelopev2. Also any ArcFace network of 112 pixels, with YuNet beside "
                    "it or facenet-pytorch's MTCNN.",
                ),
                io.Combo.Input(
                    "provider",
                    options=["auto", *EXECUTION_PROVIDERS],
                    default="auto",
                    tooltip="The onnxruntime provider. auto uses the fastest one available. Any other choice is an "
                    "error if it is not available.",
                ),
            ],
            outputs=[
                types.FaceAnalyzerSocket.Output(display_name="face_analyzer"),
                io.String.Output(display_name="report", tooltip="The networks and the provider in use."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, model_pack: str, provider: str) -> list[tuple[int, int]]:
        return [files.get_file_signature(path) for path in sorted(find_model_pack(model_pack).glob("*.onnx"))]

    @classmethod
    def execute(cls, model_pack: str, provider: str) -> io.NodeOutput:
        return io.NodeOutput(*load_face_analyzer(model_pack, provider))


NODES = [LoadFaceAnalyzer]
