"""The ComfyUI nodes of the pack; `registry.py` collects them."""
