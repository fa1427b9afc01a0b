"""The fleet: what is known of each backend, and the tasks that keep it known."""
