"""Where the steps of a run come from: stored, or recomputed. Imports no method, no HDF5, no Polars."""
