"""The gallery's parts, row by row, as API prompts for the server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .methods import (
    CLIP,
    DECOUPLED,
    ENCODER,
    FUSED,
    METHODS,
    MODEL,
    SAY,
    VAE,
    VISION,
    Method,
    Prompt,
    Socket,
    node,
)

PEOPLE = ("Bo", "Finn", "Kim")
FIRST, _, LAST = PEOPLE
ALONE = (
    "a photo of a smiling person in a forest, close up",
    "a watercolour of a person at a beach, close up",
    "a bronze of a person in a city, close up",
    "line art of a laughing person in a room, close up",
    "a pencil drawing of a surprised person in the mountains, close up",
)
PAIRS = (
    "a photo of two smiling people in a meadow",
    "a watercolour of two people at a beach",
    "a bronze of two people in a city",
    "line art of two laughing people in a room",
    "a pencil drawing of two people in the snow",
)
SHARES = (0, 25, 50, 75, 100)  # of the last person, in %
PHOTOS = 4
SIDE = 128  # pixels of a picture, as the models were trained
SAMPLING = {"steps": 8, "cfg": 4.0, "sampler_name": "euler", "scheduler": "karras", "denoise": 1.0, "seed": 11}
KEPT = "gallery"  # the identity's file
PICTURES, SAID = "pictures", "said"  # the nodes that save a row, and that tell of it


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


def stage(**told: Socket) -> Prompt:
    """What most rows need. It is in every prompt, as the server forgets what the next one does not name.

    `told` is what photos are read with besides.
    """
    nodes: Prompt = {
        "models": node("LikenessLoadDemo"),
        "analyzer": node("LikenessLoadFaceAnalyzer", model_pack="demo", provider="cpu"),
        "negative": node("CLIPTextEncode", clip=CLIP, text=""),
    }
    for person in PEOPLE:
        nodes[f"photos_{person}"] = node("LikenessDemoPerson", person=person)
        given: Prompt = {"photos.photo_0": [f"photos_{person}", 0], "face_analyzer": ["analyzer", 0]}
        given |= {"image_encoder": VISION, "name": person, "pick": "largest", "on_missing": "skip"}
        nodes[f"identity_{person}"] = node("LikenessEncodeIdentity", **given, **told)
    return nodes


def saved(pictures: Socket) -> Prompt:
    return node("SaveImage", images=pictures, filename_prefix="gallery")


def painted(nodes: Prompt, texts: Sequence[str], whom: Socket | None = None) -> Prompt:
    """A picture of each text, by the model that `nodes` apply a person to; without such nodes by the model as it is.

    How like `whom` each is, is told. All rows of as many texts have, column by column, the same noise.
    """
    given: Prompt = {"model": ["apply", 0] if "apply" in nodes else MODEL, "latent_image": ["empty", 0]}
    made = stage(**({"omni_id": [ENCODER, 0]} if ENCODER in nodes else {})) | nodes
    say = made.pop(SAY, node("CLIPTextEncode", clip=CLIP))
    said = {f"prompt_{number}": text for number, text in enumerate(texts)}
    made |= {name: node(say["class_type"], **say["inputs"], text=text) for name, text in said.items()}
    made |= {
        "texts": node("GalleryBatch", **{name: [name, 0] for name in said}),
        "empty": node("EmptyLatentImage", width=SIDE, height=SIDE, batch_size=len(texts)),
        "latents": node("KSampler", positive=["texts", 0], negative=["negative", 0], **given, **SAMPLING),
        "pixels": node("VAEDecode", samples=["latents", 0], vae=VAE),
        PICTURES: saved(["pixels", 0]),
    }
    if whom is not None:
        made["likeness"] = node("LikenessMeasure", image=["pixels", 0], identity=whom, face_analyzer=["analyzer", 0])
        made[SAID] = node("PreviewAny", source=["likeness", 2])
    return made


def _photos() -> Part:
    rows = [Row(person, stage() | {PICTURES: saved([f"photos_{person}", 0])}) for person in PEOPLE]
    text = "Drawn people whom no model on this page has seen in training. Every method reads these photos, and no more."
    return Part("Three strangers", text, [f"photo {n}" for n in range(1, PHOTOS + 1)], rows)


def _bare() -> Part:
    text = "What the base model makes of the prompts. All rows below have, column by column, the same prompt and noise."
    return Part("No adapter", text, ALONE, [Row("somebody", painted({}, ALONE))])


def _alone(method: Method) -> Part:
    rows = [
        Row(person, painted(method.applied(identity(person)), ALONE, identity(person)), person) for person in PEOPLE
    ]
    return Part(method.title, method.text, ALONE, rows, method.files)


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
    return Part("Two people together", text, PAIRS, rows, FUSED.files)


def _mixed() -> Part:
    rows = []
    both: Prompt = {f"identities.identity_{n}": identity(one) for n, one in enumerate((FIRST, LAST))}
    for share in SHARES:
        mixed = node("LikenessMixIdentities", weights=f"{100 - share}, {share}", **both)
        rows.append(Row(f"{share} % {LAST}", painted({"mixed": mixed, **DECOUPLED.applied(["mixed", 0])}, ALONE)))
    text = "By decoupled attention: face vectors blended along the sphere they live on."
    return Part(f"From {FIRST} to {LAST}", text, ALONE, rows, DECOUPLED.files)


def _kept() -> Part:
    keep = node("LikenessSaveIdentity", identity=identity(FIRST), name=KEPT, include_crops=True)
    load = node("LikenessLoadIdentity", file=f"{KEPT}.safetensors")
    rows = [
        Row("as encoded", painted({"keep": keep, **DECOUPLED.applied(identity(FIRST))}, ALONE), FIRST),
        Row("from the file", painted({"load": load, **DECOUPLED.applied(["load", 0])}, ALONE), FIRST),
    ]
    text = f"{FIRST} as encoded from the photos, and as an identity that was saved to a file and loaded from it."
    return Part("A person as a file", text, ALONE, rows, DECOUPLED.files, same=True)


def parts() -> list[Part]:
    """All of the gallery, in the order in which rows may be run: one loads what another saved."""
    return [_photos(), _bare(), *map(_alone, METHODS), _together(), _mixed(), _kept()]
