"""Small virtual machines on one network: an NFS server with a disk of its own, and clients, each one QEMU process.

A guest boots Debian's kernel on a read-only image that all of them share; what it runs comes as a tar on a second disk.
Commands go through a virtio serial port to `agent.py`. Each client has a cable of its own to the server, so that one
which is stopped or gone does not hold up the others.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
SUITE, PYTHON = "bookworm", "3.11"  # the Debian of the guests and its Python
PACKAGES = "linux-image-cloud-amd64 nfs-kernel-server nfs-common rpcbind python3 iproute2 kmod e2fsprogs"
EXPORT, STORE = "/srv/export", "/store"  # on the server, and where a client mounts it
LEASE = 10  # seconds of the server's own leases (locks, delegations) and of its grace period after a reboot

# Process 1 of every guest, in the image; the image is read-only, and what has to be written lies in memory.
INIT = """#!/bin/sh
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
mount -t tmpfs tmpfs /project
modprobe virtio_blk
tar -x -C /project -f /dev/vdb
exec sh /project/init
"""

# How it goes on, packed with the project.
BOOT = f"""
for folder in /tmp /run {STORE} /var/lib/nfs; do mount -t tmpfs -o mode=755 tmpfs $folder; done
mkdir -p /run/sendsigs.omit.d /run/rpcbind; chmod 1777 /tmp
modprobe -a virtio_net virtio_console
ip link set lo up
until ls /dev/vport*p1 >/dev/null 2>&1; do sleep .1; done
exec python3 /project/tests/faults/nfs/agent.py /dev/vport*p1
"""

SERVE = f"""set -e
hostname server
blkid /dev/vdc >/dev/null || mkfs.ext4 -q /dev/vdc
mount /dev/vdc /srv
mkdir -p {EXPORT} /srv/nfs/sm /srv/nfs/sm.bak /srv/nfs/nfsdcld /srv/nfs/v4recovery
chown -R statd /srv/nfs/sm /srv/nfs/sm.bak
mount --bind /srv/nfs /var/lib/nfs
: >/var/lib/nfs/etab; : >/var/lib/nfs/rmtab
mkdir -p /var/lib/nfs/rpc_pipefs; mount -t rpc_pipefs rpc_pipefs /var/lib/nfs/rpc_pipefs
modprobe lockd nlm_grace_period={LEASE}; modprobe nfsd
mount -t nfsd nfsd /proc/fs/nfsd
rpcbind -w; nfsdcld; rpc.statd
exportfs -o rw,sync,no_subtree_check,no_root_squash,fsid=0 '*:{EXPORT}'
rpc.nfsd -G {LEASE} -L {LEASE} 8; rpc.mountd; sm-notify -f
"""


def accelerator() -> list[str]:
    """QEMU's own: KVM where the processor has it for us, else emulation, which takes several times as long."""
    # Where KVM itself is emulated (/dev/kvm without vmx or svm), Debian's kernel does not boot.
    flags = Path("/proc/cpuinfo").read_text().split()
    kvm = os.access("/dev/kvm", os.R_OK | os.W_OK) and bool({"vmx", "svm"} & set(flags))
    return ["-accel", "kvm", "-cpu", "host"] if kvm else ["-accel", "tcg,thread=multi", "-cpu", "max"]


class Missing(Exception):
    """Something that the guests need is not on this machine."""


def needs() -> None:
    """`Missing` where guests cannot be made or run, saying what to do."""
    packages = {"qemu-system-x86_64": "qemu-system-x86", "mmdebstrap": "mmdebstrap", "tar2sqfs": "squashfs-tools-ng"}
    absent = [package for command, package in packages.items() if shutil.which(command) is None]
    if absent:
        raise Missing(f"missing here; as root: apt-get install --no-install-recommends {' '.join(absent)}")


def image(cache: Path) -> Path:
    """The folder in `cache` with the guests' kernel, initrd and root, made on first use: minutes, 200 MB, network."""
    cache = cache.resolve() / "guests"
    recipe = "\n".join([SUITE, PACKAGES, INIT])
    made = cache / "recipe"
    if made.exists() and made.read_text() == recipe:
        return cache
    print(f"making the guests' image in {cache}", file=sys.stderr, flush=True)
    shutil.rmtree(cache, ignore_errors=True)
    (cache / "python").mkdir(parents=True)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps"]
    pip += ["--target", str(cache / "python"), "-c", str(ROOT / "constraints.txt")]
    binary = ["--python-version", PYTHON, "--only-binary=:all:"]
    for glibc in ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64"):
        binary += ["--platform", glibc]
    (cache / "guest-init").write_text(INIT)
    (cache / "guest-init").chmod(0o755)
    _made([*pip, *binary, "numpy", "pyyaml"])
    _made([*pip, "fastargs", "terminaltables", "tqdm"])  # plain Python, fit for any
    modules = "usr/share/initramfs-tools/modules.d"
    _made(
        ["mmdebstrap", "--variant=minbase", "--format=squashfs", f"--include={PACKAGES.replace(' ', ',')}"]
        + [f"--dpkgopt=path-exclude=/usr/share/{what}/*" for what in ("doc", "man", "locale")]
        + [f"--essential-hook=mkdir -p $1/{modules}; echo squashfs >$1/{modules}/guests"]
        + [f"--customize-hook=copy-in {cache}/python /opt", f"--customize-hook=copy-in {cache}/guest-init /"]
        + [f"--customize-hook=mkdir -p $1/project $1{STORE}; cd $1/boot; mv vmlinuz-* kernel; mv initrd.img-* initrd"]
        + [f"--customize-hook=copy-out /boot/kernel /boot/initrd {cache}", SUITE, str(cache / "root.squashfs")]
    )
    made.write_text(recipe)
    return cache


def _made(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise Missing(f"the guests' image could not be made: {command[0]} ended with:\n{done.stderr[-2000:]}")


class Call(Future[dict[str, Any]]):
    """A command that runs in a guest; its result is {rc, out, err}."""

    number = 0


class Guest:
    """One virtual machine. `run` executes a shell command in it; `start` does so in the background."""

    def __init__(self, name: str, folder: Path, cache: Path, cables: list[tuple[str, str]], disk: bool = False):
        self.name, self.folder = name, folder
        self._cables, self._disk, self._cache = cables, disk, cache
        self._calls: dict[int, Call] = {}
        self._number = 0
        self._write = threading.Lock()
        self.ready = threading.Event()
        self._boot()

    def _boot(self) -> None:
        qemu = ["qemu-system-x86_64", *accelerator(), "-m", "768", "-smp", "1", "-nodefaults"]
        qemu += ["-display", "none", "-no-user-config", "-kernel", f"{self._cache}/kernel"]
        qemu += ["-initrd", f"{self._cache}/initrd", "-serial", f"file:{self.folder}/{self.name}.console"]
        qemu += [
            "-append",
            "root=/dev/vda ro console=ttyS0 init=/guest-init panic=1 quiet net.ifnames=0 random.trust_cpu=on",
        ]
        qemu += ["-drive", f"file={self._cache}/root.squashfs,if=virtio,format=raw,readonly=on,file.locking=off"]
        qemu += ["-drive", f"file={self.folder}/project.tar,if=virtio,format=raw,readonly=on,file.locking=off"]
        if self._disk:
            disk = self.folder / f"{self.name}.disk"
            with open(disk, "ab") as file:
                file.truncate(4 << 30)
            # unsafe: what the guest has flushed outlives its reset, but need not outlive ours
            qemu += ["-drive", f"file={disk},if=virtio,format=raw,cache=unsafe"]
        for number, (mine, other) in enumerate(self._cables):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(mine)
            qemu += ["-netdev", f"dgram,id=n{number},local.type=unix,local.path={mine}"]
            qemu[-1] += f",remote.type=unix,remote.path={other}"
            qemu += ["-device", f"virtio-net-pci,netdev=n{number},mac=52:54:00:00:{number:02x}:{_mac(self.name):02x}"]
        for what in ("agent", "monitor"):
            path = self.folder / f"{self.name}.{what}"
            path.unlink(missing_ok=True)
            qemu += ["-chardev", f"socket,id={what},path={path},server=on,wait=off"]
        qemu += ["-device", "virtio-serial", "-device", "virtserialport,chardev=agent,name=agent"]
        qemu += ["-mon", "chardev=monitor,mode=control", "-device", "virtio-rng-pci"]
        self.process = subprocess.Popen(qemu, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        self._agent = self._connect("agent")
        self._monitor = self._connect("monitor").makefile("rw")
        self._monitor.readline()
        self.monitor("qmp_capabilities")
        self.ready.clear()
        threading.Thread(target=self._hear, args=[self._agent], daemon=True).start()

    def _connect(self, what: str) -> socket.socket:
        end = time.monotonic() + 20
        while True:
            made = socket.socket(socket.AF_UNIX)
            try:
                made.connect(str(self.folder / f"{self.name}.{what}"))
                return made
            except OSError:
                made.close()
                if self.process.poll() is not None:
                    assert self.process.stderr is not None
                    raise Missing(f"QEMU did not start: {self.process.stderr.read()[-1000:]}") from None
                if time.monotonic() > end:
                    raise
                time.sleep(0.05)

    def _hear(self, agent: socket.socket) -> None:
        for line in agent.makefile("rb"):
            try:
                said = json.loads(line)
            except ValueError:
                continue  # cut in two by a reset
            if said == "ready":
                self.ready.set()
            elif (call := self._calls.pop(said["id"], None)) is not None:
                call.set_result(said)

    def monitor(self, command: str, **arguments: Any) -> Any:
        """Ask QEMU itself: stop, cont, system_reset."""
        self._monitor.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self._monitor.flush()
        while True:
            said = json.loads(self._monitor.readline())
            if "error" in said:
                raise RuntimeError(f"{self.name}: {command}: {said['error']['desc']}")
            if "return" in said:
                return said["return"]

    def wait(self, seconds: float = 400) -> None:
        if not self.ready.wait(seconds):
            console = (self.folder / f"{self.name}.console").read_text(errors="replace")
            raise RuntimeError(f"{self.name}: did not come up in {seconds} s; its console ends:\n{console[-2000:]}")

    def start(self, command: str) -> Call:
        """Run a shell command in the background."""
        call = Call()
        with self._write:
            self._number += 1
            call.number = self._number
            self._calls[call.number] = call
            self._agent.sendall(json.dumps({"id": call.number, "command": command}).encode() + b"\n")
        return call

    def signal(self, call: Call, number: int) -> None:
        """A signal to the shell of a command, or to what that has exec'ed."""
        with self._write:
            self._agent.sendall(json.dumps({"id": call.number, "signal": number}).encode() + b"\n")

    def result(self, call: Call, seconds: float = 120) -> str:
        """What a command printed. `RuntimeError` where it failed, `TimeoutError` where it did not end."""
        done = call.result(seconds)
        if done["rc"]:
            raise RuntimeError(f"{self.name}: exit {done['rc']}: {done['err'][-3000:]}{done['out'][-1000:]}")
        return str(done["out"])

    def run(self, command: str, seconds: float = 120) -> str:
        return self.result(self.start(command), seconds)

    def reset(self) -> None:
        """The power goes and comes back: what the guest had not flushed to its disk is gone."""
        self.ready.clear()
        self.monitor("system_reset")
        self.wait()

    def kill(self) -> None:
        """The power goes."""
        self.process.kill()
        self.process.communicate()
        self._agent.close()

    def boot(self) -> None:
        """A machine that was killed, again."""
        self._boot()
        self.wait()


def _mac(name: str) -> int:
    return sum(name.encode()) % 256


class Lab:
    """One server and two clients that have mounted its export at /store, by NFS `version` ("3" or "4.2")."""

    def __init__(self, cache: Path, folder: Path, version: str):
        self.version = version
        _pack(folder / "project.tar")
        cables = [(str(folder / f"cable{i}.server"), str(folder / f"cable{i}.client")) for i in (1, 2)]
        self.server = Guest("server", folder, cache, cables, disk=True)
        self.clients = [Guest(f"client{i}", folder, cache, [cables[i - 1][::-1]]) for i in (1, 2)]
        try:
            for guest in (self.server, *self.clients):
                guest.wait()
            self.serve()
            for client in self.clients:
                self._join(client)
        except BaseException:
            self.close()
            raise

    def serve(self) -> None:
        """Start the NFS server on a server that has booted."""
        for i in (1, 2):
            self.server.run(f"ip address add 10.0.{i}.1/24 dev eth{i - 1}; ip link set eth{i - 1} up")
        self.server.run(SERVE)

    def _join(self, client: Guest) -> None:
        i, path = int(client.name[-1]), EXPORT if self.version == "3" else "/"
        client.run(
            f"set -e; hostname {client.name}; ip address add 10.0.{i}.2/24 dev eth0; ip link set eth0 up\n"
            f"ip route add default via 10.0.{i}.1\n"
            "mkdir -p /var/lib/nfs/sm /var/lib/nfs/sm.bak; chown statd /var/lib/nfs/sm /var/lib/nfs/sm.bak\n"
            "rpcbind -w; rpc.statd\n"
            f"mount -t nfs -o vers={self.version},hard,proto=tcp 10.0.{i}.1:{path} {STORE}"
        )

    def again(self, client: Guest) -> None:
        """Boot and mount a client that was killed."""
        client.boot()
        self._join(client)

    def close(self) -> None:
        for guest in (*self.clients, self.server):
            guest.kill()


@contextlib.contextmanager
def lab(cache: Path, version: str) -> Iterator[Lab]:
    """A lab for the time of the block; `Missing` where it cannot be."""
    folder = Path(tempfile.mkdtemp(prefix="nfs-"))
    made = None
    try:
        made = Lab(image(cache), folder, version)
        yield made
    finally:
        if made:
            made.close()
        shutil.rmtree(folder, ignore_errors=True)


def _pack(path: Path) -> None:
    """The project's code as the guests see it."""
    with tarfile.open(path, "w") as tar:
        init = tarfile.TarInfo("init")
        init.size = len(BOOT.encode())
        tar.addfile(init, io.BytesIO(BOOT.encode()))
        for folder in ("datamodels", "tests/faults/nfs"):
            for file in sorted((ROOT / folder).rglob("*.py")):
                tar.add(file, str(file.relative_to(ROOT)))
    with open(path, "ab") as file:  # a disk has whole sectors
        file.write(bytes(-file.tell() % 4096))
