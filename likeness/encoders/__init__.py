"""Encoders whose outputs the adapters read: CLIP and SigLIP image encoders, CLIP's text encoder, token embeddings."""
