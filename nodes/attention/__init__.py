"""Patch nodes: each adds one method to a MODEL."""

from __future__ import annotations

from . import decoupled

NODES = [*decoupled.NODES]
