"""`python -m tests.benchmarks.echo_server ADDRESS`: what ZeroMQ alone costs, as a baseline.

A ROUTER in a process of its own with plain pyzmq: every message is answered at once with one of two
replies, as its first byte says. `SIZES 0 n,m,…` sets the lengths of the frames of reply 0.
"""

from __future__ import annotations

import sys

import zmq

SIZES = b"SIZES "


def main() -> None:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.bind(sys.argv[1])
        print("ready", flush=True)
        replies = {ord("0"): [b""], ord("1"): [b""]}
        while True:
            route, *frames = router.recv_multipart()
            if frames[0].startswith(SIZES):
                number, sizes = frames[0][len(SIZES) :].split(b" ")
                replies[number[0]] = [b"x" * int(size) for size in sizes.split(b",")]
                router.send_multipart([route, b"ok"])
            else:
                router.send_multipart([route, *replies[frames[0][0]]])


if __name__ == "__main__":
    main()
