"""What the bridges share: an HTTP client that cannot surprise, framing, errors, admission, embeddings."""
