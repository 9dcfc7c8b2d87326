"""What runs afterwards: from a recording to contributions, scores and reports."""
