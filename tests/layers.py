"""The house rules as functions: each reads the files of a tree and gives a line for every place that breaks it."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

OWN = ("likeness", "nodes", "training", "tools", "benchmarks")
# Started from the repository's root by `python -m`, where `tools` is nobody else's name.
LAUNCHERS = {"benchmarks.__main__", "tools.convert_adaface", "training.__main__", "training.report.__main__"}
LAUNCHERS |= {"training.collect.__main__"}
TREES = (*OWN, "tests")
LIKENESS_MAY = {*sys.stdlib_module_names, "torch", "safetensors"}
# What a stage under nodes/ may use besides likeness/ and its own folder.
SHARED = {"nodes.types", "nodes.loaders.files", "nodes.photos"}
# FlashFace's model is not whole without its added layers, which its loader has to put in.
SHARED |= {"nodes.attention.added"}
# What is trained and measured is what runs.
TRAINING_MAY = {"likeness", "nodes"}
REGISTRY = "nodes.registry"
PATCH = "nodes.attention.patch"
FILES = "nodes.loaders.files"
LINES, FUNCTION_LINES, PARAMETERS = 400, 60, 8
# The host calls these with a node's inputs, however many it has.
NODE_CALLS = {"execute", "validate_inputs", "fingerprint_inputs", "check_lazy_status"}

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Module:
    """One file of the tree; `name` is dotted from the root, that of the root's `__init__.py` is empty."""

    name: str
    path: Path
    tree: ast.Module
    lines: int

    @property
    def package(self) -> str:
        return self.name if self.path.name == "__init__.py" else self.name.rpartition(".")[0]

    def at(self, node: ast.AST) -> str:
        return f"{self.path}:{getattr(node, 'lineno', 1)}"


def read(root: Path) -> dict[str, Module]:
    """Every Python file of the pack by its dotted name."""
    found = {}
    files = [root / "__init__.py", *(file for tree in TREES for file in sorted((root / tree).rglob("*.py")))]
    for file in files:
        if not file.is_file():
            continue
        parts = file.relative_to(root).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        text = file.read_text()
        found[name] = Module(name, file.relative_to(root), ast.parse(text), len(text.splitlines()))
    return found


def imports(module: Module, modules: dict[str, Module]) -> Iterator[tuple[ast.AST, str, bool]]:
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


def stage(name: str) -> str:
    """The part of the pack that a module belongs to: `likeness`, `nodes.<stage>`, `tools`, ..."""
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0] == "nodes" else parts[0]


def allowed(source: str, target: str) -> bool:
    """Whether the module `source` may import our own module `target`."""
    here, there = stage(source), stage(target)
    if here == "":
        return there == REGISTRY
    if here == REGISTRY:
        return there.split(".")[0] == "nodes"
    if here.startswith("nodes."):
        if there == "likeness" or here == there:
            return True
        return here != "nodes.types" and source != FILES and target in SHARED
    return here == there or (here == "training" and there.split(".")[0] in TRAINING_MAY)


def direction(modules: dict[str, Module]) -> Iterator[str]:
    """Imports go one way: likeness <- nodes/types <- the stages of nodes/ <- nodes/__init__ <- __init__."""
    for module in modules.values():
        for node, target, relative in imports(module, modules):
            if relative and stage(module.name) != "tests" and not allowed(module.name, target):
                yield f"{module.at(node)} imports {target or 'the pack'}"


def circles(modules: dict[str, Module]) -> Iterator[str]:
    """No module imports itself by way of others, not even inside a function."""
    graph = {}
    for module in modules.values():
        graph[module.name] = {name for _, name, relative in imports(module, modules) if relative} - {module.name}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        yield " -> ".join(error.args[1])


def absolute(modules: dict[str, Module]) -> Iterator[str]:
    """Our own modules are imported relatively: the host has a `nodes` of its own."""
    for module in modules.values():
        for node, target, relative in imports(module, modules):
            own = not relative and target.split(".")[0] in (*OWN, "comfyui_likeness")
            if own and stage(module.name) != "tests" and module.name not in LAUNCHERS:
                yield f"{module.at(node)} imports {target} absolutely"


def purity(modules: dict[str, Module]) -> Iterator[str]:
    """likeness/ knows the standard library, torch and safetensors, and nothing else."""
    for module in modules.values():
        for node, target, relative in imports(module, modules):
            if stage(module.name) == "likeness" and not relative and target.split(".")[0] not in LIKENESS_MAY:
                yield f"{module.at(node)} imports {target}"


def one_patcher(modules: dict[str, Module]) -> Iterator[str]:
    """Only nodes/attention/patch.py reads or writes `transformer_options`."""
    for module in modules.values():
        if stage(module.name).split(".")[0] not in ("", "likeness", "nodes") or module.name == PATCH:
            continue
        for node in ast.walk(module.tree):
            names = (getattr(node, field, None) for field in ("id", "attr", "arg", "value"))
            if "transformer_options" in names:
                yield f"{module.at(node)} touches transformer_options"


def one_pathfinder(modules: dict[str, Module]) -> Iterator[str]:
    """Only nodes/loaders/files.py imports folder_paths."""
    for module in modules.values():
        for node, target, _ in imports(module, modules):
            if target == "folder_paths" and module.name != FILES and stage(module.name) != "tests":
                yield f"{module.at(node)} imports folder_paths"


def functions(module: Module) -> Iterator[Function]:
    return (node for node in ast.walk(module.tree) if isinstance(node, Function))


def parameters(function: Function) -> list[ast.arg]:
    """Every parameter but a method's first."""
    given = function.args
    found = [*given.posonlyargs, *given.args, *given.kwonlyargs, *(arg for arg in (given.vararg, given.kwarg) if arg)]
    return found[1:] if found and found[0].arg in ("self", "cls") else found


def sizes(modules: dict[str, Module]) -> Iterator[str]:
    """Files, functions and parameter lists that a reader can hold in the head."""
    for module in modules.values():
        if module.lines > LINES:
            yield f"{module.path} has {module.lines} lines"
        for function in functions(module):
            length = (function.end_lineno or function.lineno) - function.lineno + 1
            if length > FUNCTION_LINES and function.name != "define_schema":
                yield f"{module.at(function)} {function.name} has {length} lines"
            count = len(parameters(function))
            if count > PARAMETERS and function.name not in NODE_CALLS:
                yield f"{module.at(function)} {function.name} has {count} parameters"


def annotations(modules: dict[str, Module]) -> Iterator[str]:
    """Every signature outside the tests is typed."""
    for module in modules.values():
        for function in functions(module) if stage(module.name) != "tests" else ():
            bare = [arg.arg for arg in parameters(function) if arg.annotation is None]
            if bare:
                yield f"{module.at(function)} {function.name}: {', '.join(bare)} untyped"
            if function.returns is None:
                yield f"{module.at(function)} {function.name}: what it returns is untyped"


RULES: tuple[Callable[[dict[str, Module]], Iterator[str]], ...] = (
    direction,
    circles,
    absolute,
    purity,
    one_patcher,
    one_pathfinder,
    sizes,
    annotations,
)
