"""Backends: where sandboxes come from."""
