"""Who has a container in front of them, and is slow or gone."""

import asyncio

from nixlet.kube import foreground


async def test_a_client_that_is_slow_is_waited_for_until_it_goes() -> None:
    listener = foreground.Listener()

    async def fill() -> None:
        for _ in range(100):
            await listener.put("stdout", b"x")

    filling = asyncio.create_task(fill())
    await asyncio.wait({filling}, timeout=0.05)
    assert not filling.done()
    listener.leave()
    await asyncio.wait_for(filling, 5)


async def test_a_container_that_has_ended_waits_for_nobody_and_loses_nothing() -> None:
    listener = foreground.Listener()

    async def fill() -> None:
        for number in range(100):
            await listener.put("stdout", b"%d" % number)

    filling = asyncio.create_task(fill())
    await asyncio.sleep(0)
    listener.hurry()
    await asyncio.wait_for(filling, 5)
    listener.finish()
    assert [data async for _, data in listener.pieces()] == [b"%d" % number for number in range(100)]
