"""Grokking (Power et al. 2022): the history of a run, whether and when it generalised, and its figure."""
