"""The worker: one process, one loaded model, served over a Unix socket.

A Metal fault cannot be caught in Python: it ends the process. So the process
that ends holds one model and nothing else, and the front starts another.
"""
