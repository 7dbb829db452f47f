"""A person in a prompt: ComfyUI's tokenizer and text encoder with the identity's token embeddings."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.sd1_clip
import folder_paths
import pytest
import torch
from comfyui_likeness.likeness.methods import adaface, arc2face, prompt_placeholders
from comfyui_likeness.likeness.spec import Identity, Person
from comfyui_likeness.nodes import prompt, prompt_tokens
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.adaface_golden import CASES, FOLDER, build_input, build_weights
from support.adaface_models import (
    NUM_HEADS,
    TEXT_WIDTH,
    make_arcface_identity,
    make_clip,
    make_prompter,
    make_sdxl_clip,
)
from support.host_models import all_close, make_small_model, sample_latent
from torch import Tensor

N = adaface.NUM_FACE_VECTORS
VALUES: dict[str, Any] = {"strength": 1.0, "class_word": "woman"}


@pytest.fixture(scope="module")
def host() -> Any:
    return make_clip()


def encode_with_identity(clip: Any, text: str, identity: Any = None, **changes: Any) -> tuple[Tensor, Tensor]:
    """Both outputs of the node."""
    positive, class_word = prompt.PromptWithIdentity.execute(
        clip, make_prompter(), identity or make_arcface_identity(), text, **{**VALUES, **changes}
    ).args
    return positive[0][0], class_word[0][0]


def encode_text(clip: Any, text: str) -> Tensor:
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))[0][0]


@pytest.fixture
def embeddings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """ComfyUI's folder of embeddings."""
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "embeddings", ([str(tmp_path)], {".safetensors"}))
    yield tmp_path


TOKENIZER = comfy.sd1_clip.SD1Tokenizer(embedding_directory=[])


def add_embedding_folder(clip: Any, folder: Path) -> Any:
    """A CLIP with a folder of embeddings, as the checkpoint loader makes it."""
    clip = clip.clone()
    clip.tokenizer = TOKENIZER
    TOKENIZER.clip_l.embedding_directory = [str(folder)]
    return clip


LONG = ", ".join(f"word number {i} of a very long description" for i in range(28))  # more than 200 words
TEXTS = {
    "amid": "a photo of @anna in a red hat",
    "first": "@anna smiling",
    "last": "a portrait of @anna",
    "alone": "@anna",
    "twice": "@anna beside a mirror that shows @anna",
    "punctuation": "@anna, smiling (in the rain:1.3), @anna's hat",
    "weight": "a ((photo)) of (@anna:1.25) and [someone], (blurred (deep:0.7) town:1.1)",
    "bare parentheses": "a photo of (@anna) and \\(a bracket\\)",
    "deep": "((a man (with @anna:0.8)) walks)",
    "unicode": "фото @anna в лесу, 写真 🌲 naïve",
    "break": "a photo of @anna BREAK a forest",
    "long before": f"{LONG}, @anna",
    "long behind": f"@anna, {LONG}",
    "long around": f"{LONG} (@anna:1.2) {LONG}, @anna",
    "unbalanced": f"a ) photo ( of @anna, {LONG} @anna",
}


def list_tokens(chunks: list[list[tuple[Any, float]]]) -> list[tuple[Any, float]]:
    """The tokens and weights of a prompt, without start, end and padding."""
    tokens = []
    for chunk in chunks:
        tokens += [(tuple(t.tolist()) if isinstance(t, Tensor) else t, w) for t, w in chunk[1:] if t is not None]
    return [(t, w) for t, w in tokens if t not in (49406, 49407)]


@pytest.mark.parametrize("name", TEXTS)
def test_token_embeddings_are_placed_like_an_embedding_file(
    host: Any, embeddings: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = prompt.compute_token_embeddings(make_prompter(), make_arcface_identity(), adaface.FaceEmbeddingOptions())
    save_file({"clip_l": rows["l"]}, embeddings / "inversion.safetensors")
    clip = add_embedding_folder(host, embeddings)
    text = TEXTS[name].replace("@anna", " embedding:inversion ")
    calls: list[Any] = []
    tokenize = prompt_tokens.tokenize_unsplit
    monkeypatch.setattr(prompt_tokens, "tokenize_unsplit", lambda *args: calls.append(tokenize(*args)) or calls[-1])
    output = encode_with_identity(host, TEXTS[name])[0]
    ours, theirs = calls[0]["l"], clip.tokenize(text)["l"]
    assert [len(chunk) for chunk in ours] == [77] * len(ours)
    assert list_tokens(ours) == list_tokens(theirs)
    runs = [[isinstance(t, Tensor) for t, _ in chunk] for chunk in ours]
    assert sum(map(sum, runs)) == N * TEXTS[name].count("@anna")
    assert all(sum(run) % N == 0 for run in runs)  # never split
    if all(sum(isinstance(t, Tensor) for t, _ in chunk) % N == 0 for chunk in theirs):
        assert torch.equal(output, encode_text(clip, text))
    else:
        assert name.startswith(("long", "unbalanced"))


def test_comfyui_would_split_some_of_these(host: Any, embeddings: Path) -> None:
    save_file({"clip_l": torch.ones(N, TEXT_WIDTH)}, embeddings / "inversion.safetensors")
    clip, split = add_embedding_folder(host, embeddings), []
    for name, text in TEXTS.items():
        chunks = clip.tokenize(text.replace("@anna", " embedding:inversion "))["l"]
        if any(sum(isinstance(t, Tensor) for t, _ in chunk) % N for chunk in chunks):
            split.append(name)
    assert split


@pytest.mark.parametrize("skip", [None, -1, -2])
def test_a_saved_embedding_gives_the_same_conditioning(host: Any, embeddings: Path, skip: int | None) -> None:
    preview = prompt.SaveEmbedding.execute(make_prompter(), make_arcface_identity(), "anna", 1.0).ui
    assert preview is not None and "embedding:anna" in json.dumps(preview.as_dict())
    file = embeddings / "anna.safetensors"
    assert list(load_file(file)) == ["emb_params"] and load_file(file)["emb_params"].shape == (N, TEXT_WIDTH)
    by_file_clip, clip = add_embedding_folder(host, embeddings), host.clone()
    for each_clip in (by_file_clip, clip):
        each_clip.clip_layer(skip)
    for text in ("a photo of {} in a (red:1.3) hat", "{}", "({}:1.2) and {}, smiling"):
        by_file = encode_text(by_file_clip, text.format(*[" embedding:anna "] * 2))
        assert torch.equal(encode_with_identity(clip, text.format("@anna", "@anna"))[0], by_file)


def test_names_of_embeddings(embeddings: Path) -> None:
    prompt.SaveEmbedding.execute(make_prompter(), make_arcface_identity(name="family/bert"), "", 1.0)
    assert (embeddings / "family" / "bert.safetensors").is_file()
    prompt.SaveEmbedding.execute(
        make_prompter(), make_arcface_identity(1), "family/bert", 1.0
    )  # replaces a file of this pack
    save_file({"emb_params": torch.ones(1, 768)}, embeddings / "bought.safetensors")
    before = (embeddings / "bought.safetensors").read_bytes()
    for name, message in (
        ("bought", "not an embedding of this pack"), ("two words", "without spaces"), ("../out", "folder"),
        ("a,b", "got"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            prompt.SaveEmbedding.execute(make_prompter(), make_arcface_identity(), name, 1.0)
    assert (embeddings / "bought.safetensors").read_bytes() == before
    with pytest.raises(ValueError, match="strength 0"):
        prompt.SaveEmbedding.execute(make_prompter(), make_arcface_identity(), "nobody", 0.0)
    with safe_open(embeddings / "family" / "bert.safetensors", "pt") as file:
        assert json.loads(file.metadata()["likeness"])["kind"] == "embedding"


@pytest.mark.parametrize("name", ["prompt_tiny_v16", "prompt_tiny_v4", "ldm_prompt_tiny_v16"])
def test_prompts_agree_with_the_official_code(name: str) -> None:
    case = CASES[name]
    width, heads = case["config"]["hidden_size"], case["config"]["num_attention_heads"]
    layers = case["config"]["num_hidden_layers"]
    tensors = {k: v for k, v in build_weights(case, "text_encoder").items() if k.startswith("text_model.")}
    host, stored = make_clip(width, heads, layers, tensors), load_file(FOLDER / case["outputs"]["file"])
    rows = {0: {"l": build_input(case, "subj_embs")[: case["num_vectors"]]}}
    checked = 0
    if "prompts" in case:
        for i, one in enumerate(case["prompts"]):
            conditioning = prompt_tokens.encode_prompt(
                host, prompt_placeholders.split_prompt(one["prompt"], ["z"]), rows, ()
            )[0][0]
            if (
                conditioning.shape[1] == 77 and one["token_ids"].index(49407) < 76
            ):  # the official code cuts longer prompts
                assert all_close(conditioning, stored[f"prompt_{i}"], 1e-4)
                checked += 1
    else:
        text = re.sub(r"\bz(, ?){15}", "@a ", case["prompt"])
        for i, mix in enumerate(case["skip_weights"]):
            conditioning = prompt_tokens.encode_prompt(host, prompt_placeholders.split_prompt(text, ["@a"]), rows, mix)[
                0
            ][0]
            assert all_close(conditioning, stored[f"cond_{i}"], 1e-4)
            checked += 1
    assert checked >= 2


def test_strength_0_uses_the_class_word(host: Any) -> None:
    text = "a photo of (@anna:1.2), smiling"
    outputs = [encode_text(host, text.replace("@anna", "woman")), encode_with_identity(host, text)[1]]
    outputs += [
        encode_with_identity(host, text, strength=0.0)[0],
        encode_with_identity(host, text, (Person(make_arcface_identity(), strength=0.0),))[0],
    ]
    assert all(torch.equal(output, outputs[0]) for output in outputs)
    assert not all_close(encode_with_identity(host, text)[0][:, :5], outputs[0][:, :5], 1e-3)
    assert torch.equal(encode_with_identity(host, "", class_word="")[1], encode_text(host, ""))


def test_the_text_encoder_is_unchanged(host: Any) -> None:
    before, text = encode_text(host, "a town"), "a photo of @anna"
    tokenizer = host.tokenizer
    first = encode_with_identity(host, text)[0]
    encode_with_identity(host, text, layer_mix="last two")
    assert host.tokenizer is tokenizer and tokenizer.clip_l.embedding_directory == []
    assert torch.equal(encode_text(host, "a town"), before) and torch.equal(encode_with_identity(host, text)[0], first)
    assert not any(module._forward_hooks for module in host.cond_stage_model.modules())


def test_without_a_placeholder_the_person_comes_first(host: Any) -> None:
    assert torch.equal(
        encode_with_identity(host, "portrait, cinematic")[0], encode_with_identity(host, "@anna portrait, cinematic")[0]
    )
    assert torch.equal(
        encode_with_identity(host, "portrait, cinematic")[1], encode_text(host, "woman portrait, cinematic")
    )


def test_custom_placeholders(host: Any) -> None:
    expected = encode_with_identity(host, "a photo of @anna")[0]
    assert torch.equal(encode_with_identity(host, "a photo of zzz", placeholder="zzz")[0], expected)
    assert torch.equal(encode_with_identity(host, "a photo of @ANNA")[0], expected)


def test_the_report_names_people_who_are_not_in_the_text(host: Any) -> None:
    anna, bert = make_arcface_identity(0), make_arcface_identity(1, name="bert")

    def read_report(text: str, *people: Identity) -> str:
        ui = prompt.PromptWithIdentity.execute(
            host, make_prompter(), tuple(map(Person, people)), text, strength=1.0, class_word="woman"
        ).ui
        assert ui is not None
        return ui.as_dict()["text"][0]

    assert read_report("@anna greets @bert", anna, bert) == "[anna] greets [bert]"
    assert read_report("a town", anna) == "[anna] a town\nNot in the text, put in front: @anna."
    assert read_report("a town", anna, bert).endswith("\nNot in the text, put in front: @anna, @bert.")
    assert read_report("@anna alone", anna, bert) == "[anna] alone\nNot in the text, left out: @bert."


def test_several_people_in_one_prompt(host: Any) -> None:
    anna, bert = make_arcface_identity(0), make_arcface_identity(1, name="bert")
    people = (Person(anna), Person(bert, strength=2.0))
    text = "@bert greets @anna"
    both = encode_with_identity(host, text, people)[0]
    rows = {0: prompt.compute_token_embeddings(make_prompter(), anna, adaface.FaceEmbeddingOptions())}
    rows[1] = prompt.compute_token_embeddings(make_prompter(), bert, adaface.FaceEmbeddingOptions(2.0))
    assert torch.equal(both, prompt_tokens.encode_prompt(host, ["", 1, " greets ", 0, ""], rows, ())[0][0])
    assert torch.equal(
        encode_with_identity(host, "a town", people)[0], encode_with_identity(host, "@anna @bert a town", people)[0]
    )
    named = encode_with_identity(host, "zz greets yy", people, placeholder="yy, zz")[0]
    assert torch.equal(named, both)
    with pytest.raises(ValueError, match=r"1 placeholder\(s\) for 2 people"):
        encode_with_identity(host, text, people, placeholder="zz")
    with pytest.raises(ValueError, match="'@anna' for two people"):
        encode_with_identity(host, text, (Person(anna), Person(make_arcface_identity(3))))


def test_options_change_the_token_embeddings(host: Any) -> None:
    text, two = "a photo of @anna", make_arcface_identity(5, faces=2)
    outs = [
        encode_with_identity(host, text, two, **changes)[0]
        for changes in (
            {}, {"strength": 4.0}, {"vectors": 4}, {"average": "tokens"}, {"variation": 0.05},
            {"variation": 0.05, "variation_seed": 1}, {"layer_mix": "last two"}, {"layer_mix": "last three"},
        )
    ]  # fmt: skip
    assert all(one.isfinite().all() for one in outs)
    assert all(not all_close(a, b, 1e-4) for i, a in enumerate(outs) for b in outs[:i])
    lone = replace(two, weight=torch.tensor([1.0, 0.0]))
    first = encode_with_identity(host, text, two, average="tokens")
    assert not all_close(encode_with_identity(host, text, lone, average="tokens")[0], first[0], 1e-4)
    for average in adaface.AVERAGING_METHODS:  # a face of weight 0 is absent
        rows = prompt.compute_token_embeddings(make_prompter(), lone, adaface.FaceEmbeddingOptions(averaging=average))[
            "l"
        ]
        key = lone.find_embedding(arc2face.FACE_FEATURES[-1])
        only = replace(lone, embeddings={key: lone.embeddings[key][:1]}, weight=torch.ones(1))
        assert all_close(
            rows,
            prompt.compute_token_embeddings(make_prompter(), only, adaface.FaceEmbeddingOptions(averaging=average))[
                "l"
            ],
            1e-5,
        )


def test_variation_does_not_depend_on_the_number_of_photos() -> None:
    one = make_arcface_identity(5)
    key = one.find_embedding(arc2face.FACE_FEATURES[-1])
    many = replace(make_arcface_identity(5, faces=8), embeddings={key: one.embeddings[key].repeat(8, 1)})
    varied = adaface.FaceEmbeddingOptions(noise_level=0.1)
    alone, together = (
        prompt.compute_token_embeddings(make_prompter(), identity, varied)["l"] for identity in (one, many)
    )
    assert all_close(together, alone, 1e-4)
    assert not all_close(
        alone, prompt.compute_token_embeddings(make_prompter(), one, adaface.FaceEmbeddingOptions())["l"], 1e-3
    )


def test_arc2face_prefers_its_own_recognizer() -> None:
    preferred, other = arc2face.FACE_FEATURES
    both = make_arcface_identity()
    key, rows = preferred.format_encoder_id("ab" * 32), torch.randn(1, 512)
    both = replace(both, embeddings={**both.embeddings, key: rows})
    assert torch.equal(arc2face.get_face_vectors(both)[0], torch.nn.functional.normalize(rows, dim=-1))
    assert other.network == "arcface.antelopev2"


def test_arc2faces_tokens() -> None:
    prompter = make_prompter()
    positive, negative = prompt.Arc2FaceConditioning.execute(prompter, make_arcface_identity(faces=2)).args
    model = prompter.arc2face.model
    rows, weight = arc2face.get_face_vectors(make_arcface_identity(faces=2))
    assert torch.equal(positive[0][0], arc2face.encode_face_prompt(model, arc2face.average_face_vectors(rows, weight)))
    assert positive[0][0].shape == negative[0][0].shape == (1, 77, TEXT_WIDTH)
    assert torch.equal(
        positive[0][0][:, :4], arc2face.encode_face_prompt(model, rows[:1])[:, :4]
    )  # the tokens before the face
    alone = replace(prompter, inverter=None, spec=None)
    assert torch.equal(
        prompt.Arc2FaceConditioning.execute(alone, make_arcface_identity(faces=2)).args[0][0][0], positive[0][0]
    )


def test_a_prompt_with_a_person_changes_the_image(host: Any) -> None:
    """The model is not patched; the conditioning is an ordinary one."""
    base = make_small_model(context_dim=TEXT_WIDTH)
    prompts = prompt.PromptWithIdentity.execute(
        host, make_prompter(), make_arcface_identity(), "a photo of @anna", **VALUES
    ).args
    negative = host.encode_from_tokens_scheduled(host.tokenize("blurry"))
    latents = [sample_latent(base, positive=one, negative=negative, batch_size=2) for one in prompts]
    assert all(latent.isfinite().all() for latent in latents) and not all_close(*latents, 1e-3)


def test_other_text_encoders_are_refused(host: Any) -> None:
    large = make_sdxl_clip()
    with pytest.raises(ValueError, match=r"text encoders g, l; seeds makes token embeddings for l \(test\)"):
        prompt.PromptWithIdentity.execute(large, make_prompter(), make_arcface_identity(), "@anna", **VALUES)
    for_xl = make_prompter((("l", 64), ("g", 512)))
    with pytest.raises(ValueError, match="text encoders l; seeds makes token embeddings for g, l"):
        prompt.PromptWithIdentity.execute(host, for_xl, make_arcface_identity(), "@anna", **VALUES)
    positive, class_word = prompt.PromptWithIdentity.execute(
        large, for_xl, make_arcface_identity(), "a @anna", **VALUES
    ).args
    assert positive[0][0].shape == (1, 77, 576) and not all_close(positive[0][0], class_word[0][0], 1e-3)
    with pytest.raises(ValueError, match="layer_mix for a CLIP with several"):
        prompt.PromptWithIdentity.execute(
            large, for_xl, make_arcface_identity(), "@anna", **VALUES, layer_mix="last two"
        )


def test_missing_parts_are_named(host: Any) -> None:
    alone = replace(make_prompter(), inverter=None, spec=None)
    with pytest.raises(ValueError, match="Arc2Face without a prompt inverter"):
        prompt.PromptWithIdentity.execute(host, alone, make_arcface_identity(), "@anna", **VALUES)
    with pytest.raises(ValueError, match="model pack antelopev2"):
        encode_with_identity(host, "@anna", replace(make_arcface_identity(), embeddings={}))
    with pytest.raises(ValueError, match="only faces of weight 0"):
        encode_with_identity(host, "@anna", replace(make_arcface_identity(), weight=torch.zeros(1)))
    assert NUM_HEADS * 64 == TEXT_WIDTH
