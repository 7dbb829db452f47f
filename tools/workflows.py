"""`python -m tools.workflows [name ...]`: turns tools/prompts into workflows/ by ComfyUI's own front end.

Each prompt becomes a workflow in UI format, laid out in groups, and a picture of the graph as its thumbnail.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import demo, frontend, host, notes
from .server import Server, ServerError, serve

FOLDER = host.ROOT / "workflows"
REGISTRY_NAME = "likeness-identity"
PREFIX = "Likeness"
PREPARE = """import sys, pathlib; from tools import photos, standins
base = pathlib.Path(sys.argv[1]); photos.make(base / "input"); standins.make(base, sys.argv[2:])"""
GAP, COLUMN_GAP, TITLE, PADDING, HEADER = 30, 70, 30, 20, 60
WIDTH = 300
NOTE = "MarkdownNote"
OWN_COLOURS = {"color": "#233", "bgcolor": "#355"}


@dataclass(frozen=True)
class Group:
    """A titled box: nodes of these classes, and what only shows their outputs. Bands lie under each other.

    A class that several groups name goes to the one that reads it, or to the first.
    """

    title: str
    band: int
    color: str
    classes: tuple[str, ...]


GROUPS = (
    Group("Read me", 0, "#555555", (NOTE,)),
    Group(
        "Who",
        0,
        "#3f789e",
        ("LoadImage", "ImageScale", "CLIPVisionLoader", *(f"{PREFIX}{name}" for name in (
            "DemoPerson", "LoadFaceAnalyzer", "LoadImageEncoder", "LoadOmniID", "EncodeIdentity", "LoadIdentity",
            "MixIdentities", "AttentionMap"))),
    ),
    Group("Place", 0, "#88527a", ("SolidMask", "MaskComposite")),
    Group("People", 0, "#a1603c", tuple(f"{PREFIX}{name}" for name in (
        "Person", "PeopleFromBoxes", "PeopleFromPhoto", "PreviewPeople"))),
    Group("Keep", 0, "#8a6d3b", (f"{PREFIX}MergeIdentities", f"{PREFIX}SaveIdentity")),
    Group("Check", 0, "#88527a", (f"{PREFIX}Measure",)),
    Group(
        "Pose",
        0,
        "#88527a",
        ("ControlNetLoader", "ControlNetApplyAdvanced", "LoadImage", *(f"{PREFIX}{name}" for name in (
            "FaceKeyPoints", "TemplateKeyPoints", "FaceTokens"))),
    ),
    Group("Model and prompt", 1, "#6b5b95", (
        "CheckpointLoaderSimple", "UNETLoader", "DualCLIPLoader", "VAELoader", "CLIPTextEncode", "FluxGuidance",
        "ConditioningZeroOut", "EmptyLatentImage", "EmptySD3LatentImage", "InpaintModelConditioning",
        "PrimitiveStringMultiline", "RegexExtract", f"{PREFIX}LoadDemo")),
    Group("Identity into the prompt", 1, "#3f7a5a", tuple(f"{PREFIX}{name}" for name in (
        "LoadAdaFace", "Prompt", "SaveEmbedding")) + ("StringReplace",)),
    Group("Identity into the model", 1, "#3f7a5a", tuple(f"{PREFIX}{name}" for name in (
        "LoadAdapter", "ApplyDecoupled", "LoadFlashFace", "ModelAsReferenceNet", "ApplyReference", "ZeroShotFused",
        "ApplyFused", "ApplyMixed"))),
    Group("Picture", 1, "#3f789e", (
        f"{PREFIX}TrailingSchedule", "KSamplerSelect", "KSampler", "SamplerCustom", "VAEDecode", "ImageStitch",
        "SaveImage")),
)  # fmt: skip
LIBRARY = "identity_library_make"  # what it keeps, others load
VIEWERS = ("PreviewImage", "PreviewAny")
# Least sizes of nodes that grow when a picture or a text comes into them.
SIZES = {
    "LoadImage": (300, 330),
    "PreviewImage": (300, 260),
    "PreviewAny": (340, 170),
    "SaveImage": (360, 400),
    "CLIPTextEncode": (360, 150),
    NOTE: (420, 300),
}
Prompt = dict[str, Any]
Workflow = dict[str, Any]


def numbered(prompt: Prompt) -> Prompt:
    """The prompt with the ids 1, 2, ... in its own order, as the front end wants them."""
    ids = {old: str(number) for number, old in enumerate(prompt, 1)}
    return {
        ids[old]: {**node, "inputs": {name: _moved(value, ids) for name, value in node["inputs"].items()}}
        for old, node in prompt.items()
    }


def _moved(value: Any, ids: dict[str, str]) -> Any:
    linked = isinstance(value, list) and len(value) == 2 and value[0] in ids
    return [ids[value[0]], value[1]] if linked else value


def complete(prompt: Prompt, info: dict[str, Any]) -> Prompt:
    """Classes and declared inputs alone, with the defaults of optional widgets that the prompt leaves out."""
    out = {}
    for number, node in prompt.items():
        about = info[node["class_type"]]
        declared = {*about["input"].get("required", {}), *(about["input"].get("optional") or {})}
        given = {name: value for name, value in node["inputs"].items() if name.partition(".")[0] in declared}
        out[number] = {"class_type": node["class_type"], "inputs": {**dict(_defaults(about)), **given}}
    return out


def _defaults(info: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, (_, *options) in (info["input"].get("optional") or {}).items():
        if options and "default" in options[0]:
            yield name, options[0]["default"]


def finish(name: str, prompt: Prompt, opened: frontend.Opened) -> Workflow:
    """The workflow that the front end made of a numbered prompt, with our layout, properties and fixed ids."""
    made = opened.workflow
    nodes = sorted((_finished_node(node, opened.sizes) for node in made["nodes"]), key=lambda node: node["id"])
    renumber = {link[0]: number for number, link in enumerate(sorted(made["links"], key=_ends), 1)}
    links = sorted([renumber[i], int(a), b, int(c), d, kind] for i, a, b, c, d, kind in made["links"])
    for node in nodes:
        for socket in node.get("inputs", []):
            socket["link"] = renumber.get(socket.get("link"))
        for socket in node.get("outputs", []):
            socket["links"] = sorted(renumber[link] for link in socket.get("links") or []) or None
    nodes.append(_note(len(nodes) + 1, notes.note(name, prompt)))
    groups = arrange(nodes, links)
    return {
        "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"{REGISTRY_NAME}/workflows/{name}")),
        "revision": 0,
        "last_node_id": len(nodes),
        "last_link_id": len(links),
        "nodes": nodes,
        "links": links,
        "groups": groups,
        "config": {},
        "extra": {"ds": {"scale": 0.6, "offset": [80, 120]}},
        "version": 0.4,
    }


def _ends(link: list[Any]) -> tuple[int, int, int, int]:
    return int(link[3]), link[4], int(link[1]), link[2]


def _finished_node(node: dict[str, Any], sizes: dict[str, list[int]]) -> dict[str, Any]:
    kind, least = node["type"], sizes[str(node["id"])]
    wanted = SIZES.get(kind, (WIDTH, 0))
    size = [max(wanted[0], -(-least[0] // 10) * 10), max(wanted[1], -(-least[1] // 10) * 10)]
    own = kind.startswith(PREFIX)
    properties = dict(node["properties"])
    if own:
        properties |= {"cnr_id": REGISTRY_NAME, "ver": version()}
    named = [value for value in node.get("widgets_values") or [] if isinstance(value, str) and value in notes.MODELS]
    models = [
        {"name": file, "url": url, "directory": folder}
        for file, (url, folder) in ((file, notes.MODELS[file]) for file in named)
        if notes.direct(url)
    ]
    if models:
        properties["models"] = models
    colours = OWN_COLOURS if own else {}
    return {**node, "id": int(node["id"]), "size": size, "properties": properties, **colours}


def _note(number: int, text: str) -> dict[str, Any]:
    return {
        "id": number, "type": NOTE, "pos": [0, 0], "size": list(SIZES[NOTE]), "flags": {}, "order": 0, "mode": 0,
        "inputs": [], "outputs": [], "title": "About", "properties": {}, "widgets_values": [text],
    }  # fmt: skip


def version() -> str:
    """The pack's version in pyproject.toml."""
    lines = (host.ROOT / "pyproject.toml").read_text(encoding="utf-8").splitlines()
    return next(line.split('"')[1] for line in lines if line.startswith("version = "))


def arrange(nodes: list[dict[str, Any]], links: Sequence[Sequence[Any]]) -> list[dict[str, Any]]:
    """Place the nodes in their groups, in columns from left to right along the links; the groups' boxes."""
    sources: dict[int, list[int]] = {node["id"]: [] for node in nodes}
    for _, source, _, target, *_ in links:
        sources[target].append(source)
    by_id = {node["id"]: node for node in nodes}
    homes = {node["id"]: _home(node["id"], by_id, sources) for node in nodes}
    boxes: list[dict[str, Any]] = []
    top = 0.0
    for band in sorted({group.band for group in GROUPS}):
        left = bottom = 0.0
        for group in GROUPS:
            members = [node for node in nodes if homes[node["id"]] is group]
            if group.band == band and members:
                members.sort(key=lambda node: node["type"] in VIEWERS)
                columns = _columns([node["id"] for node in members], sources)
                width, height = _place([[by_id[i] for i in column] for column in columns], left, top)
                box = [left, top, width, height]
                boxes.append(
                    {"id": len(boxes) + 1, "title": group.title, "bounding": box, "color": group.color,
                     "font_size": 24, "flags": {}}
                )  # fmt: skip
                left, bottom = left + width + GAP, max(bottom, height)
        top += bottom + GAP if bottom else 0
    return boxes


def _home(number: int, by_id: dict[int, dict[str, Any]], sources: dict[int, list[int]]) -> Group:
    kind = by_id[number]["type"]
    if kind in VIEWERS:
        return _home(sources[number][0], by_id, sources)
    found = [group for group in GROUPS if kind in group.classes]
    if not found:
        raise host.HostError(f"no group of GROUPS in {Path(__file__).name} takes {kind}; name it in one")
    readers = {by_id[other]["type"] for other, given in sources.items() if number in given}
    return next((group for group in found if readers and readers <= {*group.classes}), found[0])


def _columns(members: Sequence[int], sources: dict[int, list[int]]) -> list[list[int]]:
    """Members by the length of the longest path to them inside the group."""
    depths: dict[int, int] = {}

    def depth(number: int) -> int:
        if number not in depths:
            inside = [source for source in sources[number] if source in members]
            depths[number] = 1 + max((depth(source) for source in inside), default=-1)
        return depths[number]

    columns: list[list[int]] = [[] for _ in range(1 + max(depth(number) for number in members))]
    for number in members:
        columns[depths[number]].append(number)
    return columns


def _place(columns: list[list[dict[str, Any]]], left: float, top: float) -> tuple[float, float]:
    """Stack each column; the width and height of the box around them."""
    x, bottom = left + PADDING, 0.0
    for column in columns:
        y = top + HEADER + TITLE
        for node in column:
            node["pos"] = [x, y]
            y += node["size"][1] + TITLE + GAP
        bottom = max(bottom, y - TITLE - GAP)
        x += max(node["size"][0] for node in column) + COLUMN_GAP
    return x - COLUMN_GAP + PADDING - left, bottom + PADDING - top


def make(front: frontend.FrontEnd, name: str, info: dict[str, Any]) -> Workflow:
    """Convert one prompt and write workflow and thumbnail. Raises HostError where the front end objects."""
    prompt = numbered(demo.read(name))
    workflow = finish(name, prompt, front.open_workflow(prompt))
    opened = front.open_workflow(workflow)
    if opened.complaints:
        raise host.HostError("\n  ".join([f"the front end objects to {name}:", *opened.complaints]))
    if complete(opened.prompt, info) != complete(prompt, info):
        raise host.HostError(f"{name} does not convert back to its prompt; an input may have another name now")
    FOLDER.mkdir(exist_ok=True)
    text = json.dumps(workflow, indent=1, ensure_ascii=False) + "\n"
    (FOLDER / f"{name}.json").write_text(text, encoding="utf-8")
    front.screenshot(FOLDER / f"{name}.jpg")
    return workflow


def make_all(server: Server, names: Sequence[str]) -> None:
    info = server.object_info()
    with frontend.browser() as chromium:
        for name in names:
            make(frontend.start(chromium, server.url, scale=2), name, info)
            host.say(f"made workflows/{name}.json")


def work(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.workflows", description=__doc__)
    parser.add_argument("names", nargs="*", help="prompts to convert (default: all)")
    names = parser.parse_args(arguments).names or demo.names()
    prompts = [demo.read(name) for name in {*names, LIBRARY}]
    found = host.bring(needs=(*host.RUNTIME_MODULES, "skimage", "playwright"))
    base = host.HOME / "base"
    models = sorted({file for prompt in prompts for file in demo.files(prompt)})
    words = [found.python, "-c", PREPARE, base, *models]
    if subprocess.run(words, cwd=host.ROOT, env=host.environment(found)).returncode:
        raise host.HostError("the stand-in models and the photos could not be made, see above")
    try:
        with serve(found, base) as server:
            server.queue(demo.read(LIBRARY))
            make_all(server, names)
    except ServerError as error:
        raise host.HostError(str(error)) from error
    return 0


if __name__ == "__main__":
    sys.exit(host.main(work))
