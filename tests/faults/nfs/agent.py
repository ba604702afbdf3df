"""Process 1 of a guest: shell commands, and signals to them, come in by the serial port as lines of JSON."""

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

    running: dict[int, subprocess.Popen[str]] = {}

    def run(number: int, command: str) -> None:
        process = subprocess.Popen(
            ["bash", "-c", command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=ENV,
        )
        running[number] = process
        out, err = process.communicate()
        say({"id": number, "rc": process.returncode, "out": out, "err": err})

    say("ready")
    buffer = b""
    while True:
        buffer += os.read(port, 1 << 16)
        *lines, buffer = buffer.split(b"\n")
        for line in lines:
            asked = json.loads(line)
            if "signal" in asked:
                running[asked["id"]].send_signal(asked["signal"])
            else:
                threading.Thread(target=run, args=[asked["id"], asked["command"]], daemon=True).start()


main(sys.argv[1])
