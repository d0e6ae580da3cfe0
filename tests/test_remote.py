"""`profile --host` against a real sshd on this machine, which a test starts and stops with keys of its own.

Where openssh-server is not installed, what is not about ssh itself runs against a stand-in, which does on this machine
what sshd would have done on the device.  Only the checks of host keys need the real one.
"""

import getpass
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from hirelc_deploy import cli
from hirelc_deploy.errors import ExitStatus, UserError
from hirelc_deploy.exporters.onnxruntime import RUNTIME
from hirelc_deploy.profiles._table import read_table
from hirelc_deploy.verify import profiling, remote
from hirelc_deploy.verify.remote import ATTEMPTS, SSH_VARIABLE, LostError, attempts

SSHD = shutil.which("sshd") or "/usr/sbin/sshd"
HAS_SSHD = Path(SSHD).exists() and shutil.which("ssh") is not None
needs_sshd = pytest.mark.skipif(not HAS_SSHD, reason="host keys are checked by openssh, which is not installed")

STAND_IN = """
import os, subprocess, sys
if "-p" in sys.argv:  # another port, where nobody listens
    print("ssh: connect to host device: Connection refused", file=sys.stderr)
    sys.exit(255)
command = sys.argv[-1]  # behind options and the host
environment = {**os.environ, "TMPDIR": {folder!r}, "PATH": {folder!r} + "/bin:" + os.environ["PATH"]}
sys.exit(subprocess.run(["sh", "-c", command], env=environment).returncode)
"""

SHAPES = """op,attributes,operands,compute
Conv,"pads=1,1,1,1",x:1x16x6x6 w:16x16x3x3 w:16,fp32
Conv,"pads=1,1,1,1",x:1x16x6x6 w:16x16x3x3 w:16,int8
MatMul,,x:1x9x32 w:32x16,int8_dynamic
ReorderOutput,,x:1x16x6x6,fp32
Erf,,x:1x9,int8
"""

CUTTING = """
import pathlib, subprocess, sys
count = pathlib.Path({count!r})
number = int(count.read_text()) + 1 if count.exists() else 1
count.write_text(str(number))
if number in {cut!r}:
    sent = sys.stdin.buffer.read()
    process = subprocess.Popen([*{ssh!r}, *sys.argv[1:]], stdin=subprocess.PIPE)
    process.stdin.write(sent[: len(sent) // 2])
    process.kill()
    print("Connection to device closed by remote host.", file=sys.stderr)
    sys.exit(255)
sys.exit(subprocess.run([*{ssh!r}, *sys.argv[1:]], stdin=sys.stdin).returncode)
"""
"""An ssh whose connection is cut in the middle of what it sends, on some of its calls."""


@dataclass(frozen=True)
class Device:
    """A loopback sshd or its stand-in, and how to reach it."""

    folder: Path
    """Where it keeps what is temporary, among other things."""

    @property
    def ssh(self) -> list[str]:
        if HAS_SSHD:
            return ["ssh", "-F", str(self.config)]
        return [sys.executable, str(self.folder / "stand-in.py")]

    @property
    def config(self) -> Path:
        return self.folder / "config"

    def configure(self, port: int, known_hosts: str) -> None:
        self.config.write_text(
            f"Host device\n HostName 127.0.0.1\n Port {port}\n User {getpass.getuser()}\n"
            f" IdentityFile {self.folder / 'user'}\n IdentitiesOnly yes\n"
            f" UserKnownHostsFile {self.folder / known_hosts}\n GlobalKnownHostsFile none\n"
        )


def _key(path: Path) -> str:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(path)], check=True)
    return path.with_suffix(".pub").read_text().strip()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Device]:
    folder = tmp_path_factory.mktemp("sshd")
    folder.chmod(0o700)
    if not HAS_SSHD:
        (folder / "stand-in.py").write_text(STAND_IN.replace("{folder!r}", repr(str(folder))))
        yield Device(folder)
        return
    host_key, user_key, other_key = (_key(folder / name) for name in ("host", "user", "other"))
    port = _free_port()
    (folder / "authorized").write_text(f"{user_key}\n")
    (folder / "authorized").chmod(0o600)
    address = f"[127.0.0.1]:{port}"
    (folder / "known").write_text(f"{address} {host_key}\n")
    (folder / "changed").write_text(f"{address} {other_key}\n")
    (folder / "empty").write_text("")
    (folder / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder / 'host'}\nPidFile none\nUsePAM no\n"
        f"AuthorizedKeysFile {folder / 'authorized'}\nStrictModes no\nPasswordAuthentication no\n"
        "KbdInteractiveAuthentication no\nPermitRootLogin yes\n"
        f"SetEnv TMPDIR={folder} PATH={folder / 'bin'}:{os.environ['PATH']}\n"
    )
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # where sshd keeps what has no privileges
    server = subprocess.Popen([SSHD, "-D", "-e", "-f", str(folder / "sshd_config")], stderr=subprocess.DEVNULL)
    device = Device(folder)
    device.configure(port, "known")
    try:
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        yield device
    finally:
        server.terminate()
        server.wait()


@pytest.fixture
def device(sshd: Device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Device:
    monkeypatch.setenv(SSH_VARIABLE, shlex.join(sshd.ssh))
    for name, value in (("ROUNDS", 3), ("MORE_ROUNDS", 3), ("RUN_US", 20.0)):
        monkeypatch.setattr(profiling, name, value)
    monkeypatch.setattr(remote, "PAUSE_S", 0.0)
    (tmp_path / "shapes.csv").write_text(SHAPES)
    return sshd


def port_of(device: Device) -> int:
    return int(device.config.read_text().split("Port ")[1].split()[0])


def profile(folder: Path, table: str, *arguments: str, python: str = sys.executable) -> int:
    """The device's Python is the one that runs this test: it has the runtime."""
    return cli.main(
        [
            *("profile", "--target", "host", "--shapes", str(folder / "shapes.csv")),
            *("--table", str(folder / table), "--host-python", python, *arguments),
        ]
    )


def test_a_device_gives_the_table_that_this_machine_gives(device: Device, tmp_path: Path) -> None:
    assert profile(tmp_path, "here.csv") == ExitStatus.OK
    assert profile(tmp_path, "there.csv", "--host", "device") == ExitStatus.OK
    here, there = ({row.key: row for row in read_table(tmp_path / f"{name}.csv")} for name in ("here", "there"))
    assert here.keys() == there.keys()
    assert len(here) == 4 + 1  # Erf has no integer kernel; and the anchor
    for key, row in there.items():
        assert (row.runtime, row.flags) == (here[key].runtime, here[key].flags)
        assert 0.2 < row.p50_us / here[key].p50_us < 5  # measured in a moment, on a busy machine
    assert not list(device.folder.glob("tmp.*")), "the folder on the device is left behind"


def test_a_connection_that_is_cut_loses_nothing(
    device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrapper, count = tmp_path / "cutting.py", tmp_path / "count"
    wrapper.write_text(CUTTING.format(count=str(count), cut={2, 4, 5}, ssh=device.ssh))
    monkeypatch.setenv(SSH_VARIABLE, f"{sys.executable} {wrapper}")
    assert profile(tmp_path, "cut.csv", "--host", "device") == ExitStatus.OK
    assert len(read_table(tmp_path / "cut.csv")) == 5
    assert int(count.read_text()) > 6


def test_a_device_that_stays_away_keeps_the_table_and_the_same_command_goes_on(
    device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(profiling, "BATCH", 2)
    wrapper, count = tmp_path / "cutting.py", tmp_path / "count"
    # the folder, the device, and what one batch asks: from then on it is gone
    wrapper.write_text(CUTTING.format(count=str(count), cut=set(range(8, 99)), ssh=device.ssh))
    monkeypatch.setenv(SSH_VARIABLE, f"{sys.executable} {wrapper}")
    assert profile(tmp_path, "away.csv", "--host", "device") == ExitStatus.USER_ERROR
    assert f"failed {ATTEMPTS} times" in capsys.readouterr().err
    kept = read_table(tmp_path / "away.csv")
    assert 0 < len(kept) < 5
    monkeypatch.setenv(SSH_VARIABLE, shlex.join(device.ssh))
    assert profile(tmp_path, "away.csv", "--host", "device") == ExitStatus.OK
    whole = read_table(tmp_path / "away.csv")
    assert len(whole) == 5
    assert [row for row in whole if row in kept] == kept


@needs_sshd
@pytest.mark.parametrize(
    ("known_hosts", "message"),
    [("changed", "another key than the known one"), ("empty", "the key of device is not known")],
)
def test_host_keys_are_never_skipped(
    known_hosts: str, message: str, device: Device, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    device.configure(port_of(device), known_hosts)
    try:
        assert profile(tmp_path, "table.csv", "--host", "device") == ExitStatus.USER_ERROR
    finally:
        device.configure(port_of(device), "known")
    assert message in capsys.readouterr().err
    assert not (tmp_path / "table.csv").exists()


@pytest.mark.parametrize(
    ("stand_in", "message"),
    [
        ("raise ImportError(name='onnxruntime')", "device has no onnxruntime for"),
        (
            "__version__, get_available_providers = '1.9.0', list",
            "device has onnxruntime 1.9.0, and host begins with 1.16",
        ),
    ],
)
def test_a_device_without_the_right_runtime_is_told(
    stand_in: str, message: str, device: Device, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "onnxruntime.py").write_text(stand_in)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    assert profile(tmp_path, "table.csv", "--host", "device", python=str(python)) == ExitStatus.USER_ERROR
    assert message in capsys.readouterr().err


def test_a_device_without_python_is_told(device: Device, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert profile(tmp_path, "table.csv", "--host", "device", python="no-such-python") == ExitStatus.USER_ERROR
    error = capsys.readouterr().err
    assert "no-such-python" in error
    assert "--host-python" in error


@pytest.mark.skipif(shutil.which("ssh") is None, reason="openssh-client is not installed")
def test_a_host_that_does_not_exist_is_told_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "shapes.csv").write_text(SHAPES)
    assert profile(tmp_path, "table.csv", "--host", "nobody@no-such-host.invalid") == ExitStatus.USER_ERROR
    assert "there is no host 'nobody@no-such-host.invalid'" in capsys.readouterr().err


def test_an_option_is_no_host() -> None:
    with pytest.raises(UserError, match="is no host"), remote.connected("-oProxyCommand=true", RUNTIME, threads=1):
        pass


@pytest.mark.parametrize(
    ("status", "said"), [(255, "does not let you in"), (126, "--host-python"), (1, "Permission denied")]
)
def test_who_refuses_permission_is_told_apart(status: int, said: str, tmp_path: Path) -> None:
    """A login is refused by ssh itself, a file by the device's shell or a program there."""
    words = f"import sys; print('mktemp: /opt: Permission denied', file=sys.stderr); sys.exit({status})"
    ssh = tmp_path / "ssh.py"
    ssh.write_text(words)
    with pytest.raises(UserError) as refused:
        remote._call([sys.executable, str(ssh)], "device", "true", b"")
    assert said in f"{refused.value} {refused.value.fix}"


def test_each_attempt_waits_longer_than_the_last() -> None:
    waited: list[float] = []

    def lost() -> bytes:
        raise LostError("Connection reset")

    with pytest.raises(UserError, match="failed 4 times: Connection reset"):
        attempts(lost, "device", waited.append)
    assert len(waited) == ATTEMPTS - 1
    assert waited == sorted(set(waited))
