"""The layers that every stack can use: limit, measure and watchdog."""
