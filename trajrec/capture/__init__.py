"""A training loop becomes records. Runs in the training: imports no HDF5, no run file, no replay."""
