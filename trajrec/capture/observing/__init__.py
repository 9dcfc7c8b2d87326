"""What is seen of a loop becomes facts. Looks at tensors, decides nothing. Imports no HDF5, no run file, no replay."""
