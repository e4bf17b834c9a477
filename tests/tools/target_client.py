#!/usr/bin/env python3
"""Starts ublk-target and talks to its control socket. For tests of the rim without mgmtd."""
import array
import fcntl
import glob
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import uuid

ROOT = "/run/rim"


class Refused(Exception):
    pass


class Target:
    """One ublk-target process and one connection to it."""

    def __init__(self, binary, env=None, log="/run/rim/log"):
        os.makedirs(ROOT + "/empty", exist_ok=True)
        path = ROOT + "/sock"
        if os.path.exists(path):
            os.unlink(path)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind(path)
        listener.listen(16)
        os.set_inheritable(listener.fileno(), True)
        self.log = open(log, "a")
        self.process = subprocess.Popen(
            [binary, "--listen-fd", str(listener.fileno()), "--run-dir", ROOT + "/empty"],
            pass_fds=[listener.fileno()], stderr=self.log, env={**os.environ, **(env or {})})
        listener.close()
        self.path = path
        self.connect()

    def connect(self):
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 << 20)
        self.socket.connect(self.path)
        self.hello = self.ask("hello", api=1, system=str(uuid.UUID(int=1)))

    def ask(self, verb, fds=(), **fields):
        data = json.dumps({"verb": verb, **fields}).encode()
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self.socket.sendmsg([data], rights)
        reply = self.socket.recv(1 << 20)
        for fd in fds:
            os.close(fd)
        if not reply:
            raise Refused("the connection ended")
        reply = json.loads(reply)
        if "Err" in reply:
            raise Refused(reply["Err"])
        return reply["Ok"]

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


def in_flight(group):
    return os.open(f"/dev/shm/in-flight-{group}", os.O_RDWR | os.O_CREAT, 0o600)


def member(path, limit=30):
    """Opens a member as mgmtd does: exclusively, waiting for a dead predecessor's I/O."""
    deadline = time.time() + limit
    while True:
        flags = os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC
        is_device = os.path.exists(path) and path.startswith("/dev/") and not path.startswith("/dev/shm")
        try:
            fd = os.open(path, flags | (os.O_EXCL if is_device else 0))
            if not is_device:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return fd
        except OSError:
            if time.time() > deadline:
                raise
            time.sleep(0.01)


def ublk_devices():
    return [int(re.search(r"ublkc(\d+)$", p).group(1)) for p in glob.glob("/sys/class/ublk-char/ublkc*")]


def specs(paths, disks):
    return [{"disk": d, "path": p} for p, d in zip(paths, disks)]


def create(target, group, level, paths, disks, chunk=65536, name="data", assume_clean=False):
    return target.ask("group_create", [member(p) for p in paths] + [in_flight(group)], group=group, name=name,
                      level=level, chunk=chunk, consistency="none", assume_clean=assume_clean,
                      members=specs(paths, disks))["group"]


def start(target, group, paths, disks, force=False):
    return target.ask("group_start", [member(p) for p in paths] + [in_flight(group)], group=group, force=force,
                      members=specs(paths, disks), ublk_devices=ublk_devices(), witness=None)["group"]


def sh(command, check=True):
    done = subprocess.run(command, shell=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if check and done.returncode:
        print(f"FAILED ({done.returncode}): {command}\n{done.stdout[-3000:]}", flush=True)
        sys.exit(1)
    return done.stdout


def iops(output):
    return re.findall(r"IOPS=([0-9.]+[kM]?)", output)


def threads(pid):
    names = {}
    for path in glob.glob(f"/proc/{pid}/task/*/comm"):
        with open(path) as f:
            name = re.sub(r"\d+$", "", f.read().strip())
        names[name] = names.get(name, 0) + 1
    return names


def resident(pid):
    with open(f"/proc/{pid}/status") as f:
        return {k: v for k, v in re.findall(r"(VmRSS|VmLck):\s+(\d+) kB", f.read())}
