"""Stand-ins for weights that cannot be shipped: real layouts and names, natively recognised, small, made from seeds.

`python -m tools.standins BASE [NAME ...]` writes them below BASE/models. What they consist of, standin_models.py says.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import standin_faces, standin_flux, standin_omni_id
from . import standin_models as models

RECIPE = 3  # raise it when what is written here changes


def nested(flat: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The groups of an adapter's `.bin` file."""
    out: dict[str, dict[str, Tensor]] = {}
    for key, value in flat.items():
        group, rest = key.split(".", 1)
        out.setdefault(group, {})[rest] = value
    return out


Make = Callable[[], dict[str, Tensor]]

ADAPTERS = {
    "ip-adapter_sd15.safetensors": "ip-adapter_sd15",
    "ip-adapter_sd15_vit-G.safetensors": "ip-adapter_sd15_vit-G",
    "ip-adapter-plus_sd15.safetensors": "ip-adapter-plus_sd15",
    "ip-adapter-plus-face_sd15.safetensors": "ip-adapter-plus_sd15",
    "ip-adapter-full-face_sd15.safetensors": "ip-adapter-full-face_sd15",
    "ip-adapter_sdxl.safetensors": "ip-adapter_sdxl",
    "ip-adapter_sdxl_vit-h.safetensors": "ip-adapter_sdxl_vit-h",
    "ip-adapter-plus_sdxl_vit-h.safetensors": "ip-adapter-plus_sdxl_vit-h",
    "ip-adapter-faceid_sd15.bin": "ip-adapter-faceid_sd15",
    "ip-adapter-faceid_sdxl.bin": "ip-adapter-faceid_sdxl",
    "ip-adapter-faceid-plus_sd15.bin": "ip-adapter-faceid-plus_sd15",
    "ip-adapter-faceid-plusv2_sd15.bin": "ip-adapter-faceid-plus_sd15",
    "ip-adapter-faceid-plusv2_sdxl.bin": "ip-adapter-faceid-plusv2_sdxl",
    "ip-adapter-faceid-portrait_sd15.bin": "ip-adapter-faceid-portrait_sd15",
    "ip-adapter-faceid-portrait_sdxl.bin": "ip-adapter-faceid-portrait_sdxl",
    "ip-adapter-faceid-portrait_sdxl_unnorm.bin": "ip-adapter-faceid-portrait_sdxl_unnorm",
}

# The name by which a workflow names the file -> its folder below models, and what makes it
WEIGHTS: dict[str, tuple[str, Make]] = {
    "v1-5-pruned-emaonly-fp16.safetensors": ("checkpoints", models.checkpoint_sd15),
    "sd_xl_base_1.0.safetensors": ("checkpoints", models.checkpoint_sdxl),
    "instantid/diffusion_pytorch_model.safetensors": ("controlnet", partial(models.controlnet, models.SDXL)),
    "control_v11f1p_sd15_depth_fp16.safetensors": ("controlnet", partial(models.controlnet, models.SD15)),
    "flux1-dev.safetensors": ("diffusion_models", models.flux),
    "clip_l.safetensors": ("text_encoders", partial(models.clip_text, "sd1_clip_config.json", "", torch.float16)),
    # The choice alone: what reads it, stand-ins do without (demo.INSTEAD).
    "t5xxl_fp8_e4m3fn.safetensors": ("text_encoders", lambda: {"shared.weight": torch.zeros(1)}),
    "flux_landmarks.safetensors": ("controlnet", models.controlnet_flux),
    "ae.safetensors": ("vae", partial(models.taesd, 0.3611, 0.1159, 16, "")),
    "CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors": ("clip_vision", models.clip_vision),
    "clip-vit-large-patch14.safetensors": ("clip_vision", partial(models.clip_vision, "clip_vision_config_vitl.json")),
    "siglip-so400m-patch14-384.safetensors": (
        "clip_vision",
        partial(models.clip_vision, "clip_vision_siglip_384.json"),
    ),
    "xlabs_flux_ip_adapter_v2.safetensors": ("ipadapter", partial(models.for_flux, "xlabs_flux_ip_adapter_v2")),
    "instantx_flux_ip_adapter.bin": ("ipadapter", partial(models.for_flux, "instantx_flux_ip_adapter", 256)),
    "omni_id_flux.safetensors": ("likeness", lambda: models.fill(standin_flux.omni_id())),
    "omni_id_sd15.safetensors": ("likeness", lambda: models.fill(standin_flux.omni_id_sd15(models.WIDTH))),
    "EVA02_CLIP_L_336_psz14_s6B.pt": ("clip_vision", models.eva_clip),
    "pulid_v1.1.safetensors": ("pulid", partial(models.adapter, "pulid_v1.1")),
    "pulid_flux_v0.9.1.safetensors": ("pulid", partial(models.for_flux, "pulid_flux_v0.9.x")),
    "ip-adapter.bin": ("instantid", partial(models.adapter, "instantid_ip-adapter")),
    "infinite_id_sdxl.safetensors": ("likeness", partial(models.infinite_id, models.SDXL, 70)),
    "omni_id_vit_h.safetensors": ("likeness", models.omni_id),
    "adaface_sd15.safetensors": ("likeness", models.adaface),
    "arc2face_encoder.bin": ("likeness", partial(models.clip_text, "sd1_clip_config.json", "", torch.float16)),
    "flashface.ckpt": ("likeness", partial(models.flashface, 5)),
    "flashface_inpainting.ckpt": ("likeness", partial(models.flashface, 9)),
    **{file: ("ipadapter", partial(models.adapter, layout)) for file, layout in ADAPTERS.items()},
}

# What a file of the pack's own says of itself, as likeness/own_file.py has it
TOLD = {
    "infinite_id_sdxl.safetensors": {
        "kind": "infinite_id", "version": 1, "base": "SDXL", "unconditional": "zero", "notes": {"trained": "no"},
    },
    "omni_id_vit_h.safetensors": standin_omni_id.TOLD,
    "adaface_sd15.safetensors": {
        "kind": "adaface", "version": 1, "base": "SD1.5", "towers": {"l": 768}, "heads": 12, "notes": {"trained": "no"},
    },
    **{
        f"omni_id_{file}.safetensors": {
            "kind": "omni_id_adapter", "version": 1, "base": base, "tokens": standin_flux.OMNI_TOKENS,
            "unconditional": "none", "notes": {"trained": "no"},
        }
        for file, base in (("flux", "FLUX.1"), ("sd15", "SD1.5"))
    },
}  # fmt: skip

# Model pack -> file -> what writes it
PACKS: dict[str, dict[str, Callable[[Path], None]]] = {
    "buffalo_l": {
        "det_10g.onnx": standin_faces.detector,
        "w600k_r50.onnx": partial(standin_faces.recogniser, seed=1),
    },
    "antelopev2": {
        "scrfd_10g_bnkps.onnx": standin_faces.detector,
        "glintr100.onnx": partial(standin_faces.recogniser, seed=2),
    },
}


def make(base: Path, names: Iterable[str] | None = None) -> dict[str, Path]:
    """Write the stand-ins with these names that are not there yet, and the face packs; all of them where None.

    Names that are no stand-in's are left out. Gives the files by name.
    """
    wanted = [name for name in (WEIGHTS if names is None else names) if name in WEIGHTS]
    folder = base / "models"
    done = {name: folder / WEIGHTS[name][0] / name for name in wanted}
    for name, path in done.items():
        write(path, partial(_save, WEIGHTS[name][1], TOLD.get(name)))
    for pack, files in PACKS.items():
        for file, maker in files.items():
            done[f"{pack}/{file}"] = path = folder / "insightface" / "models" / pack / file
            write(path, maker)
    return done


def write(path: Path, save: Callable[[Path], None]) -> None:
    """Have a file written whole or not at all, once per recipe."""
    stamp = path.with_name(f".{path.name}.recipe")
    if path.is_file() and stamp.is_file() and stamp.read_text() == str(RECIPE):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".part.{path.name}")
    save(part)
    os.replace(part, path)
    stamp.write_text(str(RECIPE))


def _save(make: Make, told: dict[str, Any] | None, path: Path) -> None:
    from safetensors.torch import save_file

    models.bring_host()
    tensors = {key: value.contiguous() for key, value in make().items()}
    if path.suffix == ".safetensors":
        save_file(tensors, path, None if told is None else {"likeness": json.dumps(told)})
    else:
        torch.save(nested(tensors) if any(key.startswith("image_proj.") for key in tensors) else tensors, path)


if __name__ == "__main__":
    for name, path in make(Path(sys.argv[1]), sys.argv[2:] or None).items():
        print(f"{name}: {path} ({path.stat().st_size / 2**20:.0f} MiB)")
