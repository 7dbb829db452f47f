"""The workflows of the repository, smaller variants of their prompts, and what the server makes of them."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from comfyui_likeness.tools import demo
from comfyui_likeness.tools.server import Server
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = ROOT / "workflows"
# Workflows whose weights do not ship yet have not been made, and cannot be run.
UNSHIPPED = {name: files for name in demo.names() if (files := demo.unshipped(demo.read(name)))}
NAMES = [name for name in demo.names() if name not in UNSHIPPED]
SMALL: dict[str, dict[str, Any]] = {
    "EmptyLatentImage": {"width": 128, "height": 128, "batch_size": 1},
    "EmptySD3LatentImage": {"width": 128, "height": 128},
    "LikenessTemplateKeyPoints": {"width": 128, "height": 128},
    "LikenessFaceKeyPoints": {"width": 128, "height": 128},
    "ImageScale": {"width": 128, "height": 128},
    "KSampler": {"steps": 2},
    "LikenessApplyFused": {"face_size": 128},
    "LikenessTrailingSchedule": {"steps": 2},
}
# Nodes that put an identity into a model, and what makes each do nothing; None is nothing connected.
APPLY: dict[str, dict[str, Any]] = {
    "LikenessApplyDecoupled": {"strength": 0.0},
    "LikenessApplyReference": {"strength": 0.0, "face_position": None},
    "LikenessApplyFused": {"strength": 0.0},
    "LikenessApplyMixed": {"strength": 0.0},
    "LikenessPrompt": {"strength": 0.0},
}

Prompt = dict[str, Any]


def workflow(name: str) -> dict[str, Any]:
    return json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))


def small(name: str, **changes: dict[str, Any]) -> Prompt:
    """A prompt of the repository for a small picture in few steps; `changes` are inputs by class, None removes one."""
    prompt = demo.for_stand_ins(copy.deepcopy(demo.read(name)))
    for node in prompt.values():
        inputs = node["inputs"] | SMALL.get(node["class_type"], {}) | changes.get(node["class_type"], {})
        node["inputs"] = {key: value for key, value in inputs.items() if value is not None}
    return prompt


def bare(prompt: Prompt) -> Prompt:
    """The prompt without its Apply nodes: whoever took their model takes the one that they took.

    A prompt with a person becomes one of ComfyUI's own that says the class word.
    """
    gone = {key: node for key, node in prompt.items() if node["class_type"] in APPLY and "model" in node["inputs"]}
    rest: Prompt = {}
    for key, node in prompt.items():
        if node["class_type"] == "LikenessPrompt":
            rest |= said(key, node["inputs"])
        elif key not in gone:
            rest[key] = copy.deepcopy(node)
    for node in rest.values():
        for name, value in node["inputs"].items():
            while isinstance(value, list) and value[0] in gone:
                value = gone[value[0]]["inputs"]["model"]
            node["inputs"][name] = value
    return rest


def said(key: str, given: dict[str, Any]) -> Prompt:
    """ComfyUI's own nodes that encode a prompt with the class word for each `@name`."""
    word, text = given["class_word"], given["text"]
    if isinstance(text, str):
        text, more = re.sub(r"@\w+", word, text), {}
    else:
        more = {f"{key}_text": made("StringReplace", string=text, find="@anna", replace=word)}
        text = [f"{key}_text", 0]
    return more | {key: made("CLIPTextEncode", clip=given["clip"], text=text)}


def made(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def pixels(server: Server, entry: dict[str, Any]) -> np.ndarray:
    """The one picture that a run saved, [height, width, 3] uint8."""
    saved = [file for file in server.files(entry) if file.is_relative_to(server.output)]
    assert len(saved) == 1, saved
    with Image.open(saved[0]) as picture:
        return np.asarray(picture.convert("RGB"))


def run(server: Server, prompt: Prompt) -> dict[str, Any]:
    """The history entry of a prompt that the server took without an objection to any node, and ran to its end."""
    answer = server.post("/prompt", {"prompt": prompt})
    assert not answer["node_errors"], answer["node_errors"]
    entry = server.wait(answer["prompt_id"])
    assert entry["status"]["status_str"] == "success", entry["status"]["messages"]
    return entry


def paint(server: Server, prompt: Prompt) -> np.ndarray:
    return pixels(server, run(server, prompt))


def cached(entry: dict[str, Any]) -> set[str]:
    """The nodes that a run took from the server's cache."""
    told = entry["status"]["messages"]
    return {node for kind, message in told if kind == "execution_cached" for node in message["nodes"]}


def misfits(prompt: Prompt, info: dict[str, Any]) -> list[tuple[str, ...]]:
    """Where a prompt gives a node what `info`, the server's, does not declare, or leaves out what it requires."""
    found = []
    for node in prompt.values():
        about, kind = info[node["class_type"]], node["class_type"]
        names = {**about["input"].get("required", {}), **(about["input"].get("optional") or {})}
        grown = {key for key, (wanted, *_) in names.items() if wanted == "COMFY_AUTOGROW_V3"}
        for key, value in node["inputs"].items():
            root = key.partition(".")[0]
            if key not in names and root not in grown:
                found.append((kind, key, "not declared"))
            elif isinstance(value, list):
                given = info[prompt[value[0]]["class_type"]]["output"][value[1]]
                wanted = names[key][0] if key in names else names[root][1]["template"]["input"]["required"]
                wanted = wanted if isinstance(wanted, str) else next(iter(wanted.values()))[0]
                if wanted != "*" and not set(wanted.split(",")) & set(given.split(",")):
                    found.append((kind, key, wanted, given))
        missing = set(about["input"].get("required", {})) - set(node["inputs"]) - grown
        found += [(kind, key, "left out") for key in missing]
    return found
