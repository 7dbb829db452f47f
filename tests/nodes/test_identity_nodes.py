"""Merge, Mix, Save and Load Identity with ComfyUI's classes."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import folder_paths
import pytest
import torch
from comfy_api.latest import io
from comfyui_likeness.likeness.identity import identity_file, merge
from comfyui_likeness.likeness.spec import Feature, Identity
from comfyui_likeness.nodes import identity
from comfyui_likeness.nodes.loaders import files
from support.identities import ENCODER_HASH, make_identity

ARCFACE = Feature("arcface.buffalo_l", "raw", "face112")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty models folder for ComfyUI; the folder for identities does not exist yet."""
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path))
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", {})
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path / "temp"))
    files.register_model_folders()
    return tmp_path / "identities"


def make_person(seed: int = 0, faces: int = 1) -> Identity:
    crop = torch.full((faces, 6, 5, 3), 10 + seed, dtype=torch.uint8)
    return replace(make_identity((ARCFACE,), ((16,),), faces, seed), crop=crop)


def list_file_options() -> list[str]:
    return identity.LoadIdentity.INPUT_TYPES()["required"]["file"][1]["options"]


def save_identity(identity_to_save: Identity, name: str = "", include_crops: bool = True) -> str:
    return identity.SaveIdentity.execute(identity_to_save, name, include_crops).ui.as_dict()["text"][0]


def test_schemas(folder: Path) -> None:
    for node in identity.NODES:
        schema = node.GET_SCHEMA()
        schema.validate()
        assert schema.category == "likeness/identity" and schema.description
        assert all(node_input.tooltip for node_input in schema.inputs)
    assert [node.GET_SCHEMA().node_id for node in identity.NODES] == [
        "LikenessMergeIdentities", "LikenessMixIdentities", "LikenessSaveIdentity", "LikenessLoadIdentity",
    ]  # fmt: skip


def test_save_and_load(folder: Path) -> None:
    assert list_file_options() == []
    person = make_person(3, 2)
    message = save_identity(person)
    assert str(folder / "person 3.safetensors") in message and "MB" in message
    save_identity(person, " family/anna.safetensors ", include_crops=False)
    assert list_file_options() == [os.path.join("family", "anna.safetensors"), "person 3.safetensors"]
    full, without_crops = (identity.LoadIdentity.execute(name) for name in reversed(list_file_options()))
    assert torch.equal(
        full.args[0].embeddings[ARCFACE.format_encoder_id(ENCODER_HASH)],
        person.embeddings[ARCFACE.format_encoder_id(ENCODER_HASH)],
    )
    assert torch.equal(full.args[0].crop, person.crop) and full.args[0].name == without_crops.args[0].name == "person 3"
    previews = full.ui.as_dict()["images"]
    assert len(previews) == 2 and without_crops.args[0].crop is None and without_crops.ui is None
    temporary = Path(folder_paths.get_temp_directory())
    assert all((temporary / image["subfolder"] / image["filename"]).is_file() for image in previews)


def test_saving_again_replaces_the_file(folder: Path) -> None:
    save_identity(make_person(0), "anna")
    before = identity.LoadIdentity.fingerprint_inputs("anna.safetensors")
    assert identity.LoadIdentity.fingerprint_inputs("anna.safetensors") == before
    save_identity(make_person(1, 2), "anna")
    assert identity.LoadIdentity.fingerprint_inputs("anna.safetensors") != before
    assert len(identity.LoadIdentity.execute("anna.safetensors").args[0]) == 2
    assert os.listdir(folder) == ["anna.safetensors"]


@pytest.mark.parametrize("name", ["../anna", "/tmp/anna", "a/../../b", "..\\anna", "C:\\anna", ".anna", "nul", "a\0b"])
def test_names_cannot_leave_the_folder(folder: Path, name: str) -> None:
    with pytest.raises(ValueError, match="choose another name"):
        save_identity(make_person(), name)
    with pytest.raises(ValueError, match="choose another name"):
        save_identity(replace(make_person(), name=name))
    assert not folder.exists()


def test_only_files_of_the_folder_are_read(folder: Path) -> None:
    save_identity(make_person(), "inside")
    identity_file.save_identity(make_person(), folder.parent / "outside.safetensors")
    (folder / "old.bin").write_bytes(b"x")
    assert list_file_options() == ["inside.safetensors"]
    for name in ("../outside.safetensors", "none.safetensors", str(folder.parent / "outside.safetensors")):
        for method in (identity.LoadIdentity.execute, identity.LoadIdentity.fingerprint_inputs):
            with pytest.raises(ValueError, match="could not find"):
                method(name)


@pytest.mark.parametrize("method", merge.MERGE_METHODS)
def test_merge(folder: Path, method: str) -> None:
    people = [make_person(0, 2), make_person(0), make_person(0, 3)]
    identities: io.Autogrow.Type = {f"identity_{i}": person for i, person in enumerate(people)}
    merged, report = identity.MergeIdentities.execute(identities, method).args
    expected, _ = merge.merge_identities(people, method)
    assert torch.equal(
        merged.embeddings[ARCFACE.format_encoder_id(ENCODER_HASH)],
        expected.embeddings[ARCFACE.format_encoder_id(ENCODER_HASH)],
    )
    assert f"6 face(s) of 3 identity(ies), method {method}" in report
    save_identity(merged, "merged")
    assert len(identity.LoadIdentity.execute("merged.safetensors").args[0]) == (6 if method == "concatenate" else 1)


def test_mix(folder: Path) -> None:
    people = [make_person(0), make_person(1, 2), make_person(2)]
    identities: io.Autogrow.Type = {f"identity_{i}": person for i, person in enumerate(people)}
    output = identity.MixIdentities.execute(identities, "2, 1, 1")
    assert torch.equal(
        output.args[0].embeddings[ARCFACE.format_encoder_id(ENCODER_HASH)],
        merge.mix_identities(people, [2, 1, 1]).embeddings[ARCFACE.format_encoder_id(ENCODER_HASH)],
    )
    assert "person 0: 50.0%" in output.ui.as_dict()["text"][0]
    assert "33.3%" in identity.MixIdentities.execute(identities, "").ui.as_dict()["text"][0]
    for weights in ("1, 2", "a b c", "0 0 0", "1 -1 1", "nan 1 1"):
        with pytest.raises(ValueError, match="expected"):
            identity.MixIdentities.execute(identities, weights)
    save_identity(output.args[0])
    assert list_file_options() == ["person 0 and person 1 and person 2.safetensors"]
