"""Model, optimizer and generators as they are at a step. Only reads; imports no HDF5, no run file, no replay."""
