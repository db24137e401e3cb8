"""Several machines on one: hosts with their own network, processes, mounts and name, wired to one bridge. Linux, as root.

    bridge <address>.254 ── veth ── host h1, <address>.1 (eth0)
        services            └────── host h2, <address>.2 (eth0) ..

A host lives as long as its first process, which reads from a pipe that ends with us, however we end; the kernel then ends all other
processes of the host, and takes its network and its mounts away with the last. The bridge alone can be left behind, by a suite that was
killed: the next one removes it.
"""

from __future__ import annotations

import ipaddress
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

_BRIDGE = "tess"  # and the suite's process id
_ROOT = Path("/tmp")  # Ray's sockets need a short path
_SHARED_MEMORY = "512m"
# What a host runs first: it takes in those whose parents died, and ends with us.
_INIT = "import signal, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN); sys.stdin.buffer.read()"


def why_not() -> str | None:
    """Why hosts cannot be made here; None where they can."""
    if not sys.platform.startswith("linux"):
        return "hosts are Linux namespaces"
    if os.geteuid() != 0:
        return "namespaces of hosts need root"
    if missing := [tool for tool in ("ip", "unshare", "nsenter", "mount", "hostname") if shutil.which(tool) is None]:
        return f"{missing[0]} is not installed"
    probe = f"{_BRIDGE}t{os.getpid()}"
    tried = [["unshare", "--net", "--pid", "--mount", "--uts", "--fork", "true"], ["ip", "link", "add", probe, "type", "bridge"]]
    for command in tried:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            return f"`{' '.join(command)}` is refused: {done.stderr.strip()}"
    _call("ip", "link", "del", probe)
    return None


class Host:
    """A machine. `folder` is its own disk, which it sees at `home`, as every other host sees its own there."""

    def __init__(self, name: str, address: str, wire: str, folder: Path, home: Path) -> None:
        self.name, self.address, self.folder, self.home, self._wire = name, address, folder, home, wire
        self._popen = subprocess.Popen(
            [
                *("unshare", "--net", "--pid", "--mount", "--uts", "--ipc", "--fork", "--kill-child", "--mount-proc"),
                *(sys.executable, "-S", "-E", "-c", _INIT),
            ],
            stdin=subprocess.PIPE,
        )
        self.init = _first_child(self._popen)

    # Commands

    def enter(self, command: Sequence[str]) -> list[str]:
        """`command` as it is called from outside to run in this host."""
        return ["nsenter", "-t", str(self.init), "--net", "--pid", "--mount", "--uts", "--ipc", *command]

    def call(self, *command: str) -> str:
        return _call(*self.enter(command))

    def start(self, command: Sequence[str], log: Path, env: Mapping[str, str]) -> subprocess.Popen[bytes]:
        """Start `command` in this host, with its output in `log`."""
        with log.open("ab") as out:
            return subprocess.Popen(self.enter(command), stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=dict(env))

    # Processes

    def processes(self, word: str = "") -> list[psutil.Process]:
        """Those that run here and have `word` in their command line, but for the first."""
        ours, found = os.readlink(f"/proc/{self.init}/ns/pid"), []
        for process in psutil.process_iter():
            with suppress(OSError, psutil.Error):
                is_ours = process.pid != self.init and os.readlink(f"/proc/{process.pid}/ns/pid") == ours
                if is_ours and word in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def signal(self, number: signal.Signals, word: str = "") -> int:
        """Send a signal to the processes with `word` in their command line; gives how many there were."""
        found = self.processes(word)
        for process in found:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)
        return len(found)

    def kill(self, word: str = "") -> int:
        """kill -9, and wait until they are gone."""
        found = self.processes(word)
        for process in found:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        _, alive = psutil.wait_procs(found, timeout=20)
        assert not alive, f"{alive[0]} outlives kill -9"
        return len(found)

    # The wire

    def cut(self) -> None:
        """Pull the cable."""
        _call("ip", "link", "set", self._wire, "down")

    def mend(self) -> None:
        _call("ip", "link", "set", self._wire, "up")

    def end(self) -> None:
        assert self._popen.stdin is not None, "made with a pipe"
        self._popen.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._popen.wait(10)
        self._popen.kill()
        self._popen.wait()


class Network:
    """The hosts, by name, and where services that are on none of them listen: `address`."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.folder, self.bridge = folder, f"{_BRIDGE}{os.getpid()}"
        subnet = _free_subnet()
        addresses = dict(zip(names, subnet.hosts(), strict=False))
        self.address = str(subnet.broadcast_address - 1)
        self.hosts: dict[str, Host] = {}
        _call("ip", "link", "add", self.bridge, "type", "bridge")
        _call("ip", "address", "add", f"{self.address}/{subnet.prefixlen}", "dev", self.bridge)
        _call("ip", "link", "set", self.bridge, "up")
        (folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in addresses.items()))
        (folder / "own").mkdir()
        for number, (name, address) in enumerate(addresses.items()):
            (folder / name).mkdir()
            wire = f"{self.bridge}{chr(ord('a') + number)}"
            host = self.hosts[name] = Host(name, str(address), wire, folder / name, folder / "own")
            _call("ip", "link", "add", wire, "type", "veth", "peer", "name", "eth0", "netns", str(host.init))
            _call("ip", "link", "set", wire, "master", self.bridge, "up")
            for command in (
                f"ip address add {address}/{subnet.prefixlen} dev eth0",
                "ip link set lo up",
                "ip link set eth0 up",
                f"ip route add default via {self.address}",
                f"hostname {name}",
                f"mount --bind {folder / 'hosts'} /etc/hosts",
                f"mount --bind {folder / name} {host.home}",
                f"mount -t tmpfs -o size={_SHARED_MEMORY} tmpfs /dev/shm",
            ):
                host.call(*command.split())

    def end(self) -> None:
        for host in self.hosts.values():
            host.end()
        _call("ip", "link", "del", self.bridge)


@contextmanager
def network(names: Sequence[str]) -> Iterator[Network]:
    """Hosts of these names, until the block ends."""
    sweep()
    folder = _ROOT / f"{_BRIDGE}{os.getpid()}"
    folder.mkdir(mode=0o700)
    made: Network | None = None
    try:
        made = Network(folder, names)
        yield made
    finally:
        if made is not None:
            made.end()
        else:
            subprocess.run(["ip", "link", "del", f"{_BRIDGE}{os.getpid()}"], capture_output=True, check=False)
        shutil.rmtree(folder, ignore_errors=True)


def sweep() -> None:
    """Remove bridges and folders of suites that are no longer there."""
    for path in [*Path("/sys/class/net").glob(f"{_BRIDGE}*"), *_ROOT.glob(f"{_BRIDGE}*")]:
        owner = path.name.removeprefix(_BRIDGE)
        if not owner.isdigit() or psutil.pid_exists(int(owner)):
            continue
        if path.parent == _ROOT:
            shutil.rmtree(path, ignore_errors=True)
        else:
            subprocess.run(["ip", "link", "del", path.name], capture_output=True, check=False)


def _free_subnet() -> ipaddress.IPv4Network:
    """A network of ours that this machine has no address in."""
    taken = [
        ipaddress.ip_network(f"{each['local']}/{each['prefixlen']}", strict=False)
        for link in json.loads(_call("ip", "-json", "-4", "address"))
        for each in link.get("addr_info", [])
    ]
    for n in range(os.getpid(), os.getpid() + 1000):
        subnet = ipaddress.ip_network(f"10.{64 + (n >> 8) % 64}.{n % 256}.0/24")
        if not any(subnet.overlaps(other) for other in taken):
            assert isinstance(subnet, ipaddress.IPv4Network), "of four numbers"
            return subnet
    raise RuntimeError("no free network in 10.64.0.0/10")


def _first_child(process: subprocess.Popen[bytes]) -> int:
    deadline = time.monotonic() + 10
    while not (children := psutil.Process(process.pid).children()) or _INIT not in children[0].cmdline():  # its namespaces are made first
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError("a host did not come up")
        time.sleep(0.01)
    return children[0].pid


def _call(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"`{' '.join(command)}` failed: {done.stderr.strip()}")
    return done.stdout
