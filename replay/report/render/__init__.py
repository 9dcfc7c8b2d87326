"""Draws a report on the terminal, as CSV and as HTML. Imports no scores."""
