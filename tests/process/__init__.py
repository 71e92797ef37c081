"""Across processes: wake, kill, fork, contention. Real files, real processes, real SIGKILL."""
