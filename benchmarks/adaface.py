"""AdaFace: a step with a person in the prompt, and the cost of computing the person's token embeddings."""

from __future__ import annotations

import argparse
import time
from functools import partial

import comfy.ops
import torch
from torch import Tensor

from ..likeness.methods import adaface, arc2face
from ..nodes.loaders.model_management import make_model_patcher
from ..nodes.prompt import compute_token_embeddings
from ..nodes.types import LoadedPrompter
from ..tools.standins import models
from ..tools.standins.build import FILE_METADATA
from .compare import BASELINE_CASE, BenchmarkCase, compare_cases
from .metrics import count_flops
from .models import build_unet_model, make_random_identity


def build_adaface_prompter() -> LoadedPrompter:
    """Arc2Face's encoder and an inverter in their published sizes, with random weights."""
    operations, tensors = comfy.ops.manual_cast, models.make_adaface()
    spec = adaface.read_adaface_spec(FILE_METADATA["adaface_sd15.safetensors"], "random weights")
    text = models.make_clip_text("sd1_clip_config.json", "", tensors["hidden_state_layer_weights"].dtype)
    encoder = make_model_patcher(adaface.build_text_model(text, "text_model.", 12, operations))
    inverter = make_model_patcher(adaface.build_prompt_inverter(tensors, spec, operations, "random weights"))
    return LoadedPrompter(encoder, inverter, spec, "random weights")


def encode_identity_tokens(prompter: LoadedPrompter) -> Tensor:
    """The token embeddings [16, 768] of a random identity."""
    identity = make_random_identity({arc2face.FACE_FEATURES[0]: (512,)})
    return compute_token_embeddings(prompter, identity, adaface.FaceEmbeddingOptions())["l"]


def measure_adaface(arguments: argparse.Namespace) -> str:
    model, prompter = build_unet_model("sd15", arguments.size), build_adaface_prompter()
    token_embeddings = encode_identity_tokens(prompter)
    flops = count_flops(partial(encode_identity_tokens, prompter))
    start = time.perf_counter()
    encode_identity_tokens(prompter)
    seconds = time.perf_counter() - start
    prompt = torch.full((1, 77, 768), 0.1)
    prompt[:, 4 : 4 + len(token_embeddings)] = token_embeddings
    cases = [
        BenchmarkCase(BASELINE_CASE, model, resolution=arguments.resolution),
        BenchmarkCase("AdaFace, person in the prompt", model, resolution=arguments.resolution, prompt=prompt),
    ]
    once = f"Once per prompt: {flops / 1e9:.1f} GFLOPs, {seconds:.2f} seconds."
    return f"{compare_cases(cases, arguments.repeats, BASELINE_CASE)}\n\n{once}"
