"""Every workflow is valid and runs through the real server on stand-in models and a real photo."""

from __future__ import annotations

import time

import numpy as np
import pytest
from comfyui_likeness.tools import demo
from comfyui_likeness.tools.server import ServerError
from flows import APPLY, NAMES, UNSHIPPED, WORKFLOWS, bare, cached, made, misfits, paint, pixels, run, small, workflow
from PIL import Image
from safetensors import safe_open

pytest_plugins = ["served"]

# Those that paint, and have a node that puts the identity in.
PAINTING = [
    pytest.param(name, marks=pytest.mark.skipif(name in UNSHIPPED, reason=f"weights/ lacks {UNSHIPPED.get(name)}"))
    for name in demo.names()
    if {"SaveImage"} < (kinds := {node["class_type"] for node in demo.read(name).values()}) and kinds & APPLY.keys()
]


def test_the_folder_holds_the_workflows_and_their_thumbnails_alone():
    assert sorted(file.name for file in WORKFLOWS.iterdir()) == sorted(
        f"{name}{suffix}" for name in NAMES for suffix in (".json", ".jpg")
    )


@pytest.mark.parametrize("name", NAMES)
def test_thumbnail_is_a_small_picture(name):
    file = WORKFLOWS / f"{name}.jpg"
    with Image.open(file) as picture:
        assert picture.format == "JPEG" and picture.width <= 1280 and picture.height <= 720
        assert np.asarray(picture).std() > 5
    assert file.stat().st_size < 200_000


@pytest.mark.parametrize("name", NAMES)
def test_workflow_has_no_overlaps_and_names_its_pack(name):
    nodes = workflow(name)["nodes"]
    boxes = [(*node["pos"], *node["size"]) for node in nodes]
    for i, (x, y, width, height) in enumerate(boxes):
        for other_x, other_y, other_width, other_height in boxes[:i]:
            apart_x = x >= other_x + other_width or other_x >= x + width
            apart_y = y - 30 >= other_y + other_height or other_y - 30 >= y + height  # a title bar is 30 high
            assert apart_x or apart_y, nodes[i]["type"]
    own = [node for node in nodes if node["type"].startswith("Likeness")]
    assert own and all(node["properties"]["cnr_id"] == "likeness-identity" for node in own)


@pytest.mark.parametrize("name", [*NAMES, *UNSHIPPED])
def test_prompt_fits_what_the_server_declares(name, info):
    assert misfits(demo.read(name), info) == []


def test_a_library_is_made(library, server):
    found = {}
    for name in ("anna", "bert"):
        with safe_open(server.base / "models" / "identities" / f"{name}.safetensors", "np") as tensors:
            key = next(key for key in tensors.keys() if key.startswith("embedding/arcface"))  # noqa: SIM118
            vectors = tensors.get_tensor(key).astype(np.float64)
        mean = vectors.mean(0)
        found[name] = mean / np.linalg.norm(mean)
    assert np.isfinite(found["anna"]).all() and found["anna"] @ found["bert"] < 0.99
    assert any("anna" in text for text in library["outputs"]["report"]["text"])


@pytest.mark.parametrize("name", PAINTING)
def test_workflow_paints_and_strength_0_is_no_node(name, server, library):
    prompt = small(name)
    entry = run(server, prompt)
    with_identity = pixels(server, entry)
    height, width, channels = with_identity.shape
    assert height % 128 == 0 and width % 128 == 0 and channels == 3  # a grid holds several
    assert with_identity.std() > 2 and len(np.unique(with_identity.reshape(-1, 3), axis=0)) > 100
    again = run(server, prompt)
    assert cached(again) == set(prompt)
    without = paint(server, bare(prompt))
    assert np.array_equal(paint(server, small(name, **APPLY)), without)
    assert not np.array_equal(with_identity, without)


def test_an_embedding_file_paints_the_person_of_the_prompt(server, library):
    by_file = small("adaface_embedding")
    by_prompt = {key: node for key, node in by_file.items() if key not in ("embedding", "text", "positive")}
    given = by_file["embedding"]["inputs"]
    by_prompt["positive"] = made(
        "LikenessPrompt", clip=["checkpoint", 1], prompter=given["prompter"], identity=given["identity"],
        text=by_file["text"]["inputs"]["string"], strength=1.0, class_word="woman",
    )  # fmt: skip
    painted = paint(server, by_file)
    assert painted.std() > 2
    assert np.array_equal(painted, paint(server, by_prompt))
    assert (server.base / "models" / "embeddings" / "anna.safetensors").is_file()
    assert not np.array_equal(painted, paint(server, bare(by_prompt)))


def test_another_identity_paints_another_picture(server, library):
    anna, bert = (
        paint(server, small("identity_library_use", LikenessMixIdentities={"weights": weights}))
        for weights in ("1, 0", "0, 1")
    )
    assert not np.array_equal(anna, bert)


def test_interrupted_run_leaves_no_trace(server, library):
    prompt = small("identity_library_use", KSampler={"steps": 3})
    expected = paint(server, prompt)
    number = server.submit(small("identity_library_use", KSampler={"steps": 2000}))
    while not server.get("/queue")["queue_running"]:
        time.sleep(0.05)
    time.sleep(1)
    server.interrupt()
    assert "execution_interrupted" in [kind for kind, _ in server.wait(number)["status"]["messages"]]
    server.post("/free", {"unload_models": True, "free_memory": True})
    entry = run(server, prompt)
    assert "sampler" not in cached(entry)
    assert np.array_equal(pixels(server, entry), expected)


def test_a_prompt_that_is_not_valid_is_refused(server, library):
    with pytest.raises(ServerError, match="LikenessLoadAdapter"):
        server.submit(small("identity_library_use", LikenessLoadAdapter={"file": "not there.safetensors"}))
