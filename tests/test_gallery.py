"""The gallery: prompts that the nodes take, and a page that holds every picture and needs nothing else."""

from __future__ import annotations

import copy
import os
import re
import sys
from base64 import b64decode
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pytest
import torch
from comfyui_likeness.tools import demo, frontend, host, screenshot
from comfyui_likeness.tools.gallery import methods, page, prompts, render
from comfyui_likeness.tools.server import Server
from comfyui_likeness.training import world
from flows import misfits
from PIL import Image

VOID = ("meta", "img")
FILED = ("file", "arc2face", "model_pack")  # choices of the files that there are
PARTS = {part.title: part for part in prompts.parts()}
FOUND = ("0.123", "-0.200, 0.456", "no face found", "0.123", "0.123")
REPORT = "\n".join(["a warning", *(f"picture {number}: {found}" for number, found in enumerate(FOUND, 1))])


class Drawing(Server):
    """Paints squares, of a colour for each text and noise, and measures what REPORT says."""

    def __init__(self, output: Path) -> None:
        self.base = self.output = output

    def queue(self, prompt: dict[str, Any], timeout: float = 0) -> dict[str, Any]:
        told = {key: node["inputs"] for key, node in prompt.items()}
        texts = asked(prompt) or range(prompts.PHOTOS)
        colours = [colour(text, told.get("latents", {}).get("seed", 0)) for text in texts]
        images = [self.save(one) for one in colours]
        return {
            "outputs": {"said": {"text": [REPORT]}, "other": {"images": images[:1]}, "pictures": {"images": images}}
        }

    def save(self, colour: tuple[int, ...]) -> dict[str, str]:
        name = f"{len(list(self.output.iterdir()))}.png"
        Image.new("RGB", (8, 8), colour).save(self.output / name)
        return {"type": "output", "filename": name}


def asked(prompt: dict[str, Any]) -> list[str]:
    """The texts of a prompt's batch."""
    said = prompt["texts"]["inputs"] if "texts" in prompt else {}
    return [prompt[key]["inputs"]["text"] for key, _ in said.values()]


def colour(text: object, seed: int) -> tuple[int, ...]:
    return tuple(crc32(f"{text} {seed}".encode()).to_bytes(4, "big")[:3])


class Read(HTMLParser):
    """Raises AssertionError where tags do not match; collects pictures, ids, links and words."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.given: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open += [] if tag in VOID else [tag]
        self.images += [dict(attrs)] if tag == "img" else []
        self.given += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += [data.strip()] if data.strip() else []

    def all(self, name: str) -> list[str]:
        return [value or "" for key, value in self.given if key == name]


@pytest.fixture(scope="module")
def declared() -> dict[str, Any]:
    """What the nodes declare, as the server tells it."""
    import comfy_extras.nodes_mask as masks
    import comfy_extras.nodes_preview_any as texts
    from comfyui_likeness.nodes.loaders import files
    from comfyui_likeness.nodes.registry import NODES
    from comfyui_likeness.tools.gallery import gallery_batch

    import nodes

    files.register()
    extras = [masks.SolidMask, masks.MaskComposite, *NODES]
    kinds = nodes.NODE_CLASS_MAPPINGS | texts.NODE_CLASS_MAPPINGS | gallery_batch.NODE_CLASS_MAPPINGS
    kinds |= {one.define_schema().node_id: one for one in extras}
    wanted = {node["class_type"] for part in PARTS.values() for row in part.rows for node in row.prompt.values()}
    return {
        kind: {"input": kinds[kind].INPUT_TYPES(), "output": list(kinds[kind].RETURN_TYPES)} for kind in sorted(wanted)
    }


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A folder with an empty file for each that the gallery reads."""
    for file in [*render.BASE, *(file for method in methods.METHODS for file in method.files)]:
        (tmp_path / "weights" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "weights" / file).touch()
    return tmp_path / "weights"


def drawn(tmp_path: Path, weights: Path, parts: Sequence[prompts.Part] = ()) -> list[page.Section]:
    (tmp_path / "output").mkdir(exist_ok=True)
    return list(render.run(Drawing(tmp_path / "output"), parts or list(PARTS.values()), weights))


@pytest.mark.parametrize("title", PARTS)
def test_the_nodes_take_every_prompt(title, declared):
    for row in PARTS[title].rows:
        assert misfits(row.prompt, declared) == []
        for node in row.prompt.values():
            for name, options in demo.choices(declared[node["class_type"]]):
                given = node["inputs"].get(name)
                assert given is None or given in options or name in FILED, (node, name)


def test_texts_are_of_the_world():
    assert set(re.findall(r"\w+", " ".join([*prompts.ALONE, *prompts.PAIRS]))) <= set(world.WORDS)


def test_rows_differ_in_nothing_but_the_person():
    """What paints has, in every row of the same prompts, the same noise and prompts as without a person."""
    found = {title: [row.prompt for row in part.rows] for title, part in PARTS.items()}
    (bare,) = found["No adapter"]
    for title in found.keys() - {"Three strangers", "Two people together"}:
        for prompt in found[title]:
            latents = {**prompt["latents"]["inputs"], "model": bare["latents"]["inputs"]["model"]}
            assert latents == bare["latents"]["inputs"] and prompt["empty"] == bare["empty"]
            assert asked(prompt) == asked(bare) == list(prompts.ALONE)


def test_each_picture_of_a_batch_has_its_text():
    from comfyui_likeness.tools.gallery.gallery_batch import GalleryBatch

    first, second = torch.tensor([[[2.0, 1.0]]]), torch.tensor([[[0.0, 3.0]]])
    (((words, told),),) = GalleryBatch().join(prompt_1=[[second, {"of": 1}]], prompt_0=[[first, {"of": 0}]])
    assert torch.equal(words, torch.cat([first, second])) and told == {"of": 0}


def test_the_page_holds_every_picture_and_needs_nothing_else(tmp_path, weights):
    sections = drawn(tmp_path, weights)
    text = page.html("People & <prompts>", ["about"], sections)
    read = Read(text)
    fronts = sum(line.front is not None for section in sections for line in section.lines)
    rows, faced = sum(len(part.rows) for part in PARTS.values()), 3 * len(methods.METHODS)
    assert fronts == faced + 2 and len(read.images) == 5 * rows - 3 + fronts  # three people have but four photos
    for image in read.images:
        kind, _, data = (image["src"] or "").partition(",")
        assert kind == "data:image/png;base64" and Image.open(BytesIO(b64decode(data))).size == (8, 8) and image["alt"]
    assert "People & <prompts>" in read.words and "http" not in text and "<script" not in text
    assert all(link[1:] in read.all("id") for link in read.all("href")) and len(read.all("href")) == len(PARTS)
    # A likeness under each picture of one person by one method, and nowhere else.
    assert [read.words.count(note) for note in ("0.12", "0.46", "no face")] == [3 * faced, faced, faced]


def test_pictures_are_from_left_to_right(tmp_path, weights):
    (section,) = drawn(tmp_path, weights, [PARTS["No adapter"]])
    assert [Image.open(one.file).getpixel((0, 0)) for one in section.lines[0].pictures] == [
        colour(text, prompts.SAMPLING["seed"]) for text in prompts.ALONE
    ]


def test_what_is_missing_is_said_and_the_rest_is_shown(tmp_path, weights):
    (weights / methods.FLASHFACE.files[0]).unlink()
    sections = {section.title: section for section in drawn(tmp_path, weights)}
    assert sections.keys() == PARTS.keys()
    assert [title for title, section in sections.items() if not section.lines] == ["FlashFace"]
    assert "likeness/demo_flashface.safetensors" in sections["FlashFace"].note
    assert sections["FlashFace"].note in Read(page.html("title", [], [sections["FlashFace"]])).words


def test_without_its_models_there_is_no_gallery(tmp_path, weights, monkeypatch):
    monkeypatch.setattr(host, "bring", lambda: pytest.fail("a host was brought"))
    for file in ("demo/unet.safetensors", "insightface/models/demo/detector.onnx"):
        (weights / file).unlink()
    with pytest.raises(host.HostError, match=r"without demo/unet.safetensors, insightface/models/demo/detector.onnx;"):
        render.make(tmp_path / "gallery.html", weights)


def test_a_photo_wants_a_workflow(tmp_path):
    with pytest.raises(host.HostError, match="name a workflow to run on it, as --workflow portrait_faceid_plusv2"):
        demo.work(["--photo", str(tmp_path / "me.png")])


def test_a_file_is_the_person(tmp_path, weights):
    kept = PARTS["A person as a file"]
    (section,) = drawn(tmp_path, weights, [kept])
    assert section.note.startswith("5 of 5 pictures")
    other = copy.deepcopy(kept.rows[1])
    other.prompt["prompt_4"]["inputs"]["text"] = "another"
    (section,) = drawn(tmp_path, weights, [replace(kept, rows=[kept.rows[0], other])])
    assert section.note.startswith("4 of 5 pictures")


@pytest.mark.skipif(not frontend.available(), reason="no Chromium or no playwright")
def test_a_page_becomes_a_picture(tmp_path, weights):
    file, out = tmp_path / "page.html", tmp_path / "page.jpg"
    file.write_text(page.html("title", ["about"], drawn(tmp_path, weights)), encoding="utf-8")
    assert screenshot.work([str(file), str(out), "--dark"]) == 0
    with Image.open(out) as picture:
        assert picture.format == "JPEG" and picture.width == screenshot.WIDTH and picture.height > 2000
        assert picture.convert("L").getpixel((2, 2)) < 60
    screenshot.take(file, out, height=500)
    with Image.open(out) as picture:
        assert picture.size == (screenshot.WIDTH, 500) and picture.convert("L").getpixel((2, 2)) > 200


@pytest.mark.skipif(bool(render.lacking(render.BASE, render.WEIGHTS)), reason="weights/ has no base models yet")
def test_every_part_runs_on_the_shipped_models(tmp_path):
    def quick(part: prompts.Part) -> prompts.Part:
        """One step; the first row, or all where they are to be the same."""
        rows = copy.deepcopy(list(part.rows[: None if part.same else 1]))
        for row in rows:
            for node in row.prompt.values():
                node["inputs"] |= {"steps": 1} if node["class_type"] == "KSampler" else {}
        return replace(part, rows=rows)

    here = host.Host(Path(os.environ["COMFYUI_PATH"]), Path(sys.executable), ours=False)
    with render.started(here, tmp_path) as server:
        sections = list(render.run(server, [quick(part) for part in PARTS.values()], render.WEIGHTS))
    for section in sections:
        pictures = [np.asarray(Image.open(one.file)) for line in section.lines for one in line.pictures]
        assert all(one.shape == (128, 128, 3) and one.std() > 1 for one in pictures)
        if PARTS[section.title].same and pictures:
            assert section.note.startswith("5 of 5")
