"""Every node explains itself: help page, tooltips, description, a row in the README."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import comfyui_likeness
import pytest
from comfy_api.latest import io
from comfyui_likeness.tools import demo

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "web" / "docs"


def nodes() -> list[type[io.ComfyNode]]:
    extension = asyncio.run(comfyui_likeness.comfy_entrypoint())
    asyncio.run(extension.on_load())
    return asyncio.run(extension.get_node_list())


SCHEMAS = {node.define_schema().node_id: node.define_schema() for node in nodes()}


def inputs(schema: io.Schema) -> Iterator[Any]:
    """Every input, those that growing inputs make included."""
    for given in schema.inputs:
        yield given
        template = getattr(given, "template", None)
        if template is not None:
            yield template.input


@pytest.mark.parametrize("name", SCHEMAS)
def test_node_explains_itself(name: str) -> None:
    schema = SCHEMAS[name]
    assert name.startswith("Likeness") and schema.category.startswith("likeness/")
    assert len(schema.description) > 40 and schema.display_name and schema.search_aliases
    for given in inputs(schema):
        assert given.tooltip and len(given.tooltip) >= 15, given.id
        if isinstance(given, (io.Float.Input, io.Int.Input)):
            assert re.search(r"\d|pixels", given.tooltip), f"{given.id} says neither range nor unit"
    if len(schema.outputs) > 1:
        assert all(output.display_name for output in schema.outputs)


@pytest.mark.parametrize("name", SCHEMAS)
def test_help_page_names_every_input(name: str) -> None:
    page = (DOCS / f"{name}.md").read_text(encoding="utf-8")
    assert page.startswith("# ")
    for given in SCHEMAS[name].inputs:
        assert re.search(rf"\b{given.id}\b", page), f"{name}.md does not mention {given.id}"


def test_no_page_without_a_node() -> None:
    assert {page.stem for page in DOCS.glob("*.md")} == SCHEMAS.keys()


def test_readme_has_a_row_for_each_node_and_workflow() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = "\n".join(line for line in readme.splitlines() if line.startswith("|"))
    for schema in SCHEMAS.values():
        words = schema.display_name.replace("Save Identity", "Save").replace("Load Identity", "Load")
        assert schema.display_name in rows or words in rows, schema.display_name
    for name in demo.names():
        assert name in rows, name
