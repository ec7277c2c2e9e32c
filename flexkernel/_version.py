"""The version of flexkernel, which every part may ask for."""

__version__ = "0.1.0"
