"""Answering requests: text in, text out, in any mode."""
