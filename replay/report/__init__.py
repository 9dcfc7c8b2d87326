"""What people see. Imports no torch, no HDF5, no run file."""
