"""What the pack expects of ComfyUI's code. A newer ComfyUI that changed it is named in one warning when it starts."""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

# Functions that the pack calls: the number of positional arguments, and the keywords.
CALLS: Mapping[str, tuple[int, str]] = {
    "comfy.ldm.modules.attention.optimized_attention": (5, "attn_precision skip_reshape transformer_options"),
    "comfy.model_management.get_free_memory": (1, ""),
    "comfy.model_management.get_torch_device": (0, ""),
    "comfy.model_management.intermediate_device": (0, ""),
    "comfy.model_management.load_models_gpu": (1, ""),
    "comfy.model_management.text_encoder_device": (0, ""),
    "comfy.model_management.text_encoder_offload_device": (0, ""),
    "comfy.model_management.throw_exception_if_processing_interrupted": (0, ""),
    "comfy.model_management.unet_dtype": (0, "model_params supported_dtypes weight_dtype"),
    "comfy.model_management.unet_manual_cast": (3, ""),
    "comfy.model_management.unet_offload_device": (0, ""),
    "comfy.model_patcher.ModelPatcher.add_object_patch": (3, ""),
    "comfy.model_patcher.ModelPatcher.add_wrapper_with_key": (4, ""),
    "comfy.model_patcher.ModelPatcher.clone": (1, ""),
    "comfy.model_patcher.ModelPatcher.get_model_object": (2, ""),
    "comfy.model_patcher.ModelPatcher.get_wrappers": (3, ""),
    "comfy.model_patcher.ModelPatcher.remove_wrappers_with_key": (3, ""),
    "comfy.model_patcher.ModelPatcher.set_additional_models": (3, ""),
    "comfy.model_patcher.get_key_weight": (2, ""),
    "comfy.sd.CLIP": (1, "state_dict model_options"),
    "comfy.sd.CLIP.encode_from_tokens": (2, "return_pooled"),
    "comfy.sd.CLIP.encode_from_tokens_scheduled": (2, ""),
    "comfy.sd.CLIP.tokenize": (2, "return_word_ids"),
    "comfy.sd.load_lora_for_models": (5, ""),
    "comfy.sd1_clip.SDClipModel": (0, "device dtype model_options"),
    "comfy.utils.common_upscale": (5, ""),
    "comfy.utils.load_torch_file": (1, "safe_load return_metadata"),
}
# Kinds of wrappers that the pack adds: the function around which they run, and its first parameters.
WRAPPED: Mapping[str, tuple[str, str]] = {
    "OUTER_SAMPLE": ("comfy.samplers.CFGGuider.outer_sample", "self noise latent_image sampler sigmas"),
    "PREPARE_SAMPLING": ("comfy.sampler_helpers.prepare_sampling", "model noise_shape conds"),
    "SAMPLER_SAMPLE": (
        "comfy.samplers.KSAMPLER.sample",
        "self model_wrap sigmas extra_args callback noise latent_image denoise_mask",
    ),
    "PREDICT_NOISE": ("comfy.samplers.CFGGuider.predict_noise", "self x timestep model_options seed"),
    "CALC_COND_BATCH": ("comfy.samplers.calc_cond_batch", "model conds x_in timestep model_options"),
    "DIFFUSION_MODEL": (
        "comfy.ldm.modules.diffusionmodules.openaimodel.UNetModel.forward",
        "self x timesteps context",
    ),
}
# Keys of ComfyUI's options that the pack reads or sets, by the code in which they have to occur.
OPTION_KEYS: Mapping[str, str] = {
    "comfy.ldm.flux.layers": "attn1_patch attn1_output_patch img_slice",
    "comfy.ldm.flux.model": "patches_replace double_block single_block block_type block_index",
    "comfy.ldm.modules.attention": "patches patches_replace attn1_patch attn2_patch attn1_output_patch attn1 attn2 "
    "block block_index n_heads attn_precision activations_shape",
    "comfy.ldm.modules.diffusionmodules.openaimodel": "block input middle output",
    "comfy.samplers": "cond_or_uncond uuids sigmas context_handler model_conds",
}


def _find_object(name: str) -> Any:
    """The object of a dotted name. Raises ImportError or AttributeError."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            found = getattr(found, part)
        return found
    raise ImportError(name)


def _check_call(name: str, num_positional: int, keywords: str) -> bool:
    inspect.signature(_find_object(name)).bind(*range(num_positional), **dict.fromkeys(keywords.split()))
    return True


def _check_wrapped(kind: str, name: str, parameters: str) -> bool:
    first = list(inspect.signature(_find_object(name)).parameters)[: len(parameters.split())]
    return hasattr(_find_object("comfy.patcher_extension.WrappersMP"), kind) and first == parameters.split()


def _check_option_key(name: str, key: str) -> bool:
    source = inspect.getsource(_find_object(name))
    return f'"{key}"' in source or f"'{key}'" in source


def _list_checks() -> Iterator[tuple[str, Callable[..., bool], tuple[Any, ...]]]:
    """What is named if it does not fit, a function that returns False or raises then, and its arguments."""
    for name, expected in CALLS.items():
        yield name, _check_call, (name, *expected)
    for kind, expected in WRAPPED.items():
        yield expected[0], _check_wrapped, (kind, *expected)
    for name, keys in OPTION_KEYS.items():
        for key in keys.split():
            yield f"{key!r} in {name}", _check_option_key, (name, key)


def find_mismatches() -> list[str]:
    """What differs in this ComfyUI from what the pack expects. Takes some milliseconds."""
    found = []
    for label, check, arguments in _list_checks():
        try:
            fits = check(*arguments)
        except (ImportError, AttributeError, TypeError, ValueError):
            fits = False
        except OSError:  # ComfyUI without its source
            fits = True
        if not fits:
            found.append(label)
    return found


def warn_about_mismatches() -> None:
    """Log one warning that names what does not fit, if anything."""
    mismatches = find_mismatches()
    if mismatches:
        logging.warning(
            "Likeness: this ComfyUI differs from those that the pack was tested with (%s); update the pack; if its "
            "newest version warns, too, some nodes may fail or do nothing",
            ", ".join(mismatches),
        )
