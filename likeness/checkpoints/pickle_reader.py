"""Reads the tensors of a torch file that pickles complete modules, without importing or running anything it names.

`pickletools` splits the pickle into opcodes; the stack machine below executes them on plain containers only. A class or
function that the pickle names becomes a PickledGlobal, an object made with it an inert PickledObject. Three functions
are implemented here: OrderedDict, and the two with which torch rebuilds tensors from storages.
"""

# Why not pickle.Unpickler with find_class, persistent_load and stub classes: it builds real dictionaries and sets, and
# has no hook for it. The hash of a tuple nested sixty levels deep, which takes 1.5 KB of pickle, then never ends (it
# takes ten times longer per level); here a dictionary is a list of pairs and nothing is hashed. And the C unpickler
# allocates its memo up to the index that a file names: LONG_BINPUT 0xFFFFFFFF alone asks for 64 GB.

from __future__ import annotations

import pickletools
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MAX_PICKLE_BYTES = 1 << 26  # names and numbers only: the tensors are separate entries of the archive
MAX_MODULES, MAX_MODULE_PATH_LENGTH = 10_000, 1000  # of one network; characters of a module's dotted path

STORAGE_DTYPES: Mapping[str, torch.dtype] = {
    "torch.FloatStorage": torch.float32, "torch.HalfStorage": torch.float16, "torch.BFloat16Storage": torch.bfloat16,
    "torch.DoubleStorage": torch.float64, "torch.LongStorage": torch.int64, "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16, "torch.CharStorage": torch.int8, "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}  # fmt: skip


class PickledDict(list[tuple[Any, Any]]):
    """A dictionary as a list of its keys and values, which are never hashed."""


@dataclass(frozen=True)
class PickledGlobal:
    """A class or function by its qualified name."""

    name: str


@dataclass(eq=False)
class PickledObject:
    """Stands in for an object: the class or function that would have made it, its arguments, state and items."""

    class_name: str
    args: Any
    state: Any = None
    items: PickledDict = field(default_factory=PickledDict)


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Tensor:
    """torch._utils._rebuild_tensor_v2."""
    numbers = (offset, *size, *stride)
    if not isinstance(storage, Tensor) or not all(isinstance(n, int) and n >= 0 for n in numbers):
        raise ValueError("a tensor does not consist of a storage and numbers")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if all(size) else -1
    if last >= len(storage) or torch.Size(size).numel() > len(storage):
        raise ValueError("a tensor is larger than its storage")
    return storage.as_strided(size, stride, offset)


REBUILD_FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "collections.OrderedDict": lambda *_: PickledDict(),
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
}

STACK_MARK = object()


class PickleMachine:
    """Stack and memo of a pickle."""

    def __init__(self, load_storage: Callable[[Any], Tensor]) -> None:
        self.load_storage = load_storage
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run_pickle(self, data: bytes) -> Any:
        for opcode, arg, _ in pickletools.genops(data):
            if opcode.name not in OPCODE_HANDLERS:
                raise ValueError(f"it holds the opcode {opcode.name}, which no torch file has")
            OPCODE_HANDLERS[opcode.name](self, arg)
        return self.stack.pop()

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self, count: int) -> tuple[Any, ...]:
        """The last `count` values. Raises ValueError where a mark is among them."""
        values = tuple(self.stack[len(self.stack) - count :])
        if len(values) < count or any(value is STACK_MARK for value in values):
            raise ValueError("its stack runs empty")
        del self.stack[len(self.stack) - count :]
        return values

    def pop_to_mark(self) -> tuple[Any, ...]:
        """The values since the last mark."""
        mark = next(i for i in reversed(range(len(self.stack))) if self.stack[i] is STACK_MARK)
        values = tuple(self.stack[mark + 1 :])
        del self.stack[mark:]
        return values

    def make_object(self, function: Any, args: Any) -> None:
        name = function.name if isinstance(function, PickledGlobal) else "an object"
        rebuild = REBUILD_FUNCTIONS.get(name) if isinstance(args, tuple) else None
        self.push(PickledObject(name, args) if rebuild is None else rebuild(*args))

    def push_global(self, module: Any, name: Any) -> None:
        self.push(PickledGlobal(f"{module}.{name}"))

    def extend_list(self, values: tuple[Any, ...]) -> None:
        target = self.stack[-1]
        if isinstance(target, PickledObject):
            target.items.extend((None, value) for value in values)
        elif isinstance(target, list) and not isinstance(target, PickledDict):
            target.extend(values)
        else:
            raise ValueError("it appends to something that is not a list")

    def set_dict_items(self, values: tuple[Any, ...]) -> None:
        target = self.stack[-1].items if isinstance(self.stack[-1], PickledObject) else self.stack[-1]
        if not isinstance(target, PickledDict) or len(values) % 2:
            raise ValueError("it sets items of something that is not a dictionary")
        target.extend(zip(values[::2], values[1::2], strict=True))

    def set_object_state(self, _: Any) -> None:
        (state,) = self.pop(1)
        if isinstance(self.stack[-1], PickledObject):
            self.stack[-1].state = state  # attributes of a dictionary are dropped


def _map_opcodes(
    names: str, handler: Callable[[PickleMachine, Any], None]
) -> dict[str, Callable[[PickleMachine, Any], None]]:
    return dict.fromkeys(names.split(), handler)


OPCODE_HANDLERS: Mapping[str, Callable[[PickleMachine, Any], None]] = {
    **_map_opcodes("PROTO FRAME STOP", lambda m, arg: None),
    **_map_opcodes("BININT BININT1 BININT2 INT LONG LONG1 LONG4 BINFLOAT FLOAT", PickleMachine.push),
    **_map_opcodes(
        "BINUNICODE SHORT_BINUNICODE BINUNICODE8 UNICODE BINSTRING SHORT_BINSTRING STRING", PickleMachine.push
    ),
    **_map_opcodes("BINBYTES SHORT_BINBYTES BINBYTES8", PickleMachine.push),
    "NONE": lambda m, arg: m.push(None),
    "NEWTRUE": lambda m, arg: m.push(True),
    "NEWFALSE": lambda m, arg: m.push(False),
    "MARK": lambda m, arg: m.push(STACK_MARK),
    "POP": lambda m, arg: m.stack.__delitem__(-1),
    "EMPTY_TUPLE": lambda m, arg: m.push(()),
    "TUPLE1": lambda m, arg: m.push(m.pop(1)),
    "TUPLE2": lambda m, arg: m.push(m.pop(2)),
    "TUPLE3": lambda m, arg: m.push(m.pop(3)),
    "TUPLE": lambda m, arg: m.push(m.pop_to_mark()),
    **_map_opcodes("EMPTY_LIST EMPTY_SET", lambda m, arg: m.push([])),
    **_map_opcodes("LIST FROZENSET", lambda m, arg: m.push(list(m.pop_to_mark()))),
    "APPEND": lambda m, arg: m.extend_list(m.pop(1)),
    **_map_opcodes("APPENDS ADDITEMS", lambda m, arg: m.extend_list(m.pop_to_mark())),
    "EMPTY_DICT": lambda m, arg: m.push(PickledDict()),
    "SETITEM": lambda m, arg: m.set_dict_items(m.pop(2)),
    "SETITEMS": lambda m, arg: m.set_dict_items(m.pop_to_mark()),
    "GLOBAL": lambda m, arg: m.push_global(*arg.split(" ", 1)),
    "STACK_GLOBAL": lambda m, arg: m.push_global(*m.pop(2)),
    **_map_opcodes("REDUCE NEWOBJ", lambda m, arg: m.make_object(*m.pop(2))),
    "NEWOBJ_EX": lambda m, arg: m.make_object(*m.pop(3)[:2]),
    "BUILD": PickleMachine.set_object_state,
    "BINPERSID": lambda m, arg: m.push(m.load_storage(*m.pop(1))),
    **_map_opcodes("BINPUT LONG_BINPUT PUT", lambda m, arg: m.memo.__setitem__(arg, m.stack[-1])),
    "MEMOIZE": lambda m, arg: m.memo.__setitem__(len(m.memo), m.stack[-1]),
    **_map_opcodes("BINGET LONG_BINGET GET", lambda m, arg: m.push(m.memo[arg])),
}


class _StorageReader:
    """Reads the storages of a torch archive, each once."""

    def __init__(self, archive: zipfile.ZipFile, folder: str) -> None:
        self._archive, self._folder = archive, folder
        self._read: dict[str, Tensor] = {}

    def __call__(self, pid: Any) -> Tensor:
        tag, kind, key, _, count = pid
        dtype = STORAGE_DTYPES.get(kind.name) if isinstance(kind, PickledGlobal) else None
        if tag != "storage" or dtype is None or not isinstance(key, str) or not isinstance(count, int):
            raise ValueError("it refers to something outside the pickle that is not a storage")
        if key not in self._read:
            entry = self._archive.getinfo(f"{self._folder}data/{key}")
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != count * dtype.itemsize:
                raise ValueError(f"the storage {key} does not have the size that it claims")
            data = bytearray(self._archive.read(entry))
            self._read[key] = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return self._read[key]


def read_pickled_checkpoint(path: Path) -> Any:
    """The content of a torch file: PickledDict, lists, tuples, plain values, tensors, PickledObject.

    Nothing in the file is executed. Raises ValueError with the reason where it cannot be read this way.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entry = next((entry for entry in archive.infolist() if entry.filename.endswith("data.pkl")), None)
            if entry is None:
                raise ValueError("it has no data.pkl")
            if entry.file_size > MAX_PICKLE_BYTES or entry.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"its pickle is compressed, or larger than {MAX_PICKLE_BYTES >> 20} MiB")
            load_storage = _StorageReader(archive, entry.filename.removesuffix("data.pkl"))
            return PickleMachine(load_storage).run_pickle(archive.read(entry))
    except OSError:
        raise
    except Exception as error:  # a damaged or hostile pickle can raise anything
        reason = (str(error) or type(error).__name__).splitlines()[0][:160]
        raise ValueError(
            f"got {path.name}, which cannot be read without executing its content ({reason}); expected a checkpoint as "
            "torch.save writes it; nothing was executed; fetch the file from its publisher again"
        ) from error


def get_dict_items(value: Any) -> dict[str, Any]:
    """The items of a PickledDict whose keys are strings; an empty dict of anything else."""
    return {key: item for key, item in value if isinstance(key, str)} if isinstance(value, PickledDict) else {}


def get_object_attributes(module: Any) -> dict[str, Any]:
    """The `__dict__` of a pickled object."""
    return get_dict_items(module.state) if isinstance(module, PickledObject) else {}


def get_child_modules(module: Any) -> dict[str, Any]:
    """The child modules of a pickled module by name."""
    return get_dict_items(get_object_attributes(module).get("_modules"))


def collect_state_dict(module: Any) -> dict[str, Tensor]:
    """A pickled module's parameters and persistent buffers by their dotted names, as `state_dict` gives them.

    Raises ValueError on more modules than any network has; a small file can nest modules endlessly.
    """
    return {
        key: value
        for prefix, child in _iterate_modules(module)
        for key, value in _iterate_module_tensors(child, prefix)
    }


def _iterate_modules(module: Any) -> Iterator[tuple[str, Any]]:
    queue = [("", module)]
    for _ in range(MAX_MODULES):
        prefix, current = queue.pop(0)
        yield prefix, current
        queue += [(f"{prefix}{name}.", child) for name, child in get_child_modules(current).items()]
        if not queue:
            return
        if len(queue) > MAX_MODULES or len(prefix) > MAX_MODULE_PATH_LENGTH:
            break
    raise ValueError("got modules that contain each other endlessly; expected a network; fetch the file again")


def _iterate_module_tensors(module: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    attributes = get_object_attributes(module)
    skipped = attributes.get("_non_persistent_buffers_set")
    if isinstance(skipped, PickledObject):  # set(...), as older protocols write it
        skipped = skipped.args[0] if skipped.args else []
    skipped = skipped if isinstance(skipped, list) else []
    for name, value in get_dict_items(attributes.get("_parameters")).items():
        if isinstance(value, Tensor):
            yield f"{prefix}{name}", value
    for name, value in get_dict_items(attributes.get("_buffers")).items():
        if isinstance(value, Tensor) and name not in skipped:
            yield f"{prefix}{name}", value
