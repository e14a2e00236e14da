"""The `raymill` command: one file per verb."""
