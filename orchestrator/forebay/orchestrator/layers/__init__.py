"""The layers of the orchestrator's two stacks. Their order is argued in `stack.py`."""
