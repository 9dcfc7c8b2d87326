"""The version of trajrec, for whoever needs it without the package's names."""

__version__ = "0.1.0"
