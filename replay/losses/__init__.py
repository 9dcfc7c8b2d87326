"""The Task as a function of the weights. Imports no proof, no method, no HDF5, no Polars."""
