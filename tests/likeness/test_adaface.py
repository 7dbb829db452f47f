"""Arc2Face, the prompt inverter and their token embeddings, against the outputs of the official code."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import comfy.ops
import pytest
import torch
from comfyui_likeness.likeness.checkpoints import checkpoint_detection, key_maps
from comfyui_likeness.likeness.encoders import clip_text
from comfyui_likeness.likeness.encoders.clip_text import END_TOKEN_ID, START_TOKEN_ID, CLIPTextModel
from comfyui_likeness.likeness.methods import adaface, arc2face
from safetensors.torch import load_file
from support.adaface_golden import CASES, FOLDER, build_input, build_weights
from support.identities import make_identity
from torch import Tensor
from torch.nn.functional import normalize

OPERATIONS = comfy.ops.manual_cast
CPU = torch.device("cpu")
EXTRA_WORD_SCALE = 0.5  # of the inverter's extra words in the 2024 code


def list_cases(kind: str) -> list[str]:
    return [name for name, case in CASES.items() if case["kind"] == kind]


def assert_case_close(case: dict[str, Any], found: dict[str, Tensor]) -> None:
    """Every stored output is present and within the tolerance of the case."""
    stored = load_file(FOLDER / case["outputs"]["file"])
    assert found.keys() == stored.keys()
    for name, value in stored.items():
        tolerance = case["tolerance"].get(name, case["tolerance"])
        assert found[name].shape == value.shape, name
        assert torch.allclose(found[name], value, atol=tolerance["atol"], rtol=tolerance["rtol"]), name


def build_text_model(case: dict[str, Any], role: str) -> CLIPTextModel:
    heads = case["config"]["num_attention_heads"]
    return adaface.build_text_model(build_weights(case, role), "text_model.", heads, OPERATIONS).requires_grad_(False)


def build_inverter(case: dict[str, Any]) -> adaface.PromptInverter:
    """The prompt inverter of a case, from its file's tensor names only."""
    found = {key: value for key, value in build_weights(case, "inverter").items() if not is_unused(key)}
    extras = {key: found.pop(key) for key in adaface.EXTRA_TENSORS if key in found}
    text = adaface.build_text_model(found, adaface.TEXT_MODEL_PREFIX, case["config"]["num_attention_heads"], OPERATIONS)
    copies = [layer.self_attn.num_copies for layer in text.layers]
    assert copies == case["weights"]["inverter"]["attention_multipliers"]
    return adaface.PromptInverter(text, extras).requires_grad_(False)


def is_unused(key: str) -> bool:
    return not key.startswith(adaface.TEXT_MODEL_PREFIX) and key not in adaface.EXTRA_TENSORS


@pytest.mark.parametrize("name", list_cases("arc2face_projection"))
def test_arc2face(name: str) -> None:
    case = CASES[name]
    model, faces = build_text_model(case, "arc2face_encoder"), build_input(case, "face_embs")
    assert (
        clip_text.pad_token_ids(arc2face.ID_PROMPT_IDS) == case["token_ids"]
        and arc2face.FACE_TOKEN_INDEX == case["id_position"]
    )
    made = arc2face.encode_face_prompt(model, faces)
    found = {"tokens": made}
    if len(faces) == 1:
        found |= {"tokens_zero_face": arc2face.encode_face_prompt(model, 0 * faces)}
        found |= {"tokens_empty_prompt": arc2face.encode_empty_prompt(model, CPU)}
    else:
        found |= {"core": made[:, 4:20], "core_len22": made[:, 4:20]}  # later tokens do not change earlier rows
    assert_case_close(case, found)


@pytest.mark.parametrize("name", list_cases("mkv_attention"))
def test_expanded_attention(name: str) -> None:
    case = CASES[name]
    config, x = case["config"], build_input(case, "hidden_states")
    layer = clip_text.CLIPTextAttention(
        config["hidden_size"], config["num_attention_heads"], config["multiplier"], OPERATIONS
    )
    key_maps.load_module_weights(layer, build_weights(case, "attention"))
    mask = torch.full((x.shape[1],) * 2, -torch.inf).triu(1)
    layer.requires_grad_(False)
    assert_case_close(case, {"out_causal": layer(x, mask), "out_nomask": layer(x, None)})


@pytest.mark.parametrize("projection", clip_text.EXPANDED_PROJECTIONS)
def test_equal_copies_change_nothing(projection: str) -> None:
    torch.manual_seed(0)
    plain, wide = (
        clip_text.CLIPTextAttention(64, 4, copies, torch.nn, projection).requires_grad_(False) for copies in (1, 3)
    )
    own, parts = plain.state_dict(), f"v{projection[0]}"
    wide.load_state_dict({k: v.repeat(3, *[1] * (v.ndim - 1)) if k[0] in parts else v for k, v in own.items()})
    x, mask = torch.randn(2, 9, 64), torch.full((9, 9), -torch.inf).triu(1)
    assert torch.allclose(plain(x, mask), wide(x, mask), atol=1e-6)


def test_query_copies_use_their_value_copies_and_are_averaged() -> None:
    torch.manual_seed(0)
    wide = clip_text.CLIPTextAttention(64, 4, 3, torch.nn, "queries").requires_grad_(False)
    own, x, mask = wide.state_dict(), torch.randn(2, 9, 64), torch.full((9, 9), -torch.inf).triu(1)
    outputs = []
    for copy in range(3):
        alone = clip_text.CLIPTextAttention(64, 4, 1, torch.nn).requires_grad_(False)
        rows = slice(copy * 64, (copy + 1) * 64)
        alone.load_state_dict({k: v[rows] if k[0] in "qv" else v for k, v in own.items()})
        outputs.append(alone(x, mask))
    assert torch.allclose(wide(x, mask), sum(outputs) / 3, atol=1e-6)


def make_prompt_forms(full: Tensor, pad: Tensor, first: int) -> dict[str, Tensor]:
    """The other prompt forms of the official function, from the full states; `first` is the first row of padding."""
    half, whole, zero = full.clone(), full.clone(), full.clone()
    middle = first + (77 - first) // 2
    half[:, first:middle], whole[:, first:76] = pad[first:middle], pad[first:76]
    zero[:, 22:24], zero[:, 24:76] = pad[22:24], 0
    core = torch.cat((full[:, :22], full[:, 76:]), 1)
    return {
        "prompt_full": full, "prompt_full_half_pad": half, "prompt_full_pad": whole, "prompt_full_zeroed_extra": zero,
        "prompt_b_core_e": core, "pad_embeddings": pad,
    }  # fmt: skip


@pytest.mark.parametrize("name", list_cases("inverter_2024"))
def test_inverter(name: str) -> None:
    case = CASES[name]
    model, rows = build_inverter(case), build_input(case, "face_prompt_embs")
    ids = clip_text.pad_token_ids((*adaface.INVERTER_PROMPT_IDS, *[adaface.COMMA_TOKEN_ID] * 16))
    found = {f"subj_embs_scale_{scale:g}": model.invert_tokens(rows, scale) for scale in case["scales"]}
    found |= make_prompt_forms(model(ids, rows), model.get_padding_embeddings(CPU), 22)
    if "extra_words" in case:
        words = torch.cat(
            [model(line, row[None]) for line, row in zip(case["extra_words_token_ids"], rows, strict=True)]
        )
        found["extra_words_full"] = words
        found["extra_words_core"] = torch.cat((words[:, 4:20], EXTRA_WORD_SCALE * words[:, 20:22]), 1)
    stored = load_file(FOLDER / case["outputs"]["file"])
    assert_case_close(case, {key: found[key] for key in stored})


@pytest.mark.parametrize("name", list_cases("inverter_2025"))
def test_newer_inverter(name: str) -> None:
    """Padding is the original CLIP's; a learned suffix may follow the face tokens, and is never scaled."""
    case = CASES[name]
    model, rows = build_inverter(case), build_input(case, "face_prompt_embs")
    tables = build_weights(case, "clip_base_embeddings")
    word, place = (next(v for k, v in tables.items() if f"{n}_embedding" in k) for n in ("token", "position"))
    pad = word[END_TOKEN_ID] + place
    count, suffix = rows.shape[1], model.static_img_suffix_embs
    ids = clip_text.pad_token_ids((*adaface.INVERTER_PROMPT_IDS, *[adaface.COMMA_TOKEN_ID] * (count + 2)))
    full, found = model(ids, rows), {}
    for scale in case["scales"]:
        found[f"ada_embs_scale_{scale:g}"] = adaface.apply_id_scale(model.invert_tokens(rows), pad, scale)
        if suffix is not None:
            both = model(ids, torch.cat((rows, suffix.expand(len(rows), -1, -1)), 1))[
                :, 4 : 4 + count + suffix.shape[1]
            ]
            both = torch.cat((adaface.apply_id_scale(both[:, :count], pad, scale), both[:, count:]), 1)
            found[f"ada_embs_scale_{scale:g}_suffix"] = both
    found |= make_prompt_forms(full, pad, 4 + count + case["num_static_suffix"] + 2)
    if "extra_words" in case:
        words = torch.cat(
            [model(line, row[None]) for line, row in zip(case["extra_words_token_ids"], rows, strict=True)]
        )
        found |= {"extra_words_full": words, "extra_words_core": words[:, 4:22]}
    stored = load_file(FOLDER / case["outputs"]["file"])
    assert_case_close(case, {key: found[key] for key in stored})


def embed_prompt(model: CLIPTextModel, ids: list[int], vectors: Tensor) -> Tensor:
    """Token embeddings of ids; ids from 49408 on refer to the vectors."""
    words = model.embed_tokens([min(i, END_TOKEN_ID) for i in ids], CPU)
    for place, i in enumerate(ids):
        if i > END_TOKEN_ID:
            words[0, place] = vectors[i - END_TOKEN_ID - 1]
    return words


PROMPTS = [*list_cases("prompt_encoding_wrapper_2024"), *list_cases("prompt_encoding_wrapper_2025")]


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_are_encoded(name: str) -> None:
    case = CASES[name]
    model, vectors = build_text_model(case, "text_encoder"), build_input(case, "subj_embs")
    found = {
        f"prompt_{i}": model(embed_prompt(model, one["token_ids"], vectors)) for i, one in enumerate(case["prompts"])
    }
    assert_case_close(case, found | {"negative": model(embed_prompt(model, case["negative_token_ids"], vectors))})


@pytest.mark.parametrize("name", list_cases("prompt_encoding_ldm_2024"))
def test_hidden_layers_are_mixed_before_the_final_norm(name: str) -> None:
    case = CASES[name]
    model, vectors, ids = (
        build_text_model(case, "text_encoder"),
        build_input(case, "subj_embs"),
        list(case["token_ids"]),
    )
    at = ids.index(case["subject_token_id"])
    ids[at : at + 16] = range(END_TOKEN_ID + 1, END_TOKEN_ID + 17)
    mixes = [torch.tensor(one).float()[:, None] for one in case["skip_weights"]]
    found = {f"cond_{i}": model(embed_prompt(model, ids, vectors), mix) for i, mix in enumerate(mixes)}
    assert_case_close(case, found | {"uncond_0": model(model.embed_tokens(case["negative_token_ids"], CPU), mixes[0])})


def test_noise() -> None:
    case = CASES["noise_b3"]
    faces, noise = build_input(case, "face_embs"), build_input(case, "noise")
    found = {}
    for level in case["levels"]:
        found[f"keepnorm_{level}"] = normalize(adaface.perturb_vectors(faces, level, noise), dim=-1)
        found[f"nokeep_{level}"] = faces + level * faces.std(-1, keepdim=True).mean() * noise
    assert_case_close(case, found)
    case = CASES["dev_perturb_tokens"]
    rows, noise = build_input(case, "tokens"), build_input(case, "noise")
    assert_case_close(case, {f"perturbed_{std}": adaface.perturb_vectors(rows, std, noise) for std in case["stds"]})


@pytest.mark.parametrize("averaging", adaface.AVERAGING_METHODS)
def test_noise_is_added_to_the_mean(averaging: str) -> None:
    """However little the faces agree, the mean gets noise of the chosen level, relative to its standard deviation."""
    case, level = CASES["e2e_mid576"], 0.06
    encoder, inverter = build_text_model(case, "arc2face_encoder"), build_inverter(case)
    faces = build_input(case, "face_embs")
    identity = make_identity(arc2face.FACE_FEATURES[-1:], ((512,),), len(faces))
    identity = replace(identity, embeddings=dict.fromkeys(identity.embeddings, faces))
    options = adaface.FaceEmbeddingOptions(averaging=averaging, noise_level=level, seed=3)
    found = adaface.make_token_embeddings(encoder, inverter, identity, options, CPU)

    def perturb(mean: Tensor) -> Tensor:
        noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(3))
        return mean + level * mean.std(-1, keepdim=True).mean() * noise

    mean = faces.mean(0, keepdim=True)
    assert mean.norm() < 0.9  # the faces differ
    if averaging == "faces":
        tokens = arc2face.encode_face_prompt(encoder, normalize(perturb(mean), dim=-1))[:, 4:20]
    else:
        mean = arc2face.encode_face_prompt(encoder, faces)[:, 4:20].mean(0, keepdim=True)
        tokens = normalize(perturb(mean), dim=-1) * mean.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(found, inverter.invert_tokens(tokens)[0], atol=2e-5, rtol=2e-5)


def test_end_to_end() -> None:
    case = CASES["e2e_mid576"]
    encoder, text = (build_text_model(case, role) for role in ("arc2face_encoder", "text_encoder"))
    inverter = build_inverter(case)
    faces = build_input(case, "face_embs")
    face = arc2face.average_face_vectors(faces, torch.full((len(faces),), 1 / len(faces)))
    core = arc2face.encode_face_prompt(encoder, face)[:, 4:20]
    vectors = inverter.invert_tokens(core)
    half = arc2face.encode_face_prompt(encoder, face.half().float())[:, 4:20].half().float()
    assert_case_close(case, {
        "id_embedding": face, "arc2face_core": core, "subj_embs": vectors[0],
        "subj_embs_fp16_chain": inverter.invert_tokens(half).half().float()[0],
        "prompt_embeds": text(embed_prompt(text, case["token_ids"], vectors[0])),
        "negative_embeds": text(embed_prompt(text, case["negative_token_ids"], vectors[0])),
    })  # fmt: skip


def test_every_case_is_checked() -> None:
    kinds = {
        "arc2face_projection", "mkv_attention", "inverter_2024", "inverter_2025", "prompt_encoding_wrapper_2024",
        "prompt_encoding_wrapper_2025", "prompt_encoding_ldm_2024", "id_noise", "token_noise_2025", "end_to_end_2024",
    }  # fmt: skip
    assert {case["kind"] for case in CASES.values()} == kinds and START_TOKEN_ID == CASES["e2e_mid576"]["token_ids"][0]
    assert checkpoint_detection.ARCFACE_ANTELOPEV2 in arc2face.FACE_FEATURES
