"""Loader nodes: from files and settings to encoders and adapters."""

from __future__ import annotations

from . import adapter, face_analyzer, image_encoder

NODES = [*face_analyzer.NODES, *image_encoder.NODES, *adapter.NODES]
