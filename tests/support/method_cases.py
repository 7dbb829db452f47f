"""One model per method, with the method's Apply node on it, for tests that every method must pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from comfy.model_patcher import ModelPatcher

from support.flashface_models import apply_flashface, load_flashface, make_face_latents
from support.fused_kv import apply_fused_kv, make_fused_kv_adapter
from support.host_models import make_small_model
from support.infinite_id_adapters import apply_infinite_id
from support.ip_adapters import apply_ip_adapter, make_ip_adapter

APPLY_BY_METHOD: dict[str, Callable[..., ModelPatcher]] = {
    "decoupled": apply_ip_adapter,
    "pulid": lambda base, **changes: apply_ip_adapter(base, make_ip_adapter("pulid"), **changes),
    "fused": apply_fused_kv,
    "fused, matching noise": lambda base, **changes: apply_fused_kv(
        base, make_fused_kv_adapter(stream_noise="match"), **changes
    ),
    "mixed, own stream": lambda base, **changes: apply_infinite_id(base, **{"style": "AdaIN", **changes}),
    "mixed, shared stream": lambda base, **changes: apply_infinite_id(base, text_stream="shared", **changes),
}


@dataclass(frozen=True, eq=False)
class MethodCase:
    """`base` is the model that the Apply node gets; `apply_to` is the node with the method's other inputs."""

    base: ModelPatcher
    apply_to: Callable[..., ModelPatcher]

    def apply(self, **changes: Any) -> ModelPatcher:
        return self.apply_to(self.base, **changes)


@lru_cache
def make_method_case(method: str) -> MethodCase:
    if method != "reference":
        return MethodCase(make_small_model(), APPLY_BY_METHOD[method])
    base, net = load_flashface()

    def apply_to(model: ModelPatcher, **changes: Any) -> ModelPatcher:
        return apply_flashface(model, net, changes.pop("face_latents", make_face_latents()), **changes)

    return MethodCase(base, apply_to)


METHODS = [*APPLY_BY_METHOD, "reference"]
