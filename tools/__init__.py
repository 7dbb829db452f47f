"""Commands for users and developers: demo, tests, workflows. They start on a bare Python and install ComfyUI."""
