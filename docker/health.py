"""Is the server in this container alive? Ends with 0 if so: the image's health check.

Asks the loopback address directly, past any proxy that the environment names.
"""

from __future__ import annotations

import http.client
import os
import sys

TIMEOUT_SECONDS = 4


def main() -> int:
    port = int(os.environ.get("ELASTI_PORT", "8000"))
    talk = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_SECONDS)
    try:
        talk.request("GET", "/health")
        status = talk.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        print(f"no answer on port {port}: {error}", file=sys.stderr)
        return 1
    print(f"/health answered {status}")
    return int(status != 200)


if __name__ == "__main__":
    sys.exit(main())
