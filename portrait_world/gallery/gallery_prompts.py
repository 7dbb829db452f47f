"""The sections of the gallery; each row of images is an API prompt for the server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .gallery_methods import (
    CLIP_LINK,
    CLIP_VISION_LINK,
    DECOUPLED,
    FUSED,
    GALLERY_METHODS,
    MODEL_LINK,
    OMNI_ENCODER_NODE,
    PROMPT_NODE,
    VAE_LINK,
    ApiPrompt,
    GalleryMethod,
    Link,
    make_node,
)

DEMO_PEOPLE = ("Bo", "Finn", "Kim")
FIRST_PERSON, _, LAST_PERSON = DEMO_PEOPLE
SINGLE_PROMPTS = (
    "a photo of a smiling person in a forest",
    "a watercolour of a person at a beach",
    "a bronze of a person in a city",
    "line art of a laughing person in a room",
    "a pencil drawing of a surprised person in the mountains",
)
PAIR_PROMPTS = (
    "a photo of two smiling people in a meadow",
    "a watercolour of two people at a beach",
    "a bronze of two people in a city",
    "line art of two laughing people in a room",
    "a pencil drawing of two people in the snow",
)
MIX_PERCENTAGES = (0, 25, 50, 75, 100)  # share of the last person
PHOTOS_PER_PERSON = 4
IMAGE_SIZE = 128  # pixels, the resolution of the models
PAIR_WIDTH = 192  # of images of two people
SAMPLER_INPUTS = {"steps": 8, "cfg": 4.0, "sampler_name": "euler", "scheduler": "karras", "denoise": 1.0, "seed": 11}
SAVED_IDENTITY = "gallery"  # file name
IMAGES_NODE, REPORT_NODE = "images", "report"  # save the images, show the report of Measure Likeness


@dataclass(frozen=True)
class GalleryRow:
    """A prompt that saves images, from left to right. The page shows a photo of `person` at the start of the row."""

    name: str
    prompt: ApiPrompt
    person: str = ""


@dataclass(frozen=True)
class GallerySection:
    """Rows under a heading. `files` are paths in `weights/`; `expect_identical`: all rows show bit-identical images."""

    title: str
    text: str
    column_titles: Sequence[str]
    rows: Sequence[GalleryRow]
    files: Sequence[str] = ()
    expect_identical: bool = False


def get_identity_link(person: str) -> Link:
    return [f"identity_{person}", 0]


def make_common_nodes(**encoder_inputs: Link) -> ApiPrompt:
    """The nodes that most rows need: models, photos, identities.

    They are in every prompt, as the server only keeps results in its cache that the next prompt uses.
    `encoder_inputs`: additional inputs of Encode Identity.
    """
    nodes: ApiPrompt = {
        "models": make_node("LikenessLoadDemo"),
        "analyzer": make_node("LikenessLoadFaceAnalyzer", model_pack="demo", provider="cpu"),
        "negative": make_node("CLIPTextEncode", clip=CLIP_LINK, text=""),
    }
    for person in DEMO_PEOPLE:
        nodes[f"photos_{person}"] = make_node("LikenessDemoPerson", person=person)
        inputs: ApiPrompt = {"photos.photo_0": [f"photos_{person}", 0], "face_analyzer": ["analyzer", 0]}
        inputs |= {"image_encoder": CLIP_VISION_LINK, "name": person, "pick": "largest", "on_missing": "skip"}
        nodes[f"identity_{person}"] = make_node("LikenessEncodeIdentity", **inputs, **encoder_inputs)
    return nodes


def make_save_node(images: Link) -> ApiPrompt:
    return make_node("SaveImage", images=images, filename_prefix="gallery")


def make_sampling_prompt(
    method_nodes: ApiPrompt, texts: Sequence[str], reference_identity: Link | None = None, width: int = IMAGE_SIZE
) -> ApiPrompt:
    """An image for each text, sampled with the method's nodes, or with the base model if there are none.

    With `reference_identity` their similarity to that identity is measured. Rows with the same number of texts have the
    same noise in each column.
    """
    inputs: ApiPrompt = {"model": ["apply", 0] if "apply" in method_nodes else MODEL_LINK, "latent_image": ["empty", 0]}
    encoder_inputs: ApiPrompt = {"omni_id": [OMNI_ENCODER_NODE, 0]} if OMNI_ENCODER_NODE in method_nodes else {}
    nodes = make_common_nodes(**encoder_inputs) | method_nodes
    encode = nodes.pop(PROMPT_NODE, make_node("CLIPTextEncode", clip=CLIP_LINK))
    prompts = {f"prompt_{number}": text for number, text in enumerate(texts)}
    nodes |= {name: make_node(encode["class_type"], **encode["inputs"], text=text) for name, text in prompts.items()}
    nodes |= {
        "texts": make_node("GalleryBatch", **{name: [name, 0] for name in prompts}),
        "empty": make_node("EmptyLatentImage", width=width, height=IMAGE_SIZE, batch_size=len(texts)),
        "latents": make_node("KSampler", positive=["texts", 0], negative=["negative", 0], **inputs, **SAMPLER_INPUTS),
        "pixels": make_node("VAEDecode", samples=["latents", 0], vae=VAE_LINK),
        IMAGES_NODE: make_save_node(["pixels", 0]),
    }
    if reference_identity is not None:
        nodes["likeness"] = make_node(
            "LikenessMeasure", image=["pixels", 0], identity=reference_identity, face_analyzer=["analyzer", 0]
        )
        nodes[REPORT_NODE] = make_node("PreviewAny", source=["likeness", 2])
    return nodes


def _photos_section() -> GallerySection:
    rows = [
        GalleryRow(person, make_common_nodes() | {IMAGES_NODE: make_save_node([f"photos_{person}", 0])})
        for person in DEMO_PEOPLE
    ]
    text = "Drawn people who are in the training data of no model on this page. Every method reads these four photos."
    return GallerySection("Three people", text, [f"photo {n}" for n in range(1, PHOTOS_PER_PERSON + 1)], rows)


def _base_model_section() -> GallerySection:
    text = "The base model. All rows below use the same prompt and noise in each column."
    return GallerySection(
        "No adapter", text, SINGLE_PROMPTS, [GalleryRow("base model", make_sampling_prompt({}, SINGLE_PROMPTS))]
    )


def _method_section(method: GalleryMethod) -> GallerySection:
    rows = [
        GalleryRow(
            person,
            make_sampling_prompt(method.apply_to(get_identity_link(person)), SINGLE_PROMPTS, get_identity_link(person)),
            person,
        )
        for person in DEMO_PEOPLE
    ]
    return GallerySection(method.title, method.text, SINGLE_PROMPTS, rows, method.files)


def _two_people_section() -> GallerySection:
    """The first person on the left, the last on the right, separated by masks."""
    half, people = PAIR_WIDTH // 2, [FIRST_PERSON, LAST_PERSON]
    nodes: ApiPrompt = {
        "empty_mask": make_node("SolidMask", value=0.0, width=PAIR_WIDTH, height=IMAGE_SIZE),
        "half_mask": make_node("SolidMask", value=1.0, width=half, height=IMAGE_SIZE),
    }
    previous: ApiPrompt = {}
    for number, person in enumerate(people):
        mask: ApiPrompt = {"destination": ["empty_mask", 0], "source": ["half_mask", 0], "x": half * number, "y": 0}
        nodes[f"mask_{person}"] = make_node("MaskComposite", operation="add", **mask)
        inputs: ApiPrompt = {"identity": get_identity_link(person), "mask": [f"mask_{person}", 0], "strength": 1.0}
        nodes[person] = make_node("LikenessPerson", **inputs, **previous)
        previous = {"people": [person, 0]}
    rows = [
        GalleryRow("base model", make_sampling_prompt({}, PAIR_PROMPTS, width=PAIR_WIDTH)),
        GalleryRow(
            f"{FIRST_PERSON} left, {LAST_PERSON} right",
            make_sampling_prompt(nodes | FUSED.apply_to([LAST_PERSON, 0]), PAIR_PROMPTS, width=PAIR_WIDTH),
        ),
    ]
    text = "With fused KV: one prompt, and for each person a mask over one half of the image."
    return GallerySection("Two people together", text, PAIR_PROMPTS, rows, FUSED.files)


def _mix_section() -> GallerySection:
    rows = []
    both: ApiPrompt = {
        f"identities.identity_{n}": get_identity_link(one) for n, one in enumerate((FIRST_PERSON, LAST_PERSON))
    }
    for share in MIX_PERCENTAGES:
        mixed = make_node("LikenessMixIdentities", weights=f"{100 - share}, {share}", **both)
        rows.append(
            GalleryRow(
                f"{share} % {LAST_PERSON}",
                make_sampling_prompt({"mixed": mixed, **DECOUPLED.apply_to(["mixed", 0])}, SINGLE_PROMPTS),
            )
        )
    text = "With decoupled attention: spherical interpolation of the two face embeddings."
    return GallerySection(f"From {FIRST_PERSON} to {LAST_PERSON}", text, SINGLE_PROMPTS, rows, DECOUPLED.files)


def _saved_identity_section() -> GallerySection:
    save = make_node(
        "LikenessSaveIdentity", identity=get_identity_link(FIRST_PERSON), name=SAVED_IDENTITY, include_crops=True
    )
    load = make_node("LikenessLoadIdentity", file=f"{SAVED_IDENTITY}.safetensors")
    rows = [
        GalleryRow(
            "as encoded",
            make_sampling_prompt({"save": save, **DECOUPLED.apply_to(get_identity_link(FIRST_PERSON))}, SINGLE_PROMPTS),
            FIRST_PERSON,
        ),
        GalleryRow(
            "from the file",
            make_sampling_prompt({"load": load, **DECOUPLED.apply_to(["load", 0])}, SINGLE_PROMPTS),
            FIRST_PERSON,
        ),
    ]
    text = f"{FIRST_PERSON}'s identity as encoded from the photos, and saved to a file and loaded from it."
    return GallerySection("Identity files", text, SINGLE_PROMPTS, rows, DECOUPLED.files, expect_identical=True)


def build_sections() -> list[GallerySection]:
    """All sections, in the order in which the rows must run: one loads a file that another saves."""
    return [
        _photos_section(),
        _base_model_section(),
        *map(_method_section, GALLERY_METHODS),
        _two_people_section(),
        _mix_section(),
        _saved_identity_section(),
    ]
