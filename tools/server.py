"""A real ComfyUI server with this pack as its custom node, and a small client for it."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .host import ROOT, Host, environment

PACK = "ComfyUI-Likeness"
LEFT_OUT = (".git", ".host", ".venv", "venv", "artifacts", "tests", "__pycache__")
# A proxy that the environment names is not for this machine itself.
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
QUIET = ("--disable-auto-launch", "--disable-api-nodes", "--database-url", "sqlite:///:memory:")


class ServerError(RuntimeError):
    """The server died, refused a prompt, or a node raised. `details` is what it answered."""

    def __init__(self, message: str, details: Any = None) -> None:
        super().__init__(message)
        self.details = details


class Server:
    """A running server. Paths of `base` are on this machine; `url` is where a browser finds it."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, base: Path, output: Path, log: Path) -> None:
        self.process, self.base, self.output, self.log = process, base, output, log
        self.url = f"http://127.0.0.1:{port}"

    def get(self, path: str) -> Any:
        """The JSON at `path`, such as `/system_stats`."""
        return self._answer(urllib.request.Request(self.url + path))

    def post(self, path: str, data: object) -> Any:
        """What the server answers to JSON at `path`. Raises ServerError where it refuses."""
        body = json.dumps(data).encode()
        return self._answer(urllib.request.Request(self.url + path, body, {"Content-Type": "application/json"}))

    def object_info(self) -> dict[str, Any]:
        """Every node that the server knows: id -> inputs, outputs, texts."""
        return self.get("/object_info")

    def submit(self, prompt: dict[str, Any]) -> str:
        """Queue an API prompt; its id. Raises ServerError with the nodes' errors where it is not valid."""
        answer = self.post("/prompt", {"prompt": prompt})
        if answer.get("node_errors"):  # the server runs the outputs that are valid, and says so nowhere else
            raise ServerError("the server refused a part of the prompt", answer["node_errors"])
        return answer["prompt_id"]

    def wait(self, prompt_id: str, timeout: float = 1800) -> dict[str, Any]:
        """The history entry of a queued prompt once it is done, however it ended."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            self.check()
            history = self.get(f"/history/{prompt_id}")
            if prompt_id in history:
                return history[prompt_id]
            time.sleep(0.1)
        raise ServerError(f"the prompt did not end within {timeout:g} s\n{self.tail()}")

    def queue(self, prompt: dict[str, Any], timeout: float = 1800) -> dict[str, Any]:
        """Run an API prompt; its history entry. Raises ServerError where it is refused, fails or is interrupted."""
        entry = self.wait(self.submit(prompt), timeout)
        for kind, message in entry["status"]["messages"]:
            if kind == "execution_error":
                node = f"node {message['node_id']} ({message['node_type']})"
                raise ServerError(f"{node}: {message['exception_message'].strip()}", message)
            if kind == "execution_interrupted":
                raise ServerError("the prompt was interrupted", message)
        return entry

    def files(self, entry: dict[str, Any]) -> list[Path]:
        """The files that a history entry's nodes wrote, previews included, in the order of the nodes."""
        roots = {"output": self.output, "temp": self.base / "temp", "input": self.base / "input"}
        found = []
        for result in entry["outputs"].values():
            for items in result.values():
                for item in items if isinstance(items, list) else ():
                    if isinstance(item, dict) and item.get("type") in roots and "filename" in item:
                        found.append(roots[item["type"]] / item.get("subfolder", "") / item["filename"])
        return found

    def upload_image(self, file: Path, name: str | None = None) -> str:
        """Put a picture among the server's inputs, over one of the same name; the name that LoadImage takes."""
        mark = uuid.uuid4().hex
        head = f'--{mark}\r\nContent-Disposition: form-data; name="'
        picture = f'{head}image"; filename="{name or file.name}"\r\nContent-Type: application/octet-stream\r\n\r\n'
        end = f'\r\n{head}overwrite"\r\n\r\ntrue\r\n--{mark}--\r\n'
        body = picture.encode() + file.read_bytes() + end.encode()
        kind = {"Content-Type": f"multipart/form-data; boundary={mark}"}
        return self._answer(urllib.request.Request(f"{self.url}/upload/image", body, kind))["name"]

    def interrupt(self) -> None:
        """Stop the prompt that runs now."""
        self.post("/interrupt", {})

    def check(self) -> None:
        """Raises ServerError with the end of the log where the server has died."""
        if self.process.poll() is not None:
            raise ServerError(f"the server ended with code {self.process.returncode}; its log says\n{self.tail()}")

    def tail(self, lines: int = 40) -> str:
        """The last lines of the server's log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def _answer(self, request: urllib.request.Request) -> Any:
        try:
            with DIRECT.open(request, timeout=600) as answer:
                return json.loads(answer.read() or b"null")
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace")
            details = json.loads(text) if text.startswith("{") else text
            raise ServerError(f"{request.selector}: {error.code}: {explain(details)}", details) from error
        except OSError as error:
            self.check()
            raise ServerError(f"{request.selector}: {error}") from error


def explain(details: Any) -> str:
    """A refused prompt's errors as lines: node, its class, what is wrong."""
    if not isinstance(details, dict) or "node_errors" not in details:
        return str(details)
    lines = [str((details.get("error") or {}).get("message", "refused"))]
    for node, found in (details["node_errors"] or {}).items():
        lines += [
            f"  node {node} ({found['class_type']}): {one['message']}: {one['details']}" for one in found["errors"]
        ]
    return "\n".join(lines)


@contextmanager
def serve(
    host: Host,
    base: Path,
    *,
    cpu: bool = True,
    output: Path | None = None,
    options: Sequence[str] = (),
    timeout: float = 300,
) -> Iterator[Server]:
    """Start a server whose models, inputs, outputs and custom nodes are under `base`; it ends with the block.

    Raises ServerError with the end of its log (`base/server.log`) where it dies or does not answer in `timeout` s.
    """
    base, output = base.resolve(), (output or base / "output").resolve()
    for folder in (base / "custom_nodes", base / "input", base / "models", output):
        folder.mkdir(parents=True, exist_ok=True)
    link_pack(base / "custom_nodes" / PACK)
    port, log = free_port(), base / "server.log"
    words = [host.python, "main.py", "--listen", "127.0.0.1", "--port", str(port), "--base-directory", base]
    words += ["--output-directory", output, *(["--cpu"] if cpu else []), *QUIET, *options]
    with log.open("wb") as out:
        process = subprocess.Popen(words, cwd=host.path, env=environment(host), stdout=out, stderr=subprocess.STDOUT)
    server = Server(process, port, base, output, log)
    try:
        _await(server, timeout)
        yield server
    finally:
        stop(process)


def _await(server: Server, timeout: float) -> None:
    end = time.monotonic() + timeout
    while True:
        server.check()
        try:
            server.get("/system_stats")
            return
        except ServerError:
            if time.monotonic() > end:
                raise ServerError(f"the server did not answer within {timeout:g} s\n{server.tail()}") from None
            time.sleep(0.3)


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ask a process to end; kill it where it does not."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
    process.wait()


def link_pack(link: Path) -> None:
    """Show this repository to the server as a custom node: a link, or a copy where links are not allowed."""
    if link.is_symlink():
        link.unlink()
    elif link.exists():
        shutil.rmtree(link)
    try:
        os.symlink(ROOT, link, target_is_directory=True)
    except OSError:
        shutil.copytree(ROOT, link, ignore=shutil.ignore_patterns(*LEFT_OUT))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
