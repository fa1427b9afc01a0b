"""Bridge to LM Studio: its REST APIs on one side, Forebay's two interfaces on the other."""
