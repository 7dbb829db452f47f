"""Every workflow opens in ComfyUI's front end without problems and converts back to its prompt."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
from comfyui_likeness.tools import browser, demo
from comfyui_likeness.tools.build_workflows import fill_defaults, renumber_nodes
from comfyui_likeness.tools.server import PACK_NAME
from support.workflow_runs import ROOT, WORKFLOW_NAMES, read_workflow

ARTIFACTS = ROOT / "artifacts"


@pytest.fixture(scope="module")
def front(server, library) -> Iterator[browser.FrontEnd]:
    with browser.launch_browser() as chromium:
        yield browser.open_front_end(chromium, server.url)


@pytest.fixture(scope="session", autouse=True)
def require_browser() -> None:
    if browser.has_browser():
        return
    reason = "no Chromium or no playwright: the workflows were not opened in a browser"
    if os.environ.get("LIKENESS_BROWSER") == "required":
        pytest.fail(f"{reason}, but LIKENESS_BROWSER=required")
    pytest.skip(reason)


@pytest.mark.parametrize("name", WORKFLOW_NAMES)
def test_workflow_opens_and_converts_back(name, front, info):
    ARTIFACTS.mkdir(exist_ok=True)
    opened = front.open_workflow(read_workflow(name))
    front.screenshot(ARTIFACTS / f"{name}.jpg")
    assert opened.problems == []
    assert fill_defaults(opened.prompt, info) == fill_defaults(renumber_nodes(demo.read_prompt(name)), info)


def test_help_page_of_a_node_opens(front):
    node_type = "LikenessApplyDecoupled"
    front.open_workflow(read_workflow("portrait_faceid_plusv2"))
    assert front.open_help(node_type) == f"/extensions/{PACK_NAME}/docs/{node_type}.md"
    page = (ROOT / "web" / "docs" / f"{node_type}.md").read_text(encoding="utf-8")
    text = page.partition("**What it does.** ")[2].partition(".")[0].partition("\n")[0]
    front.page.get_by_text(text).first.wait_for()
    front.page.screenshot(path=ARTIFACTS / "help.png")


def test_unknown_node_is_reported(front):
    broken = read_workflow(WORKFLOW_NAMES[0])
    node = next(node for node in broken["nodes"] if node["type"].startswith("Likeness"))
    node["type"] = node["properties"]["Node name for S&R"] = "LikenessNotThere"
    opened = front.open_workflow(broken)
    assert opened.missing == ["LikenessNotThere"] and opened.problems
    front.page.keyboard.press("Escape")


def test_templates_list_the_pack(front, server):
    listed: dict[str, Any] = server.get_json("/workflow_templates")
    assert sorted(listed[PACK_NAME]) == WORKFLOW_NAMES
    front.page.evaluate("app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    front.page.get_by_text(PACK_NAME, exact=True).first.click(timeout=20_000)
    front.page.get_by_text("Node graph").first.hover(timeout=20_000)
    unseen = set(WORKFLOW_NAMES)
    for _ in range(40):  # the dialog adds cards as it is scrolled
        unseen = {name for name in unseen if not front.page.get_by_text(name, exact=True).count()}
        if not unseen:
            break
        front.page.mouse.wheel(0, 1000)
        front.page.wait_for_timeout(500)
    assert not unseen
    front.page.screenshot(path=ARTIFACTS / "templates.png")
    front.page.keyboard.press("Escape")
