"""The two static pages, from the package's own files: the playground and the reading page of the API.

Both are one file each, without outside resources, and say so to the browser by a content security policy that names
the hash of their script.
"""

import base64
import hashlib
import re
from importlib import resources

from starlette.responses import HTMLResponse, Response


def page(name: str) -> Response:
    """`playground/<name>.html`, ready to be sent any number of times."""
    text = resources.files(__package__).joinpath("playground", f"{name}.html").read_text(encoding="utf-8")
    scripts = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts)
    policy = (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return HTMLResponse(
        text,
        headers={
            "content-security-policy": policy,
            "x-content-type-options": "nosniff",
            "referrer-policy": "no-referrer",
            "cache-control": "no-cache",
        },
    )
