"""The dashboard: one page that shows what the orchestrator is doing, and changes nothing."""
