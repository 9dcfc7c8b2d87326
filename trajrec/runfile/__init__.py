"""A run on disk, by process. Imports no rules, no task, no replay."""
