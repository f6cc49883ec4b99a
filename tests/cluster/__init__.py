"""A real scheduler and its jobs."""
