"""Metrics and protocols. The only room that sees relevance."""
