#!/usr/bin/env python3
"""Tries the rim on a real kernel (inside the lab): every level, fio verify, ext4, SIGKILL, a failed member.

Usage: target_check.py BINARY [LEVEL..]
"""
import subprocess
import sys
import time
import uuid

import os

from target_client import Refused, Target, create, iops, member, resident, sh, start, threads, ublk_devices

BINARY = sys.argv[1]
FIO = "--direct=1 --ioengine=io_uring --verify=crc32c --verify_fatal=1 --bsrange=4k-512k --iodepth=16"


def check(level, members, env):
    print(f"== {level} of {len(members)} {env or ''}", flush=True)
    group, lu = str(uuid.uuid4()), str(uuid.uuid4())
    disks = [str(uuid.uuid4()) for _ in members]
    target = Target(BINARY, env)
    status = create(target, group, level, members, disks)
    print("created:", status["state"], status["capacity"] >> 20, "MiB", flush=True)
    device = f"/dev/ublkb{target.ask('lu_create', group=group, lu=lu, name='vol', size='max', depth=128)['lu']['ublk']}"
    queue = f"/sys/block/{os.path.basename(device)}/queue/"
    limits = {n: open(queue + n).read().strip() for n in (
        "logical_block_size", "physical_block_size", "minimum_io_size", "optimal_io_size", "max_sectors_kb", "write_cache",
        "fua", "dma_alignment", "discard_granularity", "discard_max_bytes", "write_zeroes_max_bytes")}
    print(limits, flush=True)
    out = sh(f"fio --name=v --filename={device} --rw=randwrite --size=128M {FIO} 2>&1")
    print("fio verify", iops(out), threads(target.process.pid), resident(target.process.pid), flush=True)
    sh(f"mkfs.ext4 -q {device} && mount {device} /mnt && cp -a /usr/share/perl /mnt/ && sync")
    sums = sh("cd /mnt && find . -type f | sort | xargs -d '\\n' sha256sum | sha256sum")
    try:
        target.ask("lu_delete", group=group, lu=lu)
        sys.exit("a mounted LU was deleted")
    except Refused as refused:
        assert refused.args[0]["kind"] == "busy", refused
    load = subprocess.Popen(f"fio --name=v --directory=/mnt --rw=randwrite --size=48M --runtime=9 --time_based {FIO} 2>&1",
                            shell=True, stdout=subprocess.PIPE, text=True)
    for kill in range(3):
        time.sleep(1.2)
        target.kill()
        began = time.time()
        target = Target(BINARY, env)
        status = start(target, group, members, disks)
        print(f"killed, back in {time.time() - began:.3f} s: {status['state']} {status['lus'][0]['problem']}", flush=True)
        if kill == 1 and level != "raid0":
            state = target.ask("member_fail", group=group, disk=disks[1])["group"]
            print("failed one:", state["state"], state["reason"], flush=True)
    out = load.communicate()[0]
    print("fio under kills:", load.returncode, iops(out), flush=True)
    assert load.returncode == 0, out[-3000:]
    sh("sync; echo 3 > /proc/sys/vm/drop_caches")
    assert sums == sh("cd /mnt && find . -type f -not -name 'v.*' | sort | xargs -d '\\n' sha256sum | sha256sum")
    sh(f"umount /mnt && e2fsck -fn {device}")
    status = target.ask("status")["groups"][0]
    print({k: v for k, v in status["lus"][0]["counters"].items() if v}, [m["state"] for m in status["members"]], flush=True)
    events = target.ask("events", after=0, wait_ms=0)["events"]
    print("events:", [e["name"] for e in events], flush=True)
    target.ask("lu_delete", group=group, lu=lu)
    assert ublk_devices() == [], ublk_devices()
    target.ask("shutdown")
    assert target.process.wait(5) == 0
    for path in members:
        os.close(member(path, limit=0))


DISKS = os.environ["LAB_DISKS"].split()
LEVELS = sys.argv[2:] or ["raid0", "raid1", "raid5"]
try:
    for level in LEVELS:
        count = 2 if level == "raid1" else 4
        for env in ({}, {"LUNAR_NO_ZERO_COPY": "1"}):
            check(level, DISKS[:count], env)
    print("all good", flush=True)
finally:
    print(open("/run/rim/log").read()[-4000:], flush=True)
