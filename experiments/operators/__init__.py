"""Fits of the operator laws to kernel timings, one file a class."""
