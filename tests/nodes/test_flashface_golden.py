"""FlashFace against the official code, through the loader, the node and ComfyUI's guider and sampler."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import comfy.sample
import comfy.samplers
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfyui_likeness.nodes.attention.patch import capture_attention_inputs, get_injections
from comfyui_likeness.nodes.schedule import TrailingSchedule
from safetensors.torch import load_file
from support.flashface_models import FLASHFACE_CASES, apply_flashface, load_flashface, predict_guided_noise
from support.golden import DETERMINISTIC_WEIGHTS, GOLDEN_FOLDER
from torch import Tensor

BY_KIND: dict[str, list[Any]] = {}
for case in FLASHFACE_CASES["cases"]:
    BY_KIND.setdefault(case["kind"], []).append(pytest.param(case, id=case["id"]))


@pytest.fixture(scope="module", autouse=True)
def free_models() -> Iterator[None]:
    yield
    load_flashface.cache_clear()  # two full-size UNets


class CaseInputs:
    """The inputs of a case, and its model as patched by the node."""

    def __init__(self, case: dict[str, Any], **settings: Any) -> None:
        scalars = case["scalars"]
        for name, about in case["inputs"].items():
            if about["kind"] == "tensor":
                setattr(self, name, DETERMINISTIC_WEIGHTS.tensor(about["name"], about["shape"]))
        self.x: Tensor
        self.refs: Tensor
        self.texts = (self.context_cond, self.context_uncond)  # pyright: ignore[reportAttributeAccessIssue]
        model, self.net = load_flashface(case["model"])
        settings |= {"strength": scalars["lambda_feat"], "face_position": self.mask(case["inputs"]["mask"])}
        self.model = apply_flashface(model, self.net, self.refs, **settings)
        self.expected = load_file(GOLDEN_FOLDER / "flashface" / case["outputs"]["file"])

    def mask(self, about: dict[str, Any]) -> Tensor | None:
        if about["rect"] is None:
            return None
        height, width = about["shape"]
        y0, y1, x0, x1 = (8 * edge for edge in about["rect"])
        mask = torch.zeros(1, 8 * height, 8 * width)
        mask[:, y0:y1, x0:x1] = 1
        return mask


def assert_near(got: Tensor, expected: Tensor, kind: str) -> None:
    error = float((got - expected).norm() / expected.norm())
    assert error < FLASHFACE_CASES["suggested_tolerance"][kind], error


@pytest.mark.parametrize("case", BY_KIND["unet3"] + BY_KIND["features"])
def test_three_rows(case: dict[str, Any]) -> None:
    inputs = CaseInputs(case, launch=1000, reference_guidance=1.0)
    _, rows = predict_guided_noise(inputs.model, inputs.x, case["scalars"]["t"], *inputs.texts)
    positive, negative, *referenced = rows
    assert len(referenced) == bool(case["scalars"]["lambda_feat"])  # at strength 0 the node does nothing
    assert_near(torch.cat((*(referenced or [positive]), positive, negative)), inputs.expected["out"], case["kind"])


@pytest.mark.parametrize("case", BY_KIND["unet2"])
def test_two_rows(case: dict[str, Any]) -> None:
    inputs = CaseInputs(case, launch=1000, reference_guidance=0.0)
    _, rows = predict_guided_noise(inputs.model, inputs.x, case["scalars"]["t"], *inputs.texts)
    assert_near(torch.cat(rows), inputs.expected["out"], case["kind"])


@pytest.mark.parametrize("case", BY_KIND["features"])
def test_reference_net_features(case: dict[str, Any]) -> None:
    inputs = CaseInputs(case)
    places = sorted(get_injections(inputs.model)[-1].places, key=lambda place: place.block)  # middle, then output
    time = torch.tensor([float(case["scalars"]["t"])]).expand(len(inputs.refs))
    text = inputs.texts[1].expand(len(inputs.refs), -1, -1)
    with torch.inference_mode():
        captured = capture_attention_inputs(inputs.net.patcher.model.diffusion_model, inputs.refs, time, text, places)
    expected = {key: value for key, value in inputs.expected.items() if key.startswith("ref.")}
    names = ["ref.middle_1.blocks.0"] + [f"ref.decoder_{i}.1.blocks.0" for i in range(len(places) - 1)]
    assert sorted(names) == sorted(expected)
    for name, place in zip(names, places, strict=True):
        assert_near(captured[place], expected[name], "features")


@pytest.mark.parametrize("case", BY_KIND["denoise"])
def test_guidance(case: dict[str, Any]) -> None:
    scalars = case["scalars"]
    inputs = CaseInputs(
        case,
        launch=scalars["launch"],
        strength_before=scalars["lambda_feat_before"],
        reference_guidance=scalars["face_guidance"],
        rescale=scalars["guide_rescale"] or 0.0,
    )
    t = scalars["t"]
    eps, (positive, negative, *referenced) = predict_guided_noise(
        inputs.model, inputs.x, t, *inputs.texts, cfg=scalars["guide_scale"]
    )
    assert_near(torch.cat((*referenced, positive, negative)), inputs.expected["raw"], "denoise")
    assert_near(eps, inputs.expected["eps"], "denoise")
    sigma = inputs.model.get_model_object("model_sampling").sigmas[t]
    x0 = inputs.x * (1 + sigma**2) ** 0.5 - sigma * eps
    assert_near(x0, inputs.expected["x0"], "denoise")


def make_trailing_sigmas(model: ModelPatcher, steps: int) -> Tensor:
    return TrailingSchedule.execute(model, steps).args[0]


@pytest.mark.parametrize("case", BY_KIND["sample"])
def test_full_run(case: dict[str, Any]) -> None:
    scalars = case["scalars"]
    inputs = CaseInputs(
        case,
        launch=scalars["launch"],
        strength_before=scalars["lambda_feat_before"],
        reference_guidance=scalars["face_guidance"],
        rescale=scalars["guide_rescale"],
    )
    first: list[Tensor] = []
    with torch.inference_mode():
        out = comfy.sample.sample_custom(
            inputs.model,
            inputs.x,
            scalars["guide_scale"],
            comfy.samplers.sampler_object("euler"),
            make_trailing_sigmas(inputs.model, scalars["steps"]),
            *([[text, {}]] for text in inputs.texts),
            torch.zeros_like(inputs.x),
            callback=lambda step, x0, x, total: first.append(x0),
            disable_pbar=True,
            seed=1,
        )
    assert_near(first[0], inputs.expected["first_x0"], "sample")
    assert_near(out * 0.18215, inputs.expected["z0"], "sample")


@pytest.mark.parametrize("case", FLASHFACE_CASES["schedule_cases"], ids=lambda case: f"{case['steps']} steps")
def test_schedule(case: dict[str, Any]) -> None:
    model, _ = load_flashface()
    sigmas = make_trailing_sigmas(model, case["steps"])
    assert torch.allclose(sigmas / (1 + sigmas**2) ** 0.5, torch.tensor(case["vp_sigmas"]), atol=2e-6)
    times = model.get_model_object("model_sampling").timestep(sigmas[:-1])
    assert (times - torch.tensor(case["timesteps"])).abs().max() <= 1  # .5 may be rounded up or down
