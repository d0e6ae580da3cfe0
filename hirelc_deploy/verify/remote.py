"""A device that is reached over the system's `ssh`, with the user's own configuration, keys and known hosts.

A job is one connection: a tar of files goes in, a runner that needs only the runtime does the job, a tar of results
comes out.  Jobs change nothing on the device but their own folder, so one whose connection was lost is done again.
"""

import io
import json
import os
import shlex
import shutil
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from importlib import resources
from pathlib import Path
from typing import Any

from hirelc_deploy.cpu import RELEVANT_FLAGS, flags_of_cpuinfo
from hirelc_deploy.errors import UserError
from hirelc_deploy.exporters._base import Arrays, KernelFile, NoKernelError, Optimise, Request, Runtime
from hirelc_deploy.exporters._footprint import packed
from hirelc_deploy.verify import timing
from hirelc_deploy.verify.machines import WARMUP_RUNS, Where
from hirelc_deploy.verify.providers import Provider

SSH_VARIABLE = "HIRELC_DEPLOY_SSH"
"""A command to use instead of `ssh`, such as `ssh -F FILE`."""

OPTIONS = shlex.split(
    "-o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=15 -o ServerAliveCountMax=3",
)
"""Nobody is there to type a password; a device that says nothing for 45 s is gone.  Host keys are checked as always."""

SSH_FAILED = 255
NOT_FOUND, NOT_EXECUTABLE = 127, 126
RUNNER = "runner.py"
ATTEMPTS = 4
PAUSE_S = 2.0
"""Before the first repetition; twice as long before each further one."""

FINAL = (
    ("Could not resolve hostname", "there is no host {host!r}", "check the name, or give it in ~/.ssh/config"),
    (
        "REMOTE HOST IDENTIFICATION HAS CHANGED",
        "{host} answers with another key than the known one",
        "if the device was set up anew, remove its old key: ssh-keygen -R {name}",
    ),
    (
        "Host key verification failed",
        "the key of {host} is not known",
        "log in once by hand and check the key: ssh {host}",
    ),
    ("No space left on device", "{host} has no room left", "free some in its temporary folder"),
)
"""What ssh says where trying again would not help, what that means, and what to do."""

NOT_LET_IN = ("Permission denied", "{host} does not let you in", "does `ssh {host} true` work without a password?")
"""The same, but only of ssh itself: a program on the device says it of files."""


class LostError(Exception):
    """The connection broke; the message is ssh's."""


class Link:
    """A device, and a folder of its own there."""

    def __init__(self, host: str, ssh: Sequence[str], folder: str) -> None:
        self.host, self.folder = host, folder
        self._ssh = ssh

    def job(self, command: str, files: Mapping[str, bytes]) -> dict[str, bytes]:
        """Run a shell command in a new folder that holds these files; the files that it leaves there, by name.

        It begins anew where the connection breaks.  Raises UserError if that does not help, or if the command fails.
        """
        # a folder for the job alone: what an attempt that broke off has left is not read
        whole = (
            f"cd {shlex.quote(self.folder)} && rm -rf job && mkdir job && cd job && tar -xf - && "
            f"{command} && tar -cf - ."
        )
        sent = _tar(files)
        return _untar(attempts(lambda: _call(self._ssh, self.host, whole, sent), self.host))

    def python(self, python: str, files: Mapping[str, bytes]) -> dict[str, bytes]:
        """Run `runner.py` of these files by a Python of the device; the files that it writes.  Raises as `job`."""
        return self.job(f"{shlex.quote(python)} {RUNNER} && rm -f *.onnx *.npz *.py job.json", files)


class Local:
    """This machine, where each job is a process of its own: of another Python, with another runtime."""

    host = "this machine"

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def python(self, python: str, files: Mapping[str, bytes]) -> dict[str, bytes]:
        """Run `runner.py` of these files; the files that it writes.  Raises UserError if it fails."""
        if Path(python).name != python:  # a path from where the user is, and not from the job's folder
            python = os.path.abspath(python)  # noqa: PTH100 - a link stays a link: it says whose packages are found
        job = self.folder / "job"
        shutil.rmtree(job, ignore_errors=True)
        job.mkdir()
        for name, data in files.items():
            (job / name).write_bytes(data)
        try:
            done = subprocess.run([python, RUNNER], cwd=job, capture_output=True, check=False)
        except OSError as error:
            raise UserError(
                f"{python} cannot be run: {error.strerror}", fix="--host-python names a Python with onnxruntime"
            ) from error
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip().splitlines()
            ended = f"signal {-done.returncode}" if done.returncode < 0 else f"status {done.returncode}"
            raise UserError(
                f"{python} ended with {ended}: {said[-1] if said else 'nothing was said'}",
                fix="does its onnxruntime run anything else, and is there memory left?",
            )
        return {path.name: path.read_bytes() for path in job.iterdir() if path.is_file() and path.name not in files}


class Runner:
    """ONNX Runtime for Python on a device: what it is, and what its sessions do."""

    def __init__(self, link: "Link | Local", python: str, provider: Provider | None = None) -> None:
        """Raises UserError if the device cannot be reached, or lacks Python, the runtime or the provider."""
        self.host = link.host
        self.provider = provider
        self._link, self._python = link, python
        self.about, _ = self.job({"action": "about"}, {})
        self.version: str = self.about["runtime"]
        self.flags = tuple(sorted(flags_of_cpuinfo(self.about["cpuinfo"]) & RELEVANT_FLAGS))

    def job(
        self, job: Mapping[str, Any], files: Mapping[str, bytes], options: Mapping[str, str] | None = None
    ) -> tuple[dict[str, Any], dict[str, bytes]]:
        """Do a job on the device, by the provider with these options; its result, and the files that it wrote.

        Raises UserError, in the runtime's words, for what it refuses.
        """
        script = (resources.files("hirelc_deploy.verify") / "_runner.py").read_bytes()
        whole = dict(job) | {"provider": None if self.provider is None else self.provider.job(options or {})}
        back = self._link.python(self._python, {"job.json": json.dumps(whole).encode(), RUNNER: script, **files})
        result = json.loads(back["result.json"])
        if "missing" in result:
            raise UserError(
                f"{self.host} has no {result['missing']} for {result['python']}",
                fix=f"install it there: {result['python']} -m pip install onnxruntime numpy",
            )
        by = "ONNX Runtime" if self.provider is None else self.provider.called
        if "failed" in result:
            raise UserError(
                f"{self.host}, {by}: {result['failed']}",
                fix="does the model run on every example? token ids have to lie below its vocabulary",
            )
        if "refused" in result:
            fix = "is the runtime there at least the version that the target names?"
            if self.provider is not None:
                fix = self.provider.fix_for(result["refused"])
            raise UserError(f"{self.host}, {by}: {result['refused']}", fix=fix)
        return result, back

    def answers(self, requests: Sequence[Request]) -> list[Any]:
        """What `Machine.answers` says, by the CPU's provider."""
        files: dict[str, bytes] = {}
        asked: list[dict[str, Any]] = []
        for i, request in enumerate(requests):
            files[f"{i}.onnx"] = request.data
            if isinstance(request, Optimise):
                asked.append({"file": f"{i}.onnx"})
            else:
                files[f"{i}.npz"] = packed(request.inputs)
                asked.append({"file": f"{i}.onnx", "names": list(request.names), "inputs": f"{i}.npz"})
        result, back = self.job({"action": "answers", "requests": asked}, files)
        return [_answer(each, back) for each in result["answers"]]

    def timed(
        self,
        files: Sequence[tuple[bytes, Arrays]],
        *,
        threads: int,
        warmup: int,
        rounds: tuple[int, int],
        seconds: float = 0.0,
        optimise: bool,
        options: Mapping[str, str] | None = None,
    ) -> list[timing.Timing]:
        """Files, each on its own inputs, side by side, in at least and at most so many rounds, for so many seconds."""
        sent: dict[str, bytes] = {}
        for i, (file, inputs) in enumerate(files):
            sent |= {name_of(file): file, f"{i}.npz": packed(inputs)}
        job = {
            "action": "timed",
            "files": [{"file": name_of(file), "inputs": f"{i}.npz"} for i, (file, _) in enumerate(files)],
            "threads": threads,
            "optimise": optimise,
            "warmup": warmup,
            "rounds": rounds,
            "seconds": seconds,
            "visit_ms": timing.VISIT_MS,
            "pause_s": timing.pause_s(threads),
        }
        result, _ = self.job(job, sent, options)
        return [
            timing.Timing(tuple(timing.Visit(tuple(wall_ms), cpu_ms) for wall_ms, cpu_ms in visits))
            for visits in result["rounds"]
        ]


def name_of(file: bytes) -> str:
    """What a file is called on a device: by its bytes, since a provider knows the engines that it keeps by it."""
    return f"{sha256(file).hexdigest()[:16]}.onnx"


class Remote:
    """A device on which kernels are timed."""

    def __init__(self, link: Link, runtime: Runtime, *, threads: int, python: str) -> None:
        """Made by `connected`.  Raises UserError if the device cannot be reached or lacks what is needed."""
        self.runtime = runtime
        self._runner = Runner(link, python)
        self.version = self._runner.version
        self.where = Where(
            f"{runtime.name} {self.version}", self._runner.flags, self._runner.about["power_mode"], threads
        )

    def answers(self, requests: Sequence[Request]) -> list[Any]:
        return self._runner.answers(requests)

    def timed(self, files: Sequence[KernelFile], rounds: int) -> list[timing.Timing]:
        return self._runner.timed(
            [(file.data, file.inputs) for file in files],
            threads=self.where.threads,
            warmup=WARMUP_RUNS,
            rounds=(rounds, rounds),
            optimise=False,
        )


@contextmanager
def connected(host: str, runtime: Runtime, *, threads: int, python: str = "python3") -> Iterator[Remote]:
    """A device with the runtime for Python, until the end of the block.

    Raises UserError if it cannot be reached, if its key is not the known one, or if it lacks Python or the runtime.
    """
    with linked(host) as link:
        yield Remote(link, runtime, threads=threads, python=python)


@contextmanager
def reached(host: str | None) -> Iterator[Link | Local]:
    """A device that `ssh` reaches, or without one this machine; with a folder that is removed at the end."""
    if host is not None:
        with linked(host) as link:
            yield link
        return
    with tempfile.TemporaryDirectory(prefix="hirelc-deploy-") as folder:
        yield Local(Path(folder))


@contextmanager
def linked(host: str) -> Iterator[Link]:
    """A device, with a folder of its own there that is removed at the end.

    Raises UserError if it cannot be reached or if its key is not the known one.
    """
    if host.startswith("-"):
        raise UserError(f"{host!r} is no host", fix="write user@device, or a name of ~/.ssh/config")
    ssh = [*shlex.split(os.environ.get(SSH_VARIABLE, "ssh")), *OPTIONS]
    folder = attempts(lambda: _call(ssh, host, "mktemp -d", b""), host).decode().strip()
    try:
        yield Link(host, ssh, folder)
    finally:
        _clean(ssh, host, folder)


def _clean(ssh: Sequence[str], host: str, folder: str) -> None:
    """Remove the folder; a device that is gone keeps it in its temporary folder."""
    subprocess.run([*ssh, host, f"rm -rf {shlex.quote(folder)}"], capture_output=True, check=False)


def attempts(call: Callable[[], bytes], host: str, sleep: Callable[[float], None] = time.sleep) -> bytes:
    """What the call gives, tried again where the connection broke.  Raises UserError once that does not help."""
    for attempt in range(ATTEMPTS):
        try:
            return call()
        except LostError as lost:
            reason = str(lost)
            if attempt + 1 < ATTEMPTS:
                sleep(PAUSE_S * 2**attempt)
    raise UserError(
        f"the connection to {host} failed {ATTEMPTS} times: {reason}",
        fix="is the device on, and reachable? What was measured is kept: the same command goes on",
    )


def _call(ssh: Sequence[str], host: str, command: str, sent: bytes) -> bytes:
    """Run a command on the device.  Raises LostError for a broken connection, UserError for what will not mend."""
    try:
        done = subprocess.run([*ssh, host, command], input=sent, capture_output=True, check=False)
    except FileNotFoundError as error:
        raise UserError(f"{ssh[0]} is not installed here", fix="install OpenSSH's client") from error
    said = done.stderr.decode(errors="replace").strip()
    if done.returncode == 0:
        return done.stdout
    for words, what, fix in (*FINAL, *([NOT_LET_IN] if done.returncode == SSH_FAILED else [])):
        if words in said:
            name = host.rpartition("@")[2]
            raise UserError(what.format(host=host, name=name), fix=fix.format(host=host, name=name))
    last = said.splitlines()[-1] if said else f"status {done.returncode}"
    if done.returncode == SSH_FAILED:
        raise LostError(last)
    if done.returncode in (NOT_FOUND, NOT_EXECUTABLE):
        raise UserError(f"{host}: {last}", fix="it needs tar, and Python with onnxruntime and numpy (--host-python)")
    raise UserError(f"{host} failed: {last}", fix="is there room in its temporary folder, and tar?")


def _answer(each: Mapping[str, Any], back: Mapping[str, bytes]) -> Any:
    if "refused" in each:
        return NoKernelError(each["refused"])
    if "file" in each:
        return back[each["file"]]
    return {name: (tuple(shape), dtype) for name, (shape, dtype) in each["shapes"].items()}


def _tar(files: Mapping[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return packed.getvalue()


def _untar(packed: bytes) -> dict[str, bytes]:
    """Regular files by name; nothing is written to disk."""
    found = {}
    with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
        for entry in tar:
            file = tar.extractfile(entry) if entry.isfile() else None
            if file is not None:
                found[entry.name.removeprefix("./")] = file.read()
    return found
