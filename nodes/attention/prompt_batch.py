"""What ComfyUI runs together: the prompts of a guider by name, their texts, and the images of a model call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ...likeness.attention.guidance import apply_reference_guidance
from .injection import GuidanceBranch
from .model_call import TEXT_STREAM_ROLE_PREFIX, ModelCall
from .schedule import NO_SCHEDULES, ResolvedSchedules
from .text_stream import NO_TEXT_STREAM, OWN_TEXT_STREAM

POSITIVE = "positive"  # the guider's name of the positive prompt

Options = Mapping[str, Any]  # ComfyUI's options of a model call


@dataclass(frozen=True, eq=False)
class PromptBatch:
    """The prompts that ComfyUI batches in a step. `names` are the guider's, in the order that `cond_or_uncond` counts.

    `text_lengths` has the number of tokens of each conditioning, by the position of its prompt and its uuid. (The host
    adds copies of conditionings to other prompts, so that a uuid alone does not do.) `num_images` and `latent_size` are
    those of the full latent; None without a guider. With `is_stacked`, the rows of a text stream are channels so far.
    """

    names: tuple[str, ...] = ()
    text_lengths: Mapping[tuple[int, Any], int] = field(default_factory=dict)
    negative_text: Tensor | None = None
    sigma: float | None = None
    schedules: ResolvedSchedules = NO_SCHEDULES
    num_images: int | None = None
    latent_size: tuple[int, ...] | None = None
    is_stacked: bool = False

    def describe_call(self, x: Tensor, timesteps: Tensor, options: Options, text_stream: str) -> ModelCall:
        """The model call for x [B, C, H, W]. The chunks of a text stream that has no rows yet count as well.

        Each prompt has a row per image; tile nodes put the rows of several tiles side by side, and then all prompts
        are there as many times. Raises ValueError if the rows are no multiple of that.
        """
        positions, uuids = options.get("cond_or_uncond", (0,)), options.get("uuids", ())
        streams = 2 if text_stream == OWN_TEXT_STREAM else 1
        images = self._list_images(options, len(x) // (len(positions) * streams))
        rows = len(positions) * streams * len(images)
        if not images or len(x) % rows:
            raise ValueError(
                "remove the node behind Apply Identity that changes the rows of the batch (windows, tiles, or guidance)"
                f"{', or set text_stream to shared' if streams > 1 else ''}; got {len(x)} rows for {len(positions)} "
                f"prompts of {len(images)} images; expected a multiple of {rows} rows"
            )
        # Without a guider, ComfyUI's order holds: 0 is the positive prompt.
        roles = [self.names[i] if self.names else ("negative" if i else POSITIVE) for i in positions]
        lengths = [self.text_lengths.get(key, 0) for key in zip(positions, uuids, strict=False)]
        if text_stream != NO_TEXT_STREAM:
            roles = [role for name in roles for role in (name, f"{TEXT_STREAM_ROLE_PREFIX}{name}")]
            lengths = [length for length in lengths for _ in range(2)]
        has_repeated_text = 0 not in lengths and len(set(lengths)) > 1
        num_tiles = len(x) // rows
        return ModelCall(
            roles=tuple(roles) * num_tiles,
            images=images,
            dtype=x.dtype,
            device=x.device,
            timesteps=timesteps,
            sigma=self.sigma,
            negative_text=self.negative_text,
            text_lengths=tuple(lengths) * num_tiles if has_repeated_text else (),
            schedules=self.schedules,
        )

    def _list_images(self, options: Options, rows_per_prompt: int) -> tuple[int, ...]:
        """The images of a call: those of ComfyUI's context window, of AnimateDiff's, or all."""
        num_images = rows_per_prompt if self.num_images is None else self.num_images
        window, animate_diff = options.get("context_window"), options.get("ad_params") or {}
        if window is not None and window.dim == 0:
            return tuple(window.get_tensor(torch.arange(num_images)).tolist())
        return tuple(animate_diff.get("sub_idxs") or range(num_images))


NO_PROMPTS = PromptBatch()  # of a call without a guider


@dataclass(eq=False)
class Prediction:
    """One prediction of a guider: what each of its batches has in common, and the guidance branches that are on.

    `prompts` are the guider's. The first batch with the positive prompt also runs the branches of `launched`, and keeps
    their predictions and the positive prompt's in `results`, by role.
    """

    prompts: Mapping[str, list[Any]]
    batch: PromptBatch
    active: Sequence[GuidanceBranch] = ()
    launched: Sequence[GuidanceBranch] = ()
    results: dict[str, Tensor] = field(default_factory=dict)

    def make_batch(self, conds: Sequence[list[Any] | None]) -> tuple[list[list[Any] | None], PromptBatch]:
        """The prompts to run instead of `conds`, and what describes them."""
        names = [find_prompt_name(cond, self.prompts) for cond in conds]
        branches = self.launched if POSITIVE in names and not self.results else ()
        all_conds = [*conds, *(list(self.prompts[POSITIVE]) for _ in branches)]
        all_names = *names, *(branch.name for branch in branches)
        return all_conds, replace(self.batch, names=all_names, text_lengths=count_text_tokens(all_conds))

    def keep_results(self, names: Sequence[str], out: Sequence[Tensor], num_conds: int) -> Sequence[Tensor]:
        """The predictions of the guider's own prompts, the first `num_conds`."""
        if self.active and not self.results and POSITIVE in names:
            branches = zip(names[num_conds:], out[num_conds:], strict=True)
            self.results = {POSITIVE: out[names.index(POSITIVE)], **dict(branches)}
        return out[:num_conds]

    def apply_guidance(self, x: Tensor, sigma: Tensor, denoised: Tensor, guider: Any) -> Tensor:
        """The guider's prediction with the branches' guidance. Raises RuntimeError if it did not run the prompts."""
        if not self.active:
            return denoised
        if POSITIVE not in self.results:
            raise RuntimeError(
                f"got the guider {type(guider).__name__}, which does not run its prompts through ComfyUI's "
                "batching; expected one with a positive prompt that does; use KSampler or CFGGuider"
            )
        positive = self.results[POSITIVE]
        differences = [branch.scale * (self.results[branch.name] - positive) for branch in self.launched]
        rescale = max(branch.rescale for branch in self.active)
        guided = apply_reference_guidance(x, sigma, denoised, positive, differences, rescale)
        rows = self.batch.num_images  # those of a text stream follow the image's and are not guided
        return torch.cat((guided[:rows], denoised[rows:]))


def count_text_tokens(conds: Sequence[list[Any] | None]) -> dict[tuple[int, Any], int]:
    """The number of tokens of each conditioning of some prompts, by the position of the prompt and its uuid."""
    return {
        (position, cond["uuid"]): text.cond.shape[1]
        for position, prompt in enumerate(conds)
        for cond in prompt or ()
        if (text := cond["model_conds"].get("c_crossattn")) is not None
    }


def find_prompt_name(cond: list[Any] | None, prompts_by_name: Mapping[str, list[Any]]) -> str:
    """The guider's name of a prompt, or "". Other packs may copy prompts, but their uuids stay the same."""
    same = (name for name, prompt in prompts_by_name.items() if prompt is cond)
    copied = (
        name
        for name, prompt in prompts_by_name.items()
        if cond and prompt and prompt[0].get("uuid") == cond[0].get("uuid")
    )
    return next(same, "") or next(copied, "")
