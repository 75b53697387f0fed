"""Does what an engine would do with a target of docker/Dockerfile, where none can run: in a Debian
root made by debootstrap, chroot for each step, namespaces for a container.

Needs root and debootstrap. What a site hands to `docker build` as build arguments and mirrors comes
from pip's settings on this machine.
"""

from __future__ import annotations

import contextlib
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.deploy.dockerfile import list_context, list_steps, read_pairs, read_stages, read_words

ROOT = Path(__file__).parents[2]
MIRROR = "http://deb.debian.org/debian"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"  # as engines have it
MOUNTS = """
set -e
mount --make-rprivate /
mount -t proc proc "$IMAGE/proc"
mount -t sysfs -o ro sysfs "$IMAGE/sys" 2>/dev/null || mount --rbind -o ro /sys "$IMAGE/sys"
mount -t tmpfs tmpfs "$IMAGE/dev"
mkdir "$IMAGE/dev/shm" "$IMAGE/dev/pts"
mount -t tmpfs -o size=16g,mode=1777 tmpfs "$IMAGE/dev/shm"
mount --rbind /dev/pts "$IMAGE/dev/pts"
for device in null zero full random urandom tty; do
    touch "$IMAGE/dev/$device" && mount --bind "/dev/$device" "$IMAGE/dev/$device"
done
ln -s /proc/self/fd "$IMAGE/dev/fd"
ln -s pts/ptmx "$IMAGE/dev/ptmx"
for pair in $BINDS; do
    mkdir -p "$IMAGE/${pair#*:}"
    mount --bind "${pair%%:*}" "$IMAGE/${pair#*:}"
done
ip link set lo up
"""


def find_obstacle() -> str | None:
    """Why no image can be made here, if so."""
    if os.geteuid() != 0:
        return "needs root, to chroot"
    if shutil.which("debootstrap") is None:
        return "debootstrap is missing: apt-get install debootstrap"
    return None


def pip_settings() -> tuple[dict[str, str], list[Path]]:
    """pip's settings on this machine as variables, and the folders that they name."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout
    settings = {
        f"PIP_{name.replace('-', '_').upper()}": value
        for name, value in re.findall(r"^(?:global|install)\.([\w-]+)='(.*)'$", listed, re.M)
    }
    settings |= {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
    settings.pop("PIP_CERT", None)  # handled below, since the image makes its own file of this name
    words = [word.removeprefix("file://") for value in settings.values() for word in value.split()]
    folders = {Path(word) for word in words if word.startswith("/") and Path(word).is_dir()}
    # An index's pages point to files beside its own folder.
    return settings, sorted({path.parent if path.name == "simple" else path for path in folders})


def torch_index() -> str:
    """PyTorch's CPU index, or PyPI where that cannot be reached."""
    url = "https://download.pytorch.org/whl/cpu"
    with contextlib.suppress(OSError):
        urllib.request.urlopen(f"{url}/torch/", timeout=5).close()
        return url
    return "https://pypi.org/simple"


class Image:
    """A folder that holds what an image would, and what the Dockerfile says about running it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment: dict[str, str] = {}
        self.user = "0"
        self.work_folder = "/"
        self.words: dict[str, list[str]] = {}

    def build(self, target: str, say: Callable[[str], None]) -> None:
        """Execute the steps of a target, in order."""
        base, steps = list_steps(read_stages(ROOT / "docker" / "Dockerfile"), target)
        suite = re.match(r"debian:(\w+)-", base)[1]
        say(f"FROM {base}: debootstrap {suite}")
        command = ["debootstrap", "--variant=minbase", suite, str(self.folder), MIRROR]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        # Like the official image: with security fixes, and no package lists.
        (self.folder / "etc/apt/sources.list").write_text(
            f"deb {MIRROR} {suite} main\ndeb {MIRROR} {suite}-updates main\n"
            f"deb {MIRROR}-security {suite}-security main\n"
        )
        # These two an engine puts into every container.
        shutil.copy("/etc/resolv.conf", self.folder / "etc/resolv.conf")
        (self.folder / "etc/hosts").write_text("127.0.0.1 localhost\n::1 localhost\n")
        arguments = {"TORCH_INDEX_URL": torch_index()}
        settings, binds = pip_settings()
        certificates = Path("/etc/ssl/certs/ca-certificates.crt")
        if certificates.exists():
            shutil.copy(certificates, self.folder / "tmp/site.crt")
            settings |= {"PIP_CERT": "/tmp/site.crt"}
        known: dict[str, str] = {}
        for step in steps:
            started = time.monotonic()
            if step.word == "ARG":
                name, _, default = step.text.partition("=")
                known[name] = arguments.get(name, default)
            elif step.word == "ENV":
                self.environment |= read_pairs(step.text)
            elif step.word == "USER":
                self.user = step.text
            elif step.word == "WORKDIR":
                self.work_folder = step.text
                (self.folder / step.text[1:]).mkdir(parents=True, exist_ok=True)
            elif step.word == "COPY":
                self._copy(step.text)
            elif step.word == "RUN":
                process = self.start(
                    ["/bin/sh", "-c", step.text], variables=known | settings, binds=binds,
                    own_network=False, stdout=subprocess.DEVNULL,
                )  # fmt: skip
                assert process.wait() == 0, f"this step failed: {step.text}"
            elif step.word == "HEALTHCHECK":
                self.words["HEALTHCHECK"] = read_words(step.text.partition("CMD ")[2])
            elif step.word in ("ENTRYPOINT", "CMD"):
                self.words[step.word] = read_words(step.text)
            say(f"{step.word} {step.text[:60]} ({time.monotonic() - started:.0f} s)")
        (self.folder / "tmp/site.crt").unlink(missing_ok=True)

    def _copy(self, text: str) -> None:
        *flags, source, target = text.split()
        owner = 0
        for flag in flags:
            name = re.fullmatch(r"--chown=(\w+):\1", flag)[1]
            users = (self.folder / "etc/passwd").read_text()
            owner = int(re.search(rf"^{name}:[^:]*:(\d+)", users, re.M)[1])
        files = list_context(ROOT)
        if source != ".":
            files = [path for path in files if str(path).startswith(source)]
        assert files, f"COPY {source} finds nothing"
        for path in files:
            inner = path if source == "." else path.relative_to(source.rstrip("/"))
            name = target[1:] + (path.name if inner == Path(".") else str(inner))
            place = self.folder / name
            for folder in reversed([*place.relative_to(self.folder).parents][:-1]):
                if not (self.folder / folder).exists():
                    (self.folder / folder).mkdir()
                    os.chown(self.folder / folder, owner, owner)
            shutil.copy(ROOT / path, place)
            os.chown(place, owner, owner)

    def start(
        self,
        words: Sequence[str],
        *,
        user: str | None = None,
        variables: dict[str, str] | None = None,
        binds: Sequence[Path] = (),
        mounts: dict[Path, str] | None = None,
        own_network: bool = True,
        has_terminal: bool = False,
        **options: Any,
    ) -> subprocess.Popen[bytes]:
        """Start a process in the image, first of a container of its own."""
        user = self.user if user is None else user
        pairs = [f"{path}:{path}" for path in binds]
        pairs += [f"{path}:{place}" for path, place in (mounts or {}).items()]
        enter = self._enter(words, user, variables or {})
        network = ["--net"] if own_network else []
        if has_terminal:
            enter = ["setsid", "--ctty", *enter]
        return subprocess.Popen(
            ["unshare", "--mount", "--ipc", "--uts", "--pid", "--fork", "--kill-child", *network,
             "bash", "-c", MOUNTS + 'exec "$@"', "bash", *enter],
            env=os.environ | {"IMAGE": str(self.folder), "BINDS": " ".join(pairs)},
            **options,
        )  # fmt: skip

    def _enter(self, words: Sequence[str], user: str, variables: dict[str, str]) -> list[str]:
        """The command that changes root and user, as an engine does before the first process."""
        home = "/root" if user == "0" else "/home/llm"
        pairs = {"PATH": PATH, "HOME": home} | self.environment | variables
        environment = [f"{name}={value}" for name, value in pairs.items()]
        return [
            *("chroot", f"--userspec={user}:{user}", "--groups=", str(self.folder)),
            *("env", "-i", f"--chdir={self.work_folder}", *environment, *words),
        ]

    def container(self, *command: str, **options: Any) -> Container:
        """What `docker run -itd` does, with a network of its own for the sake of this machine."""
        return Container(
            self, [*self.words["ENTRYPOINT"], *(command or self.words["CMD"])], options
        )


class Container:
    """A running container with a terminal, whose output is kept."""

    def __init__(self, image: Image, words: Sequence[str], options: dict[str, Any]) -> None:
        self._image = image
        self._pieces: list[str] = []
        ours, theirs = pty.openpty()
        self._process = image.start(
            words,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            has_terminal=True,
            **options,
        )
        os.close(theirs)
        threading.Thread(target=self._read, args=(ours,), daemon=True).start()
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        self._wait_for(lambda: children.read_text().strip(), 10.0)
        self.pid = int(children.read_text())
        comm = Path(f"/proc/{self.pid}/comm")
        self._wait_for(lambda: comm.read_text().strip() == "tini", 20.0)

    def _read(self, terminal: int) -> None:
        with contextlib.suppress(OSError):  # the last process has closed it
            while piece := os.read(terminal, 65536):
                self._pieces.append(piece.decode(errors="replace"))
        os.close(terminal)

    @property
    def log(self) -> str:
        """`docker logs`."""
        return "".join(self._pieces)

    def _wait_for(self, check: Callable[[], Any], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not check():
            assert self._process.poll() is None, f"it ended: {self.log}"
            assert time.monotonic() < deadline, f"not within {seconds} s: {self.log}"
            time.sleep(0.1)

    def exec(self, *words: str, seconds: float = 600.0) -> subprocess.CompletedProcess[str]:
        """`docker exec`: run to its end."""
        return subprocess.run(
            self._exec_words(words), capture_output=True, text=True, timeout=seconds
        )

    def exec_detached(self, *words: str, log: Path) -> subprocess.Popen[bytes]:
        """`docker exec -d`, its output in a file."""
        with log.open("wb") as file:
            return subprocess.Popen(self._exec_words(words), stdout=file, stderr=file)

    def _exec_words(self, words: Sequence[str]) -> list[str]:
        spaces = ["--mount", "--ipc", "--uts", "--pid", "--net"]
        inside = self._image._enter(words, self._image.user, {})
        return ["nsenter", "-t", str(self.pid), *spaces, "--", *inside]

    def users(self) -> dict[str, int]:
        """The processes inside and whom they belong to."""
        space = os.readlink(f"/proc/{self.pid}/ns/pid")
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # ended while we looked
                if os.readlink(folder / "ns/pid") == space:
                    words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
                    found[" ".join(words[:3])] = folder.stat().st_uid
        return found

    def wait_healthy(self, seconds: float = 900.0) -> None:
        """Wait until the image's own health check says so."""
        self._wait_for(
            lambda: self.exec(*self._image.words["HEALTHCHECK"]).returncode == 0, seconds
        )

    def stop(self, seconds: float) -> int:
        """`docker stop`: SIGTERM to the first process; its exit code."""
        os.kill(self.pid, signal.SIGTERM)
        return self._process.wait(seconds)

    def kill(self) -> None:
        """`docker rm --force`."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self._process.wait()
