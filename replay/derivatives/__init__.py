"""Derivatives of one step. Imports no proof, no method, no HDF5, no Polars."""
