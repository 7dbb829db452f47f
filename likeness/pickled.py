"""Reads the tensors of a torch file that pickles whole modules, without importing or running anything it names.

The standard library takes the pickle apart into opcodes; the stack machine here carries them out on plain containers
alone. A class or function that the pickle names is a Name, what would be made with it an inert Record. Three are
understood and made anew: OrderedDict, and torch's two functions that make tensors of storages. A dictionary is a list
of pairs, as hashing what a hostile file nests could take for ever.
"""

from __future__ import annotations

import pickletools
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LIMIT = 1 << 26  # bytes of a pickle: names and numbers alone, the tensors lie beside it
MODULES, PATH = 10_000, 1000  # of one network, and letters of a module's path in it

STORAGES: Mapping[str, torch.dtype] = {
    "torch.FloatStorage": torch.float32, "torch.HalfStorage": torch.float16, "torch.BFloat16Storage": torch.bfloat16,
    "torch.DoubleStorage": torch.float64, "torch.LongStorage": torch.int64, "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16, "torch.CharStorage": torch.int8, "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}  # fmt: skip


class Pairs(list[tuple[Any, Any]]):
    """A dictionary: its keys and values, never hashed."""


@dataclass(frozen=True)
class Name:
    """A class or function, by its module and name."""

    name: str


@dataclass(eq=False)
class Record:
    """What stands in place of an object: who would have made it, of what, with which state and items."""

    name: str
    args: Any
    state: Any = None
    items: Pairs = field(default_factory=Pairs)


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Tensor:
    """torch._utils._rebuild_tensor_v2."""
    numbers = (offset, *size, *stride)
    if not isinstance(storage, Tensor) or not all(isinstance(n, int) and n >= 0 for n in numbers):
        raise ValueError("a tensor is not made of a storage and numbers")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if all(size) else -1
    if last >= len(storage) or torch.Size(size).numel() > len(storage):
        raise ValueError("a tensor is larger than its storage")
    return storage.as_strided(size, stride, offset)


UNDERSTOOD: Mapping[str, Callable[..., Any]] = {
    "collections.OrderedDict": lambda *_: Pairs(),
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
}

MARK = object()


class Machine:
    """The pickle's stack and memo."""

    def __init__(self, storage: Callable[[Any], Tensor]) -> None:
        self.storage = storage
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, data: bytes) -> Any:
        for opcode, arg, _ in pickletools.genops(data):
            if opcode.name not in OPCODES:
                raise ValueError(f"it holds the opcode {opcode.name}, which no torch file has")
            OPCODES[opcode.name](self, arg)
        return self.stack.pop()

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self, count: int) -> tuple[Any, ...]:
        """The last `count` values, which may be no marks."""
        values = tuple(self.stack[len(self.stack) - count :])
        if len(values) < count or any(value is MARK for value in values):
            raise ValueError("its stack runs empty")
        del self.stack[len(self.stack) - count :]
        return values

    def marked(self) -> tuple[Any, ...]:
        """The values since the last mark."""
        at = next(i for i in reversed(range(len(self.stack))) if self.stack[i] is MARK)
        values = tuple(self.stack[at + 1 :])
        del self.stack[at:]
        return values

    def make(self, who: Any, args: Any) -> None:
        name = who.name if isinstance(who, Name) else "an object"
        understood = UNDERSTOOD.get(name) if isinstance(args, tuple) else None
        self.push(Record(name, args) if understood is None else understood(*args))

    def named(self, module: Any, name: Any) -> None:
        self.push(Name(f"{module}.{name}"))

    def extend(self, values: tuple[Any, ...]) -> None:
        onto = self.stack[-1]
        if isinstance(onto, Record):
            onto.items.extend((None, value) for value in values)
        elif isinstance(onto, list) and not isinstance(onto, Pairs):
            onto.extend(values)
        else:
            raise ValueError("it appends to what is no list")

    def set_items(self, values: tuple[Any, ...]) -> None:
        onto = self.stack[-1].items if isinstance(self.stack[-1], Record) else self.stack[-1]
        if not isinstance(onto, Pairs) or len(values) % 2:
            raise ValueError("it sets items of what is no dictionary")
        onto.extend(zip(values[::2], values[1::2], strict=True))

    def build(self, _: Any) -> None:
        (state,) = self.pop(1)
        if isinstance(self.stack[-1], Record):
            self.stack[-1].state = state  # a dictionary's own attributes are nobody's


def _each(names: str, does: Callable[[Machine, Any], None]) -> dict[str, Callable[[Machine, Any], None]]:
    return dict.fromkeys(names.split(), does)


OPCODES: Mapping[str, Callable[[Machine, Any], None]] = {
    **_each("PROTO FRAME STOP", lambda m, arg: None),
    **_each("BININT BININT1 BININT2 INT LONG LONG1 LONG4 BINFLOAT FLOAT", Machine.push),
    **_each("BINUNICODE SHORT_BINUNICODE BINUNICODE8 UNICODE BINSTRING SHORT_BINSTRING STRING", Machine.push),
    **_each("BINBYTES SHORT_BINBYTES BINBYTES8", Machine.push),
    "NONE": lambda m, arg: m.push(None),
    "NEWTRUE": lambda m, arg: m.push(True),
    "NEWFALSE": lambda m, arg: m.push(False),
    "MARK": lambda m, arg: m.push(MARK),
    "POP": lambda m, arg: m.stack.__delitem__(-1),
    "EMPTY_TUPLE": lambda m, arg: m.push(()),
    "TUPLE1": lambda m, arg: m.push(m.pop(1)),
    "TUPLE2": lambda m, arg: m.push(m.pop(2)),
    "TUPLE3": lambda m, arg: m.push(m.pop(3)),
    "TUPLE": lambda m, arg: m.push(m.marked()),
    **_each("EMPTY_LIST EMPTY_SET", lambda m, arg: m.push([])),
    **_each("LIST FROZENSET", lambda m, arg: m.push(list(m.marked()))),
    "APPEND": lambda m, arg: m.extend(m.pop(1)),
    **_each("APPENDS ADDITEMS", lambda m, arg: m.extend(m.marked())),
    "EMPTY_DICT": lambda m, arg: m.push(Pairs()),
    "SETITEM": lambda m, arg: m.set_items(m.pop(2)),
    "SETITEMS": lambda m, arg: m.set_items(m.marked()),
    "GLOBAL": lambda m, arg: m.named(*arg.split(" ", 1)),
    "STACK_GLOBAL": lambda m, arg: m.named(*m.pop(2)),
    **_each("REDUCE NEWOBJ", lambda m, arg: m.make(*m.pop(2))),
    "NEWOBJ_EX": lambda m, arg: m.make(*m.pop(3)[:2]),
    "BUILD": Machine.build,
    "BINPERSID": lambda m, arg: m.push(m.storage(*m.pop(1))),
    **_each("BINPUT LONG_BINPUT PUT", lambda m, arg: m.memo.__setitem__(arg, m.stack[-1])),
    "MEMOIZE": lambda m, arg: m.memo.__setitem__(len(m.memo), m.stack[-1]),
    **_each("BINGET LONG_BINGET GET", lambda m, arg: m.push(m.memo[arg])),
}


class _Storages:
    """The storages that lie beside a pickle, each read once."""

    def __init__(self, archive: zipfile.ZipFile, folder: str) -> None:
        self._archive, self._folder = archive, folder
        self._read: dict[str, Tensor] = {}

    def __call__(self, pid: Any) -> Tensor:
        tag, kind, key, _, count = pid
        dtype = STORAGES.get(kind.name) if isinstance(kind, Name) else None
        if tag != "storage" or dtype is None or not isinstance(key, str) or not isinstance(count, int):
            raise ValueError("it names something beside it that is no storage")
        if key not in self._read:
            entry = self._archive.getinfo(f"{self._folder}data/{key}")
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != count * dtype.itemsize:
                raise ValueError(f"the storage {key} is not of the size that it claims")
            data = bytearray(self._archive.read(entry))
            self._read[key] = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return self._read[key]


def read(path: Path) -> Any:
    """What a torch file holds: Pairs, lists, tuples, plain values, tensors, Records. Raises ValueError.

    Nothing in the file is executed. A file that cannot be read this way is refused with the reason.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entry = next((one for one in archive.infolist() if one.filename.endswith("data.pkl")), None)
            if entry is None:
                raise ValueError("it has no data.pkl")
            if entry.file_size > LIMIT or entry.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"its pickle is compressed, or larger than {LIMIT >> 20} MiB")
            return Machine(_Storages(archive, entry.filename.removesuffix("data.pkl"))).run(archive.read(entry))
    except OSError:
        raise
    except Exception as error:  # whatever a damaged or hostile pickle makes the machine stumble over
        why = (str(error) or type(error).__name__).splitlines()[0][:160]
        raise ValueError(
            f"got {path.name}, which cannot be read without running what is in it ({why}); expected a checkpoint as "
            "torch.save writes it; nothing was executed; fetch the file from its publisher again"
        ) from error


def items(value: Any) -> dict[str, Any]:
    """The items of a dictionary that have a text for a key; none of anything else."""
    return {key: one for key, one in value if isinstance(key, str)} if isinstance(value, Pairs) else {}


def attributes(module: Any) -> dict[str, Any]:
    """What a pickled object had in its `__dict__`."""
    return items(module.state) if isinstance(module, Record) else {}


def children(module: Any) -> dict[str, Any]:
    """The modules inside a pickled module, by name."""
    return items(attributes(module).get("_modules"))


def state_dict(module: Any) -> dict[str, Tensor]:
    """A pickled module's parameters and lasting buffers by their dotted names, as its own `state_dict` gives them.

    Raises ValueError on more modules than any network has, which a file of few can nest.
    """
    return {key: value for prefix, one in _modules(module) for key, value in _own(one, prefix)}


def _modules(module: Any) -> Iterator[tuple[str, Any]]:
    waiting = [("", module)]
    for _ in range(MODULES):
        prefix, one = waiting.pop(0)
        yield prefix, one
        waiting += [(f"{prefix}{name}.", child) for name, child in children(one).items()]
        if not waiting:
            return
        if len(waiting) > MODULES or len(prefix) > PATH:
            break
    raise ValueError("got modules in one another without end; expected a network; fetch the file again")


def _own(module: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    own = attributes(module)
    passing = own.get("_non_persistent_buffers_set")
    if isinstance(passing, Record):  # set(...), as older protocols have it
        passing = passing.args[0] if passing.args else []
    gone = passing if isinstance(passing, list) else []
    for name, value in items(own.get("_parameters")).items():
        if isinstance(value, Tensor):
            yield f"{prefix}{name}", value
    for name, value in items(own.get("_buffers")).items():
        if isinstance(value, Tensor) and name not in gone:
            yield f"{prefix}{name}", value
