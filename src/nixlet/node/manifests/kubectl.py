"""kubectl, which applies, looks up and deletes: the real one, with the kubeconfig of the cluster's administrator.

What it says of secrets is not handed on: the API server's refusals hold values. It is told what is refused, and why in one word.
"""

import asyncio
import json
import logging
import re
from collections.abc import Mapping, Sequence

from nixlet import errors
from nixlet.host import process, words
from nixlet.node.manifests import objects

#: Whose the fields are that manifests set (Kubernetes, "Server-Side Apply").
_FIELD_MANAGER = "nixlet-manifests"

#: The same for our records of them.
_RECORD_MANAGER = "nixlet-records"

#: How long the API server may take for one object, and kubectl for all of a manifest (seconds).
_REQUEST_TIMEOUT, _TIMEOUT = 60, 600

#: How long a kind of objects that a manifest itself brings may take to be known (seconds).
_ESTABLISHED = 30

#: How kubectl says that nobody answers it. (What is unavailable by the word of the API server, which answers, is what was asked for: an API
#: that a pod serves, say.)
_AWAY = ("Unable to connect to the server", "The connection to the server")

#: Lines of its libraries' log, which stand between those for people: level, date, time (klog).
_LOGGED = re.compile(r"[IWEF]\d{4} \d{2}:")
_WARNING = "Warning: "

#: The reason in what it says: one word of a fixed set (metav1.StatusReason).
_REASON = re.compile(r"Error from server \((?P<reason>[A-Z][A-Za-z]+)\):")

#: What it puts before the reason why it can't read something.
_READING = re.compile(r'^(unable to decode "STDIN": |error parsing STDIN: |error converting YAML to JSON: )+')

#: Its words for an object without these; it prints all of the object.
_LACKS = re.compile(r"^Object '(?P<what>Kind|apiVersion)' is missing")

#: Where what it says of a text that it can't make sense of begins to quote that text, which may be a secret's.
_QUOTE = re.compile(r"[`\"{\[]|'(?!.')|\bkey: ")

#: How much of what it says is told: characters.
_SHOWN = 400

_log = logging.getLogger("nixlet.manifests")


class Kubectl:
    """kubectl for one cluster.

    Args:
        program: The program's path.
        kubeconfig: The kubeconfig file that lets us do everything.
        cache: A directory of ours for what it remembers of the API server.
        search_path: The PATH for it.
    """

    def __init__(self, program: str, kubeconfig: str, cache: str, search_path: str) -> None:
        self._argv = [
            program,
            f"--kubeconfig={kubeconfig}",
            f"--cache-dir={cache}",
            f"--request-timeout={_REQUEST_TIMEOUT}s",
        ]
        # Nothing of ours: a proxy would be asked for the node's own address, and a person's preferences change what commands mean.
        self._environment: Mapping[str, str] = {"PATH": search_path, "HOME": cache, "KUBECTL_KUBERC": "false"}

    async def read(self, content: bytes, manifest: str, label: str) -> list[objects.Written]:
        """A manifest's objects, each with the label that says what made it; the API server is not asked.

        Args:
            content: What stands in the manifest: YAML or JSON.
            manifest: What errors call it.
            label: The label's value.

        Raises:
            InvalidArgumentError: It can't be read, or has something in it that is no object.
        """
        marked = f"{objects.MADE_BY}={label}"
        done = await self._run(["label", "--local", "--overwrite", "-f", "-", "-o", "json", marked], content)
        if done.returncode != 0:
            said = _without_quotes(next(iter(_lines(done.stderr)), "kubectl printed nothing"))
            raise errors.InvalidArgumentError(
                f"{manifest} can't be read: {said}",
                hint="its YAML or JSON is at fault; until it can be read nothing goes that other manifests no longer name",
            )
        # (a large one takes its time)
        return await asyncio.to_thread(objects.written, done.stdout.decode(), manifest)

    async def apply(self, written: Sequence[objects.Written], manifest: str) -> list[objects.Living]:
        """Have the cluster hold these objects as they are written, whoever set the same fields before.

        Raises:
            UnavailableError: The API server doesn't answer.
            CommandFailedError: Some are refused; the others are applied.
        """
        secret = any(is_secret(each.which) for each in written)
        content = "\n".join(each.text for each in written).encode()
        done = await self._apply(content, _FIELD_MANAGER, ["-o", f"go-template={objects.TEMPLATE}"])
        if done.returncode != 0:
            raise _refused(done, written, manifest)
        for line in [] if secret else _lines(done.stderr):
            _log.warning("%s: %s", manifest, _shown(line.removeprefix(_WARNING)))
        return objects.living(done.stdout.decode())

    async def established(self, kinds: Sequence[objects.Object]) -> None:
        """Wait until the API server knows the kinds that custom resource definitions bring; for a while only: the next try may do."""
        names = [f"{kind.resource}/{kind.name}" for kind in kinds]
        await self._run(["wait", "--for=condition=Established", f"--timeout={_ESTABLISHED}s", *names])

    async def records(self) -> dict[str, objects.Record]:
        """What manifests made, by their names.

        Raises:
            NixletError: The API server doesn't say.
        """
        query = ["get", "configmaps", "-n", objects.RECORD_NAMESPACE, "-l", objects.RECORDS, "-o", "json"]
        return objects.records(await self._output(query, "what manifests made can't be looked up"))

    async def write_record(self, record: objects.Record, label: str) -> None:
        """Write down what a manifest made, or is about to make.

        Raises:
            NixletError: The API server doesn't take it.
        """
        done = await self._apply(objects.render(record, label).encode(), _RECORD_MANAGER, [])
        _check(done, f"what {record.manifest} makes can't be written down")

    async def delete_record(self, label: str) -> None:
        """Forget what a manifest made.

        Raises:
            NixletError: The API server doesn't do it.
        """
        where = ["-n", objects.RECORD_NAMESPACE, "--ignore-not-found"]
        await self._output(["delete", "configmap", objects.record_name(label), *where], "a record can't be deleted")

    async def owner(self, which: objects.Object) -> objects.Owned | None:
        """What an object is, and which manifest made it; None: there is no such object.

        Raises:
            NixletError: The API server doesn't say.
        """
        where = [which.resource, which.name, *_namespace(which), "--ignore-not-found"]
        done = await self._run(["get", *where, "-o", f"go-template={objects.TEMPLATE_OWNER}"])
        if done.returncode != 0 and "doesn't have a resource type" in done.stderr.decode(errors="replace"):
            # With the definition of a kind all its objects have gone; not so where who serves it is away.
            await self._check_served(which)
            return None
        said = _check(done, f"{which} can't be looked up")
        return objects.Owned(*said.split("\t")) if said else None

    async def _check_served(self, which: objects.Object) -> None:
        """Check that nobody is away who serves objects of a group: an API server beside the cluster's own.

        Raises:
            FailedPreconditionError: Somebody is.
            NixletError: The API server doesn't say.
        """
        query = ["get", "apiservices.apiregistration.k8s.io", "-o", f"go-template={objects.TEMPLATE_SERVED}"]
        found = await self._output(query, f"who serves {which} can't be looked up")
        served = [line.split("\t") for line in found.splitlines()]
        if any(group == which.group and available != "true" for group, available in served):
            raise errors.FailedPreconditionError(
                f"{which} can't be looked up: its API {which.group} is not available",
                hint="see why: kubectl get apiservices",
            )

    async def delete(self, which: objects.Object, owned: objects.Owned) -> bool:
        """Delete an object, and no other one that has taken its place meanwhile; what it takes along may need longer.

        ``kubectl delete`` itself goes by names alone.

        Returns:
            Whether it was still there, and no other one in its place.

        Raises:
            NixletError: The API server doesn't do it.
        """
        what = f"{which} can't be deleted"
        api = "/apis" if "/" in owned.version else "/api"
        known = objects.resource(
            await self._output(["get", "--raw", f"{api}/{owned.version}"], what), which, owned.version
        )
        if known is None:
            raise errors.FailedPreconditionError(f"{what}: the API server doesn't know its kind any more")
        path = known.path((which.namespace or "default") if known.namespaced else "", which.name)
        options = {
            "kind": "DeleteOptions",
            "apiVersion": "v1",
            "preconditions": {"uid": owned.uid},
            "propagationPolicy": "Background",
        }
        done = await self._run(["delete", "--raw", path, "-f", "-"], json.dumps(options).encode())
        reason = _REASON.match(_first_line(done.stderr))
        if done.returncode != 0 and reason and reason["reason"] in {"Conflict", "NotFound"}:
            return False
        _check(done, what)
        return True

    async def _apply(self, content: bytes, manager: str, options: Sequence[str]) -> process.Completed:
        how = ["apply", "--server-side", f"--field-manager={manager}", "--force-conflicts", "-f", "-", *options]
        return await self._run(how, content)

    async def _output(self, arguments: Sequence[str], what: str) -> str:
        return _check(await self._run(arguments), what)

    async def _run(self, arguments: Sequence[str], content: bytes = b"") -> process.Completed:
        return await process.run([*self._argv, *arguments], env=self._environment, stdin=content, timeout=_TIMEOUT)


def is_secret(which: objects.Object) -> bool:
    """Whether what is said of an object must not be handed on."""
    return which.kind == "Secret" and not which.group


def _namespace(which: objects.Object) -> list[str]:
    """As kubectl takes it where a manifest says none; it does nothing to kinds that have none."""
    return ["-n", which.namespace or "default"]


def _check(done: process.Completed, what: str) -> str:
    """What a command printed; never used where that, or its complaints, may hold a secret."""
    if done.returncode == 0:
        return done.stdout.decode()
    said = _first_line(done.stderr)
    if said.startswith(_AWAY):
        raise _away(said)
    raise errors.CommandFailedError(f"{what}: {said}", returncode=done.returncode)


def _refused(done: process.Completed, written: Sequence[objects.Written], manifest: str) -> errors.NixletError:
    """The error for objects that the API server did not take."""
    lines = [line for line in _lines(done.stderr) if not line.startswith(_WARNING)]
    if any(line.startswith(_AWAY) for line in lines):
        return _away(next(line for line in lines if line.startswith(_AWAY)))
    secrets = [str(each.which) for each in written if is_secret(each.which)]
    if secrets:
        reasons = sorted({found["reason"] for line in lines if (found := _REASON.match(line))})
        why = f" ({', '.join(reasons)})" if reasons else ""
        said = f"{', '.join(secrets[:3])}{' and more' if len(secrets) > 3 else ''}: refused{why}"
    else:
        said = _shown(lines[0].removeprefix("error: ") if lines else "kubectl printed nothing")
    more = f" (and {len(lines) - 1} lines more)" if len(lines) > 1 else ""
    return errors.CommandFailedError(
        said.replace('"STDIN"', manifest) + more,
        returncode=done.returncode,
        hint="see what the API server says of it: kubectl apply --server-side --dry-run=server -f FILE",
    )


def _without_quotes(said: str) -> str:
    """Why a text can't be read, without anything that stands in it."""
    reason = _READING.sub("", said.removeprefix("error: "))
    if lacks := _LACKS.match(reason):
        return f"an object has no {lacks['what'][0].lower()}{lacks['what'][1:]}"
    quote = _QUOTE.search(reason)
    return _shown(reason if quote is None else f"{reason[: quote.start()]}…")


def _away(said: str) -> errors.UnavailableError:
    return errors.UnavailableError(f"the API server does not answer kubectl: {_shown(said)}")


def _lines(stderr: bytes) -> list[str]:
    """What kubectl says to people."""
    lines = (" ".join(line.split()) for line in stderr.decode(errors="replace").splitlines())
    return [line for line in lines if line and not _LOGGED.match(line)]


def _first_line(stderr: bytes) -> str:
    lines = _lines(stderr)
    return _shown(lines[0].removeprefix("error: ")) if lines else "kubectl printed nothing"


def _shown(text: str) -> str:
    return words.shown(text, _SHOWN)
