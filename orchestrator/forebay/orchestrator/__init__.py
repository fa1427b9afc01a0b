"""The orchestrator: one door to every backend, which routes, retries and watches.

Read `stack.py` first: it shows what happens to a call, layer by layer. `fleet/`
holds what is known of the backends, `routing/` decides between them.
"""
