"""Losses in fp32 nats, one value a token, divided once by the global number of valid tokens."""
