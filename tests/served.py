"""One real server for the session, with this pack, stand-in models and real photos: a plugin of fixtures."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from comfyui_likeness.tools import demo, host, photos, standins
from comfyui_likeness.tools.server import Server, serve


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server on the host of COMFYUI_PATH; its stand-in models stay in `.host/base` for the next session."""
    found = host.Host(Path(os.environ["COMFYUI_PATH"]), Path(sys.executable), ours=False)
    base = host.HOME / "base"
    photos.make(base / "input")
    standins.make(base, sorted({file for name in demo.names() for file in demo.files(demo.read(name))}))
    with serve(found, base, output=tmp_path_factory.mktemp("output")) as running:
        yield running


@pytest.fixture(scope="session")
def info(server: Server, library: dict[str, Any]) -> dict[str, Any]:
    """What the server says of its nodes, once there are identities to choose from."""
    return server.object_info()


@pytest.fixture(scope="session")
def library(server: Server) -> dict[str, Any]:
    """The identities that identity_library_use reads, made by identity_library_make: the run's history entry."""
    for name in ("anna", "bert"):
        (server.base / "models" / "identities" / f"{name}.safetensors").unlink(missing_ok=True)
    return server.queue(demo.read("identity_library_make"))
