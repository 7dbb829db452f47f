"""FlashFace gives what the official code gives: through the loader, the node and the host's guider and sampler."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import comfy.sample
import comfy.samplers
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfyui_likeness.nodes.attention.patch import injections, inputs
from comfyui_likeness.nodes.schedule import TrailingSchedule
from flashfaces import CASES, loaded, look, referenced
from golden import GOLDEN, WEIGHTS
from safetensors.torch import load_file
from torch import Tensor

BY_KIND: dict[str, list[Any]] = {}
for case in CASES["cases"]:
    BY_KIND.setdefault(case["kind"], []).append(pytest.param(case, id=case["id"]))


@pytest.fixture(scope="module", autouse=True)
def memory_is_given_back() -> Iterator[None]:
    yield
    loaded.cache_clear()  # two UNets of full size


class Given:
    """The inputs of a case, and its model as a user would have it."""

    def __init__(self, case: dict[str, Any], **settings: Any) -> None:
        scalars = case["scalars"]
        for name, about in case["inputs"].items():
            if about["kind"] == "tensor":
                setattr(self, name, WEIGHTS.tensor(about["name"], about["shape"]))
        self.x: Tensor
        self.refs: Tensor
        self.texts = (self.context_cond, self.context_uncond)  # pyright: ignore[reportAttributeAccessIssue]
        model, self.net = loaded(case["model"])
        settings |= {"strength": scalars["lambda_feat"], "face_position": self.mask(case["inputs"]["mask"])}
        self.model = referenced(model, self.net, self.refs, **settings)
        self.wanted = load_file(GOLDEN / "flashface" / case["outputs"]["file"])

    def mask(self, about: dict[str, Any]) -> Tensor | None:
        if about["rect"] is None:
            return None
        height, width = about["shape"]
        y0, y1, x0, x1 = (8 * edge for edge in about["rect"])
        mask = torch.zeros(1, 8 * height, 8 * width)
        mask[:, y0:y1, x0:x1] = 1
        return mask


def assert_near(got: Tensor, wanted: Tensor, kind: str) -> None:
    error = float((got - wanted).norm() / wanted.norm())
    assert error < CASES["suggested_tolerance"][kind], error


@pytest.mark.parametrize("case", BY_KIND["unet3"] + BY_KIND["features"])
def test_three_rows(case: dict[str, Any]) -> None:
    given = Given(case, launch=1000, reference_guidance=1.0)
    _, rows = look(given.model, given.x, case["scalars"]["t"], *given.texts)
    positive, negative, *referenced = rows
    assert len(referenced) == bool(case["scalars"]["lambda_feat"])  # strength 0 is no node
    assert_near(torch.cat((*(referenced or [positive]), positive, negative)), given.wanted["out"], case["kind"])


@pytest.mark.parametrize("case", BY_KIND["unet2"])
def test_two_rows(case: dict[str, Any]) -> None:
    given = Given(case, launch=1000, reference_guidance=0.0)
    _, rows = look(given.model, given.x, case["scalars"]["t"], *given.texts)
    assert_near(torch.cat(rows), given.wanted["out"], case["kind"])


@pytest.mark.parametrize("case", BY_KIND["features"])
def test_what_the_reference_net_sees(case: dict[str, Any]) -> None:
    given = Given(case)
    places = sorted(injections(given.model)[-1].places, key=lambda place: place.block)  # middle, then output in order
    time = torch.tensor([float(case["scalars"]["t"])]).expand(len(given.refs))
    text = given.texts[1].expand(len(given.refs), -1, -1)
    with torch.inference_mode():
        seen = inputs(given.net.patcher.model.diffusion_model, given.refs, time, text, places)
    wanted = {key: value for key, value in given.wanted.items() if key.startswith("ref.")}
    names = ["ref.middle_1.blocks.0"] + [f"ref.decoder_{i}.1.blocks.0" for i in range(len(places) - 1)]
    assert sorted(names) == sorted(wanted)
    for name, place in zip(names, places, strict=True):
        assert_near(seen[place], wanted[name], "features")


@pytest.mark.parametrize("case", BY_KIND["denoise"])
def test_guidance(case: dict[str, Any]) -> None:
    scalars = case["scalars"]
    given = Given(
        case,
        launch=scalars["launch"],
        strength_before=scalars["lambda_feat_before"],
        reference_guidance=scalars["face_guidance"],
        rescale=scalars["guide_rescale"] or 0.0,
    )
    t = scalars["t"]
    eps, (positive, negative, *referenced) = look(given.model, given.x, t, *given.texts, cfg=scalars["guide_scale"])
    assert_near(torch.cat((*referenced, positive, negative)), given.wanted["raw"], "denoise")
    assert_near(eps, given.wanted["eps"], "denoise")
    sigma = given.model.get_model_object("model_sampling").sigmas[t]
    x0 = given.x * (1 + sigma**2) ** 0.5 - sigma * eps
    assert_near(x0, given.wanted["x0"], "denoise")


def trailing(model: ModelPatcher, steps: int) -> Tensor:
    return TrailingSchedule.execute(model, steps).args[0]


@pytest.mark.parametrize("case", BY_KIND["sample"])
def test_a_whole_run(case: dict[str, Any]) -> None:
    scalars = case["scalars"]
    given = Given(
        case,
        launch=scalars["launch"],
        strength_before=scalars["lambda_feat_before"],
        reference_guidance=scalars["face_guidance"],
        rescale=scalars["guide_rescale"],
    )
    first: list[Tensor] = []
    with torch.inference_mode():
        out = comfy.sample.sample_custom(
            given.model,
            given.x,
            scalars["guide_scale"],
            comfy.samplers.sampler_object("euler"),
            trailing(given.model, scalars["steps"]),
            *([[text, {}]] for text in given.texts),
            torch.zeros_like(given.x),
            callback=lambda step, x0, x, total: first.append(x0),
            disable_pbar=True,
            seed=1,
        )
    assert_near(first[0], given.wanted["first_x0"], "sample")
    assert_near(out * 0.18215, given.wanted["z0"], "sample")


@pytest.mark.parametrize("case", CASES["schedule_cases"], ids=lambda case: f"{case['steps']} steps")
def test_schedule(case: dict[str, Any]) -> None:
    model, _ = loaded()
    sigmas = trailing(model, case["steps"])
    assert torch.allclose(sigmas / (1 + sigmas**2) ** 0.5, torch.tensor(case["vp_sigmas"]), atol=2e-6)
    times = model.get_model_object("model_sampling").timestep(sigmas[:-1])
    assert (times - torch.tensor(case["timesteps"])).abs().max() <= 1  # .5 may round to either side
