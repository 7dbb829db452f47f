"""Every node has a help page, tooltips, a description and a row in docs/nodes.md; every workflow has a row, too."""

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

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "web" / "docs"


def list_nodes() -> list[type[io.ComfyNode]]:
    extension = asyncio.run(comfyui_likeness.comfy_entrypoint())
    asyncio.run(extension.on_load())
    return asyncio.run(extension.get_node_list())


SCHEMAS = {node.define_schema().node_id: node.define_schema() for node in list_nodes()}


def iterate_inputs(schema: io.Schema) -> Iterator[Any]:
    """Yield every input, including the template of growing inputs."""
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
    for given in iterate_inputs(schema):
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


def read_first_cells(page: str) -> list[str]:
    """The first cell of every row of the tables of a page in docs/, headers left out."""
    lines = (ROOT / "docs" / page).read_text(encoding="utf-8").splitlines()
    cells = [line.split("|")[1].strip() for line in lines if line.startswith("|")]
    return [cell for cell, below in zip(cells, [*cells[1:], ""], strict=True) if "---" not in (cell, below)]


def test_each_node_has_one_row() -> None:
    rows = [f"[{schema.display_name}](../web/docs/{name}.md)" for name, schema in SCHEMAS.items()]
    assert sorted(read_first_cells("nodes.md")) == sorted(rows)


def test_each_workflow_has_one_row() -> None:
    assert sorted(read_first_cells("workflows.md")) == sorted(
        f"[{name}](../workflows/{name}.json)" for name in demo.list_workflows()
    )


def test_readme_leads_to_every_page() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= 150
    for page in (ROOT / "docs").glob("*.md"):
        assert f"(docs/{page.name})" in readme, page.name


PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), ROOT / "weights" / "README.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if not link.startswith(("http://", "https://", "#")):
            assert (page.parent / link.partition("#")[0]).exists(), link
