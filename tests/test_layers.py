"""The house rules hold in this repository, and each of them notices a tree that breaks it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import layers
import pytest

ROOT = Path(__file__).resolve().parents[1]
LONG = "def f() -> None:\n" + "    pass\n" * 60
MANY = "def f(a: int, b: int, c: int, d: int, e: int, f: int, g: int, h: int, i: int) -> None: ...\n"

GOOD = {
    "__init__.py": "async def comfy_entrypoint() -> None:\n    from .nodes.registry import NODES\n",
    "likeness/__init__.py": "",
    "likeness/spec.py": "import math\nimport torch\n",
    "likeness/faces.py": "from safetensors.torch import save_file\nfrom . import spec\nfrom .spec import Face\n",
    "nodes/__init__.py": "",
    "nodes/registry.py": "from . import identity\nfrom .attention import decoupled\nfrom .loaders import files\n",
    "nodes/types.py": "from ..likeness.spec import Face\n",
    "nodes/identity.py": "from . import types\nfrom ..likeness import faces\nfrom .loaders import files\n",
    "nodes/loaders/__init__.py": "",
    "nodes/loaders/files.py": "import folder_paths\n",
    "nodes/attention/__init__.py": "",
    "nodes/attention/patch.py": "def f(transformer_options: dict) -> None: ...\n",
    "nodes/attention/decoupled.py": "from .. import types\nfrom . import patch\n\n\nclass Apply:\n"
    "    @classmethod\n    def execute(cls, " + ", ".join(f"a{i}: int" for i in range(12)) + ") -> None: ...\n"
    "    @classmethod\n    def define_schema(cls) -> None:\n" + "        pass\n" * 80,
    "tools/host.py": "import subprocess\nfrom . import server\n",
    "tools/server.py": "",
    "training/world.py": "import comfy.sd\nfrom ..likeness import faces\n",
    "tests/test_x.py": "import folder_paths\nfrom comfyui_likeness.likeness import faces\n\n\ndef test(a, b): ...\n",
}

BREAKS = [
    ("direction", "likeness/faces.py", "from ..nodes import types\n"),
    ("direction", "nodes/types.py", "from .loaders import files\n"),
    ("direction", "nodes/identity.py", "from .attention import patch\n"),
    ("direction", "nodes/identity.py", "def f() -> None:\n    from . import attention\n"),
    ("direction", "nodes/attention/decoupled.py", "from ..loaders import other\n"),
    ("direction", "nodes/attention/decoupled.py", "from ... import comfy_entrypoint\n"),
    ("direction", "nodes/loaders/files.py", "from .. import types\n"),
    ("direction", "__init__.py", "from .likeness import spec\n"),
    ("direction", "tools/host.py", "from ..likeness import spec\n"),
    ("direction", "training/world.py", "from ..tools import host\n"),
    ("direction", "nodes/identity.py", "from ..training import world\n"),
    ("direction", "likeness/faces.py", "from ..training import world\n"),
    ("circles", "likeness/spec.py", "from .faces import align\n"),
    ("circles", "likeness/spec.py", "def f() -> None:\n    from . import faces\n"),
    ("circles", "nodes/attention/patch.py", "from . import decoupled\n"),
    ("absolute", "nodes/identity.py", "from nodes.types import Face\n"),
    ("absolute", "likeness/faces.py", "import likeness.spec\n"),
    ("absolute", "tools/host.py", "from tools import server\n"),
    ("absolute", "nodes/identity.py", "import comfyui_likeness\n"),
    ("purity", "likeness/faces.py", "import comfy.ops\n"),
    ("purity", "likeness/faces.py", "def f() -> None:\n    import cv2\n"),
    ("purity", "likeness/faces.py", "from numpy import array\n"),
    ("one_patcher", "nodes/attention/decoupled.py", "model.options['transformer_options'] = 1\n"),
    ("one_patcher", "nodes/identity.py", "def f(transformer_options: dict) -> None: ...\n"),
    ("one_patcher", "likeness/faces.py", "print(transformer_options=1)\n"),
    ("one_patcher", "likeness/faces.py", "x = model.transformer_options\n"),
    ("one_pathfinder", "nodes/identity.py", "import folder_paths\n"),
    ("one_pathfinder", "nodes/loaders/other.py", "from folder_paths import models_dir\n"),
    ("sizes", "likeness/faces.py", "x = 1\n" * 401),
    ("sizes", "tests/test_x.py", "x = 1\n" * 401),
    ("sizes", "nodes/identity.py", LONG),
    ("sizes", "nodes/identity.py", MANY),
    ("annotations", "nodes/identity.py", "def f(a) -> None: ...\n"),
    ("annotations", "nodes/identity.py", "def f(a: int): ...\n"),
    ("annotations", "tools/host.py", "def f(*a) -> None: ...\n"),
]

# What the pack may load only when a node asks for it. The host itself may have loaded some of them already.
IMPORTING = """
import asyncio, os, sys
path, sys.argv = sys.argv[1], ["main.py", "--cpu"]
sys.path.insert(0, os.environ["COMFYUI_PATH"])
import comfy.options
comfy.options.enable_args_parsing()
import comfy.sd, folder_paths, comfy_api.latest, comfy_extras.nodes_mask
from importlib.util import module_from_spec, spec_from_file_location
spec = spec_from_file_location("pack", path + "/__init__.py", submodule_search_locations=[path])
pack = sys.modules["pack"] = module_from_spec(spec)
before = set(sys.modules)
spec.loader.exec_module(pack)
extension = asyncio.run(pack.comfy_entrypoint())
asyncio.run(extension.on_load())
nodes = asyncio.run(extension.get_node_list())
for node in nodes:
    node.GET_SCHEMA()
heavy = {"insightface", "open_clip", "onnxruntime", "onnx", "cv2", "skimage", "timm"}
print(len(nodes), *sorted(heavy & (set(sys.modules) - before)))
"""


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.mark.parametrize("rule", layers.RULES, ids=lambda rule: rule.__name__)
def test_the_repository_keeps_the_rule(rule):
    modules = layers.read(ROOT)
    assert {"", "likeness.spec", "nodes.types", "nodes.loaders.files", "tools.host"} <= set(modules)
    assert list(rule(modules)) == []


def test_a_tree_that_keeps_every_rule_passes(tmp_path):
    write(tmp_path, GOOD)
    assert [line for rule in layers.RULES for line in rule(layers.read(tmp_path))] == []


@pytest.mark.parametrize(("name", "file", "text"), BREAKS)
def test_each_rule_can_fail(tmp_path, name, file, text):
    write(tmp_path, GOOD | {"nodes/loaders/other.py": ""} | {file: GOOD.get(file, "") + text})
    rule = next(rule for rule in layers.RULES if rule.__name__ == name)
    found = list(rule(layers.read(tmp_path)))
    assert found and file.removesuffix(".py").split("/")[-1].replace("__init__", "") in found[0]


def test_every_rule_is_shown_to_fail():
    assert {name for name, _, _ in BREAKS} == {rule.__name__ for rule in layers.RULES}


def importing(pack: Path) -> list[str]:
    """Import a pack beside the real host and build its schemas; the number of nodes and the heavy modules that came."""
    done = subprocess.run([sys.executable, "-c", IMPORTING, str(pack)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1].split()


def test_importing_the_pack_brings_no_optional_library():
    number, *heavy = importing(ROOT)
    assert int(number) > 0 and heavy == []


def test_an_early_import_would_be_seen(tmp_path):
    source = "import onnxruntime\n\n\nclass Pack:\n    async def on_load(self):\n        pass\n\n"
    source += "    async def get_node_list(self):\n        return []\n"
    write(tmp_path, {"__init__.py": source + "\n\nasync def comfy_entrypoint():\n    return Pack()\n"})
    assert importing(tmp_path) == ["0", "onnxruntime"]
