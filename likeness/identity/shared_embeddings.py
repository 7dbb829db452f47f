"""The embeddings that several identities share. Only these can be merged or mixed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..spec import Identity, find_encoder_id, parse_encoder_id

EncoderIds = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class SharedEmbeddings:
    """`encoder_ids` maps the encoder ids of the result to each identity's own encoder id for that feature;
    `joint_encoder_ids` is the same for the joint embeddings. `notes` say what was dropped and why."""

    encoder_ids: EncoderIds
    joint_encoder_ids: EncoderIds
    notes: tuple[str, ...] = ()


def find_shared_embeddings(identities: Sequence[Identity]) -> SharedEmbeddings:
    """Find the features for which all identities have an embedding.

    If the encoder files differ, the result gets the most common encoder id, and a note warns. Raises ValueError if no
    feature is shared.
    """
    if not identities:
        raise ValueError("got no identity; expected at least one; connect one")
    encoder_ids, notes = _find_common_ids(identities, [identity.embeddings for identity in identities])
    joint_ids, joint_notes = _find_common_ids(identities, [identity.joint_embeddings for identity in identities])
    if not encoder_ids and not joint_ids:
        features = "; ".join(
            f"{_identity_label(identities, i)} has {_list_features(identity)}" for i, identity in enumerate(identities)
        )
        raise ValueError(
            f"got identities without a common embedding: {features}; expected one feature that all have; "
            "encode them with the same face analyzer or image encoder"
        )
    return SharedEmbeddings(encoder_ids, joint_ids, (*notes, *joint_notes))


def _find_common_ids(
    identities: Sequence[Identity], embeddings: Sequence[Mapping[str, Tensor]]
) -> tuple[EncoderIds, list[str]]:
    """The encoder ids of the features that all mappings have, one mapping per identity, and notes on the others."""
    common: dict[str, tuple[str, ...]] = {}
    notes: list[str] = []
    for feature in dict.fromkeys(parse_encoder_id(key)[0] for mapping in embeddings for key in mapping):
        ids = [find_encoder_id(mapping, feature) for mapping in embeddings]
        found = [key for key in ids if key is not None]
        if len(found) < len(ids):
            lacking = ", ".join(_identity_label(identities, i) for i, key in enumerate(ids) if key is None)
            notes.append(f"Dropped {feature}: {lacking} lacks it.")
            continue
        shapes = {tuple(mapping[key].shape[1:]) for mapping, key in zip(embeddings, found, strict=True)}
        if len(shapes) > 1:
            notes.append(f"Dropped {feature}: its shapes differ ({', '.join(map(str, sorted(shapes)))}).")
            continue
        if len(set(found)) > 1:
            hashes = ", ".join(sorted({key[-8:] for key in found}))
            notes.append(f"Warning: {feature} comes from different encoder files ({hashes}); the result may be off.")
        common[max(sorted(set(found)), key=found.count)] = tuple(found)
    return common, notes


def _identity_label(identities: Sequence[Identity], index: int) -> str:
    return f"identity {index + 1} ({identities[index].name!r})"


def _list_features(identity: Identity) -> str:
    encoder_ids = (*identity.embeddings, *identity.joint_embeddings)
    return ", ".join(sorted({str(parse_encoder_id(key)[0]) for key in encoder_ids})) or "nothing"
