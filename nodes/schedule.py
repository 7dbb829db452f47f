"""Trailing Schedule: the noise levels at which FlashFace's authors sample."""

from __future__ import annotations

from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..likeness.flashface import trailing


class TrailingSchedule(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LikenessTrailingSchedule",
            display_name="Trailing Schedule",
            category="likeness/apply",
            description="Evenly spaced steps that begin at full noise, as FlashFace's demo has them: for "
            "SamplerCustom with euler, which is the demo's DDIM. KSampler's sgm_uniform is near.",
            search_aliases=["flashface", "ddim", "scheduler", "sigmas"],
            inputs=[
                io.Model.Input("model", tooltip="The model to be sampled; its noise schedule counts."),
                io.Int.Input("steps", default=30, min=1, max=1000, tooltip="Steps, 1 to 1000; 25 to 50 in the demo."),
            ],
            outputs=[io.Sigmas.Output(display_name="sigmas")],
        )

    @classmethod
    def execute(cls, model: ModelPatcher, steps: int) -> io.NodeOutput:
        sampling: Any = model.get_model_object("model_sampling")
        sigmas = [float(sampling.sigma(torch.tensor(time))) for time in trailing(steps)]
        return io.NodeOutput(torch.tensor([*sigmas, 0.0]))


NODES = [TrailingSchedule]
