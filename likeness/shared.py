"""What several identities all hold, which is what can be merged or mixed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from .spec import Identity, find, parse_encoder_id

Keys = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Shared:
    """`keys` maps the result's encoder ids to each identity's own id of that feature, `joint` does so for what was made
    of all faces together; `notes` say what was dropped."""

    keys: Keys
    joint: Keys
    notes: tuple[str, ...] = ()


def shared(identities: Sequence[Identity]) -> Shared:
    """The embeddings that all identities hold.

    Where encoder files differ the most common id names the result, and a note warns. Raises ValueError where nothing
    is shared.
    """
    if not identities:
        raise ValueError("got no identity; expected at least one; connect one")
    keys, notes = _common(identities, [identity.embeddings for identity in identities])
    joint, more = _common(identities, [identity.joint for identity in identities])
    if not keys and not joint:
        have = "; ".join(f"{_label(identities, i)} holds {_holds(identity)}" for i, identity in enumerate(identities))
        raise ValueError(
            f"got identities without a common embedding: {have}; expected one feature that all have; "
            "encode them with the same face analyzer or image encoder"
        )
    return Shared(keys, joint, (*notes, *more))


def _common(identities: Sequence[Identity], held: Sequence[Mapping[str, Tensor]]) -> tuple[Keys, list[str]]:
    """The ids of the features that all mappings hold, one mapping per identity, and notes on the others."""
    keys: dict[str, tuple[str, ...]] = {}
    notes: list[str] = []
    for feature in dict.fromkeys(parse_encoder_id(key)[0] for one in held for key in one):
        own = [find(one, feature) for one in held]
        there = [key for key in own if key is not None]
        if len(there) < len(own):
            lacking = ", ".join(_label(identities, i) for i, key in enumerate(own) if key is None)
            notes.append(f"Dropped {feature}: {lacking} lacks it.")
            continue
        shapes = {tuple(one[key].shape[1:]) for one, key in zip(held, there, strict=True)}
        if len(shapes) > 1:
            notes.append(f"Dropped {feature}: its shapes differ ({', '.join(map(str, sorted(shapes)))}).")
            continue
        if len(set(there)) > 1:
            hashes = ", ".join(sorted({key[-8:] for key in there}))
            notes.append(f"Warning: {feature} comes from different encoder files ({hashes}); the result may be off.")
        keys[max(sorted(set(there)), key=there.count)] = tuple(there)
    return keys, notes


def _label(identities: Sequence[Identity], i: int) -> str:
    return f"identity {i + 1} ({identities[i].name!r})"


def _holds(identity: Identity) -> str:
    held = (*identity.embeddings, *identity.joint)
    return ", ".join(sorted({str(parse_encoder_id(key)[0]) for key in held})) or "nothing"
