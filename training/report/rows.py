"""The rows of the report as data: how each makes its pictures, on how many people and prompts; tables and claims."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from . import methods
from .expected import Claim
from .methods import Make

FEATS, REFS = (0.0, 0.25, 0.5, 0.75, 1.0), (0.0, 1.0, 2.0, 3.0)
FACEID, IMAGE, FUSED = "demo_faceid.safetensors", "demo_plus_face.safetensors", "demo_fused.safetensors"
FLASHFACE, IMAGE_AS_FUSED = "demo_flashface.safetensors", "demo_image_as_fused.safetensors"
INFINITE, INFINITE_PLAIN = "demo_infinite_id.safetensors", "demo_infinite_id_plain.safetensors"
ADAFACE, ADAFACE_FACE, ARC2FACE = (
    f"demo_{name}.safetensors" for name in ("adaface", "adaface_face", "arc2face")
)  # fmt: skip
FLASH = methods.flashface(FLASHFACE, methods.LAMBDA_FEAT, methods.LAMBDA_REF)
OMNI = "demo_omni_id{}.safetensors"  # and the encoder it was trained to, by the same name without demo_
# How encoders of Omni-ID's were trained to be compared: what their files' names end with -> the row's name.
ENCODERS = {
    "3_8": "up to 3 photos to 8, mask 0.95, both stages", "3_5": "up to 3 photos to 5",
    "3_1": "up to 3 photos to 1", "8_8": "up to 8 photos to 8",
    "mask_85": "mask 0.85", "mask_99": "mask 0.99", "flow": "without the masked decoder",
}  # fmt: skip
PLACED = {
    "encoder": "demo_flashface_encoder.safetensors", "both": "demo_flashface_both.safetensors",
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """`kind` is one of measure.KINDS; at most `people`, each asked for `prompts`; methods read `photos`."""

    name: str
    make: Make
    file: str = ""
    kind: str = "alone"
    people: int = 64
    prompts: int = 2
    photos: int = 1


def _few(name: str, make: Make, file: str, photos: int = 4) -> Row:
    """Sweeps are on fewer people than the comparison, so that all of it takes two cores less than 20 minutes."""
    return Row(name, make, file, people=16, photos=photos)


def _more(name: str, make: Make, file: str, most: int) -> dict[str, Row]:
    """The same with 1 photo and more."""
    key = file.removeprefix("demo_").removesuffix(".safetensors")
    return {f"{key}_{n}": _few(f"{name}, {n} photo{'s' * (n > 1)}", make, file, n) for n in range(1, most + 1)}


def _mixed(attention: str, style: str) -> Row:
    return _few(f"{attention}, {style}", methods.infinite(INFINITE, attention, style), INFINITE, photos=1)


def _omni(name: str, ends: str = "", photos: int = 3) -> Row:
    adapter = OMNI.format(ends)
    return _few(name, methods.decoupled(adapter, adapter.removeprefix("demo_")), adapter, photos)


def _pair(name: str, make: Make, file: str = "") -> Row:
    return Row(name, make, file, "pairs", people=32)


ROWS: Mapping[str, Row] = {
    "bare": Row("no adapter", methods.bare),
    "decoupled_arcface": Row("decoupled, ArcFace tokens", methods.decoupled(FACEID), FACEID),
    "decoupled_image": Row("decoupled, image tokens", methods.decoupled(IMAGE), IMAGE),
    "fused": Row("fused KV", methods.fused(FUSED), FUSED),
    "flashface": Row("FlashFace", FLASH, FLASHFACE, photos=4),
    "infinite": Row("Infinite-ID", methods.infinite(INFINITE, "mixed", "AdaIN-mean"), INFINITE),
    "image_as_fused": Row(
        "decoupled, image tokens, trained as fused KV", methods.decoupled(IMAGE_AS_FUSED), IMAGE_AS_FUSED
    ),
    "infinite_plain": Row("Infinite-ID, trained with the text", methods.infinite(INFINITE_PLAIN), INFINITE_PLAIN),
    # With mixed attention off Infinite-ID's adapter is a decoupled one, to what both networks see.
    "both": Row("decoupled, ArcFace and image tokens", methods.infinite(INFINITE_PLAIN, "off", "none"), INFINITE_PLAIN),
    "omni": replace(_omni("Omni-ID"), people=Row.people, prompts=Row.prompts),
    "adaface": Row("AdaFace", methods.adaface(ADAFACE, ARC2FACE), ADAFACE),
    "adaface_face": Row(
        "AdaFace, without composition distillation", methods.adaface(ADAFACE_FACE, ARC2FACE), ADAFACE_FACE
    ),
    "as_asked": Row("the person, drawn as asked", methods.as_asked),
    "second_photo": Row("another real photo of the person", methods.second_photos, kind="photos"),
    "stranger": Row("a stranger, drawn as asked", methods.another),
    **{
        f"feat_{feat:g}": _few(f"{feat:g}", methods.flashface(FLASHFACE, feat, methods.LAMBDA_REF), FLASHFACE)
        for feat in FEATS
    },
    **{
        f"ref_{ref:g}": _few(f"{ref:g}", methods.flashface(FLASHFACE, methods.LAMBDA_FEAT, ref), FLASHFACE)
        for ref in REFS
    },
    **_more("FlashFace", FLASH, FLASHFACE, 4),
    **_more("fused KV", methods.fused(FUSED), FUSED, 3),
    **_more("decoupled, image tokens", methods.decoupled(IMAGE), IMAGE, 3),
    **{f"placed_{where}": _few(where, methods.flashface(file), file) for where, file in PLACED.items()},
    "mixed_mean": _mixed("mixed", "AdaIN-mean"),
    "mixed_adain": _mixed("mixed", "AdaIN"),
    "mixed_none": _mixed("mixed", "none"),
    "mixed_mutual": _mixed("mutual", "AdaIN-mean"),
    "mixed_off": _mixed("off", "AdaIN-mean"),
    **{f"photos_{n}": _omni(f"{n} photo{'s' * (n > 1)}", photos=n) for n in range(1, 4)},
    **{f"encoder_{ends}": _omni(name, f"_{ends}") for ends, name in ENCODERS.items()},
    "pair_bare": _pair("no adapter", methods.bare),
    "pair_fused": _pair("fused KV", methods.fused(FUSED), FUSED),
    "pair_decoupled": _pair("decoupled, ArcFace tokens", methods.decoupled(FACEID), FACEID),
    "pair_flashface": _pair("FlashFace", FLASH, FLASHFACE),
    "pair_as_asked": _pair("both, drawn as asked", methods.pair_as_asked),
}  # fmt: skip


@dataclass(frozen=True)
class Table:
    """Some rows under a heading. `first` heads the rows' names."""

    title: str
    rows: Sequence[str]
    text: str
    first: str = "method"


def _keys(prefix: str) -> list[str]:
    return [key for key in ROWS if key.startswith(prefix)]


METHODS = ("decoupled_arcface", "decoupled_image", "fused", "flashface", "infinite", "omni", "adaface")
MAIN = ["bare", *METHODS, "image_as_fused", "infinite_plain", "adaface_face", "as_asked", "second_photo", "stranger"]
PLACES = ["placed_encoder", "placed_both", "flashface_4"]
TABLES = (
    Table(
        "Every method", MAIN,
        "The floor is a stranger; the ceiling the person photographed, or drawn as asked, which is the target itself. "
        "All methods share a UNet of 4.4 million parameters that has seen less than half a million pictures. Of 64 "
        "close ups of the validation split under noise of sigma 1 it gave back the face at cosine 0.58 to the judge, "
        "of 1.7 at 0.34, of 3 at 0.16; the VAE alone kept 0.95 (measured once, by hand).",
    ),
    Table(
        "FlashFace: strength", _keys("feat_"),
        "Fig. 8 and 9: lambda_feat, at lambda_ref 2; at 0 the added layers see no face.", "lambda_feat",
    ),
    Table("FlashFace: guidance", _keys("ref_"), "Fig. 8: lambda_ref, at lambda_feat 0.85.", "lambda_ref"),
    Table("FlashFace: references", _keys("flashface_"), "Table 3: the number of reference photos."),
    Table(
        "FlashFace: placement", PLACES, "Table 4: where the added layers stand; the last row is the decoder.",
        "added layers",
    ),
    Table("Fusion: photos", [*_keys("fused_"), *_keys("plus_face_")], "Fused KV against decoupled attention."),
    Table(
        "Infinite-ID: mixed attention", _keys("mixed_"),
        "Table 2 and Fig. 8: what self-attention reads, and how the identity's features are brought to the text's.",
        "attention, style",
    ),
    Table(
        "Omni-ID: other tokens", ["decoupled_arcface", "decoupled_image", "both", "omni"],
        "Table 1: adapters of one kind; those beside Omni-ID read a single photo.",
    ),
    Table("Omni-ID: photos", _keys("photos_"), "Fig. 6: photos that are read together.", "photos"),
    Table(
        "Omni-ID: training", _keys("encoder_"),
        "Table 2: the first row and what differs from it in one thing, each with an adapter of its own, all trained "
        "alike and shorter than Omni-ID above.", "encoder",
    ),
    Table("Two people", _keys("pair_"), "Each in a half of the picture, by masks; a bootstrap over pairs."),
)  # fmt: skip

# What was done for a method to be as like as it is: shown where that is not enough.
TRIED: Mapping[str, str] = {
    "decoupled_image": "on 8 people 0.11 after 1000 steps, and after 2400 at twice the rate: the tower tells people by "
                       "little more than hair and clothes (a ridge regression finds the face vector at cosine 0.46); "
                       "on the validation split strength 2 is hardly better (0.14 for 0.13), training on with a loss "
                       "of identity by the recogniser is not (0.09 for 0.10; ArcFace tokens 0.28 for 0.25)",
    "fused": "on 8 people 0.06 after 600 steps, 0.19 after 1500 at thrice the rate; after 300 further ones, by AdamW "
             "or by Muon, the right face lowers the held-out loss by 1.5% instead of 1.4%; at strength 2, on 32 people "
             "of the validation split, 0.15 instead of 0.13",
    "flashface": "on 8 people 0.11 after 480 steps, 0.17 after 1500; on 16 people of the validation split 0.15, at "
                 "lambda_feat 1 and lambda_ref 3 0.18, at 1 and 4 0.15, at 1.2 and 4 0.16, at 1.2 and 6 0.14",
    "infinite": "0.03 after 600 steps; after 1200, on 16 people of the validation split, 0.07, without AdaIN 0.15",
    "omni": "on 32 people of the validation split 0.07, by the first stage's encoder 0.09, without an adapter 0.01; "
            "its tokens tell the face vector at cosine 0.33 (ridge regression), the tower's states at 0.48",
    "adaface": "the teacher tells people apart (the right face lowers the held-out loss by 2% at sigma 6), but next to "
               "nothing of that comes through the words and the frozen text encoder: the UNet answers another face by "
               "a seventh of what the teacher's does, in no such direction (cosine 0.01)",
}  # fmt: skip
CLAIMS = (
    *(Claim(f"{ROWS[key].name} is above no adapter by 0.25, intervals apart", "above", (key, "bare"), by=0.25,
            tried=TRIED.get(key, ""))
      for key in METHODS),
    Claim("a stranger is below every method", "lowest", ("stranger", *METHODS)),
    Claim("likeness rises with lambda_feat (FlashFace, Fig. 8 A)", "rising", tuple(_keys("feat_")), "target"),
    Claim("Paste rises with lambda_feat (FlashFace, Fig. 8 B)", "rising", tuple(_keys("feat_")), "paste"),
    Claim("likeness rises with lambda_ref (FlashFace, Fig. 8 A)", "rising", tuple(_keys("ref_")), "target"),
    Claim("Paste rises with lambda_ref (FlashFace, Fig. 8 B)", "rising", tuple(_keys("ref_")), "paste"),
    Claim("more references are better (FlashFace, Table 3)", "rising", tuple(_keys("flashface_")), "target"),
    Claim("more references paste less (FlashFace, Table 3)", "falling", tuple(_keys("flashface_")), "paste"),
    Claim("decoder above both above encoder (FlashFace, Table 4)", "rising", tuple(PLACES), "target",
          tried="each trained for 1500 steps of 16"),
    Claim("more photos are better (Fusion, three faces)", "rising", tuple(_keys("fused_"))),
    Claim("fused KV is above decoupled attention at equal training (Fusion)", "above", ("fused", "image_as_fused"),
          tried="either for 1500 steps at a rate of 3e-3 on 500 people"),
    Claim("training without the text is better (Infinite-ID, Table 2)", "above", ("infinite", "infinite_plain")),
    Claim("mixed attention keeps to the prompt (Infinite-ID, Table 2)", "rising", ("mixed_off", "mixed_mean"), "clip"),
    Claim("mixed attention keeps to the style (Infinite-ID)", "rising", ("mixed_off", "mixed_mean"), "style"),
    Claim("mixed attention is above mutual (Infinite-ID, Table 2)", "rising", ("mixed_mutual", "mixed_mean")),
    Claim("AdaIN costs likeness, AdaIN-mean less (Infinite-ID)", "rising", ("mixed_adain", "mixed_mean", "mixed_none")),
    Claim("AdaIN-mean finds the style (Infinite-ID)", "rising", ("mixed_none", "mixed_mean"), "style"),
    Claim("AdaIN finds the style (Infinite-ID)", "rising", ("mixed_none", "mixed_adain"), "style"),
    Claim("Omni-ID's tokens are above ArcFace's (Omni-ID, Table 1)", "rising", ("decoupled_arcface", "omni")),
    Claim("Omni-ID's tokens are above the image's (Omni-ID, Table 1)", "rising", ("decoupled_image", "omni")),
    Claim("Omni-ID's tokens are above both's (Omni-ID, Table 1)", "rising", ("both", "omni")),
    Claim("more photos are better (Omni-ID)", "rising", tuple(_keys("photos_"))),
    Claim("to 8 is above to 5, and that above to 1 (Omni-ID, Table 2)", "rising",
          ("encoder_3_1", "encoder_3_5", "encoder_3_8")),
    Claim("a mask of 0.95 is above 0.85 (Omni-ID, Table 2)", "rising", ("encoder_mask_85", "encoder_3_8")),
    Claim("a mask of 0.95 is above 0.99 (Omni-ID, Table 2)", "rising", ("encoder_mask_99", "encoder_3_8")),
    Claim("the masked decoder helps (Omni-ID, Table 2)", "rising", ("encoder_flow", "encoder_3_8")),
    Claim("composition distillation keeps to the prompt (AdaFace, Sec. 2.3)", "rising", ("adaface_face", "adaface"),
          "clip"),
    *(Claim(f"two people by fused KV are who they should be in 95% of the pictures, {how}", "least", ("pair_fused",),
            measure, by=0.95)
      for measure, how in (("assigned", "by both halves together"), ("right", "by each half alone"))),
)  # fmt: skip
