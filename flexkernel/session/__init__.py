"""The driver: what a user holds."""
