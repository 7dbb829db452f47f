"""How each row of the report makes its pictures: by a method's own apply node, by the painter, or without anybody.

Asked for the same twice these give one and the same Make, by which rows are known to make the same pictures.
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
from ...nodes.attention.decoupled import ApplyDecoupled
from ...nodes.attention.fused import ApplyFused
from ...nodes.attention.mixed import ApplyMixed
from ...nodes.attention.reference import ApplyReference
from ...nodes.people import MakePerson
from ...nodes.prompt import PromptWithIdentity
from .. import world
from .prompts import PAIRS, SPLIT, scenes
from .sitters import Sitter
from .stack import Stack

Who = Identity | People
ALWAYS = 1000  # the launch from which reference guidance runs at every step
LAMBDA_FEAT, LAMBDA_REF = 0.85, 2.0  # the paper's own
CLASS = "person"


@dataclass(frozen=True, eq=False)
class Asked:
    """One call: the people of a picture, from left to right, how many photos of each are read, and the prompts.

    `places` say which of prompts.ALONE, or PAIRS, the `texts` are.
    """

    stack: Stack
    sitters: Sequence[Sitter]
    photos: int
    texts: Sequence[str]
    places: Sequence[int]

    @property
    def who(self) -> Who:
        """One identity, or each in its part of the picture."""
        identities = [sitter.identity(self.photos) for sitter in self.sitters]
        if len(identities) == 1:
            return identities[0]
        people: People | None = None
        side = self.sitters[0].photos.shape[1]
        for identity, mask in zip(identities, torch.eye(2).repeat_interleave(side // 2, 1), strict=True):
            people = MakePerson.execute(identity, 1.0, mask.expand(1, side, side), people).args[0]
        assert people is not None
        return people


Make = Callable[[Asked], Tensor]  # -> pictures [p, H, W, 3]
Patch = Callable[[Asked], ModelPatcher]


def painted(patch: Patch | None, asked: Asked) -> Tensor:
    """By the model with a method in it; without one as it is."""
    model = asked.stack.model if patch is None else patch(asked)
    return asked.stack.paint(model, asked.stack.words(asked.texts), asked.sitters[0].number)


def _window(**told: Any) -> dict[str, Any]:
    return {"start_percent": 0.0, "end_percent": 1.0, **told}


@cache
def decoupled(file: str, omni: str = "") -> Make:
    """With the file of an Omni-ID encoder, to its tokens of all photos together."""

    def patch(asked: Asked) -> ModelPatcher:
        stack, told = asked.stack, _window(strength=1.0, layer_weights="linear", scaling="V only")
        who = asked.sitters[0].together(asked.photos, stack.omni(omni)) if omni else asked.who
        return ApplyDecoupled.execute(stack.model, stack.adapter(file), who, **told).args[0]

    return partial(painted, patch)


@cache
def fused(file: str) -> Make:
    def patch(asked: Asked) -> ModelPatcher:
        stack, told = asked.stack, _window(strength=1.0, outside="all")
        return ApplyFused.execute(stack.model, stack.adapter(file), asked.who, stack.eye, **told).args[0]

    return partial(painted, patch)


@cache
def flashface(file: str, feat: float = LAMBDA_FEAT, ref: float = LAMBDA_REF) -> Make:
    """As the paper's Eq. 2 and 3 have it: at every step, each photo once, without rescaling."""

    def patch(asked: Asked) -> ModelPatcher:
        model, net = asked.stack.flashface(file)
        told = _window(strength=feat, reference_guidance=ref, launch=ALWAYS, rescale=0.0, show_at_least=1)
        return ApplyReference.execute(model, net, asked.who, asked.stack.eye, **told).args[0]

    return partial(painted, patch)


@cache
def infinite(file: str, attention: str = "mixed", style: str = "AdaIN-mean") -> Make:
    """As the paper has it: mixed attention with a text stream of its own, and AdaIN-mean."""

    def patch(asked: Asked) -> ModelPatcher:
        stack, told = asked.stack, _window(strength=1.0, style=style, attention=attention, text_stream="own")
        return ApplyMixed.execute(stack.model, stack.adapter(file), asked.who, **told).args[0]

    return partial(painted, patch)


@cache
def adaface(file: str, arc2face: str) -> Make:
    """The person in the place of the prompts' class word; the model is as it is."""

    def make(asked: Asked) -> Tensor:
        stack, told = asked.stack, {"strength": 1.0, "class_word": CLASS, "placeholder": CLASS}
        prompter = stack.prompter(file, arc2face)
        said = [PromptWithIdentity.execute(stack.clip, prompter, asked.who, text=text, **told).args[0]
                for text in asked.texts]  # fmt: skip
        return stack.paint(stack.model, torch.cat([words for ((words, _),) in said]), asked.sitters[0].number)

    return make


bare: Make = partial(painted, None)


def as_asked(asked: Asked) -> Tensor:
    """The person drawn by the world's painter as the prompts ask: what a perfect method would make."""
    return asked.sitters[0].targets[asked.places]


def another(asked: Asked) -> Tensor:
    """Somebody else, drawn likewise."""
    return asked.sitters[0].stranger()[asked.places]


def second_photos(asked: Asked) -> Tensor:
    """The photos that methods read: real ones, as like the person's other photos as a photo can be."""
    return asked.sitters[0].photos


def pair_as_asked(asked: Asked) -> Tensor:
    """Both people drawn by the world's painter."""
    who = [world.person(sitter.number, SPLIT) for sitter in asked.sitters]
    shown = scenes(asked.sitters[0].number, len(who))
    made = [world.paint(who, PAIRS[place].shown(next(shown))).image for place in asked.places]
    return torch.stack([torch.from_numpy(picture) for picture in made]).float() / 255
