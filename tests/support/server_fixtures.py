"""Fixtures: one ComfyUI server for the session, with this pack, stand-in models and sample photos."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from comfyui_likeness.tools import demo, host, sample_photos
from comfyui_likeness.tools.server import Server, start_server
from comfyui_likeness.tools.standins import build


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of the ComfyUI of COMFYUI_PATH; its stand-in models stay in `.host/base` for the next session."""
    comfyui = host.Host(Path(os.environ["COMFYUI_PATH"]), Path(sys.executable), managed=False)
    base = host.HOST_FOLDER / "base"
    sample_photos.write_sample_photos(base / "input")
    names = {file for name in demo.list_workflows() for file in demo.list_model_files(demo.read_prompt(name))}
    build.write_standins(base, sorted(names))
    with start_server(comfyui, base, output_directory=tmp_path_factory.mktemp("output")) as running:
        yield running


@pytest.fixture(scope="session")
def info(server: Server, library: dict[str, Any]) -> dict[str, Any]:
    """The server's node definitions, after the identities have been saved."""
    return server.get_object_info()


@pytest.fixture(scope="session")
def library(server: Server) -> dict[str, Any]:
    """Save the identities that identity_library_use loads; the history entry of identity_library_make."""
    for name in ("anna", "bert"):
        (server.base_directory / "models" / "identities" / f"{name}.safetensors").unlink(missing_ok=True)
    return server.run_prompt(demo.read_prompt("identity_library_make"))
