"""A copy of an image under a name of its own in the cluster's registry, which can be taken away and put back.

By the protocol of github.com/opencontainers/distribution-spec: layers are mounted from the original, not sent.
"""

from __future__ import annotations

import http.client
import json
from dataclasses import dataclass

TYPES = "application/vnd.oci.image.manifest.v1+json, application/vnd.docker.distribution.manifest.v2+json"
COPY = "sailvl-faults-trainer"


@dataclass(frozen=True, kw_only=True, slots=True)
class Image:
    """registry/repository:tag."""

    registry: str
    repository: str
    tag: str

    @property
    def name(self) -> str:
        return f"{self.registry}/{self.repository}:{self.tag}"

    @property
    def manifest(self) -> str:
        """Where its manifest is."""
        return f"/v2/{self.repository}/manifests/{self.tag}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Copy:
    """An image of our own, and what it is made of."""

    image: Image
    kind: str
    manifest: bytes
    digest: str

    def put(self) -> None:
        """Into the registry, where it is found under its name from then on."""
        ask(self.image.registry, "PUT", self.image.manifest, {"Content-Type": self.kind}, self.manifest)

    def remove(self) -> None:
        """From the registry; its layers stay, as another image's."""
        ask(self.image.registry, "DELETE", f"/v2/{self.image.repository}/manifests/{self.digest}")


def copy_image(name: str) -> Copy:
    """Make the copy of an image."""
    original = parse(name)
    headers, manifest = ask(original.registry, "GET", original.manifest, {"Accept": TYPES})
    content = json.loads(manifest)
    for digest in {part["digest"] for part in (content["config"], *content["layers"])}:
        mount = f"/v2/{COPY}/blobs/uploads/?mount={digest}&from={original.repository}"
        ask(original.registry, "POST", mount)
    image = Image(registry=original.registry, repository=COPY, tag=original.tag)
    copy = Copy(image=image, kind=headers["content-type"], manifest=manifest, digest=headers["docker-content-digest"])
    copy.put()
    return copy


def parse(name: str) -> Image:
    registry, _, path = name.partition("/")
    repository, _, tag = path.rpartition(":")
    return Image(registry=registry, repository=repository, tag=tag)


def ask(
    registry: str, method: str, path: str, headers: dict[str, str] | None = None, body: bytes | None = None
) -> tuple[dict[str, str], bytes]:
    """Headers (small letters) and body of the answer, which has to be one of success."""
    connection = http.client.HTTPConnection(registry, timeout=30)
    try:
        connection.request(method, path, body=body, headers=headers or {})
        answer = connection.getresponse()
        data = answer.read()
    finally:
        connection.close()
    assert answer.status < 300, (method, path, answer.status, data[:300])
    return {name.lower(): value for name, value in answer.getheaders()}, data
