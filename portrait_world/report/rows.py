"""The rows of the report as data: how each generates images, for how many people and prompts; tables and claims."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from .expected import Claim
from .methods import (
    LAMBDA_FEAT,
    LAMBDA_REF,
    MakeImages,
    get_reference_photos,
    get_target_images,
    make_adaface_method,
    make_decoupled_method,
    make_flashface_method,
    make_fused_method,
    make_infinite_id_method,
    paint_stranger,
    paint_target_pair,
    sample_without_adapter,
)

LAMBDA_FEATS, LAMBDA_REFS = (0.0, 0.25, 0.5, 0.75, 1.0), (0.0, 1.0, 2.0, 3.0)
FACEID_FILE, PLUS_FACE_FILE, FUSED_FILE = (
    "demo_faceid.safetensors",
    "demo_plus_face.safetensors",
    "demo_fused.safetensors",
)
FLASHFACE_FILE, IMAGE_AS_FUSED_FILE = "demo_flashface.safetensors", "demo_image_as_fused.safetensors"
INFINITE_ID_FILE, INFINITE_ID_PLAIN_FILE = "demo_infinite_id.safetensors", "demo_infinite_id_plain.safetensors"
ADAFACE_FILE, ADAFACE_FACE_FILE, ARC2FACE_FILE = (
    f"demo_{name}.safetensors" for name in ("adaface", "adaface_face", "arc2face")
)
FLASHFACE_METHOD = make_flashface_method(FLASHFACE_FILE, LAMBDA_FEAT, LAMBDA_REF)
OMNI_ID_FILE = "demo_omni_id{}.safetensors"  # its encoder's file has the same name without demo_
# The Omni-ID encoders of the training comparison: suffix of the file name -> the row's name, how it was trained.
OMNI_ID_ENCODERS = {
    "3_8": "up to 3 input photos, 8 targets, mask 0.95, both stages",
    "3_5": "up to 3 input photos, 5 targets",
    "3_1": "up to 3 input photos, 1 target",
    "8_8": "up to 8 input photos, 8 targets",
    "mask_85": "mask 0.85",
    "mask_99": "mask 0.99",
    "flow": "without the masked decoder",
}
FLASHFACE_PLACEMENTS = {
    "encoder": "demo_flashface_encoder.safetensors",
    "both": "demo_flashface_both.safetensors",
}


@dataclass(frozen=True)
class ReportRow:
    """`kind` is a key of measure.ROW_KINDS; `num_prompts` are per person; methods read `num_photos` photos."""

    name: str
    make_images: MakeImages
    file: str = ""
    kind: str = "single"
    max_people: int = 64
    num_prompts: int = 2
    num_photos: int = 1


def _sweep_row(name: str, make_images: MakeImages, file: str, num_photos: int = 4) -> ReportRow:
    """A row of a sweep: fewer people, so that the report takes less than 20 minutes on two CPU cores."""
    return ReportRow(name, make_images, file, max_people=16, num_photos=num_photos)


def _photo_sweep(name: str, make_images: MakeImages, file: str, max_photos: int) -> dict[str, ReportRow]:
    """A row for each number of photos from 1 to `max_photos`."""
    key = file.removeprefix("demo_").removesuffix(".safetensors")
    return {
        f"{key}_{n}": _sweep_row(f"{name}, {n} photo{'s' * (n > 1)}", make_images, file, n)
        for n in range(1, max_photos + 1)
    }


def _mixed_row(attention: str, style: str) -> ReportRow:
    return _sweep_row(
        f"{attention}, {style}",
        make_infinite_id_method(INFINITE_ID_FILE, attention, style),
        INFINITE_ID_FILE,
        num_photos=1,
    )


def _omni_id_row(name: str, suffix: str = "", num_photos: int = 3) -> ReportRow:
    adapter = OMNI_ID_FILE.format(suffix)
    return _sweep_row(name, make_decoupled_method(adapter, adapter.removeprefix("demo_")), adapter, num_photos)


def _pair_row(name: str, make_images: MakeImages, file: str = "") -> ReportRow:
    return ReportRow(name, make_images, file, "pairs", max_people=32)


REPORT_ROWS: Mapping[str, ReportRow] = {
    "bare": ReportRow("no adapter", sample_without_adapter),
    "decoupled_arcface": ReportRow("decoupled, ArcFace tokens", make_decoupled_method(FACEID_FILE), FACEID_FILE),
    "decoupled_image": ReportRow("decoupled, image tokens", make_decoupled_method(PLUS_FACE_FILE), PLUS_FACE_FILE),
    "fused": ReportRow("fused KV", make_fused_method(FUSED_FILE), FUSED_FILE),
    "flashface": ReportRow("FlashFace", FLASHFACE_METHOD, FLASHFACE_FILE, num_photos=4),
    "infinite": ReportRow(
        "Infinite-ID", make_infinite_id_method(INFINITE_ID_FILE, "mixed", "AdaIN-mean"), INFINITE_ID_FILE
    ),
    "image_as_fused": ReportRow(
        "decoupled, image tokens, trained as fused KV", make_decoupled_method(IMAGE_AS_FUSED_FILE), IMAGE_AS_FUSED_FILE
    ),
    "infinite_plain": ReportRow(
        "Infinite-ID, trained with the text", make_infinite_id_method(INFINITE_ID_PLAIN_FILE), INFINITE_ID_PLAIN_FILE
    ),
    # With mixed attention off, Infinite-ID's adapter is a decoupled one with ArcFace and image tokens.
    "both": ReportRow(
        "decoupled, ArcFace and image tokens",
        make_infinite_id_method(INFINITE_ID_PLAIN_FILE, "off", "none"),
        INFINITE_ID_PLAIN_FILE,
    ),
    "omni": replace(_omni_id_row("Omni-ID"), max_people=ReportRow.max_people, num_prompts=ReportRow.num_prompts),
    "adaface": ReportRow("AdaFace", make_adaface_method(ADAFACE_FILE, ARC2FACE_FILE), ADAFACE_FILE),
    "adaface_face": ReportRow(
        "AdaFace, without composition distillation",
        make_adaface_method(ADAFACE_FACE_FILE, ARC2FACE_FILE),
        ADAFACE_FACE_FILE,
    ),
    "as_asked": ReportRow("ground truth (the person, drawn for the prompt)", get_target_images),
    "second_photo": ReportRow("a photo of the person", get_reference_photos, kind="photos"),
    "stranger": ReportRow("a stranger, drawn for the prompt", paint_stranger),
    **{
        f"feat_{feat:g}": _sweep_row(
            f"{feat:g}", make_flashface_method(FLASHFACE_FILE, feat, LAMBDA_REF), FLASHFACE_FILE
        )
        for feat in LAMBDA_FEATS
    },
    **{
        f"ref_{ref:g}": _sweep_row(f"{ref:g}", make_flashface_method(FLASHFACE_FILE, LAMBDA_FEAT, ref), FLASHFACE_FILE)
        for ref in LAMBDA_REFS
    },
    **_photo_sweep("FlashFace", FLASHFACE_METHOD, FLASHFACE_FILE, 4),
    **_photo_sweep("fused KV", make_fused_method(FUSED_FILE), FUSED_FILE, 3),
    **_photo_sweep("decoupled, image tokens", make_decoupled_method(PLUS_FACE_FILE), PLUS_FACE_FILE, 3),
    **{
        f"placed_{where}": _sweep_row(where, make_flashface_method(file), file)
        for where, file in FLASHFACE_PLACEMENTS.items()
    },
    "mixed_mean": _mixed_row("mixed", "AdaIN-mean"),
    "mixed_adain": _mixed_row("mixed", "AdaIN"),
    "mixed_none": _mixed_row("mixed", "none"),
    "mixed_mutual": _mixed_row("mutual", "AdaIN-mean"),
    "mixed_off": _mixed_row("off", "AdaIN-mean"),
    **{f"photos_{n}": _omni_id_row(f"{n} photo{'s' * (n > 1)}", num_photos=n) for n in range(1, 4)},
    **{f"encoder_{suffix}": _omni_id_row(name, f"_{suffix}") for suffix, name in OMNI_ID_ENCODERS.items()},
    "pair_bare": _pair_row("no adapter", sample_without_adapter),
    "pair_fused": _pair_row("fused KV", make_fused_method(FUSED_FILE), FUSED_FILE),
    "pair_decoupled": _pair_row("decoupled, ArcFace tokens", make_decoupled_method(FACEID_FILE), FACEID_FILE),
    "pair_flashface": _pair_row("FlashFace", FLASHFACE_METHOD, FLASHFACE_FILE),
    "pair_as_asked": _pair_row("ground truth (both, drawn for the prompt)", paint_target_pair),
}


@dataclass(frozen=True)
class ReportTable:
    """Rows under a heading. `first_column` is the title of the column with the rows' names."""

    title: str
    row_keys: Sequence[str]
    text: str
    first_column: str = "method"


def _keys_with_prefix(prefix: str) -> list[str]:
    return [key for key in REPORT_ROWS if key.startswith(prefix)]


METHOD_KEYS = ("decoupled_arcface", "decoupled_image", "fused", "flashface", "infinite", "omni", "adaface")
MAIN_TABLE_KEYS = [
    "bare",
    *METHOD_KEYS,
    "image_as_fused",
    "infinite_plain",
    "adaface_face",
    "as_asked",
    "second_photo",
    "stranger",
]
PLACEMENT_KEYS = ["placed_encoder", "placed_both", "flashface_4"]
REPORT_TABLES = (
    ReportTable(
        "Every method",
        MAIN_TABLE_KEYS,
        "Lower reference: a stranger. Upper references: a photo of the person, and the ground truth, which is the "
        "target itself. All methods share a UNet of 4.4 million parameters, trained on less than half a million "
        "images. It denoised 64 close-ups of the validation split with a face similarity (by the evaluation "
        "recognizer) of 0.58 at sigma 1, 0.34 at sigma 1.7 and 0.16 at sigma 3; the VAE alone reaches 0.95 (measured "
        "once, by hand).",
    ),
    ReportTable(
        "FlashFace: strength",
        _keys_with_prefix("feat_"),
        "Fig. 8 and 9: lambda_feat, with lambda_ref 2; at 0 the added layers do not attend to the faces.",
        "lambda_feat",
    ),
    ReportTable(
        "FlashFace: guidance", _keys_with_prefix("ref_"), "Fig. 8: lambda_ref, with lambda_feat 0.85.", "lambda_ref"
    ),
    ReportTable("FlashFace: references", _keys_with_prefix("flashface_"), "Table 3: the number of reference photos."),
    ReportTable(
        "FlashFace: placement",
        PLACEMENT_KEYS,
        "Table 4: which half of the UNet has the added layers; the last row has them in the decoder.",
        "added layers",
    ),
    ReportTable(
        "Fusion: photos",
        [*_keys_with_prefix("fused_"), *_keys_with_prefix("plus_face_")],
        "Fused KV compared with decoupled attention, by number of photos.",
    ),
    ReportTable(
        "Infinite-ID: mixed attention",
        _keys_with_prefix("mixed_"),
        "Table 2 and Fig. 8: what self-attention attends to, and how AdaIN matches identity features to the text's.",
        "attention, style",
    ),
    ReportTable(
        "Omni-ID: other tokens",
        ["decoupled_arcface", "decoupled_image", "both", "omni"],
        "Table 1: decoupled attention on different tokens; all but Omni-ID read a single photo.",
    ),
    ReportTable(
        "Omni-ID: photos",
        _keys_with_prefix("photos_"),
        "Fig. 6: the number of photos that are encoded jointly.",
        "photos",
    ),
    ReportTable(
        "Omni-ID: training",
        _keys_with_prefix("encoder_"),
        "Table 2: the encoder of the first row and variants that differ from it in one setting, each with its own "
        "adapter. All have the same training, which is shorter than that of Omni-ID in the other tables.",
        "encoder",
    ),
    ReportTable(
        "Two people",
        _keys_with_prefix("pair_"),
        "Each person has a mask over one half of the image; the bootstrap is over pairs.",
    ),
)

# What was tried to raise a method's similarity; shown if the claim does not hold.
ATTEMPTS: Mapping[str, str] = {
    "decoupled_image": "0.11 on 8 people after 1000 steps, and after 2400 at twice the learning rate: the image "
    "encoder tells people apart by little more than hair and clothes (ridge regression to the face "
    "embedding: cosine 0.46); on the validation split strength 2 gives 0.14 instead of 0.13, and "
    "further training with a face loss 0.09 instead of 0.10 (ArcFace tokens: 0.28 instead of 0.25)",
    "fused": "0.06 on 8 people after 600 steps, 0.19 after 1500 at three times the learning rate; after another 300 "
    "steps, with AdamW or Muon, the right face lowers the held-out loss by 1.5% instead of 1.4%; strength 2 "
    "gives 0.15 instead of 0.13 on 32 people of the validation split",
    "flashface": "0.11 on 8 people after 480 steps, 0.17 after 1500; on 16 people of the validation split 0.15, and "
    "with lambda_feat and lambda_ref of 1 and 3 0.18, of 1 and 4 0.15, of 1.2 and 4 0.16, of 1.2 and 6 0.14",
    "infinite": "0.03 after 600 steps; 0.07 after 1200, on 16 people of the validation split, and 0.15 without AdaIN",
    "omni": "on 32 people of the validation split 0.07, 0.09 with the encoder of the first stage, 0.01 without an "
    "adapter; ridge regression to the face embedding: cosine 0.33 from its tokens, 0.48 from the hidden states "
    "of the image encoder",
    "adaface": "the teacher tells people apart (the right face lowers the held-out loss by 2% at sigma 6), but almost "
    "none of it passes the token embeddings and the frozen text encoder: with another face the UNet's "
    "prediction changes by a seventh of the teacher's change, in an unrelated direction (cosine 0.01)",
}
CLAIMS = (
    *(
        Claim(
            f"{REPORT_ROWS[key].name} exceeds no adapter by 0.25, intervals do not overlap",
            "above",
            (key, "bare"),
            threshold=0.25,
            attempts=ATTEMPTS.get(key, ""),
        )
        for key in METHOD_KEYS
    ),
    Claim("every method exceeds a stranger", "lowest", ("stranger", *METHOD_KEYS)),
    Claim(
        "similarity rises with lambda_feat (FlashFace, Fig. 8 A)", "rising", tuple(_keys_with_prefix("feat_")), "target"
    ),
    Claim("Paste rises with lambda_feat (FlashFace, Fig. 8 B)", "rising", tuple(_keys_with_prefix("feat_")), "paste"),
    Claim(
        "similarity rises with lambda_ref (FlashFace, Fig. 8 A)", "rising", tuple(_keys_with_prefix("ref_")), "target"
    ),
    Claim("Paste rises with lambda_ref (FlashFace, Fig. 8 B)", "rising", tuple(_keys_with_prefix("ref_")), "paste"),
    Claim(
        "more references raise similarity (FlashFace, Table 3)",
        "rising",
        tuple(_keys_with_prefix("flashface_")),
        "target",
    ),
    Claim(
        "more references lower Paste (FlashFace, Table 3)", "falling", tuple(_keys_with_prefix("flashface_")), "paste"
    ),
    Claim(
        "added layers: decoder > both > encoder (FlashFace, Table 4)",
        "rising",
        tuple(PLACEMENT_KEYS),
        "target",
        attempts="each trained for 1500 steps, batch 16",
    ),
    Claim("more photos raise similarity (Fusion, three faces)", "rising", tuple(_keys_with_prefix("fused_"))),
    Claim(
        "fused KV exceeds decoupled attention with equal training (Fusion)",
        "above",
        ("fused", "image_as_fused"),
        attempts="both trained for 1500 steps on 500 people, learning rate 3e-3",
    ),
    Claim(
        "training without the text raises similarity (Infinite-ID, Table 2)", "above", ("infinite", "infinite_plain")
    ),
    Claim(
        "mixed attention raises prompt adherence (Infinite-ID, Table 2)", "rising", ("mixed_off", "mixed_mean"), "clip"
    ),
    Claim("mixed attention raises style match (Infinite-ID)", "rising", ("mixed_off", "mixed_mean"), "style"),
    Claim("mixed attention exceeds mutual attention (Infinite-ID, Table 2)", "rising", ("mixed_mutual", "mixed_mean")),
    Claim("similarity: AdaIN < AdaIN-mean < none (Infinite-ID)", "rising", ("mixed_adain", "mixed_mean", "mixed_none")),
    Claim("AdaIN-mean raises style match (Infinite-ID)", "rising", ("mixed_none", "mixed_mean"), "style"),
    Claim("AdaIN raises style match (Infinite-ID)", "rising", ("mixed_none", "mixed_adain"), "style"),
    Claim("Omni-ID tokens exceed ArcFace tokens (Omni-ID, Table 1)", "rising", ("decoupled_arcface", "omni")),
    Claim("Omni-ID tokens exceed image tokens (Omni-ID, Table 1)", "rising", ("decoupled_image", "omni")),
    Claim("Omni-ID tokens exceed ArcFace and image tokens together (Omni-ID, Table 1)", "rising", ("both", "omni")),
    Claim("more photos raise similarity (Omni-ID)", "rising", tuple(_keys_with_prefix("photos_"))),
    Claim("8 target views > 5 > 1 (Omni-ID, Table 2)", "rising", ("encoder_3_1", "encoder_3_5", "encoder_3_8")),
    Claim("a mask ratio of 0.95 exceeds 0.85 (Omni-ID, Table 2)", "rising", ("encoder_mask_85", "encoder_3_8")),
    Claim("a mask ratio of 0.95 exceeds 0.99 (Omni-ID, Table 2)", "rising", ("encoder_mask_99", "encoder_3_8")),
    Claim("the masked decoder raises similarity (Omni-ID, Table 2)", "rising", ("encoder_flow", "encoder_3_8")),
    Claim(
        "composition distillation raises prompt adherence (AdaFace, Sec. 2.3)",
        "rising",
        ("adaface_face", "adaface"),
        "clip",
    ),
    *(
        Claim(
            f"fused KV: two people are in the right halves in 95% of the images, {how}",
            "at least",
            ("pair_fused",),
            measure,
            threshold=0.95,
        )
        for measure, how in (("assigned", "judged by both halves together"), ("right", "judged by each half alone"))
    ),
)
