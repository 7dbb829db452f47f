"""The base models: each trains a few steps, and ComfyUI and the pack run the files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.clip_vision
import pytest
import torch
from comfyui_likeness.likeness.encoders import token_embedding
from comfyui_likeness.nodes.loaders import native_models
from comfyui_likeness.training.base_models import clip_pair, vae
from comfyui_likeness.training.data import image_source, shard_source
from comfyui_likeness.training.task import make_generator
from safetensors.torch import load_file
from support import base_stack, small_models
from support.small_models import SMALL_CLIP, load_host_clip, read_metadata
from support.toy_tasks import DISC_WORLD, read_logged_values, train_few_steps
from torch import Tensor


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_models.train_base_models(tmp_path_factory.mktemp("trained"))


def test_comfyui_loads_the_text_encoder(trained: Path) -> None:
    file = trained / "clip" / "model" / clip_pair.TEXT_FILE
    host, own = load_host_clip(file), clip_pair.load_text_encoder(file)
    for text in ("a red disc at the left", "an elephant, (red:1.3)", ""):
        tokens = host.tokenize(text)
        plain = [[token for token, _ in tokens["l"][0]]]
        assert plain == clip_pair.tokenize_texts(clip_pair.SDTokenizer(), [text])
        with torch.inference_mode():
            seen = host.encode_from_tokens(host.tokenize(text.replace("(red:1.3)", "red")))
            expected = own(clip_pair.tokenize_texts(clip_pair.SDTokenizer(), [text.replace("(red:1.3)", "red")]))[0]
        assert seen.shape == (1, 77, 32) and torch.allclose(seen.float(), expected, atol=2e-3)


def test_unknown_words_share_an_embedding(trained: Path) -> None:
    own = clip_pair.load_text_encoder(trained / "clip" / "model" / clip_pair.TEXT_FILE)

    def encode(text: str) -> Tensor:
        return own(clip_pair.tokenize_texts(clip_pair.SDTokenizer(), [text]))[0]

    with torch.no_grad():
        assert torch.equal(encode("a cat at the left"), encode("a dog at the left"))
        assert not torch.equal(encode("a red disc"), encode("a blue disc"))
        assert not torch.equal(encode("a cat"), encode("a"))


def test_comfyui_loads_the_vision_tower(trained: Path) -> None:
    file = trained / "clip" / "model" / clip_pair.VISION_FILE
    host = comfy.clip_vision.ClipVisionModel(read_metadata(file)["settings"]["config"])
    assert host.load_sd(load_file(file)) == ([], [])
    image = image_source.load_images(DISC_WORLD, [3, 4], 64).movedim(1, -1)
    with torch.inference_mode():
        out = host.encode_image(image)
    assert out["image_embeds"].shape == (2, 32) and out["penultimate_hidden_states"].shape == (2, 17, 32)
    assert not torch.allclose(out["image_embeds"][0], out["image_embeds"][1])


def test_the_clip_pair_learns_all_its_weights(tmp_path: Path) -> None:
    made: list[clip_pair.CLIPPair] = []

    def make() -> clip_pair.CLIPPair:
        made.append(clip_pair.CLIPPair(replace(SMALL_CLIP, token_dropout=0.2), DISC_WORLD, 0))
        return made[0]

    _, losses = train_few_steps(make, tmp_path, steps=30, batch_size=8, warmup_steps=0, learning_rate=3e-3)
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    fresh = clip_pair.CLIPPair(SMALL_CLIP, DISC_WORLD, 0).state_dict()
    still = [key for key, value in made[0].state_dict().items() if torch.equal(value, fresh[key])]
    assert still == []
    shown = made[0].make_samples(make_generator(1))
    assert 0 <= float(shown["caption_found"]) <= 1 and set(shown) == {"caption_found", "image_found"}


def test_a_vision_tower_learns_for_a_given_text_encoder_and_tells_heads_apart(tmp_path: Path) -> None:
    first = tmp_path / "first"
    first.mkdir()
    base_stack.make_base_stack(first)
    text_file = first / clip_pair.TEXT_FILE
    options: dict[str, Any] = {"head_contrast_weight": 2.0, "detailed_share": 0.5, "token_dropout": 0.0}
    settings = replace(base_stack.CLIP_PAIR_CONFIG, text=str(text_file), **options)
    made: list[clip_pair.CLIPPair] = []

    def make() -> clip_pair.CLIPPair:
        made.append(clip_pair.CLIPPair(settings, shard_source.ShardSource(first), 0))
        return made[0]

    folder, _ = train_few_steps(make, tmp_path, steps=20, batch_size=4, warmup_steps=0)
    heads = [*read_logged_values(tmp_path, "head_contrast").values()]
    assert sum(heads[-4:]) < 0.7 * sum(heads[:4])
    before, after = load_file(text_file), load_file(folder / clip_pair.TEXT_FILE)
    assert before.keys() == after.keys()
    assert [key for key in before if not torch.equal(before[key], after[key])] == ["text_projection.weight"]
    fresh = clip_pair.CLIPPair(settings, shard_source.ShardSource(first), 0).vision.state_dict()
    after = load_file(folder / clip_pair.VISION_FILE)
    assert [key for key, value in fresh.items() if torch.equal(value.half(), after[key])] == []
    pairs = made[0].make_batch(make_generator(3), 6)["head_crops"]
    assert pairs.shape == (2, 3, 3, 128, 128)
    assert torch.equal(pairs, made[0].make_batch(make_generator(3), 6)["head_crops"])
    assert len(pairs.flatten(0, 1).flatten(1).unique(dim=0)) == 6  # two of each of three people
    with pytest.raises(ValueError, match="expected a folder of shards"):
        clip_pair.CLIPPair(settings, DISC_WORLD, 0)


def test_captions_of_looks_belong_to_head_crops_or_whole_images(tmp_path: Path) -> None:
    base_stack.make_base_stack(tmp_path)
    source = shard_source.ShardSource(tmp_path)
    settings = replace(base_stack.CLIP_PAIR_CONFIG, detailed_share=0.5, token_dropout=0.0)
    pair = clip_pair.CLIPPair(settings, source, 0)
    numbers = range(len(source))
    plain, detailed = (
        clip_pair.tokenize_texts(pair.tokenizer, texts)
        for texts in (
            [source.load_caption(number) for number in numbers],
            [text for number in numbers for text in source.load_detailed_captions(number)],
        )
    )
    images = torch.stack([source.load_image(number, 128) for number in numbers]).float() / 255
    whole = {image.sum().item() for image in clip_pair.clip_preprocess(images, 128)}
    found = {True: set[bool](), False: set[bool]()}  # is the caption detailed -> is the image whole
    for seed in range(8):
        batch = pair.make_batch(make_generator(seed), 6)
        assert "head_crops" not in batch
        for image, row in zip(batch["images"], batch["tokens"], strict=True):
            assert row in plain or row in detailed
            found[row not in plain].add(image.sum().item() in whole)
    assert found == {True: {True, False}, False: {True}}


def test_gradients_through_layers_that_add_in_place() -> None:
    """ComfyUI's layers add in place; the gradients are those of layers that do not."""
    torch.manual_seed(1)
    pair = clip_pair.CLIPPair(SMALL_CLIP, DISC_WORLD, 0)
    layer = pair.vision.vision_model.encoder.layers[0]
    attention: Any = lambda q, k, v, heads, mask=None: v  # noqa: E731
    x = torch.randn(1, 5, 32, requires_grad=True)
    layer(x * 1, None, attention).square().sum().backward()
    found, x.grad = x.grad, None
    y = x + layer.self_attn(layer.layer_norm1(x), None, attention)
    (y + layer.mlp(layer.layer_norm2(y))).square().sum().backward()
    assert found is not None and torch.allclose(found, x.grad, atol=1e-5)


def test_the_captions_of_a_batch_differ() -> None:
    found = image_source.sample_captions(DISC_WORLD, make_generator(4), 12)
    assert len(found) == 12 and all(DISC_WORLD.load_caption(number) == text for text, number in found.items())
    assert len(image_source.sample_captions(DISC_WORLD, make_generator(4), 50)) == 16  # there are no more
    with pytest.raises(ValueError, match="got 16 different captions; expected 17; lower batch_size"):
        clip_pair.CLIPPair(SMALL_CLIP, DISC_WORLD, 0).make_batch(make_generator(4), 17)


def test_missing_and_wrong_files_are_named(trained: Path, tmp_path: Path) -> None:
    other = trained / "vae" / "model" / vae.VAE_FILE
    for load, file in (
        (native_models.load_vae, tmp_path / "no"),
        (native_models.load_text_encoder, other),
        (native_models.load_unet, other),
    ):
        with pytest.raises(ValueError, match=f"got {file}.*train"):
            load(file)


def test_a_closed_vocabulary_expands_to_the_full_table() -> None:
    short = token_embedding.ClosedVocabularyEmbedding([5, 320, 49407], 8)
    tensors = {
        token_embedding.TOKEN_TABLE_NAME: short.weight.detach(),
        token_embedding.KNOWN_TOKENS_NAME: torch.tensor(short.known_tokens),
        "other": torch.ones(1),
    }
    table = token_embedding.expand_token_table(tensors)
    assert table[token_embedding.TOKEN_TABLE_NAME].shape == (49408, 8) and set(table) == {
        token_embedding.TOKEN_TABLE_NAME,
        "other",
    }
    tokens = torch.tensor([[5, 49407, 17, 320, 18]])
    assert torch.equal(table[token_embedding.TOKEN_TABLE_NAME][tokens], short(tokens))
    assert short(tokens, out_dtype=torch.float16).dtype == torch.float16
    assert token_embedding.expand_token_table({"other": tensors["other"]}).keys() == {"other"}
    with pytest.raises(ValueError, match="3 token embeddings for 3 known tokens; expected one more"):
        token_embedding.expand_token_table({**tensors, token_embedding.TOKEN_TABLE_NAME: short.weight.detach()[:3]})
    with pytest.raises(ValueError, match="different numbers"):
        token_embedding.index_known_tokens(torch.tensor([1, 1]))
