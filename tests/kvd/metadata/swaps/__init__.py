"""Neighbouring stores that may stand in either order, and the proof that no test can tell."""
