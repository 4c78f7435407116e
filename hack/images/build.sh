#!/usr/bin/env bash
# Build images and push them to the registry, each tagged with a hash of its content: build.sh [operator] [trainer]
# Prints NAME=IMAGE lines. $BASE is the base image (default: built by base.sh), $REGISTRY the target. Needs root.
set -euo pipefail
shopt -s nullglob
cd "$(dirname "$0")/../.."
export STORAGE_DRIVER=overlay
registry=${REGISTRY:-localhost:5000}

# Mount the machine's certificates, the settings of pip and uv, and uv's cache into the build; no image contains them.
mounts=()
mount_if_present() { # PATH [TARGET] [MODE]
  [ ! -e "$1" ] || mounts+=(-v "$1:${2:-$1}${3:-:ro}")
}
mount_if_present /etc/ssl/certs
mount_if_present /etc/pip.conf
mount_if_present /etc/uv
mkdir -p "${UV_CACHE_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/uv}"
mount_if_present "${UV_CACHE_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/uv}" /var/cache/uv :rw

content() { # NAME: print a hash of all inputs of the image
  { echo "$base"; find hack/uv.txt pyproject.toml README.m[d] "images/$1" operator trainer -type f -not -path '*/__pycache__/*' \
    -not -path '*.egg-info/*' -print0 | sort -z | xargs -0 sha256sum; } | sha256sum | cut -c1-12
}

in_registry() { # IMAGE
  local path=${1#"$registry/"}
  curl -fs -o /dev/null -H 'Accept: application/vnd.oci.image.manifest.v1+json' \
    -H 'Accept: application/vnd.docker.distribution.manifest.v2+json' \
    "http://$registry/v2/${path%:*}/manifests/${path##*:}"
}

remove_older_builds() { # IMAGE: remove them from buildah; the registry keeps them
  buildah images --format '{{.Name}}:{{.Tag}}' | grep -F "${1%:*}:" | grep -vxF "$1" | xargs -r buildah rmi >/dev/null || true
}

hack/require.sh buildah curl
base=${BASE:-$(hack/images/base.sh)}
[ $# -gt 0 ] || set -- operator trainer
for name in "$@"; do
  image=$registry/sailvl-$name:$(content "$name")
  if ! in_registry "$image"; then
    buildah build --layers --isolation chroot --network host --build-arg "BASE=$base" "${mounts[@]}" \
      -f "images/$name/Dockerfile" -t "$image" . >&2
    hack/cluster/cluster.sh load "$image"
    remove_older_builds "$image"
  fi
  echo "SAILVL_${name^^}_IMAGE=$image"
done
