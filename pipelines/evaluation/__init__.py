"""Figures from scores."""
