"""Few to many (Sec. 3.2): sampling of input images and target images of a person, and aligned face crops.

A face is uint8 [S, S, 4]: the crop as the encoder expects it, and a face mask as the fourth channel.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from ...likeness.faces import alignment
from ..base_models import latents
from ..data import shard_source
from ..data.clusters import AnnotatedImage
from ..data.image_source import random_indices
from ..data.shard_source import ShardSource

# Degrees between any two head poses of a person. MFHQ has 15 (Sec. 3.4); in Portrait World heads turn too little for so
# many images of a person.
MIN_POSE_DISTANCE = 8.0

PersonClusters = Sequence[Sequence[int]]


def require_view_shards(source: object, images_per_person: int) -> ShardSource:
    """The source, if it is a folder of shards. Raises ValueError otherwise."""
    return shard_source.require_shards(
        source, f" --min-pose-distance {MIN_POSE_DISTANCE:g} --images-per-person {images_per_person}"
    )


def check_view_counts(min_images: int, max_images: int, num_targets: int, images_per_person: int) -> None:
    """Raise ValueError unless `images_per_person` images suffice for the inputs and for the targets."""
    if not (0 < min_images <= max_images <= images_per_person and 0 < num_targets <= images_per_person):
        raise ValueError(
            f"got min_images = {min_images}, max_images = {max_images}, num_targets = {num_targets}, "
            f"images_per_person = {images_per_person} in [task]; expected 1 <= min_images <= max_images <= "
            "images_per_person and 1 <= num_targets <= images_per_person"
        )


def list_complete_clusters(
    source: ShardSource, num_images: int, max_people: int, images_per_person: int
) -> PersonClusters:
    """Image indices of each person with `images_per_person` images among the first `num_images`, or all if that is 0.

    At most `max_people` people. Raises ValueError if there are none.
    """
    num_images = num_images or len(source)
    clusters = source.list_clusters(num_images, max_people, images_per_person)
    complete = [cluster for cluster in clusters if len(cluster) == images_per_person]
    if not complete:
        raise ValueError(
            f"got no person with {images_per_person} images among the first {num_images}; expected at least one; "
            "raise cached_samples or lower images_per_person"
        )
    return complete


def sample_few_to_many(
    generator: Generator, clusters: PersonClusters, num_people: int, image_range: tuple[int, int], num_targets: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Input images X_s and target images X_r of `num_people` random people, as image indices.

    The number of inputs is the same for all people, uniform in `image_range`. Inputs may be among the targets.
    """
    least, most = image_range
    num_inputs = least + int(torch.randint(most - least + 1, (), generator=generator))
    people = [clusters[index] for index in random_indices(generator, num_people, len(clusters))]

    def sample_images(count: int) -> list[list[int]]:
        return [
            [cluster[i] for i in torch.randperm(len(cluster), generator=generator)[:count].tolist()]
            for cluster in people
        ]

    return sample_images(num_inputs), sample_images(num_targets)


def crop_view_face(sample: AnnotatedImage, face_size: int) -> Tensor:
    """The aligned face of an image with its mask, uint8 [face_size, face_size, 4]."""
    masked_image = torch.cat((sample.image.float() / 255, sample.mask[..., None].float()), dim=-1)
    return alignment.convert_to_uint8(alignment.align_face(masked_image, sample.kps, face_size))


def cache_aligned_faces(source: ShardSource, clusters: PersonClusters, face_size: int) -> dict[int, Tensor]:
    """The faces of all images of the clusters by image index, computed once and cached next to the shards."""
    order = [index for cluster in clusters for index in cluster]
    first = source.load_original_image(order[0]).image.numpy().tobytes()
    digest = hashlib.sha256(f"{face_size} {order}".encode() + first).hexdigest()[:8]

    def crop_faces(positions: range) -> Tensor:
        images = [source.load_original_image(order[position % len(order)]) for position in positions]
        return torch.stack([crop_view_face(image, face_size) for image in images])

    faces = latents.cache_tensors(source.folder / f"faces-{digest}-{face_size}", len(order), crop_faces)
    return dict(zip(order, faces, strict=True))
