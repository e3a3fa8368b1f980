"""Base and adapter compared on held-out photographs."""
