"""`forebay top`: what every backend and every request is doing, while it does it."""
