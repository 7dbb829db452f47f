"""What stands in a model's attention layers: what was there before, and what injections make of it.

An extension changes the keys and values that an attention reads, a term is added to what the attention gives. What they
need at a layer was laid out before the model ran (Now).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...likeness.blocks import Block, attend_blocks, group
from .injection import ATTENDED, GIVEN, KEYS, Bank, Blocks, Call, Extension, Injection, Place, Term

KEY = "likeness"  # in the options of a call: what is going on, a Now
READ = "likeness_read"

Attention = Callable[[Tensor, Tensor, Tensor, dict[str, Any]], Tensor]
Backend = Callable[[Tensor, Tensor, Tensor, dict[str, Any], Tensor | None], Tensor]


@dataclass(frozen=True)
class Active:
    """An injection that is on during this call."""

    states: Mapping[Place, Any]
    gate: Tensor | None


@dataclass(frozen=True)
class Now:
    """A call of the model, and the injections that are on during it, by their id.

    `picture` [rows, 1, 1] is 1 at the picture's rows and 0 at a text stream's; None where there is no such stream.
    `queries` holds those of the FLUX block that runs, [B, heads, N, C], the text's first.
    """

    call: Call
    active: Mapping[int, Active]
    picture: Tensor | None
    queries: list[Tensor] = field(default_factory=list)

    def state(self, injection: Injection, place: Place) -> Any:
        """What an injection has laid out for a place; None where it has nothing to do there."""
        active = self.active.get(id(injection))
        return None if active is None else active.states.get(place)


def now_of(options: dict[str, Any]) -> Now:
    """What is going on in a call. Raises RuntimeError where it did not come by way of the wrappers."""
    now = options.get(KEY)
    if now is None:
        raise RuntimeError(
            "the model ran without its wrappers; expected a call by ComfyUI's samplers; sample the model with these"
        )
    return now


def and_terms(injections: Sequence[Injection], place: Place, q: Tensor, out: Tensor, options: dict[str, Any]) -> Tensor:
    """The result of an attention with what the injections add to it."""
    now = now_of(options)
    for injection in injections:
        state = now.state(injection, place)
        if state is not None and isinstance(injection, Term):
            term, gate = injection.term(state, q, options), now.active[id(injection)].gate
            term = term if gate is None else term * gate.to(term.dtype)
            out = out + (term if now.picture is None or injection.intrinsic else term * now.picture)
    return out


@dataclass(frozen=True, eq=False)
class Slot:
    """What stands in one attention layer: what we found there, and the injections that extend it or add to it."""

    place: Place
    backend: Backend
    base: Attention | None
    injections: tuple[Injection, ...]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
        options[KEYS] = k, v
        options[GIVEN] = out = self._attend(q, k, v, options)
        return and_terms(self.injections, self.place, q, out, options)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
        """The attention, each chunk of rows over the blocks that the extensions make for it."""
        now, extensions = now_of(options), [i for i in self.injections if isinstance(i, Extension)]
        laid = [(i, state) for i in extensions if (state := now.state(i, self.place)) is not None]
        if not laid:
            return self._host(q, k, v, options) if self.base is None else self.base(q, k, v, options)
        out = None if self.base is None else self.base(q, k, v, options)
        chunks: list[Tensor] = []
        for c in range(len(now.call.roles)):
            rows = slice(c * now.call.rows, (c + 1) * now.call.rows)
            own = [(injection, state[c]) for injection, state in laid if state[c] is not None]
            if out is not None and not own:
                chunks.append(out[rows])
                continue
            extended = self._extended(q[rows], k[rows], v[rows], own, options)
            if out is not None:  # what was here before is kept as what it changed
                extended = out[rows] + extended - self._host(q[rows], k[rows], v[rows], options)
            chunks.append(extended)
        return torch.cat(chunks)

    def _host(self, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
        return self.backend(q, k, v, options, None)

    def _extended(
        self, q: Tensor, k: Tensor, v: Tensor, extensions: Sequence[tuple[Extension, Any]], options: dict[str, Any]
    ) -> Tensor:
        """The attention of a chunk's rows over the layer's own keys and those that the extensions bring."""
        blocks: Blocks = (Block(k, v),)
        for extension, state in extensions:
            blocks = extension.extend(state, blocks, options)
        seen = [block.seen for block in blocks]
        # The groups depend on the regions alone. What they were made of is kept with them: no id is used again.
        bank = extensions[0][0].bank if extensions else Bank()
        key = ("groups", *map(id, seen), len(q), q.device)
        _, groups = bank.get(key, lambda: (seen, group(seen, len(q), q.device)))
        return attend_blocks(q, blocks, groups, lambda q, k, v, bias: self.backend(q, k, v, options, bias))

    def add(self, *_args: Any, **_kwargs: Any) -> None:
        """Other packs call this on what they find in their place; doing as they ask would change upstream models."""
        raise ValueError(
            "another pack's node follows Apply Identity and wants to change it in place; "
            "put that node before Apply Identity: patches that it finds are kept"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Slot:
        return self  # immutable, and the weights behind it are the host's to copy or not


@dataclass(frozen=True, eq=False)
class Output:
    """What follows every self-attention: the terms of one injection, at its OUTPUT places."""

    injection: Injection

    def __call__(self, n: Tensor, options: dict[str, Any]) -> Tensor:
        block, depth = options["block"], options.get("block_index", 0)
        place = next((p for p in self.injection.places if (p.block, p.depth) == (block, depth)), None)
        if place is None:
            return n
        options.setdefault(ATTENDED, n)
        return and_terms((self.injection,), place, options[READ], n, options)

    def __deepcopy__(self, memo: dict[int, Any]) -> Output:
        return self


def keep_input(n: Tensor, context: Tensor, value: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Keep what a self-attention reads for the outputs behind it."""
    options[READ] = n
    return n, context, value
