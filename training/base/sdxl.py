"""SDXL as a base stack: a published checkpoint by the host's loader, in the shape of what is trained here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.sd
import torch
from comfy.model_base import SDXL, BaseModel
from torch import Tensor, nn

from .clip import Tokens

SINGLE = {"dtype": torch.float32}  # of the weights: what is frozen costs little, and the VAE fails in half precision


class Text(nn.Module):
    """Both text encoders as one: lists of tokens to states [n, 77, 2048] and projected texts [n, 1280]."""

    def __init__(self, small: Any, large: Any) -> None:
        super().__init__()
        self.small, self.large = small, large

    def forward(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        end, pad = (self.large.special_tokens[name] for name in ("end", "pad"))
        filled = [row[: row.index(end) + 1] for row in tokens]  # behind the end, the large one reads other tokens
        filled = [row + [pad] * (len(tokens[0]) - len(row)) for row in filled]
        (first, _), (second, projected) = self.small(tokens), self.large(filled)
        return torch.cat((first, second), -1), projected


def load(file: Path) -> tuple[Text, Any, BaseModel]:
    """Its text encoders, VAE and model. Raises ValueError where the file is no checkpoint of SDXL."""
    try:
        model, text, vae, _ = comfy.sd.load_checkpoint_guess_config(
            str(file), model_options=SINGLE, te_model_options=SINGLE
        )
    except (OSError, RuntimeError) as error:
        raise ValueError(f"got {file} ({str(error).splitlines()[0]}); expected a checkpoint of SDXL") from error
    if model is None or text is None or vae is None or not isinstance(model.model, SDXL):
        raise ValueError(f"got {file}, which is no whole checkpoint of SDXL; expected one, as sd_xl_base_1.0")
    both: Any = text.cond_stage_model
    autoencoder: Any = vae.first_stage_model
    return Text(both.clip_l, both.clip_g), autoencoder.float(), model.model
