"""Predictions against training again. Imports no folder, no report, no Polars."""
