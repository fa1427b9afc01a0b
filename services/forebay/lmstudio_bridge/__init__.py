"""Bridge to LM Studio: its REST APIs on one side, `forebay.inference.v1` and `forebay.models.v1` on the other."""
