"""Logs: written in memory and rewritten whole, read back, described in one line where they are not
ours.
"""
