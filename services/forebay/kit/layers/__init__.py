"""Layers that backends and the orchestrator share."""
