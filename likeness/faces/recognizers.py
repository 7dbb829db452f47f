"""Which ArcFace network a recognizer file holds. Publishers reuse file names, and users rename and refill folders."""

from __future__ import annotations

import unicodedata

# sha256 of a published file -> the network's name in encoder ids. buffalo_l and buffalo_m share a file, and buffalo_s
# and buffalo_sc. AuraFace's file is named as antelopev2's.
PUBLISHED_RECOGNIZERS = {
    "4c06341c33c2ca1f86781dab0e829f88ad5b64be9fba56e56bc9ebdefc619e43": "buffalo_l",
    "4ab1d6435d639628a6f3e5008dd4f929edf4c4124b1a7169e1048f9fef534cdf": "antelopev2",
    "9cc6e4a75f0e2bf0b1aed94578f144d15175f357bdc05e815e5c4a02b319eb4f": "buffalo_s",
    "a7933ea5330113b01c9b60351d8f4c33003f145d8470ac5f0e52ee2effe25c60": "auraface",
}
# Folder and file of a recognizer that takes the place of the pack's own, as its authors say -> the network's name.
REPLACED_RECOGNIZERS = {("antelopev2", "arcface.onnx"): "arc2face"}


def name_recognizer(folder: str, file: str, sha256: str) -> str:
    """The name of a recognizer's network in encoder ids: that of the published file, or else of the folder."""
    folder = unicodedata.normalize("NFC", folder).lower()
    return PUBLISHED_RECOGNIZERS.get(sha256) or REPLACED_RECOGNIZERS.get((folder, file.lower()), folder)
