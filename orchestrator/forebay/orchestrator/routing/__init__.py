"""Routing: synchronous decisions over an immutable picture of the fleet."""
