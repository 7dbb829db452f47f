"""How the rows of the report generate images: by a method's apply node, by the painter, or by the base model alone.

The factories are cached: equal arguments return the same function, by which equal requests of rows are recognized.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...likeness.spec import Identity, People
from ...nodes.attention.apply_decoupled import ApplyDecoupled
from ...nodes.attention.apply_fused import ApplyFused
from ...nodes.attention.apply_mixed import ApplyMixed
from ...nodes.attention.flashface.apply_reference import ApplyReference
from ...nodes.people import MakePerson
from ...nodes.prompt import PromptWithIdentity
from .. import world
from ..drawing.scenes import IMAGE_WIDTHS
from .demo_stack import DemoStack
from .eval_subjects import EvalSubject
from .prompts import EVAL_SPLIT, PAIR_PROMPTS, iterate_scenes

IdentityOrPeople = Identity | People
GUIDANCE_LAUNCH = 1000  # with this launch reference guidance is active in every step
LAMBDA_FEAT, LAMBDA_REF = 0.85, 2.0  # the paper's values
CLASS_WORD = "person"


@dataclass(frozen=True, eq=False)
class ImageRequest:
    """The people of an image from left to right, how many photos of each the method reads, and the prompts.

    `prompt_indices` are the places of `prompt_texts` in prompts.SINGLE_PROMPTS or PAIR_PROMPTS.
    """

    stack: DemoStack
    subjects: Sequence[EvalSubject]
    num_photos: int
    prompt_texts: Sequence[str]
    prompt_indices: Sequence[int]

    @property
    def aspect_ratio(self) -> float:
        """The width of the images relative to their height."""
        return IMAGE_WIDTHS[len(self.subjects)]

    @property
    def identity_or_people(self) -> IdentityOrPeople:
        """One identity, or two people with a mask over one half of the image each."""
        identities = [subject.encode_identity(self.num_photos) for subject in self.subjects]
        if len(identities) == 1:
            return identities[0]
        people: People | None = None
        height = self.subjects[0].photos.shape[1]
        width = round(height * self.aspect_ratio)
        for identity, mask in zip(identities, torch.eye(2).repeat_interleave(width // 2, 1), strict=True):
            people = MakePerson.execute(identity, 1.0, mask.expand(1, height, width), people).args[0]
        assert people is not None
        return people

    def sample_images(self, model: ModelPatcher, embeddings: Tensor) -> Tensor:
        """An image for each prompt; requests of the same first person have the same noise."""
        return self.stack.sample_images(model, embeddings, self.subjects[0].number, self.aspect_ratio)


MakeImages = Callable[[ImageRequest], Tensor]  # -> images [p, H, W, 3]
PatchModel = Callable[[ImageRequest], ModelPatcher]


def sample_with_patch(patch_model: PatchModel | None, request: ImageRequest) -> Tensor:
    """Sample with the patched model; with the unpatched one if `patch_model` is None."""
    model = request.stack.model if patch_model is None else patch_model(request)
    embeddings = request.stack.encode_prompts(request.prompt_texts)
    return request.sample_images(model, embeddings)


def _full_schedule(**inputs: Any) -> dict[str, Any]:
    """The node inputs with a schedule over all steps."""
    return {"start_percent": 0.0, "end_percent": 1.0, **inputs}


@cache
def make_decoupled_method(file: str, encoder_file: str = "") -> MakeImages:
    """Decoupled attention; with `encoder_file` on the tokens of an Omni-ID encoder, all photos encoded jointly."""

    def patch(request: ImageRequest) -> ModelPatcher:
        stack, inputs = request.stack, _full_schedule(strength=1.0, layer_weights="linear", scaling="V only")
        if encoder_file:
            encoder = stack.load_omni_encoder(encoder_file)
            identity = request.subjects[0].encode_jointly(request.num_photos, encoder)
        else:
            identity = request.identity_or_people
        return ApplyDecoupled.execute(stack.model, stack.load_adapter(file), identity, **inputs).args[0]

    return partial(sample_with_patch, patch)


@cache
def make_fused_method(file: str) -> MakeImages:
    def patch(request: ImageRequest) -> ModelPatcher:
        stack, inputs = request.stack, _full_schedule(strength=1.0, outside="all")
        adapter = stack.load_adapter(file)
        return ApplyFused.execute(stack.model, adapter, request.identity_or_people, stack.cached_vae, **inputs).args[0]

    return partial(sample_with_patch, patch)


@cache
def make_flashface_method(file: str, lambda_feat: float = LAMBDA_FEAT, lambda_ref: float = LAMBDA_REF) -> MakeImages:
    """FlashFace by the paper's Eq. 2 and 3: guidance in every step, each photo once, no rescaling."""

    def patch(request: ImageRequest) -> ModelPatcher:
        model, net = request.stack.load_flashface(file)
        inputs = _full_schedule(
            strength=lambda_feat, reference_guidance=lambda_ref, launch=GUIDANCE_LAUNCH, rescale=0.0, show_at_least=1
        )
        return ApplyReference.execute(model, net, request.identity_or_people, request.stack.cached_vae, **inputs).args[
            0
        ]

    return partial(sample_with_patch, patch)


@cache
def make_infinite_id_method(file: str, attention: str = "mixed", style: str = "AdaIN-mean") -> MakeImages:
    """Infinite-ID; by default as in the paper: mixed attention with its own text stream, and AdaIN-mean."""

    def patch(request: ImageRequest) -> ModelPatcher:
        stack = request.stack
        inputs = _full_schedule(strength=1.0, style=style, attention=attention, text_stream="own")
        return ApplyMixed.execute(stack.model, stack.load_adapter(file), request.identity_or_people, **inputs).args[0]

    return partial(sample_with_patch, patch)


@cache
def make_adaface_method(file: str, arc2face_file: str) -> MakeImages:
    """AdaFace: the identity replaces the prompts' class word; the model is not patched."""

    def make_images(request: ImageRequest) -> Tensor:
        stack, inputs = request.stack, {"strength": 1.0, "class_word": CLASS_WORD, "placeholder": CLASS_WORD}
        prompter = stack.load_prompter(file, arc2face_file)
        encoded = [
            PromptWithIdentity.execute(stack.clip, prompter, request.identity_or_people, text=text, **inputs).args[0]
            for text in request.prompt_texts
        ]
        embeddings = torch.cat([states for ((states, _),) in encoded])
        return request.sample_images(stack.model, embeddings)

    return make_images


sample_without_adapter: MakeImages = partial(sample_with_patch, None)


def get_target_images(request: ImageRequest) -> Tensor:
    """The ground truth: the person painted for each prompt, as a perfect method would generate it."""
    return request.subjects[0].targets[request.prompt_indices]


def paint_stranger(request: ImageRequest) -> Tensor:
    """Another person painted for each prompt."""
    return request.subjects[0].paint_stranger()[request.prompt_indices]


def get_reference_photos(request: ImageRequest) -> Tensor:
    """The photos that the methods read: an upper limit, two photos of one person compared."""
    return request.subjects[0].photos


def paint_target_pair(request: ImageRequest) -> Tensor:
    """The ground truth for two people: both painted for each prompt."""
    people = [world.make_person(subject.number, EVAL_SPLIT) for subject in request.subjects]
    scenes = iterate_scenes(request.subjects[0].number, len(people))
    images = [
        world.paint_scene(people, PAIR_PROMPTS[index].apply_to_scene(next(scenes))).image
        for index in request.prompt_indices
    ]
    return torch.stack([torch.from_numpy(image) for image in images]).float() / 255
