"""How the bundled model was made: `python -m training PICTURES -o FOLDER` trains a small Inf-DiT."""
