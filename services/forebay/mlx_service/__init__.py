"""MLX behind gRPC: a front that serves, and a worker process for each model in memory.

The process that serves gRPC never imports mlx. Metal reports some errors by
ending the process, and memory comes back for certain only when a process ends;
so every model has a process of its own, which may die without taking the
service along, and whose end is the way to unload it.
"""
