"""Jupyter: lines in, objects out."""
