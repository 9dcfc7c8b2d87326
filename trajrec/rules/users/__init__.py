"""Optimizers of the user's own. Imports the rules above it, and no run file."""
