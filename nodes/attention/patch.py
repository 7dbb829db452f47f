"""How an injection enters a model: slots that wrap and never change. The only file that touches transformer_options.

Slots stand in the attention layers (slots.py). Once per model call, before the UNet runs, each injection says whether
it is on and lays out what its layers need; a layer only looks that up. What is fixed for a run is kept in the
injection's bank, which a run empties behind itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...likeness.guidance import guide
from . import streams
from .dit import CELLS, EVERYTHING, PICTURE, QUERIED, STREAM, Joint, behind, keep_queries
from .injection import HERE, OUTPUT, TEXT_ROLE, WHOLE, Branch, Call, Injection, Place
from .slots import KEY, Active, Now, Output, Slot, keep_input

OPTIONS = "transformer_options"
# What travels in the host's options of one prediction and one model call.
CONDS, BRANCHES = "likeness_conds", "likeness_branches"
ROLES, TEXT, SIGMA = "likeness_roles", "likeness_text", "likeness_sigma"

# Places behind an attention: what keeps what their terms read as it begins, and what adds these to its result.
FOLLOWERS: Mapping[str, tuple[Callable[..., Any], Callable[[Injection], Any] | None]] = {
    OUTPUT: (keep_input, Output), PICTURE: (keep_queries, Joint), EVERYTHING: (keep_queries, Joint),
    QUERIED: (keep_queries, None),
}  # fmt: skip
AROUND = (QUERIED, STREAM)  # places behind a whole block

Options = Mapping[str, Any]


def host_attention(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any], mask: Tensor | None = None) -> Tensor:
    """The host's attention backend on [B, N, hidden], as its own layers call it; of FLUX q is [B, heads, N, C]."""
    split = q.ndim == 4
    heads = q.shape[1] if split else options["n_heads"]
    if split:
        k, v = (tensor.unflatten(-1, (heads, -1)).transpose(1, 2) for tensor in (k, v))
    return optimized_attention(
        q, k, v, heads, mask, attn_precision=options.get("attn_precision"), skip_reshape=split,
        transformer_options=options,
    )  # fmt: skip


def attach(
    model: ModelPatcher, injection: Injection, branch: Branch | None = None, stream: str = streams.NO_TEXT
) -> ModelPatcher:
    """A clone of the model with the injection in it, and a stream of the text alone (streams.STREAMS) if it needs one.

    The given model and all its other clones stay as they are.
    """
    patched = model.clone()
    for place in injection.places:
        if place.name in AROUND:
            _surround(patched, place, injection)
        elif place.name not in FOLLOWERS:
            _stand(patched, place, injection)
    for keep, follower in {FOLLOWERS[place.name] for place in injection.places if place.name in FOLLOWERS}:
        patches = patched.model_options[OPTIONS].setdefault("patches", {})
        if keep not in patches.get("attn1_patch", ()):
            patches["attn1_patch"] = [keep, *patches.get("attn1_patch", ())]  # before anyone changes it
        if follower is not None:
            patched.set_model_attn1_output_patch(follower(injection))
    patched.set_additional_models(f"{KEY}.{id(injection)}", injection.patchers)
    before = _hooks(model)
    hooks = Hooks(
        (*before.injections, injection),
        (*before.branches, *((branch,) if branch else ())),
        max(before.stream, stream, key=streams.STREAMS.index),
    )
    for kind, hook in hooks.wrappers.items():
        patched.remove_wrappers_with_key(kind, KEY)
        patched.add_wrapper_with_key(kind, KEY, hook)
    return patched


def _stand(patched: ModelPatcher, place: Place, injection: Injection) -> None:
    replaced = patched.model_options[OPTIONS].get("patches_replace", {})
    here, exact = replaced.get(place.name, {}), (*place.block, place.depth)
    key = exact if exact in here else place.key  # the host looks for the exact one first
    found = here.get(key, here.get(place.block))
    if isinstance(found, Slot) and found.place == place:
        slot = Slot(place, host_attention, found.base, (*found.injections, injection))
    else:
        slot = Slot(place, host_attention, found, (injection,))
    patched.set_model_patch_replace(slot, place.name, *key)


@dataclass(frozen=True, eq=False)
class Around:
    """What stands around one FLUX block: what we found there, and the injections that add to its stream behind it."""

    block: tuple[str, int]
    base: Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]] | None
    injections: tuple[Injection, ...]

    def __call__(self, args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        out = extra["original_block"](args) if self.base is None else self.base(args, extra)
        return {**out, "img": behind(self.block, self.injections, out["img"], args[OPTIONS])}

    def __deepcopy__(self, memo: dict[int, Any]) -> Around:
        return self


def _surround(patched: ModelPatcher, place: Place, injection: Injection) -> None:
    side, index = place.block
    key = f"{side}_block", index
    found = patched.model_options[OPTIONS].get("patches_replace", {}).get("dit", {}).get(key)
    if not isinstance(found, Around):
        found = Around(place.block, found, ())
    if injection not in found.injections:
        around = Around(place.block, found.base, (*found.injections, injection))
        patched.set_model_patch_replace(around, "dit", *key)


def injections(model: ModelPatcher) -> tuple[Injection, ...]:
    """What was attached to a model so far."""
    return _hooks(model).injections


def branches(model: ModelPatcher) -> tuple[Branch, ...]:
    """What guides a model beyond the host's own guidance."""
    return _hooks(model).branches


def directly(model: ModelPatcher, sigma: float) -> dict[str, Any]:
    """What a model's own apply_model is given for its injections to take part without a sampler, as in training.

    Every row counts as the positive prompt's. `sigma` is the noise of the rows, or the most of any.
    """
    return {OPTIONS: {**model.model_options[OPTIONS], "wrappers": model.wrappers, SIGMA: sigma}}


def inputs(
    unet: Any, x: Tensor, timesteps: Tensor, context: Tensor, places: Sequence[Place], **given: Any
) -> dict[Place, Tensor]:
    """What the attentions at `places` read [n, tokens, C] when a UNet sees x [n, C, H, W]. Nothing else is run.

    The places are self-attentions, or all "attn2". None of the patches of the model that the UNet belongs to take part.
    """
    patch = "attn2_patch" if places[0].name == "attn2" else "attn1_patch"
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
        unet(x, timesteps, context=context, transformer_options={"patches": {patch: [see]}}, **given)
    return seen


class _Enough(Exception):
    """All that was wanted has been seen."""


@dataclass(eq=False)
class _Branches:
    """What the branches of one prediction gave. An object, as dictionaries of options are copied on their way."""

    wanted: list[Branch]
    positive: Tensor | None = None
    given: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Hooks:
    """What runs around the model for all injections of a patched model."""

    injections: tuple[Injection, ...] = ()
    branches: tuple[Branch, ...] = ()
    stream: str = streams.NO_TEXT

    @property
    def wrappers(self) -> dict[str, Callable[..., Any]]:
        return {
            WrappersMP.OUTER_SAMPLE: self.run,
            WrappersMP.PREDICT_NOISE: self.predict,
            WrappersMP.CALC_COND_BATCH: self.batch,
            WrappersMP.DIFFUSION_MODEL: self.begin,
        }

    def run(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Carries a text stream of its own through the run, and empties the banks when that ends, however it ends."""
        try:
            if self.stream != streams.OWN:
                return executor(*args, **kwargs)
            both, more = streams.beside(*args, **kwargs)
            return executor(*both, **more)[: len(args[0])]
        finally:
            for injection in self.injections:
                injection.bank.clear()

    def predict(
        self, executor: Any, x: Tensor, timestep: Tensor, model_options: dict[str, Any] | None = None, seed: Any = None
    ) -> Any:
        """The guider alone knows its prompts by name: hand them on to where they are batched. Guide by the branches."""
        model_options = {**(model_options or {}), CONDS: executor.class_obj.conds}
        if not self.branches and not any(injection.stepwise for injection in self.injections):
            return executor(x, timestep, model_options, seed)
        sigma = float(timestep.flatten()[0])  # banks and branches go by it: the one wait for the device in a step
        model_options[SIGMA] = sigma
        if not self.branches:
            return executor(x, timestep, model_options, seed)
        on = [branch for branch in self.branches if branch.window.inside(sigma)]
        ran = _Branches([b for b in on if b.scale and b.launch.inside(sigma)])
        denoised = executor(x, timestep, {**model_options, BRANCHES: ran}, seed)
        if not on:
            return denoised
        if ran.positive is None or len(ran.given) < len(ran.wanted):
            raise RuntimeError(
                f"got the guider {type(executor.class_obj).__name__}, which does not run its prompts through ComfyUI's "
                "own batches; expected one with a positive prompt that does; use KSampler or CFGGuider"
            )
        pushes = [b.scale * (ran.given[b.name] - ran.positive) for b in ran.wanted]
        guided = guide(x, timestep, denoised, ran.positive, pushes, max(b.rescale for b in on))
        rows = len(x) // 2 if self.stream == streams.OWN else len(x)  # what follows is the text stream's, not ours
        return torch.cat((guided[:rows], denoised[rows:]))

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
            SIGMA: model_options.get(SIGMA),
            WHOLE: tuple(x.shape[-2:]),
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
        given, chunks = args[0], len(options.get("cond_or_uncond", (0,)))
        if self.stream == streams.SHARED:
            index = torch.arange(len(given), device=given.device).view(chunks, 1, -1).repeat(1, 2, 1).flatten()
            args, kwargs = streams.within((args, kwargs), len(given), index, options)
        options[HERE] = tuple(given.shape[-2:])
        cell = getattr(executor.class_obj, "patch_size", None)  # FLUX's, which fills the last cell up
        if cell is not None:
            options[CELLS] = tuple(-(-side // cell) for side in options[HERE])
        call = _call(args[0], args[1], options, self.stream)
        active: dict[int, Active] = {}
        for injection in self.injections:
            gate = _gate(injection, call, options.get("sigmas"))
            if gate is not False:
                active[id(injection)] = Active(injection.prepare(call), gate if isinstance(gate, Tensor) else None)
        options[KEY] = Now(call, active, _picture(call))
        out = executor(*args, **kwargs)
        if self.stream != streams.SHARED:
            return out
        return out.view(chunks, 2, -1, *out.shape[1:])[:, 0].reshape(given.shape[0], *out.shape[1:])

    def __deepcopy__(self, memo: dict[int, Any]) -> Hooks:
        return self


def _gate(injection: Injection, call: Call, sigmas: Tensor | None) -> Tensor | bool:
    """Whether an injection is on, or the factor by which it is (see Window.gate)."""
    if injection.stepwise and call.sigma is None:
        raise RuntimeError("the model ran outside a guider; expected ComfyUI's samplers; sample the model with these")
    return injection.window.gate(sigmas) if call.sigma is None else injection.window.inside(call.sigma)


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


def _picture(call: Call) -> Tensor | None:
    """1 at the picture's rows, 0 at a text stream's (Now.picture)."""
    if not any(call.is_text(role) for role in call.roles):
        return None
    out = torch.ones(len(call.roles), call.rows, 1, 1, dtype=call.dtype, device=call.device)
    for chunk, role in zip(out, call.roles, strict=True):
        if call.is_text(role):
            chunk.zero_()
    return out.flatten(0, 1)


def _call(x: Tensor, timesteps: Tensor, options: Options, stream: str) -> Call:
    chunks = options.get("cond_or_uncond", (0,))
    roles = options.get(ROLES)
    # Without a guider to ask, the host's own order holds: 0 is the positive prompt.
    names = tuple(("positive" if index == 0 else "negative") if roles is None else roles[index] for index in chunks)
    if stream != streams.NO_TEXT:
        names = tuple(role for name in names for role in (name, f"{TEXT_ROLE}{name}"))
    rows = x.shape[0] // len(names)
    return Call(names, rows, x.dtype, x.device, timesteps, options.get(SIGMA), options.get(TEXT))
