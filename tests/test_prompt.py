"""A person in a prompt: the host's tokenizer and text encoder, with the vectors in the place of a word."""

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
from comfyui_likeness.likeness import adaface, arc2face, prompts
from comfyui_likeness.likeness.spec import Person
from comfyui_likeness.nodes import prompt as nodes
from models import close, patcher, sample
from prompters import HEADS, WIDTH, clip, clip_xl, person, prompter
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_adaface import CASES, FOLDER, given, weights
from torch import Tensor

N = adaface.VECTORS
VALUES: dict[str, Any] = {"strength": 1.0, "class_word": "woman"}


@pytest.fixture(scope="module")
def host() -> Any:
    return clip()


def said(host: Any, text: str, who: Any = None, **changes: Any) -> tuple[Tensor, Tensor]:
    """Both prompts that the node makes."""
    made = nodes.PromptWithIdentity.execute(host, prompter(), who or person(), text, **{**VALUES, **changes}).args
    return made[0][0][0], made[1][0][0]


def plain(host: Any, text: str) -> Tensor:
    return host.encode_from_tokens_scheduled(host.tokenize(text))[0][0]


@pytest.fixture
def embeddings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The host's folder of embeddings."""
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "embeddings", ([str(tmp_path)], {".safetensors"}))
    yield tmp_path


TOKENIZER = comfy.sd1_clip.SD1Tokenizer(embedding_directory=[])


def knowing(host: Any, folder: Path) -> Any:
    """The host's CLIP with a folder of embeddings, as its checkpoint loader makes it."""
    made = host.clone()
    made.tokenizer = TOKENIZER
    TOKENIZER.clip_l.embedding_directory = [str(folder)]
    return made


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


def words_of(chunks: list[list[tuple[Any, float]]]) -> list[tuple[Any, float]]:
    """The words of a prompt, without start, end and padding."""
    out = []
    for chunk in chunks:
        out += [(tuple(t.tolist()) if isinstance(t, Tensor) else t, w) for t, w in chunk[1:] if t is not None]
    return [(t, w) for t, w in out if t not in (49406, 49407)]


@pytest.mark.parametrize("name", TEXTS)
def test_the_vectors_stand_where_the_hosts_own_embedding_would(
    host: Any, embeddings: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = nodes.word_vectors(prompter(), person(), adaface.Wording())
    save_file({"clip_l": rows["l"]}, embeddings / "inversion.safetensors")
    knows = knowing(host, embeddings)
    text = TEXTS[name].replace("@anna", " embedding:inversion ")
    seen: list[Any] = []
    real = nodes.whole_embeddings
    monkeypatch.setattr(nodes, "whole_embeddings", lambda *args: seen.append(real(*args)) or seen[-1])
    got = said(host, TEXTS[name])[0]
    ours, theirs = seen[-2 if len(seen) > 2 else 0]["l"], knows.tokenize(text)["l"]
    assert [len(chunk) for chunk in ours] == [77] * len(ours)
    assert words_of(ours) == words_of(theirs)
    runs = [[isinstance(t, Tensor) for t, _ in chunk] for chunk in ours]
    assert sum(map(sum, runs)) == N * TEXTS[name].count("@anna")
    assert all(sum(run) % N == 0 for run in runs)  # never parted
    if all(sum(isinstance(t, Tensor) for t, _ in chunk) % N == 0 for chunk in theirs):
        assert torch.equal(got, plain(knows, text))
    else:
        assert name.startswith(("long", "unbalanced"))


def test_some_of_these_would_be_parted_by_the_host(host: Any, embeddings: Path) -> None:
    save_file({"clip_l": torch.ones(N, WIDTH)}, embeddings / "inversion.safetensors")
    knows, parted = knowing(host, embeddings), []
    for name, text in TEXTS.items():
        chunks = knows.tokenize(text.replace("@anna", " embedding:inversion "))["l"]
        if any(sum(isinstance(t, Tensor) for t, _ in chunk) % N for chunk in chunks):
            parted.append(name)
    assert parted


@pytest.mark.parametrize("skip", [None, -1, -2])
def test_a_saved_embedding_is_the_person(host: Any, embeddings: Path, skip: int | None) -> None:
    shown = nodes.SaveEmbedding.execute(prompter(), person(), "anna", 1.0).ui
    assert shown is not None and "embedding:anna" in json.dumps(shown.as_dict())
    file = embeddings / "anna.safetensors"
    assert list(load_file(file)) == ["emb_params"] and load_file(file)["emb_params"].shape == (N, WIDTH)
    knows, ours = knowing(host, embeddings), host.clone()
    for one in (knows, ours):
        one.clip_layer(skip)
    for text in ("a photo of {} in a (red:1.3) hat", "{}", "({}:1.2) and {}, smiling"):
        by_file = plain(knows, text.format(*[" embedding:anna "] * 2))
        assert torch.equal(said(ours, text.format("@anna", "@anna"))[0], by_file)


def test_names_of_embeddings(embeddings: Path) -> None:
    nodes.SaveEmbedding.execute(prompter(), person(name="family/bert"), "", 1.0)
    assert (embeddings / "family" / "bert.safetensors").is_file()
    nodes.SaveEmbedding.execute(prompter(), person(1), "family/bert", 1.0)  # one of ours is replaced
    save_file({"emb_params": torch.ones(1, 768)}, embeddings / "bought.safetensors")
    before = (embeddings / "bought.safetensors").read_bytes()
    for name, message in (
        ("bought", "no embedding of this pack"), ("two words", "without blanks"), ("../out", "folder"), ("a,b", "got"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            nodes.SaveEmbedding.execute(prompter(), person(), name, 1.0)
    assert (embeddings / "bought.safetensors").read_bytes() == before
    with pytest.raises(ValueError, match="strength 0"):
        nodes.SaveEmbedding.execute(prompter(), person(), "nobody", 0.0)
    with safe_open(embeddings / "family" / "bert.safetensors", "pt") as file:
        assert json.loads(file.metadata()["likeness"])["kind"] == "embedding"


@pytest.mark.parametrize("name", ["prompt_tiny_v16", "prompt_tiny_v4", "ldm_prompt_tiny_v16"])
def test_prompts_are_those_of_the_official_code(name: str) -> None:
    case = CASES[name]
    width, heads = case["config"]["hidden_size"], case["config"]["num_attention_heads"]
    layers = case["config"]["num_hidden_layers"]
    tensors = {k: v for k, v in weights(case, "text_encoder").items() if k.startswith("text_model.")}
    host, stored = clip(width, heads, layers, tensors), load_file(FOLDER / case["outputs"]["file"])
    rows = {0: {"l": given(case, "subj_embs")[: case["num_vectors"]]}}
    checked = 0
    if "prompts" in case:
        for i, one in enumerate(case["prompts"]):
            made = nodes.encode(host, prompts.parts(one["prompt"], ["z"]), rows, ())[0][0]
            if made.shape[1] == 77 and one["token_ids"].index(49407) < 76:  # the official code cuts what is longer
                assert close(made, stored[f"prompt_{i}"], 1e-4)
                checked += 1
    else:
        text = re.sub(r"\bz(, ?){15}", "@a ", case["prompt"])
        for i, mix in enumerate(case["skip_weights"]):
            made = nodes.encode(host, prompts.parts(text, ["@a"]), rows, mix)[0][0]
            assert close(made, stored[f"cond_{i}"], 1e-4)
            checked += 1
    assert checked >= 2


def test_strength_0_says_the_class_word(host: Any) -> None:
    text = "a photo of (@anna:1.2), smiling"
    both = [plain(host, text.replace("@anna", "woman")), said(host, text)[1]]
    both += [said(host, text, strength=0.0)[0], said(host, text, (Person(person(), strength=0.0),))[0]]
    assert all(torch.equal(one, both[0]) for one in both)
    assert not close(said(host, text)[0][:, :5], both[0][:, :5], 1e-3)
    assert torch.equal(said(host, "", class_word="")[1], plain(host, ""))


def test_nothing_is_left_in_the_text_encoder(host: Any) -> None:
    before, text = plain(host, "a town"), "a photo of @anna"
    tokenizer = host.tokenizer
    first = said(host, text)[0]
    said(host, text, layer_mix="last two")
    assert host.tokenizer is tokenizer and tokenizer.clip_l.embedding_directory == []
    assert torch.equal(plain(host, "a town"), before) and torch.equal(said(host, text)[0], first)
    assert not any(module._forward_hooks for module in host.cond_stage_model.modules())


def test_without_a_place_the_person_comes_first(host: Any) -> None:
    assert torch.equal(said(host, "portrait, cinematic")[0], said(host, "@anna portrait, cinematic")[0])
    assert torch.equal(said(host, "portrait, cinematic")[1], plain(host, "woman portrait, cinematic"))


def test_a_placeholder_of_ones_own(host: Any) -> None:
    expected = said(host, "a photo of @anna")[0]
    assert torch.equal(said(host, "a photo of zzz", placeholder="zzz")[0], expected)
    assert torch.equal(said(host, "a photo of @ANNA")[0], expected)
    assert prompts.parts("zoe, Zs and a zebra", ["z"])[:2] == ["", 0]
    assert prompts.parts("mail me@anna, @annabel or @anna-lena", ["@anna"]) == [
        "mail me@anna, @annabel or ", 0, "-lena",
    ]  # fmt: skip
    assert prompts.default("family/Anna Maria") == "@Anna Maria"


def test_several_people_in_one_prompt(host: Any) -> None:
    anna, bert = person(0), person(1, name="bert")
    people = (Person(anna), Person(bert, strength=2.0))
    text = "@bert greets @anna"
    both = said(host, text, people)[0]
    rows = {0: nodes.word_vectors(prompter(), anna, adaface.Wording())}
    rows[1] = nodes.word_vectors(prompter(), bert, adaface.Wording(2.0))
    assert torch.equal(both, nodes.encode(host, ["", 1, " greets ", 0, ""], rows, ())[0][0])
    assert torch.equal(said(host, "a town", people)[0], said(host, "@anna @bert a town", people)[0])
    named = said(host, "zz greets yy", people, placeholder="yy, zz")[0]
    assert torch.equal(named, both)
    with pytest.raises(ValueError, match=r"1 placeholder\(s\) for 2 people"):
        said(host, text, people, placeholder="zz")
    with pytest.raises(ValueError, match="'@anna' for two people"):
        said(host, text, (Person(anna), Person(person(3))))


def test_what_makes_the_words(host: Any) -> None:
    text, two = "a photo of @anna", person(5, faces=2)
    outs = [
        said(host, text, two, **changes)[0]
        for changes in (
            {}, {"strength": 4.0}, {"vectors": 4}, {"average": "tokens"}, {"variation": 0.05},
            {"variation": 0.05, "variation_seed": 1}, {"layer_mix": "last two"}, {"layer_mix": "last three"},
        )
    ]  # fmt: skip
    assert all(one.isfinite().all() for one in outs)
    assert all(not close(a, b, 1e-4) for i, a in enumerate(outs) for b in outs[:i])
    lone = replace(two, weight=torch.tensor([1.0, 0.0]))
    first = said(host, text, two, average="tokens")
    assert not close(said(host, text, lone, average="tokens")[0], first[0], 1e-4)
    for average in adaface.AVERAGES:  # a face of weight 0 is absent
        rows = nodes.word_vectors(prompter(), lone, adaface.Wording(average=average))["l"]
        key = lone.find(arc2face.FACES[-1])
        only = replace(lone, embeddings={key: lone.embeddings[key][:1]}, weight=torch.ones(1))
        assert close(rows, nodes.word_vectors(prompter(), only, adaface.Wording(average=average))["l"], 1e-5)


def test_a_variation_is_as_strong_for_many_photos_as_for_one() -> None:
    one = person(5)
    key = one.find(arc2face.FACES[-1])
    many = replace(person(5, faces=8), embeddings={key: one.embeddings[key].repeat(8, 1)})
    varied = adaface.Wording(noise=0.1)
    alone, together = (nodes.word_vectors(prompter(), who, varied)["l"] for who in (one, many))
    assert close(together, alone, 1e-4)
    assert not close(alone, nodes.word_vectors(prompter(), one, adaface.Wording())["l"], 1e-3)


def test_arc2faces_own_recogniser_comes_first() -> None:
    own, other = arc2face.FACES
    both = person()
    key, rows = own.id("ab" * 32), torch.randn(1, 512)
    both = replace(both, embeddings={**both.embeddings, key: rows})
    assert torch.equal(arc2face.faces(both)[0], torch.nn.functional.normalize(rows, dim=-1))
    assert other.network == "arcface.antelopev2"


def test_arc2faces_tokens() -> None:
    given_ = prompter()
    positive, negative = nodes.Arc2FaceConditioning.execute(given_, person(faces=2)).args
    model = given_.arc2face.model
    rows, weight = arc2face.faces(person(faces=2))
    assert torch.equal(positive[0][0], arc2face.tokens(model, arc2face.mean_face(rows, weight)))
    assert positive[0][0].shape == negative[0][0].shape == (1, 77, WIDTH)
    assert torch.equal(positive[0][0][:, :4], arc2face.tokens(model, rows[:1])[:, :4])  # what is before the face
    alone = replace(given_, inverter=None, spec=None)
    assert torch.equal(nodes.Arc2FaceConditioning.execute(alone, person(faces=2)).args[0][0][0], positive[0][0])


def test_a_prompt_with_a_person_paints(host: Any) -> None:
    """Nothing in the model is patched: the prompt is an ordinary one."""
    base = patcher(context_dim=WIDTH)
    made = nodes.PromptWithIdentity.execute(host, prompter(), person(), "a photo of @anna", **VALUES).args
    negative = host.encode_from_tokens_scheduled(host.tokenize("blurry"))
    pictures = [sample(base, positive=one, negative=negative, batch=2) for one in made]
    assert all(one.isfinite().all() for one in pictures) and not close(*pictures, 1e-3)


def test_text_encoders_that_the_file_is_not_for_are_refused(host: Any) -> None:
    large = clip_xl()
    with pytest.raises(ValueError, match=r"text encoders g, l; seeds makes words for l \(test\)"):
        nodes.PromptWithIdentity.execute(large, prompter(), person(), "@anna", **VALUES)
    for_xl = prompter((("l", 64), ("g", 512)))
    with pytest.raises(ValueError, match="text encoders l; seeds makes words for g, l"):
        nodes.PromptWithIdentity.execute(host, for_xl, person(), "@anna", **VALUES)
    positive, class_word = nodes.PromptWithIdentity.execute(large, for_xl, person(), "a @anna", **VALUES).args
    assert positive[0][0].shape == (1, 77, 576) and not close(positive[0][0], class_word[0][0], 1e-3)
    with pytest.raises(ValueError, match="layer_mix for a CLIP of several"):
        nodes.PromptWithIdentity.execute(large, for_xl, person(), "@anna", **VALUES, layer_mix="last two")


def test_what_is_missing_is_said(host: Any) -> None:
    alone = replace(prompter(), inverter=None, spec=None)
    with pytest.raises(ValueError, match="Arc2Face alone"):
        nodes.PromptWithIdentity.execute(host, alone, person(), "@anna", **VALUES)
    with pytest.raises(ValueError, match="model pack antelopev2"):
        said(host, "@anna", replace(person(), embeddings={}))
    with pytest.raises(ValueError, match="only faces of weight 0"):
        said(host, "@anna", replace(person(), weight=torch.zeros(1)))
    assert HEADS * 64 == WIDTH
