"""The packet filter's rules that CNI plugins made, and that nobody else takes back."""

import asyncio
import contextlib
import re
import shlex

from nixlet import errors
from nixlet.host import process

#: Seconds for one call of iptables, which may wait for another one.
_TIMEOUT = 10.0

#: The plugins' comments.
_COMMENT = re.compile(r'name: "(?P<network>[^"]*)" id: "(?P<container>[^"]*)"')

#: Chains for one container have hashes in their names; those for all networks stay.
_CHAIN = re.compile(r"CNI-(DN-|SN-)?[0-9a-f]{16,}")


async def remove_rules(*, network: str = "", container: str = "") -> None:
    """Remove the rules, and their chains, of a network or of one container; what can't be removed stays.

    Args:
        network: The network's name; empty: any.
        container: What the plugins know the container by, with containerd its sandbox's ID; empty: any.
    """
    await asyncio.gather(*(_remove_rules(each, network, container) for each in ("iptables", "ip6tables")))


async def _remove_rules(program: str, network: str, container: str) -> None:
    if process.find_program(f"{program}-save") is None:
        return
    with contextlib.suppress(errors.CommandFailedError):
        printed = (await process.run([f"{program}-save", "-t", "nat"], timeout=_TIMEOUT)).check().stdout.decode()
        commands = removals(printed, network=network, container=container)
        if not commands:
            return
        script = ["*nat", *(" ".join(map(_quoted, each)) for each in commands), "COMMIT", ""]
        restore = [f"{program}-restore", "-w", "--noflush"]
        done = await process.run(restore, stdin="\n".join(script).encode(), timeout=_TIMEOUT)
        if done.returncode != 0:
            # All or nothing, it says: somebody has removed some of it meanwhile, or uses a chain of it.
            for command in commands:
                await process.run([program, "-w", "-t", "nat", *command], timeout=_TIMEOUT)


def _quoted(word: str) -> str:
    """A word as iptables-restore reads it, which is not what a shell does."""
    escaped = word.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"' if escaped != word or not word or any(letter.isspace() for letter in word) else word


def removals(saved: str, *, network: str = "", container: str = "") -> list[list[str]]:
    """The arguments of iptables that do that, from what iptables-save printed."""
    rules, chains = [], []
    for line in saved.splitlines():
        # iptables-save escapes the quotes.
        found = _COMMENT.search(line.replace('\\"', '"')) if line.startswith("-A ") else None
        if found is None or network not in {"", found["network"]} or container not in {"", found["container"]}:
            continue
        words = shlex.split(line)
        rules.append(["-D", *words[1:]])
        target = words[words.index("-j") + 1] if "-j" in words[:-1] else ""
        chains += [name for name in (words[1], target) if _CHAIN.fullmatch(name)]
    unique = list(dict.fromkeys(chains))
    return [*rules, *(["-F", name] for name in unique), *(["-X", name] for name in unique)]
