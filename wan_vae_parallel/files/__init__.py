"""What comes from and goes to disk: checkpoints, latents, videos, pictures, whole files, the user's cache."""
