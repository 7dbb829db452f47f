"""Load Omni-ID Encoder, Encode Identity with it, Omni-ID Attention Map: on real files, faces and the host's classes."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.model_management
import fluxes
import omnis
import pytest
import torch
import towers
from adapters import tensors as adapter_tensors
from comfyui_likeness.likeness import draw, faces, identity_file, omni_id
from comfyui_likeness.likeness.spec import Identity
from comfyui_likeness.nodes import attention_map
from comfyui_likeness.nodes.attention_map import OmniIDAttentionMap
from comfyui_likeness.nodes.encode import EncodeIdentity
from comfyui_likeness.nodes.identity import MergeIdentities
from comfyui_likeness.nodes.loaders import adapter
from comfyui_likeness.nodes.loaders import omni_id as loader
from comfyui_likeness.nodes.loaders.face_analyzer import FaceAnalyzer
from comfyui_likeness.nodes.loaders.omni_id import LoadOmniID, OmniIDEncoder
from comfyui_likeness.tools import standins
from golden import assert_close
from models import close, patcher, sample
from portraits import couple, portrait, stranger
from safetensors.torch import save_file
from test_adapter_loader import mutated
from torch import Tensor

pytest_plugins = ["analyzers"]

FILE = "omni.safetensors"


@pytest.fixture
def file(folder: Path) -> Path:
    return omnis.write(folder / "likeness" / FILE)


@pytest.fixture
def omni(file: Path) -> OmniIDEncoder:
    return LoadOmniID.execute(file.name).args[0]


def run(*photos: Tensor, **options: Any) -> tuple[Identity, Tensor, str]:
    given: dict[str, Any] = {"name": "Eileen", "pick": "largest", "on_missing": "stop"} | options
    with torch.inference_mode():
        return EncodeIdentity.execute(
            photos={f"photo_{i}": photo[None] for i, photo in enumerate(photos)}, **given
        ).args


def tokens(identity: Identity) -> Tensor:
    key = identity.find_joint(omni_id.FEATURE)
    assert key is not None
    return identity.joint[key]


@torch.inference_mode()
def test_the_host_and_plain_torch_give_the_same(omni: OmniIDEncoder, file: Path) -> None:
    assert omni.spec == omnis.SPEC and omni.file == FILE
    assert omni.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    plain, pictures = omnis.encoder(), omnis.photos(11)
    for weight in ([1.0] * 11, [1.0, 3.0] * 5 + [0.2]):
        assert_close(omni.encode(pictures, weight), omnis.encoded(plain, pictures, weight))
        assert_close(omni.maps(pictures, weight), plain.maps([omni_id.normed(pictures)], weight))
    assert omni.patcher.model_size() > 0 and not any(w.requires_grad for w in omni.patcher.model.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_files_in_half_precision_are_read(folder: Path, dtype: torch.dtype) -> None:
    half = {key: value.to(dtype) for key, value in omnis.tensors().items()}
    save_file(half, folder / "likeness" / FILE, omni_id.metadata(omnis.SPEC))
    pictures = omnis.photos(3)
    with torch.inference_mode():
        made = loader.load(FILE).encode(pictures, [1.0] * 3)
    single = omnis.encoder(given={key: value.float() for key, value in half.items()})
    assert_close(made, omnis.encoded(single, pictures))


@torch.inference_mode()
def test_a_device_with_half_precision_keeps_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    half = {key: value.half() for key, value in omnis.tensors().items()}
    save_file(half, folder / "likeness" / FILE, omni_id.metadata(omnis.SPEC))
    monkeypatch.setattr(comfy.model_management, "should_use_fp16", lambda *_, **__: True)
    omni, pictures = loader.load(FILE), omnis.photos(3)
    assert {weight.dtype for weight in omni.patcher.model.parameters()} == {torch.float16}
    expected = omnis.encoded(omnis.encoder(), pictures)
    assert_close(omni.encode(pictures, [1.0] * 3), expected, 1e-2)


def test_a_face_analyzer_and_the_encoder_are_enough(analyzer: FaceAnalyzer, omni: OmniIDEncoder) -> None:
    identity, _, report = run(portrait(), stranger(), face_analyzer=analyzer, omni_id=omni)
    key = f"omni_id.tokens.face224-{omni.sha256[:8]}"
    assert list(identity.joint) == [key] and identity.hashes[key] == omni.sha256 and key in report
    assert tokens(identity).shape == (1, omnis.SPEC.tokens, omnis.SPEC.width)
    assert tokens(identity).dtype == torch.float16
    crops = [faces.align(p, analyzer.detect(faces.pixels(p), 640)[0].kps, 112) for p in (portrait(), stranger())]
    with torch.inference_mode():
        assert_close(tokens(identity), omni.encode(torch.stack(crops), [1.0, 1.0]), 1e-3)
    assert not run(portrait(), face_analyzer=analyzer)[0].joint


def test_photos_are_a_set(analyzer: FaceAnalyzer, omni: OmniIDEncoder) -> None:
    options = {"face_analyzer": analyzer, "omni_id": omni}
    made = tokens(run(portrait(), stranger(), **options)[0])
    twice, report = run(portrait(), stranger(), portrait(), **options)[::2]
    assert len(twice) == 3 and torch.equal(tokens(twice), made) and "photo 3" in report
    assert_close(tokens(run(stranger(), portrait(), **options)[0]), made, 1e-3)
    assert not torch.allclose(tokens(run(portrait(), **options)[0]), made, atol=1e-2)


def test_face_crops_need_no_analyzer_and_photos_do(omni: OmniIDEncoder) -> None:
    crop = portrait()[60:172, 168:280]
    identity, _, _ = run(crop, pick="whole photo", omni_id=omni)
    aligned = faces.align(crop, faces.whole(crop).kps, 112)
    with torch.inference_mode():
        assert_close(tokens(identity), omni.encode(aligned[None], [1.0]), 1e-3)
    assert not identity.embeddings
    vision = towers.twin(towers.open_clip())
    for others in ({}, {"image_encoder": vision}):
        with pytest.raises(ValueError, match="nothing that finds them; expected a face analyzer; connect one, or pick"):
            run(portrait(), omni_id=omni, **others)


def test_a_saved_identity_needs_no_photos(analyzer: FaceAnalyzer, omni: OmniIDEncoder, tmp_path: Path) -> None:
    identity = run(portrait(), stranger(), face_analyzer=analyzer, omni_id=omni)[0]
    identity_file.save(identity, tmp_path / "a.safetensors", include_crops=False)
    loaded = identity_file.load(tmp_path / "a.safetensors")
    assert loaded.crop is None and torch.equal(tokens(loaded), tokens(identity)) and loaded.hashes == identity.hashes


@pytest.mark.skipif(not fluxes.SHOWN, reason="the host shows FLUX's queries to no patch")
def test_the_tokens_of_a_saved_identity_paint(analyzer: FaceAnalyzer, folder: Path, tmp_path: Path) -> None:
    spec = replace(omnis.SPEC, tokens=6, width=fluxes.WIDTH, heads=6)
    omni, base = loader.load(omnis.write(folder / "likeness" / "flux.safetensors", spec).name), patcher(fluxes.FAMILY)

    def painted(*photos: Tensor) -> Tensor:
        identity = run(*photos, face_analyzer=analyzer, omni_id=omni)[0]
        identity_file.save(identity, tmp_path / "a.safetensors", include_crops=False)
        model = fluxes.applied(base, who=identity_file.load(tmp_path / "a.safetensors"))
        return sample(model, fluxes.FAMILY, cfg=1.0, scheduler="simple")

    both = painted(portrait(), stranger())
    assert close(painted(stranger(), portrait(), stranger()), both, 1e-3)
    for other in (painted(portrait()), sample(base, fluxes.FAMILY, cfg=1.0, scheduler="simple")):
        assert not close(other, both, 1e-2)


def test_a_merge_can_encode_all_stored_faces_together(analyzer: FaceAnalyzer, omni: OmniIDEncoder) -> None:
    known, plain = (run(p, face_analyzer=analyzer, omni_id=e)[0] for p, e in ((portrait(), omni), (stranger(), None)))
    people: Any = {"identity_0": known, "identity_1": replace(plain, weight=torch.tensor([2.0]))}
    averaged = MergeIdentities.execute(people, "mean").args
    assert not averaged[0].joint and "lacks it" in averaged[1]
    with torch.inference_mode():
        for method in ("mean", "concatenate"):
            merged, report = MergeIdentities.execute(people, method, omni).args
            assert "Averaged" not in report and merged.hashes.keys() == {*merged.embeddings, *merged.joint}
            crops = [faces.align(who.crop[0].float() / 255, who.kps[0], 112) for who in (known, plain)]
            assert_close(tokens(merged), omni.encode(torch.stack(crops), [1.0, 2.0]), 1e-3)
        # The stored heads show nearly what the photos do.
        again = MergeIdentities.execute({"identity_0": known}, "mean", omni).args[0]
    assert torch.cosine_similarity(tokens(again).flatten().float(), tokens(known).flatten().float(), dim=0) > 0.98
    with pytest.raises(ValueError, match="holds no face pictures"):
        MergeIdentities.execute({**people, "identity_1": replace(plain, crop=None)}, "mean", omni)


def test_an_interrupt_stops_between_chunks_and_leaves_no_trace(omni: OmniIDEncoder) -> None:
    pictures = omnis.photos(20)
    before = omni.encode(pictures, [1.0] * 20)
    trunk, seen = omni.patcher.model.trunk, list[int]()

    def interrupt(_module: Any, given: Any, _out: Any) -> None:
        seen.append(len(given[0]))
        comfy.model_management.interrupt_current_processing()

    hook = trunk.conv1.register_forward_hook(interrupt)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        omni.encode(pictures, [1.0] * 20)
    hook.remove()
    assert seen == [omni_id.CHUNK]
    assert torch.equal(omni.encode(pictures, [1.0] * 20), before)


def without(key: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda weights: {name: value for name, value in weights.items() if name != key}


BAD: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], dict[str, Any], str]] = {
    "newer": (dict, {"version": 2}, "of version 2; this pack reads up to version 1; update the pack"),
    "other kind": (dict, {"kind": "fused_kv"}, "not that of the kind omni_id"),
    "nan": (lambda w: w | {"norm.bias": torch.full((160,), torch.nan)}, {}, "norm.bias holds NaN"),
    "missing": (without("self.1.q.weight"), {}, "misses self.1.q.weight"),
    "no trunk": (without("trunk.conv1.weight"), {}, "incomplete or misshapen"),
    "half a trunk": (
        without("trunk.proj"),
        {},
        "which misses 'proj'; expected an Omni-ID encoder with the whole of its trunk",
    ),
    "unknown": (lambda w: w | {"trunk.attn_pool.query": torch.ones(2)}, {}, "has unknown trunk.attn_pool.query"),
    "misshapen": (lambda w: w | {"queries": torch.ones(1, 24, 320)}, {}, "has misshapen"),
}


@pytest.mark.parametrize("how", BAD)
def test_files_that_are_not_right_are_one_error(folder: Path, how: str) -> None:
    change, told, message = BAD[how]
    metadata = {"likeness": json.dumps(omnis.told(**told))}
    save_file(change(omnis.tensors()), folder / "likeness" / FILE, metadata)
    with pytest.raises(ValueError, match=f"got {FILE}.*{message}"):
        loader.load(FILE)


def test_foreign_and_broken_files_are_named(file: Path) -> None:
    data = file.read_bytes()
    save_file(adapter_tensors("image"), file.with_name("ip-adapter.safetensors"))
    save_file(towers.checkpoint(towers.open_clip()), file.with_name("clip.safetensors"))
    torch.save({"ref_encoder.0.weight": torch.zeros(4, 4)}, file.with_name("flashface.ckpt"))
    for name in ("ip-adapter.safetensors", "clip.safetensors", "flashface.ckpt"):
        with pytest.raises(ValueError, match=f"got {name}, which is no file of this pack; expected an Omni-ID encoder"):
            loader.load(name)
    for name, content, message in (
        ("cut.safetensors", data[: len(data) // 2], "cannot be read.*cut short"),
        ("empty.safetensors", b"", "an empty file"),
        ("page.safetensors", b"<!DOCTYPE html>", "a web page"),
    ):
        file.with_name(name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            loader.load(name)
    with pytest.raises(ValueError, match="which is not there"):
        loader.load("gone.safetensors")


def reshaped(data: bytes, rng: random.Random) -> bytes:
    """The file with another shape of a tensor, or another word in its metadata; the bytes of the tensors stay."""
    size = int.from_bytes(data[:8], "little")
    head = json.loads(data[8 : 8 + size])
    about = head[rng.choice([key for key in head if key != "__metadata__"])]
    count = torch.Size(about["shape"]).numel()
    about["shape"] = rng.choice([about["shape"][::-1], [count], [1, count], [count, 1], [count, 1, 1, 1]])
    if rng.random() < 0.5:
        told = omnis.told()
        told[rng.choice(list(told))] = rng.choice([-1, 0, 1, 2, 5, 112, 336, 3.5, None, "x", [], True])
        head["__metadata__"]["likeness"] = json.dumps(told)
    text = json.dumps(head).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def test_damaged_files_raise_or_load_whole(file: Path) -> None:
    data, rng, refused = file.read_bytes(), random.Random(7), 0
    whole = loader.load(file.name).patcher.model.state_dict().keys()
    for number in range(200):
        file.write_bytes((reshaped, mutated)[number % 2](data, rng))
        try:
            loaded = loader.load(file.name)
        except ValueError as error:
            refused += 1
            assert "expected" in str(error) or "update the pack" in str(error), error
            continue
        assert loaded.patcher.model.state_dict().keys() == whole
    assert 100 < refused < 200


def test_load_identity_adapter_sends_it_to_its_loader(file: Path) -> None:
    with pytest.raises(ValueError, match=f"got {FILE}, an Omni-ID encoder; .*load it with Load Omni-ID Encoder"):
        adapter.load(file.name)


def test_the_host_reloads_a_file_that_has_changed(file: Path) -> None:
    assert LoadOmniID.INPUT_TYPES()["required"]["file"][1]["options"] == [FILE]
    assert LoadOmniID.RETURN_TYPES == ["LIKENESS_OMNI_ID"]
    before = LoadOmniID.fingerprint_inputs(file.name)
    omnis.write(file, seed=1, notes={"trained": "a little more"})
    assert LoadOmniID.fingerprint_inputs(file.name) != before


@pytest.fixture
def people(analyzer: FaceAnalyzer, omni: OmniIDEncoder) -> Identity:
    return run(portrait(), stranger(), couple(), face_analyzer=analyzer, omni_id=omni)[0]


def shown(omni: OmniIDEncoder, identity: Identity, query: int, **options: int) -> Tensor:
    with torch.inference_mode():
        return OmniIDAttentionMap.execute(omni, identity, query, **options).args[0]


def test_a_query_is_shown_in_every_photo(omni: OmniIDEncoder, people: Identity) -> None:
    pictures = shown(omni, people, 5)
    assert pictures.shape == (3, 112, 112, 3) and 0 <= float(pictures.min()) and float(pictures.max()) <= 1
    crops = torch.stack([faces.align(c.float() / 255, k, 112) for c, k in zip(people.crop, people.kps, strict=True)])
    with torch.inference_mode():
        assert torch.equal(pictures, draw.heated(crops, omni.maps(crops, [1.0] * 3)[5]))
    assert not torch.equal(shown(omni, people, 6), pictures)
    # Only faces that count are looked at, and each once.
    one = replace(people, weight=torch.tensor([0.0, 1.0, 0.0]))
    twice = replace(people, crop=people.crop[[0, 0, 1]], kps=people.kps[[0, 0, 1]])
    assert len(shown(omni, one, 5)) == 1 and len(shown(omni, twice, 5)) == 2


def test_the_sheet_has_a_row_for_each_of_the_most_selective_queries(omni: OmniIDEncoder, people: Identity) -> None:
    whole = shown(omni, people, -1, count=24)
    assert whole.shape == (1, 24 * 112, 3 * 112, 3)
    assert torch.equal(shown(omni, people, -1), whole[:, : 8 * 112])
    with torch.inference_mode():
        maps = omni.maps(*omni_id.stored([people], 112))
    order = omni_id.selectivity(maps).argsort(descending=True, stable=True).tolist()
    rows = whole[0].unflatten(0, (24, 112)).unflatten(2, (3, 112)).movedim(2, 1)  # [24, 3, 112, 112, 3]
    for row, query in zip(rows, order, strict=True):
        single = shown(omni, people, query)
        assert torch.equal(row[1:], single[1:]) and torch.equal(row[0], draw.labelled(single[0], str(query)))
    assert shown(omni, people, -1, count=64).shape == whole.shape


def test_a_sheet_stays_of_a_size(omni: OmniIDEncoder) -> None:
    pictures, maps = omnis.photos(20), torch.rand(24, 20, 4, 4)
    assert attention_map.sheet(pictures, maps, 2).shape == (1, 2 * 112, 16 * 112, 3)


def test_what_cannot_be_shown_is_an_error(omni: OmniIDEncoder, people: Identity) -> None:
    with pytest.raises(ValueError, match="got query 24 for an encoder of 24; expected 0 to 23, or -1 for the sheet"):
        shown(omni, people, 24)
    with pytest.raises(ValueError, match="holds no face pictures"):
        shown(omni, replace(people, crop=None), 0)
    with pytest.raises(ValueError, match="only faces of weight 0"):
        shown(omni, replace(people, weight=torch.zeros(3)), 0)


@torch.inference_mode()
def test_the_stand_in_is_of_the_papers_size(folder: Path) -> None:
    name = "omni_id_vit_h.safetensors"
    place, make = standins.WEIGHTS[name]
    save_file(make(), folder / place / name, {"likeness": json.dumps(standins.TOLD[name])})
    omni = loader.load(name)
    spec = omni.spec
    assert (spec.tokens, spec.width, spec.heads, spec.states_per_photo) == (256, 1280, 20, 257)
    made = omni.encode(omnis.photos(2, size=224), [1.0, 1.0])
    assert made.shape == (1, 256, 1280) and float(made.std()) > 0.1 and float(made.std(1).mean()) > 0.01
