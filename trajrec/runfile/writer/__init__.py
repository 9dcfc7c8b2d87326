"""The process that turns the ring into segments: the only one that writes HDF5. Imports nothing of trainer/."""
