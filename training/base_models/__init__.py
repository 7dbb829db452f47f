"""Training tasks for the base models: VAE, CLIP pair, UNet, face recognizer and face detector."""
