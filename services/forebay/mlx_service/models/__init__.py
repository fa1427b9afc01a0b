"""Model folders: what is in them, and how one is made from a GGUF file."""
