"""Which samples made a step: what the facts of a loop say, as a pure function. Imports no torch, and no other room."""
