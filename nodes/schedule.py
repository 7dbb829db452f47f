"""Trailing Schedule: the noise schedule that FlashFace's authors sample with."""

from __future__ import annotations

from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..likeness.methods.flashface import make_trailing_timesteps


class TrailingSchedule(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LikenessTrailingSchedule",
            display_name="Trailing Schedule",
            category="likeness/apply",
            description="Makes sigmas with trailing timestep spacing: evenly spaced steps that start at full noise, "
            "as in FlashFace's demo. Use it with SamplerCustom and euler, which equals the demo's DDIM. KSampler's "
            "sgm_uniform is close.",
            search_aliases=["flashface", "ddim", "scheduler", "sigmas"],
            inputs=[
                io.Model.Input("model", tooltip="The model that will be sampled; its noise schedule is used."),
                io.Int.Input(
                    "steps", default=30, min=1, max=1000, tooltip="Number of steps, 1 to 1000. The demo uses 25 to 50."
                ),
            ],
            outputs=[io.Sigmas.Output(display_name="sigmas")],
        )

    @classmethod
    def execute(cls, model: ModelPatcher, steps: int) -> io.NodeOutput:
        sampling: Any = model.get_model_object("model_sampling")
        sigmas = [float(sampling.sigma(torch.tensor(time))) for time in make_trailing_timesteps(steps)]
        return io.NodeOutput(torch.tensor([*sigmas, 0.0]))


NODES = [TrailingSchedule]
