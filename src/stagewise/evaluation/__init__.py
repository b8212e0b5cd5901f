"""Measuring a model: bits per byte, agreement, probes, head analysis, cost, and the lm-eval adapter."""
