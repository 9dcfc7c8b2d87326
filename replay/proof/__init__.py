"""That this run is replayed, step by step. Imports no method, no HDF5, no Polars."""
