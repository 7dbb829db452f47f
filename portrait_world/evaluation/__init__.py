"""Metrics of training and of the report."""
