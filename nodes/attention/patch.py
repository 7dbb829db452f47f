"""How an injection enters a model: slots that wrap and never change. The only file that touches transformer_options.

A slot stands in one attention layer. It keeps what it found there, runs it, and adds its injections' terms. Once per
model call, before the UNet runs, each injection says whether it is on and lays out what its layers need; a layer only
looks that up. What is fixed for a run is kept in the injection's bank, which a run empties behind itself.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

KEY = "likeness"
CONDS = "likeness_conds"
ROLES = "likeness_roles"

Options = Mapping[str, Any]
Attention = Callable[[Tensor, Tensor, Tensor, dict[str, Any]], Tensor]


@dataclass(frozen=True)
class Place:
    """One attention of a UNet: "attn1" or "attn2", the host's block ("input", 4), its depth, and if others follow."""

    name: str
    block: tuple[str, int]
    depth: int
    deep: bool

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
        end = sampling.percent_to_sigma(end_percent) if end_percent < 1.0 else -1.0  # the very last sigma may be 0
        return cls(float(sampling.percent_to_sigma(start_percent)), float(end))

    def gate(self, sigma: Tensor | None) -> Tensor | bool:
        """On or off. Where the sigma lies on an accelerator: a factor 0 or 1 there, as asking for it would wait."""
        if sigma is None:
            return True
        first = sigma.flatten()[0]
        inside = (first > self.end) & (first <= self.start)
        return bool(inside) if sigma.device.type == "cpu" else inside


@dataclass(frozen=True)
class Call:
    """One call of the model, as an injection needs to know it.

    The rows are `len(conditional)` chunks of `rows` each; `conditional` says which chunks carry the identity.
    """

    conditional: tuple[bool, ...]
    rows: int
    dtype: torch.dtype
    device: torch.device


class Bank:
    """What an injection computed once and reads at every step: the few last, gone when the run ends."""

    LIMIT = 8

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


class Injection(Protocol):
    """An adapter bound to an identity: what an apply node adds to a model. Immutable but for its bank."""

    @property
    def window(self) -> Window:
        """When it is on."""
        ...

    @property
    def bank(self) -> Bank:
        """What it keeps during a run."""
        ...

    @property
    def patchers(self) -> list[ModelPatcher]:
        """The weights it runs, for the host to load and free."""
        ...

    @property
    def places(self) -> list[Place]:
        """The attention layers it touches."""
        ...

    def prepare(self, call: Call) -> Mapping[Place, Any]:
        """Lay out what each place needs for such a call. Runs once per model call, outside every layer."""
        ...

    def term(self, state: Any, q: Tensor, options: dict[str, Any]) -> Tensor:
        """What a place adds to its attention's result [B, N, hidden], given what `prepare` laid out for it."""
        ...


@dataclass(frozen=True)
class Active:
    """An injection that is on during this call."""

    states: Mapping[Place, Any]
    gate: Tensor | None


@dataclass(frozen=True, eq=False)
class Slot:
    """What stands in one attention layer: what we found there, and the injections that add to it."""

    place: Place
    base: Attention | None
    injections: tuple[Injection, ...]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
        out = self.base(q, k, v, options) if self.base is not None else host_attention(q, k, v, options)
        active = options.get(KEY)
        if active is None:
            raise RuntimeError(
                "the model ran without its wrappers; expected a call by ComfyUI's samplers; sample the model with these"
            )
        for injection in self.injections:
            now = active.get(id(injection))
            if now is not None:
                term = injection.term(now.states[self.place], q, options)
                out = out + (term if now.gate is None else term * now.gate.to(term.dtype))
        return out

    def add(self, *_args: Any, **_kwargs: Any) -> None:
        """Other packs call this on what they find in their place; doing as they ask would change upstream models."""
        raise ValueError(
            "another pack's node follows Apply Identity and wants to change it in place; "
            "put that node before Apply Identity: patches that it finds are kept"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Slot:
        return self  # immutable, and the weights behind it are the host's to copy or not


def host_attention(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any], mask: Tensor | None = None) -> Tensor:
    """The host's attention backend on [B, N, hidden], as its own layers call it."""
    return optimized_attention(
        q, k, v, options["n_heads"], mask, attn_precision=options.get("attn_precision"), transformer_options=options
    )


def attach(model: ModelPatcher, injection: Injection) -> ModelPatcher:
    """A clone of the model with the injection in it. The given model and all its other clones stay as they are."""
    patched = model.clone()
    replaced = patched.model_options["transformer_options"].get("patches_replace", {})
    for place in injection.places:
        here, exact = replaced.get(place.name, {}), (*place.block, place.depth)
        key = exact if exact in here else place.key  # the host looks for the exact one first
        found = here.get(key, here.get(place.block))
        if isinstance(found, Slot) and found.place == place:
            slot = Slot(place, found.base, (*found.injections, injection))
        else:
            slot = Slot(place, found, (injection,))
        patched.set_model_patch_replace(slot, place.name, *key)
    patched.set_additional_models(f"{KEY}.{id(injection)}", injection.patchers)
    patched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, _Begin(injection))
    patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, _Run(injection))
    if not patched.get_wrappers(WrappersMP.PREDICT_NOISE, KEY):
        patched.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, KEY, _keep_conds)
        patched.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, _name_roles)
    return patched


@dataclass(frozen=True, eq=False)
class _Run:
    """Empties the bank when a run ends, however it ends."""

    injection: Injection

    def __call__(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return executor(*args, **kwargs)
        finally:
            self.injection.bank.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> _Run:
        return self


@dataclass(frozen=True, eq=False)
class _Begin:
    """Before the UNet runs: decides whether the injection is on, and lays out what its places need."""

    injection: Injection

    def __call__(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        options, args, kwargs = _own_options(args, kwargs)
        active = dict(options.get(KEY, {}))
        gate = self.injection.window.gate(options.get("sigmas"))
        if gate is not False:
            states = self.injection.prepare(_call(args[0], options))
            active[id(self.injection)] = Active(states, gate if isinstance(gate, Tensor) else None)
        options[KEY] = active
        return executor(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Begin:
        return self


def _own_options(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[dict[str, Any], tuple[Any, ...], dict[str, Any]]:
    """A copy of the call's transformer_options, and the arguments with the copy in their place."""
    if "transformer_options" in kwargs:
        options = dict(kwargs["transformer_options"])
        return options, args, {**kwargs, "transformer_options": options}
    index = max(i for i, arg in enumerate(args) if isinstance(arg, dict))  # a ControlNet's residuals come before
    options = dict(args[index])
    return options, (*args[:index], options, *args[index + 1 :]), kwargs


def _call(x: Tensor, options: Options) -> Call:
    chunks = options.get("cond_or_uncond", (0,))
    roles = options.get(ROLES)
    # Without a guider to ask, the host's own order holds: 0 is the positive prompt.
    conditional = tuple(index == 0 if roles is None else roles[index] for index in chunks)
    return Call(conditional, x.shape[0] // len(chunks), x.dtype, x.device)


def _keep_conds(
    executor: Any, x: Tensor, timestep: Tensor, model_options: dict[str, Any] | None = None, seed: Any = None
) -> Any:
    """The guider alone knows its prompts by name: hand them on to where they are batched."""
    return executor(x, timestep, {**(model_options or {}), CONDS: executor.class_obj.conds}, seed)


def _name_roles(
    executor: Any, model: Any, conds: list[Any], x: Tensor, timestep: Tensor, model_options: dict[str, Any]
) -> Any:
    """`cond_or_uncond` counts in this list. Say of each place whether its prompt carries the identity."""
    named = model_options.get(CONDS)
    if named is not None:
        negative = [cond for name, cond in named.items() if "negative" in name]
        roles = tuple(not any(cond is other for other in negative) for cond in conds)
        model_options = {
            **model_options,
            "transformer_options": {**model_options.get("transformer_options", {}), ROLES: roles},
        }
    return executor(model, conds, x, timestep, model_options)
