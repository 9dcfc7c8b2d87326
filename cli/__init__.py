"""The command line, thin: parse and delegate."""
