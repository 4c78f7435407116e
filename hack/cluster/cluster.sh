#!/usr/bin/env bash
# A real Kubernetes on one machine without Docker: control plane, nodes (containerd and kubelet each), DNS, a registry.
#   cluster.sh up [NODES]     two nodes unless told; returns at once where it is up; clears what a killed one left
#   cluster.sh add-node I     another node, or one that was killed
#   cluster.sh kill-node I    as if its power failed
#   cluster.sh load IMAGE     from buildah to the registry at $REGISTRY, from which the nodes pull
#   cluster.sh env            shell lines that set KUBECONFIG, REGISTRY and PATH
#   cluster.sh down           ends it; images stay
# Needs root. State lies in $ROOT (default: build/cluster of this checkout); binaries come from build.sh. One a machine.
set -euo pipefail
HERE=$(dirname "$(realpath "$0")")
ROOT=$(realpath -m "${ROOT:-$HERE/../../build/cluster}")
PKI=$ROOT/pki
API=https://127.0.0.1:6443
REGISTRY=localhost:5000
export KUBECONFIG=$PKI/admin.conf STORAGE_DRIVER=overlay
NEEDS=(containerd runc buildah docker-registry busybox ip nft conntrack openssl)

# shellcheck source=hack/cluster/process.sh
source "$HERE/process.sh"
# shellcheck source=hack/cluster/pki.sh
source "$HERE/pki.sh"
# shellcheck source=hack/cluster/control_plane.sh
source "$HERE/control_plane.sh"
# shellcheck source=hack/cluster/node.sh
source "$HERE/node.sh"

binaries() {
  BIN=$("$HERE/build.sh")
  export PATH=$BIN:$PATH
}

is_up() { # NODES
  local i
  is_running apiserver && is_running registry && is_running coredns || return
  for ((i = 0; i < $1; i++)); do is_running "node-$i.kubelet" && is_running "node-$i.containerd" || return; done
  kubectl get --raw /readyz >/dev/null 2>&1
}

up() { # NODES
  local i
  if is_up "$1"; then return; fi
  "$HERE/../require.sh" "${NEEDS[@]}"
  down
  # shellcheck disable=SC2046  # each node has two
  require_ports "${PORTS[@]}" $(for ((i = 0; i < $1; i++)); do node_ports "$i"; done)
  control_plane
  registry
  dns
  pause_image
  for ((i = 0; i < $1; i++)); do node "$i"; done
  for ((i = 0; i < $1; i++)); do await_node "$i"; done
}

down() { # and what one left that was killed: processes, mounts, cgroups, bridges, rules
  local i
  for i in $(known_nodes); do kill_node "$i"; done
  stop apiserver controller-manager scheduler proxy coredns registry
  stop etcd
  stop_strays "$ROOT"
  for i in $(known_nodes); do clear_node "$i"; done
  clear_network
  rm -rf "$ROOT/etcd"
}

known_nodes() {
  find "$ROOT" -maxdepth 1 -type d -name 'node-*' -printf '%f\n' | sed 's/^node-//'
}

load() { # IMAGE: only changed layers travel
  buildah push -q --tls-verify=false --compression-format zstd --compression-level 1 "$1" "docker://$1"
}

main() {
  [ "$(id -u)" -eq 0 ] || die "needs root"
  mkdir -p "$PKI" "$ROOT/log"
  exec 9>"$ROOT/.lock"
  flock 9 # up and down wait for each other
  binaries
  case $1 in
    up)
      up "${2:-2}"
      kubectl get nodes
      ;;
    add-node)
      kill_node "$2"
      clear_node "$2"
      node "$2"
      await_node "$2"
      ;;
    kill-node) kill_node "$2" ;;
    down) down ;;
  esac
}

case "${1:-} ${2:+argument}" in
  'up ' | 'up argument' | 'down ' | 'add-node argument' | 'kill-node argument') main "$@" ;;
  'load argument') load "$2" ;;
  'env ') echo "export KUBECONFIG=$KUBECONFIG REGISTRY=$REGISTRY PATH=$("$HERE/build.sh"):\$PATH" ;;
  *)
    sed -n '3,8s/^# *//p' "$0"
    exit 2
    ;;
esac
