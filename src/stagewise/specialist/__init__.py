"""Specialists: layers and a head grown on a frozen base, shipped as deltas, attached by name, and the tool calls they
emit.
"""
