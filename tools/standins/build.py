"""`python -m tools.standins.build BASE [NAME ...]`: writes stand-in models to BASE/models.

Stand-ins replace weights that cannot be shipped. They have the published names and layouts, so that loaders recognize
them, but few channels and random weights from seeds. models.py makes their tensors.
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

from . import face_networks, flux_models, models, omni_id_encoder

RECIPE_VERSION = 3  # increase it when the content of any file changes


def nest_tensors(flat: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The nested dictionaries of an adapter's `.bin` file, from dotted keys."""
    out: dict[str, dict[str, Tensor]] = {}
    for key, value in flat.items():
        group, rest = key.split(".", 1)
        out.setdefault(group, {})[rest] = value
    return out


MakeTensors = Callable[[], dict[str, Tensor]]

ADAPTER_LAYOUTS = {
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

# file name in workflows -> folder in models/, function that makes the tensors
STANDIN_FILES: dict[str, tuple[str, MakeTensors]] = {
    "v1-5-pruned-emaonly-fp16.safetensors": ("checkpoints", models.make_sd15_checkpoint),
    "sd_xl_base_1.0.safetensors": ("checkpoints", models.make_sdxl_checkpoint),
    "instantid/diffusion_pytorch_model.safetensors": (
        "controlnet",
        partial(models.make_controlnet, models.SDXL_CONFIG),
    ),
    "control_v11f1p_sd15_depth_fp16.safetensors": ("controlnet", partial(models.make_controlnet, models.SD15_CONFIG)),
    "flux1-dev.safetensors": ("diffusion_models", models.make_flux),
    "clip_l.safetensors": ("text_encoders", partial(models.make_clip_text, "sd1_clip_config.json", "", torch.float16)),
    # Only to be a valid choice: demo.NODE_REPLACEMENTS replaces the node that loads it.
    "t5xxl_fp8_e4m3fn.safetensors": ("text_encoders", lambda: {"shared.weight": torch.zeros(1)}),
    "flux_landmarks.safetensors": ("controlnet", models.make_flux_controlnet),
    "ae.safetensors": ("vae", partial(models.make_taesd, 0.3611, 0.1159, 16, "")),
    "CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors": ("clip_vision", models.make_clip_vision),
    "clip-vit-large-patch14.safetensors": (
        "clip_vision",
        partial(models.make_clip_vision, "clip_vision_config_vitl.json"),
    ),
    "siglip-so400m-patch14-384.safetensors": (
        "clip_vision",
        partial(models.make_clip_vision, "clip_vision_siglip_384.json"),
    ),
    "xlabs_flux_ip_adapter_v2.safetensors": (
        "ipadapter",
        partial(models.make_flux_adapter, "xlabs_flux_ip_adapter_v2"),
    ),
    "instantx_flux_ip_adapter.bin": ("ipadapter", partial(models.make_flux_adapter, "instantx_flux_ip_adapter", 256)),
    "omni_id_flux.safetensors": ("likeness", lambda: models.fill_shapes(flux_models.get_omni_id_flux_shapes())),
    "omni_id_sd15.safetensors": (
        "likeness",
        lambda: models.fill_shapes(flux_models.get_omni_id_sd15_shapes(models.MODEL_CHANNELS)),
    ),
    "EVA02_CLIP_L_336_psz14_s6B.pt": ("clip_vision", models.make_eva_clip),
    "pulid_v1.1.safetensors": ("pulid", partial(models.make_adapter, "pulid_v1.1")),
    "pulid_flux_v0.9.1.safetensors": ("pulid", partial(models.make_flux_adapter, "pulid_flux_v0.9.x")),
    "ip-adapter.bin": ("instantid", partial(models.make_adapter, "instantid_ip-adapter")),
    "infinite_id_sdxl.safetensors": ("likeness", partial(models.make_infinite_id, models.SDXL_CONFIG, 70)),
    "omni_id_vit_h.safetensors": ("likeness", models.make_omni_id_encoder),
    "adaface_sd15.safetensors": ("likeness", models.make_adaface),
    "arc2face_encoder.bin": ("likeness", partial(models.make_clip_text, "sd1_clip_config.json", "", torch.float16)),
    "flashface.ckpt": ("likeness", partial(models.make_flashface, 5)),
    "flashface_inpainting.ckpt": ("likeness", partial(models.make_flashface, 9)),
    **{file: ("ipadapter", partial(models.make_adapter, layout)) for file, layout in ADAPTER_LAYOUTS.items()},
}

# Metadata of files in native format, see likeness/checkpoints/native_metadata.py
FILE_METADATA = {
    "infinite_id_sdxl.safetensors": {
        "kind": "infinite_id", "version": 1, "base": "SDXL", "unconditional": "zero", "notes": {"trained": "no"},
    },
    "omni_id_vit_h.safetensors": omni_id_encoder.METADATA,
    "adaface_sd15.safetensors": {
        "kind": "adaface", "version": 1, "base": "SD1.5", "towers": {"l": 768}, "heads": 12, "notes": {"trained": "no"},
    },
    **{
        f"omni_id_{file}.safetensors": {
            "kind": "omni_id_adapter", "version": 1, "base": base, "tokens": flux_models.NUM_OMNI_ID_TOKENS,
            "unconditional": "none", "notes": {"trained": "no"},
        }
        for file, base in (("flux", "FLUX.1"), ("sd15", "SD1.5"))
    },
}  # fmt: skip

# model pack -> file name -> function that writes it
FACE_MODEL_PACKS: dict[str, dict[str, Callable[[Path], None]]] = {
    "buffalo_l": {
        "det_10g.onnx": face_networks.write_detector,
        "w600k_r50.onnx": partial(face_networks.write_recognizer, seed=1),
    },
    "antelopev2": {
        "scrfd_10g_bnkps.onnx": face_networks.write_detector,
        "glintr100.onnx": partial(face_networks.write_recognizer, seed=2),
    },
}


def write_standins(base: Path, names: Iterable[str] | None = None) -> dict[str, Path]:
    """Write the stand-ins with these names (None: all) and the face model packs, unless they exist; paths by name.

    Other names are ignored.
    """
    known = [name for name in (STANDIN_FILES if names is None else names) if name in STANDIN_FILES]
    folder = base / "models"
    paths = {name: folder / STANDIN_FILES[name][0] / name for name in known}
    for name, path in paths.items():
        write_file_once(path, partial(_save_tensors, STANDIN_FILES[name][1], FILE_METADATA.get(name)))
    for pack, files in FACE_MODEL_PACKS.items():
        for file, maker in files.items():
            paths[f"{pack}/{file}"] = path = folder / "insightface" / "models" / pack / file
            write_file_once(path, maker)
    return paths


def write_file_once(path: Path, write_file: Callable[[Path], None]) -> None:
    """Write a file completely or not at all, unless it was written with the current RECIPE_VERSION."""
    stamp = path.with_name(f".{path.name}.recipe")
    if path.is_file() and stamp.is_file() and stamp.read_text() == str(RECIPE_VERSION):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".part.{path.name}")
    write_file(part)
    os.replace(part, path)
    stamp.write_text(str(RECIPE_VERSION))


def _save_tensors(make_tensors: MakeTensors, metadata: dict[str, Any] | None, path: Path) -> None:
    from safetensors.torch import save_file

    models.import_host()
    tensors = {key: value.contiguous() for key, value in make_tensors().items()}
    if path.suffix == ".safetensors":
        save_file(tensors, path, None if metadata is None else {"likeness": json.dumps(metadata)})
    else:
        torch.save(nest_tensors(tensors) if any(key.startswith("image_proj.") for key in tensors) else tensors, path)


if __name__ == "__main__":
    for name, path in write_standins(Path(sys.argv[1]), sys.argv[2:] or None).items():
        print(f"{name}: {path} ({path.stat().st_size / 2**20:.0f} MiB)")
