"""Load Omni-ID Encoder, Encode Identity with it, and Omni-ID Attention Map, on real files and faces."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.model_management
import pytest
import torch
from comfyui_likeness.likeness.faces import alignment, drawing
from comfyui_likeness.likeness.identity import identity_file
from comfyui_likeness.likeness.methods import omni_id
from comfyui_likeness.likeness.spec import Identity
from comfyui_likeness.nodes import attention_map
from comfyui_likeness.nodes.attention_map import OmniIDAttentionMap
from comfyui_likeness.nodes.encode import EncodeIdentity
from comfyui_likeness.nodes.identity import MergeIdentities
from comfyui_likeness.nodes.loaders import adapter_loader, omni_id_loader
from comfyui_likeness.nodes.loaders.face_analyzer import FaceAnalyzer
from comfyui_likeness.nodes.loaders.omni_id_loader import LoadOmniID, OmniIDEncoder
from comfyui_likeness.tools.standins import build
from safetensors.torch import save_file
from support import flux_adapters, omni_id_encoders, vision_towers
from support.golden import assert_close
from support.host_models import all_close, make_small_model, sample_latent
from support.ip_adapters import make_ip_adapter_tensors
from support.photos import load_portrait, make_couple_photo, make_stranger_photo
from test_adapter_loader import mutate_bytes
from torch import Tensor

FILE = "omni.safetensors"


@pytest.fixture
def file(folder: Path) -> Path:
    return omni_id_encoders.write_encoder_file(folder / "likeness" / FILE)


@pytest.fixture
def omni(file: Path) -> OmniIDEncoder:
    return LoadOmniID.execute(file.name).args[0]


def encode_photos(*photos: Tensor, **options: Any) -> tuple[Identity, Tensor, str]:
    settings: dict[str, Any] = {"name": "Eileen", "pick": "largest", "on_missing": "stop"} | options
    with torch.inference_mode():
        return EncodeIdentity.execute(
            photos={f"photo_{i}": photo[None] for i, photo in enumerate(photos)}, **settings
        ).args


def get_tokens(identity: Identity) -> Tensor:
    key = identity.find_joint_embedding(omni_id.OMNI_ID_FEATURE)
    assert key is not None
    return identity.joint_embeddings[key]


@torch.inference_mode()
def test_comfyui_and_torch_attention_agree(omni: OmniIDEncoder, file: Path) -> None:
    assert omni.spec == omni_id_encoders.SMALL_SPEC and omni.file == FILE
    assert omni.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    plain, images = omni_id_encoders.make_omni_id_encoder(), omni_id_encoders.make_face_images(11)
    for weight in ([1.0] * 11, [1.0, 3.0] * 5 + [0.2]):
        assert_close(omni.encode(images, weight), omni_id_encoders.encode_face_images(plain, images, weight))
        assert_close(
            omni.compute_attention_maps(images, weight),
            plain.compute_attention_maps([omni_id.normalize_images(images)], weight),
        )
    assert omni.patcher.model_size() > 0 and not any(w.requires_grad for w in omni.patcher.model.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_files_in_half_precision_are_read(folder: Path, dtype: torch.dtype) -> None:
    half = {key: value.to(dtype) for key, value in omni_id_encoders.make_encoder_tensors().items()}
    save_file(half, folder / "likeness" / FILE, omni_id.make_omni_id_metadata(omni_id_encoders.SMALL_SPEC))
    images = omni_id_encoders.make_face_images(3)
    with torch.inference_mode():
        output = omni_id_loader.load_omni_id_encoder(FILE).encode(images, [1.0] * 3)
    single = omni_id_encoders.make_omni_id_encoder(state_dict={key: value.float() for key, value in half.items()})
    assert_close(output, omni_id_encoders.encode_face_images(single, images))


@torch.inference_mode()
def test_half_precision_is_kept_on_devices_with_fp16(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    half = {key: value.half() for key, value in omni_id_encoders.make_encoder_tensors().items()}
    save_file(half, folder / "likeness" / FILE, omni_id.make_omni_id_metadata(omni_id_encoders.SMALL_SPEC))
    monkeypatch.setattr(comfy.model_management, "should_use_fp16", lambda *_, **__: True)
    omni, images = omni_id_loader.load_omni_id_encoder(FILE), omni_id_encoders.make_face_images(3)
    assert {weight.dtype for weight in omni.patcher.model.parameters()} == {torch.float16}
    expected = omni_id_encoders.encode_face_images(omni_id_encoders.make_omni_id_encoder(), images)
    assert_close(omni.encode(images, [1.0] * 3), expected, 1e-2)


def test_a_face_analyzer_and_the_encoder_are_enough(analyzer: FaceAnalyzer, omni: OmniIDEncoder) -> None:
    identity, _, report = encode_photos(load_portrait(), make_stranger_photo(), face_analyzer=analyzer, omni_id=omni)
    key = f"omni_id.tokens.face224-{omni.sha256[:8]}"
    assert list(identity.joint_embeddings) == [key] and identity.hashes[key] == omni.sha256 and key in report
    assert get_tokens(identity).shape == (1, omni_id_encoders.SMALL_SPEC.tokens, omni_id_encoders.SMALL_SPEC.width)
    assert get_tokens(identity).dtype == torch.float16
    crops = [
        alignment.align_face(p, analyzer.detect(alignment.convert_to_uint8(p), 640)[0].kps, 112)
        for p in (load_portrait(), make_stranger_photo())
    ]
    with torch.inference_mode():
        assert_close(get_tokens(identity), omni.encode(torch.stack(crops), [1.0, 1.0]), 1e-3)
    assert not encode_photos(load_portrait(), face_analyzer=analyzer)[0].joint_embeddings


def test_order_and_repetition_of_photos_do_not_matter(analyzer: FaceAnalyzer, omni: OmniIDEncoder) -> None:
    options = {"face_analyzer": analyzer, "omni_id": omni}
    expected = get_tokens(encode_photos(load_portrait(), make_stranger_photo(), **options)[0])
    twice, report = encode_photos(load_portrait(), make_stranger_photo(), load_portrait(), **options)[::2]
    assert len(twice) == 3 and torch.equal(get_tokens(twice), expected) and "photo 3" in report
    assert_close(get_tokens(encode_photos(make_stranger_photo(), load_portrait(), **options)[0]), expected, 1e-3)
    assert not torch.allclose(get_tokens(encode_photos(load_portrait(), **options)[0]), expected, atol=1e-2)


def test_only_photos_need_a_face_analyzer(omni: OmniIDEncoder) -> None:
    crop = load_portrait()[60:172, 168:280]
    identity, _, _ = encode_photos(crop, pick="whole photo", omni_id=omni)
    aligned = alignment.align_face(crop, alignment.make_whole_photo_face(crop).kps, 112)
    with torch.inference_mode():
        assert_close(get_tokens(identity), omni.encode(aligned[None], [1.0]), 1e-3)
    assert not identity.embeddings
    vision = vision_towers.convert_to_clip_vision(vision_towers.make_open_clip_tower())
    for others in ({}, {"image_encoder": vision}):
        with pytest.raises(
            ValueError, match="without a face analyzer to detect the faces; connect a face analyzer, or set"
        ):
            encode_photos(load_portrait(), omni_id=omni, **others)


def test_a_saved_identity_needs_no_photos(analyzer: FaceAnalyzer, omni: OmniIDEncoder, tmp_path: Path) -> None:
    identity = encode_photos(load_portrait(), make_stranger_photo(), face_analyzer=analyzer, omni_id=omni)[0]
    identity_file.save_identity(identity, tmp_path / "a.safetensors", include_crops=False)
    loaded = identity_file.load_identity(tmp_path / "a.safetensors")
    assert (
        loaded.crop is None
        and torch.equal(get_tokens(loaded), get_tokens(identity))
        and loaded.hashes == identity.hashes
    )


@pytest.mark.skipif(
    not flux_adapters.HOST_PASSES_QUERIES, reason="this ComfyUI does not pass FLUX's queries to patches"
)
def test_flux_with_the_tokens_of_a_saved_identity(analyzer: FaceAnalyzer, folder: Path, tmp_path: Path) -> None:
    spec = replace(omni_id_encoders.SMALL_SPEC, tokens=6, width=flux_adapters.TOKEN_WIDTH, heads=6)
    omni, base = (
        omni_id_loader.load_omni_id_encoder(
            omni_id_encoders.write_encoder_file(folder / "likeness" / "flux.safetensors", spec).name
        ),
        make_small_model(flux_adapters.FLUX_FAMILY),
    )

    def generate(*photos: Tensor) -> Tensor:
        identity = encode_photos(*photos, face_analyzer=analyzer, omni_id=omni)[0]
        identity_file.save_identity(identity, tmp_path / "a.safetensors", include_crops=False)
        model = flux_adapters.apply_flux_adapter(
            base, identity_or_people=identity_file.load_identity(tmp_path / "a.safetensors")
        )
        return sample_latent(model, flux_adapters.FLUX_FAMILY, cfg=1.0, scheduler="simple")

    both_photos = generate(load_portrait(), make_stranger_photo())
    assert all_close(generate(make_stranger_photo(), load_portrait(), make_stranger_photo()), both_photos, 1e-3)
    for other in (
        generate(load_portrait()),
        sample_latent(base, flux_adapters.FLUX_FAMILY, cfg=1.0, scheduler="simple"),
    ):
        assert not all_close(other, both_photos, 1e-2)


def test_merge_can_encode_all_stored_faces_jointly(analyzer: FaceAnalyzer, omni: OmniIDEncoder) -> None:
    with_tokens, without_tokens = (
        encode_photos(p, face_analyzer=analyzer, omni_id=e)[0]
        for p, e in ((load_portrait(), omni), (make_stranger_photo(), None))
    )
    people: Any = {"identity_0": with_tokens, "identity_1": replace(without_tokens, weight=torch.tensor([2.0]))}
    averaged = MergeIdentities.execute(people, "mean").args
    assert not averaged[0].joint_embeddings and "lacks it" in averaged[1]
    with torch.inference_mode():
        for method in ("mean", "concatenate"):
            merged, report = MergeIdentities.execute(people, method, omni).args
            assert "Averaged" not in report and merged.hashes.keys() == {*merged.embeddings, *merged.joint_embeddings}
            crops = [
                alignment.align_face(identity.crop[0].float() / 255, identity.kps[0], 112)
                for identity in (with_tokens, without_tokens)
            ]
            assert_close(get_tokens(merged), omni.encode(torch.stack(crops), [1.0, 2.0]), 1e-3)
        # The stored head crops are nearly as good as the photos.
        again = MergeIdentities.execute({"identity_0": with_tokens}, "mean", omni).args[0]
    assert (
        torch.cosine_similarity(get_tokens(again).flatten().float(), get_tokens(with_tokens).flatten().float(), dim=0)
        > 0.98
    )
    with pytest.raises(ValueError, match="without face crops"):
        MergeIdentities.execute({**people, "identity_1": replace(without_tokens, crop=None)}, "mean", omni)


def test_an_interrupt_stops_between_chunks_and_leaves_no_trace(omni: OmniIDEncoder) -> None:
    images = omni_id_encoders.make_face_images(20)
    before = omni.encode(images, [1.0] * 20)
    trunk, chunk_sizes = omni.patcher.model.trunk, list[int]()

    def interrupt(_module: Any, args: Any, _output: Any) -> None:
        chunk_sizes.append(len(args[0]))
        comfy.model_management.interrupt_current_processing()

    hook = trunk.conv1.register_forward_hook(interrupt)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        omni.encode(images, [1.0] * 20)
    hook.remove()
    assert chunk_sizes == [omni_id.PHOTOS_PER_CHUNK]
    assert torch.equal(omni.encode(images, [1.0] * 20), before)


def drop_key(key: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda weights: {name: value for name, value in weights.items() if name != key}


DAMAGES: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], dict[str, Any], str]] = {
    "trunk heads": (dict, {"trunk_heads": 3}, "3 for 64 in its trunk; expected .* heads that divide the channels"),
    "newer": (dict, {"version": 2}, "of version 2; this pack reads up to version 1; update the pack"),
    "other kind": (dict, {"kind": "fused_kv"}, "an identity adapter; expected an Omni-ID encoder"),
    "nan": (lambda w: w | {"norm.bias": torch.full((160,), torch.nan)}, {}, "norm.bias holds NaN"),
    "missing": (drop_key("self.1.q.weight"), {}, "misses self.1.q.weight"),
    "no trunk": (drop_key("trunk.conv1.weight"), {}, "incomplete or misshapen"),
    "half a trunk": (
        drop_key("trunk.proj"),
        {},
        "which misses 'proj'; expected an Omni-ID encoder with its complete trunk",
    ),
    "unknown": (lambda w: w | {"trunk.attn_pool.query": torch.ones(2)}, {}, "has unknown trunk.attn_pool.query"),
    "misshapen": (lambda w: w | {"queries": torch.ones(1, 24, 320)}, {}, "has misshapen"),
}


@pytest.mark.parametrize("how", DAMAGES)
def test_incomplete_files_are_refused(folder: Path, how: str) -> None:
    change, metadata_changes, message = DAMAGES[how]
    metadata = {"likeness": json.dumps(omni_id_encoders.make_encoder_metadata(**metadata_changes))}
    save_file(change(omni_id_encoders.make_encoder_tensors()), folder / "likeness" / FILE, metadata)
    with pytest.raises(ValueError, match=f"got {FILE}.*{message}"):
        omni_id_loader.load_omni_id_encoder(FILE)


def test_foreign_and_damaged_files_are_refused(file: Path) -> None:
    data = file.read_bytes()
    save_file(make_ip_adapter_tensors("image"), file.with_name("ip-adapter.safetensors"))
    save_file(
        vision_towers.make_open_clip_checkpoint(vision_towers.make_open_clip_tower()),
        file.with_name("clip.safetensors"),
    )
    torch.save({"ref_encoder.0.weight": torch.zeros(4, 4)}, file.with_name("flashface.ckpt"))
    save_file({"norm.weight": torch.zeros(4)}, file.with_name("other.safetensors"))
    for name, title in (
        ("ip-adapter.safetensors", "an identity adapter"),
        ("clip.safetensors", "an image encoder"),
        ("flashface.ckpt", "a FlashFace file"),
        ("other.safetensors", "which is not in this pack's format"),
    ):
        with pytest.raises(ValueError, match=f"got {name}, {title}; expected an Omni-ID encoder"):
            omni_id_loader.load_omni_id_encoder(name)
    for name, content, message in (
        ("cut.safetensors", data[: len(data) // 2], "cannot be read.*cut short"),
        ("empty.safetensors", b"", "an empty file"),
        ("page.safetensors", b"<!DOCTYPE html>", "a web page"),
    ):
        file.with_name(name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            omni_id_loader.load_omni_id_encoder(name)
    with pytest.raises(ValueError, match="could not find"):
        omni_id_loader.load_omni_id_encoder("gone.safetensors")


def change_header(data: bytes, rng: random.Random) -> bytes:
    """Change the shape of a tensor, and sometimes a metadata value, in the header. The tensor data stay."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    entry = header[rng.choice([key for key in header if key != "__metadata__"])]
    count = torch.Size(entry["shape"]).numel()
    entry["shape"] = rng.choice([entry["shape"][::-1], [count], [1, count], [count, 1], [count, 1, 1, 1]])
    if rng.random() < 0.5:
        metadata = omni_id_encoders.make_encoder_metadata()
        metadata[rng.choice(list(metadata))] = rng.choice([-1, 0, 1, 2, 5, 112, 336, 3.5, None, "x", [], True])
        header["__metadata__"]["likeness"] = json.dumps(metadata)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def test_damaged_files_raise_or_load_completely(file: Path) -> None:
    data, rng, refused = file.read_bytes(), random.Random(7), 0
    names = omni_id_loader.load_omni_id_encoder(file.name).patcher.model.state_dict().keys()
    for number in range(200):
        file.write_bytes((change_header, mutate_bytes)[number % 2](data, rng))
        try:
            loaded = omni_id_loader.load_omni_id_encoder(file.name)
        except ValueError as error:
            refused += 1
            assert "expected" in str(error) or "update the pack" in str(error), error
            continue
        assert loaded.patcher.model.state_dict().keys() == names
    assert 100 < refused < 200


def test_load_identity_adapter_refuses_omni_id_encoders(file: Path) -> None:
    with pytest.raises(ValueError, match=f"got {FILE}, an Omni-ID encoder; expected an identity adapter"):
        adapter_loader.load_adapter_file(file.name)


def test_changed_files_are_loaded_again(file: Path) -> None:
    assert LoadOmniID.INPUT_TYPES()["required"]["file"][1]["options"] == [FILE]
    assert LoadOmniID.RETURN_TYPES == ["LIKENESS_OMNI_ID"]
    before = LoadOmniID.fingerprint_inputs(file.name)
    omni_id_encoders.write_encoder_file(file, seed=1, notes={"trained": "a little more"})
    assert LoadOmniID.fingerprint_inputs(file.name) != before


@pytest.fixture
def people(analyzer: FaceAnalyzer, omni: OmniIDEncoder) -> Identity:
    return encode_photos(
        load_portrait(), make_stranger_photo(), make_couple_photo(), face_analyzer=analyzer, omni_id=omni
    )[0]


def draw_map(omni: OmniIDEncoder, identity: Identity, query: int, **options: int) -> Tensor:
    with torch.inference_mode():
        return OmniIDAttentionMap.execute(omni, identity, query, **options).args[0]


def test_a_query_is_drawn_on_every_photo(omni: OmniIDEncoder, people: Identity) -> None:
    images = draw_map(omni, people, 5)
    assert images.shape == (3, 112, 112, 3) and 0 <= float(images.min()) and float(images.max()) <= 1
    crops = torch.stack(
        [alignment.align_face(c.float() / 255, k, 112) for c, k in zip(people.crop, people.kps, strict=True)]
    )
    with torch.inference_mode():
        assert torch.equal(images, drawing.overlay_heatmap(crops, omni.compute_attention_maps(crops, [1.0] * 3)[5]))
    assert not torch.equal(draw_map(omni, people, 6), images)
    # Faces of weight 0 are left out, and equal faces are drawn once.
    one = replace(people, weight=torch.tensor([0.0, 1.0, 0.0]))
    twice = replace(people, crop=people.crop[[0, 0, 1]], kps=people.kps[[0, 0, 1]])
    assert len(draw_map(omni, one, 5)) == 1 and len(draw_map(omni, twice, 5)) == 2


def test_contact_sheet_has_a_row_per_selective_query(omni: OmniIDEncoder, people: Identity) -> None:
    sheet = draw_map(omni, people, -1, count=24)
    assert sheet.shape == (1, 24 * 112, 3 * 112, 3)
    assert torch.equal(draw_map(omni, people, -1), sheet[:, : 8 * 112])
    with torch.inference_mode():
        maps = omni.compute_attention_maps(*omni_id.align_stored_faces([people], 112))
    order = omni_id.compute_selectivity(maps).argsort(descending=True, stable=True).tolist()
    rows = sheet[0].unflatten(0, (24, 112)).unflatten(2, (3, 112)).movedim(2, 1)  # [24, 3, 112, 112, 3]
    for row, query in zip(rows, order, strict=True):
        single = draw_map(omni, people, query)
        assert torch.equal(row[1:], single[1:]) and torch.equal(row[0], drawing.draw_label(single[0], str(query)))
    assert draw_map(omni, people, -1, count=64).shape == sheet.shape


def test_contact_sheet_has_at_most_16_columns(omni: OmniIDEncoder) -> None:
    images, maps = omni_id_encoders.make_face_images(20), torch.rand(24, 20, 4, 4)
    assert attention_map.draw_contact_sheet(images, maps, 2).shape == (1, 2 * 112, 16 * 112, 3)


def test_invalid_queries_and_identities_are_refused(omni: OmniIDEncoder, people: Identity) -> None:
    with pytest.raises(
        ValueError, match="got query 24 for an encoder with 24 queries; expected 0 to 23, or -1 for the contact sheet"
    ):
        draw_map(omni, people, 24)
    with pytest.raises(ValueError, match="without face crops"):
        draw_map(omni, replace(people, crop=None), 0)
    with pytest.raises(ValueError, match="only faces of weight 0"):
        draw_map(omni, replace(people, weight=torch.zeros(3)), 0)


@torch.inference_mode()
def test_the_stand_in_has_the_size_of_the_paper(folder: Path) -> None:
    name = "omni_id_vit_h.safetensors"
    target, make = build.STANDIN_FILES[name]
    save_file(make(), folder / target / name, {"likeness": json.dumps(build.FILE_METADATA[name])})
    omni = omni_id_loader.load_omni_id_encoder(name)
    spec = omni.spec
    assert (spec.tokens, spec.width, spec.heads, spec.states_per_photo) == (256, 1280, 20, 257)
    output = omni.encode(omni_id_encoders.make_face_images(2, size=224), [1.0, 1.0])
    assert output.shape == (1, 256, 1280) and float(output.std()) > 0.1 and float(output.std(1).mean()) > 0.01
