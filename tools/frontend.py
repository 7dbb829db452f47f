"""Drives ComfyUI's real front end in the system's own Chromium."""

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
from .server import PACK

if TYPE_CHECKING:
    from playwright.sync_api import Browser, ConsoleMessage, Page, Response

FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
)  # fmt: skip
# A stranger's first visit opens a tour and a template browser over the graph.
SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.ColorPalette": "dark",
    "Comfy.Minimap.Visible": False,
    "Comfy.VueNodes.Enabled": False,
}
VIEW = {"width": 1600, "height": 1000}
# What the front end says of itself and of its own start graph, whose models it looks up on the web.
BENIGN = (
    "graph accessed before initialization", "huggingface.co/Comfy-Org/", "/api/userdata", "Failed to load resource",
    "[Jobs API]",
)  # fmt: skip
# What a new user's front end asks for and does not find; it takes defaults.
ABSENT = ("/user.css", "/api/user.css", "/api/userdata", "/userdata")
OURS = (f"/extensions/{PACK}", "/api/")
READY = "() => window.app?.extensionManager && Object.keys(window.LiteGraph?.registered_node_types ?? {}).length > 100"
LOAD = """async ({ workflow, api }) => {
  const wait = ms => new Promise(done => setTimeout(done, ms));
  if (api) await app.loadApiJson(workflow, 'workflow');
  else await app.loadGraphData(workflow, true, true, 'workflow');
  const asked = () => app.graph.nodes.flatMap(n => n.imgs ?? []).every(i => i.complete);
  for (let i = 0; i < 20 && !(i > 4 && asked()); i++) await wait(150);
  const known = LiteGraph.registered_node_types, nodes = app.graph.nodes;
  for (const widget of nodes.flatMap(n => n.widgets ?? []))
    if (api && widget.name === 'control_after_generate') widget.value = 'fixed';
  const made = await app.graphToPrompt();
  return {
    missing: nodes.filter(n => !known[n.type]).map(n => n.type),
    errors: [...nodes.filter(n => n.has_errors).map(n => n.type), ...Object.keys(app.lastNodeErrors ?? {})],
    dialogs: [...document.querySelectorAll('[role=dialog], .p-toast-message')].map(d => d.innerText.slice(0, 300)),
    sizes: Object.fromEntries(nodes.map(n => [n.id, n.computeSize().map(Math.ceil)])),
    prompt: made.output, workflow: JSON.parse(JSON.stringify(made.workflow)),
  };
}"""
# The corners of everything on the graph, in pixels of the page, once it is fitted into the view.
FIT = """async () => {
  const canvas = app.canvas, things = [...app.graph.nodes, ...app.graph.groups];
  canvas.deselectAll?.(); canvas.show_info = false; canvas.min_font_size_for_lod = 0;  // no panels, all texts
  const box = n => n.boundingRect ?? n.getBounding?.() ?? [...n.pos, ...n.size];
  const boxes = things.map(box), margin = 24;
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
# Bring a node of a type to a fixed place of the view; the middle of its title in pixels of the page.
TITLE = """async type => {
  const canvas = app.canvas, node = app.graph.nodes.find(n => n.type === type);
  canvas.ds.scale = 1;
  canvas.ds.offset[0] = 300 - node.pos[0]; canvas.ds.offset[1] = 300 - node.pos[1];
  canvas.setDirty(true, true);
  await new Promise(done => setTimeout(done, 500));
  const view = canvas.canvas.getBoundingClientRect();
  return [view.x + 300 + node.size[0] / 2, view.y + 288];
}"""
BARE = """body * { visibility: hidden !important }
canvas, .dom-widget, .dom-widget * { visibility: visible !important }"""


@dataclass(frozen=True)
class Opened:
    """What the front end made of a workflow.

    `missing` holds node types that it does not know, `errors` types or ids of nodes that it marks, `dialogs` what it
    shows over the graph, `sizes` the least width and height of each node by id. `console` and `failed` are what the
    page reported since the workflow before: errors, and refused requests for the pack's files and to the server.
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
    def complaints(self) -> list[str]:
        """Everything that a good workflow has none of, as lines."""
        kinds = ("missing", "errors", "dialogs", "console", "failed")
        return [f"{kind}: {line}" for kind in kinds for line in getattr(self, kind)]


@dataclass
class FrontEnd:
    """A page that shows the front end of one server."""

    page: Page
    console: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def open_workflow(self, workflow: dict[str, Any]) -> Opened:
        """Open a workflow, in UI format or as an API prompt, as if it had been dropped on the graph."""
        answer = self.page.evaluate(LOAD, {"workflow": workflow, "api": not isinstance(workflow.get("nodes"), list)})
        opened = Opened(console=list(self.console), failed=list(self.failed), **answer)
        self.console.clear()
        self.failed.clear()
        return opened

    def screenshot(self, path: Path, width: int = 1280, height: int = 720) -> None:
        """Save the whole graph, without the front end's own panels, as a JPEG of at most this size."""
        from PIL import Image

        style = self.page.add_style_tag(content=BARE)
        try:
            taken = self.page.screenshot(clip=self.page.evaluate(FIT))
        finally:
            style.evaluate("tag => tag.remove()")
        picture = Image.open(io.BytesIO(taken)).convert("RGB")
        picture.thumbnail((width, height), Image.Resampling.LANCZOS)
        picture.save(path, quality=82, optimize=True)

    def open_help(self, kind: str) -> str:
        """Select the first node of a type and show its help page; the address that it came from."""
        self.page.mouse.click(*self.page.evaluate(TITLE, kind))
        with self.page.expect_response(lambda response: f"/docs/{kind}" in response.url and response.ok) as page:
            self.page.get_by_test_id("info-button").click()
        return urlsplit(page.value.url).path

    def heard(self, message: ConsoleMessage) -> None:
        if message.type == "error" and not any(known in message.text for known in BENIGN):
            self.console.append(message.text[:300])

    def answered(self, response: Response) -> None:
        path = urlsplit(response.url).path
        if response.status >= 400 and path.startswith(OURS) and not path.startswith(ABSENT):
            self.failed.append(f"{response.status} {path}")


def available() -> bool:
    """Whether there is a Chromium, and playwright to drive it."""
    return host.browser() is not None and importlib.util.find_spec("playwright") is not None


@contextmanager
def browser() -> Iterator[Browser]:
    """The system's own Chromium, headless. Raises HostError where there is none."""
    if not available():
        raise host.HostError(
            "no Chromium or no playwright was found; install chromium, or set LIKENESS_CHROMIUM; pip install playwright"
        )
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=host.browser(), headless=True, args=list(FLAGS))
        try:
            yield chromium
        finally:
            chromium.close()


def start(chromium: Browser, url: str, scale: float = 1) -> FrontEnd:
    """Open the front end of the server at `url` and wait until its nodes are there; `scale` pixels a point."""
    page = chromium.new_page(viewport={"width": VIEW["width"], "height": VIEW["height"]}, device_scale_factor=scale)
    front = FrontEnd(page)
    page.request.post(f"{url}/api/settings", data=SETTINGS)
    page.on("console", front.heard)
    page.on("pageerror", lambda error: front.console.append(str(error)[:300]))
    page.on("response", front.answered)
    page.goto(url, wait_until="domcontentloaded", timeout=120_000)
    page.wait_for_function(READY, timeout=180_000)
    # The front end restores the last graph after it is ready, and would lay it over ours.
    page.wait_for_timeout(2000)
    page.keyboard.press("Escape")
    return front
