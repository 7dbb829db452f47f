"""Compare Pictures and Evaluate Identity: the numbers that papers give for pictures and for likeness."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from comfy.sd1_clip import SD1CheckpointClipModel
from comfy_api.latest import io
from torch import Tensor

from ..likeness import faces, measures
from ..likeness.spec import Face, Identity
from . import types
from .photos import hash_note, references, split, target

MOST = 100.0  # dB, for pictures that are the same


def psnr(picture: Tensor, reference: Tensor) -> float:
    """Peak signal-to-noise ratio of pictures [H, W, 3] in 0..1, in dB, 100 at most, by scikit-image."""
    from skimage.metrics import peak_signal_noise_ratio

    if torch.equal(picture, reference):
        return MOST
    return min(MOST, float(peak_signal_noise_ratio(reference.numpy(), picture.numpy(), data_range=1)))


def ssim(picture: Tensor, reference: Tensor) -> float:
    """Structural similarity of pictures [H, W, 3] in 0..1 with the window of Wang et al. (2004), by scikit-image."""
    from skimage.metrics import structural_similarity

    given = {"data_range": 1, "channel_axis": -1}
    window = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    return float(cast(float, structural_similarity(reference.numpy(), picture.numpy(), **given, **window)))


def paired(pictures: Sequence[Tensor], others: Sequence[Tensor], name: str) -> list[Tensor]:
    """Each picture's own of the others, or for all of them the only one. Raises ValueError on other numbers."""
    if len(others) not in (1, len(pictures)):
        raise ValueError(
            f"got {len(pictures)} pictures and {len(others)} at {name}; expected one for all, or one for each"
        )
    return [*others] * (len(pictures) if len(others) == 1 else 1)


class ComparePictures(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LikenessCompare",
            display_name="Compare Pictures",
            category="likeness/face",
            description="How near pictures are to others pixel by pixel: PSNR and SSIM. They tell a codec's or an "
            "upscaler's loss, and whether a change of the graph changed the picture; likeness is another matter.",
            search_aliases=["psnr", "ssim", "metrics", "difference"],
            inputs=[
                io.Image.Input("image", tooltip="Pictures to measure, as a batch."),
                io.Image.Input(
                    "reference",
                    tooltip="What they should be, of the same size in pixels: one for all, or one for each.",
                ),
            ],
            outputs=[
                io.Float.Output(display_name="psnr", tooltip="Mean PSNR in dB, 100 at most: above 40 few see it."),
                io.Float.Output(display_name="ssim", tooltip="Mean SSIM, -1 to 1: 1 for the same picture."),
                io.String.Output(display_name="report", tooltip="Both numbers of each picture."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, image: Tensor, reference: Tensor) -> io.NodeOutput:
        pictures, others = split([image]), split([reference])
        sizes = [" x ".join(map(str, reversed(one[0].shape[:2]))) for one in (pictures, others)]
        if sizes[0] != sizes[1]:
            raise ValueError(f"got pictures of {sizes[0]} and {sizes[1]} pixels; expected one size; scale one of them")
        pairs = list(zip(pictures, paired(pictures, others, "reference"), strict=True))
        values = torch.tensor([[psnr(*pair), ssim(*pair)] for pair in pairs], dtype=torch.float64)
        lines = [f"picture {n}: PSNR {db:.2f} dB, SSIM {alike:.4f}" for n, (db, alike) in enumerate(values.tolist(), 1)]
        return io.NodeOutput(*values.mean(0).tolist(), "\n".join(lines))


@dataclass(frozen=True, eq=False)
class Seen:
    """Of some pictures the face most like an identity, each, and its vector [p, 512]; None and zeros without a face."""

    faces: Sequence[Face | None]
    vectors: Tensor

    @classmethod
    def of(cls, pictures: Sequence[Tensor], identity: Identity, analyzer: types.Analyzer) -> Seen:
        wanted, found = target(identity, analyzer), list[Face | None]()
        vectors = torch.zeros(len(pictures), len(wanted), dtype=torch.float64)
        for row, picture in zip(vectors, pictures, strict=True):
            there = faces.find_faces(picture, analyzer.detect).faces
            face = there[faces.most_alike(picture, there, analyzer.embed, wanted)] if there else None
            found.append(face)
            if face is not None:
                row += analyzer.embed(faces.pixels(picture), face).double()
        return cls(found, vectors)


def of_pictures(vision: Any, pictures: Sequence[Tensor]) -> Tensor:
    """A CLIP_VISION's embeddings of pictures, [p, d]."""
    return torch.cat([vision.encode_image(one[None], crop=True)["image_embeds"].float().cpu() for one in pictures])


def of_text(clip: Any, text: str, width: int) -> Tensor:
    """A CLIP's embedding of a text in the space of its pictures' [width].

    Raises ValueError on one of another width, or that came without the projection into that space: the host's is then
    the identity.
    """
    modules = dict(clip.cond_stage_model.named_modules())
    projections = [module.weight.float().cpu() for name, module in modules.items() if name.endswith("text_projection")]
    if any(torch.equal(weight, torch.eye(len(weight))) for weight in projections):
        raise ValueError(
            "got a text encoder without a text projection; expected a whole CLIP's, as SD1.5 checkpoints hold none; "
            "load the text encoder that was trained with clip_vision by Load CLIP"
        )
    pooled = clip.encode_from_tokens(clip.tokenize(text), return_pooled=True)[1].float().cpu()
    for module in modules.values():
        if isinstance(module, SD1CheckpointClipModel):  # SD1.5's, whose pooled states the host does not project
            pooled = pooled @ module.transformer.text_projection.weight.float().cpu().T
    made = pooled[0]
    if len(made) != width:
        raise ValueError(
            f"got {width} numbers of a picture and {len(made)} of the text; expected clip_vision and clip of one "
            "network; load both of the same CLIP"
        )
    return made


# What is measured, by the name of its output: in words and of how many digits.
NAMES = {
    "sim_ref": "Sim_ref {:.3f}", "sim_target": "Sim_target {:.3f}", "paste": "Paste {:.3f}", "clip_i": "CLIP-I {:.3f}",
    "clip_t": "CLIP-T {:.3f}", "pose_error": "pose {:.1f} degrees apart",
}  # fmt: skip


def to_target(seen: Seen, aim: Seen, ref: Tensor) -> dict[str, Tensor]:
    """What there is to say of faces and those that were to be made; pose is NaN where either is missing."""
    likeness = measures.cosines(seen.vectors, aim.vectors)
    pairs = zip(seen.faces, aim.faces, strict=True)
    apart = [measures.pose_error(a, b) if a is not None and b is not None else torch.nan for a, b in pairs]
    return {"sim_target": likeness, "paste": measures.paste(ref, likeness), "pose_error": torch.tensor(apart)}


class EvaluateIdentity(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LikenessEvaluate",
            display_name="Evaluate Identity",
            category="likeness/face",
            description="The numbers by which papers compare methods: likeness to the photos of an identity and to the "
            "picture that was asked for, copying, CLIP's cosines, the error of pose.",
            search_aliases=["metrics", "face similarity", "clip score", "paste", "benchmark"],
            inputs=[
                io.Image.Input("image", tooltip="Generated pictures, as a batch. Of each the face most alike counts."),
                types.Identity.Input("identity", tooltip="Whom they show; encoded with the same model pack."),
                types.FaceAnalyzer.Input("face_analyzer", tooltip="Finds and compares the faces."),
                io.Image.Input(
                    "target", optional=True,
                    tooltip="A photo of the person as the picture was to be, none of the identity's: one for all "
                    "pictures, or one for each. For sim_target, paste, clip_i, pose_error.",
                ),
                io.ClipVision.Input("clip_vision", optional=True, tooltip="From Load CLIP Vision, for clip_i, clip_t."),
                io.Clip.Input(
                    "clip", optional=True,
                    tooltip="For clip_t: the text encoder that was trained together with clip_vision.",
                ),
                io.String.Input(
                    "text", default="", multiline=True, optional=True, tooltip="For clip_t: what the pictures show."
                ),
            ],
            outputs=[
                io.Float.Output(
                    display_name="sim_ref", tooltip="Largest cosine to a face of the identity, -1 to 1; 0: no face."
                ),
                io.Float.Output(display_name="sim_target", tooltip="Cosine to the target's face, -1 to 1."),
                io.Float.Output(display_name="paste", tooltip="sim_ref - sim_target: high where a photo is copied."),
                io.Float.Output(display_name="clip_i", tooltip="CLIP's cosine to the target picture, -1 to 1."),
                io.Float.Output(display_name="clip_t", tooltip="CLIP's cosine to the text, -1 to 1."),
                io.Float.Output(display_name="pose_error", tooltip="Degrees to the target's pose, 0 to 180."),
                io.String.Output(display_name="report", tooltip="All numbers of each picture; what was not measured."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, image: Tensor, identity: Identity, face_analyzer: types.Analyzer, target: Tensor | None = None,
        clip_vision: Any = None, clip: Any = None, text: str = "",
    ) -> io.NodeOutput:  # fmt: skip
        pictures = split([image])
        aims = None if target is None else paired(pictures, split([target]), "target")
        seen = Seen.of(pictures, identity, face_analyzer)
        values = {"sim_ref": measures.nearest(seen.vectors, references(identity, face_analyzer))}
        if aims is not None:
            values |= to_target(seen, Seen.of(aims, identity, face_analyzer), values["sim_ref"])
        if clip_vision is not None:
            made = of_pictures(clip_vision, pictures)
            if aims is not None:
                values["clip_i"] = measures.cosines(made, of_pictures(clip_vision, aims))
            if clip is not None:
                values["clip_t"] = measures.cosines(made, of_text(clip, text, made.shape[1]))
        means = [float(values[name].nanmean().nan_to_num()) if name in values else 0.0 for name in NAMES]
        return io.NodeOutput(*means, "\n".join([*hash_note(identity, face_analyzer), *told(seen, values)]))


def told(seen: Seen, values: dict[str, Tensor]) -> list[str]:
    """A line for each picture, and one for what could not be measured."""
    lines = []
    for number, face in enumerate(seen.faces):
        row = [form.format(values[name][number]) for name, form in NAMES.items() if name in values]
        lines.append(f"picture {number + 1}: {', '.join(row)}{'' if face is not None else '; no face found'}")
    missing = [name for name in NAMES if name not in values]
    return lines + ([f"Not measured, and 0: {', '.join(missing)}."] if missing else [])


NODES = [ComparePictures, EvaluateIdentity]
