#!/usr/bin/env bash
# Prints a base image for images/*/Dockerfile, made from Debian's packages where Docker Hub is out of reach: a minimal
# Debian with Python. Called by build.sh, as root; kept among buildah's images under the hash of this file.
set -euo pipefail
export STORAGE_DRIVER=overlay

suite=bookworm
packages=python3,python3-venv,python3-pip,ca-certificates
name=localhost/sailvl-base:$(sha256sum "$0" | cut -c1-12)

if ! buildah inspect --type image "$name" >/dev/null 2>&1; then
  "$(dirname "$0")/../require.sh" debootstrap buildah
  tree=$(mktemp -d)
  trap 'rm -rf "$tree"' EXIT
  debootstrap --variant=minbase --include="$packages" "$suite" "$tree" >&2
  ln -s python3 "$tree/usr/bin/python"
  # nothing of the machine that made it, nor what apt can fetch again
  rm -rf "$tree"/var/lib/apt/lists/* "$tree"/var/cache/apt/*.bin "$tree"/var/cache/apt/archives/*.deb "$tree"/var/log/* \
    "$tree/etc/resolv.conf" "$tree/etc/hostname" "$tree/etc/machine-id"
  container=$(buildah from scratch)
  buildah copy -q "$container" "$tree" / >/dev/null
  buildah config --env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin --env LANG=C.UTF-8 --cmd python3 "$container"
  buildah commit -q --rm "$container" "$name" >/dev/null
fi
echo "$name"
