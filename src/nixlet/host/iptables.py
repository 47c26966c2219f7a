"""The packet filter's rules that CNI plugins made, and that nobody else takes back."""

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
    for program in ("iptables", "ip6tables"):
        if process.find_program(f"{program}-save") is None:
            continue
        with contextlib.suppress(errors.CommandFailedError):
            printed = (await process.run([f"{program}-save", "-t", "nat"], timeout=_TIMEOUT)).check().stdout.decode()
            for command in removals(printed, network=network, container=container):
                await process.run([program, "-w", "-t", "nat", *command], timeout=_TIMEOUT)


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
