"""Rows of files become conversations, these become tokens, and these become steps."""
