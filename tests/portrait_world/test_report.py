"""The report on random models: every row through the pack's nodes, the page, and the tests of claims."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from comfyui_likeness.nodes import evaluate
from comfyui_likeness.nodes.loaders import demo_loader, files
from comfyui_likeness.portrait_world import world
from comfyui_likeness.portrait_world.evaluation import metrics
from comfyui_likeness.portrait_world.report import demo_stack, document, expected, finish, measure, prompts, rows
from comfyui_likeness.portrait_world.report.expected import Claim
from PIL import Image
from safetensors.torch import save_file
from support import report_stack

ROOT = Path(__file__).resolve().parents[2]
PEOPLE, PROMPTS = 2, 2
UNSHIPPED = {
    *rows.FLASHFACE_PLACEMENTS.values(),
    rows.IMAGE_AS_FUSED_FILE,
    rows.INFINITE_ID_PLAIN_FILE,
    rows.ADAFACE_FACE_FILE,
}
UNSHIPPED |= {rows.OMNI_ID_FILE.format(f"_{suffix}") for suffix in rows.OMNI_ID_ENCODERS}


@pytest.fixture(autouse=True)
def no_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests must not depend on training runs of this machine."""
    monkeypatch.setattr(demo_stack, "RUNS_FOLDER", tmp_path / "runs")


@pytest.fixture
def models(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> demo_stack.DemoStack:
    return report_stack.make_report_stack(tmp_path_factory.mktemp("stack"), folder)


def measure_share(models: demo_stack.DemoStack, plan: measure.MeasurementPlan, number: int, file: Path) -> Path:
    """Measure the share of one of two workers and save it as a worker does."""
    results = measure.measure_rows(models, plan, range(number, plan.max_people, 2), lambda key: None)
    torch.save({"values": results.values, "images": results.images, "photos": results.photos}, file)
    return file


def read_evidence(page: Path) -> dict[str, Any]:
    return json.loads((page.parent / "evidence" / document.EVIDENCE_FILE).read_text())


def test_report_of_all_rows(models: demo_stack.DemoStack, tmp_path: Path) -> None:
    out = tmp_path / "docs" / "evidence"
    plan = measure.make_plan([], PEOPLE, PROMPTS)
    shares = [measure_share(models, plan, n, tmp_path / f"{n}.pt") for n in range(2)]
    page = finish.finish_report(out, report_stack.SAMPLING_STEPS, shares)
    text, saved = page.read_text(), read_evidence(page)["rows"]
    shipped = [key for key, row in rows.REPORT_ROWS.items() if row.file not in UNSHIPPED]
    assert list(saved) == shipped and all(
        list(people) == ["0", "1"] for row in saved.values() for people in row.values()
    )
    for table in rows.REPORT_TABLES:
        body = text.split(f"## {table.title}\n")[1].split("\n## ")[0]
        lines = {line.split(" | ")[0].removeprefix("| "): line for line in body.splitlines() if line.startswith("|")}
        for key in table.row_keys:
            line, row = lines[rows.REPORT_ROWS[key].name], rows.REPORT_ROWS[key]
            cell = f"not measured: no {row.file}"
            if key in saved:
                values = torch.tensor([*next(iter(saved[key].values())).values()])
                interval = metrics.compute_bootstrap_interval(values)
                cell = f"{interval.mean:.3f} [{interval.low:.3f}, "
            assert cell in line, key
    for claim in rows.CLAIMS:
        (line,) = [one for one in text.splitlines() if one.startswith(f"| {claim.text} |")]
        assert ("not measured" in line) is any(rows.REPORT_ROWS[key].file in UNSHIPPED for key in claim.row_keys)
    assert {file.stem for file in out.glob("*.jpg")} == set(shipped)
    links = re.findall(r"\((evidence/.+?)\)", text)
    assert len(links) >= len(shipped) and all((page.parent / link).is_file() for link in links)
    for key, num_people in (("bare", 1), ("pair_bare", 2)):
        with Image.open(out / f"{key}.jpg") as strip:  # a photo and the images of each person's prompts
            assert strip.size == (128 + PROMPTS * (192 if num_people == 2 else 128), PEOPLE * 128)
    # With lambda_feat 0 the reference guidance has no effect.
    assert saved["feat_0"]["target"] != saved["feat_0.25"]["target"] != saved["feat_1"]["target"]

    again = measure_share(models, measure.make_plan(["bare"], PEOPLE, 1), 0, tmp_path / "again.pt")
    changed = read_evidence(finish.finish_report(out, report_stack.SAMPLING_STEPS, [again]))["rows"]
    assert changed["bare"]["similarity"]["0"] != saved["bare"]["similarity"]["0"]
    assert {**changed, "bare": 0} == {**saved, "bare": 0}
    elsewhere = read_evidence(finish.finish_report(out, report_stack.SAMPLING_STEPS + 1, [again]))["rows"]
    assert list(elsewhere) == ["bare"]  # rows of other sampler settings are dropped


def test_rows_repeat(models: demo_stack.DemoStack) -> None:
    plan = measure.make_plan(["decoupled_arcface", "flashface"], 1, 1)
    first, second = (measure.measure_rows(models, plan, [0], lambda key: None).values for _ in range(2))
    assert first == second


def test_rows_share_generated_images(models: demo_stack.DemoStack, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []
    sample_images = demo_stack.DemoStack.sample_images

    def count_calls(self: demo_stack.DemoStack, model: Any, embeddings: torch.Tensor, seed: int, *size: float) -> Any:
        seeds.append(seed)
        return sample_images(self, model, embeddings, seed, *size)

    monkeypatch.setattr(demo_stack.DemoStack, "sample_images", count_calls)
    keys = ["flashface", "ref_2", "flashface_4", "flashface_3", "pair_flashface"]
    results = measure.measure_rows(models, measure.make_plan(keys, 2, 1), range(2), lambda key: None)
    assert seeds == [0, 0, 0, 1, 1, 1]
    assert results.values["flashface"] == results.values["ref_2"] == results.values["flashface_4"]
    assert results.values["flashface"] != results.values["flashface_3"]


def test_cached_vae_encodes_once_and_evicts_the_oldest(monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[float] = []

    class FakeVAE:
        def encode(self, images: torch.Tensor) -> torch.Tensor:
            encoded.append(float(images.mean()))
            return images * 2

    monkeypatch.setattr(demo_stack, "MAX_CACHED_LATENTS", 2)
    vae = demo_stack.CachedVAE(FakeVAE())
    for grey in (1.0, 2.0, 1.0, 3.0, 3.0, 1.0):
        assert torch.equal(vae.encode(torch.full((1, 2, 2, 3), grey)), torch.full((1, 2, 2, 3), 2 * grey))
    assert encoded == [1, 2, 3, 1]


def test_command_measures_a_row_and_writes_the_page(tmp_path: Path) -> None:
    words = ["--only", "second_photo", "--people", "2", "--workers", "1", "--out", str(tmp_path / "evidence")]
    command = [sys.executable, "-m", "portrait_world.report.run", *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    page = Path(done.stdout.split()[-1])
    assert page.is_relative_to(tmp_path) and list(read_evidence(page)["rows"]) == ["second_photo"]
    assert "a photo of the person | 1 | 2 | 0." in page.read_text()


def test_adapters_of_runs_are_found_and_marked_as_not_shipped(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_stack, "RUNS_FOLDER", tmp_path)
    model = tmp_path / "adaface" / "model"
    model.mkdir(parents=True)
    save_file({"x": torch.zeros(1)}, model / rows.ADAFACE_FACE_FILE)
    demo_stack.register_adapter_folders()
    assert demo_stack.find_adapter_file(rows.ADAFACE_FACE_FILE) == model / rows.ADAFACE_FACE_FILE
    assert demo_stack.describe_weights_file(model / rows.ADAFACE_FACE_FILE).notes == "does not ship"
    files.SHIPPED_WEIGHTS.mkdir(exist_ok=True)
    save_file({"x": torch.zeros(1)}, files.SHIPPED_WEIGHTS / "x.safetensors")
    assert demo_stack.describe_weights_file(files.SHIPPED_WEIGHTS / "x.safetensors").notes == ""


def test_unknown_rows_are_an_error() -> None:
    with pytest.raises(ValueError, match="got nonsense; expected rows of the report: bare"):
        measure.make_plan(["bare", "nonsense"], 1, 1)


def test_prompt_is_the_caption_of_its_scenes() -> None:
    for eval_prompts, people in ((prompts.SINGLE_PROMPTS, 1), (prompts.PAIR_PROMPTS, 2)):
        for prompt in eval_prompts:
            scenes = islice(prompts.iterate_scenes(3, people), 4)
            details = ("expression", *(["clothes"] if prompt.clothes else []), "place")
            captions = {world.format_caption(prompt.apply_to_scene(scene), details=details) for scene in scenes}
            assert captions == {prompt.format_text(people)}
    assert len({prompt.format_text() for prompt in prompts.SINGLE_PROMPTS}) == 8
    assert {prompt.style for prompt in prompts.SINGLE_PROMPTS} == set(prompts.STYLE_PROMPTS)
    assert prompts.STYLE_PROMPTS["bronze"] == "a bronze of a person"
    assert prompts.SINGLE_PROMPTS[0].format_text() == "a photo of a smiling person in a red tee at a beach"


def test_shipped_clip_matches_prompts() -> None:
    images = []
    for n in range(2):
        for prompt in prompts.SINGLE_PROMPTS:
            scene = prompt.apply_to_scene(next(prompts.iterate_scenes(n)))
            images.append(world.paint_scene([world.make_person(n, prompts.EVAL_SPLIT)], scene).image)
    _, clip, _, vision = demo_loader.load_demo_models()
    texts = torch.stack([evaluate.embed_text(clip, prompt.format_text(), 128) for prompt in prompts.SINGLE_PROMPTS])
    embeddings = evaluate.embed_images(vision, [torch.from_numpy(image).float() / 255 for image in images])
    matches = metrics.match_top_text(embeddings, texts, torch.arange(len(texts)).repeat(2))
    assert matches.mean() > 0.7


@pytest.mark.parametrize(("count", "people"), [(1, 8), (2, 4), (4, 2), (8, 1), (9, 1)])
def test_all_prompts_are_used_equally(count: int, people: int) -> None:
    assigned = [prompts.assign_prompts(person, count, 8) for person in range(people)]
    assert sorted(index for indices in assigned for index in indices) == list(range(8))
    assert prompts.assign_prompts(people, count, 8) == assigned[0]


VALUES = {
    "low": {"similarity": torch.tensor([0.1, 0.2, 0.1])},
    "high": {"similarity": torch.tensor([0.5, 0.6, 0.5])},
    "wide": {"similarity": torch.tensor([-1.0, 2.0, 0.6])},
}


@pytest.mark.parametrize(
    ("test", "keys", "threshold", "holds"),
    [
        ("above", ("high", "low"), 0.25, True),
        ("above", ("high", "low"), 0.5, False),
        ("above", ("wide", "low"), 0.25, False),  # the intervals overlap
        ("rising", ("low", "high"), 0.0, True),
        ("rising", ("high", "low"), 0.0, False),
        ("falling", ("high", "low"), 0.0, True),
        ("falling", ("low", "high"), 0.0, False),
        ("lowest", ("low", "high", "wide"), 0.0, True),
        ("lowest", ("high", "low", "wide"), 0.0, False),
        ("at least", ("high",), 0.5, True),
        ("at least", ("low",), 0.5, False),
        ("rising", ("low", "gone"), 0.0, None),
    ],
)
def test_claims(test: str, keys: tuple[str, ...], threshold: float, holds: bool | None) -> None:
    assert expected.check_claim(Claim("", test, keys, threshold=threshold), VALUES).holds is holds


def test_claims_and_tables_refer_to_existing_rows() -> None:
    assert {key for table in rows.REPORT_TABLES for key in table.row_keys} == set(rows.REPORT_ROWS)
    assert {key for claim in rows.CLAIMS for key in claim.row_keys} <= set(rows.REPORT_ROWS)
    assert {claim.test for claim in rows.CLAIMS} <= set(expected.CLAIM_TESTS)
    assert {row.kind for row in rows.REPORT_ROWS.values()} == set(measure.ROW_KINDS)
