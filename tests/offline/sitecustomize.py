"""Python processes that start with this folder on PYTHONPATH cannot reach the network, nor do their children.

Whoever tries leaves a line in the file OFFLINE_LOG, so that a test fails even where the error was caught.
"""

import os
import socket
import sys

LOCAL = {None, "", "localhost", "::1", "::", "0.0.0.0", "ip6-localhost", socket.gethostname()}


def guard(event, args):
    if event not in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname"):
        return
    address = args[1] if event == "socket.connect" else args[0]
    host = address[0] if isinstance(address, tuple) else address
    host = host.decode() if isinstance(host, bytes) else host
    if event == "socket.connect" and not isinstance(address, tuple):
        return  # a socket file
    if host in LOCAL or str(host).startswith(("127.", "::ffff:127.")):
        return
    with open(os.environ["OFFLINE_LOG"], "a") as log:
        log.write(f"{event} {host} by {sys.argv[:1]}\n")
    raise OSError(101, f"the tests are offline, {host} was wanted")


if "OFFLINE_LOG" in os.environ:
    sys.addaudithook(guard)
