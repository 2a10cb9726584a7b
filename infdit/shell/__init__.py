"""The commands of `python -m infdit`: each file adds its arguments to a parser and runs."""
