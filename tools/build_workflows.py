"""`python -m tools.build_workflows [name ...]`: converts workflow_prompts/ to workflows/ with ComfyUI's front end.

Each API prompt becomes a workflow in UI format, laid out in groups, and a screenshot of the graph as thumbnail.
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

from . import browser, demo, host, workflow_notes
from .server import Server, ServerError, start_server

WORKFLOW_FOLDER = host.ROOT / "workflows"
REGISTRY_NAME = "likeness-identity"
NODE_PREFIX = "Likeness"
PREPARE_SCRIPT = """import sys, pathlib
from tools import sample_photos
from tools.standins import build
base = pathlib.Path(sys.argv[1])
sample_photos.write_sample_photos(base / "input")
build.write_standins(base, sys.argv[2:])"""
NODE_GAP, COLUMN_GAP, TITLE_HEIGHT, GROUP_PADDING, GROUP_HEADER_HEIGHT = 30, 70, 30, 20, 60
NODE_WIDTH = 300
NOTE_TYPE = "MarkdownNote"
PACK_NODE_COLOURS = {"color": "#233", "bgcolor": "#355"}


@dataclass(frozen=True)
class NodeGroup:
    """A titled box with the nodes of these types and their previews. Bands are below each other.

    A node whose type is in several groups goes to the group that uses its output, or else to the first.
    """

    title: str
    band: int
    color: str
    node_types: tuple[str, ...]


NODE_GROUPS = (
    NodeGroup("Read me", 0, "#555555", (NOTE_TYPE,)),
    NodeGroup(
        "Identity",
        0,
        "#3f789e",
        ("LoadImage", "ImageScale", "CLIPVisionLoader", *(f"{NODE_PREFIX}{name}" for name in (
            "DemoPerson", "LoadFaceAnalyzer", "LoadImageEncoder", "LoadOmniID", "EncodeIdentity", "LoadIdentity",
            "MixIdentities", "AttentionMap"))),
    ),
    NodeGroup("Masks", 0, "#88527a", ("SolidMask", "MaskComposite")),
    NodeGroup("People", 0, "#a1603c", tuple(f"{NODE_PREFIX}{name}" for name in (
        "Person", "PeopleFromBoxes", "PeopleFromPhoto", "PreviewPeople"))),
    NodeGroup("Save identity", 0, "#8a6d3b", (f"{NODE_PREFIX}MergeIdentities", f"{NODE_PREFIX}SaveIdentity")),
    NodeGroup("Measure", 0, "#88527a", (f"{NODE_PREFIX}Measure",)),
    NodeGroup(
        "Pose",
        0,
        "#88527a",
        ("ControlNetLoader", "ControlNetApplyAdvanced", "LoadImage", *(f"{NODE_PREFIX}{name}" for name in (
            "FaceKeyPoints", "TemplateKeyPoints", "FaceTokens"))),
    ),
    NodeGroup("Model and prompt", 1, "#6b5b95", (
        "CheckpointLoaderSimple", "UNETLoader", "DualCLIPLoader", "VAELoader", "CLIPTextEncode", "FluxGuidance",
        "ConditioningZeroOut", "EmptyLatentImage", "EmptySD3LatentImage", "InpaintModelConditioning",
        "PrimitiveStringMultiline", "RegexExtract", f"{NODE_PREFIX}LoadDemo")),
    NodeGroup("Identity into the prompt", 1, "#3f7a5a", tuple(f"{NODE_PREFIX}{name}" for name in (
        "LoadAdaFace", "Prompt", "SaveEmbedding")) + ("StringReplace",)),
    NodeGroup("Identity into the model", 1, "#3f7a5a", tuple(f"{NODE_PREFIX}{name}" for name in (
        "LoadAdapter", "ApplyDecoupled", "LoadFlashFace", "ModelAsReferenceNet", "ApplyReference", "ZeroShotFused",
        "ApplyFused", "ApplyMixed"))),
    NodeGroup("Image", 1, "#3f789e", (
        f"{NODE_PREFIX}TrailingSchedule", "KSamplerSelect", "KSampler", "SamplerCustom", "VAEDecode", "ImageStitch",
        "SaveImage")),
)  # fmt: skip
LIBRARY_WORKFLOW = "identity_library_make"  # saves the identities that other workflows load
PREVIEW_TYPES = ("PreviewImage", "PreviewAny")
# Minimum sizes of nodes that grow when they show an image or a text.
MIN_NODE_SIZES = {
    "LoadImage": (300, 330),
    "PreviewImage": (300, 260),
    "PreviewAny": (340, 170),
    "SaveImage": (360, 400),
    "CLIPTextEncode": (360, 150),
    NOTE_TYPE: (420, 300),
}
ApiPrompt = dict[str, Any]
Workflow = dict[str, Any]


def renumber_nodes(prompt: ApiPrompt) -> ApiPrompt:
    """The prompt with the ids 1, 2, ... in the same order: the front end needs numbers."""
    ids = {old: str(number) for number, old in enumerate(prompt, 1)}
    return {
        ids[old]: {**node, "inputs": {name: _renumber_link(value, ids) for name, value in node["inputs"].items()}}
        for old, node in prompt.items()
    }


def _renumber_link(value: Any, ids: dict[str, str]) -> Any:
    linked = isinstance(value, list) and len(value) == 2 and value[0] in ids
    return [ids[value[0]], value[1]] if linked else value


def fill_defaults(prompt: ApiPrompt, info: dict[str, Any]) -> ApiPrompt:
    """Only classes and declared inputs, with the defaults of omitted optional widgets, to compare prompts."""
    out = {}
    for number, node in prompt.items():
        node_info = info[node["class_type"]]
        declared = {*node_info["input"].get("required", {}), *(node_info["input"].get("optional") or {})}
        inputs = {name: value for name, value in node["inputs"].items() if name.partition(".")[0] in declared}
        out[number] = {"class_type": node["class_type"], "inputs": {**dict(_default_inputs(node_info)), **inputs}}
    return out


def _default_inputs(info: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, (_, *options) in (info["input"].get("optional") or {}).items():
        if options and "default" in options[0]:
            yield name, options[0]["default"]


def build_workflow(name: str, prompt: ApiPrompt, opened: browser.OpenedWorkflow) -> Workflow:
    """The front end's workflow of a numbered prompt, with our layout, properties, note and fixed ids."""
    exported = opened.workflow
    nodes = sorted((_build_node(node, opened.sizes) for node in exported["nodes"]), key=lambda node: node["id"])
    renumber = {link[0]: number for number, link in enumerate(sorted(exported["links"], key=_link_order), 1)}
    links = sorted([renumber[i], int(a), b, int(c), d, kind] for i, a, b, c, d, kind in exported["links"])
    for node in nodes:
        for socket in node.get("inputs", []):
            socket["link"] = renumber.get(socket.get("link"))
        for socket in node.get("outputs", []):
            socket["links"] = sorted(renumber[link] for link in socket.get("links") or []) or None
    nodes.append(_build_note(len(nodes) + 1, workflow_notes.format_note(name, prompt)))
    groups = arrange_nodes(nodes, links)
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


def _link_order(link: list[Any]) -> tuple[int, int, int, int]:
    return int(link[3]), link[4], int(link[1]), link[2]


def _build_node(node: dict[str, Any], sizes: dict[str, list[int]]) -> dict[str, Any]:
    node_type, computed = node["type"], sizes[str(node["id"])]
    minimum = MIN_NODE_SIZES.get(node_type, (NODE_WIDTH, 0))
    size = [max(minimum[0], -(-computed[0] // 10) * 10), max(minimum[1], -(-computed[1] // 10) * 10)]
    from_pack = node_type.startswith(NODE_PREFIX)
    properties = dict(node["properties"])
    if from_pack:
        properties |= {"cnr_id": REGISTRY_NAME, "ver": read_pack_version()}
    sources = {
        value: workflow_notes.MODEL_SOURCES[value]
        for value in node.get("widgets_values") or []
        if isinstance(value, str) and value in workflow_notes.MODEL_SOURCES
    }
    models = [
        {"name": file, "url": url, "directory": folder}
        for file, (url, folder) in sources.items()
        if workflow_notes.is_direct_link(url)
    ]
    if models:
        properties["models"] = models
    colours = PACK_NODE_COLOURS if from_pack else {}
    return {**node, "id": int(node["id"]), "size": size, "properties": properties, **colours}


def _build_note(number: int, text: str) -> dict[str, Any]:
    return {
        "id": number,
        "type": NOTE_TYPE,
        "pos": [0, 0],
        "size": list(MIN_NODE_SIZES[NOTE_TYPE]),
        "flags": {},
        "order": 0,
        "mode": 0,
        "inputs": [],
        "outputs": [],
        "title": "About",
        "properties": {},
        "widgets_values": [text],
    }


def read_pack_version() -> str:
    """The version of the pack in pyproject.toml."""
    lines = (host.ROOT / "pyproject.toml").read_text(encoding="utf-8").splitlines()
    return next(line.split('"')[1] for line in lines if line.startswith("version = "))


def arrange_nodes(nodes: list[dict[str, Any]], links: Sequence[Sequence[Any]]) -> list[dict[str, Any]]:
    """Place the nodes in their groups, in columns along the links; the groups as the workflow stores them."""
    sources: dict[int, list[int]] = {node["id"]: [] for node in nodes}
    for _, source, _, target, *_ in links:
        sources[target].append(source)
    by_id = {node["id"]: node for node in nodes}
    node_groups = {node["id"]: _find_group(node["id"], by_id, sources) for node in nodes}
    boxes: list[dict[str, Any]] = []
    top = 0.0
    for band in sorted({group.band for group in NODE_GROUPS}):
        left = bottom = 0.0
        for group in NODE_GROUPS:
            members = [node for node in nodes if node_groups[node["id"]] is group]
            if group.band == band and members:
                members.sort(key=lambda node: node["type"] in PREVIEW_TYPES)
                columns = _sort_into_columns([node["id"] for node in members], sources)
                width, height = _place_columns([[by_id[i] for i in column] for column in columns], left, top)
                box = [left, top, width, height]
                boxes.append(
                    {"id": len(boxes) + 1, "title": group.title, "bounding": box, "color": group.color,
                     "font_size": 24, "flags": {}}
                )  # fmt: skip
                left, bottom = left + width + NODE_GAP, max(bottom, height)
        top += bottom + NODE_GAP if bottom else 0
    return boxes


def _find_group(number: int, by_id: dict[int, dict[str, Any]], sources: dict[int, list[int]]) -> NodeGroup:
    node_type = by_id[number]["type"]
    if node_type in PREVIEW_TYPES:
        return _find_group(sources[number][0], by_id, sources)
    candidates = [group for group in NODE_GROUPS if node_type in group.node_types]
    if not candidates:
        raise host.HostError(f"got {node_type}, which is in no group; add it to NODE_GROUPS in {Path(__file__).name}")
    consumers = {by_id[other]["type"] for other, inputs in sources.items() if number in inputs}
    return next((group for group in candidates if consumers and consumers <= {*group.node_types}), candidates[0])


def _sort_into_columns(members: Sequence[int], sources: dict[int, list[int]]) -> list[list[int]]:
    """The members by the length of the longest path to them within the group."""
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


def _place_columns(columns: list[list[dict[str, Any]]], left: float, top: float) -> tuple[float, float]:
    """Stack the nodes of each column; the width and height of the box around all."""
    x, bottom = left + GROUP_PADDING, 0.0
    for column in columns:
        y = top + GROUP_HEADER_HEIGHT + TITLE_HEIGHT
        for node in column:
            node["pos"] = [x, y]
            y += node["size"][1] + TITLE_HEIGHT + NODE_GAP
        bottom = max(bottom, y - TITLE_HEIGHT - NODE_GAP)
        x += max(node["size"][0] for node in column) + COLUMN_GAP
    return x - COLUMN_GAP + GROUP_PADDING - left, bottom + GROUP_PADDING - top


def write_workflow(front_end: browser.FrontEnd, name: str, info: dict[str, Any]) -> Workflow:
    """Convert one prompt and write its workflow and thumbnail. Raises HostError if the front end reports problems."""
    prompt = renumber_nodes(demo.read_prompt(name))
    workflow = build_workflow(name, prompt, front_end.open_workflow(prompt))
    opened = front_end.open_workflow(workflow)
    if opened.problems:
        raise host.HostError("\n  ".join([f"the front end reports problems with {name}:", *opened.problems]))
    if fill_defaults(opened.prompt, info) != fill_defaults(prompt, info):
        raise host.HostError(f"{name} does not convert back to its prompt; check the names of its inputs")
    WORKFLOW_FOLDER.mkdir(exist_ok=True)
    text = json.dumps(workflow, indent=1, ensure_ascii=False) + "\n"
    (WORKFLOW_FOLDER / f"{name}.json").write_text(text, encoding="utf-8")
    front_end.screenshot(WORKFLOW_FOLDER / f"{name}.jpg")
    return workflow


def write_workflows(server: Server, names: Sequence[str]) -> None:
    info = server.get_object_info()
    with browser.launch_browser() as chromium:
        for name in names:
            write_workflow(browser.open_front_end(chromium, server.url, scale=2), name, info)
            host.print_status(f"wrote workflows/{name}.json")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.build_workflows", description=__doc__)
    parser.add_argument("names", nargs="*", help="prompts to convert (default: all)")
    names = parser.parse_args(arguments).names or demo.list_workflows()
    prompts = [demo.read_prompt(name) for name in {*names, LIBRARY_WORKFLOW}]
    comfyui = host.prepare_host(required_modules=(*host.RUNTIME_MODULES, "skimage", "playwright"))
    base = host.HOST_FOLDER / "base"
    models = sorted({file for prompt in prompts for file in demo.list_model_files(prompt)})
    command = [comfyui.python, "-c", PREPARE_SCRIPT, base, *models]
    if subprocess.run(command, cwd=host.ROOT, env=host.build_environment(comfyui)).returncode:
        raise host.HostError("the stand-in models and sample photos could not be written, see above")
    try:
        with start_server(comfyui, base) as server:
            server.run_prompt(demo.read_prompt(LIBRARY_WORKFLOW))
            write_workflows(server, names)
    except ServerError as error:
        raise host.HostError(str(error)) from error
    return 0


if __name__ == "__main__":
    sys.exit(host.run_tool(main))
