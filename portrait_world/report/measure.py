"""Generates and measures the images of all rows, person by person, so that work shared by rows is done once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import comfy.model_management
import torch
from torch import Tensor

from ...likeness.faces import alignment
from ..evaluation import metrics
from . import demo_stack, prompts
from .eval_subjects import EvalSubject
from .methods import ImageRequest
from .rows import REPORT_ROWS, ReportRow

MetricValues = dict[str, Tensor]  # by metric, one value per image, [p]
NUM_SHOWN_PEOPLE = 3  # people whose images are saved


def measure_single_person(request: ImageRequest, images: Tensor) -> MetricValues:
    (subject,), stack, indices = request.subjects, request.stack, request.prompt_indices
    faces = stack.embed_largest_faces(images)
    ref = metrics.compute_reference_similarity(faces, subject.reference_embeddings[: request.num_photos])
    target = metrics.compute_cosines(faces, subject.target_embeddings[indices])
    texts = torch.cat([stack.encode_prompt(prompt.format_text())[1] for prompt in prompts.SINGLE_PROMPTS])
    style_texts = torch.cat([stack.encode_prompt(text)[1] for text in prompts.STYLE_PROMPTS.values()])
    style_names = list(prompts.STYLE_PROMPTS)
    styles = torch.tensor([style_names.index(prompts.SINGLE_PROMPTS[index].style) for index in indices])
    clip_embeddings = stack.encode_images(images)
    clip, matches = metrics.measure_adherence(clip_embeddings, texts, torch.tensor(indices))
    return {
        "similarity": metrics.compute_cosines(faces, subject.mean_embedding), "ref": ref, "target": target,
        "paste": metrics.compute_paste_score(ref, target), "clip": clip, "prompt": matches,
        "style": metrics.match_top_text(clip_embeddings, style_texts, styles),
        "lost": metrics.flag_missing_faces(faces),
    }  # fmt: skip


def measure_photos(request: ImageRequest, images: Tensor) -> MetricValues:
    faces = request.stack.embed_largest_faces(images)
    return {
        "similarity": metrics.compute_cosines(faces, request.subjects[0].mean_embedding),
        "lost": metrics.flag_missing_faces(faces),
    }


def measure_pairs(request: ImageRequest, images: Tensor) -> MetricValues:
    references = torch.stack([subject.mean_embedding for subject in request.subjects])
    return metrics.measure_assignment(request.stack.embed_faces_by_half(images), references)._asdict()


@dataclass(frozen=True)
class RowKind:
    """How images are measured, how many people each shows, and the prompts."""

    measure: Callable[[ImageRequest, Tensor], MetricValues]
    num_people: int
    prompt_choices: Sequence[prompts.EvalPrompt]

    def make_request(
        self, models: demo_stack.DemoStack, subjects: Sequence[EvalSubject], num_photos: int, num_prompts: int
    ) -> ImageRequest:
        """A request with the prompts that are assigned to the first person."""
        indices = prompts.assign_prompts(subjects[0].number, num_prompts, len(self.prompt_choices))
        texts = [self.prompt_choices[index].format_text(self.num_people) for index in indices]
        return ImageRequest(models, subjects, num_photos, texts, indices)


ROW_KINDS: Mapping[str, RowKind] = {
    "single": RowKind(measure_single_person, 1, prompts.SINGLE_PROMPTS),
    "photos": RowKind(measure_photos, 1, prompts.SINGLE_PROMPTS),
    "pairs": RowKind(measure_pairs, 2, prompts.PAIR_PROMPTS),
}


@dataclass(frozen=True)
class MeasurementPlan:
    """Which rows to measure, and upper limits on the people and on the prompts per person."""

    rows: Mapping[str, ReportRow]
    max_people: int = 64
    max_prompts: int = len(prompts.SINGLE_PROMPTS)

    def list_jobs(self, numbers: Sequence[int]) -> Iterator[tuple[int, str]]:
        """All pairs of a person's number and a row's key, person by person."""
        for number in numbers:
            yield from (
                (number, key) for key, row in self.rows.items() if number < min(row.max_people, self.max_people)
            )


def make_plan(row_keys: Sequence[str], max_people: int, max_prompts: int) -> MeasurementPlan:
    """A plan for these rows (all if empty) as far as their files exist. Raises ValueError for unknown keys."""
    unknown = [key for key in row_keys if key not in REPORT_ROWS]
    if unknown:
        raise ValueError(f"got {', '.join(unknown)}; expected rows of the report: {', '.join(REPORT_ROWS)}")
    rows = {key: row for key, row in REPORT_ROWS.items() if not row_keys or key in row_keys}
    available = {
        key: row for key, row in rows.items() if not row.file or demo_stack.find_adapter_file(row.file) is not None
    }
    return MeasurementPlan(available, max_people, max_prompts)


@dataclass
class Measurements:
    """By row and metric: each person's mean over the prompts; and the images of the first people."""

    values: dict[str, dict[str, dict[int, float]]] = field(default_factory=dict)
    images: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    photos: dict[int, Tensor] = field(default_factory=dict)

    def add_row(self, key: str, subject: EvalSubject, values: MetricValues, images: Tensor) -> None:
        number = subject.number
        for name, value in values.items():
            self.values.setdefault(key, {}).setdefault(name, {})[number] = float(value.double().mean())
        if number < NUM_SHOWN_PEOPLE:
            self.images.setdefault(key, {})[number] = alignment.convert_to_uint8(images)
            self.photos[number] = alignment.convert_to_uint8(subject.photos)


def measure_rows(
    models: demo_stack.DemoStack, plan: MeasurementPlan, numbers: Sequence[int], on_progress: Callable[[str], Any]
) -> Measurements:
    """Measure the plan's rows for the people with these numbers; the right person of a pair is the next one.

    Images that several rows of a person need are generated once.
    """
    results = Measurements()
    cached: dict[Any, tuple[MetricValues, Tensor]] = {}
    subjects: dict[int, EvalSubject] = {}

    def get_subject(number: int) -> EvalSubject:
        if number not in subjects:
            for old in [other for other in subjects if other < number - 1]:
                del subjects[old]
            subjects[number] = EvalSubject(models, number)
        return subjects[number]

    with torch.inference_mode():
        for number, key in plan.list_jobs(numbers):
            comfy.model_management.throw_exception_if_processing_interrupted()
            row = plan.rows[key]
            kind = ROW_KINDS[row.kind]
            people = [get_subject(number + i) for i in range(kind.num_people)]
            request = kind.make_request(models, people, row.num_photos, min(row.num_prompts, plan.max_prompts))
            cache_key = (number, row.make_images, row.kind, row.num_photos, tuple(request.prompt_indices))
            if cache_key not in cached:
                cached = {other: entry for other, entry in cached.items() if other[0] == number}
                images = row.make_images(request)
                cached[cache_key] = kind.measure(request, images), images
            results.add_row(key, people[0], *cached[cache_key])
            on_progress(key)
    return results
