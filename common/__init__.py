"""What running needs and reading does not: nothing here is needed to understand D-AR."""
