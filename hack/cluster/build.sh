#!/usr/bin/env bash
# Kubernetes from the Go modules pinned under tools/: prints the folder of its binaries, built at the first call.
# The folder is keyed by all that it was made from, so another checkout finds it again.
set -euo pipefail
cd "$(dirname "$0")/tools"

export CGO_ENABLED=0 GOFLAGS="-buildvcs=false -mod=readonly"
version=v1.34.4
stamp=k8s.io/component-base/version
kubernetes_flags="-s -w -X $stamp.gitVersion=$version -X $stamp.gitMajor=1 -X $stamp.gitMinor=34"

key=$( { go version; echo "$GOFLAGS $kubernetes_flags"; cat ./*/go.mod ./*/go.sum; } | sha256sum | cut -c1-16)
out=${XDG_CACHE_HOME:-$HOME/.cache}/sailvl/bin/$key
if [ ! -f "$out/.whole" ]; then
  mkdir -p "$out"
  for module in */; do
    cd "$module"
    flags="-s -w"
    [ "$module" = kubernetes/ ] && flags=$kubernetes_flags
    for package in $(go list -f '{{.ImportPath}}' tool); do
      name=$(basename "$package" | sed 's/^v3$/etcd/')
      echo "building $name" >&2
      go build -trimpath -ldflags "$flags" -o "$out/$name" "$package"
    done
    cd ..
  done
  touch "$out/.whole"
fi
echo "$out"
