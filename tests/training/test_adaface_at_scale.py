"""AdaFace at published scale: tensor shapes, a step of each task on the meta device, and the chain of configs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfyui_likeness.likeness.checkpoints import key_maps
from comfyui_likeness.likeness.methods import adaface, arc2face
from comfyui_likeness.training import task_registry, trainer
from comfyui_likeness.training.adaface import composition_distillation, prompt_tokens, teacher
from comfyui_likeness.training.adaface.attention_features import record_cross_attentions
from comfyui_likeness.training.adaface.model_expansion import expand_text_model
from comfyui_likeness.training.base_models import clip_pair, unet
from support.golden import GOLDEN_FOLDER
from test_configs_at_scale import CONFIGS, META, ROOT, build_sd15
from torch import Tensor, nn

TASKS_BY_CONFIG = {
    "arc2face": "arc2face", "adaface": "adaface", "adaface_wider": "adaface", "adaface_widest": "adaface",
    "adaface_compose": "adaface_compose",
}  # fmt: skip


def read_config(name: str, package: str = "training") -> Any:
    return task_registry.read_task_config(TASKS_BY_CONFIG[name], ROOT / package / "configs" / f"{name}.toml")


def read_manifest(name: str) -> dict[str, tuple[int, ...]]:
    manifest = json.loads((GOLDEN_FOLDER / "adaface" / "manifests" / f"{name}.json").read_text())
    return {key: tuple(shape) for key, shape in manifest.items()}


def get_shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in tensors.items()}


def make_clip_l() -> Any:
    config = task_registry.read_task_config("clip", CONFIGS / "clip.toml")[1]
    with META:
        text = clip_pair.build_text_encoder(
            clip_pair.build_text_config(config.width, config.layers, config.num_heads), range(49408)
        ).requires_grad_(False)
    clip_pair.clone_norm_inputs(text)
    return text.to(META)


def compute_unet_loss(patcher: ModelPatcher, text: Tensor) -> Tensor:
    """A UNet's denoising loss with a text [n, 77, 768]."""
    latent = torch.zeros(len(text), 4, 64, 64, device=META)
    noised = unet.NoisedLatents(latent, torch.ones(len(text), device=META), latent)
    return unet.denoising_loss(patcher.model, noised, math.inf, c_crossattn=text)


def check_step(loss: Tensor, module: nn.Module) -> None:
    loss.backward()
    trained = [value for value in module.parameters() if value.requires_grad]
    assert trained and all(value.grad is not None for value in trained)
    torch.optim.SGD(trainer.make_parameter_groups(module, 0.01), lr=0.1).step()


def test_the_teacher_is_arc2faces_text_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    run, config = read_config("arc2face")
    assert (run.batch_size, run.learning_rate, config.trainable_unet_part, config.resolution) == (4, 1e-6, "all", 512)
    patcher, model = build_sd15(monkeypatch), prompt_tokens.build_trainable_text_model(make_clip_l())
    base_model: Any = patcher.model
    for name, value in base_model.named_parameters():
        value.requires_grad_(teacher.TRAINABLE_UNET_PARTS[config.trainable_unet_part](name))
    module = nn.ModuleDict({"text": model, "unet": base_model.diffusion_model})
    check_step(compute_unet_loss(patcher, arc2face.encode_face_prompt(model, torch.zeros(2, 512, device=META))), module)
    assert get_shapes(prompt_tokens.collect_text_tensors(model, prompt_tokens.HOST_TEXT_PREFIX)) == read_manifest(
        "clip_text_clipL"
    )
    assert prompt_tokens.detect_base_family(model) == "SD1.5"


def test_the_inverter_expands_to_the_published_one(monkeypatch: pytest.MonkeyPatch) -> None:
    text, copies = make_clip_l(), (1,) * 12
    tensors = key_maps.select_prefix(text.transformer.state_dict(), prompt_tokens.HOST_TEXT_PREFIX)
    for name in ("adaface", "adaface_wider", "adaface_widest"):
        config = read_config(name)[1]
        if config.copies_per_layer:
            pairs = zip(copies, config.copies_per_layer, strict=True)
            assert all(new % old == 0 and new >= old for old, new in pairs)
            copies = config.copies_per_layer
            tensors = expand_text_model(tensors, copies, config.expansion_noise, 0)
    assert copies == (8, 8, 8, *[4] * 9)
    inverter = adaface.PromptInverter(prompt_tokens.build_trainable_text_model(text, tensors), {})
    # The published parameter count, token and position embeddings included.
    assert sum(value.numel() for value in inverter.parameters()) == pytest.approx(179.8e6, rel=1e-3)
    names = prompt_tokens.collect_text_tensors(inverter.text, adaface.TEXT_MODEL_PREFIX).keys() | {
        "hidden_state_layer_weights"
    }
    assert names == read_manifest("inverter_clipL_2x2x2x1x1x1x1x1x1x1x1x1").keys()
    patcher = build_sd15(monkeypatch)
    vectors = inverter.invert_tokens(torch.zeros(2, 16, 768, device=META))
    row = make_prompt_row()
    check_step(compute_unet_loss(patcher, prompt_tokens.encode_token_rows(text, [row] * 2, vectors)), inverter)


def make_prompt_row() -> list[int]:
    return prompt_tokens.make_token_row(
        clip_pair.SDTokenizer(), ["a photo of ", 0, ""], [prompt_tokens.PERSON_TOKEN] * adaface.NUM_FACE_VECTORS
    )


def test_a_step_of_composition_distillation(monkeypatch: pytest.MonkeyPatch) -> None:
    patcher, text = build_sd15(monkeypatch), make_clip_l()
    inverter = adaface.PromptInverter(prompt_tokens.build_trainable_text_model(text), {})
    vectors = inverter.invert_tokens(torch.zeros(1, 16, 768, device=META)).repeat(2, 1, 1)
    states = prompt_tokens.encode_token_rows(text, [make_prompt_row()] * 2, vectors)
    model: Any = patcher.model
    with record_cross_attentions(model.diffusion_model) as layers:
        compute_unet_loss(patcher, states)
    assert [layer.attention_maps.shape[-1] for layer in layers][:3] == [4096, 4096, 1024] and len(layers) == 16
    masks = torch.zeros(1, 512, 512, device=META)
    losses = [
        composition_distillation.layer_preserving_loss(layer, masks)
        + composition_distillation.pairwise_delta_loss(layer.attention_maps, layer.attention_maps.detach())
        for layer in layers
    ]
    losses.append(composition_distillation.pairwise_delta_loss(states, states.detach()))
    check_step(torch.stack(losses).sum(), inverter)


@pytest.mark.parametrize(("package", "num_files"), [("portrait_world", 6), ("training", 10)])
def test_each_config_uses_files_of_earlier_runs(package: str, num_files: int) -> None:
    files: set[Path] = set()
    for name in TASKS_BY_CONFIG:
        if not (ROOT / package / "configs" / f"{name}.toml").is_file():
            continue
        run, config = read_config(name, package)
        inputs = [getattr(config, field, "") for field in ("teacher", "teacher_unet", "init_from")]
        assert {Path(file) for file in inputs if file} <= files, name
        folder = Path(run.folder) / "model"
        files |= {folder / f"{config.file}.safetensors", folder / f"{config.file}{teacher.UNET_FILE_SUFFIX}"}
    assert len(files) == num_files
