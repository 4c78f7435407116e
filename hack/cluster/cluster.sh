#!/usr/bin/env bash
# Run Kubernetes on one machine without Docker: control plane, nodes (containerd and kubelet each), DNS, a registry,
# and enforced NetworkPolicies.
#   cluster.sh up [NODES]     start it (default: two nodes); no effect if it is up; removes remains of a killed one
#   cluster.sh add-node I     add a node, or start a killed one again
#   cluster.sh kill-node I    end a node as a power loss would
#   cluster.sh remove-node I  end a node and delete its state
#   cluster.sh load IMAGE     push from buildah to the registry at $REGISTRY, from which the nodes pull
#   cluster.sh env            print shell lines that set KUBECONFIG, REGISTRY and PATH
#   cluster.sh down           stop it; images are kept
# State is in $ROOT (default: build/cluster of this checkout); binaries come from build.sh. One cluster per machine.
# Exit code 3: this machine can't run one (no root, no mounts, a tool is missing).
set -euo pipefail
HERE=$(dirname "$(realpath "$0")")
ROOT=$(realpath -m "${ROOT:-$HERE/../../build/cluster}")
PKI=$ROOT/pki
API=https://127.0.0.1:6443
REGISTRY=localhost:5000
export KUBECONFIG=$PKI/admin.conf STORAGE_DRIVER=overlay
NEEDS=(containerd runc buildah docker-registry busybox ip nft conntrack openssl python3)

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
  is_running apiserver && is_running registry && is_running coredns && is_running policies || return
  for ((i = 0; i < $1; i++)); do is_running "node-$i.kubelet" && is_running "node-$i.containerd" || return; done
  kubectl get --raw /readyz >/dev/null 2>&1
}

up() { # NODES
  local i others
  if is_up "$1"; then return; fi
  down
  check_disk_space
  # shellcheck disable=SC2046  # each node has two ports
  others=$(listeners "${PORTS[@]}" $(for ((i = 0; i < $1; i++)); do node_ports "$i"; done)) || true
  [ -z "$others" ] || die "ports are in use, perhaps by the cluster of another checkout: $others"
  control_plane
  registry
  dns
  network_policies
  pause_image
  for ((i = 0; i < $1; i++)); do node "$i"; done
  for ((i = 0; i < $1; i++)); do await_node "$i"; done
  await 30 kubectl -n default get serviceaccount default # pods are rejected until it exists
}

check_disk_space() { # images take space in the registry and on each node; a kubelet on a full disk evicts its pods
  local needed=20 free
  [ ! -d "$ROOT/registry" ] || [ ! -d "$ROOT/node-0/containerd" ] || needed=4 # the images exist already
  free=$(df --output=avail -BG "$ROOT" | tail -1 | tr -dc 0-9)
  [ "$free" -ge "$needed" ] || die "$free GB are free in $ROOT, $needed GB are needed. Free some (\`make clean\` in other" \
    "checkouts), or set ROOT to a folder on a larger disk. \`make check\` needs no cluster."
}

down() { # also remove what a killed cluster left: processes, mounts, cgroups, bridges, nftables rules
  local i
  for i in $(known_nodes); do kill_node "$i"; done
  stop apiserver controller-manager scheduler proxy coredns policies registry
  stop etcd
  stop_strays "$ROOT"
  for i in $(known_nodes); do clear_node "$i"; done
  [ -n "$(listeners "${PORTS[@]}")" ] || clear_network # unless another checkout's cluster is up
  rm -rf "$ROOT/etcd" "$KUBECONFIG"
}

require() {
  [ "$(id -u)" -eq 0 ] || cannot "needs root"
  unshare --mount --net true 2>/dev/null || cannot "needs CAP_SYS_ADMIN for mounts"
  enable_bridge_filter || cannot "needs the kernel module br_netfilter: without it, packets between pods of a node pass no filter"
  "$HERE/../require.sh" "${NEEDS[@]}" || cannot "tools are missing"
  command -v go >/dev/null || cannot "needs Go 1.26 or later"
}

cannot() {
  echo "cluster: this machine can't run one: $*" >&2
  exit 3
}

known_nodes() {
  find "$ROOT" -maxdepth 1 -type d -name 'node-*' -printf '%f\n' | sed 's/^node-//'
}

load() { # IMAGE: push its changed layers, and remove its older builds from the nodes; the registry keeps them
  local i images others
  buildah push -q --tls-verify=false --compression-format zstd --compression-level 1 "$1" "docker://$1"
  for i in $(known_nodes); do
    is_running "node-$i.containerd" || continue
    images=(ctr -a "$ROOT/node-$i/containerd.sock" -n k8s.io images)
    mapfile -t others < <("${images[@]}" ls | other_builds "$1")
    [ ${#others[@]} -eq 0 ] || "${images[@]}" rm "${others[@]}" >/dev/null
  done
}

other_builds() { # IMAGE: names of its older builds; a pull names an image by tag, digest and id, and each name retains it
  awk -v wanted="$1" -v repository="${1%:*}:" '
    index($1, repository) == 1 && $1 != wanted { other[$3] }
    { digest[$1] = $3 }
    END { for (name in digest) if (digest[name] in other) print name }'
}

main() {
  require
  mkdir -p "$PKI" "$ROOT/log"
  exec 9>"$ROOT/.lock"
  flock 9 # one command at a time
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
    remove-node)
      kill_node "$2"
      clear_node "$2"
      rm -rf --one-file-system "$ROOT/node-$2"
      kubectl delete node "node-$2" --ignore-not-found
      ;;
    down) down ;;
  esac
}

case "${1:-} ${2:+argument}" in
  'up ' | 'up argument' | 'down ' | 'add-node argument' | 'kill-node argument' | 'remove-node argument') main "$@" ;;
  'load argument') load "$2" ;;
  'env ') echo "export KUBECONFIG=$KUBECONFIG REGISTRY=$REGISTRY PATH=$("$HERE/build.sh"):\$PATH" ;;
  *)
    sed -n '4,10s/^# *//p' "$0"
    exit 2
    ;;
esac
