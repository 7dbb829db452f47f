"""Merge photos of one person, mix several people, and find photos that show someone else.

ArcFace and projected CLIP embeddings are averaged on the unit sphere, and the result gets the mean length of the inputs
(the median length, for the median). Other embeddings, such as token grids, are averaged element by element. Everything
is computed in float64.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..spec import Identity, parse_encoder_id
from . import averaging
from .shared_embeddings import SharedEmbeddings, find_shared_embeddings

# ArcFace cosines are about 0.4 to 0.8 between photos of one person, and below 0.25 between two people.
SAME_PERSON_COSINE = 0.35
# An outlier's agreement is at least this far below the median, however similar the other photos are.
MIN_OUTLIER_GAP = 0.2
MAX_TABLE_FACES = 12
MAX_NAME_LENGTH = 120


def compute_cosine_matrix(vectors: Tensor) -> Tensor:
    """Pairwise cosines: [n, d] -> [n, n] float64, -1 to 1. The cosines of a zero vector are 0."""
    units = averaging.normalize_rows(vectors.double())
    return (units @ units.T).clamp(-1, 1)


def compute_agreement(vectors: Tensor) -> Tensor:
    """How well each vector agrees with the others: the upper median of its cosines, [n, d] -> [n] float64.

    The upper median stays high as long as half of the others agree, so one bad photo does not lower the good ones. A
    single vector gets 1.
    """
    n = len(vectors)
    if n == 1:
        return torch.ones(1, dtype=torch.float64)
    others = compute_cosine_matrix(vectors)[~torch.eye(n, dtype=torch.bool)].view(n, n - 1)
    return others.sort(dim=1).values[:, (n - 1) // 2]


def find_outliers(vectors: Tensor, min_cosine: float = SAME_PERSON_COSINE) -> list[int]:
    """Indices, ascending, of the vectors [n, d] that probably show someone else.

    The agreement of an outlier is below `min_cosine`, and below the median agreement by more than 0.2 and by more than
    three standard deviations (estimated from the median absolute deviation). Fewer than three vectors, or a set without
    a majority that agrees, have no outliers. The default of `min_cosine` fits ArcFace; 1 disables that criterion.
    """
    if len(vectors) < 3:
        return []
    agreement = compute_agreement(vectors)
    median = agreement.quantile(0.5)
    deviation = 1.4826 * (agreement - median).abs().quantile(0.5)
    outliers = (agreement < min_cosine) & (median - agreement > max(MIN_OUTLIER_GAP, 3 * float(deviation)))
    return outliers.nonzero().flatten().tolist()


def get_weighted_crops(identity: Identity) -> tuple[Tensor, list[int]]:
    """The face crops [n, H, W, 3] of an identity and the indices of those with a weight above 0.

    Raises ValueError if there are no crops, or if all weights are 0.
    """
    if identity.crop is None:
        raise ValueError(
            f"got identity {identity.name!r} without face crops; expected one with them; "
            "encode the photos again, and save the identity with include_crops on"
        )
    indices = [i for i, weight in enumerate(identity.weight.tolist()) if weight > 0]
    if not indices:
        raise ValueError(f"identity {identity.name!r} has only faces of weight 0; give one of them a weight")
    return identity.crop, indices


def _is_unit_embedding(key: str) -> bool:
    feature = parse_encoder_id(key)[0]
    return feature.network.startswith("arcface.") or feature.layer == "projected"


def compute_mean(rows: Tensor, weight: Tensor, is_unit_embedding: bool) -> Tensor:
    """Weighted mean, [n, d], [n] -> [d]; for unit embeddings, the spherical mean."""
    return averaging.compute_spherical_mean(rows, weight) if is_unit_embedding else weight / weight.sum() @ rows


def compute_median(rows: Tensor, weight: Tensor, is_unit_embedding: bool) -> Tensor:
    """Weighted geometric median, [n, d], [n] -> [d], on the unit sphere for unit embeddings. Robust to a minority."""
    if is_unit_embedding:
        return averaging.compute_spherical_median(rows, weight)
    # The median lies in the affine span of the rows, which has far fewer dimensions than a token grid.
    origin = weight / weight.sum() @ rows
    basis, coordinates = torch.linalg.qr((rows - origin).T)
    return origin + basis @ averaging.compute_geometric_median(
        coordinates.T, weight, averaging.EUCLIDEAN, torch.zeros_like(coordinates[:, 0])
    )


def interpolate_embeddings(rows: Tensor, weight: Tensor, is_unit_embedding: bool) -> Tensor:
    """Interpolation for mixes, [n, d] -> [d]: slerp of two unit embeddings, Karcher mean of more, else the mean."""
    if not is_unit_embedding:
        return compute_mean(rows, weight, is_unit_embedding)
    if len(rows) == 2:
        return averaging.slerp_embeddings(rows[0], rows[1], float(weight[1] / weight.sum()))
    return averaging.compute_karcher_mean(rows, weight)


def compute_quality_weights(identity: Identity) -> Tensor:
    """Weight times detector score times agreement with the other faces, [n] float64.

    Faces without a detector score get the mean score of the others. If all products are 0, the identity's own weights
    are returned.
    """
    face_weight = identity.weight.double()
    detected = identity.score > 0
    mean_score = identity.score[detected].double().mean() if detected.any() else face_weight.new_ones(())
    weight = face_weight * torch.where(detected, identity.score.double(), mean_score)
    key = _comparison_key(identity)
    if key is not None:
        weight = weight * compute_agreement(identity.embeddings[key]).clamp(min=0)
    return weight if (weight > 0).any() else face_weight


AveragingFunction = Callable[[Tensor, Tensor, bool], Tensor]


@dataclass(frozen=True)
class MergeMethod:
    """`compute_weights` returns the faces' weights [n]; `average` reduces many rows to one, None keeps every face."""

    compute_weights: Callable[[Identity], Tensor]
    average: AveragingFunction | None


def _face_weights(identity: Identity) -> Tensor:
    return identity.weight.double()


MERGE_METHODS: Mapping[str, MergeMethod] = {
    "mean": MergeMethod(_face_weights, compute_mean),
    "concatenate": MergeMethod(_face_weights, None),
    "quality-weighted": MergeMethod(compute_quality_weights, compute_mean),
    "geometric median": MergeMethod(_face_weights, compute_median),
}


def merge_identities(identities: Sequence[Identity], method: str) -> tuple[Identity, str]:
    """Merge identities of the same person by one of `MERGE_METHODS`. Returns the identity and a report.

    `concatenate` keeps every face. The other methods reduce each embedding to one row; box, key points, score and crop
    are those of the face nearest to it, the weight is the sum. Faces of weight 0 are ignored. Only embeddings that all
    identities share are kept. Raises ValueError for an unknown method, if no embedding is shared or all weights are 0.
    """
    if method not in MERGE_METHODS:
        raise ValueError(f"got method {method!r}; expected one of {', '.join(MERGE_METHODS)}; choose one")
    shared = find_shared_embeddings(identities)
    faces = _stack_faces(identities, shared)
    weigh, average = MERGE_METHODS[method].compute_weights, MERGE_METHODS[method].average
    merged = faces if average is None else _average_faces(faces, weigh, average, method)
    weights = _identity_weights(faces, weigh, [len(identity) for identity in identities])
    joint = _average_embeddings(faces.joint_embeddings, weights, average or compute_mean)
    merged = replace(merged, joint_embeddings=joint)
    notes = list(shared.notes)
    averaged = [key for key, rows in faces.joint_embeddings.items() if not torch.equal(rows, rows[:1].expand_as(rows))]
    if averaged:
        notes.append(f"Averaged {', '.join(averaged)}: encoding all photos jointly would keep more of the likeness.")
    if average is None and faces.crop is None and any(identity.crop is not None for identity in identities):
        notes.append("Dropped the face crops: not every identity has them.")
    if len({identity.name for identity in identities}) > 1:
        notes.append(f"The identities have different names; the result is called {merged.name!r}.")
    title = f"{len(faces)} face(s) of {len(identities)} identity(ies), method {method}, result {len(merged)} face(s)"
    return merged, "\n".join([title, *notes, *_similarity_report(faces)])


def mix_identities(identities: Sequence[Identity], weights: Sequence[float]) -> Identity:
    """Interpolate several people: each identity is reduced to its weighted mean, and these are blended by `weights`.

    Two unit embeddings are blended by slerp with t = w2 / (w1 + w2), more by their Karcher mean, token grids linearly.
    Identities of weight 0 are ignored. The result has one face; its box, key points, score and crop are those of the
    identity with the largest weight. Raises ValueError if weights are negative, not finite, all 0 or not one per
    identity.
    """
    present = _select_weighted(identities, weights)
    people, shares = [person for person, _ in present], [share for _, share in present]
    means = [
        _average_faces(_stack_faces([person], _all_embeddings(person)), _face_weights, compute_mean, "")
        for person in people
    ]
    stacked = _stack_faces(means, find_shared_embeddings(means))
    weight = torch.tensor(shares, dtype=torch.float64)
    heaviest = means[shares.index(max(shares))]
    names = list(dict.fromkeys(person.name for person in people))
    source = ", ".join(f"{person.name} {share:.0%}" for person, share in present)
    return replace(
        heaviest,
        name=" and ".join(names)[:MAX_NAME_LENGTH].strip(),
        weight=torch.ones(1),
        embeddings=_average_embeddings(stacked.embeddings, weight, interpolate_embeddings),
        zero_embeddings=stacked.zero_embeddings,
        joint_embeddings=_average_embeddings(stacked.joint_embeddings, weight, interpolate_embeddings),
        hashes=stacked.hashes,
        sources=(_truncate(source) if len(people) > 1 else heaviest.sources[0],),
    )


def describe_mix(identities: Sequence[Identity], weights: Sequence[float]) -> str:
    """Report of a mix: each person's share, and which embeddings were dropped or do not match."""
    present = _select_weighted(identities, weights)
    lines = [f"{person.name}: {share:.1%}" for person, share in present]
    return "\n".join([*lines, *find_shared_embeddings([person for person, _ in present]).notes])


def parse_weights(text: str, count: int) -> list[float]:
    """Parse `count` numbers separated by commas, semicolons or spaces; empty text means equal weights.

    Raises ValueError for any other text or count.
    """
    try:
        weights = [float(number) for number in re.split(r"[,;\s]+", text) if number] or [1.0] * count
    except ValueError:
        weights = []
    if len(weights) != count:
        raise ValueError(
            f"got weights {text!r} for {count} identities; expected {count} numbers, such as 0.7, 0.3, or nothing"
        )
    return weights


def _select_weighted(identities: Sequence[Identity], weights: Sequence[float]) -> list[tuple[Identity, float]]:
    """The identities with a weight above 0, each with its weight normalized to a sum of 1."""
    valid = len(weights) == len(identities) and all(math.isfinite(w) and w >= 0 for w in weights) and any(weights)
    if not valid:
        raise ValueError(
            f"got weights {', '.join(map(str, weights)) or 'none'} for {len(identities)} identities; "
            "expected one per identity, 0 or more, one of them above 0; correct the list"
        )
    largest = max(weights)
    total = sum(w / largest for w in weights)  # divided by the largest first, as the plain sum may overflow
    shares = [w / largest / total for w in weights]
    return [(person, share) for person, share in zip(identities, shares, strict=True) if share > 0]


def _all_embeddings(identity: Identity) -> SharedEmbeddings:
    return SharedEmbeddings(
        {key: (key,) for key in identity.embeddings}, {key: (key,) for key in identity.joint_embeddings}
    )


def _identity_weights(faces: Identity, compute_weights: Callable[[Identity], Tensor], counts: Sequence[int]) -> Tensor:
    """The summed face weights of each identity, which has `counts[i]` of the faces; equal if all weights are 0."""
    keep = (faces.weight > 0).nonzero().flatten()
    weight = torch.zeros(len(faces), dtype=torch.float64)
    if len(keep):
        weight[keep] = compute_weights(_select_faces(faces, keep))
    sums = torch.stack([part.sum() for part in weight.split(list(counts))])
    return sums if len(keep) else torch.ones_like(sums)


def _stack_faces(identities: Sequence[Identity], shared: SharedEmbeddings) -> Identity:
    """Concatenate the faces of all identities; `joint_embeddings` get one row per identity, to be averaged later."""
    # The identity that each encoder id of the result comes from.
    owners = {
        key: identities[ids.index(key)] for key, ids in {**shared.encoder_ids, **shared.joint_encoder_ids}.items()
    }
    return Identity(
        name=identities[0].name,
        box=torch.cat([identity.box for identity in identities]),
        kps=torch.cat([identity.kps for identity in identities]),
        score=torch.cat([identity.score for identity in identities]),
        weight=torch.cat([identity.weight for identity in identities]),
        crop=_stack_crops([identity.crop for identity in identities]),
        embeddings={
            key: torch.cat([identity.embeddings[own] for identity, own in zip(identities, ids, strict=True)])
            for key, ids in shared.encoder_ids.items()
        },
        zero_embeddings={key: one.zero_embeddings[key] for key, one in owners.items() if key in one.zero_embeddings},
        sources=tuple(source for identity in identities for source in _describe_sources(identity, len(identities) > 1)),
        hashes={key: one.hashes[key] for key, one in owners.items() if key in one.hashes},
        joint_embeddings={
            key: torch.cat([identity.joint_embeddings[own] for identity, own in zip(identities, ids, strict=True)])
            for key, ids in shared.joint_encoder_ids.items()
        },
    )


def _describe_sources(identity: Identity, add_name: bool) -> list[str]:
    complete = len(identity.sources) == len(identity)
    sources = identity.sources if complete else tuple(f"photo {i + 1}" for i in range(len(identity)))
    prefix = f"{identity.name}: "
    return [_truncate(prefix + text) if add_name and not text.startswith(prefix) else text for text in sources]


def _truncate(text: str, limit: int = 200) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _stack_crops(crops: Sequence[Tensor | None]) -> Tensor | None:
    """Concatenate the crops, padded right and below, which leaves box and kps valid. None if a crop is missing."""
    present = [crop for crop in crops if crop is not None]
    if len(present) < len(crops):
        return None
    height, width = max(crop.shape[1] for crop in present), max(crop.shape[2] for crop in present)
    pad = torch.nn.functional.pad
    return torch.cat([pad(c, (0, 0, 0, width - c.shape[2], 0, height - c.shape[1])) for c in present])


def _comparison_key(faces: Identity) -> str | None:
    """The encoder id of the embedding used to compare faces: ArcFace, else projected CLIP, else None."""
    candidates = [key for key in faces.embeddings if _is_unit_embedding(key)]
    return min(candidates, key=lambda key: not key.startswith("arcface."), default=None)


def _average_embeddings(stacked: Mapping[str, Tensor], weight: Tensor, average: AveragingFunction) -> dict[str, Tensor]:
    """Reduce each embedding [n, ...] to one row, ignoring rows of weight 0. A single row is kept bit-identical."""
    averaged: dict[str, Tensor] = {}
    for key, rows in stacked.items():
        used = rows[weight > 0]
        if len(used) > 1:
            mean = average(used.flatten(1).double(), weight[weight > 0], _is_unit_embedding(key))
            used = mean.to(rows.dtype).view(1, *rows.shape[1:])
        averaged[key] = used
    return averaged


def _average_faces(
    faces: Identity, compute_weights: Callable[[Identity], Tensor], average: AveragingFunction, method: str
) -> Identity:
    """Reduce all faces to one; those of weight 0 are ignored. Raises ValueError if none is left."""
    keep = (faces.weight > 0).nonzero().flatten()
    if not len(keep):
        raise ValueError(f"identity {faces.name!r} has only faces of weight 0; give one of them a weight")
    faces = _select_faces(faces, keep)
    weight = compute_weights(faces)
    used = _select_faces(faces, (weight > 0).nonzero().flatten())
    embeddings = _average_embeddings(faces.embeddings, weight, average)
    nearest = _find_nearest_face(used, embeddings)
    source = f"{method} of {len(used)}: " if method else ""
    return replace(
        _select_faces(used, torch.tensor([nearest])),
        weight=faces.weight.sum()[None],
        embeddings=embeddings,
        sources=used.sources if len(used) == 1 else (_truncate(source + ", ".join(used.sources)),),
    )


def _select_faces(faces: Identity, index: Tensor) -> Identity:
    return replace(
        faces,
        box=faces.box[index],
        kps=faces.kps[index],
        score=faces.score[index],
        weight=faces.weight[index],
        crop=None if faces.crop is None else faces.crop[index],
        embeddings={key: rows[index] for key, rows in faces.embeddings.items()},
        sources=tuple(faces.sources[i] for i in index.tolist()),
    )


def _find_nearest_face(faces: Identity, embeddings: Mapping[str, Tensor]) -> int:
    """Index of the face nearest to the result: by cosine if there are unit embeddings, else by distance, else 0."""
    key = _comparison_key(faces)
    if key is not None:
        return int((averaging.normalize_rows(faces.embeddings[key].double()) @ embeddings[key][0].double()).argmax())
    key = next(iter(embeddings), None)
    if key is None:
        return 0
    return int((faces.embeddings[key] - embeddings[key]).flatten(1).double().norm(dim=1).argmin())


def _similarity_report(faces: Identity) -> list[str]:
    """Report lines: the faces, the cosines between them, and the outliers."""
    key = _comparison_key(faces)
    lines = [f"{i + 1:>3}  {source}" for i, source in enumerate(faces.sources)]
    if key is None:
        return [*lines, "No ArcFace or projected CLIP embeddings: the faces cannot be compared."]
    vectors = faces.embeddings[key]
    if len(faces) <= MAX_TABLE_FACES:
        rows = compute_cosine_matrix(vectors).tolist()
        lines += [f"Cosines ({parse_encoder_id(key)[0]}):", "     " + "".join(f"{i + 1:>6}" for i in range(len(rows)))]
        lines += [f"{i + 1:>5}" + "".join(f"{value:>6.2f}" for value in row) for i, row in enumerate(rows)]
    else:
        lines = [
            f"{line}  agreement {value:.2f}"
            for line, value in zip(lines, compute_agreement(vectors).tolist(), strict=True)
        ]
    outliers = find_outliers(vectors, SAME_PERSON_COSINE if key.startswith("arcface.") else 1.0)
    names = ", ".join(f"{i + 1} ({faces.sources[i]})" for i in outliers)
    return [*lines, f"Outliers, probably someone else: {names}." if outliers else "No outliers."]
