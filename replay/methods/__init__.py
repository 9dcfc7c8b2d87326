"""One algorithm a file: from a session and a question to contributions. Imports no folder, no report, no Polars."""
