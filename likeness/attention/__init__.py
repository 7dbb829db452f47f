"""Shared by the methods in attention layers: regions, layer weights, grouped attention, caches, guidance."""
