"""Ending in order: the signals by which people and service managers ask for it."""

import asyncio
import signal


def stop_requested() -> asyncio.Event:
    """An event that SIGTERM and SIGINT set, in the running loop; they do nothing else from now on."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    return stop
