"""Who may ask: whoever knows the token, or, without one, this machine alone."""

from __future__ import annotations

import hmac
import os

from starlette.requests import Request

from pipelines.serving.request_reader import RequestError
from pipelines.serving.serve_options import is_loopback
from unianom.errors import OptionError

TOKEN = "UNIANOM_SERVE_TOKEN"
"""Environment variable of the token."""


class Access:
    """Lets requests pass, or not.

    Args:
        token: that requests must have in their header `Authorization: Bearer …`; empty lets those of this machine pass.
    """

    def __init__(self, token: str) -> None:
        self._token = token.encode()

    @classmethod
    def from_environment(cls) -> Access:
        """Return the rule of this process's environment."""
        return cls(os.environ.get(TOKEN, "").strip())

    def check(self, request: Request) -> None:
        """Let a request pass.

        Raises:
            RequestError: 401 without the right token; 403 without any, from another machine.
        """
        if not self._token:
            if request.client is not None and is_loopback(request.client.host):
                return
            raise RequestError(
                403, f"this server has no token, so it answers its own machine only; start it with {TOKEN} set"
            )
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self._token):
            raise RequestError(401, "no token, or a wrong one; send it in the header Authorization: Bearer TOKEN")


def check_host(host: str) -> None:
    """Refuse to listen where other machines can ask, without a token.

    Raises:
        OptionError: there is none.
    """
    if not is_loopback(host) and not os.environ.get(TOKEN, "").strip():
        raise OptionError(
            f"--host {host} is open to other machines; set a token in the environment variable {TOKEN}, or listen on "
            f"127.0.0.1"
        )
