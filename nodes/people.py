"""People: several identities in one image, each in its region, from masks, boxes or the faces of a layout image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..likeness.attention import regions
from ..likeness.faces import drawing
from ..likeness.faces.detection import find_faces
from ..likeness.spec import Identity, People, Person
from . import types
from .photos import split_photos

SIZE_LIMITS: dict[str, Any] = {"min": 64, "max": 16384, "step": 8}
# Pixels per latent grid cell in the layers of SD1.5 and SDXL.
LAYER_DOWNSCALE_FACTORS = (8, 16, 32, 64)


def append_people(earlier_people: People | None, *new_people: Person) -> People:
    return (*(earlier_people or ()), *new_people)


def place_identities(
    identities: Sequence[Identity], boxes: Tensor, size: tuple[int, int], feather: int, overlap: str
) -> list[Person]:
    """One identity per box [n, 4] in pixels, from left to right. Raises ValueError if their counts differ."""
    if len(boxes) != len(identities):
        raise ValueError(
            f"got {len(identities)} identities for {len(boxes)} boxes; expected one identity per box, from left to "
            "right; connect as many identities as there are boxes, or change the boxes"
        )
    masks = regions.make_box_regions(regions.sort_left_to_right(boxes), *size, feather, overlap)
    return [
        Person(identity, regions.check_region(mask, identity.name))
        for identity, mask in zip(identities, masks, strict=True)
    ]


def convert_host_boxes(host_boxes: Sequence[Any]) -> Tensor:
    """ComfyUI's bounding boxes, each {x, y, width, height} or a list of these, as [n, 4]: x0, y0, x1, y1."""
    corners: list[tuple[float, ...]] = []
    for box in host_boxes:
        if isinstance(box, dict):
            x, y, width, height = (float(box[name]) for name in ("x", "y", "width", "height"))
            corners.append((x, y, x + width, y + height))
        else:
            corners += convert_host_boxes(box).tolist()
    return torch.tensor(corners).view(-1, 4)


class MakePerson(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LikenessPerson",
            display_name="Person",
            category="likeness/people",
            description="An identity and the region of the image where it may appear. Chain several nodes for several "
            "people. Every Apply Identity node accepts people.",
            search_aliases=["regional", "mask", "several people"],
            inputs=[
                types.IdentitySocket.Input("identity", tooltip="The person, from Encode, Load, Merge or Mix."),
                io.Mask.Input(
                    "mask", optional=True,
                    tooltip="Region of the person: white on a mask with the aspect ratio of the image. A batch of "
                    "masks: one per image; a black one leaves the person out. Not connected: the whole image.",
                ),
                io.Float.Input(
                    "strength", default=1.0, min=0.0, max=5.0, step=0.05,
                    tooltip="Multiplies the strength of the Apply node for this person, 0 to 5. 0 leaves the person "
                    "out.",
                ),
                types.PeopleSocket.Input(
                    "people", optional=True, tooltip="The people before this one, from another Person node."
                ),
                io.Conditioning.Input(
                    "prompt", optional=True,
                    tooltip="A prompt for this person only. Prompts of People applies it inside the mask.",
                ),
            ],
            outputs=[types.PeopleSocket.Output(display_name="people")],
        )  # fmt: skip

    @classmethod
    def execute(
        cls,
        identity: Identity,
        strength: float,
        mask: Tensor | None = None,
        people: People | None = None,
        prompt: list[Any] | None = None,
    ) -> io.NodeOutput:
        region = None if mask is None else regions.check_region(mask, identity.name)
        return io.NodeOutput(append_people(people, Person(identity, region, strength, prompt)))


def make_identities_input() -> io.Autogrow.Input:
    identity = types.IdentitySocket.Input("identity", tooltip="The people, from left to right.")
    template = io.Autogrow.TemplatePrefix(identity, prefix="identity_", min=1, max=16)
    return io.Autogrow.Input("identities", template=template, tooltip="1 to 16 identities, from left to right.")


def make_edge_inputs() -> list[Any]:
    """Inputs for the edges and overlaps of regions, and for the people before."""
    return [
        io.Int.Input(
            "feather", default=0, min=0, max=512, step=1,
            tooltip="Width of the soft edge of the regions in pixels, 0 to 512. Methods with hard regions treat 0.5 "
            "and above as inside.",
        ),
        io.Combo.Input(
            "overlap", options=list(regions.OVERLAP_RULES), default="exclusive",
            tooltip="Who gets the area where regions overlap. exclusive: the nearest person. priority: the person "
            "further left. soft: shared by all.",
        ),
        types.PeopleSocket.Input("people", optional=True, tooltip="Existing people. The new ones are appended."),
    ]  # fmt: skip


class PeopleFromBoxes(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        box = io.BoundingBox.Input(
            "box", tooltip="A bounding box from another node, in pixels of this width and height.", force_input=True
        )
        return io.Schema(
            node_id="LikenessPeopleFromBoxes",
            display_name="People from Boxes",
            category="likeness/people",
            description="Places several identities in boxes, in order from left to right.",
            search_aliases=["regional", "layout", "several people"],
            inputs=[
                make_identities_input(),
                io.String.Input(
                    "boxes", multiline=True, default="0.05, 0.1, 0.45, 0.95\n0.55, 0.1, 0.95, 0.95",
                    tooltip="One box per line: left, top, right, bottom as fractions of the image, 0 to 1. Leave "
                    "empty if boxes are connected.",
                ),
                io.Int.Input("width", default=512, tooltip="Image width in pixels, 64 to 16384.", **SIZE_LIMITS),
                io.Int.Input("height", default=512, tooltip="Image height in pixels, 64 to 16384.", **SIZE_LIMITS),
                *make_edge_inputs(),
                io.Autogrow.Input(
                    "drawn", optional=True,
                    template=io.Autogrow.TemplatePrefix(box, prefix="box_", min=0, max=16),
                    tooltip="Bounding boxes from other nodes, in addition to those in the text.",
                ),
            ],
            outputs=[types.PeopleSocket.Output(display_name="people")],
        )  # fmt: skip

    @classmethod
    def execute(
        cls,
        identities: io.Autogrow.Type,
        boxes: str,
        width: int,
        height: int,
        feather: int,
        overlap: str,
        people: People | None = None,
        drawn: io.Autogrow.Type | None = None,
    ) -> io.NodeOutput:
        typed_boxes = regions.parse_boxes(boxes) * torch.tensor([width, height, width, height])
        all_boxes = torch.cat((typed_boxes, convert_host_boxes(list((drawn or {}).values()))))
        persons = place_identities(list(identities.values()), all_boxes, (height, width), feather, overlap)
        return io.NodeOutput(append_people(people, *persons))


class PeopleFromPhoto(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LikenessPeopleFromPhoto",
            display_name="People from Photo",
            category="likeness/people",
            description="Places several identities at the faces of a layout image, from left to right. The layout "
            "can be a group photo or an image generated without identities.",
            search_aliases=["regional", "layout", "several people"],
            inputs=[
                io.Image.Input("image", tooltip="Layout image, with the aspect ratio of the image to generate."),
                types.FaceAnalyzerSocket.Input("face_analyzer", tooltip="Detects the faces of the layout."),
                make_identities_input(),
                io.Float.Input(
                    "grow", default=1.6, min=0.5, max=6.0, step=0.1,
                    tooltip="Size of the region relative to the face box, 0.5 to 6. 1.6 covers the head, 3 also the "
                    "shoulders.",
                ),
                *make_edge_inputs(),
            ],
            outputs=[
                types.PeopleSocket.Output(display_name="people"),
                io.Image.Output(display_name="preview", tooltip="The layout image with the faces numbered."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls,
        image: Tensor,
        face_analyzer: types.FaceAnalyzerProtocol,
        identities: io.Autogrow.Type,
        grow: float,
        feather: int,
        overlap: str,
        people: People | None = None,
    ) -> io.NodeOutput:
        identity_list, layout = list(identities.values()), split_photos([image])[0]
        search = find_faces(layout, face_analyzer.detect)
        largest = sorted(search.faces, key=lambda face: -face.size)[: len(identity_list)]
        if len(largest) < len(identity_list):
            raise ValueError(
                f"got {len(search.faces)} face(s) in the layout image for {len(identity_list)} identities (detector "
                f"sizes tried: {', '.join(search.attempts)}); expected one face per identity; use another image, or "
                "People from Boxes"
            )
        height, width = layout.shape[:2]
        boxes = torch.stack([scale_box(face.box, grow) for face in largest])
        persons = place_identities(identity_list, boxes, (height, width), feather, overlap)
        for number, face in enumerate(sorted(largest, key=lambda face: float(face.box[0] + face.box[2])), 1):
            layout = drawing.draw_face(layout, face, str(number), drawing.SELECTED_COLOR)
        return io.NodeOutput(append_people(people, *persons), layout[None])


def scale_box(box: Tensor, factor: float) -> Tensor:
    """Scale a box [4] about its center."""
    center, half = (box[:2] + box[2:]) / 2, (box[2:] - box[:2]) / 2 * factor
    return torch.cat((center - half, center + half))


class PreviewPeople(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LikenessPreviewPeople",
            display_name="Preview People",
            category="likeness/people",
            description="Shows the region of each person: first at image size, then on the latent grids of the layers, "
            "with cells of 8, 16, 32 and 64 pixels. Dark areas belong to nobody, white areas to several people.",
            search_aliases=["regional", "mask", "several people"],
            inputs=[
                types.PeopleSocket.Input("people", tooltip="From Person, People from Boxes or People from Photo."),
                io.Int.Input("width", default=512, tooltip="Image width in pixels, 64 to 16384.", **SIZE_LIMITS),
                io.Int.Input("height", default=512, tooltip="Image height in pixels, 64 to 16384.", **SIZE_LIMITS),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="One map at image size and one per layer size."),
                io.String.Output(
                    display_name="report", tooltip="Color, strength and area of each person, and problems of the masks."
                ),
            ],
        )

    @classmethod
    def execute(cls, people: People, width: int, height: int) -> io.NodeOutput:
        masks = [person.mask for person in people]
        sizes = [(height, width), *((-(-height // cell), -(-width // cell)) for cell in LAYER_DOWNSCALE_FACTORS)]
        maps = [drawing.draw_region_map([None if m is None else _resize_mask(m, h, w, i > 0) for m in masks], h, w)
                for i, (h, w) in enumerate(sizes)]  # fmt: skip
        images = torch.stack([drawing.enlarge_image(region_map, height, width) for region_map in maps])
        return io.NodeOutput(images, "\n".join(_describe_people(people, sizes, width / height)))


def _resize_mask(mask: Tensor, height: int, width: int, for_layer: bool) -> Tensor:
    """The region of the first image [height, width]: hard, as a layer uses it, or soft, as it was drawn."""
    if for_layer:
        coverage = regions.find_inside_queries(mask, height, width).float()
    else:
        coverage = regions.compute_coverage(mask, height, width)
    return coverage[0].view(height, width)


def _describe_people(people: People, sizes: Sequence[tuple[int, int]], aspect_ratio: float) -> list[str]:
    """Report lines. `sizes` are (height, width) of the image and of each layer's grid."""
    lines = []
    for number, person in enumerate(people, 1):
        mask, name = person.mask, f"{person.identity.name}, {drawing.get_person_color_name(number - 1)}"
        if mask is None:
            lines.append(f"{number}: {name}, strength {person.strength:g}, whole image")
            continue
        percentage = 100 * float(mask.mean())
        lines.append(f"{number}: {name}, strength {person.strength:g}, {percentage:.1f} % of the image")
        absent = [str(i + 1) for i in regions.find_absent_images(mask)]
        if absent:
            lines.append(f"   absent from image {', '.join(absent)} of {len(mask)}, where the mask is black")
        mismatch = (mask.shape[2] / mask.shape[1]) / aspect_ratio
        if max(mismatch, 1 / mismatch) > regions.MAX_ASPECT_RATIO_MISMATCH:
            lines.append(f"   the mask is {mask.shape[2]}x{mask.shape[1]} and is stretched to the shape of the image")
        too_small = [f"{w}x{h}" for h, w in sizes[1:] if regions.is_region_too_small(mask, h, w)]
        if too_small:
            lines.append(
                f"   the mask is too small for the layers of {', '.join(too_small)} cells; the most covered cells are "
                "used"
            )
    return lines


class PromptsOfPeople(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LikenessPromptsOfPeople",
            display_name="Prompts of People",
            category="likeness/people",
            description="Adds the prompts of the people to a prompt, each restricted to the mask of the person.",
            search_aliases=["regional prompt"],
            inputs=[
                io.Conditioning.Input("conditioning", tooltip="The prompt for the whole image."),
                types.PeopleSocket.Input("people", tooltip="People with a prompt from Person. Others are ignored."),
                io.Float.Input(
                    "strength", default=1.0, min=0.0, max=10.0, step=0.05,
                    tooltip="Weight of the people's prompts relative to the prompt for the whole image, 0 to 10. 0 "
                    "disables them.",
                ),
            ],
            outputs=[io.Conditioning.Output(display_name="conditioning")],
        )  # fmt: skip

    @classmethod
    def execute(cls, conditioning: list[Any], people: People, strength: float) -> io.NodeOutput:
        prompts = [
            _mask_conditioning(cond, options, person.mask, strength)
            for person in people
            for cond, options in person.prompt or ()
        ]
        return io.NodeOutput([*conditioning, *prompts] if strength else conditioning)


def _mask_conditioning(cond: Tensor, options: dict[str, Any], mask: Tensor | None, strength: float) -> list[Any]:
    """A conditioning entry restricted to a mask, as ComfyUI's ConditioningSetMask does."""
    area = {"strength": strength} if mask is None else {"mask": mask, "mask_strength": strength}
    return [cond, {**options, **area, "set_area_to_bounds": False}]


NODES = [MakePerson, PeopleFromBoxes, PeopleFromPhoto, PreviewPeople, PromptsOfPeople]
