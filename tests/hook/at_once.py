"""Calls from several threads at the same time."""

import threading


def at_once(*calls, within_s=60.0):
    """Each in a thread of its own; what they returned, in order, and None for what raised or took
    longer."""
    results = [None] * len(calls)

    def run(number, call):
        results[number] = call()

    threads = [
        threading.Thread(target=run, args=(number, call), daemon=True)
        for number, call in enumerate(calls)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(within_s)
    return results
