"""Decoding."""


class StageGeneration:
    """Elastic generation."""
