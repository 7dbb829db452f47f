"""Compare Images and Evaluate Identity: the image quality and likeness metrics that papers report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from comfy.sd1_clip import SD1CheckpointClipModel
from comfy_api.latest import io
from torch import Tensor

from ..likeness.faces import alignment, detection
from ..likeness.identity import metrics
from ..likeness.spec import Face, Identity
from . import types
from .photos import get_reference_embeddings, get_unit_embedding, list_hash_warnings, split_photos

MAX_PSNR = 100.0  # dB, for identical images


def compute_psnr(image: Tensor, reference: Tensor) -> float:
    """Peak signal-to-noise ratio of images [H, W, 3] in 0..1, in dB, at most 100 (scikit-image)."""
    from skimage.metrics import peak_signal_noise_ratio

    if torch.equal(image, reference):
        return MAX_PSNR
    return min(MAX_PSNR, float(peak_signal_noise_ratio(reference.numpy(), image.numpy(), data_range=1)))


def compute_ssim(image: Tensor, reference: Tensor) -> float:
    """Structural similarity of images [H, W, 3] in 0..1, with the window of Wang et al. (2004) (scikit-image)."""
    from skimage.metrics import structural_similarity

    layout = {"data_range": 1, "channel_axis": -1}
    window = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    return float(cast(float, structural_similarity(reference.numpy(), image.numpy(), **layout, **window)))


def match_references(images: Sequence[Tensor], reference_images: Sequence[Tensor], input_name: str) -> list[Tensor]:
    """One reference per image; a single reference is used for all. Raises ValueError if the counts do not match."""
    if len(reference_images) not in (1, len(images)):
        raise ValueError(
            f"got {len(images)} image(s) and {len(reference_images)} at {input_name}; expected one for all images, or "
            "one per image"
        )
    return [*reference_images] * (len(images) if len(reference_images) == 1 else 1)


class CompareImages(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LikenessCompare",
            display_name="Compare Images",
            category="likeness/face",
            description="Compares images with references pixel by pixel: PSNR and SSIM. Use it to measure the loss "
            "of a codec or an upscaler, or to check whether a change in the workflow changed the image. It does not "
            "measure likeness.",
            search_aliases=["psnr", "ssim", "metrics", "difference"],
            inputs=[
                io.Image.Input("image", tooltip="Images to measure, as a batch."),
                io.Image.Input(
                    "reference",
                    tooltip="Reference images of the same size in pixels: one for all images, or one per image.",
                ),
            ],
            outputs=[
                io.Float.Output(
                    display_name="psnr", tooltip="Mean PSNR in dB, at most 100. Above 40, few see a difference."
                ),
                io.Float.Output(display_name="ssim", tooltip="Mean SSIM, -1 to 1. 1: identical images."),
                io.String.Output(display_name="report", tooltip="PSNR and SSIM of each image."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, image: Tensor, reference: Tensor) -> io.NodeOutput:
        images, references = split_photos([image]), split_photos([reference])
        size, reference_size = (f"{batch[0].shape[1]} x {batch[0].shape[0]}" for batch in (images, references))
        if size != reference_size:
            raise ValueError(
                f"got images of {size} and references of {reference_size} pixels; expected the same size; scale one of "
                "them"
            )
        pairs = list(zip(images, match_references(images, references, "reference"), strict=True))
        values = torch.tensor([[compute_psnr(*pair), compute_ssim(*pair)] for pair in pairs], dtype=torch.float64)
        lines = [f"image {n}: PSNR {psnr:.2f} dB, SSIM {ssim:.4f}" for n, (psnr, ssim) in enumerate(values.tolist(), 1)]
        return io.NodeOutput(*values.mean(0).tolist(), "\n".join(lines))


@dataclass(frozen=True, eq=False)
class DetectedFaces:
    """The face of each image that is most similar to an identity, and its ArcFace vector [p, 512].

    Images without a face have None and zeros.
    """

    faces: Sequence[Face | None]
    embeddings: Tensor

    @classmethod
    def find_most_similar(
        cls, images: Sequence[Tensor], identity: Identity, analyzer: types.FaceAnalyzerProtocol
    ) -> DetectedFaces:
        target, faces = get_unit_embedding(identity, analyzer), list[Face | None]()
        embeddings = torch.zeros(len(images), len(target), dtype=torch.float64)
        for row, image in zip(embeddings, images, strict=True):
            detected = detection.find_faces(image, analyzer.detect).faces
            face = None
            if detected:
                face = detected[detection.pick_most_similar_face(image, detected, analyzer.embed, target)]
                row += analyzer.embed(alignment.convert_to_uint8(image), face).double()
            faces.append(face)
        return cls(faces, embeddings)


def embed_images(clip_vision: Any, images: Sequence[Tensor]) -> Tensor:
    """CLIP image embeddings [p, d]."""
    return torch.cat(
        [clip_vision.encode_image(image[None], crop=True)["image_embeds"].float().cpu() for image in images]
    )


def embed_text(clip: Any, text: str, width: int) -> Tensor:
    """CLIP text embedding [width], projected into the space of the image embeddings.

    Raises ValueError if the width differs, or if the checkpoint holds no text projection: the host then uses the
    identity matrix.
    """
    modules = dict(clip.cond_stage_model.named_modules())
    projections = [module.weight.float().cpu() for name, module in modules.items() if name.endswith("text_projection")]
    if any(torch.equal(weight, torch.eye(len(weight))) for weight in projections):
        raise ValueError(
            "got a text encoder without a text projection, as in SD1.5 checkpoints; expected that of a complete CLIP; "
            "load the text encoder that was trained with clip_vision with Load CLIP"
        )
    pooled = clip.encode_from_tokens(clip.tokenize(text), return_pooled=True)[1].float().cpu()
    for module in modules.values():
        if isinstance(module, SD1CheckpointClipModel):  # the host does not project the pooled states of SD1.5's CLIP
            pooled = pooled @ module.transformer.text_projection.weight.float().cpu().T
    embedding = pooled[0]
    if len(embedding) != width:
        raise ValueError(
            f"got image embeddings of width {width} and text embeddings of width {len(embedding)}; expected "
            "clip_vision and clip of the same network; load both from one CLIP"
        )
    return embedding


# Output name -> how the report prints the metric.
METRIC_FORMATS = {
    "sim_ref": "Sim_ref {:.3f}", "sim_target": "Sim_target {:.3f}", "paste": "Paste {:.3f}", "clip_i": "CLIP-I {:.3f}",
    "clip_t": "CLIP-T {:.3f}", "pose_error": "pose error {:.1f} degrees",
}  # fmt: skip


def compare_to_target(
    generated_faces: DetectedFaces, target_faces: DetectedFaces, reference_similarity: Tensor
) -> dict[str, Tensor]:
    """Metrics of generated faces against the target faces, [p] each. pose_error is NaN if either face is missing."""
    likeness = metrics.compute_cosines(generated_faces.embeddings, target_faces.embeddings)
    pairs = zip(generated_faces.faces, target_faces.faces, strict=True)
    pose_errors = [metrics.compute_pose_error(a, b) if a is not None and b is not None else torch.nan for a, b in pairs]
    return {
        "sim_target": likeness,
        "paste": metrics.compute_paste_score(reference_similarity, likeness),
        "pose_error": torch.tensor(pose_errors),
    }


class EvaluateIdentity(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LikenessEvaluate",
            display_name="Evaluate Identity",
            category="likeness/face",
            description="Measures generated images with the metrics of the papers: similarity to the photos of an "
            "identity and to a target image, copying, CLIP similarity and pose error.",
            search_aliases=["metrics", "face similarity", "clip score", "paste", "benchmark"],
            inputs=[
                io.Image.Input(
                    "image", tooltip="Generated images, as a batch. The most similar face of each image is used."
                ),
                types.IdentitySocket.Input(
                    "identity", tooltip="The person they should show, encoded with the same model pack."
                ),
                types.FaceAnalyzerSocket.Input("face_analyzer", tooltip="Detects and compares the faces."),
                io.Image.Input(
                    "target", optional=True,
                    tooltip="A photo of the person that shows what the image should look like, not one of the "
                    "identity's photos. One for all images, or one per image. For sim_target, paste, clip_i and "
                    "pose_error.",
                ),
                io.ClipVision.Input("clip_vision", optional=True, tooltip="For clip_i and clip_t. Load CLIP Vision."),
                io.Clip.Input(
                    "clip", optional=True,
                    tooltip="For clip_t: the text encoder that was trained together with clip_vision.",
                ),
                io.String.Input(
                    "text", default="", multiline=True, optional=True, tooltip="For clip_t: the prompt of the images."
                ),
            ],
            outputs=[
                io.Float.Output(
                    display_name="sim_ref",
                    tooltip="Highest cosine similarity to a face of the identity, -1 to 1. 0: no face found.",
                ),
                io.Float.Output(display_name="sim_target", tooltip="Cosine similarity to the target's face, -1 to 1."),
                io.Float.Output(display_name="paste", tooltip="sim_ref - sim_target. High if a photo was copied."),
                io.Float.Output(display_name="clip_i", tooltip="CLIP similarity to the target image, -1 to 1."),
                io.Float.Output(display_name="clip_t", tooltip="CLIP similarity to the text, -1 to 1."),
                io.Float.Output(display_name="pose_error", tooltip="Angle to the target's pose, 0 to 180 degrees."),
                io.String.Output(
                    display_name="report", tooltip="All metrics of each image, and those that were not measured."
                ),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, image: Tensor, identity: Identity, face_analyzer: types.FaceAnalyzerProtocol, target: Tensor | None = None,
        clip_vision: Any = None, clip: Any = None, text: str = "",
    ) -> io.NodeOutput:  # fmt: skip
        images = split_photos([image])
        targets = None if target is None else match_references(images, split_photos([target]), "target")
        faces = DetectedFaces.find_most_similar(images, identity, face_analyzer)
        reference_embeddings = get_reference_embeddings(identity, face_analyzer)
        values = {"sim_ref": metrics.compute_reference_similarity(faces.embeddings, reference_embeddings)}
        if targets is not None:
            target_faces = DetectedFaces.find_most_similar(targets, identity, face_analyzer)
            values |= compare_to_target(faces, target_faces, values["sim_ref"])
        if clip_vision is not None:
            image_embeddings = embed_images(clip_vision, images)
            if targets is not None:
                values["clip_i"] = metrics.compute_cosines(image_embeddings, embed_images(clip_vision, targets))
            if clip is not None:
                text_embedding = embed_text(clip, text, image_embeddings.shape[1])
                values["clip_t"] = metrics.compute_cosines(image_embeddings, text_embedding)
        means = [float(values[name].nanmean().nan_to_num()) if name in values else 0.0 for name in METRIC_FORMATS]
        report = "\n".join([*list_hash_warnings(identity, face_analyzer), *format_metric_lines(faces, values)])
        return io.NodeOutput(*means, report)


def format_metric_lines(generated_faces: DetectedFaces, values: dict[str, Tensor]) -> list[str]:
    """One line per image, and one that names the metrics that were not measured."""
    lines = []
    for i, face in enumerate(generated_faces.faces):
        row = [template.format(values[name][i]) for name, template in METRIC_FORMATS.items() if name in values]
        lines.append(f"image {i + 1}: {', '.join(row)}{'' if face is not None else '; no face found'}")
    missing = [name for name in METRIC_FORMATS if name not in values]
    return lines + ([f"Not measured (output is 0): {', '.join(missing)}."] if missing else [])


NODES = [CompareImages, EvaluateIdentity]
