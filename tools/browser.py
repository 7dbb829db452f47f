"""Controls ComfyUI's front end in the system's Chromium."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from . import host
from .server import PACK_NAME

if TYPE_CHECKING:
    from playwright.sync_api import Browser, ConsoleMessage, Page, Response

CHROMIUM_FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
)  # fmt: skip
# The first visit of a new user opens a tour and a template browser over the graph.
FRONT_END_SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.ColorPalette": "dark",
    "Comfy.Minimap.Visible": False,
    "Comfy.VueNodes.Enabled": False,
}
VIEWPORT_SIZE = {"width": 1600, "height": 1000}
# Errors of the front end itself and of its default workflow, whose models it looks up on the web.
IGNORED_CONSOLE_TEXTS = (
    "graph accessed before initialization", "huggingface.co/Comfy-Org/", "/api/userdata", "Failed to load resource",
    "[Jobs API]",
)  # fmt: skip
# Files of a new user that the front end requests and does not find; it uses defaults.
OPTIONAL_PATHS = ("/user.css", "/api/user.css", "/api/userdata", "/userdata")
CHECKED_PATHS = (f"/extensions/{PACK_NAME}", "/api/")
READY_SCRIPT = (
    "() => window.app?.extensionManager && Object.keys(window.LiteGraph?.registered_node_types ?? {}).length > 100"
)
LOAD_WORKFLOW_SCRIPT = """async ({ workflow, api }) => {
  const wait = ms => new Promise(done => setTimeout(done, ms));
  if (api) await app.loadApiJson(workflow, 'workflow');
  else await app.loadGraphData(workflow, true, true, 'workflow');
  const loaded = () => app.graph.nodes.flatMap(n => n.imgs ?? []).every(i => i.complete);
  for (let i = 0; i < 20 && !(i > 4 && loaded()); i++) await wait(150);
  const known = LiteGraph.registered_node_types, nodes = app.graph.nodes;
  for (const widget of nodes.flatMap(n => n.widgets ?? []))
    if (api && widget.name === 'control_after_generate') widget.value = 'fixed';
  const exported = await app.graphToPrompt();
  return {
    missing: nodes.filter(n => !known[n.type]).map(n => n.type),
    errors: [...nodes.filter(n => n.has_errors).map(n => n.type), ...Object.keys(app.lastNodeErrors ?? {})],
    dialogs: [...document.querySelectorAll('[role=dialog], .p-toast-message')].map(d => d.innerText.slice(0, 300)),
    sizes: Object.fromEntries(nodes.map(n => [n.id, n.computeSize().map(Math.ceil)])),
    prompt: exported.output, workflow: JSON.parse(JSON.stringify(exported.workflow)),
  };
}"""
# Fits the graph into the view; its bounding box in pixels of the page.
FIT_GRAPH_SCRIPT = """async () => {
  const canvas = app.canvas, items = [...app.graph.nodes, ...app.graph.groups];
  canvas.deselectAll?.(); canvas.show_info = false; canvas.min_font_size_for_lod = 0;  // no panels, all texts
  const box = n => n.boundingRect ?? n.getBounding?.() ?? [...n.pos, ...n.size];
  const boxes = items.map(box), margin = 24;
  const left = Math.min(...boxes.map(b => b[0])) - margin, top = Math.min(...boxes.map(b => b[1])) - margin;
  const right = Math.max(...boxes.map(b => b[0] + b[2])) + margin;
  const bottom = Math.max(...boxes.map(b => b[1] + b[3])) + margin;
  const view = canvas.canvas.getBoundingClientRect();
  const scale = Math.min(view.width / (right - left), view.height / (bottom - top), 1.5);
  canvas.ds.scale = scale;
  canvas.ds.offset[0] = -left; canvas.ds.offset[1] = -top;
  canvas.setDirty(true, true);
  await new Promise(done => setTimeout(done, 700));
  return { x: view.x, y: view.y, width: Math.min(view.width, (right - left) * scale),
           height: Math.min(view.height, (bottom - top) * scale) };
}"""
# Scrolls the first node of a type to a fixed position; the center of its title in pixels of the page.
SHOW_NODE_SCRIPT = """async type => {
  const canvas = app.canvas, node = app.graph.nodes.find(n => n.type === type);
  canvas.ds.scale = 1;
  canvas.ds.offset[0] = 300 - node.pos[0]; canvas.ds.offset[1] = 300 - node.pos[1];
  canvas.setDirty(true, true);
  await new Promise(done => setTimeout(done, 500));
  const view = canvas.canvas.getBoundingClientRect();
  return [view.x + 300 + node.size[0] / 2, view.y + 288];
}"""
HIDE_PANELS_STYLE = """body * { visibility: hidden !important }
canvas, .dom-widget, .dom-widget * { visibility: visible !important }"""


@dataclass(frozen=True)
class OpenedWorkflow:
    """The state of the front end after it has opened a workflow.

    `missing`: unknown node types. `errors`: types or ids of nodes with errors. `dialogs`: texts of open dialogs.
    `sizes`: minimum width and height of each node by id. `prompt` and `workflow`: the graph exported again.
    `console` and `failed`: errors in the console, and failed requests to the server, since the previous workflow.
    """

    missing: list[str]
    errors: list[str]
    dialogs: list[str]
    sizes: dict[str, list[int]]
    prompt: dict[str, Any]
    workflow: dict[str, Any]
    console: list[str]
    failed: list[str]

    @property
    def problems(self) -> list[str]:
        """Everything that is wrong, one line each."""
        kinds = ("missing", "errors", "dialogs", "console", "failed")
        return [f"{kind}: {line}" for kind in kinds for line in getattr(self, kind)]


@dataclass
class FrontEnd:
    """A browser page with the front end of a server."""

    page: Page
    console: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def open_workflow(self, workflow: dict[str, Any]) -> OpenedWorkflow:
        """Open a workflow, in UI format or as an API prompt, as by dropping it on the graph."""
        answer = self.page.evaluate(
            LOAD_WORKFLOW_SCRIPT, {"workflow": workflow, "api": not isinstance(workflow.get("nodes"), list)}
        )
        opened = OpenedWorkflow(console=list(self.console), failed=list(self.failed), **answer)
        self.console.clear()
        self.failed.clear()
        return opened

    def screenshot(self, path: Path, width: int = 1280, height: int = 720) -> None:
        """Save the complete graph, without panels, as a JPEG of at most this size."""
        from PIL import Image

        style = self.page.add_style_tag(content=HIDE_PANELS_STYLE)
        try:
            png = self.page.screenshot(clip=self.page.evaluate(FIT_GRAPH_SCRIPT))
        finally:
            style.evaluate("tag => tag.remove()")
        image = Image.open(io.BytesIO(png)).convert("RGB")
        image.thumbnail((width, height), Image.Resampling.LANCZOS)
        image.save(path, quality=82, optimize=True)

    def open_help(self, node_type: str) -> str:
        """Select the first node of a type and open its help page; the path that the page was loaded from."""
        self.page.mouse.click(*self.page.evaluate(SHOW_NODE_SCRIPT, node_type))
        with self.page.expect_response(lambda response: f"/docs/{node_type}" in response.url and response.ok) as page:
            self.page.get_by_test_id("info-button").click()
        return urlsplit(page.value.url).path

    def on_console_message(self, message: ConsoleMessage) -> None:
        if message.type == "error" and not any(ignored in message.text for ignored in IGNORED_CONSOLE_TEXTS):
            self.console.append(message.text[:300])

    def on_response(self, response: Response) -> None:
        path = urlsplit(response.url).path
        if response.status >= 400 and path.startswith(CHECKED_PATHS) and not path.startswith(OPTIONAL_PATHS):
            self.failed.append(f"{response.status} {path}")


def has_browser() -> bool:
    """Whether Chromium and playwright are installed."""
    return host.find_chromium() is not None and importlib.util.find_spec("playwright") is not None


@contextmanager
def launch_browser() -> Iterator[Browser]:
    """The system's Chromium, headless. Raises HostError if Chromium or playwright is not installed."""
    if not has_browser():
        raise host.HostError(
            "no Chromium or playwright was found; install chromium or set LIKENESS_CHROMIUM, and pip install playwright"
        )
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=host.find_chromium(), headless=True, args=list(CHROMIUM_FLAGS)
        )
        try:
            yield chromium
        finally:
            chromium.close()


def open_front_end(chromium: Browser, url: str, scale: float = 1) -> FrontEnd:
    """Open the front end of the server at `url` and wait until nodes are registered; `scale`: device pixel ratio."""
    page = chromium.new_page(
        viewport={"width": VIEWPORT_SIZE["width"], "height": VIEWPORT_SIZE["height"]}, device_scale_factor=scale
    )
    front = FrontEnd(page)
    page.request.post(f"{url}/api/settings", data=FRONT_END_SETTINGS)
    page.on("console", front.on_console_message)
    page.on("pageerror", lambda error: front.console.append(str(error)[:300]))
    page.on("response", front.on_response)
    page.goto(url, wait_until="domcontentloaded", timeout=120_000)
    page.wait_for_function(READY_SCRIPT, timeout=180_000)
    # The front end restores the last graph after this, which would replace ours.
    page.wait_for_timeout(2000)
    page.keyboard.press("Escape")
    return front
