"""Which model is in which memory: one account for all backends, and who may load next."""
