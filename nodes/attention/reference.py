"""Apply Identity (Reference): FlashFace, and reference attention without training."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io, ui
from torch import Tensor

from ...likeness import flashface as math
from ...likeness import reference_faces
from ...likeness.identity import parse_weights
from ...likeness.spec import Identity, People, Person
from .. import types
from .added import HEARD, Added
from .injection import ALWAYS, ATTENDED, OUTPUT, Bank, Branch, Call, Place, Term, Window, window_inputs
from .patch import attach, host_attention, injections, inputs
from .position import positioned
from .regional import cover
from .streams import digest, latents, remembered, weights
from .unet import Site, sites

SIDES = ("middle", "output")  # encoder blocks see no reference (Sec. 3.2)
Linear = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Layer:
    """The attention that reads the references, and whether it is an added one or the UNet's own."""

    q: Linear
    k: Linear
    v: Linear
    o: Linear
    added: bool


@dataclass(frozen=True, eq=False)
class Shown:
    """One person's faces as the reference net reads them: latents [n, 4, h, w], and which are shown in what order.

    `share` is the person's part of the strength, `mask` the region [B, H, W], or None for everywhere.
    """

    latents: Tensor
    order: tuple[int, ...]
    share: float
    mask: Tensor | None
    digest: str


@dataclass
class Step:
    """Where a run is: the noise seen last, how many were seen, at which the references were read, and what came out."""

    seen: float | None = None
    count: int = 0
    read_at: tuple[float, Tensor] | None = None
    key: tuple[Any, ...] | None = None
    pairs: dict[Place, list[math.Pair]] = field(default_factory=dict)

    def time(self, sigma: float, timesteps: Tensor, refresh: int) -> tuple[float, Tensor]:
        """The noise and the time [1] at which the references are read in this step."""
        if self.read_at is None or (sigma != self.seen and self.count % refresh == 0):
            self.read_at = sigma, timesteps[:1]
        self.count += sigma != self.seen
        self.seen = sigma
        return self.read_at


@dataclass(frozen=True, eq=False)
class Reference(Term):
    """Faces bound to a reference net (injection.Term).

    `name` is the role of its guidance's rows, `read_by` the model whose weights read the faces, `separate` whether that
    is another than the picture's. With `unfold`, each row of a chunk sees faces of its own at its own time: the next of
    the latents, as many for every row.
    """

    net: types.LoadedReferenceNet
    layers: Mapping[Place, Layer]
    people: Sequence[Shown]
    strength: float
    before: float
    on: Window
    launch: Window
    guided: bool
    refresh: int
    text: Tensor | None
    read_by: ModelPatcher
    separate: bool
    name: str
    unfold: bool = False
    window: Window = ALWAYS
    bank: Bank = field(default_factory=Bank)

    @property
    def patchers(self) -> list[ModelPatcher]:
        return [self.net.patcher] if self.separate else []  # the host loads a model once

    @property
    def stepwise(self) -> bool:
        return True

    @property
    def places(self) -> list[Place]:
        return list(self.layers)

    def strengths(self, call: Call) -> tuple[float, ...]:
        """The strength of each chunk of rows."""
        assert call.sigma is not None  # being stepwise
        if not self.on.inside(call.sigma):
            return (0.0,) * len(call.roles)
        if not self.launch.inside(call.sigma):
            return (self.before,) * len(call.roles)
        return tuple(self.strength if not self.guided or role == self.name else 0.0 for role in call.roles)

    def prepare(self, call: Call) -> Mapping[Place, Any]:
        rows = [
            (slice(i * call.rows, (i + 1) * call.rows), strength)
            for i, strength in enumerate(self.strengths(call))
            if strength
        ]
        if not rows:
            return {}
        pairs = self._keys_values(call)
        return {place: (layer, rows, pairs[place], call) for place, layer in self.layers.items()}

    def _keys_values(self, call: Call) -> Mapping[Place, list[math.Pair]]:
        """Keys and values of the references [1, T, C] for every person, projected once per step."""
        text = self.text if self.text is not None else call.text
        if text is None:
            raise ValueError(
                "got a guider without a negative prompt, whose text the reference net reads; expected one; "
                "use KSampler or CFGGuider, or connect reference_text"
            )
        # Where each row sees its own, nothing is kept, and no name waits for the device.
        words = "" if self.unfold else self.bank.get(("text", id(text)), lambda: (digest(text), text))[0]
        step: Step = self.bank.get("step", Step)
        sigma, time = step.time(call.sigma or 0.0, call.timesteps, self.refresh)
        key = (weights(self.read_by), sigma, words, call.dtype, call.device)
        if step.key != key:
            step.pairs = {place: [] for place in self.layers}
            for person in self.people:
                seen = remembered(
                    self.net.bank, (*key[:-1], person.digest), call, lambda p=person: self._read(p, time, text, call)
                )
                for place, layer in self.layers.items():
                    k, v = (self._in_rows(part(seen[place]), person, call) for part in (layer.k, layer.v))
                    step.pairs[place].append((k, v))
            step.key = key
        return step.pairs

    def _in_rows(self, faces: Tensor, person: Shown, call: Call) -> Tensor:
        """The tokens of all faces [n, L, C] as every row sees them [1, T, C], or as each does [rows, T, C]."""
        return faces.unflatten(0, (call.rows, -1)).flatten(1, 2) if self.unfold else in_a_row(faces, person.order)

    def _read(self, person: Shown, time: Tensor, text: Tensor, call: Call) -> dict[Place, Tensor]:
        """One pass of the reference net over a person's faces: clean, at the picture's time, with the negative text."""
        model = self.net.patcher.model
        dtype = (model.manual_cast_dtype or model.get_dtype()) if self.separate else call.dtype
        x = person.latents.to(call.device, dtype)
        if self.unfold:
            time = call.timesteps[: call.rows].repeat_interleave(len(x) // call.rows)
        context = text[:1].to(call.device, dtype).expand(len(x), -1, -1)
        seen = inputs(model.diffusion_model, x, time.expand(len(x)), context, self.places)
        return {place: tensor.to(call.dtype) for place, tensor in seen.items()}

    def term(self, state: Any, q: Tensor, options: dict[str, Any]) -> Tensor:
        layer, rows, pairs, call = state
        heard = options[HEARD] if layer.added else math.Heard(layer.q(q), layer.k(q), layer.v(q), options[ATTENDED])
        out = torch.zeros_like(heard.own)
        for person, pair in zip(self.people, pairs, strict=True):
            where = cover(self.bank, person.mask, call, options)
            for some, strength in rows:
                here = where[some] if isinstance(where, Tensor) and len(where) > 1 else where
                more = math.difference(heard, some, pair, attend(options), layer.o)
                out[some] += strength * person.share * here * more
        return out


def in_a_row(faces: Tensor, order: Sequence[int]) -> Tensor:
    """The tokens of n faces [n, L, C] as one row [1, len(order) * L, C]."""
    return torch.cat([faces[i] for i in order])[None]


def attend(options: dict[str, Any]) -> math.Attend:
    return lambda q, k, v: host_attention(q, k, v, options)


def readers(model: ModelPatcher, net: types.LoadedReferenceNet) -> dict[Place, Layer]:
    """The attentions of a model that read what a reference net sees. Raises ValueError where the two do not fit."""
    unet = model.model.diffusion_model
    found = {Place(OUTPUT, site.block, site.depth, site.deep): site for site in sites(unet) if site.block[0] in SIDES}
    if net.added is None:
        theirs = net.patcher.model.diffusion_model
        if _layout(sites(theirs)) != _layout(sites(unet)) or theirs.num_classes is not None or theirs.in_channels != 4:
            raise ValueError(
                "got a reference net of another kind than the model; expected two plain SD1.5 models; connect these"
            )
        own = {place: unet.get_submodule(f"{site.key}.attn1") for place, site in found.items()}
        return {place: Layer(a.to_q, a.to_k, a.to_v, a.to_out, False) for place, a in own.items()}
    added = next((i for i in injections(model) if isinstance(i, Added) and i.patcher is net.added), None)
    if added is None:
        raise ValueError(
            f"got a model without the layers that read this reference net ({net.file}); expected the model of the same "
            "Load FlashFace; connect it, with LoRAs and other patches in between as you like"
        )
    return {place: Layer(f.q, f.k, f.v, f.o, True) for place, f in added.layers.items()}


def _layout(found: Sequence[Site]) -> list[tuple[Any, ...]]:
    return [(site.block, site.depth, site.hidden, site.context) for site in found]


def shown(model: ModelPatcher, vae: Any, person: Person, least: int, side: int) -> tuple[Shown, Tensor]:
    """A person's faces for the reference net, and the pictures [n, side, side, 3] that they were made of."""
    pictures = reference_faces.references(person.identity, side).float() / 255
    made = latents(model, vae, pictures)
    order = tuple(math.repeats(len(made), least))
    return Shown(made, order, person.strength, person.mask, digest(made)), pictures


def mixed(given: Identity | People, others: Sequence[Identity], numbers: str) -> list[Person]:
    """Whom the references show: identities in these parts of the strength, or people, each at its own strength."""
    if not isinstance(given, Identity):
        if others:
            raise ValueError(
                f"got people and {len(others)} further identities; expected one of the two; chain all of them by "
                "Person, or connect identities alone"
            )
        return [person for person in given if person.strength]
    identities = [given, *others]
    parts = parse_weights(numbers, len(identities))
    return [Person(who, None, n / sum(parts)) for who, n in zip(identities, parts, strict=True) if n]


def launch_window(model: ModelPatcher, launch: int) -> Window:
    """From this timestep on; between two the nearer counts, as the authors round."""
    sampling: Any = model.get_model_object("model_sampling")
    if launch >= math.TRAINED_STEPS - 1:
        return ALWAYS
    return Window(float(sampling.sigma(torch.tensor(launch + 0.5))), -1.0)


class ApplyReference(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        person = types.Identity.Input("identity", tooltip="A further person, to be mixed with the others.")
        return io.Schema(
            node_id="LikenessApplyReference",
            display_name="Apply Identity (Reference)",
            category="likeness/apply",
            description="Lets a model look at the faces themselves while it paints: FlashFace, or reference only. "
            "Needs an identity with face crops. Strength 0 or an empty schedule leaves the face position alone.",
            search_aliases=["flashface", "reference only", "apply"],
            inputs=[
                io.Model.Input("model", tooltip="From Load FlashFace; any SD1.5 model with Model as Reference Net."),
                types.ReferenceNet.Input("reference_net", tooltip="From Load FlashFace or Model as Reference Net."),
                types.who_input("With crops; several photos by Merge (concatenate)."),
                io.Vae.Input("vae", tooltip="The VAE of an SD1.5 checkpoint; it encodes the faces once."),
                io.Float.Input(
                    "strength", default=1.2, min=0.0, max=3.0, step=0.05,
                    tooltip="How much the reference attention counts (lambda_feat), 0 to 3: 0 none, 1 as trained. "
                    "0.9 leaves the prompt room to change age or gender.",
                ),
                io.Float.Input(
                    "reference_guidance", default=3.2, min=0.0, max=10.0, step=0.1,
                    tooltip="How far the picture is pushed to the references beyond the prompt (lambda_ref), 0 to 10. "
                    "It costs a third row; 0 needs none, and shows the references to both prompts.",
                ),
                *window_inputs(),
                io.Mask.Input(
                    "face_position", optional=True,
                    tooltip="Where the face shall be: white on a mask of the picture's shape. Without it, anywhere.",
                ),
                io.Int.Input(
                    "launch", default=750, min=0, max=1000, optional=True, advanced=True,
                    tooltip="Timestep, 1000 (noise) to 0 (picture), from which reference guidance runs.",
                ),
                io.Float.Input(
                    "strength_before", default=0.85, min=0.0, max=3.0, step=0.05, optional=True, advanced=True,
                    tooltip="Strength before launch, 0 to 3, on both prompts.",
                ),
                io.Float.Input(
                    "rescale", default=0.5, min=0.0, max=1.0, step=0.05, optional=True, advanced=True,
                    tooltip="How much of the contrast that guidance adds is taken back, 0 to 1.",
                ),
                io.Int.Input(
                    "show_at_least", default=math.REFERENCES, min=1, max=16, optional=True, advanced=True,
                    tooltip="Fewer faces are shown again until there are so many; more faces weigh more. 4 as in the "
                    "authors' demo, 1: each face once.",
                ),
                io.Int.Input(
                    "refresh", default=1, min=1, max=50, optional=True, advanced=True,
                    tooltip="Read the faces anew every so many steps; 1 is exact, more is faster.",
                ),
                io.Conditioning.Input(
                    "reference_text", optional=True,
                    tooltip="Text that the reference net reads; without it, the negative prompt.",
                ),
                io.Autogrow.Input(
                    "others", optional=True,
                    template=io.Autogrow.TemplatePrefix(person, prefix="identity_", min=0, max=8),
                    tooltip="Further people, mixed with the first.",
                ),
                io.String.Input(
                    "weights", default="", optional=True,
                    tooltip="One number per person when there are others, parted by commas: 0.7, 0.3. Only their ratio "
                    "counts. Empty: equal.",
                ),
                io.String.Input(
                    "face_box", default="", optional=True, advanced=True,
                    tooltip="Instead of a mask: left, top, right, bottom of the face in parts of the picture, 0 to 1, "
                    "as 0.3, 0.1, 0.6, 0.4. The square of its longer side counts.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model")],
        )  # fmt: skip

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        reference_net: types.LoadedReferenceNet,
        identity: Identity | People,
        vae: Any,
        strength: float,
        reference_guidance: float,
        start_percent: float,
        end_percent: float,
        face_position: Tensor | None = None,
        launch: int = 750,
        strength_before: float = 0.85,
        rescale: float = 0.5,
        show_at_least: int = math.REFERENCES,
        refresh: int = 1,
        reference_text: list[Any] | None = None,
        others: io.Autogrow.Type | None = None,
        weights: str = "",
        face_box: str = "",
    ) -> io.NodeOutput:
        layers = readers(model, reference_net)
        people = mixed(identity, list((others or {}).values()), weights)
        faces = [shown(model, vae, person, show_at_least, reference_net.spec.face_size) for person in people]
        if not faces:
            return io.NodeOutput(positioned(model, face_position, face_box))
        preview = ui.PreviewImage(torch.cat([pictures for _, pictures in faces]), cls=cls)
        model = positioned(model, face_position, face_box)
        if not strength or start_percent >= end_percent:
            return io.NodeOutput(model, ui=preview)
        net, own = reference_net.patcher, reference_net.patcher.is_clone(model)
        on, launched = Window.of(model, start_percent, end_percent), launch_window(model, launch)
        name = f"reference {uuid.uuid4().hex}"
        injection = Reference(
            net=reference_net,
            layers=layers,
            people=[person for person, _ in faces],
            strength=strength,
            before=strength_before,
            on=on,
            launch=launched,
            guided=bool(reference_guidance),
            refresh=refresh,
            text=reference_text[0][0] if reference_text else None,
            read_by=model if own else net,
            separate=not own,
            name=name,
        )
        branch = Branch(name, reference_guidance, rescale, on, launched)
        return io.NodeOutput(attach(model, injection, branch), ui=preview)


NODES = [ApplyReference]
