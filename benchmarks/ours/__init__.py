"""Our side of the benchmarks whose sides are processes of their own."""
