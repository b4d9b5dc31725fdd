"""Measuring what compression cost: paired sampling, metrics, comparison tables."""
