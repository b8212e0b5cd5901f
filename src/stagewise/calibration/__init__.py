"""Calibrating a model for elastic decoding: exit bounds, routing, acceptance of drafts, and a certificate."""
