"""The device's half of the engine, the only home of tensors: memory plan, KV pool, request table, model runner."""
