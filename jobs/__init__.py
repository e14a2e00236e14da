"""What one submits: the demo pipeline, its data, the loop and the `raymill` command."""
