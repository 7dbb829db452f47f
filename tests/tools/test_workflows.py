"""Every workflow is valid and runs on a ComfyUI server with stand-in models and a real photo."""

from __future__ import annotations

import time

import numpy as np
import pytest
from comfyui_likeness.tools import demo
from comfyui_likeness.tools.server import ServerError
from PIL import Image
from safetensors import safe_open
from support.workflow_runs import (
    NEUTRAL_APPLY_INPUTS,
    UNSHIPPED_WORKFLOWS,
    WORKFLOW_NAMES,
    WORKFLOWS_FOLDER,
    find_input_mismatches,
    list_cached_nodes,
    load_saved_image,
    make_node,
    make_small_prompt,
    read_workflow,
    remove_apply_nodes,
    render_prompt,
    run_prompt,
)

# Workflows that save an image and apply an identity.
IMAGE_WORKFLOWS = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(name in UNSHIPPED_WORKFLOWS, reason=f"weights/ lacks {UNSHIPPED_WORKFLOWS.get(name)}"),
    )
    for name in demo.list_workflows()
    if {"SaveImage"} < (node_types := {node["class_type"] for node in demo.read_prompt(name).values()})
    and node_types & NEUTRAL_APPLY_INPUTS.keys()
]


def test_folder_contains_only_workflows_and_thumbnails():
    assert sorted(file.name for file in WORKFLOWS_FOLDER.iterdir()) == sorted(
        f"{name}{suffix}" for name in WORKFLOW_NAMES for suffix in (".json", ".jpg")
    )


@pytest.mark.parametrize("name", WORKFLOW_NAMES)
def test_thumbnail_is_a_small_jpeg(name):
    file = WORKFLOWS_FOLDER / f"{name}.jpg"
    with Image.open(file) as image:
        assert image.format == "JPEG" and image.width <= 1280 and image.height <= 720
        assert np.asarray(image).std() > 5
    assert file.stat().st_size < 200_000


@pytest.mark.parametrize("name", WORKFLOW_NAMES)
def test_workflow_has_no_overlaps_and_names_its_pack(name):
    nodes = read_workflow(name)["nodes"]
    boxes = [(*node["pos"], *node["size"]) for node in nodes]
    for i, (x, y, width, height) in enumerate(boxes):
        for other_x, other_y, other_width, other_height in boxes[:i]:
            apart_x = x >= other_x + other_width or other_x >= x + width
            apart_y = y - 30 >= other_y + other_height or other_y - 30 >= y + height  # a title bar is 30 high
            assert apart_x or apart_y, nodes[i]["type"]
    pack_nodes = [node for node in nodes if node["type"].startswith("Likeness")]
    assert pack_nodes and all(node["properties"]["cnr_id"] == "likeness-identity" for node in pack_nodes)


@pytest.mark.parametrize("name", [*WORKFLOW_NAMES, *UNSHIPPED_WORKFLOWS])
def test_prompt_matches_the_node_definitions(name, info):
    assert find_input_mismatches(demo.read_prompt(name), info) == []


def test_library_workflow_saves_identities(library, server):
    means = {}
    for name in ("anna", "bert"):
        with safe_open(server.base_directory / "models" / "identities" / f"{name}.safetensors", "np") as tensors:
            key = next(key for key in tensors.keys() if key.startswith("embedding/arcface"))  # noqa: SIM118
            vectors = tensors.get_tensor(key).astype(np.float64)
        mean = vectors.mean(0)
        means[name] = mean / np.linalg.norm(mean)
    assert np.isfinite(means["anna"]).all() and means["anna"] @ means["bert"] < 0.99
    assert any("anna" in text for text in library["outputs"]["report"]["text"])


@pytest.mark.parametrize("name", IMAGE_WORKFLOWS)
def test_workflow_runs_and_strength_0_equals_no_node(name, server, library):
    prompt = make_small_prompt(name)
    entry = run_prompt(server, prompt)
    with_identity = load_saved_image(server, entry)
    height, width, channels = with_identity.shape
    assert height % 128 == 0 and width % 128 == 0 and channels == 3  # a grid has several images
    assert with_identity.std() > 2 and len(np.unique(with_identity.reshape(-1, 3), axis=0)) > 100
    again = run_prompt(server, prompt)
    assert list_cached_nodes(again) == set(prompt)
    without = render_prompt(server, remove_apply_nodes(prompt))
    assert np.array_equal(render_prompt(server, make_small_prompt(name, **NEUTRAL_APPLY_INPUTS)), without)
    assert not np.array_equal(with_identity, without)


def test_embedding_file_and_prompt_node_give_the_same_image(server, library):
    by_file = make_small_prompt("adaface_embedding")
    by_prompt = {key: node for key, node in by_file.items() if key not in ("embedding", "text", "positive")}
    inputs = by_file["embedding"]["inputs"]
    by_prompt["positive"] = make_node(
        "LikenessPrompt", clip=["checkpoint", 1], prompter=inputs["prompter"], identity=inputs["identity"],
        text=by_file["text"]["inputs"]["string"], strength=1.0, class_word="woman",
    )  # fmt: skip
    image = render_prompt(server, by_file)
    assert image.std() > 2
    assert np.array_equal(image, render_prompt(server, by_prompt))
    assert (server.base_directory / "models" / "embeddings" / "anna.safetensors").is_file()
    assert not np.array_equal(image, render_prompt(server, remove_apply_nodes(by_prompt)))


def test_another_identity_gives_another_image(server, library):
    anna, bert = (
        render_prompt(server, make_small_prompt("identity_library_use", LikenessMixIdentities={"weights": weights}))
        for weights in ("1, 0", "0, 1")
    )
    assert not np.array_equal(anna, bert)


def test_interrupted_run_has_no_effect_on_the_next(server, library):
    prompt = make_small_prompt("identity_library_use", KSampler={"steps": 3})
    expected = render_prompt(server, prompt)
    prompt_id = server.queue_prompt(make_small_prompt("identity_library_use", KSampler={"steps": 2000}))
    while not server.get_json("/queue")["queue_running"]:
        time.sleep(0.05)
    time.sleep(1)
    server.interrupt_prompt()
    assert "execution_interrupted" in [kind for kind, _ in server.wait_for_prompt(prompt_id)["status"]["messages"]]
    server.post_json("/free", {"unload_models": True, "free_memory": True})
    entry = run_prompt(server, prompt)
    assert "sampler" not in list_cached_nodes(entry)
    assert np.array_equal(load_saved_image(server, entry), expected)


def test_invalid_prompt_is_rejected(server, library):
    with pytest.raises(ServerError, match="LikenessLoadAdapter"):
        server.queue_prompt(
            make_small_prompt("identity_library_use", LikenessLoadAdapter={"file": "not there.safetensors"})
        )
