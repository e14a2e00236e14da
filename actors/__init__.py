"""The stops of the data: one actor or pure decision a file, each usable alone."""
