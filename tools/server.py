"""Starts a ComfyUI server with this pack as a custom node, and a small client for it."""

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

from .host import ROOT, Host, build_environment

PACK_NAME = "ComfyUI-Likeness"
COPY_EXCLUDES = (".git", ".host", ".venv", "venv", "artifacts", "tests", "__pycache__")
# Requests to this machine must not go through a proxy of the environment.
NO_PROXY_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
SERVER_OPTIONS = ("--disable-auto-launch", "--disable-api-nodes", "--database-url", "sqlite:///:memory:")


class ServerError(RuntimeError):
    """The server died, rejected a prompt, or a node raised. `details` is the server's answer."""

    def __init__(self, message: str, details: Any = None) -> None:
        super().__init__(message)
        self.details = details


class Server:
    """A running server. `url` is its address; models, inputs and custom nodes are in `base_directory`."""

    def __init__(
        self, process: subprocess.Popen[bytes], port: int, base_directory: Path, output_directory: Path, log_file: Path
    ) -> None:
        self.process, self.log_file = process, log_file
        self.base_directory, self.output_directory = base_directory, output_directory
        self.url = f"http://127.0.0.1:{port}"

    def get_json(self, path: str) -> Any:
        """The JSON at `path`, such as `/system_stats`."""
        return self._request_json(urllib.request.Request(self.url + path))

    def post_json(self, path: str, data: object) -> Any:
        """Post JSON to `path`; the answer. Raises ServerError if the server rejects it."""
        body = json.dumps(data).encode()
        return self._request_json(urllib.request.Request(self.url + path, body, {"Content-Type": "application/json"}))

    def get_object_info(self) -> dict[str, Any]:
        """The definitions of all nodes: id -> inputs, outputs, texts."""
        return self.get_json("/object_info")

    def queue_prompt(self, prompt: dict[str, Any]) -> str:
        """Queue an API prompt; its id. Raises ServerError with the nodes' errors if it is not valid."""
        answer = self.post_json("/prompt", {"prompt": prompt})
        if answer.get("node_errors"):  # the server queues the valid outputs all the same
            raise ServerError("the server rejected a part of the prompt", answer["node_errors"])
        return answer["prompt_id"]

    def wait_for_prompt(self, prompt_id: str, timeout: float = 1800) -> dict[str, Any]:
        """Wait until a queued prompt has ended, with or without an error; its history entry."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            self.check_alive()
            history = self.get_json(f"/history/{prompt_id}")
            if prompt_id in history:
                return history[prompt_id]
            time.sleep(0.1)
        raise ServerError(f"the prompt did not finish within {timeout:g} s\n{self.read_log_tail()}")

    def run_prompt(self, prompt: dict[str, Any], timeout: float = 1800) -> dict[str, Any]:
        """Run an API prompt; its history entry. Raises ServerError if it is rejected, fails or is interrupted."""
        entry = self.wait_for_prompt(self.queue_prompt(prompt), timeout)
        for kind, message in entry["status"]["messages"]:
            if kind == "execution_error":
                node = f"node {message['node_id']} ({message['node_type']})"
                raise ServerError(f"{node}: {message['exception_message'].strip()}", message)
            if kind == "execution_interrupted":
                raise ServerError("the prompt was interrupted", message)
        return entry

    def list_output_files(self, entry: dict[str, Any]) -> list[Path]:
        """The files that the nodes of a history entry wrote, including previews, in the order of the nodes."""
        roots = {
            "output": self.output_directory,
            "temp": self.base_directory / "temp",
            "input": self.base_directory / "input",
        }
        files = []
        for result in entry["outputs"].values():
            for items in result.values():
                for item in items if isinstance(items, list) else ():
                    if isinstance(item, dict) and item.get("type") in roots and "filename" in item:
                        files.append(roots[item["type"]] / item.get("subfolder", "") / item["filename"])
        return files

    def upload_image(self, file: Path, name: str | None = None) -> str:
        """Upload an image to the input folder, replacing one of the same name; the name for LoadImage."""
        boundary = uuid.uuid4().hex
        field = f'--{boundary}\r\nContent-Disposition: form-data; name="'
        start = f'{field}image"; filename="{name or file.name}"\r\nContent-Type: application/octet-stream\r\n\r\n'
        end = f'\r\n{field}overwrite"\r\n\r\ntrue\r\n--{boundary}--\r\n'
        body = start.encode() + file.read_bytes() + end.encode()
        headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
        return self._request_json(urllib.request.Request(f"{self.url}/upload/image", body, headers))["name"]

    def interrupt_prompt(self) -> None:
        """Interrupt the running prompt."""
        self.post_json("/interrupt", {})

    def check_alive(self) -> None:
        """Raises ServerError with the end of the log if the server has exited."""
        if self.process.poll() is not None:
            raise ServerError(
                f"the server exited with code {self.process.returncode}; the end of its log:\n{self.read_log_tail()}"
            )

    def read_log_tail(self, lines: int = 40) -> str:
        """The last lines of the server's log."""
        return "\n".join(self.log_file.read_text(errors="replace").splitlines()[-lines:])

    def _request_json(self, request: urllib.request.Request) -> Any:
        try:
            with NO_PROXY_OPENER.open(request, timeout=600) as answer:
                return json.loads(answer.read() or b"null")
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace")
            details = json.loads(text) if text.startswith("{") else text
            raise ServerError(f"{request.selector}: {error.code}: {format_prompt_errors(details)}", details) from error
        except OSError as error:
            self.check_alive()
            raise ServerError(f"{request.selector}: {error}") from error


def format_prompt_errors(details: Any) -> str:
    """The errors of a rejected prompt as lines: node, class, message."""
    if not isinstance(details, dict) or "node_errors" not in details:
        return str(details)
    lines = [str((details.get("error") or {}).get("message", "rejected"))]
    for node, problem in (details["node_errors"] or {}).items():
        label = f"node {node} ({problem['class_type']})"
        lines += [f"  {label}: {error['message']}: {error['details']}" for error in problem["errors"]]
    return "\n".join(lines)


@contextmanager
def start_server(
    host: Host,
    base_directory: Path,
    *,
    cpu: bool = True,
    output_directory: Path | None = None,
    options: Sequence[str] = (),
    timeout: float = 300,
) -> Iterator[Server]:
    """A running server whose models, inputs, outputs and custom nodes are in the base directory; a context manager.

    Raises ServerError with the end of its log (server.log) if it exits or does not answer within `timeout` seconds.
    """
    base_directory = base_directory.resolve()
    output_directory = (output_directory or base_directory / "output").resolve()
    for folder in (*(base_directory / name for name in ("custom_nodes", "input", "models")), output_directory):
        folder.mkdir(parents=True, exist_ok=True)
    link_pack(base_directory / "custom_nodes" / PACK_NAME)
    port, log = find_free_port(), base_directory / "server.log"
    command = [host.python, "main.py", "--listen", "127.0.0.1", "--port", str(port), "--base-directory", base_directory]
    command += ["--output-directory", output_directory, *(["--cpu"] if cpu else []), *SERVER_OPTIONS, *options]
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, cwd=host.path, env=build_environment(host), stdout=out, stderr=subprocess.STDOUT
        )
    server = Server(process, port, base_directory, output_directory, log)
    try:
        _wait_until_ready(server, timeout)
        yield server
    finally:
        stop_process(process)


def _wait_until_ready(server: Server, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while True:
        server.check_alive()
        try:
            server.get_json("/system_stats")
            return
        except ServerError:
            if time.monotonic() > deadline:
                raise ServerError(f"the server did not answer within {timeout:g} s\n{server.read_log_tail()}") from None
            time.sleep(0.3)


def stop_process(process: subprocess.Popen[bytes]) -> None:
    """Terminate a process; kill it if it does not exit."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
    process.wait()


def link_pack(link: Path) -> None:
    """Link this repository as a custom node; copy it if links are not permitted."""
    if link.is_symlink():
        link.unlink()
    elif link.exists():
        shutil.rmtree(link)
    try:
        os.symlink(ROOT, link, target_is_directory=True)
    except OSError:
        shutil.copytree(ROOT, link, ignore=shutil.ignore_patterns(*COPY_EXCLUDES))


def find_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
