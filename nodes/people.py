"""People: several identities in one picture, each in a region; drawn, found in a layout picture, looked at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..likeness import draw, regions
from ..likeness.faces import find_faces
from ..likeness.spec import Identity, People, Person
from . import types
from .photos import split

SIZE: dict[str, Any] = {"min": 64, "max": 16384, "step": 8}
# Layers of SD1.5 and SDXL see the picture in cells of so many pixels.
CELLS = (8, 16, 32, 64)


def chained(before: People | None, *more: Person) -> People:
    return (*(before or ()), *more)


def laid_out(
    identities: Sequence[Identity], boxes: Tensor, size: tuple[int, int], feather: int, overlap: str
) -> list[Person]:
    """An identity for each box [n, 4] in pixels, from left to right. Raises ValueError where the numbers differ."""
    if len(boxes) != len(identities):
        raise ValueError(
            f"got {len(identities)} identities for {len(boxes)} places; expected one identity for each, from left to "
            "right; connect as many, or change the places"
        )
    masks = regions.lay_out(regions.left_to_right(boxes), *size, feather, overlap)
    return [Person(who, regions.check(mask, who.name)) for who, mask in zip(identities, masks, strict=True)]


def pixels(drawn: Sequence[Any]) -> Tensor:
    """Boxes of the host, each {x, y, width, height} or a list of such, as [n, 4] of x0, y0, x1, y1."""
    found: list[tuple[float, ...]] = []
    for box in drawn:
        if isinstance(box, dict):
            x, y, width, height = (float(box[name]) for name in ("x", "y", "width", "height"))
            found.append((x, y, x + width, y + height))
        else:
            found += pixels(box).tolist()
    return torch.tensor(found).view(-1, 4)


class MakePerson(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LikenessPerson",
            display_name="Person",
            category="likeness/people",
            description="An identity and where in the picture it may appear. Chain several for several people; every "
            "Apply Identity node takes them.",
            search_aliases=["regional", "mask", "several people"],
            inputs=[
                types.Identity.Input("identity", tooltip="Who it is; from Encode, Load, Merge or Mix."),
                io.Mask.Input(
                    "mask", optional=True,
                    tooltip="Where: white on a mask of the picture's shape; a batch of masks is one per picture. "
                    "Without it, everywhere.",
                ),
                io.Float.Input(
                    "strength", default=1.0, min=0.0, max=5.0, step=0.05,
                    tooltip="Multiplies the Apply node's strength for this person, 0 to 5; 0 leaves the person out.",
                ),
                types.People.Input("people", optional=True, tooltip="People so far, from another Person node."),
                io.Conditioning.Input(
                    "prompt", optional=True,
                    tooltip="What is said of this person alone; Prompts of People puts it where the mask is.",
                ),
            ],
            outputs=[types.People.Output(display_name="people")],
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
        region = None if mask is None else regions.check(mask, identity.name)
        return io.NodeOutput(chained(people, Person(identity, region, strength, prompt)))


def identities_input() -> io.Autogrow.Input:
    one = types.Identity.Input("identity", tooltip="Who, from left to right.")
    template = io.Autogrow.TemplatePrefix(one, prefix="identity_", min=1, max=16)
    return io.Autogrow.Input("identities", template=template, tooltip="1 to 16 identities, from left to right.")


def edge_inputs() -> list[Any]:
    """How the regions end and meet."""
    return [
        io.Int.Input(
            "feather", default=0, min=0, max=512, step=1,
            tooltip="Softens the regions' edges over so many pixels, 0 to 512; where a method knows only inside and "
            "outside, half is inside.",
        ),
        io.Combo.Input(
            "overlap", options=list(regions.OVERLAPS), default="exclusive",
            tooltip="What becomes of a place in several regions. exclusive: the nearest person's. priority: that of "
            "the person further left. soft: shared by all.",
        ),
        types.People.Input("people", optional=True, tooltip="People so far; these are added."),
    ]  # fmt: skip


class PeopleFromBoxes(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        box = io.BoundingBox.Input(
            "box", tooltip="A box drawn in ComfyUI, in pixels of this width and height.", force_input=True
        )
        return io.Schema(
            node_id="LikenessPeopleFromBoxes",
            display_name="People from Boxes",
            category="likeness/people",
            description="Places several identities in boxes, from left to right.",
            search_aliases=["regional", "layout", "several people"],
            inputs=[
                identities_input(),
                io.String.Input(
                    "boxes", multiline=True, default="0.05, 0.1, 0.45, 0.95\n0.55, 0.1, 0.95, 0.95",
                    tooltip="One box a line: left, top, right, bottom in parts of the picture, 0 to 1. Empty where "
                    "boxes are connected.",
                ),
                io.Int.Input("width", default=512, tooltip="Width of the picture in pixels, 64 to 16384.", **SIZE),
                io.Int.Input("height", default=512, tooltip="Height of the picture in pixels, 64 to 16384.", **SIZE),
                *edge_inputs(),
                io.Autogrow.Input(
                    "drawn", optional=True,
                    template=io.Autogrow.TemplatePrefix(box, prefix="box_", min=0, max=16),
                    tooltip="Boxes drawn or found in ComfyUI, besides those written above.",
                ),
            ],
            outputs=[types.People.Output(display_name="people")],
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
        written = regions.parse_boxes(boxes) * torch.tensor([width, height, width, height])
        places = torch.cat((written, pixels(list((drawn or {}).values()))))
        persons = laid_out(list(identities.values()), places, (height, width), feather, overlap)
        return io.NodeOutput(chained(people, *persons))


class PeopleFromPhoto(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LikenessPeopleFromPhoto",
            display_name="People from Photo",
            category="likeness/people",
            description="Places several identities where a picture has its faces, from left to right: a group photo, "
            "or a first picture without identities.",
            search_aliases=["regional", "layout", "several people"],
            inputs=[
                io.Image.Input("image", tooltip="Picture of the layout, of the shape of the picture to make."),
                types.FaceAnalyzer.Input("face_analyzer", tooltip="Finds the faces."),
                identities_input(),
                io.Float.Input(
                    "grow", default=1.6, min=0.5, max=6.0, step=0.1,
                    tooltip="Side of a region in sides of the face's box, 0.5 to 6: 1.6 is the head, 3 its shoulders.",
                ),
                *edge_inputs(),
            ],
            outputs=[
                types.People.Output(display_name="people"),
                io.Image.Output(display_name="preview", tooltip="The picture with the faces found, numbered."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls,
        image: Tensor,
        face_analyzer: types.Analyzer,
        identities: io.Autogrow.Type,
        grow: float,
        feather: int,
        overlap: str,
        people: People | None = None,
    ) -> io.NodeOutput:
        wanted, picture = list(identities.values()), split([image])[0]
        search = find_faces(picture, face_analyzer.detect)
        largest = sorted(search.faces, key=lambda face: -face.size)[: len(wanted)]
        if len(largest) < len(wanted):
            raise ValueError(
                f"got {len(search.faces)} face(s) in the layout picture for {len(wanted)} identities (detector sizes "
                f"tried: {', '.join(search.tried)}); expected a face each; use another picture, or People from Boxes"
            )
        height, width = picture.shape[:2]
        places = torch.stack([grown(face.box, grow) for face in largest])
        persons = laid_out(wanted, places, (height, width), feather, overlap)
        for number, face in enumerate(sorted(largest, key=lambda face: float(face.box[0] + face.box[2])), 1):
            picture = draw.mark(picture, face, str(number), draw.CHOSEN)
        return io.NodeOutput(chained(people, *persons), picture[None])


def grown(box: Tensor, by: float) -> Tensor:
    """A box [4] made larger about its middle."""
    middle, half = (box[:2] + box[2:]) / 2, (box[2:] - box[:2]) / 2 * by
    return torch.cat((middle - half, middle + half))


class PreviewPeople(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LikenessPreviewPeople",
            display_name="Preview People",
            category="likeness/people",
            description="Shows who owns which part of the picture: first at its own size, then as layers of 8, 16, 32 "
            "and 64 pixels a cell see it. Dark is nobody's, white several people's.",
            search_aliases=["regional", "mask", "several people"],
            inputs=[
                types.People.Input("people", tooltip="From Person, People from Boxes or People from Photo."),
                io.Int.Input("width", default=512, tooltip="Width of the picture in pixels, 64 to 16384.", **SIZE),
                io.Int.Input("height", default=512, tooltip="Height of the picture in pixels, 64 to 16384.", **SIZE),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="A map for the picture and for each size of layer."),
                io.String.Output(display_name="report", tooltip="Who is who, and what is off about a mask."),
            ],
        )

    @classmethod
    def execute(cls, people: People, width: int, height: int) -> io.NodeOutput:
        masks = [person.mask for person in people]
        sizes = [(height, width), *((-(-height // cell), -(-width // cell)) for cell in CELLS)]
        maps = [draw.ownership([None if m is None else _cells(m, h, w, i > 0) for m in masks], h, w)
                for i, (h, w) in enumerate(sizes)]  # fmt: skip
        shown = [draw.enlarged(one, height, width) for one in maps]
        return io.NodeOutput(torch.stack(shown), "\n".join(_report(people, sizes, width / height)))


def _cells(mask: Tensor, height: int, width: int, layer: bool) -> Tensor:
    """A region as a layer knows it, or smooth as it was drawn: [height, width], of the first picture."""
    made = regions.inside(mask, height, width).float() if layer else regions.cover(mask, height, width)
    return made[0].view(height, width)


def _report(people: People, sizes: Sequence[tuple[int, int]], aspect: float) -> list[str]:
    lines = []
    for number, person in enumerate(people, 1):
        mask, name = person.mask, f"{person.identity.name}, {draw.colour(number - 1)}"
        if mask is None:
            lines.append(f"{number}: {name}, strength {person.strength:g}, everywhere")
            continue
        share = 100 * float(mask.mean())
        lines.append(f"{number}: {name}, strength {person.strength:g}, {share:.1f} % of the picture")
        off = (mask.shape[2] / mask.shape[1]) / aspect
        if max(off, 1 / off) > regions.ASPECT:
            lines.append(f"   the mask is {mask.shape[2]}x{mask.shape[1]} and is stretched over the picture")
        small = [f"{w}x{h}" for h, w in sizes[1:] if regions.vanishes(mask, h, w)]
        if small:
            lines.append(f"   too small for half a cell at {', '.join(small)}; the cells covered most count there")
    return lines


class PromptsOfPeople(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LikenessPromptsOfPeople",
            display_name="Prompts of People",
            category="likeness/people",
            description="Adds to a prompt what is said of each person alone, each where the person's mask is.",
            search_aliases=["regional prompt"],
            inputs=[
                io.Conditioning.Input("conditioning", tooltip="The prompt of the whole picture."),
                types.People.Input("people", tooltip="People, some with a prompt of their own (Person)."),
                io.Float.Input(
                    "strength", default=1.0, min=0.0, max=10.0, step=0.05,
                    tooltip="How much a person's prompt counts against the whole picture's, 0 to 10; 0 not at all.",
                ),
            ],
            outputs=[io.Conditioning.Output(display_name="conditioning")],
        )  # fmt: skip

    @classmethod
    def execute(cls, conditioning: list[Any], people: People, strength: float) -> io.NodeOutput:
        own = [_masked(text, rest, person.mask, strength) for person in people for text, rest in person.prompt or ()]
        return io.NodeOutput([*conditioning, *own] if strength else conditioning)


def _masked(text: Tensor, rest: dict[str, Any], mask: Tensor | None, strength: float) -> list[Any]:
    """A prompt as the host confines it to a mask."""
    where = {"strength": strength} if mask is None else {"mask": mask, "mask_strength": strength}
    return [text, {**rest, **where, "set_area_to_bounds": False}]


NODES = [MakePerson, PeopleFromBoxes, PeopleFromPhoto, PreviewPeople, PromptsOfPeople]
