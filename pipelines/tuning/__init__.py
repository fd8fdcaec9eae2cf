"""Searching the options of a method."""
