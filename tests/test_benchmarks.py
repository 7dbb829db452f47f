"""The benchmark counts what it says: a step pays for one small attention per layer, and for nothing else."""

from __future__ import annotations

import pytest
import torch
from comfyui_likeness.benchmarks import flashface, flux, fused, mixed
from comfyui_likeness.benchmarks.measure import KINDS, Bench, Row, base_model, table, with_identity
from comfyui_likeness.nodes.attention.unet import sites
from fluxes import SHOWN

ROWS = 2  # with the identity and without
RESOLUTION = 64


@pytest.fixture(scope="module")
def bare() -> Bench:
    return Bench("sd15", RESOLUTION, base_model("sd15", "small"))


def attention(bench: Bench, tokens: int) -> int:
    """2 * N * T * C for the products with keys, the same for those with values, in every layer and row."""
    size = {0: 8, 1: 4, 2: 2, 3: 1}
    levels = {("input", 1): 0, ("input", 2): 0, ("input", 4): 1, ("input", 5): 1, ("input", 7): 2, ("input", 8): 2}
    levels |= {("middle", 0): 3} | {("output", n): 3 - n // 3 for n in range(3, 12)}
    return sum(
        ROWS * 4 * size[levels[site.block]] ** 2 * tokens * site.hidden
        for site in sites(bench.model.model.diffusion_model)
    )


@pytest.mark.parametrize(("kind", "tokens"), [("image", 4), ("faceid_plus_v2", 4), ("portrait", 80)])
def test_a_step_pays_for_one_attention_per_layer(bare: Bench, kind: str, tokens: int) -> None:
    step, _ = bare.flops()
    bench = Bench("sd15", RESOLUTION, with_identity(bare.model, "sd15", "small", kind))
    with_it, once = bench.flops()
    assert with_it - step == attention(bare, tokens)
    assert once > 0  # the projector, keys and values
    assert bench.flops() == (with_it, once)


def test_the_table_has_a_row_per_kind() -> None:
    rows = [Row(kind, 100 + i, i, [1.0, 2.0], 10, None) for i, kind in enumerate(("bare model", *KINDS))]
    text = table(rows)
    assert all(f"| {kind} |" in text for kind in KINDS) and "1.0100" in text


def test_the_authors_way_of_flashface_gives_our_picture() -> None:
    model, net = flashface.load("small")
    cases = {case.name: case for case in flashface.cases(model, net, RESOLUTION)}
    theirs = cases["the authors' way"].run(2)
    first = cases["ours, first picture"].run(2)
    assert torch.equal(cases["ours, from the second picture on"].run(2), first)
    assert float((theirs - first).norm() / first.norm()) < 1e-4
    plain = cases["bare model, two rows"].run(2)
    assert float((plain - first).norm() / first.norm()) > 1e-2


def test_groups_of_queries_give_the_dense_masks_picture() -> None:
    cases = {case.name: case for case in fused.cases("small", RESOLUTION)}
    ours, theirs = cases["clean, two people by masks"], cases["the same with a dense mask"]
    first = ours.run(2)
    assert float((theirs.run(2) - first).norm() / first.norm()) < 1e-4
    assert float((cases["bare model"].run(2) - first).norm() / first.norm()) > 1e-2
    assert ours.flops() < theirs.flops()
    assert torch.equal(ours.run(2), first)  # the emulation leaves no trace


def test_a_text_stream_costs_a_second_picture() -> None:
    """And the attention that reads both; without it, one small attention per layer."""
    counts = {case.name: case.flops() for case in mixed.cases("small", RESOLUTION)}
    bare, two = counts["bare model"], counts["bare model, two pictures"]
    assert two < counts["own text stream"] < 1.2 * two
    assert counts["own text stream"] == counts["shared text stream"]
    assert bare < counts["no text stream (off)"] < 1.2 * bare


@pytest.mark.skipif(not SHOWN, reason="the host shows FLUX's queries to no patch")
def test_flux_pays_for_one_attention_per_block() -> None:
    """4 * N * T * C for the products with keys and values, in every block; N counts the text where it takes part."""
    counts = {case.name: case.flops() for case in flux.cases("small", RESOLUTION)}
    picture, text, width = (RESOLUTION // 16) ** 2, flux.TEXT["small"], flux.CONFIGS["small"]["hidden_size"]
    doubles, singles = (flux.CONFIGS["small"][key] for key in ("depth", "depth_single_blocks"))
    added = {name: count - counts["bare model"] for name, count in counts.items()}
    assert added["XLabs v2"] == 4 * 16 * width * doubles * picture
    assert added["InstantX"] == 4 * 128 * width * (doubles * picture + singles * (picture + text))
    assert added["Omni-ID"] == 4 * 256 * width * (doubles + singles) * picture
    # Queries and output of its own, 2048 wide, behind every second double and fourth single block; 32 tokens.
    assert added["PuLID-FLUX"] == (4 * width + 4 * 32) * 2048 * (doubles // 2 + singles // 4) * picture
