"""A network whose firewall answers every connection with ICMP "port unreachable".

Run as root in a network namespace of its own. Prints what `refuses` says of a port behind the
firewall, and of a port of this host that nobody listens at.
"""

import fcntl
import os
import socket
import struct
import subprocess
import threading

from sglang_hma.transfer.liveness import refuses

TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
HERE, BEHIND = "10.78.0.1", "10.78.0.2"


def checksum(data: bytes) -> int:
    """Of the internet (RFC 1071)."""
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def port_unreachable(packet: bytes) -> bytes:
    """The answer to an IPv4 packet, from where it was sent to."""
    quoted = packet[: (packet[0] & 15) * 4 + 8]
    icmp = bytearray(struct.pack(">BBHI", 3, 3, 0, 0) + quoted)
    struct.pack_into(">H", icmp, 2, checksum(bytes(icmp)))
    size = 20 + len(icmp)
    head = bytearray(struct.pack(">BBHHHBBH", 0x45, 0, size, 0, 0, 64, socket.IPPROTO_ICMP, 0))
    head += packet[16:20] + packet[12:16]
    struct.pack_into(">H", head, 10, checksum(bytes(head)))
    return bytes(head + icmp)


def main() -> None:
    device = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH", b"firewall", IFF_TUN | IFF_NO_PI))
    for words in (
        f"address add {HERE}/24 dev firewall",
        "link set firewall up",
        "link set lo up",
    ):
        subprocess.run(["ip", *words.split()], check=True)

    def reject() -> None:
        while True:
            packet = os.read(device, 2048)
            if packet[0] >> 4 == 4 and packet[9] == socket.IPPROTO_TCP:
                os.write(device, port_unreachable(packet))

    threading.Thread(target=reject, daemon=True).start()
    try:
        socket.create_connection((BEHIND, 5001), timeout=60)
    except ConnectionRefusedError:
        print("looks refused,", end=" ")
    print(refuses((BEHIND, 5001)), refuses((HERE, 5001)))


if __name__ == "__main__":
    main()
