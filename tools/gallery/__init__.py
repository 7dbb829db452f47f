"""One page that shows method by method, painted by the small models in `weights/` through a real ComfyUI server."""
