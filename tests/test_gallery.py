"""The gallery: prompts that the nodes take, and a page that holds every picture and needs nothing else."""

from __future__ import annotations

import copy
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
from comfyui_likeness.tools import demo, frontend, host, screenshot
from comfyui_likeness.tools.gallery import methods, page, prompts, render
from comfyui_likeness.tools.server import Server
from comfyui_likeness.training import world
from flows import misfits
from PIL import Image

pytest_plugins = ["served"]

VOID = ("meta", "img")
FILED = ("file", "model_pack")  # choices of the files that there are
PARTS = {part.title: part for part in prompts.parts()}
PICTURES = sum(
    prompts.PHOTOS if row.prompt[key]["inputs"]["images"][0].startswith("photos") else 1
    for part in PARTS.values() for row in part.rows for key in row.prompt
    if row.prompt[key]["class_type"] == "SaveImage"
)  # fmt: skip


class Drawing(Server):
    """Paints squares, of a colour for each text and seed, and finds every face 0.123456 like."""

    def __init__(self, output: Path) -> None:
        self.base = self.output = output

    def queue(self, prompt: dict[str, Any], timeout: float = 0) -> dict[str, Any]:
        outputs: dict[str, Any] = {}
        for key, node in prompt.items():
            if node["class_type"] == "SaveImage":
                told = [prompt.get(f"{key}_{part}", {}).get("inputs", {}) for part in ("text", "latent")]
                colour = crc32(f"{told[0].get('text')} {told[1].get('seed')}".encode()) & 0xFFFFFF
                count = 1 if told[0] else prompts.PHOTOS
                outputs[key] = {"images": [self.save(colour + n) for n in range(count)]}
            elif node["class_type"] == "PreviewAny":
                outputs[key] = {"text": ["0.123456"]}
        return {"outputs": dict(reversed(outputs.items()))}  # as they come to be, which is not from left to right

    def save(self, colour: int) -> dict[str, str]:
        name = f"{len(list(self.output.iterdir()))}.png"
        Image.new("RGB", (8, 8), f"#{colour & 0xFFFFFF:06x}").save(self.output / name)
        return {"type": "output", "filename": name}


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
    from comfyui_likeness.nodes.registry import NODES

    import nodes

    extras = [masks.SolidMask, masks.MaskComposite, *NODES]
    kinds = nodes.NODE_CLASS_MAPPINGS | texts.NODE_CLASS_MAPPINGS | {one.define_schema().node_id: one for one in extras}
    wanted = {node["class_type"] for part in PARTS.values() for row in part.rows for node in row.prompt.values()}
    return {
        kind: {"input": kinds[kind].INPUT_TYPES(), "output": list(kinds[kind].RETURN_TYPES)} for kind in sorted(wanted)
    }


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A folder with an empty file for each that the gallery reads."""
    for file in [*render.BASE, *(method.file for method in methods.METHODS)]:
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
    said = [node["inputs"]["text"] for part in PARTS.values() for row in part.rows for node in row.prompt.values()
            if node["class_type"] == "CLIPTextEncode"]  # fmt: skip
    assert set(" ".join(said).split()) <= set(world.WORDS)


def test_a_column_has_one_noise_and_one_prompt():
    """Of the rows that are compared to the bare one, picture by picture."""
    found = set()
    for title in ("No adapter", *(method.title for method in methods.METHODS)):
        for row in PARTS[title].rows:
            found.add(tuple((row.prompt[f"picture_{n}_text"]["inputs"]["text"],
                             row.prompt[f"picture_{n}_latent"]["inputs"]["seed"]) for n in range(5)))  # fmt: skip
    assert len(found) == 1 and len(set(found.pop())) == 5


def test_the_page_holds_every_picture_and_needs_nothing_else(tmp_path, weights):
    sections = drawn(tmp_path, weights)
    text = page.html("People & <prompts>", ["about"], sections)
    read = Read(text)
    fronts = sum(line.front is not None for section in sections for line in section.lines)
    assert len(read.images) == PICTURES + fronts and fronts == 3 * len(methods.METHODS) + 2
    for image in read.images:
        kind, _, data = (image["src"] or "").partition(",")
        assert kind == "data:image/png;base64" and Image.open(BytesIO(b64decode(data))).size == (8, 8) and image["alt"]
    assert "People & <prompts>" in read.words and "http" not in text and "<script" not in text
    assert all(link[1:] in read.all("id") for link in read.all("href")) and len(read.all("href")) == len(PARTS)
    # A likeness under each picture of one person by one method, and nowhere else.
    assert read.words.count("0.12") == len(methods.METHODS) * len(prompts.PEOPLE) * len(prompts.ALONE)


def test_pictures_are_from_left_to_right(tmp_path, weights):
    (section,) = drawn(tmp_path, weights, [PARTS["No adapter"]])
    colours = [Image.open(one.file).getpixel((0, 0)) for one in section.lines[0].pictures]
    said = [crc32(f"{text} {prompts.SEED + n}".encode()) & 0xFFFFFF for n, text in enumerate(prompts.ALONE)]
    assert colours == [(one >> 16, one >> 8 & 255, one & 255) for one in said]


def test_what_is_missing_is_said_and_the_rest_is_shown(tmp_path, weights):
    (weights / methods.FLASHFACE.file).unlink()
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
    with pytest.raises(host.HostError, match="--workflow"):
        demo.work(["--photo", str(tmp_path / "me.png")])


def test_a_file_is_the_person(tmp_path, weights):
    kept = PARTS["A person as a file"]
    (section,) = drawn(tmp_path, weights, [kept])
    assert section.note.startswith("5 of 5 pictures")
    other = copy.deepcopy(kept.rows[1])
    other.prompt["picture_3_latent"]["inputs"]["seed"] += 1
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
def test_every_part_runs_on_the_shipped_models(server):
    def quick(part: prompts.Part) -> prompts.Part:
        """One step; the first row, or all where they are to be the same."""
        rows = copy.deepcopy(list(part.rows[: None if part.same else 1]))
        for row in rows:
            for node in row.prompt.values():
                node["inputs"] |= {"steps": 1} if node["class_type"] == "KSampler" else {}
        return replace(part, rows=rows)

    for section in render.run(server, [quick(part) for part in PARTS.values()], render.WEIGHTS):
        pictures = [[np.asarray(Image.open(one.file)) for one in line.pictures] for line in section.lines]
        assert all(one.shape == (128, 128, 3) and one.std() > 1 for line in pictures for one in line)
        if PARTS[section.title].same and pictures:
            assert np.array_equal(*pictures)
