"""Measurements of a model, for `python -m infdit bench`."""
