"""What an apply node adds to a model: patch places, guidance branches, injections."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...likeness.attention.grouped_attention import KeyValueBlock
from .model_call import ModelCall
from .schedule import Schedule

ATTN1_OUTPUT = "attn1_output"
# Keys in the options that a layer gets.
FULL_LATENT_SIZE_OPTION = "likeness_full_latent_size"  # height and width of the latent, if a guider sets it
LATENT_SIZE_OPTION = "likeness_latent_size"  # height and width of the latent that the model gets

KeyValueBlocks = tuple[KeyValueBlock, ...]
State = TypeVar("State")


@dataclass(frozen=True)
class PatchPlace:
    """A place in a model where an injection acts.

    `block` is ComfyUI's name of the block, ("input", 4); `depth` is the index of the transformer block in it, and
    `is_multi_block` says whether it has several. At "attn1" and "attn2" a term is added to the attention's output
    before the output projection, at ATTN1_OUTPUT behind it. The places of FLUX are in flux_terms.py.
    """

    name: str
    block: tuple[str, int]
    depth: int = 0
    is_multi_block: bool = False

    @property
    def patch_key(self) -> tuple[str | int, ...]:
        """The key under which packs register a patch: with the depth only if the block has several."""
        return (*self.block, self.depth) if self.is_multi_block else self.block


@dataclass(frozen=True)
class GuidanceBranch:
    """Further rows of the positive prompt, for guidance that ComfyUI's guiders do not have.

    During `launch_schedule`, the rows run with the role `name`, and `scale` times the difference between their
    prediction and the positive prompt's is added to the guider's result. During `schedule`, the result is rescaled by
    `rescale`.
    """

    name: str
    scale: float
    rescale: float
    schedule: Schedule
    launch_schedule: Schedule


class RunCache:
    """What an injection keeps during a sampling run: the last few results, and one state. Emptied when the run ends."""

    MAX_ENTRIES = 16

    def __init__(self) -> None:
        self._entries: dict[Hashable, Any] = {}
        self._state: Any = None

    def get_or_compute(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        cached = self._entries.pop(key, None)
        self._entries[key] = compute() if cached is None else cached
        if len(self._entries) > self.MAX_ENTRIES:
            self._entries.pop(next(iter(self._entries)))
        return self._entries[key]

    def get_state(self, state_class: Callable[[], State]) -> State:
        """The injection's mutable state of this run, made at the first use. It is never evicted."""
        if self._state is None:
            self._state = state_class()
        return self._state

    def clear(self) -> None:
        self._entries.clear()
        self._state = None

    def __len__(self) -> int:
        return len(self._entries) + (self._state is not None)

    def __deepcopy__(self, memo: dict[int, Any]) -> RunCache:
        return self  # ComfyUI versions that deep-copy model_options must not copy tensors with them


class Injection(ABC):
    """An adapter bound to an identity, as an AttentionTerm or a KeyValueExtension: what an apply node adds to a model.

    Immutable except for `run_cache`. It is on during `schedule`.
    """

    schedule: Schedule
    run_cache: RunCache

    @property
    def needs_sigma(self) -> bool:
        """Whether it needs sigma as a number, which costs one device sync per step."""
        return False

    @property
    def is_part_of_model(self) -> bool:
        """Whether the model was trained with it, so that text streams run with it, too."""
        return False

    @property
    @abstractmethod
    def patchers(self) -> list[ModelPatcher]:
        """The weights it uses, for ComfyUI to load and free."""

    @property
    @abstractmethod
    def places(self) -> list[PatchPlace]:
        """The places that it patches."""

    @abstractmethod
    def prepare_states(self, call: ModelCall) -> Mapping[PatchPlace, Any]:
        """What each place needs during the call. Runs once per model call, before the first layer.

        Nothing is done at places that are left out.
        """


class AttentionTerm(Injection):
    """An injection that adds to the output of an attention: out -> out + term."""

    @abstractmethod
    def compute_term(self, state: Any, q: Tensor, options: dict[str, Any]) -> Tensor:
        """The term at a place, [B, N, hidden] like the attention's output, from the place's state.

        `q` are the queries; at ATTN1_OUTPUT, `q` is the input of the layer. More is in the call's LayerTensors. In
        FLUX, `q` is split into heads (flux_terms.py).
        """


class KeyValueExtension(Injection):
    """An injection that changes the keys and values of an attention: blocks of them, with one softmax over all.

    The state of a place has one entry per chunk of rows; None leaves the chunk unchanged. Unless it is always on it
    needs sigma, as an extension is either on or off.
    """

    @abstractmethod
    def extend_blocks(self, state: Any, blocks: KeyValueBlocks, options: dict[str, Any]) -> KeyValueBlocks:
        """The blocks that a chunk's rows attend to, from the blocks so far and the chunk's state."""
