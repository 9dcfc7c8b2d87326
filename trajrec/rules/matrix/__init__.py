"""Optimizers that step a matrix as a whole. Imports the rules above it, and no run file."""
