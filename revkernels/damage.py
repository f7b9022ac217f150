"""Whether a native module is the file that was built: loading a damaged one can kill the process without a word."""

from __future__ import annotations

import json
import platform
import struct
import zlib
from pathlib import Path

MACHINES = {0x03: "x86", 0x28: "arm", 0x3E: "x86_64", 0xB7: "aarch64", 0x15: "ppc64le", 0xF3: "riscv64"}  # ELF's
REBUILD = "repeat the installation with --force-reinstall --no-deps --no-cache-dir"


def why_not_loaded(path: Path) -> str:
    """Why the module at ``path`` must not be loaded; empty where it is whole.

    Size and checksum are compared with the record that the build wrote beside it, which takes two milliseconds for
    three megabytes; without a record the file must at least hold what its own headers promise. Who changes a module
    on purpose, to strip it, say, deletes the record.
    """
    content = path.read_bytes()
    reason = _why_not_whole(content) or _why_not_as_built(path.with_name(f"{path.name.split('.')[0]}.json"), content)
    return f"{path} {reason}; {REBUILD}" if reason else ""


def _why_not_whole(content: bytes) -> str:
    """What speaks against an ELF file of this machine, of 64 bits and little endian, up to its last segment."""
    if len(content) < 64 or content[:4] != b"\x7fELF":
        return f"is no shared library ({len(content)} bytes)"
    if content[4:6] != b"\x02\x01":
        return ""  # of another kind: the loader's own message is clear
    (machine,) = struct.unpack_from("<H", content, 18)
    if MACHINES.get(machine) != platform.machine() in MACHINES.values():
        return f"is built for {MACHINES.get(machine, f'machine {machine}')}, and this is {platform.machine()}"
    (table,) = struct.unpack_from("<Q", content, 32)
    size, count = struct.unpack_from("<HH", content, 54)
    end = table + size * count
    for k in range(count if end <= len(content) else 0):
        offset, _, _, length = struct.unpack_from("<4Q", content, table + size * k + 8)
        end = max(end, offset + length)
    return f"is truncated: {len(content)} bytes of at least {end}" if end > len(content) else ""


def _why_not_as_built(record: Path, content: bytes) -> str:
    if not record.exists():
        return ""
    built = json.loads(record.read_text())
    if len(content) != built["bytes"]:
        return f"is not the file that was built: {len(content)} bytes instead of {built['bytes']}"
    if zlib.crc32(content) != built["crc32"]:
        return "is not the file that was built: its checksum is another"
    return ""
