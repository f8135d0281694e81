"""Reads a network's program with labels in the place of numbers, to find which positions belong to one unit."""
