"""`python -m tools.demo`: renders the gallery, an HTML page that compares all methods, with the pack's demo models.

With --workflow it runs a workflow on a ComfyUI server, on your photo and your models.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import host
from .server import Server, ServerError, start_server

PROMPT_FOLDER = Path(__file__).parent / "workflow_prompts"
GALLERY_NAME = "gallery"
GALLERY_MODULE = "portrait_world.gallery.run"
LIBRARY_WORKFLOW = "identity_library_make"  # saves the identities that other workflows load
WRITE_PHOTOS_SCRIPT = (
    "import sys, pathlib; from tools import sample_photos; sample_photos.write_sample_photos(pathlib.Path(sys.argv[1]))"
)
WRITE_STANDINS_SCRIPT = (
    "import sys, pathlib; from tools.standins import build;"
    " build.write_standins(pathlib.Path(sys.argv[1]), sys.argv[2:])"
)
WEIGHTS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")

# With random weights a large image shows nothing more, and takes minutes on a CPU.
SMALL_RUN_INPUTS: dict[str, dict[str, int]] = {
    "EmptyLatentImage": {"width": 256, "height": 256},
    "EmptySD3LatentImage": {"width": 256, "height": 256},
    "LikenessTemplateKeyPoints": {"width": 256, "height": 256},
    "LikenessFaceKeyPoints": {"width": 256, "height": 256},
    "ImageScale": {"width": 256, "height": 256},
    "KSampler": {"steps": 4},
    "LikenessApplyFused": {"face_size": 256},
    "LikenessTrailingSchedule": {"steps": 4},
}

# FLUX's second text encoder is too large for a stand-in: the FLUX stand-in is conditioned on CLIP-L alone.
NODE_REPLACEMENTS: dict[str, dict[str, Any]] = {
    "DualCLIPLoader": {
        "class_type": "CLIPLoader", "inputs": {"clip_name": "clip_l.safetensors", "type": "stable_diffusion"},
    },
}  # fmt: skip

DEMO_LOADER_NODE = "LikenessLoadDemo"  # workflows with this node run on the weights of the pack

ApiPrompt = dict[str, Any]


def list_workflows() -> list[str]:
    """The names of the workflows."""
    return sorted(file.stem for file in PROMPT_FOLDER.glob("*.json"))


def read_prompt(name: str) -> ApiPrompt:
    """A workflow's API prompt. Raises HostError, naming the workflows, if it does not exist."""
    if name not in list_workflows():
        raise host.HostError(f"got the workflow {name!r}; expected one of {', '.join(list_workflows())}")
    return json.loads((PROMPT_FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def shrink_prompt(prompt: ApiPrompt) -> ApiPrompt:
    """The prompt with a small image size and few steps."""
    return {
        key: {**node, "inputs": {**node["inputs"], **SMALL_RUN_INPUTS.get(node["class_type"], {})}}
        for key, node in prompt.items()
    }


def replace_nodes(prompt: ApiPrompt) -> ApiPrompt:
    """The prompt with the nodes replaced whose models have no stand-in."""
    return {key: NODE_REPLACEMENTS.get(node["class_type"], node) for key, node in prompt.items()}


def list_photos(prompt: ApiPrompt) -> set[str]:
    """The file names in the prompt's LoadImage nodes."""
    return {node["inputs"]["image"] for node in prompt.values() if node["class_type"] == "LoadImage"}


def list_model_files(prompt: ApiPrompt) -> list[str]:
    """The names of the model files in the prompt."""
    values = {value for node in prompt.values() for value in node["inputs"].values() if isinstance(value, str)}
    return sorted(value for value in values if value.endswith(WEIGHTS_SUFFIXES))


def describe_missing(prompt: ApiPrompt, info: dict[str, Any]) -> list[str]:
    """A line for each node that the server lacks, and for each choice (model file) that its nodes do not offer."""
    lines = []
    for number, node in prompt.items():
        kind = node["class_type"]
        if kind not in info:
            lines.append(f"node {number}: the server has no {kind}")
            continue
        for name, options in iterate_choices(info[kind]):
            value = node["inputs"].get(name)
            if isinstance(value, str) and value not in options:
                lines.append(f"node {number} ({kind}): {name} = {value}")
    return lines


def iterate_choices(info: dict[str, Any]) -> Iterator[tuple[str, list[Any]]]:
    """The combo inputs of a node and their options."""
    for group in ("required", "optional"):
        for name, entry in (info["input"].get(group) or {}).items():
            if isinstance(entry[0], list):
                yield name, entry[0]
            elif entry[0] == "COMBO" and isinstance(entry[1].get("options"), list):
                yield name, entry[1]["options"]


def copy_photos(prompt: ApiPrompt, photo: Path | None, base_directory: Path, python: Path) -> None:
    """Copy the photo to where the prompt expects it; by default NASA's portrait of the astronaut Eileen Collins."""
    folder = base_directory / "input"
    folder.mkdir(parents=True, exist_ok=True)
    if photo is None:
        host.run_command([python, "-c", WRITE_PHOTOS_SCRIPT, folder])
    for name in list_photos(prompt):
        if photo is not None or not (folder / name).exists():
            shutil.copyfile(photo or folder / "portrait.png", folder / name)


def share_model_folders(comfyui_path: Path, base_directory: Path) -> list[str]:
    """Server options that add the model folders of an existing ComfyUI. The config is JSON, which is valid YAML."""
    folders = {folder.name: folder.name for folder in sorted((comfyui_path / "models").iterdir()) if folder.is_dir()}
    config = base_directory / "models.yaml"
    base_directory.mkdir(parents=True, exist_ok=True)
    config.write_text(json.dumps({"likeness": {"base_path": str(comfyui_path / "models"), **folders}}))
    return ["--extra-model-paths-config", str(config)]


def run_prompt(server: Server, prompt: ApiPrompt) -> list[Path]:
    """Run the prompt; the saved images. Raises ServerError."""
    host.print_status("running the workflow")
    files = server.list_output_files(server.run_prompt(prompt))
    return [file for file in files if file.is_relative_to(server.output_directory)]


def run_on_user_models(
    comfyui: host.Host, prompt: ApiPrompt, photo: Path | None, output: Path, cpu: bool
) -> list[Path] | None:
    """Run on the models of the user's ComfyUI. Prints what is missing and returns None if it lacks any."""
    base = host.HOST_FOLDER / "base-own"
    copy_photos(prompt, photo, base, comfyui.python)
    with start_server(
        comfyui, base, cpu=cpu, output_directory=output, options=share_model_folders(comfyui.path, base)
    ) as server:
        missing = describe_missing(prompt, server.get_object_info())
        if not missing:
            return run_prompt(server, prompt)
    host.print_status(f"{comfyui.path} lacks nodes or models of the workflow:\n  " + "\n  ".join(missing))
    return None


def run_on_standins(comfyui: host.Host, prompt: ApiPrompt, photo: Path | None, output: Path, cpu: bool) -> list[Path]:
    """Run on small models with random weights, written to `.host/base/models`."""
    base = host.HOST_FOLDER / "base"
    if all(node["class_type"] != DEMO_LOADER_NODE for node in prompt.values()):
        host.print_status("using stand-in models with random weights: the images will be noise, but every node runs")
        prompt = replace_nodes(shrink_prompt(prompt) if cpu else prompt)
    copy_photos(prompt, photo, base, comfyui.python)
    command = [comfyui.python, "-c", WRITE_STANDINS_SCRIPT, base, *list_model_files(prompt)]
    if subprocess.run(command, cwd=host.ROOT, env=host.build_environment(comfyui)).returncode:
        raise host.HostError("the stand-in models could not be written, see above")
    with start_server(comfyui, base, cpu=cpu, output_directory=output) as server:
        if any(node["class_type"] == "LikenessLoadIdentity" for node in prompt.values()):
            host.print_status(f"running {LIBRARY_WORKFLOW} first, which saves the identities")
            run_prompt(server, read_prompt(LIBRARY_WORKFLOW))
        missing = describe_missing(prompt, server.get_object_info())
        if missing:
            raise host.HostError("the server lacks nodes or models of the workflow:\n  " + "\n  ".join(missing))
        return run_prompt(server, prompt)


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.demo", description=__doc__)
    parser.add_argument("--workflow", metavar="NAME", help="run this workflow instead of the gallery")
    parser.add_argument(
        "--photo", type=Path, metavar="FILE", help="the workflow's photo of a person (default: an astronaut)"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="output folder (default: in .host/demo)")
    parser.add_argument("--list", action="store_true", help="list the workflows")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    options = parse_arguments(arguments)
    if options.list:
        print("\n".join(list_workflows()))
        return 0
    if options.workflow is None and options.photo is not None:
        raise host.HostError(
            "got a photo, but the gallery uses its own people; name a workflow to run on it, for example "
            "--workflow portrait_faceid_plusv2"
        )
    output = (options.out or host.HOST_FOLDER / "demo" / (options.workflow or GALLERY_NAME)).resolve()
    if options.workflow is None:
        return host.run_module(GALLERY_MODULE, [str(output / f"{GALLERY_NAME}.html")])
    try:
        return run_workflow(options, output)
    except ServerError as error:
        raise host.HostError(str(error)) from error


def run_workflow(options: argparse.Namespace, output: Path) -> int:
    """Run a workflow and print the paths of its images."""
    prompt = read_prompt(options.workflow)
    if options.photo is not None and not options.photo.is_file():
        raise host.HostError(f"got the photo {options.photo}, which does not exist; expected an image file")
    comfyui = host.prepare_host()
    arguments = (comfyui, prompt, options.photo, output, not host.has_accelerator(comfyui))
    images = None if comfyui.managed else run_on_user_models(*arguments)
    images = run_on_standins(*arguments) if images is None else images
    print("\n".join(["images:", *map(str, images)]) if images else f"the workflow saved no image in {output}")
    return 0


if __name__ == "__main__":
    sys.exit(host.run_tool(main))
