"""One page that shows every method, painted by the small models in `weights/` through a real ComfyUI server."""
