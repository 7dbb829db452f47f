"""The people of the report, on whom nothing was trained: their photos, and ground truth for the prompts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ...likeness.spec import Identity
from ...nodes.encode import EncodeIdentity
from ...nodes.identity import MergeIdentities
from ...nodes.types import OmniIDEncoderProtocol
from .. import world
from ..evaluation import metrics
from .demo_stack import DemoStack
from .prompts import EVAL_SPLIT, SINGLE_PROMPTS, EvalPrompt, iterate_scenes

FIRST_STRANGER = 1 << 16  # number of the first person who is only a stranger to others
MAX_SCENES_PER_PROMPT = 20
PHOTO_PROMPTS = [EvalPrompt("photo", place) for place in ("room", "city", "meadow", "plain")]


class EvalSubject:
    """One person of the test split.

    `photos` [4, H, W, 3] are what the methods read, `reference_embeddings` [4, 512] their embeddings by the
    evaluation recognizer. `mean_embedding` [512] is the mean unit embedding of four other photos. `targets`
    [8, H, W, 3] are the ground truth, the person painted for each prompt, `target_embeddings` [8, 512] theirs.
    """

    def __init__(self, stack: DemoStack, number: int) -> None:
        self.stack, self.number, self.name = stack, number, f"{EVAL_SPLIT} {number}"
        scenes = iterate_scenes(number)
        self.photos, self.reference_embeddings = self._paint_prompts(stack, number, PHOTO_PROMPTS, scenes)
        _, others = self._paint_prompts(stack, number, PHOTO_PROMPTS, scenes)
        self.mean_embedding = metrics.compute_mean_unit_embedding(others)
        self.targets, self.target_embeddings = self._paint_prompts(stack, number, SINGLE_PROMPTS, scenes)
        self._encoded: dict[int, Identity] = {}

    @staticmethod
    def _paint_prompts(
        stack: DemoStack, number: int, prompts: Iterable[EvalPrompt], remaining_scenes: Iterator[world.Scene]
    ) -> tuple[Tensor, Tensor]:
        """An image for each prompt in which a face is detected, and the faces' embeddings.

        Raises ValueError if no face is detected in MAX_SCENES_PER_PROMPT scenes.
        """
        person, images, embeddings = world.make_person(number, EVAL_SPLIT), [], []
        for prompt in prompts:
            for scene in islice(remaining_scenes, MAX_SCENES_PER_PROMPT):
                painted = world.paint_scene([person], prompt.apply_to_scene(scene)).image
                image = torch.from_numpy(painted).float()[None] / 255
                embedding = stack.embed_largest_faces(image)
                if embedding.any():
                    break
            else:
                raise ValueError(
                    f"got no face in {MAX_SCENES_PER_PROMPT} images of a person of the {EVAL_SPLIT} split "
                    f"({prompt.format_text()}); expected at least one; train the detector for longer"
                )
            images.append(image)
            embeddings.append(embedding)
        return torch.cat(images), torch.cat(embeddings)

    def paint_stranger(self) -> Tensor:
        """Another person painted for each prompt, [8, H, W, 3]."""
        number = FIRST_STRANGER + self.number
        return self._paint_prompts(self.stack, number, SINGLE_PROMPTS, iterate_scenes(number))[0]

    def encode_identity(self, num_photos: int) -> Identity:
        """The first photos, each encoded by Encode Identity and cached, merged by Merge Identities."""
        for i in range(len(self._encoded), num_photos):
            self._encoded[i] = self._encode(self.photos[i : i + 1], image_encoder=self.stack.clip_vision)
        if num_photos == 1:
            return self._encoded[0]
        identities = {f"identity_{i + 1}": self._encoded[i] for i in range(num_photos)}
        return MergeIdentities.execute(identities, "concatenate").args[0]

    def encode_jointly(self, num_photos: int, encoder: OmniIDEncoderProtocol) -> Identity:
        """The first photos encoded jointly: by Encode Identity with an Omni-ID encoder."""
        return self._encode(self.photos[:num_photos], omni_id=encoder)

    def _encode(self, images: Tensor, **encoders: Any) -> Identity:
        photos = {"photo_1": images}
        return EncodeIdentity.execute(photos, self.name, "largest", "stop", self.stack.analyzer, **encoders).args[0]
