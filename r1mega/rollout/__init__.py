"""Samples from rollout engines over HTTP, and weights to them."""
