"""Arc2Face, the prompt inverter and what is made of them, against the official code's outputs."""

from __future__ import annotations

import json
from typing import Any

import comfy.ops
import pytest
import torch
from comfyui_likeness.likeness import adaface, arc2face, clip_text, detect, keymaps
from comfyui_likeness.likeness.clip_text import END, START, TextModel
from golden import GOLDEN, WEIGHTS
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import normalize

FOLDER = GOLDEN / "adaface"
CASES: dict[str, dict[str, Any]] = {
    case["name"]: case for case in json.loads((FOLDER / "cases.json").read_text())["cases"]
}
OPERATIONS = comfy.ops.manual_cast
CPU = torch.device("cpu")
HALF = 0.5  # what the inverter's extra words count in the 2024 code


def of_kind(kind: str) -> list[str]:
    return [name for name, case in CASES.items() if case["kind"] == kind]


def weights(case: dict[str, Any], role: str) -> dict[str, Tensor]:
    entry = case["weights"][role]
    tensors = WEIGHTS.state_dict(json.loads((FOLDER / entry["manifest"]).read_text()), salt=entry["salt"])
    return tensors | {key: torch.tensor(value) for key, value in entry.get("overrides", {}).items()}


def given(case: dict[str, Any], name: str) -> Tensor:
    entry = case["inputs"][name]
    value = WEIGHTS.tensor(entry["tensor_name"], entry["shape"], salt=entry["salt"])
    value = normalize(value, dim=-1) if entry.get("post") == "l2_normalize_last_dim" else value
    return value * entry.get("scale", 1.0)


def close(case: dict[str, Any], found: dict[str, Tensor]) -> None:
    """Every stored output is there and within the case's tolerance."""
    stored = load_file(FOLDER / case["outputs"]["file"])
    assert found.keys() == stored.keys()
    for name, value in stored.items():
        tolerance = case["tolerance"].get(name, case["tolerance"])
        assert found[name].shape == value.shape, name
        assert torch.allclose(found[name], value, atol=tolerance["atol"], rtol=tolerance["rtol"]), name


def text_model(case: dict[str, Any], role: str) -> TextModel:
    heads = case["config"]["num_attention_heads"]
    return adaface.text_model(weights(case, role), "text_model.", heads, OPERATIONS).requires_grad_(False)


def inverter(case: dict[str, Any]) -> adaface.PromptInverter:
    """The prompt inverter of a case, from the names of its file alone."""
    found = {key: value for key, value in weights(case, "inverter").items() if not unused(key)}
    extras = {key: found.pop(key) for key in adaface.EXTRAS if key in found}
    text = adaface.text_model(found, adaface.TEXT, case["config"]["num_attention_heads"], OPERATIONS)
    copies = [layer.self_attn.copies for layer in text.layers]
    assert copies == case["weights"]["inverter"]["attention_multipliers"]
    return adaface.PromptInverter(text, extras).requires_grad_(False)


def unused(key: str) -> bool:
    return not key.startswith(adaface.TEXT) and key not in adaface.EXTRAS


@pytest.mark.parametrize("name", of_kind("arc2face_projection"))
def test_arc2face(name: str) -> None:
    case = CASES[name]
    model, faces = text_model(case, "arc2face_encoder"), given(case, "face_embs")
    assert clip_text.padded(arc2face.PROMPT) == case["token_ids"] and arc2face.AT == case["id_position"]
    made = arc2face.tokens(model, faces)
    found = {"tokens": made}
    if len(faces) == 1:
        found |= {"tokens_zero_face": arc2face.tokens(model, 0 * faces)}
        found |= {"tokens_empty_prompt": arc2face.nothing(model, CPU)}
    else:
        found |= {"core": made[:, 4:20], "core_len22": made[:, 4:20]}  # what is behind a row does not change it
    close(case, found)


@pytest.mark.parametrize("name", of_kind("mkv_attention"))
def test_widened_attention(name: str) -> None:
    case = CASES[name]
    config, x = case["config"], given(case, "hidden_states")
    layer = clip_text.Attention(config["hidden_size"], config["num_attention_heads"], config["multiplier"], OPERATIONS)
    keymaps.load(layer, weights(case, "attention"))
    mask = torch.full((x.shape[1],) * 2, -torch.inf).triu(1)
    layer.requires_grad_(False)
    close(case, {"out_causal": layer(x, mask), "out_nomask": layer(x, None)})


@pytest.mark.parametrize("widens", clip_text.WIDENS)
def test_equal_copies_change_nothing(widens: str) -> None:
    torch.manual_seed(0)
    plain, wide = (clip_text.Attention(64, 4, copies, torch.nn, widens).requires_grad_(False) for copies in (1, 3))
    own, parts = plain.state_dict(), f"v{widens[0]}"
    wide.load_state_dict({k: v.repeat(3, *[1] * (v.ndim - 1)) if k[0] in parts else v for k, v in own.items()})
    x, mask = torch.randn(2, 9, 64), torch.full((9, 9), -torch.inf).triu(1)
    assert torch.allclose(plain(x, mask), wide(x, mask), atol=1e-6)


def test_copies_of_queries_read_those_of_values_and_are_averaged() -> None:
    torch.manual_seed(0)
    wide = clip_text.Attention(64, 4, 3, torch.nn, "queries").requires_grad_(False)
    own, x, mask = wide.state_dict(), torch.randn(2, 9, 64), torch.full((9, 9), -torch.inf).triu(1)
    said = []
    for copy in range(3):
        alone = clip_text.Attention(64, 4, 1, torch.nn).requires_grad_(False)
        rows = slice(copy * 64, (copy + 1) * 64)
        alone.load_state_dict({k: v[rows] if k[0] in "qv" else v for k, v in own.items()})
        said.append(alone(x, mask))
    assert torch.allclose(wide(x, mask), sum(said) / 3, atol=1e-6)


def forms(full: Tensor, pad: Tensor, first: int) -> dict[str, Tensor]:
    """What else the official function can give of the whole states, `first` being the first row of padding."""
    half, whole, zero = full.clone(), full.clone(), full.clone()
    middle = first + (77 - first) // 2
    half[:, first:middle], whole[:, first:76] = pad[first:middle], pad[first:76]
    zero[:, 22:24], zero[:, 24:76] = pad[22:24], 0
    core = torch.cat((full[:, :22], full[:, 76:]), 1)
    return {
        "prompt_full": full, "prompt_full_half_pad": half, "prompt_full_pad": whole, "prompt_full_zeroed_extra": zero,
        "prompt_b_core_e": core, "pad_embeddings": pad,
    }  # fmt: skip


@pytest.mark.parametrize("name", of_kind("inverter_2024"))
def test_inverter(name: str) -> None:
    case = CASES[name]
    model, rows = inverter(case), given(case, "face_prompt_embs")
    ids = clip_text.padded((*adaface.PROMPT, *[adaface.COMMA] * 16))
    found = {f"subj_embs_scale_{scale:g}": model.vectors(rows, scale) for scale in case["scales"]}
    found |= forms(model(ids, rows), model.padding(CPU), 22)
    if "extra_words" in case:
        words = torch.cat(
            [model(line, row[None]) for line, row in zip(case["extra_words_token_ids"], rows, strict=True)]
        )
        found["extra_words_full"] = words
        found["extra_words_core"] = torch.cat((words[:, 4:20], HALF * words[:, 20:22]), 1)
    stored = load_file(FOLDER / case["outputs"]["file"])
    close(case, {key: found[key] for key in stored})


@pytest.mark.parametrize("name", of_kind("inverter_2025"))
def test_newer_inverter(name: str) -> None:
    """Its padding is that of the original CLIP; a learned suffix may follow the face's rows, and is never scaled."""
    case = CASES[name]
    model, rows = inverter(case), given(case, "face_prompt_embs")
    tables = weights(case, "clip_base_embeddings")
    word, place = (next(v for k, v in tables.items() if f"{n}_embedding" in k) for n in ("token", "position"))
    pad = word[END] + place
    count, suffix = rows.shape[1], model.static_img_suffix_embs
    ids = clip_text.padded((*adaface.PROMPT, *[adaface.COMMA] * (count + 2)))
    full, found = model(ids, rows), {}
    for scale in case["scales"]:
        found[f"ada_embs_scale_{scale:g}"] = adaface.scaled(model.vectors(rows), pad, scale)
        if suffix is not None:
            both = model(ids, torch.cat((rows, suffix.expand(len(rows), -1, -1)), 1))[
                :, 4 : 4 + count + suffix.shape[1]
            ]
            both = torch.cat((adaface.scaled(both[:, :count], pad, scale), both[:, count:]), 1)
            found[f"ada_embs_scale_{scale:g}_suffix"] = both
    found |= forms(full, pad, 4 + count + case["num_static_suffix"] + 2)
    if "extra_words" in case:
        words = torch.cat(
            [model(line, row[None]) for line, row in zip(case["extra_words_token_ids"], rows, strict=True)]
        )
        found |= {"extra_words_full": words, "extra_words_core": words[:, 4:22]}
    stored = load_file(FOLDER / case["outputs"]["file"])
    close(case, {key: found[key] for key in stored})


def embedded(model: TextModel, ids: list[int], vectors: Tensor) -> Tensor:
    """Word embeddings of ids; from 49408 on they name the vectors."""
    words = model.words([min(i, END) for i in ids], CPU)
    for place, i in enumerate(ids):
        if i > END:
            words[0, place] = vectors[i - END - 1]
    return words


PROMPTS = [*of_kind("prompt_encoding_wrapper_2024"), *of_kind("prompt_encoding_wrapper_2025")]


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_are_encoded(name: str) -> None:
    case = CASES[name]
    model, vectors = text_model(case, "text_encoder"), given(case, "subj_embs")
    found = {f"prompt_{i}": model(embedded(model, one["token_ids"], vectors)) for i, one in enumerate(case["prompts"])}
    close(case, found | {"negative": model(embedded(model, case["negative_token_ids"], vectors))})


@pytest.mark.parametrize("name", of_kind("prompt_encoding_ldm_2024"))
def test_layers_are_mixed_ahead_of_the_last_norm(name: str) -> None:
    case = CASES[name]
    model, vectors, ids = text_model(case, "text_encoder"), given(case, "subj_embs"), list(case["token_ids"])
    at = ids.index(case["subject_token_id"])
    ids[at : at + 16] = range(END + 1, END + 17)
    mixes = [torch.tensor(one).float()[:, None] for one in case["skip_weights"]]
    found = {f"cond_{i}": model(embedded(model, ids, vectors), mix) for i, mix in enumerate(mixes)}
    close(case, found | {"uncond_0": model(model.words(case["negative_token_ids"], CPU), mixes[0])})


def test_noise() -> None:
    case = CASES["noise_b3"]
    faces, noise = given(case, "face_embs"), given(case, "noise")
    found = {}
    for level in case["levels"]:
        found[f"keepnorm_{level}"] = normalize(adaface.perturbed(faces, level, noise), dim=-1)
        found[f"nokeep_{level}"] = faces + level * faces.std(-1, keepdim=True).mean() * noise
    close(case, found)
    case = CASES["dev_perturb_tokens"]
    rows, noise = given(case, "tokens"), given(case, "noise")
    close(case, {f"perturbed_{std}": adaface.perturbed(rows, std, noise) for std in case["stds"]})


def test_end_to_end() -> None:
    case = CASES["e2e_mid576"]
    encoder, inverse, text = text_model(case, "arc2face_encoder"), inverter(case), text_model(case, "text_encoder")
    faces = given(case, "face_embs")
    face = arc2face.mean_face(faces, torch.full((len(faces),), 1 / len(faces)))
    core = arc2face.tokens(encoder, face)[:, 4:20]
    vectors = inverse.vectors(core)
    half = arc2face.tokens(encoder, face.half().float())[:, 4:20].half().float()
    close(case, {
        "id_embedding": face, "arc2face_core": core, "subj_embs": vectors[0],
        "subj_embs_fp16_chain": inverse.vectors(half).half().float()[0],
        "prompt_embeds": text(embedded(text, case["token_ids"], vectors[0])),
        "negative_embeds": text(embedded(text, case["negative_token_ids"], vectors[0])),
    })  # fmt: skip


def test_every_case_is_checked() -> None:
    kinds = {
        "arc2face_projection", "mkv_attention", "inverter_2024", "inverter_2025", "prompt_encoding_wrapper_2024",
        "prompt_encoding_wrapper_2025", "prompt_encoding_ldm_2024", "id_noise", "token_noise_2025", "end_to_end_2024",
    }  # fmt: skip
    assert {case["kind"] for case in CASES.values()} == kinds and START == CASES["e2e_mid576"]["token_ids"][0]
    assert detect.FACE_ANTELOPE in arc2face.FACES
