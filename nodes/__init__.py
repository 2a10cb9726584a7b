"""The nodes: schemas whose `execute` only adapts ComfyUI's values to `infdit` and back."""
