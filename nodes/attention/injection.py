"""What an apply node adds to a model, in the terms of this pack: places, windows, calls, branches, injections."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from torch import Tensor

from ...likeness.blocks import Block

OUTPUT = "attn1_output"
ATTENDED = "likeness_attended"
GIVEN = "likeness_given"  # in a layer's options: what its attention gave, ahead of all terms
KEYS = "likeness_keys"  # in a layer's options: the keys and values that it reads, of all rows
WHOLE = "likeness_whole"  # in a layer's options: height and width of the latent, where a guider tells
HERE = "likeness_here"  # in a layer's options: height and width of the latent that the model sees

TEXT_ROLE = "text of "  # how the role of a text stream's chunk begins; its prompt's name follows

Blocks = tuple[Block, ...]


@dataclass(frozen=True)
class Place:
    """One place of a model: its name, the host's block ("input", 4), its depth, and if others follow.

    At "attn1" and "attn2" a term is added to what the attention gives, ahead of the layer's own output projection; at
    OUTPUT to what a self-attention gives behind it.
    FLUX has places of its own (dit.py).
    """

    name: str
    block: tuple[str, int]
    depth: int = 0
    deep: bool = False

    @property
    def key(self) -> tuple[str | int, ...]:
        """Where packs register a patch for it: with the depth only where there are several."""
        return (*self.block, self.depth) if self.deep else self.block


@dataclass(frozen=True)
class Window:
    """When an injection is on: `end` < sigma <= `start`, so that windows that touch never overlap."""

    start: float
    end: float

    @classmethod
    def of(cls, model: ModelPatcher, start_percent: float, end_percent: float) -> Window:
        sampling: Any = model.get_model_object("model_sampling")
        start = sampling.percent_to_sigma(start_percent) if start_percent > 0.0 else math.inf
        end = sampling.percent_to_sigma(end_percent) if end_percent < 1.0 else -1.0  # the very last sigma may be 0
        return cls(float(start), float(end))

    @property
    def whole(self) -> bool:
        """Whether it covers every sampling."""
        return self.start == math.inf and self.end < 0

    def inside(self, sigma: float) -> bool:
        return self.end < sigma <= self.start

    def gate(self, sigma: Tensor | None) -> Tensor | bool:
        """On or off. Where the sigma lies on an accelerator: a factor 0 or 1 there, as asking for it would wait."""
        if sigma is None or self.whole:
            return True
        first = sigma.flatten()[0]
        inside = (first > self.end) & (first <= self.start)
        return bool(inside) if sigma.device.type == "cpu" else inside


ALWAYS = Window(math.inf, -1.0)


def window_inputs() -> list[io.Float.Input]:
    """The two inputs by which every apply node is told its window."""
    return [
        io.Float.Input(
            "start_percent", default=0.0, min=0.0, max=1.0, step=0.001,
            tooltip="Part of the sampling, 0 to 1, after which it sets in.",
        ),
        io.Float.Input(
            "end_percent", default=1.0, min=0.0, max=1.0, step=0.001,
            tooltip="Part of the sampling, 0 to 1, at which it ends.",
        ),
    ]  # fmt: skip


@dataclass(frozen=True)
class Call:
    """One call of the model, as an injection needs to know it.

    The rows are `len(roles)` chunks of `rows` each; a role is the guider's name of the chunk's prompt, "positive", or
    the name of a branch, or that of a text stream. `timesteps` [B] is what the UNet sees, `sigma` the noise where
    anything is stepwise, `text` [1, T, C] the negative prompt where the guider has one.
    """

    roles: tuple[str, ...]
    rows: int
    dtype: torch.dtype
    device: torch.device
    timesteps: Tensor = field(compare=False)
    sigma: float | None = field(compare=False)
    text: Tensor | None = field(compare=False)

    @property
    def conditional(self) -> tuple[bool, ...]:
        """Which chunks carry the identity: all but the negative prompts' and the text streams'."""
        return tuple("negative" not in role and not self.is_text(role) for role in self.roles)

    @staticmethod
    def is_text(role: str) -> bool:
        """Whether a chunk is a text stream, behind the picture's chunk of the same prompt."""
        return role.startswith(TEXT_ROLE)


@dataclass(frozen=True)
class Branch:
    """Rows of the positive prompt beside the guider's own, for guidance that the guider does not know.

    While `launch` is on, the rows run under the role `name`, and `scale` times their distance from the positive
    prompt's prediction is added to the guider's. While `window` is on, the sum is rescaled by `rescale`.
    """

    name: str
    scale: float
    rescale: float
    window: Window
    launch: Window


class Bank:
    """What an injection computed once and reads at every step: the few last, gone when the run ends."""

    LIMIT = 16

    def __init__(self) -> None:
        self._kept: dict[Hashable, Any] = {}

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        kept = self._kept.pop(key, None)
        self._kept[key] = make() if kept is None else kept
        if len(self._kept) > self.LIMIT:
            self._kept.pop(next(iter(self._kept)))
        return self._kept[key]

    def clear(self) -> None:
        self._kept.clear()

    def __len__(self) -> int:
        return len(self._kept)

    def __deepcopy__(self, memo: dict[int, Any]) -> Bank:
        return self  # hosts that deep-copy a model's options must not copy tensors with them


class Injection(ABC):
    """An adapter bound to an identity, a Term or an Extension: what an apply node adds to a model.

    Immutable but for its bank. `window` says when it is on, `bank` is what it keeps during a run.
    """

    window: Window
    bank: Bank

    @property
    def stepwise(self) -> bool:
        """Whether it needs the noise level as a number, for which a step waits for the device once."""
        return False

    @property
    def intrinsic(self) -> bool:
        """Whether the model is not itself without it, so that a stream of text alone runs with it too."""
        return False

    @property
    @abstractmethod
    def patchers(self) -> list[ModelPatcher]:
        """The weights it runs, for the host to load and free."""

    @property
    @abstractmethod
    def places(self) -> list[Place]:
        """The attention layers it touches."""

    @abstractmethod
    def prepare(self, call: Call) -> Mapping[Place, Any]:
        """Lay out what each place needs for such a call. Runs once per model call, outside every layer.

        Places that are left out get nothing.
        """


class Term(Injection):
    """An injection that adds to what an attention gives: out -> out + term."""

    @abstractmethod
    def term(self, state: Any, q: Tensor, options: dict[str, Any]) -> Tensor:
        """What a place adds to its attention's result [B, N, hidden], given what `prepare` laid out for it.

        `q` are the queries, options[GIVEN] what they were given; at OUTPUT, `q` is the layer's input, while
        options[ATTENDED] is what the layer made of it. FLUX has its queries split into heads (dit.py).
        """


class Extension(Injection):
    """An injection that changes what an attention reads: its blocks of keys and values, one softmax over them all.

    What it lays out for a place holds something for each chunk of rows; a chunk that gets None is left as it is.
    Unless its window is whole it is stepwise, as it can only be on or off.
    """

    @abstractmethod
    def extend(self, state: Any, blocks: Blocks, options: dict[str, Any]) -> Blocks:
        """The blocks that a chunk's rows read, given those found and what `prepare` laid out for the chunk."""
