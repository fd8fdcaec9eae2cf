"""Figures of a campaign, each from plain data."""
