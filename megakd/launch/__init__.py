"""Starts the ranks of a job under torchrun, wraps each, and tells in one line how it ended."""
