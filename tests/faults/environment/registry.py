"""A copy of a container image in the cluster's registry, which tests can remove and push again.

Layers are mounted from the original, as the OCI distribution specification allows, instead of being uploaded.
"""

from __future__ import annotations

import http.client
import json
from dataclasses import dataclass

MANIFEST_TYPES = "application/vnd.oci.image.manifest.v1+json, application/vnd.docker.distribution.manifest.v2+json"
COPY_REPOSITORY = "sailvl-faults-trainer"


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageReference:
    """A container image: registry/repository:tag."""

    registry: str
    repository: str
    tag: str

    @property
    def name(self) -> str:
        """The full reference."""
        return f"{self.registry}/{self.repository}:{self.tag}"

    @property
    def manifest_path(self) -> str:
        """The path of its manifest in the registry."""
        return f"/v2/{self.repository}/manifests/{self.tag}"


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageCopy:
    """A copied image with its manifest."""

    image: ImageReference
    media_type: str
    manifest: bytes
    digest: str

    def push(self) -> None:
        """Push the manifest, after which the image can be pulled by its name."""
        send_request(
            self.image.registry, "PUT", self.image.manifest_path, {"Content-Type": self.media_type}, self.manifest
        )

    def remove(self) -> None:
        """Delete the manifest; the layers remain in the registry as the original's."""
        send_request(self.image.registry, "DELETE", f"/v2/{self.image.repository}/manifests/{self.digest}")


def copy_image(name: str) -> ImageCopy:
    """Copy an image within its registry and push the copy."""
    original = parse_reference(name)
    headers, manifest = send_request(original.registry, "GET", original.manifest_path, {"Accept": MANIFEST_TYPES})
    content = json.loads(manifest)
    for digest in {part["digest"] for part in (content["config"], *content["layers"])}:
        mount = f"/v2/{COPY_REPOSITORY}/blobs/uploads/?mount={digest}&from={original.repository}"
        send_request(original.registry, "POST", mount)
    image = ImageReference(registry=original.registry, repository=COPY_REPOSITORY, tag=original.tag)
    copy = ImageCopy(
        image=image, media_type=headers["content-type"], manifest=manifest, digest=headers["docker-content-digest"]
    )
    copy.push()
    return copy


def parse_reference(name: str) -> ImageReference:
    """Split a full reference."""
    registry, _, path = name.partition("/")
    repository, _, tag = path.rpartition(":")
    return ImageReference(registry=registry, repository=repository, tag=tag)


def send_request(
    registry: str, method: str, path: str, headers: dict[str, str] | None = None, body: bytes | None = None
) -> tuple[dict[str, str], bytes]:
    """Return the response's headers (in lower case) and body; the request must succeed."""
    connection = http.client.HTTPConnection(registry, timeout=30)
    try:
        connection.request(method, path, body=body, headers=headers or {})
        answer = connection.getresponse()
        data = answer.read()
    finally:
        connection.close()
    assert answer.status < 300, (method, path, answer.status, data[:300])
    return {name.lower(): value for name, value in answer.getheaders()}, data
