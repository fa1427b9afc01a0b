"""Embeds texts: encoders and decoders in mlx, in batches that callers share."""
