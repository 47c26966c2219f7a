"""The packet filter's rules that CNI plugins made, and that nobody else takes back."""

import asyncio
import functools
import logging
import re
import shlex
from collections.abc import Callable, Collection, Sequence

from nixlet import errors
from nixlet.host import process

_log = logging.getLogger("nixlet.network")

#: Seconds for one call of iptables, which may wait for another one.
_TIMEOUT = 10.0

#: Seconds between two tries while the kernel's tables are somebody's: some 10 s in all.
_PAUSES = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 3.2)

_PROGRAMS = ("iptables", "ip6tables")

#: The tables that programs besides the plugins have chains in.
_TABLES = ("filter", "mangle", "nat")

#: The plugins' comments.
_COMMENT = re.compile(r'name: "(?P<network>[^"]*)" id: "(?P<container>[^"]*)"')

#: Chains for one container have hashes in their names; those for all networks stay.
_CHAIN = re.compile(r"CNI-(DN-|SN-)?[0-9a-f]{16,}")


async def remove_rules(*, network: str = "", container: str = "", chain: str = "") -> None:
    """Remove the rules, and their chains, of a network or of one container; what can't be removed stays.

    Args:
        network: The network's name; empty: any.
        container: What the plugins know the container by, with containerd its sandbox's ID; empty: any.
        chain: The chain that they are in; empty: any.
    """
    wanted = functools.partial(removals, network=network, container=container, chain=chain)
    await asyncio.gather(*(_remove(each, "nat", wanted) for each in _PROGRAMS))


async def remove_chains(names: Collection[str]) -> None:
    """Remove chains, and the rules that lead to them, from the tables that filter, change and translate; what can't be removed stays."""
    wanted = functools.partial(chain_removals, names=names)
    await asyncio.gather(*(_remove(each, table, wanted) for each in _PROGRAMS for table in _TABLES))


async def _remove(program: str, table: str, wanted: Callable[[str], list[list[str]]]) -> None:
    """Remove from a table what is wanted of what iptables-save prints of it, each a command's arguments."""
    if process.find_program(f"{program}-save") is None:
        return
    said = ""
    for pause in (0.0, *_PAUSES):
        await asyncio.sleep(pause)
        saved = await _run([f"{program}-save", "-t", table])
        if saved.returncode != 0:
            said = saved.stderr.decode(errors="replace").strip()
            continue
        commands = wanted(saved.stdout.decode(errors="replace"))
        if not commands:
            return
        script = [f"*{table}", *(" ".join(map(_quoted, each)) for each in commands), "COMMIT", ""]
        done = await _run([f"{program}-restore", "-w", "--noflush"], stdin="\n".join(script).encode())
        if done.returncode == 0:
            return
        said = done.stderr.decode(errors="replace").strip()
        # All or nothing, it says: somebody has removed some of it meanwhile, or uses a chain of it.
        for command in commands:
            await _run([program, "-w", "-t", table, *command])
    _log.warning("rules of the packet filter stay: %s", said, extra={"program": program, "table": table})


def chain_removals(saved: str, names: Collection[str]) -> list[list[str]]:
    """The arguments of iptables that do that, from what iptables-save printed of a table."""
    there, rules = [], []
    for line in saved.splitlines():
        if line.startswith(":") and (name := line[1:].split()[0]) in names:
            there.append(name)
        elif line.startswith("-A "):
            words = shlex.split(line)
            if words[1] not in names and "-j" in words[:-1] and words[words.index("-j") + 1] in names:
                rules.append(["-D", *words[1:]])
    return [*rules, *(["-F", name] for name in there), *(["-X", name] for name in there)]


async def _run(argv: Sequence[str], *, stdin: bytes = b"") -> process.Completed:
    try:
        return await process.run(argv, stdin=stdin, timeout=_TIMEOUT)
    except errors.NixletError as error:
        return process.Completed(tuple(argv), 1, b"", error.message.encode())


def _quoted(word: str) -> str:
    """A word as iptables-restore reads it, which is not what a shell does."""
    escaped = word.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"' if escaped != word or not word or any(letter.isspace() for letter in word) else word


def removals(saved: str, *, network: str = "", container: str = "", chain: str = "") -> list[list[str]]:
    """The arguments of iptables that do that, from what iptables-save printed."""
    rules, chains = [], []
    for line in saved.splitlines():
        # iptables-save escapes the quotes.
        found = _COMMENT.search(line.replace('\\"', '"')) if line.startswith("-A ") else None
        if found is None or network not in {"", found["network"]} or container not in {"", found["container"]}:
            continue
        words = shlex.split(line)
        if chain not in {"", words[1]}:
            continue
        rules.append(["-D", *words[1:]])
        target = words[words.index("-j") + 1] if "-j" in words[:-1] else ""
        chains += [name for name in (words[1], target) if _CHAIN.fullmatch(name)]
    unique = list(dict.fromkeys(chains))
    return [*rules, *(["-F", name] for name in unique), *(["-X", name] for name in unique)]
