"""The scheduler's half of the engine: requests, KV blocks, prefix cache, scheduling. Pure Python, without torch."""
