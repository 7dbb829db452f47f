"""What the notes of the workflows say: what each is for, which models it needs and where they go."""

from __future__ import annotations

from typing import Any

from . import demo

# What an artist should know before the first run.
ABOUT = {
    "portrait_faceid_plusv2": "A portrait that keeps the face of a photo, by FaceID-PlusV2 on SD1.5. Lower strength "
    "leaves more to the prompt.",
    "portrait_plus_face": "A painting that keeps the face of a photo, by IP-Adapter Plus-Face on SD1.5.",
    "instantid_sdxl": "The face and its pose of a photo, by InstantID on SDXL: the adapter brings the face, the "
    "ControlNet its five key points.",
    "flashface_portrait": "A portrait by FlashFace from four photos, with the face where the mask says, as in the "
    "authors' demo. State an age in the prompt. Photos 2 to 4 are variants of one; use four different ones.",
    "flashface_age_gender": "FlashFace lets the prompt change age and gender: two prompts at three strengths, as a "
    "grid. The more strength, the more of the photos.",
    "flashface_mix": "A person between two, by FlashFace: the weights say how much of each.",
    "flashface_inpaint": "Paints a face into a picture, by FlashFace's inpainting version (a UNet of 9 input channels, "
    "which its authors describe but have not published) in models/likeness.",
    "fused_two_people": "Two people in one picture, by fused KV: a mask for each face, one prompt, one softmax over "
    "text and faces. Without training: lower strength if colours of the photos come along.",
    "decoupled_two_people": "The same two people by FaceID-PlusV2: each person's attention counts where the person's "
    "box is.",
    "fused_morph_three": "One face out of three, by fused KV without masks: strength says how much of each.",
    "fused_group_depth": "Three people where a depth map has them, by fused KV and ComfyUI's own ControlNet, as in the "
    "paper. The boxes lie over the heads of the depth map.",
    "infinite_id_styles": "A photo as anime and as line art, by Infinite-ID: from left to right without AdaIN, with "
    "AdaIN-mean, with AdaIN. Its authors have published no weights: train an adapter, or take one that others trained.",
    "infinite_id_interpolation": "From one person to another in four pictures, by Infinite-ID: the strengths say how "
    "much of each.",
    "pulid_sdxl": "A painting that keeps the face of a photo, by PuLID v1.1 on SDXL.",
    "pulid_flux": "A portrait that keeps the face of a photo, by PuLID on FLUX.1 dev. Start later for looser, "
    "earlier for closer likeness.",
    "omni_id_photos": "The same portrait by Omni-ID on FLUX.1 dev from one, three and seven photos, side by side, and "
    "what the encoder's queries look at. The photos are variants of one; use seven different ones. Its authors have "
    "published no weights: train an adapter, or take one that others trained.",
    "omni_id_landmarks": "Three poses of one person: key points of a template face drive ComfyUI's own ControlNet, "
    "while Omni-ID carries the person, on FLUX.1 dev.",
    "adaface_scenes": "A person in five scenes, by AdaFace: @anna in each line of the schedule stands for the person, "
    "as sixteen words. The model is not patched at all.",
    "adaface_embedding": "Keeps a person as an embedding file and paints by that file alone: from then on any SD1.5 "
    "interface paints this person by the word embedding:anna.",
    "adaface_group_depth": "Three people in one prompt, by AdaFace, where a depth map has them: ComfyUI's own "
    "ControlNet reads the same words.",
    "demo_decoupled": "A watercolour of a drawn person, by decoupled attention to the face's vector. Choose "
    "another person and run it again.",
    "demo_plus_face": "The same by what a CLIP image encoder sees of the head.",
    "demo_fused": "Two drawn people in one picture, by fused KV: a half of the picture for each.",
    "demo_flashface": "A drawn person by FlashFace, from four photos; strength and reference_guidance as in the paper.",
    "demo_infinite_id": "A drawn person by Infinite-ID, without AdaIN. Choose AdaIN-mean for a style that the prompt "
    "asks for: it costs likeness.",
    "demo_omni_id": "A drawn person by Omni-ID, from four photos that one encoder reads together.",
    "demo_adaface": "A drawn person by AdaFace: @kim in the prompt stands for sixteen words, and no model is patched. "
    "The small demo model reads hardly any looks from words: this shows how it is wired, not how like people become.",
    "demo_identity": "A person between two drawn ones, kept in models/identities and painted.",
    "identity_library_make": "Turns photos into two identities and keeps them in models/identities, where every "
    "later workflow finds them.",
    "identity_library_use": "Mixes two kept identities and paints the result. Run identity_library_make first, or "
    "choose files of your own.",
}
HUGGING_FACE = "https://huggingface.co"
FACE_MODELS = "https://github.com/deepinsight/insightface/releases/download/v0.7"
# Where a file comes from (empty: of your own training; a page: to be converted), and the folder that it goes to.
MODELS = {
    "v1-5-pruned-emaonly-fp16.safetensors": (
        f"{HUGGING_FACE}/Comfy-Org/stable-diffusion-v1-5-archive/resolve/main/v1-5-pruned-emaonly-fp16.safetensors",
        "checkpoints",
    ),
    "sd_xl_base_1.0.safetensors": (
        f"{HUGGING_FACE}/stabilityai/stable-diffusion-xl-base-1.0/resolve/main/sd_xl_base_1.0.safetensors",
        "checkpoints",
    ),
    "CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors": (
        f"{HUGGING_FACE}/h94/IP-Adapter/resolve/main/models/image_encoder/model.safetensors",
        "clip_vision",
    ),
    "ip-adapter-plus-face_sd15.safetensors": (
        f"{HUGGING_FACE}/h94/IP-Adapter/resolve/main/models/ip-adapter-plus-face_sd15.safetensors",
        "ipadapter",
    ),
    "ip-adapter-faceid_sd15.bin": (
        f"{HUGGING_FACE}/h94/IP-Adapter-FaceID/resolve/main/ip-adapter-faceid_sd15.bin",
        "ipadapter",
    ),
    "ip-adapter-faceid-plusv2_sd15.bin": (
        f"{HUGGING_FACE}/h94/IP-Adapter-FaceID/resolve/main/ip-adapter-faceid-plusv2_sd15.bin",
        "ipadapter",
    ),
    "ip-adapter.bin": (f"{HUGGING_FACE}/InstantX/InstantID/resolve/main/ip-adapter.bin", "instantid"),
    "instantid/diffusion_pytorch_model.safetensors": (
        f"{HUGGING_FACE}/InstantX/InstantID/resolve/main/ControlNetModel/diffusion_pytorch_model.safetensors",
        "controlnet",
    ),
    "control_v11f1p_sd15_depth_fp16.safetensors": (
        f"{HUGGING_FACE}/comfyanonymous/ControlNet-v1-1_fp16_safetensors/resolve/main/"
        "control_v11f1p_sd15_depth_fp16.safetensors",
        "controlnet",
    ),
    "flux1-dev.safetensors": (
        f"{HUGGING_FACE}/black-forest-labs/FLUX.1-dev/resolve/main/flux1-dev.safetensors",
        "diffusion_models",
    ),
    "ae.safetensors": (f"{HUGGING_FACE}/black-forest-labs/FLUX.1-dev/resolve/main/ae.safetensors", "vae"),
    "clip_l.safetensors": (
        f"{HUGGING_FACE}/comfyanonymous/flux_text_encoders/resolve/main/clip_l.safetensors",
        "text_encoders",
    ),
    "t5xxl_fp8_e4m3fn.safetensors": (
        f"{HUGGING_FACE}/comfyanonymous/flux_text_encoders/resolve/main/t5xxl_fp8_e4m3fn.safetensors",
        "text_encoders",
    ),
    "pulid_v1.1.safetensors": (f"{HUGGING_FACE}/guozinan/PuLID/resolve/main/pulid_v1.1.safetensors", "pulid"),
    "pulid_flux_v0.9.1.safetensors": (
        f"{HUGGING_FACE}/guozinan/PuLID/resolve/main/pulid_flux_v0.9.1.safetensors",
        "pulid",
    ),
    "EVA02_CLIP_L_336_psz14_s6B.pt": (
        f"{HUGGING_FACE}/QuanSun/EVA-CLIP/resolve/main/EVA02_CLIP_L_336_psz14_s6B.pt",
        "clip_vision",
    ),
    "omni_id_vit_h.safetensors": ("", "likeness"),
    "omni_id_flux.safetensors": ("", "likeness"),
    "flux_landmarks.safetensors": ("", "controlnet"),
    "infinite_id_sdxl.safetensors": ("", "likeness"),
    "adaface_sd15.safetensors": ("https://github.com/askerlee/AdaFace", "likeness"),
    "arc2face_encoder.bin": (f"{HUGGING_FACE}/FoivosPar/Arc2Face/resolve/main/encoder/pytorch_model.bin", "likeness"),
    "flashface.ckpt": (f"{HUGGING_FACE}/shilongz/FlashFace-SD1.5/resolve/main/flashface.ckpt", "likeness"),
    "buffalo_l": (f"{FACE_MODELS}/buffalo_l.zip", "insightface/models"),
    "antelopev2": (f"{FACE_MODELS}/antelopev2.zip", "insightface/models"),
}

CONVERT = "python -m tools.convert_adaface in.pt out.safetensors"

Prompt = dict[str, Any]


def files(prompt: Prompt) -> list[str]:
    """The entries of MODELS that the prompt names, in its order, each once."""
    values = [value for node in prompt.values() for value in node["inputs"].values() if isinstance(value, str)]
    return [value for value in dict.fromkeys(values) if value in MODELS]


def note(name: str, prompt: Prompt) -> str:
    """The text of the note that says what the workflow does and which models go where."""
    found = files(prompt)
    lines = [ABOUT[name], "", "Models:" if found else "All models ship with the pack.", ""]
    for file in found:
        url, folder = MODELS[file]
        name = f"[{file}]({url})" if url else f"{file}, of your own training,"
        how = " (unpacked)" if url.endswith(".zip") else "" if direct(url) or not url else f", made by `{CONVERT}`"
        lines.append(f"- {name} in `models/{folder}`{how}")
    return "\n".join(lines)


def direct(url: str) -> bool:
    """Whether an address is that of the file itself."""
    return url.endswith(demo.WEIGHTS)
