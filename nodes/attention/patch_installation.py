"""Puts the patches of injections into a model's options, around the patches of other packs that stand there.

ComfyUI has one patch per attention or FLUX block, and lists of patches before and behind an attention. A node that
follows an Apply node may replace the former, and add to the latter a patch that re-orders the tokens and one that
undoes it. Therefore the patches are put in by the Apply node and again in each model call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from .flux_terms import (
    FLUX_BLOCK_QUERIES,
    FLUX_BLOCK_STREAM,
    FLUX_IMAGE_ATTENTION,
    FLUX_JOINT_ATTENTION,
    FluxAttentionPatch,
    FluxBlockPatch,
    keep_queries,
)
from .injection import ATTN1_OUTPUT, Injection, PatchPlace
from .slots import AttentionBackend, AttentionSlot, Attn1OutputPatch, keep_attention_input

Options = dict[str, Any]
PatchKey = tuple[str | int, ...]

# Names of places -> the patch that keeps the attention's input, and the patch behind the attention that adds the terms.
INPUT_PATCHES: Mapping[str, Callable[..., Any]] = {
    ATTN1_OUTPUT: keep_attention_input,
    FLUX_IMAGE_ATTENTION: keep_queries,
    FLUX_JOINT_ATTENTION: keep_queries,
    FLUX_BLOCK_QUERIES: keep_queries,
}
OUTPUT_PATCHES: Mapping[str, type[Attn1OutputPatch | FluxAttentionPatch]] = {
    ATTN1_OUTPUT: Attn1OutputPatch,
    FLUX_IMAGE_ATTENTION: FluxAttentionPatch,
    FLUX_JOINT_ATTENTION: FluxAttentionPatch,
}
BLOCK_PLACES = (FLUX_BLOCK_QUERIES, FLUX_BLOCK_STREAM)


@dataclass(frozen=True, eq=False)
class PatchInstaller:
    """The patches of a model's injections."""

    injections: tuple[Injection, ...]
    backend: AttentionBackend
    get_block_options: Callable[[Options], Options]  # see FluxBlockPatch

    def install(self, options: Options) -> None:
        """Put the patches into the options. Dictionaries and lists in there are replaced, not changed."""
        replacements: dict[str, Mapping[PatchKey, Any]] = dict(options.get("patches_replace", {}))
        for name, key, patch in list(self._make_replacements(replacements)):
            replacements[name] = {**replacements.get(name, {}), key: patch}
        lists = options.get("patches", {})
        before, behind = (self._remove_own(lists.get(name, ())) for name in ("attn1_patch", "attn1_output_patch"))
        own_before, own_behind = self._list_patches
        options["patches_replace"] = replacements
        if own_before or own_behind:
            # They get the input before others change it, and the output when those have undone their changes.
            options["patches"] = {
                **lists, "attn1_patch": [*own_before, *before], "attn1_output_patch": [*behind, *own_behind]
            }  # fmt: skip

    @cached_property
    def _places(self) -> Mapping[PatchPlace, tuple[Injection, ...]]:
        """The injections at each place."""
        places = dict.fromkeys(place for injection in self.injections for place in injection.places)
        return {place: self._select(lambda other, place=place: other == place) for place in places}

    @cached_property
    def _blocks(self) -> Mapping[tuple[str, int], tuple[Injection, ...]]:
        """The injections of each FLUX block."""
        blocks = dict.fromkeys(place.block for place in self._places if place.name in BLOCK_PLACES)
        return {
            block: self._select(lambda place, block=block: place.name in BLOCK_PLACES and place.block == block)
            for block in blocks
        }

    @cached_property
    def _list_patches(self) -> tuple[list[Any], list[Any]]:
        """The patches before and behind the attentions."""
        names = dict.fromkeys(place.name for place in self._places)
        before = dict.fromkeys(INPUT_PATCHES[name] for name in names if name in INPUT_PATCHES)
        behind = dict.fromkeys(OUTPUT_PATCHES[name] for name in names if name in OUTPUT_PATCHES)
        return list(before), [
            patch_class(
                self._select(lambda place, patch_class=patch_class: OUTPUT_PATCHES.get(place.name) is patch_class)
            )
            for patch_class in behind
        ]

    def _select(self, matches: Callable[[PatchPlace], bool]) -> tuple[Injection, ...]:
        """The injections with a place that matches."""
        return tuple(injection for injection in self.injections if any(map(matches, injection.places)))

    @staticmethod
    def _remove_own(patches: Sequence[Any]) -> list[Any]:
        own = (*INPUT_PATCHES.values(), Attn1OutputPatch, FluxAttentionPatch)
        return [patch for patch in patches if not any(patch is one or type(patch) is one for one in own)]

    def _make_replacements(
        self, standing: Mapping[str, Mapping[PatchKey, Any]]
    ) -> Iterator[tuple[str, PatchKey, AttentionSlot | FluxBlockPatch]]:
        """The patches that do not stand where they should: name, key and patch."""
        for place, injections in self._places.items():
            if place.name in ("attn1", "attn2"):
                yield from self._make_slot(place, injections, standing.get(place.name, {}))
        for (kind, index), injections in self._blocks.items():
            key = f"{kind}_block", index
            found = standing.get("dit", {}).get(key)
            own = found if isinstance(found, FluxBlockPatch) else None
            replaced = found if own is None else own.replaced
            if own is None or own.injections != injections:
                yield "dit", key, FluxBlockPatch((kind, index), self.get_block_options, replaced, injections)

    def _make_slot(
        self, place: PatchPlace, injections: tuple[Injection, ...], standing: Mapping[PatchKey, Any]
    ) -> Iterator[tuple[str, PatchKey, AttentionSlot]]:
        exact_key = (*place.block, place.depth)  # ComfyUI looks for it first
        key = exact_key if exact_key in standing else place.patch_key
        found = standing.get(key)
        own = found if isinstance(found, AttentionSlot) else None
        replaced = found if own is None else own.replaced
        block_patch = None if key == place.block else standing.get(place.block)
        if own is None or own.block_patch is not block_patch or own.injections != injections:
            yield place.name, key, AttentionSlot(place, self.backend, replaced, injections, block_patch)
