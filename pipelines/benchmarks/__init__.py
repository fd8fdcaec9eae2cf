"""Ratios to what the project stands on."""
