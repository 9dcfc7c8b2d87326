"""Rules made of rules. Imports the rules above it, and no run file."""
