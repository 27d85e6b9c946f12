"""The server: HTTP, engine, metrics. It asks `elastiformer` for everything about models."""
