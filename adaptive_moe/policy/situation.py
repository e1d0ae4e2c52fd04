"""The three ways in which a call reaches the device."""

import enum


class Situation(enum.Enum):
    """How a call reaches the device; what is fastest in one may be slowest in another."""

    GRAPH = "graph"  # replayed from a captured graph
    BUSY = "busy"  # eager, and the host runs ahead of the device
    IDLE = "idle"  # eager, and the device waits for the host
