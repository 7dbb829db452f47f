"""ComfyUI's own nodes in front of and behind an Apply node: tokens re-ordered, attentions replaced, lists extended."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.model_management
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_hypertile import HyperTile
from comfy_extras.nodes_pag import PerturbedAttentionGuidance
from comfy_extras.nodes_sag import SelfAttentionGuidance
from comfy_extras.nodes_tomesd import TomePatchModel
from comfyui_likeness.nodes.attention.apply_mixed import MixedSelfExtension
from comfyui_likeness.nodes.attention.flashface.added_layers import attach_added_layers
from comfyui_likeness.nodes.attention.injection import PatchPlace
from comfyui_likeness.nodes.attention.model_call import TEXT_STREAM_ROLE_PREFIX, ModelCall
from comfyui_likeness.nodes.attention.patch import run_attention_backend
from comfyui_likeness.nodes.attention.schedule import ALWAYS_ON
from comfyui_likeness.nodes.attention.slots import LIKENESS_KEY, ActiveInjection, AttentionSlot, CallState
from comfyui_likeness.nodes.loaders.flashface_loader import ModelAsReferenceNet
from support.flashface_models import apply_flashface, load_flashface, make_face_latents
from support.flux_adapters import apply_flux_adapter, make_flux_adapter, sample_flux_latent
from support.fused_kv import apply_fused_kv, make_fused_kv_adapter
from support.host_models import all_close, make_small_model, sample_latent
from support.infinite_id_adapters import apply_infinite_id, make_infinite_id_adapter
from support.ip_adapters import apply_ip_adapter, make_ip_adapter
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

Node = Callable[[ModelPatcher], ModelPatcher]


@pytest.fixture(scope="module")
def base() -> ModelPatcher:
    return make_small_model()


def get_model(output: Any) -> ModelPatcher:
    """The MODEL of a node's output, in both forms that ComfyUI allows."""
    return output[0] if isinstance(output, tuple) else output.args[0]


def split_into_tiles(model: ModelPatcher) -> ModelPatcher:
    return get_model(HyperTile.execute(model, tile_size=32, swap_size=1, max_depth=0, scale_depth=False))


def merge_tokens(model: ModelPatcher) -> ModelPatcher:
    torch.manual_seed(1)  # of which tokens are merged
    return get_model(TomePatchModel.execute(model, ratio=0.5))


def sample_seeded(model: ModelPatcher, **changes: Any) -> Tensor:
    torch.manual_seed(2)
    return sample_latent(model, **changes)


def apply_added_layers(model: ModelPatcher) -> ModelPatcher:
    return attach_added_layers(model, load_flashface()[1].added_layers)


def apply_reference_only(model: ModelPatcher) -> ModelPatcher:
    net = ModelAsReferenceNet.execute(model, 64).args[0]
    return apply_flashface(model, net, make_face_latents(), reference_guidance=0.0, launch=1000)


def remove_injections(model: ModelPatcher) -> ModelPatcher:
    """FlashFace's main UNet as an ordinary model."""
    plain = model.clone()
    plain.model_options = {"transformer_options": {}}
    for wrapper_type in (getattr(WrappersMP, name) for name in vars(WrappersMP) if name.isupper()):
        plain.remove_wrappers_with_key(wrapper_type, LIKENESS_KEY)
    return plain


@pytest.mark.parametrize("apply", [apply_added_layers, apply_reference_only])
@pytest.mark.parametrize("reorder", [split_into_tiles, merge_tokens])
def test_terms_get_the_tokens_in_their_order(base: ModelPatcher, apply: Node, reorder: Node) -> None:
    model = remove_injections(load_flashface()[0]) if apply is apply_added_layers else base
    before, behind = sample_seeded(apply(reorder(model))), sample_seeded(reorder(apply(model)))
    assert torch.equal(before, behind)
    assert not all_close(behind, sample_seeded(apply(model)), 1e-3)
    assert not all_close(behind, sample_seeded(reorder(model)), 1e-3)


@pytest.mark.parametrize("text_stream", ["own", "shared"])
@pytest.mark.parametrize("reorder", [split_into_tiles, merge_tokens])
def test_mixed_attention_of_re_ordered_tokens(base: ModelPatcher, reorder: Node, text_stream: str) -> None:
    def apply(model: ModelPatcher, **changes: Any) -> ModelPatcher:
        return apply_infinite_id(model, text_stream=text_stream, **changes)

    behind = sample_seeded(reorder(apply(base)), batch_size=2)
    assert torch.equal(sample_seeded(apply(reorder(base)), batch_size=2), behind)
    assert not all_close(behind, sample_seeded(reorder(apply(base, attention="off")), batch_size=2), 1e-3)
    assert not all_close(behind, sample_seeded(apply(base), batch_size=2), 1e-3)


def test_a_tile_attends_to_its_own_keys() -> None:
    """Its part of the image's keys and of the text stream's, where ComfyUI's backends cut them."""
    heads, width, num_rows, num_tiles, tokens = 2, 8, 2, 4, 16
    place = PatchPlace("attn1", ("input", 1))
    extension = MixedSelfExtension([place], "mixed", "none", 1.0, ALWAYS_ON)
    roles = ("positive", f"{TEXT_STREAM_ROLE_PREFIX}positive")
    call = ModelCall(roles, tuple(range(num_rows)), torch.float32, torch.device("cpu"), torch.ones(4))
    active = {id(extension): ActiveInjection(extension.prepare_states(call), None)}
    options: dict[str, Any] = {"n_heads": heads, LIKENESS_KEY: CallState(call, active, None)}
    q = torch.randn(2 * num_rows * num_tiles, tokens, width)
    k, v = torch.randn(2, 2 * num_rows, num_tiles * tokens, width)
    out = AttentionSlot(place, run_attention_backend, None, (extension,))(q, k, v, options)

    q, k, v, out = (part.view(2, num_rows, num_tiles, tokens, heads, -1).transpose(-2, -3) for part in (q, k, v, out))
    image = scaled_dot_product_attention(q[0], torch.cat((k[0], k[1]), -2), torch.cat((v[0], v[1]), -2))
    text = scaled_dot_product_attention(q[1], k[1], v[1])
    assert all_close(out[0], image) and all_close(out[1], text)


class HalveTokens:
    """A node whose patch is not undone."""

    @staticmethod
    def execute(model: ModelPatcher, list_name: str) -> ModelPatcher:
        def halve(n: Tensor, context: Tensor, value: Tensor, options: dict[str, Any]) -> tuple[Tensor, ...]:
            is_middle = options["block"] == ("middle", 0)
            return n.reshape(2 * len(n), -1, n.shape[-1]) if is_middle else n, context, value

        patched = model.clone()
        patched.set_model_patch(halve, list_name)
        return patched


@pytest.mark.parametrize(("apply", "name"), [(apply_reference_only, "attn1_patch"), (apply_ip_adapter, "attn2_patch")])
def test_tokens_that_stay_in_another_order_raise(base: ModelPatcher, apply: Node, name: str) -> None:
    with pytest.raises(ValueError, match=r"remove the node HalveTokens; got 4 x \d+ .* expected 2 x \d+"):
        sample_latent(HalveTokens.execute(apply(base), name), size=(16, 16))


def guide_by_self_attention(model: ModelPatcher, scale: float = 0.7) -> ModelPatcher:
    return get_model(SelfAttentionGuidance.execute(model, scale=scale, blur_sigma=2.0))


def guide_by_perturbed_attention(model: ModelPatcher) -> ModelPatcher:
    return get_model(PerturbedAttentionGuidance.execute(model, scale=3.0))


@pytest.mark.parametrize("text_stream", ["own", "shared"])
def test_self_attention_guidance_behind_mixed_attention(base: ModelPatcher, text_stream: str) -> None:
    """Its patch replaces that of the middle block's self-attention."""
    size = {"size": (16, 16)}
    model = apply_infinite_id(base, text_stream=text_stream)
    behind = sample_latent(guide_by_self_attention(model), **size)
    before = apply_infinite_id(guide_by_self_attention(base), text_stream=text_stream)
    assert torch.equal(sample_latent(before, **size), behind)
    assert not all_close(behind, sample_latent(model, **size), 1e-3)
    assert all_close(sample_latent(guide_by_self_attention(model, 0.0), **size), sample_latent(model, **size), 1e-4)


@pytest.mark.parametrize("family", ["SD1.5", "SDXL"])
def test_perturbed_attention_guidance_reaches_every_layer(family: str) -> None:
    """Its patch is one for all attentions of the middle block, and there for one more prediction in each step."""
    model = apply_infinite_id(make_small_model(family), make_infinite_id_adapter(family))
    out = sample_latent(guide_by_perturbed_attention(model), family, size=(16, 16))
    assert not all_close(out, sample_latent(model, family, size=(16, 16)), 1e-3)


def double(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
    return 2 * run_attention_backend(q, k, v, options)


def replace_attention(model: ModelPatcher, name: str, *key: int) -> ModelPatcher:
    """The patch of a node that does not keep the one that it finds."""
    patched = model.clone()
    patched.set_model_patch_replace(double, name, "middle", *key)
    return patched


APPLY_NODES = {
    "decoupled": (apply_ip_adapter, make_ip_adapter, "attn2"),
    "fused": (apply_fused_kv, make_fused_kv_adapter, "attn2"),
    "mixed": (apply_infinite_id, make_infinite_id_adapter, "attn1"),
}


@pytest.mark.parametrize("key", [(0,), (0, 0)], ids=["block", "layer"])
@pytest.mark.parametrize("family", ["SD1.5", "SDXL"])
@pytest.mark.parametrize("method", APPLY_NODES)
def test_a_patch_that_replaces_ours_is_kept_below_it(method: str, family: str, key: tuple[int, ...]) -> None:
    apply, make_adapter, name = APPLY_NODES[method]
    model, adapter = make_small_model(family), make_adapter(family=family)
    behind = sample_latent(replace_attention(apply(model, adapter), name, *key), family, steps=1)
    before = sample_latent(apply(replace_attention(model, name, *key), adapter), family, steps=1)
    assert torch.equal(behind, before)
    assert not all_close(behind, sample_latent(apply(model, adapter), family, steps=1), 1e-3)
    assert not all_close(behind, sample_latent(replace_attention(model, name, *key), family, steps=1), 1e-3)


def test_a_patch_in_between(base: ModelPatcher) -> None:
    """Behind it, a second Apply node finds no patch of the first."""
    first, second = make_ip_adapter(), make_ip_adapter(seed=1)
    between = apply_ip_adapter(replace_attention(apply_ip_adapter(base, first), "attn2", 0), second)
    before = apply_ip_adapter(apply_ip_adapter(replace_attention(base, "attn2", 0), first), second)
    assert torch.equal(sample_latent(between), sample_latent(before))


@pytest.mark.parametrize("method", APPLY_NODES)
def test_a_patch_that_keeps_ours(base: ModelPatcher, method: str) -> None:
    """The identity acts once, whether another pack's patch calls ours or not."""
    apply, make_adapter, name = APPLY_NODES[method]
    model = apply(base, make_adapter())
    ours = model.model_options["transformer_options"]["patches_replace"][name]["middle", 0]
    keeping = model.clone()
    keeping.set_model_patch_replace(lambda *args: ours(*args), name, "middle", 0)
    assert torch.equal(sample_latent(keeping), sample_latent(model))
    again = apply(keeping, make_adapter(seed=1))
    assert all_close(sample_latent(again), sample_latent(apply(model, make_adapter(seed=1))))


def test_a_flux_block_that_is_replaced() -> None:
    def change(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        out = extra["original_block"](args)
        return {**out, "img": out["img"] * 1.1}

    def replace_block(model: ModelPatcher) -> ModelPatcher:
        patched = model.clone()
        patched.set_model_patch_replace(change, "dit", "double_block", 1)
        return patched

    model, adapter = make_small_model("FLUX.1"), make_flux_adapter("xlabs")
    behind, before = (
        replace_block(apply_flux_adapter(model, adapter)),
        apply_flux_adapter(replace_block(model), adapter),
    )
    assert torch.equal(sample_flux_latent(behind), sample_flux_latent(before))
    assert not all_close(sample_flux_latent(behind), sample_flux_latent(apply_flux_adapter(model, adapter)), 1e-3)


class MovedPatch:
    """A patch with tensors and a model, which ComfyUI asks for."""

    def __init__(self) -> None:
        self.model, self.moves, self.is_cleaned = make_ip_adapter().patcher, list[Any](), False

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
        return run_attention_backend(q, k, v, options)

    def to(self, device_or_dtype: Any) -> MovedPatch:
        self.moves.append(device_or_dtype)
        return self

    def models(self) -> list[ModelPatcher]:
        return [self.model]

    def cleanup(self) -> None:
        self.is_cleaned = True

    def __deepcopy__(self, memo: dict[int, Any]) -> MovedPatch:
        return self


def test_a_patch_below_ours_is_moved_and_its_model_loaded(base: ModelPatcher) -> None:
    found = MovedPatch()
    model = base.clone()
    model.set_model_attn2_replace(found, "middle", 0)
    sample_latent(apply_ip_adapter(model))
    loaded = [loaded.model.model for loaded in comfy.model_management.current_loaded_models]
    assert found.model.model in loaded and torch.device("cpu") in found.moves and found.is_cleaned
