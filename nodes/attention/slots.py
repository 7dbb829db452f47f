"""Patches in a model's attention layers. Each keeps the patch that it replaces and applies injections on top.

A KeyValueExtension changes the keys and values that an attention reads; an AttentionTerm is added to its output. Their
states were prepared before the model ran (CallState).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...likeness.attention.grouped_attention import KeyValueBlock, QueryGrouping, attend_blocks
from .injection import (
    AttentionTerm,
    Injection,
    KeyValueBlocks,
    KeyValueExtension,
    PatchPlace,
)
from .model_call import ModelCall

LIKENESS_KEY = "likeness"  # in the options of a model call: its CallState

AttentionReplacement = Callable[[Tensor, Tensor, Tensor, dict[str, Any]], Tensor]
AttentionBackend = Callable[[Tensor, Tensor, Tensor, dict[str, Any], Tensor | None], Tensor]


@dataclass(frozen=True)
class ActiveInjection:
    """The states and the gate of an injection that is on during this call."""

    states: Mapping[PatchPlace, Any]
    gate: Tensor | None


class LayerTensors:
    """What the patches of a layer hand on to each other. An attribute exists from when it is set until it is deleted.

    They are not put into the options of the layer: a compiled model expects the same keys there at every call.
    """

    keys_values: tuple[Tensor, Tensor]  # that the attention reads, of all rows
    attention_output: Tensor  # before any term
    self_attention_input: Tensor  # before any patch
    projected_output: Tensor  # of a self-attention behind its projection, before any term
    added_layer_output: Any  # the SelfAttentionOutput of FlashFace's added layer
    flux_queries: Tensor  # of the current FLUX block, [B, heads, N, C], text tokens first


@dataclass(frozen=True)
class CallState:
    """A model call, and the injections that are on during it, by their id.

    `image_rows` [rows, 1, 1] is 1 for the image's rows and 0 for a text stream's; None if there is no text stream.
    `layer` is refilled by each layer.
    """

    call: ModelCall
    active_injections: Mapping[int, ActiveInjection]
    image_rows: Tensor | None
    layer: LayerTensors = field(default_factory=LayerTensors)

    def get_state(self, injection: Injection, place: PatchPlace) -> Any:
        """An injection's state for a place; None if it does nothing there."""
        active = self.active_injections.get(id(injection))
        return None if active is None else active.states.get(place)


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


@dataclass(frozen=True, eq=False)
class AttentionSlot:
    """The patch of one attention layer: the patch that was there before, and the injections that act on it."""

    place: PatchPlace
    backend: AttentionBackend
    previous: AttentionReplacement | None
    injections: tuple[Injection, ...]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
        layer = get_layer_tensors(options)
        layer.keys_values = k, v
        layer.attention_output = out = self._attend(q, k, v, options)
        out = add_terms(self.injections, self.place, q, out, options)
        del layer.keys_values, layer.attention_output  # free them before the layers behind run
        return out

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
        """The attention; each chunk of rows attends to the blocks that the extensions give it."""
        call_state, is_text = get_call_state(options), self.place.name == "attn2"
        extensions = [
            (injection, state)
            for injection in self.injections
            if isinstance(injection, KeyValueExtension)
            and (state := call_state.get_state(injection, self.place)) is not None
        ]
        if not extensions:
            return self._run_backend(q, k, v, options) if self.previous is None else self.previous(q, k, v, options)
        out = None if self.previous is None else self.previous(q, k, v, options)
        chunks: list[Tensor] = []
        for c in range(len(call_state.call.roles)):
            rows = slice(c * call_state.call.rows_per_chunk, (c + 1) * call_state.call.rows_per_chunk)
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

    def __deepcopy__(self, memo: dict[int, Any]) -> AttentionSlot:
        return self  # immutable; the weights behind it are ComfyUI's to copy


@dataclass(frozen=True, eq=False)
class Attn1OutputPatch:
    """A patch behind every self-attention: the terms of one injection at its ATTN1_OUTPUT places."""

    injection: Injection

    def __call__(self, n: Tensor, options: dict[str, Any]) -> Tensor:
        block, depth = options["block"], options.get("block_index", 0)
        place = next((p for p in self.injection.places if (p.block, p.depth) == (block, depth)), None)
        if place is None:
            return n
        layer = get_layer_tensors(options)
        layer.projected_output = getattr(layer, "projected_output", n)
        return add_terms((self.injection,), place, layer.self_attention_input, n, options)

    def __deepcopy__(self, memo: dict[int, Any]) -> Attn1OutputPatch:
        return self


def keep_attention_input(
    n: Tensor, context: Tensor, value: Tensor, options: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """Keep the input of a self-attention for the patches of its output."""
    layer = get_layer_tensors(options)
    vars(layer).clear()
    layer.self_attention_input = n
    return n, context, value
