"""Releases: export a model folder, write its card, publish it to a Hugging Face repository."""
