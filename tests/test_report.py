"""The report on models from seeds: every row by the pack's nodes, the document, and what claims make of numbers."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import reports
import torch
from analyzers import folder as folder
from comfyui_likeness.nodes import evaluate
from comfyui_likeness.nodes.loaders import demo, files
from comfyui_likeness.training import metrics, world
from comfyui_likeness.training.report import document, expected, finish, measure, prompts, rows, stack
from comfyui_likeness.training.report.expected import Claim
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[1]
PEOPLE, PROMPTS = 2, 2
UNSHIPPED = {*rows.PLACED.values(), rows.IMAGE_AS_FUSED, rows.INFINITE_PLAIN, rows.ADAFACE_FACE}
UNSHIPPED |= {rows.OMNI.format(f"_{ends}") for ends in rows.ENCODERS}


@pytest.fixture(autouse=True)
def no_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What this machine has trained is no part of any test."""
    monkeypatch.setattr(stack, "RUNS", tmp_path / "runs")


@pytest.fixture
def models(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> stack.Stack:
    return reports.make(tmp_path_factory.mktemp("stack"), folder)


def part(models: stack.Stack, plan: measure.Plan, number: int, file: Path) -> Path:
    """One of two processes' part, in a file as a process leaves it."""
    found = measure.run(models, plan, range(number, plan.people, 2), lambda key: None)
    torch.save({"values": found.values, "pictures": found.pictures, "photos": found.photos}, file)
    return file


def told(page: Path) -> dict[str, Any]:
    return json.loads((page.parent / "evidence" / document.JSON).read_text())


def test_a_whole_report(models: stack.Stack, tmp_path: Path) -> None:
    out = tmp_path / "docs" / "evidence"
    plan = measure.planned([], PEOPLE, PROMPTS)
    page = finish.finish(out, reports.STEPS, [part(models, plan, n, tmp_path / f"{n}.pt") for n in range(2)])
    text, kept = page.read_text(), told(page)["rows"]
    shipped = [key for key, row in rows.ROWS.items() if row.file not in UNSHIPPED]
    assert list(kept) == shipped and all(list(people) == ["0", "1"] for row in kept.values() for people in row.values())
    for table in rows.TABLES:
        body = text.split(f"## {table.title}\n")[1].split("\n## ")[0]
        lines = {line.split(" | ")[0].removeprefix("| "): line for line in body.splitlines() if line.startswith("|")}
        for key in table.rows:
            line, row = lines[rows.ROWS[key].name], rows.ROWS[key]
            spread = metrics.interval(torch.tensor([*next(iter(kept[key].values())).values()])) if key in kept else None
            wanted = f"not measured: no {row.file}" if spread is None else f"{spread.mean:.3f} [{spread.low:.3f}, "
            assert wanted in line, key
    for claim in rows.CLAIMS:
        (line,) = [one for one in text.splitlines() if one.startswith(f"| {claim.text} |")]
        assert ("not measured" in line) is any(rows.ROWS[key].file in UNSHIPPED for key in claim.rows)
    assert {file.stem for file in out.glob("*.jpg")} == set(shipped)
    links = re.findall(r"\((evidence/.+?)\)", text)
    assert len(links) >= len(shipped) and all((page.parent / link).is_file() for link in links)
    # Without lambda_feat there is nothing for lambda_ref to push to.
    assert kept["feat_0"]["target"] != kept["feat_0.25"]["target"] != kept["feat_1"]["target"]

    again = part(models, measure.planned(["bare"], PEOPLE, 1), 0, tmp_path / "again.pt")
    changed = told(finish.finish(out, reports.STEPS, [again]))["rows"]
    assert changed["bare"]["similarity"]["0"] != kept["bare"]["similarity"]["0"]
    assert {**changed, "bare": 0} == {**kept, "bare": 0}
    elsewhere = told(finish.finish(out, reports.STEPS + 1, [again]))["rows"]
    assert list(elsewhere) == ["bare"]  # what another sampler made is no part of it


def test_rows_repeat(models: stack.Stack) -> None:
    plan = measure.planned(["decoupled_arcface", "flashface"], 1, 1)
    first, second = (measure.run(models, plan, [0], lambda key: None).values for _ in range(2))
    assert first == second


def test_what_several_rows_ask_is_made_once(models: stack.Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    painted: list[int] = []
    paint = stack.Stack.paint

    def counted(self: stack.Stack, model: Any, words: torch.Tensor, seed: int) -> torch.Tensor:
        painted.append(seed)
        return paint(self, model, words, seed)

    monkeypatch.setattr(stack.Stack, "paint", counted)
    keys = ["flashface", "ref_2", "flashface_4", "flashface_3", "pair_flashface"]
    found = measure.run(models, measure.planned(keys, 2, 1), range(2), lambda key: None)
    assert painted == [0, 0, 0, 1, 1, 1]
    assert found.values["flashface"] == found.values["ref_2"] == found.values["flashface_4"]
    assert found.values["flashface"] != found.values["flashface_3"]


def test_the_eye_encodes_a_picture_once_and_forgets_the_oldest(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []

    class Vae:
        def encode(self, pictures: torch.Tensor) -> torch.Tensor:
            asked.append(float(pictures.mean()))
            return pictures * 2

    monkeypatch.setattr(stack, "KEPT", 2)
    eye = stack.Eye(Vae())
    for grey in (1.0, 2.0, 1.0, 3.0, 3.0, 1.0):
        assert torch.equal(eye.encode(torch.full((1, 2, 2, 3), grey)), torch.full((1, 2, 2, 3), 2 * grey))
    assert asked == [1, 2, 3, 1]


def test_the_command_measures_a_row_and_writes_the_page(tmp_path: Path) -> None:
    words = ["--only", "second_photo", "--people", "2", "--workers", "1", "--out", str(tmp_path / "evidence")]
    command = [sys.executable, "-m", "training.report.run", *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    page = Path(done.stdout.split()[-1])
    assert page.is_relative_to(tmp_path) and list(told(page)["rows"]) == ["second_photo"]
    assert "another real photo of the person | 1 | 2 | 0." in page.read_text()


def test_what_runs_left_for_a_comparison_is_found_and_said_not_to_ship(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stack, "RUNS", tmp_path)
    model = tmp_path / "adaface" / "model"
    model.mkdir(parents=True)
    save_file({"x": torch.zeros(1)}, model / rows.ADAFACE_FACE)
    stack.register()
    assert stack.place(rows.ADAFACE_FACE) == model / rows.ADAFACE_FACE
    assert stack.shipped(model / rows.ADAFACE_FACE).notes == "does not ship"
    files.SHIPPED.mkdir(exist_ok=True)
    save_file({"x": torch.zeros(1)}, files.SHIPPED / "x.safetensors")
    assert stack.shipped(files.SHIPPED / "x.safetensors").notes == ""


def test_unknown_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="got nonsense; expected rows of the report: bare"):
        measure.planned(["bare", "nonsense"], 1, 1)


def test_a_prompt_is_the_caption_of_what_is_drawn() -> None:
    for asked, people in ((prompts.ALONE, 1), (prompts.PAIRS, 2)):
        for prompt in asked:
            shown = {world.caption(prompt.shown(scene)) for scene in islice(prompts.scenes(3, people), 4)}
            assert shown == {prompt.text(people)}
    assert len({prompt.text() for prompt in prompts.ALONE}) == 8
    assert {prompt.style for prompt in prompts.ALONE} == set(prompts.STYLED)
    assert prompts.STYLED["bronze"] == "a bronze of a person"
    assert prompts.ALONE[0].text() == "a photo of a smiling person in red at a beach"


def test_the_shipped_pair_finds_what_was_asked_for() -> None:
    shown = [world.paint([world.person(n, prompts.SPLIT)], prompt.shown(next(prompts.scenes(n)))).image
             for n in range(2) for prompt in prompts.ALONE]  # fmt: skip
    _, clip, _, vision = demo.load()
    texts = torch.stack([evaluate.of_text(clip, prompt.text(), 128) for prompt in prompts.ALONE])
    seen = evaluate.of_pictures(vision, [torch.from_numpy(one).float() / 255 for one in shown])
    right = metrics.likest(seen, texts, torch.arange(len(texts)).repeat(2))
    assert right.mean() > 0.7


@pytest.mark.parametrize(("count", "people"), [(1, 8), (2, 4), (4, 2), (8, 1), (9, 1)])
def test_all_prompts_are_asked_as_often(count: int, people: int) -> None:
    turns = [prompts.turn(person, count, 8) for person in range(people)]
    assert sorted(place for turn in turns for place in turn) == list(range(8))
    assert prompts.turn(people, count, 8) == turns[0]


VALUES = {
    "low": {"similarity": torch.tensor([0.1, 0.2, 0.1])},
    "high": {"similarity": torch.tensor([0.5, 0.6, 0.5])},
    "wide": {"similarity": torch.tensor([-1.0, 2.0, 0.6])},
}


@pytest.mark.parametrize(
    ("how", "keys", "by", "holds"),
    [
        ("above", ("high", "low"), 0.25, True),
        ("above", ("high", "low"), 0.5, False),
        ("above", ("wide", "low"), 0.25, False),  # far above, but the intervals meet
        ("rising", ("low", "high"), 0.0, True),
        ("rising", ("high", "low"), 0.0, False),
        ("falling", ("high", "low"), 0.0, True),
        ("falling", ("low", "high"), 0.0, False),
        ("lowest", ("low", "high", "wide"), 0.0, True),
        ("lowest", ("high", "low", "wide"), 0.0, False),
        ("least", ("high",), 0.5, True),
        ("least", ("low",), 0.5, False),
        ("rising", ("low", "gone"), 0.0, None),
    ],
)
def test_claims(how: str, keys: tuple[str, ...], by: float, holds: bool | None) -> None:
    assert expected.verdict(Claim("", how, keys, by=by), VALUES).holds is holds


def test_every_claim_and_table_is_of_rows_that_there_are() -> None:
    assert {key for table in rows.TABLES for key in table.rows} == set(rows.ROWS)
    assert {key for claim in rows.CLAIMS for key in claim.rows} <= set(rows.ROWS)
    assert {claim.how for claim in rows.CLAIMS} <= set(expected.TESTS)
    assert {row.kind for row in rows.ROWS.values()} == set(measure.KINDS)
