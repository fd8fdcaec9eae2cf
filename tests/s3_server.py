"""A store that speaks S3: moto's standalone server, a process of its own on this machine, in memory."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import urllib.request
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import boto3
from botocore.config import Config

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "id",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": "/nowhere",
    "AWS_SHARED_CREDENTIALS_FILE": "/nowhere",
    "NO_PROXY": "127.0.0.1",
}
"""What a client finds, whoever runs the tests; the endpoint is to be added."""


@dataclass(frozen=True)
class Server:
    """A running server.

    Attributes:
        endpoint: its URL.
    """

    endpoint: str

    def client(self, service: str = "s3") -> Any:
        """Return boto3's client, which asks the server itself, whatever stands before it in a test."""
        return boto3.client(
            service,
            endpoint_url=self.endpoint,
            region_name="us-east-1",
            aws_access_key_id="id",
            aws_secret_access_key="secret",
            config=Config(proxies={}),
        )

    def empty(self) -> None:
        """Forget every bucket, and make an empty one of the name "bucket"."""
        self._post("reset")
        self.client().create_bucket(Bucket="bucket")

    def objects(self) -> dict[str, bytes]:
        """Return the content of all objects of the bucket by their keys."""
        client = self.client()
        pages = client.get_paginator("list_objects_v2").paginate(Bucket="bucket")
        keys = [found["Key"] for page in pages for found in page.get("Contents", [])]
        return {key: client.get_object(Bucket="bucket", Key=key)["Body"].read() for key in keys}

    def unfinished_uploads(self) -> list[str]:
        """Return the keys of uploads in parts that are neither complete nor aborted."""
        return [found["Key"] for found in self.client().list_multipart_uploads(Bucket="bucket").get("Uploads", [])]

    def make_user(self) -> dict[str, str]:
        """Make a user who may do everything with S3, and return the credentials that he is given."""
        client = self.client("iam")
        client.create_user(UserName="user")
        allowed = {"Effect": "Allow", "Action": "s3:*", "Resource": "*"}
        policy = json.dumps({"Version": "2012-10-17", "Statement": [allowed]})
        client.put_user_policy(UserName="user", PolicyName="all", PolicyDocument=policy)
        key: dict[str, str] = client.create_access_key(UserName="user")["AccessKey"]
        return key

    @contextmanager
    def checking_credentials(self) -> Iterator[None]:
        """Know no credentials but those that it has given out itself, and compare signatures, within the block."""
        self._post("reset-auth", "0")
        try:
            yield
        finally:
            self._post("reset-auth", "inf")

    def _post(self, action: str, content: str = "") -> None:
        request = urllib.request.Request(
            f"{self.endpoint}/moto-api/{action}", content.encode(), {"Content-Type": "text/plain"}
        )
        urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request).close()


def _endpoint(process: subprocess.Popen[str]) -> str:
    """Return where a server that was just started listens; what it goes on to say is thrown away."""
    assert process.stderr is not None
    said = ""
    for line in process.stderr:
        said += line
        if found := re.search(r"http://127\.0\.0\.1:\d+", line):
            threading.Thread(target=deque, args=(process.stderr, 0), daemon=True).start()
            return found[0]
    raise RuntimeError(f"the S3 server did not start: {said}")


@contextmanager
def serving() -> Iterator[Server]:
    """Start a server, and end it with the block."""
    environment = {**os.environ, "INITIAL_NO_AUTH_ACTION_COUNT": "inf", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield Server(_endpoint(process))
    finally:
        process.kill()
        process.wait()
