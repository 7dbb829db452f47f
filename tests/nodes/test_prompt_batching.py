"""An image depends neither on the length of the other prompt nor on how ComfyUI batches the prompts."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from comfy.model_patcher import ModelPatcher
from support.fused_kv import apply_fused_kv
from support.host_models import all_close, make_conditioning, make_small_model, sample_latent
from support.method_cases import METHODS, make_method_case
from torch import Tensor

CHUNK = 5  # tokens of a chunk of text
TOLERANCE = 1e-4  # 2e-5 per layer


def predict_prompts(model: ModelPatcher, **changes: Any) -> tuple[Tensor, Tensor]:
    """The predictions of the positive and of the negative prompt in the first step."""
    kept: list[tuple[Tensor, Tensor]] = []

    def keep(args: dict[str, Any]) -> Tensor:
        kept.append((args["cond_denoised"], args["uncond_denoised"]))
        return args["denoised"]

    watched = model.clone()
    watched.set_model_sampler_post_cfg_function(keep)
    sample_latent(watched, steps=1, **changes)
    return kept[0]


def make_texts(positive_chunks: int, negative_chunks: int) -> dict[str, Any]:
    return {
        "positive": make_conditioning(1, num_tokens=CHUNK * positive_chunks),
        "negative": make_conditioning(2, num_tokens=CHUNK * negative_chunks),
    }


def run_prompts_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where memory is short."""
    monkeypatch.setattr(ModelPatcher, "get_free_memory", lambda self, device: 0)


@pytest.mark.parametrize("method", METHODS)
def test_a_prompt_does_not_depend_on_the_length_of_the_other(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = {"reference_text": make_conditioning(3)} if method == "reference" else {}  # else it reads the negative one
    model = make_method_case(method).apply(**text)
    with monkeypatch.context() as short_of_memory:
        run_prompts_one_by_one(short_of_memory)
        alone = {chunks: predict_prompts(model, **make_texts(chunks, chunks)) for chunks in (1, 2, 3)}
    for positive, negative in itertools.product(alone, alone):
        together = predict_prompts(model, **make_texts(positive, negative))
        assert all_close(together[0], alone[positive][0], TOLERANCE)
        assert all_close(together[1], alone[negative][1], TOLERANCE)


def test_tokens_that_another_pack_appends_to_the_text_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    extra = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(4))

    def append(n: Tensor, context: Tensor, value: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        context, value = (torch.cat((part, extra.expand(len(part), -1, -1)), 1) for part in (context, value))
        return n, context, value

    plain = apply_fused_kv(make_small_model())
    model = plain.clone()
    model.set_model_attn2_patch(append)
    texts = make_texts(1, 2)
    # A softmax over the text alone would change, too, if its tokens were repeated and the appended ones were not.
    negatives = [predict_prompts(model, **make_texts(chunks, 2))[1] for chunks in (1, 2)]
    together = predict_prompts(model, **texts)
    run_prompts_one_by_one(monkeypatch)
    apart = predict_prompts(model, **texts)
    assert all_close(negatives[0], negatives[1], TOLERANCE)
    for one, other, without in zip(together, apart, predict_prompts(plain, **texts), strict=True):
        assert all_close(one, other, TOLERANCE) and not all_close(one, without, 1e-3)
