"""Scores and decisions."""
