"""Benchmarks of fused_resnet against the library's operators and its peers."""
