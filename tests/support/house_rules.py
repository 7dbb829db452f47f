"""House rules that no linter knows: each function reads a source tree and yields one line per violation."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

OWN_PACKAGES = ("likeness", "nodes", "training", "portrait_world", "tools", "benchmarks")
SOURCE_FOLDERS = (*OWN_PACKAGES, "tests")
LIKENESS_ALLOWED_IMPORTS = {*sys.stdlib_module_names, "torch", "safetensors"}
LIKENESS_DRAWING_MODULE = "likeness.faces.drawing"  # may import Pillow too
# Modules that every stage under nodes/ may import, besides likeness/ and its own folder.
SHARED_NODE_MODULES = {"nodes.types", "nodes.loaders.files", "nodes.photos", "nodes.prompt_tokens"}
# FlashFace's loader has to install the added layers.
SHARED_NODE_MODULES |= {"nodes.attention.flashface.added_layers"}
# Training and evaluation run the same code as the nodes.
MAY_USE = {
    "training": {"likeness", "nodes"},
    "portrait_world": {"likeness", "nodes", "training", "tools"},
    "tools": {"portrait_world"},
    "benchmarks": {"likeness", "nodes", "tools"},
}
REGISTRY_MODULE = "nodes.registry"
PATCH_MODULE = "nodes.attention.patch"
FILES_MODULE = "nodes.loaders.files"
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_PARAMETERS = 400, 60, 8
# ComfyUI calls these with all inputs of a node.
NODE_ENTRY_METHODS = {"execute", "validate_inputs", "fingerprint_inputs", "check_lazy_status"}

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class SourceModule:
    """One file of the tree; `name` is dotted from the root, that of the root's `__init__.py` is empty."""

    name: str
    path: Path
    tree: ast.Module
    line_count: int

    @property
    def package(self) -> str:
        return self.name if self.path.name == "__init__.py" else self.name.rpartition(".")[0]

    def format_location(self, node: ast.AST) -> str:
        return f"{self.path}:{getattr(node, 'lineno', 1)}"


def read_modules(root: Path) -> dict[str, SourceModule]:
    """Parse every Python file of the pack; keys are dotted module names."""
    found = {}
    files = [root / "__init__.py", *(file for tree in SOURCE_FOLDERS for file in sorted((root / tree).rglob("*.py")))]
    for file in files:
        if not file.is_file():
            continue
        parts = file.relative_to(root).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        text = file.read_text()
        found[name] = SourceModule(name, file.relative_to(root), ast.parse(text), len(text.splitlines()))
    return found


def iterate_imports(module: SourceModule, modules: dict[str, SourceModule]) -> Iterator[tuple[ast.AST, str, bool]]:
    """Every import as (where, dotted name, relative); of relative ones the file that they reach."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name, False) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node, node.module or "", False
        elif isinstance(node, ast.ImportFrom):
            base = module.package.split(".") if module.package else []
            base = base[: len(base) - node.level + 1] + (node.module.split(".") if node.module else [])
            for alias in node.names:
                whole = ".".join([*base, alias.name])
                yield node, whole if whole in modules else ".".join(base), True


def get_stage(name: str) -> str:
    """The part of the pack that a module belongs to: `likeness`, `nodes.<stage>`, `tools`, ..."""
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0] == "nodes" else parts[0]


def is_import_allowed(source: str, target: str) -> bool:
    """Whether the module `source` may import our own module `target`."""
    here, there = get_stage(source), get_stage(target)
    if here == "":
        return there == REGISTRY_MODULE
    if here == REGISTRY_MODULE:
        return there.split(".")[0] == "nodes"
    if here.startswith("nodes."):
        if there == "likeness" or here == there:
            return True
        return here != "nodes.types" and source != FILES_MODULE and target in SHARED_NODE_MODULES
    return here == there or there.split(".")[0] in MAY_USE.get(here, ())


def check_import_direction(modules: dict[str, SourceModule]) -> Iterator[str]:
    """Imports go one way: likeness <- nodes/types <- the stages of nodes/ <- nodes/__init__ <- __init__."""
    for module in modules.values():
        for node, target, relative in iterate_imports(module, modules):
            if relative and get_stage(module.name) != "tests" and not is_import_allowed(module.name, target):
                yield f"{module.format_location(node)} imports {target or 'the pack'}"


def check_import_cycles(modules: dict[str, SourceModule]) -> Iterator[str]:
    """No import cycles, not even by imports inside functions."""
    graph = {}
    for module in modules.values():
        graph[module.name] = {name for _, name, relative in iterate_imports(module, modules) if relative} - {
            module.name
        }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        yield " -> ".join(error.args[1])


def check_likeness_imports(modules: dict[str, SourceModule]) -> Iterator[str]:
    """likeness/ imports only the standard library, torch and safetensors; its drawing module also Pillow."""
    for module in modules.values():
        allowed = LIKENESS_ALLOWED_IMPORTS | ({"PIL"} if module.name == LIKENESS_DRAWING_MODULE else set())
        for node, target, relative in iterate_imports(module, modules):
            if get_stage(module.name) == "likeness" and not relative and target.split(".")[0] not in allowed:
                yield f"{module.format_location(node)} imports {target}"


def check_transformer_options(modules: dict[str, SourceModule]) -> Iterator[str]:
    """Only nodes/attention/patch.py reads or writes `transformer_options`."""
    for module in modules.values():
        if get_stage(module.name).split(".")[0] not in ("", "likeness", "nodes") or module.name == PATCH_MODULE:
            continue
        for node in ast.walk(module.tree):
            names = (getattr(node, field, None) for field in ("id", "attr", "arg", "value"))
            if "transformer_options" in names:
                yield f"{module.format_location(node)} touches transformer_options"


def iterate_functions(module: SourceModule) -> Iterator[FunctionNode]:
    return (node for node in ast.walk(module.tree) if isinstance(node, FunctionNode))


def list_parameters(function: FunctionNode) -> list[ast.arg]:
    """All parameters, without a method's `self` or `cls`."""
    given = function.args
    found = [*given.posonlyargs, *given.args, *given.kwonlyargs, *(arg for arg in (given.vararg, given.kwarg) if arg)]
    return found[1:] if found and found[0].arg in ("self", "cls") else found


def check_sizes(modules: dict[str, SourceModule]) -> Iterator[str]:
    """Limit the length of files, functions and parameter lists."""
    for module in modules.values():
        if module.line_count > MAX_FILE_LINES:
            yield f"{module.path} has {module.line_count} lines"
        for function in iterate_functions(module):
            length = (function.end_lineno or function.lineno) - function.lineno + 1
            if length > MAX_FUNCTION_LINES and function.name != "define_schema":
                yield f"{module.format_location(function)} {function.name} has {length} lines"
            count = len(list_parameters(function))
            if count > MAX_PARAMETERS and function.name not in NODE_ENTRY_METHODS:
                yield f"{module.format_location(function)} {function.name} has {count} parameters"


RULES: tuple[Callable[[dict[str, SourceModule]], Iterator[str]], ...] = (
    check_import_direction,
    check_import_cycles,
    check_likeness_imports,
    check_transformer_options,
    check_sizes,
)
