"""Texts of the notes in the workflows: what each is for, which models it needs and where they go."""

from __future__ import annotations

from typing import Any

from . import demo

# What an artist should know before the first run.
WORKFLOW_DESCRIPTIONS = {
    "portrait_faceid_plusv2": "Generates a portrait with the face of a photo, by FaceID-PlusV2 on SD1.5. A lower "
    "strength follows the prompt more closely.",
    "portrait_plus_face": "Generates a painting with the face of a photo, by IP-Adapter Plus-Face on SD1.5.",
    "instantid_sdxl": "Uses the face of a photo and its pose, by InstantID on SDXL: the adapter provides the face, the "
    "ControlNet its five key points.",
    "flashface_portrait": "Generates a portrait by FlashFace from four photos. The mask sets the position of the face, "
    "as in the authors' demo. State an age in the prompt. Photos 2 to 4 are variants of one photo; use four different "
    "ones.",
    "flashface_age_gender": "Changes age and gender by prompt with FlashFace: two prompts at three strengths, as a "
    "grid. A higher strength stays closer to the photos.",
    "flashface_mix": "Interpolates between two people by FlashFace: the weights set the share of each.",
    "flashface_inpaint": "Inpaints a face into an image, by FlashFace's inpainting version (a UNet with 9 input "
    "channels, which its authors describe but have not published) in models/likeness.",
    "fused_two_people": "Places two people in one image by fused KV: a mask for each face, one prompt, one softmax "
    "over text and faces. The adapter is not trained: lower the strength if colours of the photos are transferred.",
    "decoupled_two_people": "The same two people by FaceID-PlusV2: each person's attention acts inside the person's "
    "box.",
    "fused_morph_three": "Blends three people into one face, by fused KV without masks: the strengths set the share of "
    "each.",
    "fused_group_depth": "Places three people where a depth map has them, by fused KV and ComfyUI's own ControlNet, as "
    "in the paper. The boxes cover the heads in the depth map.",
    "infinite_id_styles": "Renders a photo as anime and as line art, by Infinite-ID. From left to right: without "
    "AdaIN, with AdaIN-mean, with AdaIN. Its authors have published no weights: train an adapter, or use one that "
    "others trained.",
    "infinite_id_interpolation": "Interpolates from one person to another in four images, by Infinite-ID: the "
    "strengths set the share of each.",
    "pulid_sdxl": "Generates a painting with the face of a photo, by PuLID v1.1 on SDXL.",
    "pulid_flux": "Generates a portrait with the face of a photo, by PuLID on FLUX.1 dev. A later start_percent gives "
    "a looser likeness, an earlier one a closer likeness.",
    "omni_id_photos": "Generates the same portrait by Omni-ID on FLUX.1 dev from one, three and seven photos, side by "
    "side, and shows where the encoder's queries look. The photos are variants of one photo; use seven different ones. "
    "Its authors have published no weights: train an adapter, or use one that others trained.",
    "omni_id_landmarks": "Generates one person in three poses on FLUX.1 dev: key points of a template face drive "
    "ComfyUI's own ControlNet, and Omni-ID provides the identity.",
    "adaface_scenes": "Generates a person in five scenes by AdaFace: @anna in each line of the schedule stands for the "
    "person's sixteen word vectors. The model is not patched.",
    "adaface_embedding": "Saves a person as an embedding file and generates an image from that file alone. Any SD1.5 "
    "interface can then use this person in a prompt: embedding:anna.",
    "adaface_group_depth": "Places three people from one prompt where a depth map has them, by AdaFace: ComfyUI's own "
    "ControlNet reads the same prompt.",
    "demo_decoupled": "Generates a watercolour of a drawn person, by decoupled attention to the face vector. Choose "
    "another person and run it again.",
    "demo_plus_face": "Generates a drawn person by Plus-Face: a CLIP image encoder reads the whole head.",
    "demo_fused": "Places two drawn people in one image by fused KV: each gets one half of the image.",
    "demo_flashface": "Generates a drawn person by FlashFace from four photos, with the paper's strength and "
    "reference_guidance.",
    "demo_infinite_id": "Generates a drawn person by Infinite-ID, without AdaIN. Choose AdaIN-mean if the prompt asks "
    "for a style: it costs likeness.",
    "demo_omni_id": "Generates a drawn person by Omni-ID, from four photos encoded jointly.",
    "demo_adaface": "Generates a drawn person by AdaFace: @kim in the prompt stands for sixteen word vectors, and the "
    "model is not patched. The small demo model transfers hardly any likeness this way: this workflow shows the "
    "wiring, not the quality of the method.",
    "demo_identity": "Interpolates two drawn identities, saves the result in models/identities and renders it.",
    "identity_library_make": "Turns photos into two identities and saves them in models/identities, where all later "
    "workflows can load them.",
    "identity_library_use": "Mixes two saved identities and renders the result. Run identity_library_make first, or "
    "choose your own files.",
}
HUGGING_FACE_URL = "https://huggingface.co"
FACE_MODELS_URL = "https://github.com/deepinsight/insightface/releases/download/v0.7"
# Download address of a file (empty: you train it; a page: you convert it), and the folder that it goes to.
MODEL_SOURCES = {
    "v1-5-pruned-emaonly-fp16.safetensors": (
        f"{HUGGING_FACE_URL}/Comfy-Org/stable-diffusion-v1-5-archive/resolve/main/v1-5-pruned-emaonly-fp16.safetensors",
        "checkpoints",
    ),
    "sd_xl_base_1.0.safetensors": (
        f"{HUGGING_FACE_URL}/stabilityai/stable-diffusion-xl-base-1.0/resolve/main/sd_xl_base_1.0.safetensors",
        "checkpoints",
    ),
    "CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors": (
        f"{HUGGING_FACE_URL}/h94/IP-Adapter/resolve/main/models/image_encoder/model.safetensors",
        "clip_vision",
    ),
    "ip-adapter-plus-face_sd15.safetensors": (
        f"{HUGGING_FACE_URL}/h94/IP-Adapter/resolve/main/models/ip-adapter-plus-face_sd15.safetensors",
        "ipadapter",
    ),
    "ip-adapter-faceid_sd15.bin": (
        f"{HUGGING_FACE_URL}/h94/IP-Adapter-FaceID/resolve/main/ip-adapter-faceid_sd15.bin",
        "ipadapter",
    ),
    "ip-adapter-faceid-plusv2_sd15.bin": (
        f"{HUGGING_FACE_URL}/h94/IP-Adapter-FaceID/resolve/main/ip-adapter-faceid-plusv2_sd15.bin",
        "ipadapter",
    ),
    "ip-adapter.bin": (f"{HUGGING_FACE_URL}/InstantX/InstantID/resolve/main/ip-adapter.bin", "instantid"),
    "instantid/diffusion_pytorch_model.safetensors": (
        f"{HUGGING_FACE_URL}/InstantX/InstantID/resolve/main/ControlNetModel/diffusion_pytorch_model.safetensors",
        "controlnet",
    ),
    "control_v11f1p_sd15_depth_fp16.safetensors": (
        f"{HUGGING_FACE_URL}/comfyanonymous/ControlNet-v1-1_fp16_safetensors/resolve/main/"
        "control_v11f1p_sd15_depth_fp16.safetensors",
        "controlnet",
    ),
    "flux1-dev.safetensors": (
        f"{HUGGING_FACE_URL}/black-forest-labs/FLUX.1-dev/resolve/main/flux1-dev.safetensors",
        "diffusion_models",
    ),
    "ae.safetensors": (f"{HUGGING_FACE_URL}/black-forest-labs/FLUX.1-dev/resolve/main/ae.safetensors", "vae"),
    "clip_l.safetensors": (
        f"{HUGGING_FACE_URL}/comfyanonymous/flux_text_encoders/resolve/main/clip_l.safetensors",
        "text_encoders",
    ),
    "t5xxl_fp8_e4m3fn.safetensors": (
        f"{HUGGING_FACE_URL}/comfyanonymous/flux_text_encoders/resolve/main/t5xxl_fp8_e4m3fn.safetensors",
        "text_encoders",
    ),
    "pulid_v1.1.safetensors": (f"{HUGGING_FACE_URL}/guozinan/PuLID/resolve/main/pulid_v1.1.safetensors", "pulid"),
    "pulid_flux_v0.9.1.safetensors": (
        f"{HUGGING_FACE_URL}/guozinan/PuLID/resolve/main/pulid_flux_v0.9.1.safetensors",
        "pulid",
    ),
    "EVA02_CLIP_L_336_psz14_s6B.pt": (
        f"{HUGGING_FACE_URL}/QuanSun/EVA-CLIP/resolve/main/EVA02_CLIP_L_336_psz14_s6B.pt",
        "clip_vision",
    ),
    "omni_id_vit_h.safetensors": ("", "likeness"),
    "omni_id_flux.safetensors": ("", "likeness"),
    "flux_landmarks.safetensors": ("", "controlnet"),
    "infinite_id_sdxl.safetensors": ("", "likeness"),
    "adaface_sd15.safetensors": ("https://github.com/askerlee/AdaFace", "likeness"),
    "arc2face_encoder.bin": (
        f"{HUGGING_FACE_URL}/FoivosPar/Arc2Face/resolve/main/encoder/pytorch_model.bin",
        "likeness",
    ),
    "flashface.ckpt": (f"{HUGGING_FACE_URL}/shilongz/FlashFace-SD1.5/resolve/main/flashface.ckpt", "likeness"),
    "buffalo_l": (f"{FACE_MODELS_URL}/buffalo_l.zip", "insightface/models"),
    "antelopev2": (f"{FACE_MODELS_URL}/antelopev2.zip", "insightface/models"),
}

CONVERT_COMMAND = "python -m tools.convert_adaface in.pt out.safetensors"

ApiPrompt = dict[str, Any]


def list_sourced_files(prompt: ApiPrompt) -> list[str]:
    """The entries of MODELS that the prompt names, in its order, each once."""
    values = [value for node in prompt.values() for value in node["inputs"].values() if isinstance(value, str)]
    return [value for value in dict.fromkeys(values) if value in MODEL_SOURCES]


def format_note(workflow_name: str, prompt: ApiPrompt) -> str:
    """The text of a workflow's note: what it does, and which models go where."""
    found = list_sourced_files(prompt)
    lines = [WORKFLOW_DESCRIPTIONS[workflow_name], "", "Models:" if found else "All models ship with the pack.", ""]
    for file in found:
        url, folder = MODEL_SOURCES[file]
        source = f"[{file}]({url})" if url else f"{file} (train it yourself)"
        how = ""
        if url.endswith(".zip"):
            how = " (unpacked)"
        elif url and not is_direct_link(url):
            how = f", made with `{CONVERT_COMMAND}`"
        lines.append(f"- {source} in `models/{folder}`{how}")
    return "\n".join(lines)


def is_direct_link(url: str) -> bool:
    """Whether an address is that of the file itself."""
    return url.endswith(demo.WEIGHTS_SUFFIXES)
