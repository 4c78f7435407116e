#!/usr/bin/env bash
# Build Kubernetes and the tools that its tests need from the Go modules pinned under tools/, and print the folder of the
# binaries. They are cached under a hash of their sources and flags, so all checkouts share them. Needs Go >= 1.26.
set -euo pipefail
shopt -s inherit_errexit
cd "$(dirname "$0")/tools"

export CGO_ENABLED=0 GOFLAGS="-buildvcs=false -mod=readonly"
cache=${XDG_CACHE_HOME:-$HOME/.cache}/sailvl/bin
declare -A flags=(
  [kubernetes]="-X k8s.io/component-base/version.gitVersion=v1.34.4
    -X k8s.io/component-base/version.gitMajor=1 -X k8s.io/component-base/version.gitMinor=34"
  # the Kubernetes version that helm assumes if it renders without a cluster
  [helm]="-X helm.sh/helm/v3/pkg/chartutil.k8sVersionMajor=1 -X helm.sh/helm/v3/pkg/chartutil.k8sVersionMinor=34"
)
declare -A tags=([prometheus]=remove_all_sd,enable_kubernetes_sd) # Debian's package lacks Kubernetes service discovery

build() { # MODULE: build every `tool` of its go.mod, and print the folder
  local linker="-s -w $(tr -s '\n ' ' ' <<<"${flags[$1]:-}")" tag=${tags[$1]:-} key out package name
  key=$({ go version; echo "$GOFLAGS $linker $tag"; cat "$1/go.mod" "$1/go.sum"; } | sha256sum | cut -c1-16)
  out=$cache/$1-$key
  echo "$out"
  [ ! -f "$out/.whole" ] || return 0
  mkdir -p "$out"
  cd "$1"
  for package in $(go list -f '{{.ImportPath}}' tool); do
    name=$(basename "$package")
    [ "$package" != go.etcd.io/etcd/server/v3 ] || name=etcd
    echo "building $name" >&2
    go build -trimpath -tags "$tag" -ldflags "$linker" -o "$out/$name" "$package"
  done
  cd ..
  touch "$out/.whole"
}

mkdir -p "$cache"
exec 8>"$cache/.lock"
flock 8 # two checkouts may build at the same time
folders=()
for module in */; do folders+=("$(build "${module%/}")"); done
out=$cache/$(sha256sum <<<"${folders[*]}" | cut -c1-16)
mkdir -p "$out"
for folder in "${folders[@]}"; do ln -sf "$folder"/* "$out"; done
echo "$out"
