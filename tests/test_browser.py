"""Every workflow opens in ComfyUI's own front end without a complaint and converts back to its prompt."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
from comfyui_likeness.tools import demo, frontend
from comfyui_likeness.tools.server import PACK
from comfyui_likeness.tools.workflows import complete, numbered
from flows import NAMES, ROOT, workflow

pytest_plugins = ["served"]

ARTIFACTS = ROOT / "artifacts"


@pytest.fixture(scope="module")
def front(server, library) -> Iterator[frontend.FrontEnd]:
    with frontend.browser() as chromium:
        yield frontend.start(chromium, server.url)


@pytest.fixture(scope="session", autouse=True)
def chromium_is_there() -> None:
    if frontend.available():
        return
    said = "no Chromium or no playwright: the workflows were not opened in a browser"
    if os.environ.get("LIKENESS_BROWSER") == "required":
        pytest.fail(f"{said}, but LIKENESS_BROWSER=required")
    pytest.skip(said)


@pytest.mark.parametrize("name", NAMES)
def test_workflow_opens_and_converts_back(name, front, info):
    ARTIFACTS.mkdir(exist_ok=True)
    opened = front.open_workflow(workflow(name))
    front.screenshot(ARTIFACTS / f"{name}.jpg")
    assert opened.complaints == []
    assert complete(opened.prompt, info) == complete(numbered(demo.read(name)), info)


def test_a_node_shows_its_help(front):
    kind = "LikenessApplyDecoupled"
    front.open_workflow(workflow("portrait_faceid_plusv2"))
    assert front.open_help(kind) == f"/extensions/{PACK}/docs/{kind}.md"
    words = (ROOT / "web" / "docs" / f"{kind}.md").read_text(encoding="utf-8").splitlines()[2].split(".")[0]
    front.page.get_by_text(words).first.wait_for()
    front.page.screenshot(path=ARTIFACTS / "help.png")


def test_a_broken_workflow_is_seen(front):
    broken = workflow(NAMES[0])
    node = next(node for node in broken["nodes"] if node["type"].startswith("Likeness"))
    node["type"] = node["properties"]["Node name for S&R"] = "LikenessNotThere"
    opened = front.open_workflow(broken)
    assert opened.missing == ["LikenessNotThere"] and opened.complaints
    front.page.keyboard.press("Escape")


def test_templates_list_the_pack(front, server):
    listed: dict[str, Any] = server.get("/workflow_templates")
    assert sorted(listed[PACK]) == NAMES
    front.page.evaluate("app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    front.page.get_by_text(PACK, exact=True).first.click(timeout=20_000)
    front.page.get_by_text("Node graph").first.hover(timeout=20_000)
    unseen = set(NAMES)
    for _ in range(40):  # the dialog adds cards as it is scrolled
        unseen = {name for name in unseen if not front.page.get_by_text(name, exact=True).count()}
        if not unseen:
            break
        front.page.mouse.wheel(0, 1000)
        front.page.wait_for_timeout(500)
    assert not unseen
    front.page.screenshot(path=ARTIFACTS / "templates.png")
    front.page.keyboard.press("Escape")
