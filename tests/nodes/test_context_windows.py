"""Context windows: a model call holds some images of the batch, and faces, masks, streams and branches follow.

The images of a batch do not depend on each other, so windows must give what the whole batch gives.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_context_windows import ContextWindowsManualNode
from comfyui_likeness.likeness.spec import Person
from comfyui_likeness.nodes.loaders.flashface_loader import ModelAsReferenceNet
from support.flashface_models import apply_flashface
from support.fused_kv import make_fused_kv_identity
from support.host_models import all_close, make_small_model, sample_latent
from support.infinite_id_adapters import apply_infinite_id, make_infinite_id_identity
from support.ip_adapters import apply_ip_adapter, make_ip_adapter, make_ip_adapter_identity
from support.method_cases import METHODS, make_method_case
from torch import Tensor

FRAMES = 8
WINDOW: dict[str, Any] = {
    "context_length": 4, "context_overlap": 1, "context_schedule": "standard_static", "context_stride": 1,
    "closed_loop": False, "fuse_method": "pyramid", "dim": 0, "freenoise": False,
}  # fmt: skip


def add_windows(model: ModelPatcher, **changes: Any) -> ModelPatcher:
    return ContextWindowsManualNode.execute(model, **{**WINDOW, **changes}).args[0]


def add_animate_diff_windows(model: ModelPatcher) -> ModelPatcher:
    """Windows as AnimateDiff packs make them: a wrapper around the batch, and `ad_params` for other packs."""

    def run_windows(executor: Any, model: Any, conds: Any, x: Tensor, timestep: Tensor, model_options: Any) -> Any:
        options = model_options["transformer_options"]
        options["ad_params"] = {"full_length": len(x), "context_length": 4, "sub_idxs": None}
        out = [torch.zeros_like(x) for _ in conds]
        for images in ([0, 1, 2, 3], [4, 5, 6, 7]):
            options["ad_params"]["sub_idxs"] = images
            window_conds = [take_images(prompt, images, len(x)) for prompt in conds]
            results = executor(model, window_conds, x[images], timestep[images], model_options)
            for whole, part in zip(out, results, strict=True):
                whole[images] = part
        return out

    def predict(executor: Any, x: Tensor, timestep: Tensor, model_options: Any, seed: Any) -> Any:
        ad_params = {"full_length": len(x), "context_length": 4, "sub_idxs": None}
        options = {**model_options["transformer_options"], "ad_params": ad_params}
        return executor(x, timestep, {**model_options, "transformer_options": options}, seed)

    model = model.clone()
    model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "animate_diff", predict)
    model.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, "animate_diff", run_windows)
    return model


def take_images(prompt: list[Any], images: list[int], num_images: int) -> list[Any]:
    """A prompt's conditionings with the rows of some images, where they have a row per image."""

    def take(value: Any) -> Any:
        has_rows = isinstance(value.cond, Tensor) and len(value.cond) == num_images
        return value._copy_with(value.cond[images]) if has_rows else value

    return [
        {**cond, "model_conds": {key: take(value) for key, value in cond["model_conds"].items()}} for cond in prompt
    ]


def make_frame_masks() -> Tensor:
    """A stripe that moves through the image, [frames, 64, 64]."""
    masks = torch.zeros(FRAMES, 64, 64)
    for i, mask in enumerate(masks):
        mask[:, 8 * i : 8 * i + 24] = 1
    return masks


def list_changes(method: str) -> list[dict[str, Any]]:
    """What makes images of a batch differ, for the inputs of a method's node."""
    identity = {
        "decoupled": make_ip_adapter_identity(make_ip_adapter()),
        "pulid": make_ip_adapter_identity(make_ip_adapter("pulid")),
        "mixed, own stream": make_infinite_id_identity(),
        "mixed, shared stream": make_infinite_id_identity(),
    }.get(method, make_fused_kv_identity())
    if method == "reference":
        return [{"reference_guidance": 3.2, "face_position": make_frame_masks()}, {"reference_guidance": 0.0}]
    outside = {"outside": "none"} if "fused" in method else {}  # else a mask alone changes nothing
    return [{"identity_or_people": (Person(identity, make_frame_masks()),), **outside}]


@pytest.mark.parametrize("add", [add_windows, add_animate_diff_windows])
@pytest.mark.parametrize("method", METHODS)
def test_windows_give_what_the_whole_batch_gives(method: str, add: Any) -> None:
    case = make_method_case(method)
    for changes in list_changes(method):
        whole = sample_latent(case.apply(**changes), batch_size=FRAMES)
        assert all_close(sample_latent(add(case.apply(**changes)), batch_size=FRAMES), whole, 1e-4)
        assert all_close(sample_latent(case.apply_to(add(case.base), **changes), batch_size=FRAMES), whole, 1e-4)
        assert not all_close(whole, sample_latent(case.base, batch_size=FRAMES), 1e-3)


@pytest.mark.parametrize("add", [add_windows, add_animate_diff_windows])
def test_every_image_has_its_face(add: Any) -> None:
    adapter = make_ip_adapter("faceid")
    model = apply_ip_adapter(make_small_model(), adapter, make_ip_adapter_identity(adapter, FRAMES), batch="unfold")
    assert all_close(sample_latent(add(model), batch_size=FRAMES), sample_latent(model, batch_size=FRAMES), 1e-4)


def test_reference_only_with_masks() -> None:
    base = make_small_model()
    net = ModelAsReferenceNet.execute(base).args[0]
    for guidance in (0.0, 2.0):
        person = Person(make_fused_kv_identity(), make_frame_masks())
        model = apply_flashface(base, net, identity=(person,), strength=0.5, reference_guidance=guidance)
        whole = sample_latent(model, batch_size=FRAMES)
        assert all_close(sample_latent(add_windows(model), batch_size=FRAMES), whole, 1e-4)


def test_inpainting_with_a_mask_per_image() -> None:
    """Conditionings with a row per image serve the text stream, too."""
    base = make_small_model(in_channels=9)
    base.model.set_inpaint()
    model = apply_infinite_id(base, identity_or_people=(Person(make_infinite_id_identity(), make_frame_masks()),))
    painted = {"noise_mask": (make_frame_masks()[:, None, ::8, ::8] > 0).float(), "batch_size": FRAMES}
    whole = sample_latent(model, **painted)
    assert all_close(sample_latent(add_windows(model), **painted), whole, 1e-4)
    for image in (0, 5):
        other = {**painted, "noise_mask": painted["noise_mask"][image : image + 1].repeat(FRAMES, 1, 1, 1)}
        assert all_close(whole[image], sample_latent(model, **other)[image], 1e-4)


@pytest.mark.parametrize("schedule", ["standard_static", "standard_uniform", "looped_uniform", "batched"])
def test_every_window_schedule(schedule: str) -> None:
    changes = list_changes("mixed, own stream")[0]
    model = make_method_case("mixed, own stream").apply(**changes)
    whole = sample_latent(model, batch_size=FRAMES)
    windows = add_windows(model, context_schedule=schedule, context_length=3)
    assert all_close(sample_latent(windows, batch_size=FRAMES), whole, 1e-4)


def test_a_text_stream_starts_from_the_noise_that_a_window_node_shuffles() -> None:
    """With FreeNoise the images start from other noise, and their text streams from the same."""
    free = {"freenoise": True}
    base, case = make_small_model(), make_method_case("mixed, own stream")
    # The first steps of both streams are equal, as in test_apply_mixed.
    own, shared = (add_windows(case.apply(text_stream=stream), **free) for stream in ("own", "shared"))
    first = sample_latent(own, batch_size=FRAMES, steps=1)
    assert all_close(first, sample_latent(shared, batch_size=FRAMES, steps=1), 1e-4)
    assert not all_close(first, sample_latent(case.apply(), batch_size=FRAMES, steps=1), 1e-3)
    assert not all_close(first, sample_latent(add_windows(base, **free), batch_size=FRAMES, steps=1), 1e-3)


def test_combined_prompts_split_over_the_windows_keep_their_names() -> None:
    from support.host_models import make_conditioning

    prompts = {
        "positive": [*make_conditioning(1), *make_conditioning(3)],
        "negative": [*make_conditioning(2), *make_conditioning(4)],
    }
    rows: list[Tensor] = []

    def keep(args: dict[str, Any]) -> Tensor:
        rows.append(args["uncond_denoised"])
        return args["denoised"]

    base = make_small_model()
    for model in (base, make_method_case("fused").apply()):
        watched = add_windows(model, split_conds_to_windows=True)
        watched.set_model_sampler_post_cfg_function(keep)
        sample_latent(watched, batch_size=FRAMES, steps=1, **prompts)
    assert all_close(rows[0], rows[1], 1e-5)  # the negative prompt sees no face


def test_windows_over_the_height_of_the_image() -> None:
    case, mask = make_method_case("fused"), make_frame_masks()[:1]
    tall = {"size": (16, 8)}
    windows = {"dim": 2, "context_length": 8, "context_overlap": 0}
    assert sample_latent(add_windows(case.apply(), **windows), **tall).isfinite().all()
    with pytest.raises(ValueError, match="tiles or windows"):
        people = (Person(make_fused_kv_identity(), mask),)
        sample_latent(add_windows(case.apply(identity_or_people=people), **windows), **tall)


def test_rows_that_do_not_fit_the_images_raise() -> None:
    def drop_an_image(executor: Any, model: Any, conds: Any, x: Tensor, timestep: Tensor, options: Any) -> Any:
        return [torch.cat((out, out[:1])) for out in executor(model, conds, x[1:], timestep[1:], options)]

    model = make_method_case("decoupled").apply()
    model.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, "another pack", drop_an_image)
    with pytest.raises(ValueError, match="got 4 rows for 2 prompts of 3 images; expected a multiple of 6"):
        sample_latent(model, batch_size=3)
