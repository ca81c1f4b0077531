"""Benchmarks: ratios measured in one process, interleaved, and printed only where the results agree."""
