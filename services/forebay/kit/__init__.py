"""What every Forebay process is made of: calls, layers, failures, the gRPC edge and the server."""
