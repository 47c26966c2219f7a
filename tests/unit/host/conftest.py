"""Programs are tested with asyncio's own event loop and with uvloop's, which is the node's: their transports differ in details."""

import asyncio
from collections.abc import Callable, Mapping

import uvloop


def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """What tests run in."""
    return {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
