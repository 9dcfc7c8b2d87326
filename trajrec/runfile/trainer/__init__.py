"""The part of a run file that runs in the training. Imports no HDF5, nothing of writer/ or reader/."""
