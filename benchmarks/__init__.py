"""Measurements of the library and of a model, for `python -m benchmarks`; nobody needs them to upscale."""
