"""Faults that calibrations must survive, with real processes and real kills.

Each module has a `run(...)` that does it a given number of times and returns counts; the tests call
it with small numbers, `python -m tests.faults` with the full ones.
"""
