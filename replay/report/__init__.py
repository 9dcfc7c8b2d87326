"""What is shown of a replay. Imports no torch, no HDF5, no run file."""
