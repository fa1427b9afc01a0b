"""Generated stubs and their protos."""
