"""Two machines on this one, as far as a program can tell: namespaces of Linux, joined by a cable.

Each has a network, a host name, process numbers, shared memory and a view of the file system of its
own, and an sshd. Ending its first process, the sshd, ends all that runs there.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

NAMESPACES = ("net", "uts", "mnt", "ipc", "pid")
CLONE_NEWNET = 0x40000000
TOOLS = {
    "ip": "iproute2",
    "unshare": "util-linux",
    "nsenter": "util-linux",
    "ssh": "openssh-client",
}
SSHD = "/usr/sbin/sshd"

# What a machine does when it is switched on. Its own place for models is /mnt; where the tests made
# the model there is nothing.
BOOT = """
set -e
hostname "$NAME"
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run && mkdir -p /run/sshd
mount --bind "$FOLDER/hosts" /etc/hosts
mount --bind "$FOLDER/ssh_config" /etc/ssh/ssh_config
mount -t tmpfs tmpfs /mnt && mkdir -p "/mnt/$NAME"
mount --bind "$MODEL" "/mnt/$NAME"
mount -t tmpfs tmpfs "$MODEL"
echo "model: /mnt/$NAME" > /mnt/serving.yaml
ip link set lo up
exec /usr/sbin/sshd -D -e -f "$FOLDER/sshd_config"
"""


def find_obstacle() -> str | None:
    """Why there can be no such machines here, if so."""
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    for tool, package in TOOLS.items():
        if shutil.which(tool) is None:
            return f"{tool} is missing: apt-get install {package}"
    if not Path(SSHD).exists():
        return "sshd is missing: apt-get install openssh-server"
    done = subprocess.run(["unshare", "--net", "--pid", "--fork", "true"], capture_output=True)
    return None if done.returncode == 0 else f"no namespaces here: {done.stderr.decode().strip()}"


class Host:
    """One of the machines."""

    def __init__(self, name: str, address: str, folder: Path, model: Path) -> None:
        self.name, self.address = name, address
        self._log = (folder / f"{name}.log").open("wb")
        self._keeper = subprocess.Popen(
            ["unshare", "--net", "--uts", "--mount", "--ipc", "--pid", "--fork", "--kill-child",
             "--mount-proc", "bash", "-c", BOOT],
            env=os.environ | {"NAME": name, "FOLDER": str(folder), "MODEL": str(model)},
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        deadline = time.monotonic() + 20.0
        while "Server listening" not in (folder / f"{name}.log").read_text():
            assert self._keeper.poll() is None and time.monotonic() < deadline, (
                folder / f"{name}.log"
            ).read_text()
            time.sleep(0.05)
        children = Path(f"/proc/{self._keeper.pid}/task/{self._keeper.pid}/children")
        self.pid = int(children.read_text().split()[0])

    def command(self, *words: str, folder: Path = Path("/")) -> list[str]:
        """How to run a command there from here."""
        flags = [f"--{'mount' if name == 'mnt' else name}" for name in NAMESPACES]
        return ["nsenter", "-t", str(self.pid), *flags, f"--wd={folder}", "--", *words]

    def run(self, *words: str) -> str:
        """Run a command there; what it printed."""
        done = subprocess.run(self.command(*words), capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def call(self, function: Any, *arguments: Any) -> Any:
        """Call a function in a thread whose new sockets belong to that machine's network."""
        outcome: list[Any] = []

        def run() -> None:
            with open(f"/proc/{self.pid}/ns/net") as network:
                libc = ctypes.CDLL(None, use_errno=True)
                assert libc.setns(network.fileno(), CLONE_NEWNET) == 0, os.strerror(
                    ctypes.get_errno()
                )
            try:
                outcome.append(function(*arguments))
            except BaseException as error:
                outcome.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        if isinstance(outcome[0], BaseException):
            raise outcome[0]
        return outcome[0]

    def processes(self) -> dict[int, str]:
        """Command lines of all processes there but the sshd that waits for connections."""
        namespace = os.readlink(f"/proc/{self.pid}/ns/pid")
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # ended while we looked
                if os.readlink(folder / "ns" / "pid") == namespace:
                    words = (folder / "cmdline").read_bytes().decode(errors="replace")
                    found[int(folder.name)] = words.replace("\0", " ")
        found.pop(self.pid, None)
        return found

    def switch_off(self) -> None:
        """End all that runs there."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self._keeper.wait()
        self._log.close()


def _write_keys(folder: Path, names: Sequence[str]) -> None:
    """Throw-away keys, and settings of ssh and sshd that use them."""
    for name in ("user_key", "host_key"):
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True
        )
    host_key = (folder / "host_key.pub").read_text()
    (folder / "known_hosts").write_text("".join(f"{name} {host_key}" for name in names))
    (folder / "ssh_config").write_text(
        f"Host *\n  IdentityFile {folder}/user_key\n  UserKnownHostsFile {folder}/known_hosts\n"
        "  BatchMode yes\n"
    )
    # As docs/deploy.md recommends: a session whose other side is silent ends after 15 s.
    (folder / "sshd_config").write_text(
        f"HostKey {folder}/host_key\nAuthorizedKeysFile {folder}/user_key.pub\nPidFile none\n"
        "UsePAM no\nPasswordAuthentication no\nStrictModes no\nPermitRootLogin yes\n"
        "ClientAliveInterval 5\nClientAliveCountMax 3\n"
    )


@contextlib.contextmanager
def two_hosts(folder: Path, model: Path) -> Iterator[tuple[Host, Host]]:
    """Switch on two machines, alpha and beta, with a cable between them."""
    addresses = {"alpha": "10.77.0.1", "beta": "10.77.0.2"}
    (folder / "hosts").write_text(
        "127.0.0.1 localhost\n"
        + "".join(f"{address} {name}\n" for name, address in addresses.items())
    )
    _write_keys(folder, list(addresses))
    with contextlib.ExitStack() as stack:
        hosts = []
        for name, address in addresses.items():
            hosts.append(Host(name, address, folder, model))
            stack.callback(hosts[-1].switch_off)
        ends = [word for host in hosts for word in ("name", "eth0", "netns", str(host.pid))]
        subprocess.run(
            ["ip", "link", "add", *ends[:4], "type", "veth", "peer", *ends[4:]], check=True
        )
        for host in hosts:
            host.run("ip", "address", "add", f"{host.address}/24", "dev", "eth0")
            host.run("ip", "link", "set", "eth0", "up")
        for host in hosts:
            _wait_for_carrier(host)
        yield hosts[0], hosts[1]


def _wait_for_carrier(host: Host) -> None:
    """The kernel says a second later that a cable is in, and MPI does without one that is not."""
    deadline = time.monotonic() + 10.0
    while host.run("ip", "-brief", "link", "show", "eth0").split()[1] != "UP":
        assert time.monotonic() < deadline, "no carrier on eth0"
        time.sleep(0.05)
