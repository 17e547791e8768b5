"""Logs: written in memory and rewritten whole, read back, described in one line if not ours."""
