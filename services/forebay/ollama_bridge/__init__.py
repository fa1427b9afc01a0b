"""The bridge between the contract and an Ollama server."""
