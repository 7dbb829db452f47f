"""Merge, Mix, Save and Load Identity on the host's own classes."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import folder_paths
import pytest
import torch
from comfy_api.latest import io
from comfyui_likeness.likeness import identity as math
from comfyui_likeness.likeness import identity_file
from comfyui_likeness.likeness.spec import Feature, Identity
from comfyui_likeness.nodes import identity as nodes
from comfyui_likeness.nodes.loaders import files
from identities import HASH, identity

ARC = Feature("arcface.buffalo_l", "raw", "face112")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A models folder of its own for the host; the folder for identities is not there yet."""
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path))
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", {})
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path / "temp"))
    files.register()
    return tmp_path / "identities"


def person(seed: int = 0, faces: int = 1) -> Identity:
    crop = torch.full((faces, 6, 5, 3), 10 + seed, dtype=torch.uint8)
    return replace(identity((ARC,), ((16,),), faces, seed), crop=crop)


def options() -> list[str]:
    return nodes.LoadIdentity.INPUT_TYPES()["required"]["file"][1]["options"]


def save(who: Identity, name: str = "", include_crops: bool = True) -> str:
    return nodes.SaveIdentity.execute(who, name, include_crops).ui.as_dict()["text"][0]


def test_schemas_are_whole(folder: Path) -> None:
    for node in nodes.NODES:
        schema = node.GET_SCHEMA()
        schema.validate()
        assert schema.category == "likeness/identity" and schema.description
        assert all(given.tooltip for given in schema.inputs)
    assert [node.GET_SCHEMA().node_id for node in nodes.NODES] == [
        "LikenessMergeIdentities", "LikenessMixIdentities", "LikenessSaveIdentity", "LikenessLoadIdentity",
    ]  # fmt: skip


def test_save_and_load(folder: Path) -> None:
    assert options() == []
    who = person(3, 2)
    told = save(who)
    assert str(folder / "person 3.safetensors") in told and "MB" in told
    save(who, " family/anna.safetensors ", include_crops=False)
    assert options() == [os.path.join("family", "anna.safetensors"), "person 3.safetensors"]
    whole, bare = (nodes.LoadIdentity.execute(name) for name in reversed(options()))
    assert torch.equal(whole.args[0].embeddings[ARC.id(HASH)], who.embeddings[ARC.id(HASH)])
    assert torch.equal(whole.args[0].crop, who.crop) and whole.args[0].name == bare.args[0].name == "person 3"
    shown = whole.ui.as_dict()["images"]
    assert len(shown) == 2 and bare.args[0].crop is None and bare.ui is None
    temporary = Path(folder_paths.get_temp_directory())
    assert all((temporary / image["subfolder"] / image["filename"]).is_file() for image in shown)


def test_saving_again_replaces_the_file_and_is_noticed(folder: Path) -> None:
    save(person(0), "anna")
    before = nodes.LoadIdentity.fingerprint_inputs("anna.safetensors")
    assert nodes.LoadIdentity.fingerprint_inputs("anna.safetensors") == before
    save(person(1, 2), "anna")
    assert nodes.LoadIdentity.fingerprint_inputs("anna.safetensors") != before
    assert len(nodes.LoadIdentity.execute("anna.safetensors").args[0]) == 2
    assert os.listdir(folder) == ["anna.safetensors"]


@pytest.mark.parametrize("name", ["../anna", "/tmp/anna", "a/../../b", "..\\anna", "C:\\anna", ".anna", "nul", "a\0b"])
def test_names_cannot_leave_the_folder(folder: Path, name: str) -> None:
    with pytest.raises(ValueError, match="choose another name"):
        save(person(), name)
    with pytest.raises(ValueError, match="choose another name"):
        save(replace(person(), name=name))
    assert not folder.exists()


def test_only_files_of_the_folder_are_read(folder: Path) -> None:
    save(person(), "inside")
    identity_file.save(person(), folder.parent / "outside.safetensors")
    (folder / "old.bin").write_bytes(b"x")
    assert options() == ["inside.safetensors"]
    for name in ("../outside.safetensors", "none.safetensors", str(folder.parent / "outside.safetensors")):
        for read in (nodes.LoadIdentity.execute, nodes.LoadIdentity.fingerprint_inputs):
            with pytest.raises(ValueError, match="which is not there"):
                read(name)


@pytest.mark.parametrize("method", math.METHODS)
def test_merge(folder: Path, method: str) -> None:
    people = [person(0, 2), person(0), person(0, 3)]
    given: io.Autogrow.Type = {f"identity_{i}": who for i, who in enumerate(people)}
    merged, report = nodes.MergeIdentities.execute(given, method).args
    want, _ = math.merge(people, method)
    assert torch.equal(merged.embeddings[ARC.id(HASH)], want.embeddings[ARC.id(HASH)])
    assert f"6 face(s) of 3 identity(ies), method {method}" in report
    save(merged, "merged")
    assert len(nodes.LoadIdentity.execute("merged.safetensors").args[0]) == (6 if method == "concatenate" else 1)


def test_mix(folder: Path) -> None:
    people = [person(0), person(1, 2), person(2)]
    given: io.Autogrow.Type = {f"identity_{i}": who for i, who in enumerate(people)}
    out = nodes.MixIdentities.execute(given, "2, 1, 1")
    assert torch.equal(out.args[0].embeddings[ARC.id(HASH)], math.mix(people, [2, 1, 1]).embeddings[ARC.id(HASH)])
    assert "person 0: 50.0%" in out.ui.as_dict()["text"][0]
    assert "33.3%" in nodes.MixIdentities.execute(given, "").ui.as_dict()["text"][0]
    for weights in ("1, 2", "a b c", "0 0 0", "1 -1 1", "nan 1 1"):
        with pytest.raises(ValueError, match="expected"):
            nodes.MixIdentities.execute(given, weights)
    save(out.args[0])
    assert options() == ["person 0 and person 1 and person 2.safetensors"]
