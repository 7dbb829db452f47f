"""The gallery: valid prompts, and a self-contained page with every image."""

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
from comfyui_likeness.portrait_world import world
from comfyui_likeness.portrait_world.drawing import scenes
from comfyui_likeness.portrait_world.gallery import gallery_methods, gallery_prompts, page, render
from comfyui_likeness.tools import browser, demo, host, screenshot
from comfyui_likeness.tools.server import Server
from PIL import Image
from support.workflow_runs import find_input_mismatches

VOID_TAGS = ("meta", "img")
FILE_INPUTS = ("file", "arc2face", "model_pack")  # their choices are the existing files
SECTIONS = {section.title: section for section in gallery_prompts.build_sections()}
SIMILARITIES = ("0.123", "-0.200, 0.456", "no face found", "0.123", "0.123")
REPORT = "\n".join(["a warning", *(f"image {number}: {values}" for number, values in enumerate(SIMILARITIES, 1))])


class FakeServer(Server):
    """Generates squares with a color for each text and seed, and measures what REPORT says."""

    def __init__(self, output_directory: Path) -> None:
        self.base_directory = self.output_directory = output_directory

    def run_prompt(self, prompt: dict[str, Any], timeout: float = 0) -> dict[str, Any]:
        inputs = {key: node["inputs"] for key, node in prompt.items()}
        texts = list_texts(prompt) or range(gallery_prompts.PHOTOS_PER_PERSON)
        images = [self.save(make_color(text, inputs.get("latents", {}).get("seed", 0))) for text in texts]
        return {
            "outputs": {
                gallery_prompts.REPORT_NODE: {"text": [REPORT]},
                "other": {"images": images[:1]},
                gallery_prompts.IMAGES_NODE: {"images": images},
            }
        }

    def save(self, color: tuple[int, ...]) -> dict[str, str]:
        name = f"{len(list(self.output_directory.iterdir()))}.png"
        Image.new("RGB", (8, 8), color).save(self.output_directory / name)
        return {"type": "output", "filename": name}


def list_texts(prompt: dict[str, Any]) -> list[str]:
    """The texts of a prompt's batch."""
    links = prompt["texts"]["inputs"] if "texts" in prompt else {}
    return [prompt[key]["inputs"]["text"] for key, _ in links.values()]


def make_color(text: object, seed: int) -> tuple[int, ...]:
    return tuple(crc32(f"{text} {seed}".encode()).to_bytes(4, "big")[:3])


class PageReader(HTMLParser):
    """Collects images, attributes and texts of a page. Raises AssertionError if tags do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open += [] if tag in VOID_TAGS else [tag]
        self.images += [dict(attrs)] if tag == "img" else []
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts += [data.strip()] if data.strip() else []

    def list_values(self, name: str) -> list[str]:
        return [value or "" for key, value in self.attributes if key == name]


@pytest.fixture(scope="module")
def declared() -> dict[str, Any]:
    """The definitions of all nodes in the gallery, as the server returns them."""
    import comfy_extras.nodes_mask as masks
    import comfy_extras.nodes_preview_any as texts
    from comfyui_likeness.nodes.loaders import files
    from comfyui_likeness.nodes.registry import NODES
    from comfyui_likeness.portrait_world.gallery import gallery_batch

    import nodes

    files.register_model_folders()
    v3_nodes = [masks.SolidMask, masks.MaskComposite, *NODES]
    classes = nodes.NODE_CLASS_MAPPINGS | texts.NODE_CLASS_MAPPINGS | gallery_batch.NODE_CLASS_MAPPINGS
    classes |= {node.define_schema().node_id: node for node in v3_nodes}
    rows = [row for section in SECTIONS.values() for row in section.rows]
    used = {node["class_type"] for row in rows for node in row.prompt.values()}
    return {
        name: {"input": classes[name].INPUT_TYPES(), "output": list(classes[name].RETURN_TYPES)}
        for name in sorted(used)
    }


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A folder with an empty file for each file that the gallery needs."""
    for file in [
        *render.REQUIRED_FILES,
        *(file for method in gallery_methods.GALLERY_METHODS for file in method.files),
    ]:
        (tmp_path / "weights" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "weights" / file).touch()
    return tmp_path / "weights"


def render_sections(
    tmp_path: Path, weights: Path, sections: Sequence[gallery_prompts.GallerySection] = ()
) -> list[page.PageSection]:
    (tmp_path / "output").mkdir(exist_ok=True)
    return list(render.run_sections(FakeServer(tmp_path / "output"), sections or list(SECTIONS.values()), weights))


@pytest.mark.parametrize("title", SECTIONS)
def test_prompts_are_valid(title, declared):
    for row in SECTIONS[title].rows:
        assert find_input_mismatches(row.prompt, declared) == []
        for node in row.prompt.values():
            for name, options in demo.iterate_choices(declared[node["class_type"]]):
                value = node["inputs"].get(name)
                assert value is None or value in options or name in FILE_INPUTS, (node, name)


def test_prompts_use_words_of_the_captions():
    texts = " ".join([*gallery_prompts.SINGLE_PROMPTS, *gallery_prompts.PAIR_PROMPTS])
    assert set(re.findall(r"\w+", texts)) <= set(world.CAPTION_WORDS)


def test_rows_have_the_same_noise_and_prompts():
    prompts = {title: [row.prompt for row in section.rows] for title, section in SECTIONS.items()}
    (base,) = prompts["No adapter"]
    for title in prompts.keys() - {"Three people", "Two people together"}:
        for prompt in prompts[title]:
            latents = {**prompt["latents"]["inputs"], "model": base["latents"]["inputs"]["model"]}
            assert latents == base["latents"]["inputs"] and prompt["empty"] == base["empty"]
            assert list_texts(prompt) == list_texts(base) == list(gallery_prompts.SINGLE_PROMPTS)


def test_pairs_have_images_as_wide_as_those_that_were_trained_on():
    assert 192 == gallery_prompts.PAIR_WIDTH == gallery_prompts.IMAGE_SIZE * scenes.IMAGE_WIDTHS[2]
    for row in SECTIONS["Two people together"].rows:
        assert row.prompt["empty"]["inputs"]["width"] == gallery_prompts.PAIR_WIDTH
        masks = [node["inputs"] for node in row.prompt.values() if node["class_type"] == "SolidMask"]
        assert sorted(mask["width"] for mask in masks) in ([], [96, 192])


def test_batch_node_joins_prompts_in_order():
    from comfyui_likeness.portrait_world.gallery.gallery_batch import GalleryBatch

    first, second = torch.tensor([[[2.0, 1.0]]]), torch.tensor([[[0.0, 3.0]]])
    (((states, options),),) = GalleryBatch().join(prompt_1=[[second, {"of": 1}]], prompt_0=[[first, {"of": 0}]])
    assert torch.equal(states, torch.cat([first, second])) and options == {"of": 0}


def test_page_contains_every_image_and_is_self_contained(tmp_path, weights):
    sections = render_sections(tmp_path, weights)
    text = page.render_page("People & <prompts>", ["about"], sections)
    read = PageReader(text)
    photos = sum(row.photo is not None for section in sections for row in section.rows)
    rows = sum(len(section.rows) for section in SECTIONS.values())
    measured = 3 * len(gallery_methods.GALLERY_METHODS)
    assert photos == measured + 2 and len(read.images) == 5 * rows - 3 + photos  # three people have only four photos
    for image in read.images:
        kind, _, data = (image["src"] or "").partition(",")
        assert kind == "data:image/png;base64" and Image.open(BytesIO(b64decode(data))).size == (8, 8) and image["alt"]
    assert "People & <prompts>" in read.texts and "http" not in text and "<script" not in text
    assert {link[1:] for link in read.list_values("href")} <= set(read.list_values("id"))
    assert len(read.list_values("href")) == len(SECTIONS)
    # A similarity below each image of one person by one method, and nowhere else.
    assert [read.texts.count(note) for note in ("0.12", "0.46", "no face")] == [3 * measured, measured, measured]


def test_images_are_in_the_order_of_the_prompts(tmp_path, weights):
    (section,) = render_sections(tmp_path, weights, [SECTIONS["No adapter"]])
    assert [Image.open(image.file).getpixel((0, 0)) for image in section.rows[0].images] == [
        make_color(text, gallery_prompts.SAMPLER_INPUTS["seed"]) for text in gallery_prompts.SINGLE_PROMPTS
    ]


def test_sections_without_files_are_skipped_with_a_note(tmp_path, weights):
    (weights / gallery_methods.FLASHFACE.files[0]).unlink()
    sections = {section.title: section for section in render_sections(tmp_path, weights)}
    assert sections.keys() == SECTIONS.keys()
    assert [title for title, section in sections.items() if not section.rows] == ["FlashFace"]
    assert "likeness/demo_flashface.safetensors" in sections["FlashFace"].note
    assert sections["FlashFace"].note in PageReader(page.render_page("title", [], [sections["FlashFace"]])).texts


def test_missing_base_models_are_an_error(tmp_path, weights, monkeypatch):
    monkeypatch.setattr(host, "prepare_host", lambda: pytest.fail("a host was prepared"))
    for file in ("demo/unet.safetensors", "insightface/models/demo/detector.onnx"):
        (weights / file).unlink()
    with pytest.raises(host.HostError, match=r"without demo/unet.safetensors, insightface/models/demo/detector.onnx;"):
        render.render_gallery(tmp_path / "gallery.html", weights)


def test_photo_without_workflow_is_an_error(tmp_path):
    with pytest.raises(host.HostError, match="for example --workflow portrait_faceid_plusv2"):
        demo.main(["--photo", str(tmp_path / "me.png")])


def test_equal_images_are_counted(tmp_path, weights):
    identity_files = SECTIONS["Identity files"]
    (section,) = render_sections(tmp_path, weights, [identity_files])
    assert section.note.startswith("5 of 5 images")
    other = copy.deepcopy(identity_files.rows[1])
    other.prompt["prompt_4"]["inputs"]["text"] = "another"
    (section,) = render_sections(tmp_path, weights, [replace(identity_files, rows=[identity_files.rows[0], other])])
    assert section.note.startswith("4 of 5 images")


@pytest.mark.skipif(not browser.has_browser(), reason="no Chromium or no playwright")
def test_screenshot_of_a_page(tmp_path, weights):
    file, out = tmp_path / "page.html", tmp_path / "page.jpg"
    file.write_text(page.render_page("title", ["about"], render_sections(tmp_path, weights)), encoding="utf-8")
    assert screenshot.main([str(file), str(out), "--dark"]) == 0
    with Image.open(out) as image:
        assert image.format == "JPEG" and image.width == screenshot.PAGE_WIDTH and image.height > 2000
        assert image.convert("L").getpixel((2, 2)) < 60
    screenshot.take_screenshot(file, out, height=500)
    with Image.open(out) as image:
        assert image.size == (screenshot.PAGE_WIDTH, 500) and image.convert("L").getpixel((2, 2)) > 200


@pytest.mark.skipif(
    bool(render.list_missing_files(render.REQUIRED_FILES, render.WEIGHTS_FOLDER)),
    reason="weights/ has no base models yet",
)
def test_every_section_runs_on_the_shipped_models(tmp_path):
    def shorten(section: gallery_prompts.GallerySection) -> gallery_prompts.GallerySection:
        """One step; only the first row, or all rows if they must be identical."""
        rows = copy.deepcopy(list(section.rows[: None if section.expect_identical else 1]))
        for row in rows:
            for node in row.prompt.values():
                node["inputs"] |= {"steps": 1} if node["class_type"] == "KSampler" else {}
        return replace(section, rows=rows)

    comfyui = host.Host(Path(os.environ["COMFYUI_PATH"]), Path(sys.executable), managed=False)
    with render.start_gallery_server(comfyui, tmp_path) as server:
        shortened = [shorten(section) for section in SECTIONS.values()]
        sections = list(render.run_sections(server, shortened, render.WEIGHTS_FOLDER))
    for section in sections:
        images = [np.asarray(Image.open(image.file)) for row in section.rows for image in row.images]
        width = gallery_prompts.PAIR_WIDTH if section.title == "Two people together" else gallery_prompts.IMAGE_SIZE
        assert all(image.shape == (128, width, 3) and image.std() > 1 for image in images)
        if SECTIONS[section.title].expect_identical and images:
            assert section.note.startswith("5 of 5")
