"""Checkpoints of pickled modules are read without executing anything, and hostile ones are rejected."""

from __future__ import annotations

import collections
import os
import pickle
import struct
import subprocess
import sys
import types
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from comfyui_likeness.likeness.checkpoints import adaface_checkpoint, pickle_reader
from comfyui_likeness.likeness.methods import adaface
from comfyui_likeness.nodes.loaders import adaface_loader
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.adaface_models import make_random_tensors, make_text_model_shapes
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
CLASSES = {"adaface": (), "adaface.subj_basis_generator": ("SubjBasisGenerator",), "strange": ("Tokenizer",)}


@pytest.fixture
def authors() -> Iterator[types.SimpleNamespace]:
    """The authors' classes, which exist while a checkpoint is written and never while one is read."""
    classes: dict[str, type] = {}
    for module, names in CLASSES.items():
        sys.modules[module] = types.ModuleType(module)
        for name in names:
            base = object if name == "Tokenizer" else nn.Module
            classes[name] = type(name, (base,), {"__module__": module})
            setattr(sys.modules[module], name, classes[name])
    try:
        yield types.SimpleNamespace(**classes)
    finally:
        for module in CLASSES:
            sys.modules.pop(module, None)


def group_by_child(names: list[str]) -> dict[str, Any]:
    """Dotted names, grouped by their first part."""
    groups: dict[str, Any] = {}
    for name in names:
        head, _, rest = name.partition(".")
        groups.setdefault(head, []).append(rest)
    return groups


def make_network(tensors: dict[str, torch.Tensor]) -> nn.Module:
    """A tree of nn.Modules with these parameters."""
    module = nn.Module()
    for head, rest in group_by_child(list(tensors)).items():
        if rest == [""]:
            module.register_parameter(head, nn.Parameter(tensors[head]))
        else:
            inside = {key[len(head) + 1 :]: value for key, value in tensors.items() if key.startswith(f"{head}.")}
            module.add_module(head, make_network(inside))
    return module


def make_face_module(authors: Any, seed: int, width: int = 64, **attributes: Any) -> nn.Module:
    """An inverter in the authors' class, with other attributes that are to be ignored."""
    module = authors.SubjBasisGenerator()
    module.prompt2token_proj = make_network(
        make_random_tensors(make_text_model_shapes(width, 3, key_value_copies=2), seed, "text_model.")
    )
    module.prompt2token_proj.text_model.embeddings.register_buffer("position_ids", torch.arange(77)[None])
    module.hidden_state_layer_weights = nn.Parameter(torch.tensor([[1.0], [2.0], [4.0]]))
    module.pos_embs = nn.Parameter(torch.ones(1, 4, width))
    module.obj_proj_in = nn.Linear(4, 4)
    module.register_buffer("temporary", torch.ones(3), persistent=False)
    module.tokenizer = authors.Tokenizer()
    module.tokenizer.__dict__ |= {"ranks": {("a", "b"): 0}, "names": {"x", "y"}, "order": collections.OrderedDict(a=1)}
    module.__dict__ |= attributes
    return module


def save_checkpoint(authors: Any, generation: int, path: Path) -> dict[str, torch.Tensor]:
    """Write a checkpoint of either generation, and return what a conversion should keep of it."""
    if generation == 2024:
        face = make_face_module(authors, 1, pad_embeddings=torch.rand(77, 64))
        faces: dict[str, nn.Module] = {"z": face, "y": make_face_module(authors, 2)}
        more: dict[str, Any] = {"string_to_token": {"z": torch.tensor(345)}, "do_zero_shot": True}
    else:
        face = make_face_module(authors, 3, num_id_vecs=16)
        face.static_img_suffix_embs = nn.Parameter(torch.rand(1, 4, 64))
        faces = {"z": nn.ModuleList([make_face_module(authors, 4, num_id_vecs=4), face])}
        more = {"placeholder_strings": ["z"]}
    torch.save({adaface_checkpoint.SUBJECT_GENERATORS_KEY: nn.ModuleDict(faces), **more}, path)
    expected = {key: value for key, value in face.state_dict().items() if key.startswith(adaface.TEXT_MODEL_PREFIX)}
    expected |= {key: value for key, value in face.state_dict().items() if key in adaface.EXTRA_TENSORS}
    expected.pop(f"{adaface.TEXT_MODEL_PREFIX}embeddings.position_ids")
    return expected | ({"pad_embeddings": face.pad_embeddings} if generation == 2024 else {})


@pytest.mark.parametrize("generation", [2024, 2025])
def test_a_checkpoint_converts_exactly(authors: Any, tmp_path: Path, generation: int) -> None:
    file = tmp_path / "embeddings_gs-1.pt"
    expected = save_checkpoint(authors, generation, file)
    for module in CLASSES:
        sys.modules.pop(module)
    tensors, spec = adaface_checkpoint.read_adaface_checkpoint(file)
    assert tensors.keys() == expected.keys()
    assert all(
        torch.equal(tensors[key], value) and tensors[key].dtype == value.dtype for key, value in expected.items()
    )
    assert spec.towers == {"l": 768} and spec.heads == 12
    root = pickle_reader.get_dict_items(pickle_reader.read_pickled_checkpoint(file))
    assert not [module for module in sys.modules if module.split(".")[0] in ("adaface", "strange")]
    module = pickle_reader.get_child_modules(root[adaface_checkpoint.SUBJECT_GENERATORS_KEY])["z"]
    module = module if generation == 2024 else pickle_reader.get_child_modules(module)["1"]
    state_dict = pickle_reader.collect_state_dict(module)
    assert "temporary" not in state_dict and "obj_proj_in.weight" in state_dict


def run_convert(*arguments: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tools.convert_adaface", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_the_loader_reads_what_the_command_writes(authors: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """Full size: 12 layers of 768, as the published file."""
    face = make_face_module(authors, 1, width=64)
    face.prompt2token_proj = make_network(
        {
            k: v.half()
            for k, v in make_random_tensors(
                make_text_model_shapes(768, 12, key_value_copies=2), 1, "text_model."
            ).items()
        }
    )
    source, target = tmp_path / "in.pt", tmp_path / "out.safetensors"
    torch.save({adaface_checkpoint.SUBJECT_GENERATORS_KEY: nn.ModuleDict({"z": face})}, source)
    done = run_convert(source, target)
    assert done.returncode == 0, done.stderr
    assert "2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2 times as wide" in done.stdout
    with safe_open(target, "pt") as file:
        assert '"kind": "adaface"' in file.metadata()["likeness"] and '"sha256"' in file.metadata()["likeness"]
    again = run_convert(source, target)
    assert again.returncode == 1 and "expected a new file" in again.stderr
    assert run_convert(source).returncode == 2

    save_file(
        {k: v.half() for k, v in make_random_tensors(make_text_model_shapes(768, 12), 2, "text_model.").items()},
        tmp_path / "a.safetensors",
    )
    monkeypatch.setattr(adaface_loader.files, "find_model_file", lambda name, *_: tmp_path / name)
    prompter = adaface_loader.load_prompter("out.safetensors", "a.safetensors")
    assert prompter.spec is not None and prompter.spec.base == "SD1.5" and prompter.inverter is not None
    key = "encoder.layers.11.self_attn.v_proj.weight"
    assert torch.equal(
        prompter.inverter.model.text.state_dict()[key], load_file(target)[adaface.TEXT_MODEL_PREFIX + key]
    )
    alone = adaface_loader.load_prompter(adaface_loader.ARC2FACE_ONLY, "a.safetensors")
    assert alone.inverter is None
    wrong: dict[tuple[str, str], str] = {
        ("in.pt", "a.safetensors"): r"pickled modules.*python -m tools.convert_adaface in.pt out.safetensors",
        ("a.safetensors", "a.safetensors"): "a text encoder; expected AdaFace's prompt inverter",
        ("out.safetensors", "out.safetensors"): "AdaFace's prompt inverter; expected a text encoder",
        ("cut.safetensors", "a.safetensors"): "cut short",
        ("nan.safetensors", "a.safetensors"): "NaN",
        ("less.safetensors", "a.safetensors"): "misses encoder.layers.3.mlp.fc1.bias",
        ("odd.safetensors", "a.safetensors"): "values of different sizes",
    }
    whole = load_file(target)
    with safe_open(target, "pt") as file:
        metadata = file.metadata()
    (tmp_path / "cut.safetensors").write_bytes(target.read_bytes()[:-100])
    first = f"{adaface.TEXT_MODEL_PREFIX}encoder.layers.3."
    odd = {f"{first}self_attn.k_proj.weight": torch.ones(769, 768), f"{first}self_attn.k_proj.bias": torch.ones(769)}
    for name, tensors in (
        ("nan", whole | {"hidden_state_layer_weights": torch.full((3, 1), torch.nan)}),
        ("less", {k: v for k, v in whole.items() if k != f"{first}mlp.fc1.bias"}),
        ("odd", whole | odd),
    ):
        save_file(tensors, tmp_path / f"{name}.safetensors", metadata)
    for (file, encoder), message in wrong.items():
        with pytest.raises(ValueError, match=message):
            adaface_loader.load_prompter(file, encoder)


def write_hostile_file(
    path: Path, program: bytes, storages: dict[str, bytes] | None = None, packed: bool = False
) -> Path:
    """A torch file with the given pickle."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED) as archive:
        archive.writestr("x/data.pkl", program)
        for key, data in (storages or {}).items():
            archive.writestr(f"x/data/{key}", data)
    return path


class Call:
    def __init__(self, function: Any, *args: Any) -> None:
        self.function, self.args = function, args

    def __call__(self) -> None:
        """The pickler requires it; it is never called."""

    def __reduce__(self) -> Any:
        return self.function, self.args


def nest_tenfold(levels: int, close: bytes) -> bytes:
    """Nested containers of ten items each; the opcode `close` makes one of the items since the mark."""
    program = b"\x80\x02]q\x00"
    for level in range(levels):
        program += b"(" + b"h" + bytes([level]) + (b"h" + bytes([level])) * 9 + close + b"q" + bytes([level + 1])
    return program


def storage_program(count: int, kind: bytes) -> bytes:
    """A pickle of a tensor [2] on the storage "0", which claims to hold `count` values."""
    numbers = b"K\x00K\x02\x85K\x01\x85\x89}t"
    pid = b"(X\x07\x00\x00\x00storagec" + kind + b"\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
    return (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + pid + b"\x8a\x08" + struct.pack("<q", count) + b"tQ" + numbers
        + b"R."
    )  # fmt: skip


FLOAT = b"torch\nFloatStorage"


def test_a_valid_tensor_is_read(tmp_path: Path) -> None:
    file = write_hostile_file(tmp_path / "good.pt", storage_program(4, FLOAT), {"0": struct.pack("<4f", 1, 2, 3, 4)})
    assert torch.equal(pickle_reader.read_pickled_checkpoint(file), torch.tensor([1.0, 2.0]))


def list_programs(marker: Path) -> dict[str, tuple[bytes, dict[str, bytes]]]:
    touch = f"touch {marker}"
    chain = Call(getattr, Call(__import__, "os"), "system")
    code = f"open({str(marker)!r}, 'w')"
    numbers = {"0": struct.pack("<4f", 1, 2, 3, 4)}
    return {
        "os.system": (pickle.dumps({"a": Call(os.system, touch)}), {}),
        "eval": (pickle.dumps(Call(eval, code)), {}),
        "a chain of reduces": (pickle.dumps(Call(chain, touch)), {}),
        "an old instance": (b"(S'" + touch.encode() + b"'\nios\nsystem\n.", {}),
        "an old object": (b"(cos\nsystem\nS'" + touch.encode() + b"'\no.", {}),
        "build of a function": (b"cbuiltins\nprint\n}S'__code__'\nI1\nsb.", {}),
        "an extension": (b"\x80\x02\x82\x01.", {}),
        "lists of lists": (nest_tenfold(60, b"l") + b".", {}),
        "a key of tuples": (nest_tenfold(60, b"t") + b"K\x01}h\x3cK\x01s.", {}),
        "a huge string": (b"\x80\x04\x8d" + struct.pack("<Q", 1 << 60) + b"x.", {}),
        "a huge buffer": (b"\x80\x05\x96" + struct.pack("<Q", 1 << 50) + b".", {}),
        "a far memo": (b"\x80\x02]r" + struct.pack("<I", 0xFFFFFFFF) + b".", {}),
        "a storage larger than its file": (storage_program(1 << 40, FLOAT), numbers),
        "a storage of objects": (storage_program(4, b"builtins\nobject"), numbers),
        "a tensor of one number a billion times": (make_tensor_program((1 << 40,), (0,)), numbers),
        "a tensor behind its storage": (make_tensor_program((5,), (1,)), numbers),
        "a negative size": (make_tensor_program((-1,), (1,)), numbers),
        "a module in itself": (make_endless_program(), {}),
        "nothing": (b"", {}),
        "noise": (bytes(range(256)) * 4, {}),
        "half a pickle": (pickle.dumps({"a": [1, 2, 3] * 50})[:60], {}),
    }


def make_tensor_program(size: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
    def long(number: int) -> bytes:
        return b"\x8a\x08" + struct.pack("<q", number)

    tuples = [b"(" + b"".join(map(long, one)) + b"t" for one in (size, stride)]
    return storage_program(4, FLOAT).replace(b"K\x02\x85K\x01\x85", b"".join(tuples))


def make_endless_program() -> bytes:
    """A checkpoint whose face module contains itself."""
    module = b"cx\nModule\n)\x81q\x01}X\x08\x00\x00\x00_modules}X\x11\x00\x00\x00prompt2token_projh\x01ssb"
    name = adaface_checkpoint.SUBJECT_GENERATORS_KEY.encode()
    outer = b"cx\nModule\n)\x81}X\x08\x00\x00\x00_modules}X\x01\x00\x00\x00z" + module + b"ssb"
    return b"\x80\x02}X" + struct.pack("<I", len(name)) + name + outer + b"s."


@pytest.mark.parametrize("name", list(list_programs(Path("x"))))
def test_a_hostile_file_executes_nothing_and_is_rejected(name: str, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    program, storages = list_programs(marker)[name]
    file = write_hostile_file(tmp_path / "hostile.pt", program, storages)
    with pytest.raises(ValueError, match="got .*; expected .*; .*fetch"):
        adaface_checkpoint.read_adaface_checkpoint(file)
    assert not marker.exists() and sorted(path.name for path in tmp_path.iterdir()) == ["hostile.pt"]


def test_the_command_rejects_a_hostile_file_in_one_line(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    file = write_hostile_file(tmp_path / "hostile.pt", list_programs(marker)["os.system"][0])
    done = run_convert(file, tmp_path / "out.safetensors")
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 1 and len(lines) == 1 and lines[0].startswith("error: got hostile.pt, "), done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hostile.pt"]


def test_other_files_are_rejected(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    write_hostile_file(tmp_path / "packed.pt", pickle.dumps(list(range(9))), packed=True)
    with zipfile.ZipFile(tmp_path / "empty.pt", "w") as archive:
        archive.writestr("x/other", "")
    for name, message in (("old", "not a zip"), ("packed", "compressed"), ("empty", "no data.pkl")):
        with pytest.raises(ValueError, match=f"{message}.*nothing was executed"):
            pickle_reader.read_pickled_checkpoint(tmp_path / f"{name}.pt")


def test_an_ordinary_checkpoint_is_rejected(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": torch.ones(2)}}, tmp_path / "sd.ckpt")
    with pytest.raises(ValueError, match="holds state_dict; expected AdaFace's embedding checkpoint"):
        adaface_checkpoint.read_adaface_checkpoint(tmp_path / "sd.ckpt")
