"""Scores of a model on benchmarks, and what they can and cannot show. It speaks to a server or to LLM, never deeper."""
