"""One file per claim: ours and the peers on the same work, alternating; `python -m benchmarks.<claim> [--quick]`."""
