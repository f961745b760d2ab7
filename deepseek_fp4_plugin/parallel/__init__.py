"""Ranks: who holds which slice, and how partial results meet."""
