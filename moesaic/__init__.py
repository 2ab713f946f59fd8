"""Moesaic: sparse mixture-of-experts chat models on your own hardware."""
