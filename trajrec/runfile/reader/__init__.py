"""Whoever reads a run. Writes nothing; imports nothing of trainer/ or writer/."""
