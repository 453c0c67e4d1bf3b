"""gcp-storage-emulator on a port of this machine: python gcs_server.py PORT.

Its own reader takes an upload for an e-mail, and a carriage return that ends a file for part of a line's end.
"""

import json
import sys

from gcp_storage_emulator import server

_as_email = server._read_data


def _read_data(handler, query):
    kind = handler.headers.get("Content-Type") or ""
    if not kind.startswith("multipart/related"):
        return _as_email(handler, query)
    boundary = b"--" + kind.partition('boundary="')[2].rstrip('"').encode()
    _, about, content, _ = server._read_raw_data(handler).split(boundary)
    head, _, content = content.partition(b"\n\n")
    return {
        "meta": json.loads(about.partition(b"\n\n")[2]),
        "content": content.removesuffix(b"\n"),
        "content-type": head.partition(b":")[2].strip().decode(),
    }


if __name__ == "__main__":
    server._read_data = _read_data
    server.create_server("127.0.0.1", int(sys.argv[1]), True).run()
