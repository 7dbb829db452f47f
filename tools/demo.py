"""`python -m tools.demo`: makes a gallery, one HTML file, method by method, by the small models of the pack.

With --workflow it runs a workflow headless through a real ComfyUI server on a real photo.
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
from .gallery import render
from .gallery.methods import METHODS
from .server import Server, ServerError, serve

PROMPTS = Path(__file__).parent / "prompts"
GALLERY = "gallery"
LIBRARY = "identity_library_make"  # what it keeps, others load
PHOTOS = "import sys, pathlib; from tools import photos; photos.make(pathlib.Path(sys.argv[1]))"
STAND_INS = "import sys, pathlib; from tools import standins; standins.make(pathlib.Path(sys.argv[1]), sys.argv[2:])"
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")

# Where weights are random a large picture shows no more, and takes minutes on a CPU.
SMALL: dict[str, dict[str, int]] = {
    "EmptyLatentImage": {"width": 256, "height": 256},
    "EmptySD3LatentImage": {"width": 256, "height": 256},
    "LikenessTemplateKeyPoints": {"width": 256, "height": 256},
    "LikenessFaceKeyPoints": {"width": 256, "height": 256},
    "ImageScale": {"width": 256, "height": 256},
    "KSampler": {"steps": 4},
    "LikenessApplyFused": {"face_size": 256},
    "LikenessTrailingSchedule": {"steps": 4},
}

# FLUX's second text encoder is too large to stand in for: the stand-in reads CLIP-L's text.
INSTEAD: dict[str, dict[str, Any]] = {
    "DualCLIPLoader": {
        "class_type": "CLIPLoader", "inputs": {"clip_name": "clip_l.safetensors", "type": "stable_diffusion"},
    },
}  # fmt: skip

# What a prompt reads of weights/, which needs no stand-in, by a class or a value in it.
DEMO = "LikenessLoadDemo"
BROUGHT = {
    DEMO: render.MODELS,
    "demo": render.PACK,
    **{Path(file).name: (file,) for one in METHODS for file in one.files},
}

Prompt = dict[str, Any]


def names() -> list[str]:
    """The workflows that can be run."""
    return sorted(file.stem for file in PROMPTS.glob("*.json"))


def read(name: str) -> Prompt:
    """A workflow's API prompt. Raises HostError naming the ones there are."""
    if name not in names():
        raise host.HostError(f"got the workflow {name!r}; expected one of {', '.join(names()) or 'none yet'}")
    return json.loads((PROMPTS / f"{name}.json").read_text())


def small(prompt: Prompt) -> Prompt:
    """The prompt for a small picture in few steps."""
    return {
        key: {**node, "inputs": {**node["inputs"], **SMALL.get(node["class_type"], {})}} for key, node in prompt.items()
    }


def for_stand_ins(prompt: Prompt) -> Prompt:
    """The prompt with what cannot be stood in for replaced."""
    return {key: INSTEAD.get(node["class_type"], node) for key, node in prompt.items()}


def photos(prompt: Prompt) -> set[str]:
    """The names under which the prompt's LoadImage nodes look for photos."""
    return {node["inputs"]["image"] for node in prompt.values() if node["class_type"] == "LoadImage"}


def files(prompt: Prompt) -> list[str]:
    """The model files that the prompt names."""
    values = {value for node in prompt.values() for value in node["inputs"].values() if isinstance(value, str)}
    return sorted(value for value in values if value.endswith(WEIGHTS))


def unshipped(prompt: Prompt) -> list[str]:
    """What the prompt reads of weights/ and is not there yet."""
    said = [word for node in prompt.values() for word in (node["class_type"], *node["inputs"].values())]
    wanted = [file for word in said if isinstance(word, str) for file in BROUGHT.get(word, ())]
    return [file for file in dict.fromkeys(wanted) if not (render.WEIGHTS / file).is_file()]


def missing(prompt: Prompt, info: dict[str, Any]) -> list[str]:
    """Nodes that the server lacks, and choices (model files) that its nodes do not offer, as readable lines."""
    lines = []
    for number, node in prompt.items():
        kind = node["class_type"]
        if kind not in info:
            lines.append(f"node {number}: the server has no {kind}")
            continue
        for name, options in choices(info[kind]):
            value = node["inputs"].get(name)
            if isinstance(value, str) and value not in options:
                lines.append(f"node {number} ({kind}): {name} = {value}")
    return lines


def choices(info: dict[str, Any]) -> Iterator[tuple[str, list[Any]]]:
    """A node's inputs that are a choice, with what they offer."""
    for group in ("required", "optional"):
        for name, entry in (info["input"].get(group) or {}).items():
            if isinstance(entry[0], list):
                yield name, entry[0]
            elif entry[0] == "COMBO" and isinstance(entry[1].get("options"), list):
                yield name, entry[1]["options"]


def show_photo(prompt: Prompt, photo: Path | None, base: Path, python: Path) -> None:
    """Put the photo where the prompt looks for it; by default NASA's portrait of the astronaut Eileen Collins."""
    folder = base / "input"
    folder.mkdir(parents=True, exist_ok=True)
    if photo is None:
        host.command([python, "-c", PHOTOS, folder])
    for name in photos(prompt):
        if photo is not None or not (folder / name).exists():
            shutil.copyfile(photo or folder / "portrait.png", folder / name)


def own_models(path: Path, base: Path) -> list[str]:
    """Server options that show it the model folders of an existing ComfyUI. JSON is YAML."""
    folders = {folder.name: folder.name for folder in sorted((path / "models").iterdir()) if folder.is_dir()}
    config = base / "models.yaml"
    base.mkdir(parents=True, exist_ok=True)
    config.write_text(json.dumps({"likeness": {"base_path": str(path / "models"), **folders}}))
    return ["--extra-model-paths-config", str(config)]


def run(server: Server, prompt: Prompt) -> list[Path]:
    """Run the prompt; the pictures that it saved. Raises ServerError."""
    host.say("running the workflow")
    pictures = server.files(server.queue(prompt))
    return [picture for picture in pictures if picture.is_relative_to(server.output)]


def on_own_models(found: host.Host, prompt: Prompt, photo: Path | None, output: Path, cpu: bool) -> list[Path] | None:
    """Run on the models of the user's ComfyUI; None, with the reason told, where some are not there."""
    base = host.HOME / "base-own"
    show_photo(prompt, photo, base, found.python)
    with serve(found, base, cpu=cpu, output=output, options=own_models(found.path, base)) as server:
        lacks = missing(prompt, server.object_info())
        if not lacks:
            return run(server, prompt)
    host.say(f"{found.path} lacks what the workflow names:\n  " + "\n  ".join(lacks))
    return None


def on_stand_ins(found: host.Host, prompt: Prompt, photo: Path | None, output: Path, cpu: bool) -> list[Path]:
    """Run on small models with random weights, made in `.host/base/models`."""
    base = host.HOME / "base"
    if all(node["class_type"] != DEMO for node in prompt.values()):
        host.say("using stand-in models with random weights: the pictures will be noise, only the plumbing is real")
        prompt = for_stand_ins(small(prompt) if cpu else prompt)
    show_photo(prompt, photo, base, found.python)
    words = [found.python, "-c", STAND_INS, base, *files(prompt)]
    if subprocess.run(words, cwd=host.ROOT, env=host.environment(found)).returncode:
        raise host.HostError("the stand-in models could not be made, see above")
    with serve(found, base, cpu=cpu, output=output) as server:
        if any(node["class_type"] == "LikenessLoadIdentity" for node in prompt.values()):
            host.say(f"running {LIBRARY} first, which makes the identities")
            run(server, read(LIBRARY))
        lacks = missing(prompt, server.object_info())
        if lacks:
            raise host.HostError("the server lacks what the workflow names:\n  " + "\n  ".join(lacks))
        return run(server, prompt)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.demo", description=__doc__)
    parser.add_argument("--workflow", metavar="NAME", help="a workflow to run instead of making the gallery")
    parser.add_argument("--photo", type=Path, metavar="FILE", help="the workflow's person (default: an astronaut)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where what is made goes (default: in .host/demo)")
    parser.add_argument("--list", action="store_true", help="print the names of the workflows")
    return parser.parse_args(arguments)


def work(arguments: list[str]) -> int:
    options = parse(arguments)
    if options.list:
        print("\n".join(names()))
        return 0
    if options.workflow is None and options.photo is not None:
        raise host.HostError(
            "got a photo for the gallery, which has people of its own; name a workflow to run on it, as "
            "--workflow portrait_faceid_plusv2"
        )
    output = (options.out or host.HOME / "demo" / (options.workflow or GALLERY)).resolve()
    try:
        return gallery(output) if options.workflow is None else one(options, output)
    except ServerError as error:
        raise host.HostError(str(error)) from error


def gallery(output: Path) -> int:
    """Make the gallery in a folder, and say where it is."""
    print(render.make(output / f"{GALLERY}.html"))
    return 0


def one(options: argparse.Namespace, output: Path) -> int:
    """Run a workflow, and say where its pictures are."""
    prompt = read(options.workflow)
    if options.photo is not None and not options.photo.is_file():
        raise host.HostError(f"got the photo {options.photo}, which is not there; name a picture file")
    found = host.bring()
    given = (found, prompt, options.photo, output, not host.has_accelerator(found))
    pictures = None if found.ours else on_own_models(*given)
    pictures = on_stand_ins(*given) if pictures is None else pictures
    print("\n".join(["pictures:", *map(str, pictures)]) if pictures else f"the workflow saved no picture in {output}")
    return 0


if __name__ == "__main__":
    sys.exit(host.main(work))
