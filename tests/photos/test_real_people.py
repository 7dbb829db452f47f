"""Photos of nine people through the nodes, with MTCNN and a small ArcFace network.

The people are synthetic and look real. `python -m tools.test` brings photos and networks; without them these tests are
skipped.
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import folder_paths
import pytest
import torch
from comfyui_likeness.likeness.attention.regions import compute_coverage
from comfyui_likeness.likeness.faces import alignment, detection, quality
from comfyui_likeness.likeness.identity import merge
from comfyui_likeness.likeness.identity.merge import SAME_PERSON_COSINE, compute_cosine_matrix, find_outliers
from comfyui_likeness.likeness.spec import Identity
from comfyui_likeness.nodes import identity as identity_nodes
from comfyui_likeness.nodes.encode import EncodeIdentity
from comfyui_likeness.nodes.loaders.face_analyzer import FaceAnalyzer, LoadFaceAnalyzer
from comfyui_likeness.nodes.measure import MeasureLikeness
from comfyui_likeness.nodes.people import PeopleFromPhoto
from comfyui_likeness.nodes.photos import get_unit_embedding
from support import real_people
from support.real_people import FIGURE, PEOPLE, PORTRAIT, SELFIE, STREET, load_photo
from torch import Tensor

PHOTOS = (PORTRAIT, SELFIE, FIGURE)
Encoded = dict[str, tuple[Identity, str]]


def encode_photos(*photos: Tensor, analyzer: FaceAnalyzer, **options: Any) -> tuple[Identity, Tensor, str]:
    settings = {"name": "x", "pick": "largest", "on_missing": "stop"} | options
    batches = {f"photo_{i}": photo[None] for i, photo in enumerate(photos)}
    with torch.inference_mode():
        return EncodeIdentity.execute(batches, face_analyzer=analyzer, **settings).args


def number_inputs(*identities: Identity) -> dict[str, Identity]:
    return {f"identity_{i}": one for i, one in enumerate(identities)}


def get_vectors(identity: Identity) -> Tensor:
    (vectors,) = identity.embeddings.values()
    return vectors


@pytest.fixture(scope="session")
def encoded(free_analyzer: FaceAnalyzer) -> Encoded:
    """Identity and report of each person, from three photos."""
    people: Encoded = {}
    for person in PEOPLE:
        photos = (load_photo(person, kind) for kind in PHOTOS)
        identity, _, report = encode_photos(*photos, analyzer=free_analyzer, name=person)
        people[person] = identity, report
    return people


def test_the_folder_is_loaded_by_the_node(
    free_pack: Path, folder: Path, encoded: Encoded, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "insightface" / "models").mkdir()
    (folder / "insightface" / "models" / "free").symlink_to(free_pack)
    assert LoadFaceAnalyzer.INPUT_TYPES()["required"]["model_pack"][1]["options"] == ["free"]
    analyzer, report = LoadFaceAnalyzer.execute("free", "auto").args
    assert "detector MTCNN of facenet-pytorch, recognizer fr_feature.onnx (arcface.free)" in report
    (key,) = encoded["P001"][0].embeddings
    assert key == analyzer.feature.format_encoder_id(analyzer.sha256)


def test_vectors_are_those_of_insightface(free_pack: Path, free_analyzer: FaceAnalyzer) -> None:
    from insightface.model_zoo import get_model
    from insightface.utils import face_align

    model = get_model(str(free_pack / "fr_feature.onnx"), providers=["CPUExecutionProvider"])
    photo = alignment.convert_to_uint8(load_photo("P001", PORTRAIT))
    (face,) = free_analyzer.detect(photo, 640)
    crop = face_align.norm_crop(photo.flip(-1).contiguous().numpy(), face.kps.numpy(), 112)
    expected = torch.from_numpy(model.get_feat(crop).flatten())
    assert torch.cosine_similarity(free_analyzer.embed(photo, face), expected, dim=0) > 0.999


def test_photos_of_a_person_agree_and_people_differ(encoded: Encoded) -> None:
    for identity, report in encoded.values():
        assert len(identity) == len(PHOTOS) and compute_cosine_matrix(get_vectors(identity)).min() > 0.5
        assert "no outliers" in report and report.count("selected face") == len(PHOTOS)
    means = torch.stack([get_vectors(identity).mean(0) for identity, _ in encoded.values()])
    others = compute_cosine_matrix(means)[~torch.eye(len(PEOPLE), dtype=torch.bool)]
    assert others.median() < SAME_PERSON_COSINE


def test_people_who_smile_at_the_camera_are_not_turned_away(encoded: Encoded) -> None:
    for _, report in encoded.values():
        assert "turned away" not in report
        assert all(abs(int(pitch)) <= 20 for pitch in re.findall(r"pitch (-?\d+)", report)[:2])


def test_a_picked_face_is_the_right_person(free_analyzer: FaceAnalyzer, encoded: Encoded) -> None:
    for left, right in itertools.pairwise(PEOPLE[:4]):
        couple = real_people.put_side_by_side(load_photo(left, PORTRAIT), load_photo(right, PORTRAIT))
        for pick, options, person in (
            ("leftmost", {}, left),
            ("rightmost", {}, right),
            ("nth", {"nth": 2}, right),
            ("most alike", {"like": encoded[left][0]}, left),
            ("most alike", {"like": encoded[right][0]}, right),
        ):
            vector = get_vectors(encode_photos(couple, analyzer=free_analyzer, pick=pick, **options)[0])[0]
            portrait = get_vectors(encoded[person][0])[0]
            assert torch.cosine_similarity(vector, portrait, dim=0) > 0.8, (pick, person)


def test_photos_without_a_face_stop_or_are_skipped(free_analyzer: FaceAnalyzer) -> None:
    figure = load_photo("P001", FIGURE)
    feet = figure[-figure.shape[0] // 4 :]
    with pytest.raises(ValueError, match="got no face in photo 2 .*640, 512"):
        encode_photos(figure, feet, analyzer=free_analyzer)
    identity, _, report = encode_photos(feet, figure, analyzer=free_analyzer, on_missing="skip")
    assert len(identity) == 1 and "skipped: no face in photo 1" in report


@pytest.mark.parametrize("person", PEOPLE[:3])
def test_key_points_of_a_face_that_fills_the_photo(free_analyzer: FaceAnalyzer, person: str) -> None:
    portrait = load_photo(person, PORTRAIT)
    (face,) = free_analyzer.detect(alignment.convert_to_uint8(portrait), 640)
    x0, y0, x1, y1 = face.box.int().tolist()
    (found,) = detection.find_faces(portrait[y0:y1, x0:x1], free_analyzer.detect).faces
    assert (found.kps + torch.tensor([x0, y0]) - face.kps).norm(dim=1).max() < 0.03 * face.size


def test_merged_photos_are_nearest_to_their_person(free_analyzer: FaceAnalyzer, encoded: Encoded) -> None:
    others = [load_photo(person, STREET) for person in PEOPLE[:3]]
    unseen = get_vectors(encode_photos(*others, analyzer=free_analyzer)[0])
    for method in merge.MERGE_METHODS:
        merged = [
            identity_nodes.MergeIdentities.execute(number_inputs(identity), method).args[0]
            for identity, _ in encoded.values()
        ]
        units = torch.stack([get_unit_embedding(identity, free_analyzer) for identity in merged])
        cosines = torch.nn.functional.normalize(unseen.double()) @ units.T
        assert cosines.argmax(1).tolist() == [0, 1, 2] and cosines.amax(1).min() > 0.55, method


def test_a_stranger_among_the_photos_is_named(encoded: Encoded) -> None:
    named = 0
    pairs = list(itertools.permutations(PEOPLE, 2))
    for person, stranger in pairs:
        vectors = torch.cat((get_vectors(encoded[person][0]), get_vectors(encoded[stranger][0])[:1]))
        outliers = find_outliers(vectors)
        assert outliers in ([], [len(PHOTOS)]), (person, stranger)  # nobody is named wrongly
        named += bool(outliers)
    assert named > 0.8 * len(pairs)


def test_all_expressions_of_a_sheet_are_measured(free_analyzer: FaceAnalyzer, encoded: Encoded) -> None:
    person, other = PEOPLE[:2]
    sheet = load_photo(person, real_people.EXPRESSIONS)[None]
    with torch.inference_mode():
        best, annotated, report = MeasureLikeness.execute(sheet, encoded[person][0], free_analyzer).args
        other_report = MeasureLikeness.execute(sheet, encoded[other][0], free_analyzer).args[2]
    own, strange = (torch.tensor([float(x) for x in re.findall(r"-?\d\.\d+", text)]) for text in (report, other_report))
    assert len(own) == 16 and annotated.shape == sheet.shape and best == pytest.approx(float(own.max()), abs=1e-3)
    assert own.median() > 0.6 and own.min() > 0.3
    assert (own > strange).all()


def test_people_are_placed_at_their_faces(free_analyzer: FaceAnalyzer, encoded: Encoded) -> None:
    left, right = PEOPLE[5], PEOPLE[6]
    layout = real_people.put_side_by_side(load_photo(left, PORTRAIT), load_photo(right, PORTRAIT))
    identities = number_inputs(encoded[left][0], encoded[right][0])
    with torch.inference_mode():
        people, _ = PeopleFromPhoto.execute(layout[None], free_analyzer, identities, 1.6, 0, "exclusive").args
    assert [person.identity.name for person in people] == [left, right]
    faces = detection.find_faces(layout, free_analyzer.detect).faces
    for person, face in zip(people, faces, strict=True):
        assert person.mask is not None
        mask = person.mask[0]
        x, y = face.kps.mean(0).round().int().tolist()
        height, width = layout.shape[:2]
        assert mask[y * mask.shape[0] // height, x * mask.shape[1] // width] == 1
    assert all(coverage.max() == 1 for coverage in (compute_coverage(person.mask, 64, 128) for person in people))


def test_a_saved_person_is_the_same(free_analyzer: FaceAnalyzer, encoded: Encoded, folder: Path) -> None:
    identity, _ = encoded[PEOPLE[7]]
    identity_nodes.SaveIdentity.execute(identity, PEOPLE[7], True)
    folder_paths.filename_list_cache.clear()
    loaded = identity_nodes.LoadIdentity.execute(f"{PEOPLE[7]}.safetensors").args[0]
    assert loaded.embeddings.keys() == identity.embeddings.keys() and loaded.hashes == identity.hashes
    assert torch.equal(get_vectors(loaded), get_vectors(identity)) and torch.equal(loaded.crop, identity.crop)
    street = load_photo(PEOPLE[7], STREET)[None]
    with torch.inference_mode():
        similarities = [MeasureLikeness.execute(street, one, free_analyzer).args[0] for one in (identity, loaded)]
    assert similarities[0] == similarities[1] > 0.5


def test_faces_in_profile_are_turned_away(free_analyzer: FaceAnalyzer) -> None:
    front, profile = 0, 0
    for person in PEOPLE[:3]:
        views = load_photo(person, real_people.VIEWS)
        upper = views[: views.shape[0] // 2]
        for face in detection.find_faces(upper, free_analyzer.detect).faces:
            yaw = abs(quality.estimate_pose(face)[0])
            front, profile = front + (yaw < 15), profile + (yaw > quality.MAX_FRONTAL_ANGLE)
    assert front >= 3 and profile >= 4
