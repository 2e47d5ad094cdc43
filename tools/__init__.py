"""Developer tools; nothing here is installed."""
