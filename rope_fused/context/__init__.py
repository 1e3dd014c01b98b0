"""Extending a context window and seeing that it worked: loading, swapping factors, measuring."""
