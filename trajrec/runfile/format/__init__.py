"""Bytes and names of the files: what is written and read everywhere. Imports no process."""
