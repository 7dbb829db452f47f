"""What artists connect to the IMAGE and MASK inputs of every node: nothing, gray images, alpha, black frames."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfyui_likeness.likeness.attention import regions
from comfyui_likeness.likeness.spec import Identity, Person
from comfyui_likeness.nodes import registry
from comfyui_likeness.nodes.encode import EncodeIdentity
from comfyui_likeness.nodes.evaluate import CompareImages, EvaluateIdentity
from comfyui_likeness.nodes.loaders import files
from comfyui_likeness.nodes.loaders.face_analyzer import FaceAnalyzer
from comfyui_likeness.nodes.measure import FaceKeyPoints, MeasureLikeness
from comfyui_likeness.nodes.people import MakePerson, PeopleFromPhoto, PreviewPeople
from support.flashface_models import apply_flashface, load_flashface, make_face_latents, make_flashface_identity
from support.fused_kv import apply_fused_kv, make_fused_kv_adapter, make_fused_kv_identity, make_stripe_masks
from support.host_models import all_close, make_small_model, sample_latent
from support.infinite_id_adapters import apply_infinite_id, make_infinite_id_adapter, make_infinite_id_identity
from support.ip_adapters import apply_ip_adapter, make_ip_adapter, make_ip_adapter_identity
from support.photos import load_portrait
from torch import Tensor


def encode_photo(photo: Tensor, analyzer: FaceAnalyzer) -> Identity:
    return EncodeIdentity.execute(
        photos={"photo_0": photo}, name="Eileen", pick="largest", on_missing="stop", face_analyzer=analyzer
    ).args[0]


RunNode = Callable[[Tensor, Identity, FaceAnalyzer], Any]
REFERENCE = load_portrait()[None]
# Node id, or with the second input of images -> the node run on images [n, H, W, C], and a tensor of its result.
IMAGE_INPUTS: dict[str, RunNode] = {
    "LikenessEncodeIdentity": lambda image, one, analyzer: encode_photo(image, analyzer).crop,
    "LikenessMeasure": lambda image, one, analyzer: MeasureLikeness.execute(image, one, analyzer).args[1],
    "LikenessFaceKeyPoints": lambda image, one, analyzer: FaceKeyPoints.execute(
        image, analyzer, 256, 256, "largest"
    ).args[0],
    "LikenessPeopleFromPhoto": lambda image, one, analyzer: PeopleFromPhoto.execute(
        image, analyzer, {"identity_0": one}, 1.6, 0, "exclusive"
    ).args[1],
    "LikenessCompare": lambda image, one, analyzer: CompareImages.execute(image, image).args[0],
    "LikenessCompare reference": lambda image, one, analyzer: CompareImages.execute(REFERENCE, image).args[0],
    "LikenessEvaluate": lambda image, one, analyzer: EvaluateIdentity.execute(image, one, analyzer).args[0],
    "LikenessEvaluate target": lambda image, one, analyzer: EvaluateIdentity.execute(
        REFERENCE, one, analyzer, target=image
    ).args[1],
}


@pytest.fixture
def identity(analyzer: FaceAnalyzer) -> Identity:
    return encode_photo(REFERENCE, analyzer)


def test_every_image_input_is_listed() -> None:
    files.register_model_folders()
    inputs = [
        f"{node.GET_SCHEMA().node_id} {name}"
        for node in registry.NODES
        for kind in ("required", "optional")
        for name, options in node.INPUT_TYPES().get(kind, {}).items()
        if options[0] == "IMAGE"
    ]
    listed = {name if " " in name else f"{name} image" for name in IMAGE_INPUTS} - {"LikenessEncodeIdentity image"}
    assert set(inputs) == listed  # Encode Identity's inputs grow, and are of another type


@pytest.mark.parametrize("name", IMAGE_INPUTS)
def test_an_image_input_takes_any_number_of_channels(identity: Identity, analyzer: FaceAnalyzer, name: str) -> None:
    run, rgb = IMAGE_INPUTS[name], REFERENCE
    gray, alpha = rgb.mean(-1, keepdim=True), torch.rand(*rgb.shape[:3], 1)
    expected = run(gray.expand(-1, -1, -1, 3), identity, analyzer)
    for image in (gray, torch.cat((gray, alpha), -1)):
        assert torch.equal(torch.as_tensor(run(image, identity, analyzer)), torch.as_tensor(expected))
    opaque, transparent = (run(image, identity, analyzer) for image in (rgb, torch.cat((rgb, alpha), -1)))
    assert torch.equal(torch.as_tensor(opaque), torch.as_tensor(transparent))


@pytest.mark.parametrize("name", IMAGE_INPUTS)
def test_an_image_input_refuses_nothing(identity: Identity, analyzer: FaceAnalyzer, name: str) -> None:
    for image, message in (
        (REFERENCE[:0], "connect at least one image: got an empty batch; expected 1 or more"),
        (REFERENCE[..., :0], r"got a tensor of shape \[1, \d+, \d+, 0\]"),
        (REFERENCE[0], r"expected \[images, height, width, channels\]"),
        (REFERENCE[:, :0], "got a photo of 512x0 pixels"),
    ):
        with pytest.raises(ValueError, match=message):
            IMAGE_INPUTS[name](image, identity, analyzer)


def test_one_of_several_batches_may_be_empty(analyzer: FaceAnalyzer) -> None:
    photos = {"photo_0": REFERENCE[:0], "photo_1": REFERENCE, "photo_2": None}
    settings: dict[str, Any] = {"name": "Eileen", "pick": "largest", "on_missing": "stop", "face_analyzer": analyzer}
    assert len(EncodeIdentity.execute(photos=photos, **settings).args[0]) == 1


EMPTY_MASKS = [torch.zeros(0, 8, 8), torch.zeros(0), torch.zeros(1, 0, 8), torch.zeros(1, 1, 8, 8)]


@pytest.mark.parametrize("mask", EMPTY_MASKS, ids=lambda mask: str(list(mask.shape)))
def test_every_mask_input_refuses_nothing(mask: Tensor) -> None:
    with pytest.raises(ValueError, match=r"connect a MASK: got a mask of shape .* for 'person 1'"):
        MakePerson.execute(make_fused_kv_identity(1), 1.0, mask)
    with pytest.raises(ValueError, match=r"connect a MASK: got a mask of shape .* for the face position"):
        apply_flashface(*load_flashface(), face_position=mask)


def make_half_absent_mask() -> Tensor:
    """For two images: the left half of the first, and nothing of the second."""
    left, _ = make_stripe_masks()
    return torch.cat((left, torch.zeros_like(left)))


def test_a_mask_may_be_black_for_some_images() -> None:
    mask = make_half_absent_mask()
    people = MakePerson.execute(make_fused_kv_identity(1), 1.0, mask).args[0]
    assert torch.equal(people[0].mask, mask) and regions.find_absent_images(mask) == [1]
    assert "absent from image 2 of 2, where the mask is black" in PreviewPeople.execute(people, 64, 64).args[1]
    assert "too small" not in PreviewPeople.execute(people, 64, 64).args[1]
    with pytest.raises(ValueError, match="got a black mask for all 2 images"):
        MakePerson.execute(make_fused_kv_identity(1), 1.0, torch.zeros_like(mask))


def apply_people(method: str, base: ModelPatcher, mask: Tensor | None, seed: int = 1) -> ModelPatcher:
    if method == "decoupled":
        adapter = make_ip_adapter()
        return apply_ip_adapter(base, adapter, (Person(make_ip_adapter_identity(adapter, seed=seed), mask),))
    if method == "reference":
        model, net = load_flashface()
        person = Person(make_flashface_identity(1, seed), mask)
        return apply_flashface(model, net, make_face_latents(1, seed), identity=(person,), rescale=0.0)
    if method == "mixed":
        person = Person(make_infinite_id_identity(seed), mask)
        return apply_infinite_id(base, make_infinite_id_adapter(), (person,))
    outside = method.removeprefix("fused ")
    return apply_fused_kv(base, make_fused_kv_adapter(), (Person(make_fused_kv_identity(seed), mask),), outside=outside)


@pytest.mark.parametrize("method", ["decoupled", "fused all", "fused none", "reference", "mixed"])
def test_a_person_is_absent_where_the_mask_is_black(method: str) -> None:
    """The image with a black mask does not depend on the person, the other is as with a mask for all images."""
    base, mask = make_small_model(), make_half_absent_mask()
    one, other, everywhere = (
        sample_latent(apply_people(method, base, region, seed), batch_size=2)
        for region, seed in ((mask, 1), (mask, 2), (mask[:1], 1))
    )
    assert all_close(one[1], other[1]) and not all_close(one[0], other[0], 1e-4)
    assert all_close(one[0], everywhere[0]) and not all_close(one[1], everywhere[1], 1e-4)
    if method != "mixed":  # whose self-attention reads the text stream, with or without a person
        plain = load_flashface()[0] if method == "reference" else base
        assert all_close(one[1], sample_latent(plain, batch_size=2)[1])


def test_absence_leaves_the_other_people_alone() -> None:
    base, adapter, mask = make_small_model(), make_fused_kv_adapter(), make_half_absent_mask()
    _, right = make_stripe_masks()
    absent, present = Person(make_fused_kv_identity(1), mask), Person(make_fused_kv_identity(2), right)
    for outside in ("all", "none"):
        both, alone = (
            sample_latent(apply_fused_kv(base, adapter, people, outside=outside), batch_size=2)
            for people in ((absent, present), (present,))
        )
        assert all_close(both[1], alone[1]) and not all_close(both[0], alone[0], 1e-4)


def test_no_query_sees_an_absent_person() -> None:
    mask, (_, right) = make_half_absent_mask(), make_stripe_masks()
    inside = regions.find_inside_queries(mask, 8, 8)
    assert inside[0].sum() == 32 and not inside[1].any()
    absent, present = regions.compute_visible_queries([mask, right], 8, 8)
    assert absent[0].sum() == 32 and not absent[1].any()
    assert torch.equal(regions.repeat_for_images(present, 2)[1], torch.ones(64, dtype=torch.bool))
    assert not regions.is_region_too_small(mask, 8, 8)
