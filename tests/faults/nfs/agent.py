"""Runs in a guest as its process 1: shell commands come in by the serial port, one JSON line each, results go back."""

import json
import os
import subprocess
import sys
import threading

ENV = {**os.environ, "PYTHONPATH": "/project:/opt/python", "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}


def main(path: str) -> None:
    port = os.open(path, os.O_RDWR)
    lock = threading.Lock()

    def say(what: object) -> None:
        data = memoryview(json.dumps(what).encode() + b"\n")
        with lock:
            while data:
                data = data[os.write(port, data) :]

    def run(number: int, command: str) -> None:
        done = subprocess.run(
            ["bash", "-c", command], capture_output=True, text=True, errors="replace", env=ENV, stdin=subprocess.DEVNULL
        )
        say({"id": number, "rc": done.returncode, "out": done.stdout, "err": done.stderr})

    say("ready")
    buffer = b""
    while True:
        buffer += os.read(port, 1 << 16)
        *lines, buffer = buffer.split(b"\n")
        for line in lines:
            asked = json.loads(line)
            threading.Thread(target=run, args=[asked["id"], asked["command"]], daemon=True).start()


main(sys.argv[1])
