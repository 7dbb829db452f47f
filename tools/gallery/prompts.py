"""The gallery's parts, row by row, as API prompts for the server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .methods import CLIP, DECOUPLED, FUSED, METHODS, MODEL, VAE, VISION, Method, Prompt, Socket, node

PEOPLE = ("Bo", "Finn", "Kim")
FIRST, _, LAST = PEOPLE
ALONE = (
    "a photo of a smiling person in a forest",
    "a watercolour of a person at a beach",
    "a bronze of a person in a city",
    "line art of a laughing person in a room",
    "a pencil drawing of a surprised person in the mountains",
)
PAIRS = (
    "a photo of two smiling people in a meadow",
    "a watercolour of two people at a beach",
    "a bronze of two people in a city",
    "line art of two laughing people in a room",
    "a pencil drawing of two people in the snow",
)
MIXED = ALONE[:2]
SHARES = (0, 25, 50, 75, 100)  # of the last person, in %
PHOTOS = 4
SIDE = 128  # pixels of a picture, as the models were trained
SAMPLING = {"steps": 15, "cfg": 4.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
SEED = 11  # of the first column; each column has noise of its own
KEPT = "gallery"  # the identity's file
PICTURE, SAID = "picture_", "_said"  # the keys of the nodes that save a picture, and that tell of it


@dataclass(frozen=True)
class Row:
    """Pictures from left to right. A photo of `person` stands in front."""

    name: str
    prompt: Prompt
    person: str = ""


@dataclass(frozen=True)
class Part:
    """Rows under a heading. `files` lie in `weights/`; with `same` each row shows the same pictures, bit for bit."""

    title: str
    text: str
    heads: Sequence[str]
    rows: Sequence[Row]
    files: Sequence[str] = ()
    same: bool = False


def identity(person: str) -> Socket:
    return [f"identity_{person}", 0]


def stage() -> Prompt:
    """What most rows need. It is in every prompt, as the server forgets what the next one does not name."""
    nodes: Prompt = {
        "models": node("LikenessLoadDemo"),
        "analyzer": node("LikenessLoadFaceAnalyzer", model_pack="demo", provider="cpu"),
        "negative": node("CLIPTextEncode", clip=CLIP, text=""),
        "latent": node("EmptyLatentImage", width=SIDE, height=SIDE, batch_size=1),
    }
    for person in PEOPLE:
        nodes[f"photos_{person}"] = node("LikenessDemoPerson", person=person)
        given: Prompt = {"photos.photo_0": [f"photos_{person}", 0], "face_analyzer": ["analyzer", 0]}
        given |= {"image_encoder": VISION, "name": person, "pick": "largest", "on_missing": "skip"}
        nodes[f"identity_{person}"] = node("LikenessEncodeIdentity", **given)
    return nodes


def picture(column: int, text: str, model: Socket, whom: Socket | None = None) -> Prompt:
    """One picture, saved; how like `whom` it is, told."""
    key = f"{PICTURE}{column}"
    given: dict[str, Any] = {"positive": [f"{key}_text", 0], "negative": ["negative", 0], "latent_image": ["latent", 0]}
    nodes = {
        f"{key}_text": node("CLIPTextEncode", clip=CLIP, text=text),
        f"{key}_latent": node("KSampler", model=model, seed=SEED + column, **given, **SAMPLING),
        f"{key}_pixels": node("VAEDecode", samples=[f"{key}_latent", 0], vae=VAE),
        key: node("SaveImage", images=[f"{key}_pixels", 0], filename_prefix="gallery"),
    }
    if whom is not None:
        measured: Prompt = {"image": [f"{key}_pixels", 0], "identity": whom, "face_analyzer": ["analyzer", 0]}
        nodes[f"{key}_likeness"] = node("LikenessMeasure", **measured)
        nodes[f"{key}{SAID}"] = node("PreviewAny", source=[f"{key}_likeness", 0])
    return nodes


def painted(nodes: Prompt, texts: Sequence[str], whom: Socket | None = None) -> Prompt:
    """A picture of each text, by the model that `nodes` apply a person to; without such nodes by the model as it is."""
    model = ["apply", 0] if "apply" in nodes else MODEL
    made = stage() | nodes
    for column, text in enumerate(texts):
        made |= picture(column, text, model, whom)
    return made


def _photos() -> Part:
    def row(person: str) -> Row:
        saved = node("SaveImage", images=[f"photos_{person}", 0], filename_prefix="gallery")
        return Row(person, stage() | {f"{PICTURE}0": saved})

    text = "Drawn people whom no model on this page has seen in training. Every method reads these photos, and no more."
    return Part("Three strangers", text, [f"photo {n}" for n in range(1, PHOTOS + 1)], [row(one) for one in PEOPLE])


def _bare() -> Part:
    text = "What the base model makes of the prompts. All rows below have, column by column, the same prompt and noise."
    return Part("No adapter", text, ALONE, [Row("somebody", painted({}, ALONE))])


def _alone(method: Method) -> Part:
    rows = [
        Row(person, painted(method.applied(identity(person)), ALONE, identity(person)), person) for person in PEOPLE
    ]
    return Part(method.title, method.text, ALONE, rows, [method.file])


def _together() -> Part:
    """The first person on the left, the last on the right."""
    half, people = SIDE // 2, [FIRST, LAST]
    nodes: Prompt = {
        "nowhere": node("SolidMask", value=0.0, width=SIDE, height=SIDE),
        "half": node("SolidMask", value=1.0, width=half, height=SIDE),
    }
    before: Prompt = {}
    for number, person in enumerate(people):
        place: Prompt = {"destination": ["nowhere", 0], "source": ["half", 0], "x": half * number, "y": 0}
        nodes[f"mask_{person}"] = node("MaskComposite", operation="add", **place)
        told: Prompt = {"identity": identity(person), "mask": [f"mask_{person}", 0], "strength": 1.0, **before}
        nodes[person] = node("LikenessPerson", **told)
        before = {"people": [person, 0]}
    rows = [
        Row("nobody in particular", painted({}, PAIRS)),
        Row(f"{FIRST} left, {LAST} right", painted(nodes | FUSED.applied([LAST, 0]), PAIRS)),
    ]
    text = "By Fused KV: one prompt, and for each person a mask over a half of the picture."
    return Part("Two people together", text, PAIRS, rows, [FUSED.file])


def _mixed() -> Part:
    def row(text: str) -> Row:
        made = stage()
        for column, share in enumerate(SHARES):
            both: Prompt = {f"identities.identity_{n}": identity(one) for n, one in enumerate((FIRST, LAST))}
            mixed = node("LikenessMixIdentities", weights=f"{100 - share}, {share}", **both)
            nodes = DECOUPLED.applied([f"mixed_{column}", 0])
            made |= {f"mixed_{column}": mixed, "adapter": nodes["adapter"], f"apply_{column}": nodes["apply"]}
            made |= picture(column, text, [f"apply_{column}", 0])
            made[f"{PICTURE}{column}_latent"]["inputs"]["seed"] = SEED
        return Row(text, made)

    text = (
        "By decoupled attention: face vectors blended along the sphere they live on. The noise is the same throughout."
    )
    heads = [f"{share} % {LAST}" for share in SHARES]
    return Part(f"From {FIRST} to {LAST}", text, heads, [row(text) for text in MIXED], [DECOUPLED.file])


def _kept() -> Part:
    saved = node("LikenessSaveIdentity", identity=identity(FIRST), name=KEPT, include_crops=True)
    loaded = node("LikenessLoadIdentity", file=f"{KEPT}.safetensors")
    rows = [
        Row("as encoded", painted({**DECOUPLED.applied(identity(FIRST)), "save": saved}, ALONE), FIRST),
        Row("from the file", painted({**DECOUPLED.applied(["load", 0]), "load": loaded}, ALONE), FIRST),
    ]
    text = f"{FIRST} as encoded from the photos, and as an identity that was saved to a file and loaded from it."
    return Part("A person as a file", text, ALONE, rows, [DECOUPLED.file], same=True)


def parts() -> list[Part]:
    """All of the gallery, in the order in which rows may be run: one loads what another saved."""
    return [_photos(), _bare(), *map(_alone, METHODS), _together(), _mixed(), _kept()]
