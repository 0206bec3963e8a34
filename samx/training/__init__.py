"""Wrappers around a whole optimizer: microbatches, loss scaling, skipped steps, base keywords."""
