"""The benchmarks count correctly: an adapter adds one small attention per layer to a step, and nothing else."""

from __future__ import annotations

import pytest
import torch
from comfyui_likeness.benchmarks import adaface, flashface, flux, fused, mixed, runner
from comfyui_likeness.benchmarks.ip_adapter import (
    PUBLISHED_LAYOUTS,
    AdapterBenchmark,
    BenchmarkRow,
    apply_random_adapter,
    format_adapter_table,
)
from comfyui_likeness.benchmarks.models import build_unet_model
from comfyui_likeness.nodes.attention.unet_layers import list_unet_layers
from support.flux_adapters import HOST_PASSES_QUERIES

ROWS = 2  # with the identity and without
RESOLUTION = 64


@pytest.fixture(scope="module")
def unpatched() -> AdapterBenchmark:
    return AdapterBenchmark("sd15", RESOLUTION, build_unet_model("sd15", "small"))


def count_attention_flops(bench: AdapterBenchmark, tokens: int) -> int:
    """2 * N * T * C for the product with the keys and as much for the values, in every layer and row."""
    size = {0: 8, 1: 4, 2: 2, 3: 1}
    levels = {("input", 1): 0, ("input", 2): 0, ("input", 4): 1, ("input", 5): 1, ("input", 7): 2, ("input", 8): 2}
    levels |= {("middle", 0): 3} | {("output", n): 3 - n // 3 for n in range(3, 12)}
    return sum(
        ROWS * 4 * size[levels[layer.block]] ** 2 * tokens * layer.hidden_size
        for layer in list_unet_layers(bench.model.model.diffusion_model)
    )


@pytest.mark.parametrize(("kind", "tokens"), [("image", 4), ("faceid_plus_v2", 4), ("portrait", 80)])
def test_an_adapter_adds_one_attention_per_layer(unpatched: AdapterBenchmark, kind: str, tokens: int) -> None:
    step, _ = unpatched.count_step_and_run_flops()
    bench = AdapterBenchmark("sd15", RESOLUTION, apply_random_adapter(unpatched.model, "sd15", "small", kind))
    adapted_step, once = bench.count_step_and_run_flops()
    assert adapted_step - step == count_attention_flops(unpatched, tokens)
    assert once > 0  # the projector, keys and values
    assert bench.count_step_and_run_flops() == (adapted_step, once)


def test_the_table_has_a_row_per_kind() -> None:
    rows = [
        BenchmarkRow(kind, 100 + i, i, [1.0, 2.0], 10, None)
        for i, kind in enumerate(("model only", *PUBLISHED_LAYOUTS))
    ]
    text = format_adapter_table(rows)
    assert all(f"| {kind} |" in text for kind in PUBLISHED_LAYOUTS) and "1.0100" in text


def test_command_line() -> None:
    arguments = runner.parse_benchmark_arguments(["--base", "flux"])
    assert arguments.base in runner.METHOD_BENCHMARKS and arguments.kinds == list(PUBLISHED_LAYOUTS)


def test_adaface_token_embeddings() -> None:
    assert adaface.encode_identity_tokens(adaface.build_adaface_prompter()).shape == (16, 768)


def test_the_emulated_official_flashface_gives_the_same_image() -> None:
    model, net = flashface.load_random_flashface("small")
    cases = {case.name: case for case in flashface.make_flashface_cases(model, net, RESOLUTION)}
    official = cases["official implementation"].run(2)
    first = cases["this pack, first image"].run(2)
    assert torch.equal(cases["this pack, from the second image on"].run(2), first)
    assert float((official - first).norm() / first.norm()) < 1e-4
    unpatched = cases["model only, two rows"].run(2)
    assert float((unpatched - first).norm() / first.norm()) > 1e-2


def test_grouped_queries_give_the_same_image_as_a_dense_mask() -> None:
    cases = {case.name: case for case in fused.make_fused_kv_cases("small", RESOLUTION)}
    grouped = cases["fused KV, clean, two people by masks"]
    dense = cases["the same with a dense attention mask"]
    first = grouped.run(2)
    assert float((dense.run(2) - first).norm() / first.norm()) < 1e-4
    assert float((cases["model only"].run(2) - first).norm() / first.norm()) > 1e-2
    assert grouped.count_step_flops() < dense.count_step_flops()
    assert torch.equal(grouped.run(2), first)  # the emulation leaves no trace


def test_a_text_stream_costs_as_much_as_a_second_image() -> None:
    """Plus the attention over both streams. Without a text stream, one small attention per layer."""
    counts = {case.name: case.count_step_flops() for case in mixed.make_mixed_cases("small", RESOLUTION)}
    one, two = counts["model only"], counts["model only, two images"]
    assert two < counts["Infinite-ID, own text stream"] < 1.2 * two
    assert counts["Infinite-ID, own text stream"] == counts["Infinite-ID, shared text stream"]
    assert one < counts["Infinite-ID without a text stream"] < 1.2 * one


@pytest.mark.skipif(not HOST_PASSES_QUERIES, reason="this ComfyUI passes FLUX's queries to no patch")
def test_flux_adapters_add_one_attention_per_block() -> None:
    """4 * N * T * C for the products with keys and values, in every block; N includes the text if it takes part."""
    counts = {case.name: case.count_step_flops() for case in flux.make_flux_cases("small", RESOLUTION)}
    image, text = (RESOLUTION // 16) ** 2, flux.NUM_PROMPT_TOKENS["small"]
    width = flux.FLUX_SIZES["small"]["hidden_size"]
    doubles, singles = (flux.FLUX_SIZES["small"][key] for key in ("depth", "depth_single_blocks"))
    added = {name: count - counts["model only"] for name, count in counts.items()}
    assert added["XLabs v2"] == 4 * 16 * width * doubles * image
    assert added["InstantX"] == 4 * 128 * width * (doubles * image + singles * (image + text))
    assert added["Omni-ID"] == 4 * 256 * width * (doubles + singles) * image
    # Own queries and output projections, 2048 wide, after every second double and fourth single block; 32 tokens.
    assert added["PuLID-FLUX"] == (4 * width + 4 * 32) * 2048 * (doubles // 2 + singles // 4) * image
