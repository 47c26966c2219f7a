"""Why a container's process did not start."""

import re

from nixlet import errors


def start_failure(what: str, command: str, error: errors.NixletError) -> errors.NixletError:
    """Why a process did not start, told apart as shells and container tools do: not found, or not executable.

    Args:
        what: The beginning of the sentence: "container web can't start".
        command: What was to be run.
        error: What the runtime said.
    """
    text = error.message
    said = text[-300:]
    if ("executable file" in text and "not found" in text) or re.search(r": stat \S+: no such file or directory", text):
        return errors.CommandNotFoundError(f"{what}: {command} is not in the image", hint=said)
    if re.search(r"\bexec \S+: no such file or directory", text):
        return errors.CommandNotFoundError(
            f"{what}: {command} names an interpreter (its loader, or behind #!) that is not in the image", hint=said
        )
    if "exec format error" in text:
        return errors.NotExecutableError(
            f"{what}: {command} can't be executed: it is for another machine, or damaged",
            hint="if it comes from the Nix store, see whether it is whole: nix-store --verify-path STORE_PATH",
        )
    if "permission denied" in text:
        return errors.NotExecutableError(f"{what}: {command} can't be executed", hint=said)
    return errors.FailedPreconditionError(f"{what}: {text}")
