"""A replay on disk: written, read and merged. Imports no report and no command line."""
