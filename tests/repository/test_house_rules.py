"""The house rules hold in this repository, and each rule detects a tree that breaks it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support import house_rules

ROOT = Path(__file__).resolve().parents[2]
LONG_FUNCTION = "def f() -> None:\n" + "    pass\n" * 60
MANY_PARAMETERS = "def f(a: int, b: int, c: int, d: int, e: int, f: int, g: int, h: int, i: int) -> None: ...\n"

VALID_TREE = {
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

VIOLATIONS = [
    ("check_import_direction", "likeness/faces.py", "from ..nodes import types\n"),
    ("check_import_direction", "nodes/types.py", "from .loaders import files\n"),
    ("check_import_direction", "nodes/identity.py", "from .attention import patch\n"),
    ("check_import_direction", "nodes/identity.py", "def f() -> None:\n    from . import attention\n"),
    ("check_import_direction", "nodes/attention/decoupled.py", "from ..loaders import other\n"),
    ("check_import_direction", "nodes/attention/decoupled.py", "from ... import comfy_entrypoint\n"),
    ("check_import_direction", "nodes/loaders/files.py", "from .. import types\n"),
    ("check_import_direction", "__init__.py", "from .likeness import spec\n"),
    ("check_import_direction", "tools/host.py", "from ..likeness import spec\n"),
    ("check_import_direction", "training/world.py", "from ..tools import host\n"),
    ("check_import_direction", "nodes/identity.py", "from ..training import world\n"),
    ("check_import_direction", "likeness/faces.py", "from ..training import world\n"),
    ("check_import_cycles", "likeness/spec.py", "from .faces import align\n"),
    ("check_import_cycles", "likeness/spec.py", "def f() -> None:\n    from . import faces\n"),
    ("check_import_cycles", "nodes/attention/patch.py", "from . import decoupled\n"),
    ("check_likeness_imports", "likeness/faces.py", "import comfy.ops\n"),
    ("check_likeness_imports", "likeness/faces.py", "def f() -> None:\n    import cv2\n"),
    ("check_likeness_imports", "likeness/faces.py", "from numpy import array\n"),
    ("check_transformer_options", "nodes/attention/decoupled.py", "model.options['transformer_options'] = 1\n"),
    ("check_transformer_options", "nodes/identity.py", "def f(transformer_options: dict) -> None: ...\n"),
    ("check_transformer_options", "likeness/faces.py", "print(transformer_options=1)\n"),
    ("check_transformer_options", "likeness/faces.py", "x = model.transformer_options\n"),
    ("check_sizes", "likeness/faces.py", "x = 1\n" * 401),
    ("check_sizes", "tests/test_x.py", "x = 1\n" * 401),
    ("check_sizes", "nodes/identity.py", LONG_FUNCTION),
    ("check_sizes", "nodes/identity.py", MANY_PARAMETERS),
]

# Imports the pack beside ComfyUI and prints the optional libraries that this has loaded.
IMPORT_SCRIPT = """
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
heavy = {"insightface", "open_clip", "onnxruntime", "onnx", "cv2", "skimage", "timm", "facenet_pytorch"}
print(len(nodes), *sorted(heavy & (set(sys.modules) - before)))
"""


def write_tree(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.mark.parametrize("rule", house_rules.RULES, ids=lambda rule: rule.__name__)
def test_the_repository_keeps_the_rule(rule):
    modules = house_rules.read_modules(ROOT)
    assert {"", "likeness.spec", "nodes.types", "nodes.loaders.files", "tools.host"} <= set(modules)
    assert list(rule(modules)) == []


def test_a_tree_that_keeps_every_rule_passes(tmp_path):
    write_tree(tmp_path, VALID_TREE)
    assert [line for rule in house_rules.RULES for line in rule(house_rules.read_modules(tmp_path))] == []


@pytest.mark.parametrize(("name", "file", "text"), VIOLATIONS)
def test_each_rule_can_fail(tmp_path, name, file, text):
    write_tree(tmp_path, VALID_TREE | {"nodes/loaders/other.py": ""} | {file: VALID_TREE.get(file, "") + text})
    rule = next(rule for rule in house_rules.RULES if rule.__name__ == name)
    found = list(rule(house_rules.read_modules(tmp_path)))
    assert found and file.removesuffix(".py").split("/")[-1].replace("__init__", "") in found[0]


def test_every_rule_is_shown_to_fail():
    assert {name for name, _, _ in VIOLATIONS} == {rule.__name__ for rule in house_rules.RULES}


def import_pack(pack: Path) -> list[str]:
    """Import a pack beside ComfyUI, build its schemas; return the number of nodes and the optional modules loaded."""
    done = subprocess.run([sys.executable, "-c", IMPORT_SCRIPT, str(pack)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1].split()


def test_importing_the_pack_brings_no_optional_library():
    number, *heavy = import_pack(ROOT)
    assert int(number) > 0 and heavy == []


def test_an_early_import_would_be_seen(tmp_path):
    source = "import onnxruntime\n\n\nclass Pack:\n    async def on_load(self):\n        pass\n\n"
    source += "    async def get_node_list(self):\n        return []\n"
    write_tree(tmp_path, {"__init__.py": source + "\n\nasync def comfy_entrypoint():\n    return Pack()\n"})
    assert import_pack(tmp_path) == ["0", "onnxruntime"]
