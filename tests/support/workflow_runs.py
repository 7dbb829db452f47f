"""The workflows of the repository, variants of their prompts for fast runs, and their results."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from comfyui_likeness.portrait_world.gallery import render
from comfyui_likeness.portrait_world.gallery.gallery_methods import GALLERY_METHODS
from comfyui_likeness.tools import demo
from comfyui_likeness.tools.server import Server
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS_FOLDER = ROOT / "workflows"
# Class or input value in a prompt -> files in weights/ that it needs, for which there are no stand-ins.
SHIPPED_FILES = {
    demo.DEMO_LOADER_NODE: render.DEMO_MODEL_FILES,
    "demo": render.FACE_MODEL_FILES,
    **{Path(file).name: (file,) for method in GALLERY_METHODS for file in method.files},
}
SMALL_RUN_INPUTS: dict[str, dict[str, Any]] = {
    "EmptyLatentImage": {"width": 128, "height": 128, "batch_size": 1},
    "EmptySD3LatentImage": {"width": 128, "height": 128},
    "LikenessTemplateKeyPoints": {"width": 128, "height": 128},
    "LikenessFaceKeyPoints": {"width": 128, "height": 128},
    "ImageScale": {"width": 128, "height": 128},
    "KSampler": {"steps": 2},
    "LikenessApplyFused": {"face_size": 128},
    "LikenessTrailingSchedule": {"steps": 2},
}
# Nodes that apply an identity, and inputs with which each has no effect; None: not connected.
NEUTRAL_APPLY_INPUTS: dict[str, dict[str, Any]] = {
    "LikenessApplyDecoupled": {"strength": 0.0},
    "LikenessApplyReference": {"strength": 0.0, "face_position": None},
    "LikenessApplyFused": {"strength": 0.0},
    "LikenessApplyMixed": {"strength": 0.0},
    "LikenessPrompt": {"strength": 0.0},
}

Prompt = dict[str, Any]


def list_unshipped_files(prompt: Prompt) -> list[str]:
    """The files in weights/ that the prompt needs and that do not exist yet."""
    values = [value for node in prompt.values() for value in (node["class_type"], *node["inputs"].values())]
    needed = [file for value in values if isinstance(value, str) for file in SHIPPED_FILES.get(value, ())]
    return [file for file in dict.fromkeys(needed) if not (render.WEIGHTS_FOLDER / file).is_file()]


# Workflows without weights have not been built, and cannot be run.
UNSHIPPED_WORKFLOWS = {
    name: files for name in demo.list_workflows() if (files := list_unshipped_files(demo.read_prompt(name)))
}
WORKFLOW_NAMES = [name for name in demo.list_workflows() if name not in UNSHIPPED_WORKFLOWS]


def read_workflow(name: str) -> dict[str, Any]:
    return json.loads((WORKFLOWS_FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def make_small_prompt(name: str, **changes: dict[str, Any]) -> Prompt:
    """A prompt with a small image and few steps; `changes`: inputs by class, None removes one."""
    prompt = demo.replace_nodes(copy.deepcopy(demo.read_prompt(name)))
    for node in prompt.values():
        inputs = node["inputs"] | SMALL_RUN_INPUTS.get(node["class_type"], {}) | changes.get(node["class_type"], {})
        node["inputs"] = {key: value for key, value in inputs.items() if value is not None}
    return prompt


def remove_apply_nodes(prompt: Prompt) -> Prompt:
    """The prompt without its Apply nodes: their consumers get the model that was connected to them.

    LikenessPrompt is replaced by CLIPTextEncode with the class word.
    """
    removed = {
        key: node
        for key, node in prompt.items()
        if node["class_type"] in NEUTRAL_APPLY_INPUTS and "model" in node["inputs"]
    }
    rest: Prompt = {}
    for key, node in prompt.items():
        if node["class_type"] == "LikenessPrompt":
            rest |= encode_class_word(key, node["inputs"])
        elif key not in removed:
            rest[key] = copy.deepcopy(node)
    for node in rest.values():
        for name, value in node["inputs"].items():
            while isinstance(value, list) and value[0] in removed:
                value = removed[value[0]]["inputs"]["model"]
            node["inputs"][name] = value
    return rest


def encode_class_word(key: str, inputs: dict[str, Any]) -> Prompt:
    """ComfyUI nodes that encode the prompt with the class word in place of each `@name`."""
    word, text = inputs["class_word"], inputs["text"]
    if isinstance(text, str):
        text, extra_nodes = re.sub(r"@\w+", word, text), {}
    else:
        extra_nodes = {f"{key}_text": make_node("StringReplace", string=text, find="@anna", replace=word)}
        text = [f"{key}_text", 0]
    return extra_nodes | {key: make_node("CLIPTextEncode", clip=inputs["clip"], text=text)}


def make_node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def load_saved_image(server: Server, entry: dict[str, Any]) -> np.ndarray:
    """The only image that a run saved, [height, width, 3] uint8."""
    files = [file for file in server.list_output_files(entry) if file.is_relative_to(server.output_directory)]
    assert len(files) == 1, files
    with Image.open(files[0]) as image:
        return np.asarray(image.convert("RGB"))


def run_prompt(server: Server, prompt: Prompt) -> dict[str, Any]:
    """Run a prompt that must be valid in every node and must succeed; its history entry."""
    answer = server.post_json("/prompt", {"prompt": prompt})
    assert not answer["node_errors"], answer["node_errors"]
    entry = server.wait_for_prompt(answer["prompt_id"])
    assert entry["status"]["status_str"] == "success", entry["status"]["messages"]
    return entry


def render_prompt(server: Server, prompt: Prompt) -> np.ndarray:
    return load_saved_image(server, run_prompt(server, prompt))


def list_cached_nodes(entry: dict[str, Any]) -> set[str]:
    """The nodes whose results came from the server's cache."""
    messages = entry["status"]["messages"]
    return {node for kind, message in messages if kind == "execution_cached" for node in message["nodes"]}


def find_input_mismatches(prompt: Prompt, object_info: dict[str, Any]) -> list[tuple[str, ...]]:
    """Inputs that the nodes do not declare or that have the wrong type, and required inputs that are missing."""
    mismatches = []
    for node in prompt.values():
        node_info, node_type = object_info[node["class_type"]], node["class_type"]
        declared = {**node_info["input"].get("required", {}), **(node_info["input"].get("optional") or {})}
        autogrow = {key for key, (socket_type, *_) in declared.items() if socket_type == "COMFY_AUTOGROW_V3"}
        for key, value in node["inputs"].items():
            root = key.partition(".")[0]
            if key not in declared and root not in autogrow:
                mismatches.append((node_type, key, "not declared"))
            elif isinstance(value, list):
                output_type = object_info[prompt[value[0]]["class_type"]]["output"][value[1]]
                input_type = declared[key][0] if key in declared else declared[root][1]["template"]["input"]["required"]
                input_type = input_type if isinstance(input_type, str) else next(iter(input_type.values()))[0]
                if input_type != "*" and not set(input_type.split(",")) & set(output_type.split(",")):
                    mismatches.append((node_type, key, input_type, output_type))
        missing = set(node_info["input"].get("required", {})) - set(node["inputs"]) - autogrow
        mismatches += [(node_type, key, "missing") for key in missing]
    return mismatches
