"""Losses: how wrong a prediction is, and which way it should move."""
