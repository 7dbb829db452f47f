"""Attaches injections to a model. The only file that reads or writes transformer_options.

Patches in the attention layers are in slots.py. Once per model call, before the first layer, the wrappers here decide
which injections are on and prepare their states, which the layers look up. What an injection caches for a run is in its
run cache, which is cleared when the run ends.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from operator import itemgetter
from typing import Any

import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from .flux_terms import TOKEN_GRID_OPTION
from .injection import FULL_LATENT_SIZE_OPTION, LATENT_SIZE_OPTION, GuidanceBranch, Injection, PatchPlace
from .model_call import ModelCall
from .patch_installation import PatchInstaller
from .prompt_batch import NO_PROMPTS, Prediction, PromptBatch
from .schedule import NO_SCHEDULES, ResolvedSchedules
from .slots import LIKENESS_KEY, ActiveInjection, CallState, exclude_from_compile
from .text_stream import (
    NO_TEXT_STREAM,
    OWN_TEXT_STREAM,
    SHARED_TEXT_STREAM,
    TEXT_STREAM_KINDS,
    add_shared_rows,
    append_text_rows,
    remove_shared_rows,
    stack_streams,
    unstack_streams,
)

TRANSFORMER_OPTIONS, CONTEXT_HANDLER_OPTION = "transformer_options", "context_handler"  # ComfyUI's
SCHEDULES_OPTION = "likeness_schedules"  # in transformer_options during a run
PROMPT_BATCH_OPTION = "likeness_prompt_batch"  # in transformer_options during a step

TransformerOptions = Mapping[str, Any]


def run_attention_backend(
    q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any], bias: Tensor | None = None
) -> Tensor:
    """ComfyUI's attention backend on [B, N, hidden], as ComfyUI's layers call it. In FLUX, q is [B, heads, N, C]."""
    is_split = q.ndim == 4
    heads = q.shape[1] if is_split else options["n_heads"]
    if is_split:
        k, v = (tensor.unflatten(-1, (heads, -1)).transpose(1, 2) for tensor in (k, v))
    return optimized_attention(
        q, k, v, heads, bias, attn_precision=options.get("attn_precision"), skip_reshape=is_split,
        transformer_options=options,
    )  # fmt: skip


def attach_injection(
    model: ModelPatcher,
    injection: Injection,
    branch: GuidanceBranch | None = None,
    text_stream: str = NO_TEXT_STREAM,
) -> ModelPatcher:
    """A clone of the model with the injection, and with a text stream if it needs one (TEXT_STREAM_KINDS).

    The model and its other clones are not changed.
    """
    patched = model.clone()
    patched.set_additional_models(f"{LIKENESS_KEY}.{id(injection)}", injection.patchers)
    previous = _get_model_wrappers(model)
    wrappers = ModelWrappers(
        (*previous.injections, injection),
        (*previous.branches, *((branch,) if branch else ())),
        max(previous.text_stream, text_stream, key=TEXT_STREAM_KINDS.index),
    )
    wrappers.patch_installer.install(patched.model_options[TRANSFORMER_OPTIONS])
    for wrapper_type, wrapper in wrappers.by_type.items():
        patched.remove_wrappers_with_key(wrapper_type, LIKENESS_KEY)
        patched.add_wrapper_with_key(wrapper_type, LIKENESS_KEY, wrapper)
    return patched


def get_injections(model: ModelPatcher) -> tuple[Injection, ...]:
    """The injections of a model."""
    return _get_model_wrappers(model).injections


def get_branches(model: ModelPatcher) -> tuple[GuidanceBranch, ...]:
    """The guidance branches of a model."""
    return _get_model_wrappers(model).branches


def training_options(model: ModelPatcher, sigma: float) -> dict[str, Any]:
    """Keyword arguments of apply_model that run a model's injections without a sampler, as in training.

    All rows count as the positive prompt's. `sigma` is the noise level of the rows, or the highest of them.
    """
    return {
        TRANSFORMER_OPTIONS: {
            **model.model_options[TRANSFORMER_OPTIONS],
            "wrappers": model.wrappers,
            PROMPT_BATCH_OPTION: PromptBatch(sigma=sigma, schedules=_resolve_schedules(model)),
        }
    }


def capture_attention_inputs(
    unet: Any, x: Tensor, timesteps: Tensor, context: Tensor, places: Sequence[PatchPlace], **unet_kwargs: Any
) -> dict[PatchPlace, Tensor]:
    """The inputs [n, tokens, C] of the attentions at `places` for x [n, C, H, W]. The UNet stops after the last one.

    The places are all "attn2", or all self-attentions. The patches of the UNet's model are not applied.
    """
    patch_name = "attn2_patch" if places[0].name == "attn2" else "attn1_patch"
    places_by_key = {(place.block, place.depth): place for place in places}
    inputs: dict[PatchPlace, Tensor] = {}

    def capture(n: Tensor, context: Tensor, value: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        place = places_by_key.get((options["block"], options.get("block_index", 0)))
        if place is not None:
            inputs[place] = n
            if len(inputs) == len(places_by_key):
                raise _CaptureDone
        return n, context, value

    unet = getattr(unet, "_orig_mod", unet)  # not compiled: the exception must leave it at once
    with contextlib.suppress(_CaptureDone):
        unet(x, timesteps, context=context, transformer_options={"patches": {patch_name: [capture]}}, **unet_kwargs)
    return inputs


class _CaptureDone(Exception):
    """Stops the UNet after the last wanted input."""


@dataclass(frozen=True, eq=False)
class PromptHandler:
    """Stands where ComfyUI looks for a handler of context windows, as prompts and latents are still whole there.

    It names the prompts, adds those of the guidance branches, and passes all on to the handler that was there, if any.
    """

    prediction: Prediction
    windows: Any

    def should_use_context(self, *_: Any) -> bool:
        return True

    def execute(
        self, calc_cond_batch: Any, model: Any, conds: Any, x: Tensor, timestep: Tensor, model_options: dict[str, Any]
    ) -> Any:
        all_conds, batch = self.prediction.make_batch(conds)
        options = {**model_options.get(TRANSFORMER_OPTIONS, {}), PROMPT_BATCH_OPTION: batch}
        windows, num_images = self.windows, batch.num_images
        is_stacked = num_images != len(x) and (windows is not None or "ad_params" in options)
        if is_stacked:
            options[PROMPT_BATCH_OPTION] = replace(batch, is_stacked=True)
            x, timestep = stack_streams(x), timestep[:num_images]
        model_options = {**model_options, TRANSFORMER_OPTIONS: options, CONTEXT_HANDLER_OPTION: windows}
        args = model, all_conds, x, timestep, model_options
        if windows is not None and windows.should_use_context(*args):
            out = windows.execute(calc_cond_batch, *args)
        else:
            out = calc_cond_batch(*args)
        out = [unstack_streams(part) for part in out] if is_stacked else out
        return self.prediction.keep_results(batch.names, out, len(conds))


@dataclass(frozen=True, eq=False)
class ModelWrappers:
    """The wrappers of a patched model, for all of its injections."""

    injections: tuple[Injection, ...] = ()
    branches: tuple[GuidanceBranch, ...] = ()
    text_stream: str = NO_TEXT_STREAM

    @cached_property
    def patch_installer(self) -> PatchInstaller:
        return PatchInstaller(self.injections, run_attention_backend, itemgetter(TRANSFORMER_OPTIONS))

    @property
    def by_type(self) -> dict[str, Callable[..., Any]]:
        return {
            WrappersMP.OUTER_SAMPLE: self.wrap_outer_sample,
            WrappersMP.PREPARE_SAMPLING: self.wrap_prepare_sampling,
            WrappersMP.SAMPLER_SAMPLE: self.wrap_sampler_sample,
            WrappersMP.PREDICT_NOISE: self.wrap_predict_noise,
            WrappersMP.CALC_COND_BATCH: self.wrap_calc_cond_batch,
            WrappersMP.DIFFUSION_MODEL: self.wrap_diffusion_model,
        }

    def wrap_outer_sample(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Resolves the schedules by the model that is sampled. Clears the run caches, also after an error.

        The wrappers here become the innermost ones, as those of other packs may change the rows of a call.
        """
        guider = executor.class_obj
        options = dict(guider.model_options[TRANSFORMER_OPTIONS])
        options[SCHEDULES_OPTION] = _resolve_schedules(guider.model_patcher)
        options["wrappers"] = {
            name: dict(sorted(wrappers.items(), key=lambda item: item[0] == LIKENESS_KEY))
            for name, wrappers in options["wrappers"].items()
        }
        guider.model_options = {**guider.model_options, TRANSFORMER_OPTIONS: options}  # the guider's own, for this run
        try:
            return executor(*args, **kwargs)
        finally:
            for injection in self.injections:
                injection.run_cache.clear()

    def wrap_prepare_sampling(self, executor: Any, model: Any, noise_shape: Any, *args: Any, **kwargs: Any) -> Any:
        """Has memory made available for the rows of a text stream."""
        rows, *size = noise_shape
        return executor(model, [2 * rows, *size] if self.text_stream else noise_shape, *args, **kwargs)

    def wrap_sampler_sample(self, executor: Any, guider: Any, sigmas: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Adds the rows of a text stream with its own latent, after all that nodes do to the image's noise."""
        if self.text_stream != OWN_TEXT_STREAM:
            return executor(guider, sigmas, *args, **kwargs)
        args, kwargs = append_text_rows(*args, **kwargs)
        samples = executor(guider, sigmas, *args, **kwargs)
        return samples[: len(samples) // 2]

    def wrap_predict_noise(
        self, executor: Any, x: Tensor, timestep: Tensor, model_options: dict[str, Any] | None = None, seed: Any = None
    ) -> Any:
        """Passes what only the guider knows to the batching of its prompts. Applies the guidance of branches."""
        guider, options = executor.class_obj, model_options or {}
        schedules = options.get(TRANSFORMER_OPTIONS, {}).get(SCHEDULES_OPTION, NO_SCHEDULES)
        needs_sigma = self.branches or any(injection.needs_sigma for injection in self.injections)
        sigma = float(timestep.flatten()[0]) if needs_sigma else None  # the one device sync of a step
        active = [b for b in self.branches if schedules.is_during(b.schedule, sigma)]
        launched = [b for b in active if b.scale and schedules.is_during(b.launch_schedule, sigma)]
        negative = next(iter(guider.conds.get("negative") or ()), None)
        batch = PromptBatch(
            negative_text=None if negative is None else negative["model_conds"]["c_crossattn"].cond,
            sigma=sigma,
            schedules=schedules,
            num_images=len(x) // 2 if self.text_stream == OWN_TEXT_STREAM else len(x),
            latent_size=tuple(x.shape[-2:]),
        )
        prediction = Prediction(guider.conds, batch, active, launched)
        handler = PromptHandler(prediction, options.get(CONTEXT_HANDLER_OPTION))
        denoised = executor(x, timestep, {**options, CONTEXT_HANDLER_OPTION: handler}, seed)
        return prediction.apply_guidance(x, timestep, denoised, guider)

    def wrap_calc_cond_batch(
        self, executor: Any, model: Any, conds: Any, x: Tensor, timestep: Tensor, model_options: dict[str, Any]
    ) -> Any:
        """Makes rows of a text stream's channels again, once the images of a window are taken out of the batch."""
        if not model_options[TRANSFORMER_OPTIONS].get(PROMPT_BATCH_OPTION, NO_PROMPTS).is_stacked:
            return executor(model, conds, x, timestep, model_options)
        out = executor(model, conds, unstack_streams(x), torch.cat((timestep, timestep)), model_options)
        return [stack_streams(part) for part in out]

    def wrap_diffusion_model(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Prepares the injections for this call, then runs the diffusion model."""
        args, kwargs, rows_per_chunk = self._prepare_call(executor.class_obj, args, kwargs)
        out = executor(*args, **kwargs)
        return remove_shared_rows(out, rows_per_chunk) if self.text_stream == SHARED_TEXT_STREAM else out

    @exclude_from_compile
    def _prepare_call(
        self, diffusion_model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any], int]:
        """The arguments of the diffusion model with the state of the call, and the rows of a chunk.

        Decides which injections are on in this call and prepares their states.
        """
        options, args, kwargs = _copy_options(args, kwargs)
        batch = options.get(PROMPT_BATCH_OPTION, NO_PROMPTS)
        call = batch.describe_call(args[0], args[1], options, self.text_stream)
        options[LATENT_SIZE_OPTION], options[FULL_LATENT_SIZE_OPTION] = tuple(args[0].shape[-2:]), batch.latent_size
        patch_size = getattr(diffusion_model, "patch_size", None)  # FLUX's; it pads the latent to full patches
        if patch_size is not None:
            options[TOKEN_GRID_OPTION] = tuple(-(-size // patch_size) for size in options[LATENT_SIZE_OPTION])
        active: dict[int, ActiveInjection] = {}
        for injection in self.injections:
            gate = _compute_gate(injection, call, options.get("sigmas"))
            if gate is not False:
                states = injection.prepare_states(call)
                active[id(injection)] = ActiveInjection(states, gate if isinstance(gate, Tensor) else None)
        self.patch_installer.install(options)
        options[LIKENESS_KEY] = CallState(call, active, call.make_image_rows(), options.get("patches", {}))
        if self.text_stream == SHARED_TEXT_STREAM:
            args, kwargs = add_shared_rows((args, kwargs), args[0], call.rows_per_chunk, options)
        return args, kwargs, call.rows_per_chunk

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelWrappers:
        return self


def _resolve_schedules(model: ModelPatcher) -> ResolvedSchedules:
    return ResolvedSchedules(model.get_model_object("model_sampling"))


def _compute_gate(injection: Injection, call: ModelCall, sigmas: Tensor | None) -> Tensor | bool:
    """Whether an injection is on, or its factor (see SigmaWindow.compute_gate)."""
    if injection.needs_sigma and call.sigma is None:
        raise RuntimeError("the model was called without a guider; expected ComfyUI's samplers; use one of them")
    if call.sigma is not None:
        return call.is_during(injection.schedule)
    return call.schedules.get_window(injection.schedule).compute_gate(sigmas)


def _get_model_wrappers(model: ModelPatcher) -> ModelWrappers:
    wrappers: Any = model.get_wrappers(WrappersMP.DIFFUSION_MODEL, LIKENESS_KEY)
    return wrappers[0].__self__ if wrappers else ModelWrappers()


def _copy_options(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[dict[str, Any], tuple[Any, ...], dict[str, Any]]:
    """A copy of the call's transformer_options, and the arguments with the copy instead of the original."""
    if TRANSFORMER_OPTIONS in kwargs:
        options = dict(kwargs[TRANSFORMER_OPTIONS])
        return options, args, {**kwargs, TRANSFORMER_OPTIONS: options}
    index = max(i for i, arg in enumerate(args) if isinstance(arg, dict))  # after a ControlNet's dict
    options = dict(args[index])
    return options, (*args[:index], options, *args[index + 1 :]), kwargs
