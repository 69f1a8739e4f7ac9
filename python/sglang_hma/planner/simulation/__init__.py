"""Serving fleets, simulated event by event."""
