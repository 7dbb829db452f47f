"""Patches in a model's attention layers. Each keeps the patch that it replaces and applies injections on top.

A KeyValueExtension changes the keys and values that an attention reads; an AttentionTerm is added to its output. Their
states were prepared before the model ran (CallState).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...likeness.attention.grouped_attention import KeyValueBlock, QueryGrouping, attend_blocks
from .injection import (
    ATTN1_OUTPUT,
    AttentionTerm,
    Injection,
    KeyValueBlocks,
    KeyValueExtension,
    PatchPlace,
)
from .model_call import ModelCall

LIKENESS_KEY = "likeness"  # in the options of a model call: its CallState

PACKAGE_NAME = __name__.partition(".nodes.")[0]

Function = TypeVar("Function", bound=Callable[..., Any])
AttentionReplacement = Callable[[Tensor, Tensor, Tensor, dict[str, Any]], Tensor]
AttentionBackend = Callable[[Tensor, Tensor, Tensor, dict[str, Any], Tensor | None], Tensor]


def exclude_from_compile(function: Function) -> Function:
    """Keep a function out of compiled models, as what it decides changes from step to step."""
    excluded: Any = torch.compiler.disable(function)
    return excluded


@dataclass(frozen=True)
class ActiveInjection:
    """The states and the gate of an injection that is on during this call."""

    states: Mapping[PatchPlace, Any]
    gate: Tensor | None


class LayerTensors:
    """What the patches of a layer hand on to each other. An attribute exists from when it is set until it is deleted.

    They are not put into the options of the layer: a compiled model expects the same keys there at every call. (The
    patches themselves are not compiled, as what they do changes from step to step.)
    """

    running_patch: Any  # the key of the outermost patch that runs (run_patch)
    has_acted: bool
    keys_values: tuple[Tensor, Tensor]  # that the attention reads, of all rows
    attention_output: Tensor  # before any term
    self_attention_input: Tensor  # before any patch
    projected_output: Tensor  # of a self-attention behind its projection, before any term
    added_layer_output: Any  # the SelfAttentionOutput of FlashFace's added layer
    flux_queries: Tensor  # of the current FLUX block, [B, heads, N, C], text tokens first

    def run_patch(self, key: Any, run_previous: Callable[[], Any], act: Callable[[Any], Any]) -> Any:
        """The output of a patch: that of the one around which it stands, changed by `act`.

        A patch of another pack may have kept an earlier patch of ours and call it, while a later one stands around it.
        If both do the same (their keys are equal) the inner one acts, else the outer one alone.
        """
        outer = getattr(self, "running_patch", None)
        if outer not in (None, key):
            return run_previous()
        self.running_patch, self.has_acted = key, False
        out = run_previous()
        if not self.has_acted:
            out, self.has_acted = act(out), True
        if outer is None:
            del self.running_patch
        return out


@dataclass(frozen=True)
class CallState:
    """A model call, and the injections that are on during it, by their id.

    `image_rows` [rows, 1, 1] is 1 for the image's rows and 0 for a text stream's; None if there is no text stream.
    `patch_lists` are ComfyUI's lists of patches in this call. `layer` is refilled by each layer.
    """

    call: ModelCall
    active_injections: Mapping[int, ActiveInjection]
    image_rows: Tensor | None
    patch_lists: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    layer: LayerTensors = field(default_factory=LayerTensors)

    def get_state(self, injection: Injection, place: PatchPlace) -> Any:
        """An injection's state for a place; None if it does nothing there."""
        active = self.active_injections.get(id(injection))
        return None if active is None else active.states.get(place)

    def is_any_on(self, injections: Sequence[Injection], place: PatchPlace) -> bool:
        """Whether an injection does something at a place."""
        return any(self.get_state(injection, place) is not None for injection in injections)


def get_call_state(options: dict[str, Any]) -> CallState:
    """The state of the current call. Raises RuntimeError if the model was called without our wrappers."""
    call_state = options.get(LIKENESS_KEY)
    if call_state is None:
        raise RuntimeError(
            "the model was called without its wrappers; expected a call by ComfyUI's samplers; use one of them"
        )
    return call_state


def get_layer_tensors(options: dict[str, Any]) -> LayerTensors:
    """What the patches of the current layer have handed on."""
    return get_call_state(options).layer


def check_token_order(size: Sequence[int], expected: Sequence[int], options: dict[str, Any]) -> None:
    """Raise ValueError unless the sizes [rows, tokens] are the same."""
    if tuple(size) == tuple(expected):
        return
    patches = [patch for patches in get_call_state(options).patch_lists.values() for patch in patches]
    names = sorted({name for patch in patches if not (name := get_patch_owner(patch)).startswith(PACKAGE_NAME)})
    raise ValueError(
        f"remove the node {' or '.join(names) or 'that re-orders the tokens of the attentions'}; got {size[0]} x "
        f"{size[1]} tokens in block {options.get('block')}; expected {expected[0]} x {expected[1]}"
    )


def get_patch_owner(patch: Any) -> str:
    """The class in which a patch was made, or its module if there is none."""
    name, _, is_nested = getattr(patch, "__qualname__", type(patch).__qualname__).partition(".")
    return name if is_nested else getattr(patch, "__module__", name)


def add_terms(
    injections: Sequence[Injection], place: PatchPlace, q: Tensor, out: Tensor, options: dict[str, Any]
) -> Tensor:
    """The output of an attention plus the terms of the injections."""
    call_state = get_call_state(options)
    for injection in injections:
        state = call_state.get_state(injection, place)
        if state is not None and isinstance(injection, AttentionTerm):
            gate, image_rows = call_state.active_injections[id(injection)].gate, call_state.image_rows
            term = injection.compute_term(state, q, options)
            term = term if gate is None else term * gate.to(term.dtype)
            out = out + (term if image_rows is None or injection.is_part_of_model else term * image_rows)
    return out


class OuterPatch:
    """A patch in the place of another, which ComfyUI therefore no longer sees: it passes on what ComfyUI asks of that.

    A subclass is a dataclass with the field `replaced`.
    """

    replaced: Any

    def to(self, device_or_dtype: torch.device | torch.dtype) -> OuterPatch:
        if not hasattr(self.replaced, "to"):
            return self
        moved = self.replaced.to(device_or_dtype)
        return self if moved is self.replaced else replace(self, replaced=moved)  # pyright: ignore

    def models(self) -> list[ModelPatcher]:
        return self.replaced.models() if hasattr(self.replaced, "models") else []

    def cleanup(self) -> None:
        if hasattr(self.replaced, "cleanup"):
            self.replaced.cleanup()

    def __deepcopy__(self, memo: dict[int, Any]) -> OuterPatch:
        return self  # immutable; the weights behind it are ComfyUI's to copy


@dataclass(frozen=True, eq=False)
class AttentionSlot(OuterPatch):
    """The patch of one attention layer: the patch around which it stands, and the injections that act on it.

    That is the patch `replaced` that stood in its place, or else `block_patch`, one for all attentions of the block.
    """

    place: PatchPlace
    backend: AttentionBackend
    replaced: AttentionReplacement | None
    injections: tuple[Injection, ...]
    block_patch: AttentionReplacement | None = None

    @property
    def previous(self) -> AttentionReplacement | None:
        return self.block_patch if self.replaced is None else self.replaced

    @exclude_from_compile
    def __call__(self, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
        call_state = get_call_state(options)
        layer, previous = call_state.layer, self.previous

        def run_previous() -> Tensor | None:
            return None if previous is None else previous(q, k, v, options)

        def act(out: Tensor | None) -> Tensor:
            layer.keys_values = own_k, own_v = self._match_rows(q, k, options), self._match_rows(q, v, options)
            layer.attention_output = attended = self._attend(q, own_k, own_v, out, options)
            with_terms = add_terms(self.injections, self.place, q, attended, options)
            del layer.keys_values, layer.attention_output  # free them before the layers behind run
            return with_terms

        is_on = call_state.is_any_on(self.injections, self.place)
        out = layer.run_patch((self.place, self.injections), run_previous, act) if is_on else run_previous()
        return self._run_backend(q, k, v, options) if out is None else out

    def _match_rows(self, q: Tensor, keys: Tensor, options: dict[str, Any]) -> Tensor:
        """Keys or values with the rows of the queries.

        If a patch in front of a self-attention has split the queries into tiles, each tile gets a part of its row's
        keys, as in ComfyUI's backends. Raises ValueError if the rows are not those of the model or tiles of them.
        """
        num_rows = get_call_state(options).call.num_rows
        num_tiles = len(q) // num_rows
        if self.place.name != "attn1" or keys.shape[1] % max(num_tiles, 1):
            num_tiles = 1
        check_token_order((len(q), q.shape[1]), (num_tiles * num_rows, q.shape[1]), options)
        return keys.reshape(len(q), -1, keys.shape[-1]) if len(keys) != len(q) else keys

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, options: dict[str, Any]) -> Tensor:
        """The attention; each chunk of rows attends to the blocks that the extensions give it.

        `out` is the output of the previous patch.
        """
        call_state, is_text = get_call_state(options), self.place.name == "attn2"
        extensions = [
            (injection, state)
            for injection in self.injections
            if isinstance(injection, KeyValueExtension)
            and (state := call_state.get_state(injection, self.place)) is not None
        ]
        if not extensions:
            return self._run_backend(q, k, v, options) if out is None else out
        chunks: list[Tensor] = []
        rows_per_chunk = len(q) // len(call_state.call.roles)
        for c in range(len(call_state.call.roles)):
            rows = slice(c * rows_per_chunk, (c + 1) * rows_per_chunk)
            chunk_extensions = [(injection, state[c]) for injection, state in extensions if state[c] is not None]
            if out is not None and not chunk_extensions:
                chunks.append(out[rows])
                continue
            own_k, own_v = (call_state.call.remove_repeated_text(c, t[rows]) if is_text else t[rows] for t in (k, v))
            extended = self._attend_extended(q[rows], own_k, own_v, chunk_extensions, options)
            if out is not None:  # keep the difference that the previous patch makes
                extended = out[rows] + extended - self._run_backend(q[rows], k[rows], v[rows], options)
            chunks.append(extended)
        return torch.cat(chunks)

    def _run_backend(self, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
        return self.backend(q, k, v, options, None)

    def _attend_extended(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        extensions: Sequence[tuple[KeyValueExtension, Any]],
        options: dict[str, Any],
    ) -> Tensor:
        """The attention of a chunk's rows over the layer's own keys and those of the extensions."""
        if not extensions:
            return self._run_backend(q, k, v, options)
        blocks: KeyValueBlocks = (KeyValueBlock(k, v),)
        for extension, state in extensions:
            blocks = extension.extend_blocks(state, blocks, options)
        visible = [block.visible_queries for block in blocks]
        grouping = extensions[0][0].run_cache.get_or_compute(
            ("groups", *map(id, visible), q.device),  # the grouping holds the masks, so that no id is reused
            lambda: QueryGrouping(visible, q.device),
        )
        groups = grouping.group_rows(get_call_state(options).call.images)
        return attend_blocks(q, blocks, groups, lambda q, k, v, bias: self.backend(q, k, v, options, bias))

    def add(self, *_args: Any, **_kwargs: Any) -> None:
        """Called by other packs on the patch that they find. Doing what they ask would change upstream models."""
        raise ValueError(
            "another pack's node follows Apply Identity and wants to change its patch in place; "
            "put that node before Apply Identity, which keeps the patches that it finds"
        )


@dataclass(frozen=True, eq=False)
class Attn1OutputPatch:
    """The patch behind every self-attention: the terms of the injections at their ATTN1_OUTPUT places."""

    injections: tuple[Injection, ...]

    @cached_property
    def _places(self) -> Mapping[tuple[tuple[str, int], int], PatchPlace]:
        places = (place for injection in self.injections for place in injection.places)
        return {(place.block, place.depth): place for place in places if place.name == ATTN1_OUTPUT}

    @exclude_from_compile
    def __call__(self, n: Tensor, options: dict[str, Any]) -> Tensor:
        place, call_state = self._places.get((options["block"], options.get("block_index", 0))), get_call_state(options)
        if place is None or not call_state.is_any_on(self.injections, place):
            return n
        layer = call_state.layer
        attention_input, layer.projected_output = layer.self_attention_input, n
        check_token_order(n.shape[:2], attention_input.shape[:2], options)
        out = add_terms(self.injections, place, attention_input, n, options)
        vars(layer).clear()
        return out

    def __deepcopy__(self, memo: dict[int, Any]) -> Attn1OutputPatch:
        return self


@exclude_from_compile
def keep_attention_input(
    n: Tensor, context: Tensor, value: Tensor, options: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """Keep the input of a self-attention for the patches of its output."""
    get_layer_tensors(options).self_attention_input = n
    return n, context, value
