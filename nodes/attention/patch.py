"""How an injection enters a model: slots that wrap and never change. The only file that touches transformer_options.

A slot stands in one attention layer. It keeps what it found there, runs it, and adds its injections' terms. Once per
model call, before the UNet runs, each injection says whether it is on and lays out what its layers need; a layer only
looks that up. What is fixed for a run is kept in the injection's bank, which a run empties behind itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from comfy.ldm.modules.attention import optimized_attention
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...likeness.guidance import guide
from .injection import ATTENDED, OUTPUT, Branch, Call, Injection, Place

KEY = "likeness"
OPTIONS = "transformer_options"
# What travels in the host's options: of one prediction, of one model call, of one layer.
CONDS, BRANCHES = "likeness_conds", "likeness_branches"
ROLES, TEXT, SIGMA = "likeness_roles", "likeness_text", "likeness_sigma"
READ = "likeness_read"


Options = Mapping[str, Any]
Attention = Callable[[Tensor, Tensor, Tensor, dict[str, Any]], Tensor]


@dataclass(frozen=True)
class Active:
    """An injection that is on during this call."""

    states: Mapping[Place, Any]
    gate: Tensor | None


def _terms(injections: Sequence[Injection], place: Place, q: Tensor, out: Tensor, options: dict[str, Any]) -> Tensor:
    """The result of an attention with what the injections add to it."""
    active = options.get(KEY)
    if active is None:
        raise RuntimeError(
            "the model ran without its wrappers; expected a call by ComfyUI's samplers; sample the model with these"
        )
    for injection in injections:
        now = active.get(id(injection))
        if now is not None and place in now.states:
            term = injection.term(now.states[place], q, options)
            out = out + (term if now.gate is None else term * now.gate.to(term.dtype))
    return out


@dataclass(frozen=True, eq=False)
class Slot:
    """What stands in one attention layer: what we found there, and the injections that add to it."""

    place: Place
    base: Attention | None
    injections: tuple[Injection, ...]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
        out = self.base(q, k, v, options) if self.base is not None else host_attention(q, k, v, options)
        return _terms(self.injections, self.place, q, out, options)

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
        return _terms((self.injection,), place, options[READ], n, options)

    def __deepcopy__(self, memo: dict[int, Any]) -> Output:
        return self


def _keep_input(n: Tensor, context: Tensor, value: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Keep what a self-attention reads for the outputs behind it."""
    options[READ] = n
    return n, context, value


def host_attention(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any], mask: Tensor | None = None) -> Tensor:
    """The host's attention backend on [B, N, hidden], as its own layers call it."""
    return optimized_attention(
        q, k, v, options["n_heads"], mask, attn_precision=options.get("attn_precision"), transformer_options=options
    )


def attach(model: ModelPatcher, injection: Injection, branch: Branch | None = None) -> ModelPatcher:
    """A clone of the model with the injection in it. The given model and all its other clones stay as they are."""
    patched = model.clone()
    slots = [place for place in injection.places if place.name != OUTPUT]
    for place in slots:
        _stand(patched, place, injection)
    if len(slots) < len(injection.places):
        patches = patched.model_options["transformer_options"].setdefault("patches", {})
        if _keep_input not in patches.get("attn1_patch", ()):
            patches["attn1_patch"] = [_keep_input, *patches.get("attn1_patch", ())]  # before anyone changes it
        patched.set_model_attn1_output_patch(Output(injection))
    patched.set_additional_models(f"{KEY}.{id(injection)}", injection.patchers)
    before = _hooks(model)
    hooks = Hooks((*before.injections, injection), (*before.branches, *((branch,) if branch else ())))
    for kind, hook in hooks.wrappers.items():
        patched.remove_wrappers_with_key(kind, KEY)
        patched.add_wrapper_with_key(kind, KEY, hook)
    return patched


def _stand(patched: ModelPatcher, place: Place, injection: Injection) -> None:
    replaced = patched.model_options["transformer_options"].get("patches_replace", {})
    here, exact = replaced.get(place.name, {}), (*place.block, place.depth)
    key = exact if exact in here else place.key  # the host looks for the exact one first
    found = here.get(key, here.get(place.block))
    if isinstance(found, Slot) and found.place == place:
        slot = Slot(place, found.base, (*found.injections, injection))
    else:
        slot = Slot(place, found, (injection,))
    patched.set_model_patch_replace(slot, place.name, *key)


def injections(model: ModelPatcher) -> tuple[Injection, ...]:
    """What was attached to a model so far."""
    return _hooks(model).injections


def branches(model: ModelPatcher) -> tuple[Branch, ...]:
    """What guides a model beyond the host's own guidance."""
    return _hooks(model).branches


def inputs(unet: Any, x: Tensor, timesteps: Tensor, context: Tensor, places: Sequence[Place]) -> dict[Place, Tensor]:
    """What the self-attentions at `places` read [n, tokens, C] when a UNet sees x [n, C, H, W]. Nothing else is run.

    None of the patches of the model that the UNet belongs to take part.
    """
    wanted = {(place.block, place.depth): place for place in places}
    seen: dict[Place, Tensor] = {}

    def see(n: Tensor, context: Tensor, value: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        place = wanted.get((options["block"], options.get("block_index", 0)))
        if place is not None:
            seen[place] = n
            if len(seen) == len(wanted):
                raise _Enough
        return n, context, value

    with contextlib.suppress(_Enough):
        unet(x, timesteps, context=context, transformer_options={"patches": {"attn1_patch": [see]}})
    return seen


class _Enough(Exception):
    """All that was wanted has been seen."""


@dataclass(eq=False)
class _Branches:
    """What the branches of one prediction gave. An object, as dictionaries of options are copied on their way."""

    wanted: list[Branch]
    sigma: float
    positive: Tensor | None = None
    given: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Hooks:
    """What runs around the model for all injections of a patched model."""

    injections: tuple[Injection, ...] = ()
    branches: tuple[Branch, ...] = ()

    @property
    def wrappers(self) -> dict[str, Callable[..., Any]]:
        return {
            WrappersMP.OUTER_SAMPLE: self.run,
            WrappersMP.PREDICT_NOISE: self.predict,
            WrappersMP.CALC_COND_BATCH: self.batch,
            WrappersMP.DIFFUSION_MODEL: self.begin,
        }

    def run(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Empties the banks when a run ends, however it ends."""
        try:
            return executor(*args, **kwargs)
        finally:
            for injection in self.injections:
                injection.bank.clear()

    def predict(
        self, executor: Any, x: Tensor, timestep: Tensor, model_options: dict[str, Any] | None = None, seed: Any = None
    ) -> Any:
        """The guider alone knows its prompts by name: hand them on to where they are batched. Guide by the branches."""
        model_options = {**(model_options or {}), CONDS: executor.class_obj.conds}
        if not self.branches:
            return executor(x, timestep, model_options, seed)
        sigma = float(timestep.flatten()[0])  # banks and branches go by it: the one wait for the device in a step
        on = [branch for branch in self.branches if branch.window.inside(sigma)]
        ran = _Branches([b for b in on if b.scale and b.launch.inside(sigma)], sigma)
        denoised = executor(x, timestep, {**model_options, BRANCHES: ran}, seed)
        if not on:
            return denoised
        if ran.positive is None or len(ran.given) < len(ran.wanted):
            raise RuntimeError(
                f"got the guider {type(executor.class_obj).__name__}, which does not run its prompts through ComfyUI's "
                "own batches; expected one with a positive prompt that does; use KSampler or CFGGuider"
            )
        pushes = [b.scale * (ran.given[b.name] - ran.positive) for b in ran.wanted]
        return guide(x, timestep, denoised, ran.positive, pushes, max(b.rescale for b in on))

    def batch(
        self, executor: Any, model: Any, conds: list[Any], x: Tensor, timestep: Tensor, model_options: dict[str, Any]
    ) -> Any:
        """`cond_or_uncond` counts in this list: name its places, and let the branches' rows follow, once."""
        named = model_options.get(CONDS)
        if named is None:
            return executor(model, conds, x, timestep, model_options)
        names = [_name(cond, named) for cond in conds]
        ran: _Branches | None = model_options.get(BRANCHES)
        first = ran is not None and ran.positive is None and "positive" in names
        further = [b.name for b in ran.wanted] if ran is not None and first else []
        negative = next(iter(named.get("negative") or ()), None)
        own = {
            ROLES: (*names, *further),
            TEXT: None if negative is None else negative["model_conds"]["c_crossattn"].cond,
            SIGMA: None if ran is None else ran.sigma,
        }
        model_options = {**model_options, OPTIONS: {**model_options.get(OPTIONS, {}), **own}}
        out = executor(model, [*conds, *(list(named["positive"]) for _ in further)], x, timestep, model_options)
        if ran is not None and first:
            ran.positive = out[names.index("positive")]
            ran.given = dict(zip(further, out[len(conds) :], strict=True))
        return out[: len(conds)]

    def begin(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Before the UNet runs: decides which injections are on, and lays out what their places need."""
        options, args, kwargs = _own_options(args, kwargs)
        call = _call(args[0], args[1], options)
        active: dict[int, Active] = {}
        for injection in self.injections:
            gate = True if injection.window is None else injection.window.gate(options.get("sigmas"))
            if gate is not False:
                active[id(injection)] = Active(injection.prepare(call), gate if isinstance(gate, Tensor) else None)
        options[KEY] = active
        return executor(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Hooks:
        return self


def _name(cond: list[Any] | None, named: Mapping[str, list[Any]]) -> str:
    """The guider's name of a prompt. Context windows copy prompts; the host's mark on their parts stays."""
    same = (name for name, own in named.items() if own is cond)
    alike = (name for name, own in named.items() if cond and own and own[0].get("uuid") == cond[0].get("uuid"))
    return next(same, "") or next(alike, "")


def _hooks(model: ModelPatcher) -> Hooks:
    found: Any = model.get_wrappers(WrappersMP.DIFFUSION_MODEL, KEY)
    return found[0].__self__ if found else Hooks()


def _own_options(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[dict[str, Any], tuple[Any, ...], dict[str, Any]]:
    """A copy of the call's transformer_options, and the arguments with the copy in their place."""
    if OPTIONS in kwargs:
        options = dict(kwargs[OPTIONS])
        return options, args, {**kwargs, OPTIONS: options}
    index = max(i for i, arg in enumerate(args) if isinstance(arg, dict))  # a ControlNet's residuals come before
    options = dict(args[index])
    return options, (*args[:index], options, *args[index + 1 :]), kwargs


def _call(x: Tensor, timesteps: Tensor, options: Options) -> Call:
    chunks = options.get("cond_or_uncond", (0,))
    roles = options.get(ROLES)
    # Without a guider to ask, the host's own order holds: 0 is the positive prompt.
    names = tuple(("positive" if index == 0 else "negative") if roles is None else roles[index] for index in chunks)
    rows = x.shape[0] // len(chunks)
    return Call(names, rows, x.dtype, x.device, timesteps, options.get(SIGMA), options.get(TEXT))
