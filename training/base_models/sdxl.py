"""A published SDXL checkpoint in the form of the base models that are trained here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.sd
import torch
from comfy.model_base import SDXL, BaseModel
from torch import Tensor, nn

from .clip_pair import TokenRows

# Frozen float32 weights cost little, and SDXL's VAE fails in half precision.
FLOAT32_OPTIONS = {"dtype": torch.float32}


class SDXLTextEncoders(nn.Module):
    """Both text encoders as one: token rows to hidden states [n, 77, 2048] and pooled embeddings [n, 1280]."""

    def __init__(self, small: Any, large: Any) -> None:
        super().__init__()
        self.small, self.large = small, large

    def forward(self, tokens: TokenRows) -> tuple[Tensor, Tensor]:
        # After the end token the large encoder has padding tokens of its own.
        end, pad = (self.large.special_tokens[name] for name in ("end", "pad"))
        padded = [row[: row.index(end) + 1] for row in tokens]
        padded = [row + [pad] * (len(tokens[0]) - len(row)) for row in padded]
        (small_states, _), (large_states, pooled) = self.small(tokens), self.large(padded)
        return torch.cat((small_states, large_states), -1), pooled


def load_sdxl(file: Path) -> tuple[SDXLTextEncoders, Any, BaseModel]:
    """The text encoders, VAE and model of a file. Raises ValueError if it is not an SDXL checkpoint."""
    try:
        model, text, vae, _ = comfy.sd.load_checkpoint_guess_config(
            str(file), model_options=FLOAT32_OPTIONS, te_model_options=FLOAT32_OPTIONS
        )
    except (OSError, RuntimeError) as error:
        raise ValueError(f"got {file} ({str(error).splitlines()[0]}); expected a checkpoint of SDXL") from error
    if model is None or text is None or vae is None or not isinstance(model.model, SDXL):
        raise ValueError(f"got {file}; expected a complete SDXL checkpoint such as sd_xl_base_1.0")
    encoders: Any = text.cond_stage_model
    autoencoder: Any = vae.first_stage_model
    return SDXLTextEncoders(encoders.clip_l, encoders.clip_g), autoencoder.float(), model.model
