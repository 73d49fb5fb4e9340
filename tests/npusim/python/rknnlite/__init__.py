"""Stands in for rknn-toolkit-lite2 in the simulated board."""
