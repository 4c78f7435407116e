#!/usr/bin/env bash
# Kubernetes from the Go modules pinned under tools/: prints the folder of its binaries, built at the first call.
# The folder is keyed by all that it is made from, so another checkout finds it again. Needs Go >= 1.26.
set -euo pipefail
cd "$(dirname "$0")/tools"

export CGO_ENABLED=0 GOFLAGS="-buildvcs=false -mod=readonly"
strip="-s -w"
stamp=k8s.io/component-base/version
kubernetes="$strip -X $stamp.gitVersion=v1.34.4 -X $stamp.gitMajor=1 -X $stamp.gitMinor=34"

key=$({ go version; echo "$GOFLAGS $kubernetes"; cat ./*/go.mod ./*/go.sum; } | sha256sum | cut -c1-16)
out=${XDG_CACHE_HOME:-$HOME/.cache}/sailvl/bin/$key

build() { # MODULE: every `tool` line of its go.mod
  local flags=$strip package name
  [ "$1" != kubernetes ] || flags=$kubernetes
  cd "$1"
  for package in $(go list -f '{{.ImportPath}}' tool); do
    name=$(basename "$package")
    [ "$package" != go.etcd.io/etcd/server/v3 ] || name=etcd
    echo "building $name" >&2
    go build -trimpath -ldflags "$flags" -o "$out/$name" "$package"
  done
  cd ..
}

mkdir -p "$out"
exec 8>"$out/.lock"
flock 8 # two checkouts may come at once
if [ ! -f "$out/.whole" ]; then
  for module in */; do build "${module%/}"; done
  touch "$out/.whole"
fi
echo "$out"
