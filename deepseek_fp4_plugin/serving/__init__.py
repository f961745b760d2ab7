"""The OpenAI-compatible HTTP server: stands on `LLM` alone and knows nothing of the engine's inside."""
