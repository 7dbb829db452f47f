"""Identities from identities: merge photos of one person, mix people, find the photo that shows someone else.

ArcFace vectors and projected CLIP vectors are directions: they are averaged on the unit sphere, and the result gets the
mean length of what went in (the median length, for the median). Token grids are averaged element by element. All sums
run in float64.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import sphere
from .shared import Shared, shared
from .spec import Identity, parse_encoder_id

# Photos of one person have ArcFace cosines of about 0.4 to 0.8, of two people of less than 0.25.
ALIKE = 0.35
# No photo is an outlier that is nearer than this to the typical one, however alike the others are.
GAP = 0.2
TABLE_MAX = 12
NAME_MAX = 120


def cosine_matrix(vectors: Tensor) -> Tensor:
    """Cosine of every vector to every other: [n, d] -> [n, n] float64, in -1..1. A zero vector is like none: 0."""
    units = sphere.units(vectors.double())
    return (units @ units.T).clamp(-1, 1)


def agreement(vectors: Tensor) -> Tensor:
    """How alike each of [n, d] is to the rest: the upper median of its cosines to the others, [n] float64.

    The upper median is high as long as half of the others agree, so that a bad photo does not drag down the good ones.
    A single vector agrees with itself: 1.
    """
    n = len(vectors)
    if n == 1:
        return torch.ones(1, dtype=torch.float64)
    others = cosine_matrix(vectors)[~torch.eye(n, dtype=torch.bool)].view(n, n - 1)
    return others.sort(dim=1).values[:, (n - 1) // 2]


def outliers(vectors: Tensor, alike: float = ALIKE) -> list[int]:
    """Which of [n, d] probably show someone else, as ascending indices.

    An outlier's agreement is below `alike` and below the median agreement by more than 0.2 and by more than three
    standard deviations, estimated by the median absolute deviation. Two vectors, or a set without a majority that
    agrees, have none. `alike` fits ArcFace; 1 lets the distance from the rest decide alone.
    """
    if len(vectors) < 3:
        return []
    agree = agreement(vectors)
    typical = agree.quantile(0.5)
    spread = 1.4826 * (agree - typical).abs().quantile(0.5)
    far = (agree < alike) & (typical - agree > max(GAP, 3 * float(spread)))
    return far.nonzero().flatten().tolist()


def pictured(identity: Identity) -> tuple[Tensor, list[int]]:
    """The crops [n, H, W, 3] of an identity and which of them count, being of a weight above 0.

    Raises ValueError where there are no crops, or none that counts.
    """
    if identity.crop is None:
        raise ValueError(
            f"got identity {identity.name!r}, which holds no face pictures; expected one with its crops; "
            "encode the photos again, and save it with include_crops on"
        )
    kept = [i for i, weight in enumerate(identity.weight.tolist()) if weight > 0]
    if not kept:
        raise ValueError(f"identity {identity.name!r} has only faces of weight 0; give one of them a weight")
    return identity.crop, kept


def _is_direction(key: str) -> bool:
    feature = parse_encoder_id(key)[0]
    return feature.network.startswith("arcface.") or feature.layer == "projected"


def mean(rows: Tensor, weight: Tensor, direction: bool) -> Tensor:
    """Weighted mean: [n, d], [n] -> [d]; of directions, the direction of their sum at their mean length."""
    return sphere.mean(rows, weight) if direction else weight / weight.sum() @ rows


def median(rows: Tensor, weight: Tensor, direction: bool) -> Tensor:
    """Weighted geometric median: [n, d], [n] -> [d], on the unit sphere for directions; a minority moves it little."""
    if direction:
        return sphere.median(rows, weight)
    # The median lies in the plane through the rows, which has few dimensions where a token grid has many.
    origin = weight / weight.sum() @ rows
    basis, coordinates = torch.linalg.qr((rows - origin).T)
    return origin + basis @ sphere.weiszfeld(coordinates.T, weight, sphere.FLAT, torch.zeros_like(coordinates[:, 0]))


def blend(rows: Tensor, weight: Tensor, direction: bool) -> Tensor:
    """What `mix` does: slerp of two directions, Karcher mean of more, weighted mean of grids; [n, d], [n] -> [d]."""
    if not direction:
        return mean(rows, weight, direction)
    if len(rows) == 2:
        return sphere.slerp(rows[0], rows[1], float(weight[1] / weight.sum()))
    return sphere.karcher(rows, weight)


def quality(faces: Identity) -> Tensor:
    """Weight times detector score times agreement with the other faces, [n] float64.

    A face that no detector has looked at counts as the others' mean score. Where nothing would be left, the given
    weights stay.
    """
    given = faces.weight.double()
    looked = faces.score > 0
    usual = faces.score[looked].double().mean() if looked.any() else given.new_ones(())
    weight = given * torch.where(looked, faces.score.double(), usual)
    key = _reference(faces)
    if key is not None:
        weight = weight * agreement(faces.embeddings[key]).clamp(min=0)
    return weight if (weight > 0).any() else given


Centre = Callable[[Tensor, Tensor, bool], Tensor]


@dataclass(frozen=True)
class Method:
    """`weigh` gives the faces' weights; `centre` makes one row of many, or is None where every face is kept."""

    weigh: Callable[[Identity], Tensor]
    centre: Centre | None


def _given(faces: Identity) -> Tensor:
    return faces.weight.double()


METHODS: Mapping[str, Method] = {
    "mean": Method(_given, mean),
    "concatenate": Method(_given, None),
    "quality-weighted": Method(quality, mean),
    "geometric median": Method(_given, median),
}


def merge(identities: Sequence[Identity], method: str) -> tuple[Identity, str]:
    """Make one identity of several of the same person, by a row of `METHODS`, and a report.

    `concatenate` keeps every face. The others give one row per embedding, with box, key points, score and crop of the
    face nearest to it, and the sum of the weights; faces of weight 0 are left out. Only embeddings that all identities
    hold survive. Raises ValueError on an unknown method, where nothing is shared, or where all weights are 0.
    """
    if method not in METHODS:
        raise ValueError(f"got method {method!r}; expected one of {', '.join(METHODS)}; choose one")
    kept = shared(identities)
    faces = _stack(identities, kept)
    chosen = METHODS[method]
    merged = faces if chosen.centre is None else _reduce(faces, chosen.weigh, chosen.centre, method)
    shares = _shares(faces, chosen.weigh, [len(identity) for identity in identities])
    merged = replace(merged, joint=_centres(faces.joint, shares, chosen.centre or mean))
    notes = list(kept.notes)
    averaged = [key for key, rows in faces.joint.items() if not torch.equal(rows, rows[:1].expand_as(rows))]
    if averaged:
        notes.append(f"Averaged {', '.join(averaged)}: to encode all photos together would keep more of the person.")
    if chosen.centre is None and faces.crop is None and any(identity.crop is not None for identity in identities):
        notes.append("Dropped the face crops: not every identity has them.")
    if len({identity.name for identity in identities}) > 1:
        notes.append(f"The identities have different names; the result is called {merged.name!r}.")
    title = f"{len(faces)} face(s) of {len(identities)} identity(ies), method {method}, result {len(merged)} face(s)"
    return merged, "\n".join([title, *notes, *_likeness(faces)])


def mix(identities: Sequence[Identity], weights: Sequence[float]) -> Identity:
    """A person between several: each identity is reduced to its weighted mean, and these are blended by `weights`.

    Two directions are blended by slerp with t = w2 / (w1 + w2), more by their Karcher mean; token grids linearly.
    Weight 0 equals absence. The result is one face, with box, key points, score and crop of the heaviest identity.
    Raises ValueError on weights that are negative, not finite, all 0 or not one per identity.
    """
    present = _present(identities, weights)
    people, shares = [person for person, _ in present], [share for _, share in present]
    ones = [_reduce(_stack([person], _own(person)), _given, mean, "") for person in people]
    stacked = _stack(ones, shared(ones))
    weight = torch.tensor(shares, dtype=torch.float64)
    heaviest = ones[shares.index(max(shares))]
    names = list(dict.fromkeys(person.name for person in people))
    source = ", ".join(f"{person.name} {share:.0%}" for person, share in present)
    return replace(
        heaviest,
        name=" and ".join(names)[:NAME_MAX].strip(),
        weight=torch.ones(1),
        embeddings=_centres(stacked.embeddings, weight, blend),
        zeros=stacked.zeros,
        joint=_centres(stacked.joint, weight, blend),
        hashes=stacked.hashes,
        sources=(_short(source) if len(people) > 1 else heaviest.sources[0],),
    )


def mix_report(identities: Sequence[Identity], weights: Sequence[float]) -> str:
    """Who is in the mix with what share, and what was dropped or does not fit."""
    present = _present(identities, weights)
    lines = [f"{person.name}: {share:.1%}" for person, share in present]
    return "\n".join([*lines, *shared([person for person, _ in present]).notes])


def parse_weights(text: str, n: int) -> list[float]:
    """Numbers parted by commas, semicolons or blanks, one per identity; empty text means equal ones.

    Raises ValueError on any other text or count.
    """
    words = [word for word in re.split(r"[,;\s]+", text) if word]
    try:
        numbers = [float(word) for word in words] or [1.0] * n
    except ValueError:
        numbers = []
    if len(numbers) != n:
        raise ValueError(f"got weights {text!r} for {n} identities; expected {n} numbers, as 0.7, 0.3, or nothing")
    return numbers


def _present(identities: Sequence[Identity], weights: Sequence[float]) -> list[tuple[Identity, float]]:
    """The identities of a weight above 0, each with its share of 1."""
    good = len(weights) == len(identities) and all(math.isfinite(w) and w >= 0 for w in weights) and any(weights)
    if not good:
        raise ValueError(
            f"got weights {', '.join(map(str, weights)) or 'none'} for {len(identities)} identities; "
            "expected one per identity, 0 or more, one of them above 0; correct the list"
        )
    most = max(weights)
    total = sum(w / most for w in weights)  # by the largest first: the plain sum may overflow
    shares = [w / most / total for w in weights]
    return [(person, share) for person, share in zip(identities, shares, strict=True) if share > 0]


def _own(identity: Identity) -> Shared:
    keys, joint = ({key: (key,) for key in held} for held in (identity.embeddings, identity.joint))
    return Shared(keys, joint)


def _shares(faces: Identity, weigh: Callable[[Identity], Tensor], counts: Sequence[int]) -> Tensor:
    """What each identity's faces, so many of them, weigh together; all alike where nothing weighs anything."""
    keep = (faces.weight > 0).nonzero().flatten()
    weight = torch.zeros(len(faces), dtype=torch.float64)
    if len(keep):
        weight[keep] = weigh(_rows(faces, keep))
    shares = torch.stack([part.sum() for part in weight.split(list(counts))])
    return shares if len(keep) else torch.ones_like(shares)


def _stack(identities: Sequence[Identity], kept: Shared) -> Identity:
    """All faces of all identities, one below the other; so far, `joint` has a row for each identity."""
    keys, joint = kept.keys, kept.joint
    holders = {key: identities[own.index(key)] for key, own in {**keys, **joint}.items()}
    return Identity(
        name=identities[0].name,
        box=torch.cat([identity.box for identity in identities]),
        kps=torch.cat([identity.kps for identity in identities]),
        score=torch.cat([identity.score for identity in identities]),
        weight=torch.cat([identity.weight for identity in identities]),
        crop=_crops([identity.crop for identity in identities]),
        embeddings={
            key: torch.cat([who.embeddings[mine] for who, mine in zip(identities, own, strict=True)])
            for key, own in keys.items()
        },
        zeros={key: who.zeros[key] for key, who in holders.items() if key in who.zeros},
        sources=tuple(source for identity in identities for source in _sources(identity, len(identities) > 1)),
        hashes={key: who.hashes[key] for key, who in holders.items() if key in who.hashes},
        joint={
            key: torch.cat([who.joint[mine] for who, mine in zip(identities, own, strict=True)])
            for key, own in joint.items()
        },
    )


def _sources(identity: Identity, named: bool) -> list[str]:
    told = len(identity.sources) == len(identity)
    plain = identity.sources if told else tuple(f"photo {i + 1}" for i in range(len(identity)))
    prefix = f"{identity.name}: "
    return [_short(prefix + text) if named and not text.startswith(prefix) else text for text in plain]


def _short(text: str, limit: int = 200) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _crops(crops: Sequence[Tensor | None]) -> Tensor | None:
    """All crops in one tensor; smaller ones get a black margin right and below, which leaves box and kps true."""
    there = [crop for crop in crops if crop is not None]
    if len(there) < len(crops):
        return None
    height, width = max(crop.shape[1] for crop in there), max(crop.shape[2] for crop in there)
    pad = torch.nn.functional.pad
    return torch.cat([pad(c, (0, 0, 0, width - c.shape[2], 0, height - c.shape[1])) for c in there])


def _reference(faces: Identity) -> str | None:
    """The embedding by which faces are compared: ArcFace, else projected CLIP, else None."""
    directions = [key for key in faces.embeddings if _is_direction(key)]
    return min(directions, key=lambda key: not key.startswith("arcface."), default=None)


def _centres(stacked: Mapping[str, Tensor], weight: Tensor, centre: Centre) -> dict[str, Tensor]:
    """One row of many, for every embedding, without those of weight 0; a single one stays as it is, to the last bit."""
    out: dict[str, Tensor] = {}
    for key, rows in stacked.items():
        used = rows[weight > 0]
        if len(used) > 1:
            one = centre(used.flatten(1).double(), weight[weight > 0], _is_direction(key))
            used = one.to(rows.dtype).view(1, *rows.shape[1:])
        out[key] = used
    return out


def _reduce(faces: Identity, weigh: Callable[[Identity], Tensor], centre: Centre, method: str) -> Identity:
    """One face of many; those of weight 0 are absent. Raises ValueError where none is left."""
    keep = (faces.weight > 0).nonzero().flatten()
    if not len(keep):
        raise ValueError(f"identity {faces.name!r} has only faces of weight 0; give one of them a weight")
    faces = _rows(faces, keep)
    weight = weigh(faces)
    used = _rows(faces, (weight > 0).nonzero().flatten())
    embeddings = _centres(faces.embeddings, weight, centre)
    best = _nearest(used, embeddings)
    source = f"{method} of {len(used)}: " if method else ""
    return replace(
        _rows(used, torch.tensor([best])),
        weight=faces.weight.sum()[None],
        embeddings=embeddings,
        sources=used.sources if len(used) == 1 else (_short(source + ", ".join(used.sources)),),
    )


def _rows(faces: Identity, index: Tensor) -> Identity:
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


def _nearest(faces: Identity, embeddings: Mapping[str, Tensor]) -> int:
    """The face nearest to the result: by cosine where there are directions, else by distance, else the first."""
    key = _reference(faces)
    if key is not None:
        return int((sphere.units(faces.embeddings[key].double()) @ embeddings[key][0].double()).argmax())
    key = next(iter(embeddings), None)
    if key is None:
        return 0
    return int((faces.embeddings[key] - embeddings[key]).flatten(1).double().norm(dim=1).argmin())


def _likeness(faces: Identity) -> list[str]:
    """Report lines: which faces there are, the cosines between them, and who does not fit."""
    key = _reference(faces)
    lines = [f"{i + 1:>3}  {source}" for i, source in enumerate(faces.sources)]
    if key is None:
        return [*lines, "No ArcFace or projected CLIP vectors: the faces cannot be compared."]
    vectors = faces.embeddings[key]
    if len(faces) <= TABLE_MAX:
        rows = cosine_matrix(vectors).tolist()
        lines += [f"Cosines ({parse_encoder_id(key)[0]}):", "     " + "".join(f"{i + 1:>6}" for i in range(len(rows)))]
        lines += [f"{i + 1:>5}" + "".join(f"{value:>6.2f}" for value in row) for i, row in enumerate(rows)]
    else:
        lines = [f"{line}  agrees {value:.2f}" for line, value in zip(lines, agreement(vectors).tolist(), strict=True)]
    odd = outliers(vectors, ALIKE if key.startswith("arcface.") else 1.0)
    names = ", ".join(f"{i + 1} ({faces.sources[i]})" for i in odd)
    return [*lines, f"Outliers, probably someone else: {names}." if odd else "No outliers."]
