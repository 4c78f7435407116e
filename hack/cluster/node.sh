# Start, kill and remove nodes. Node I has a containerd and a kubelet under $ROOT/node-I; its pods are on the bridge cniI
# (10.244.I.0/24) and in the cgroup $GROUP-I. Sourced by cluster.sh.
# shellcheck shell=bash

PAUSE=localhost/pause:1
GROUP=sailvl-$(sha256sum <<<"$ROOT" | cut -c1-6)-node # unique for each checkout

node() { # I
  local i=$1 dir=$ROOT/node-$1
  mkdir -p "$dir/cni" "$dir/logs"
  bridge "$i"
  cgroups "$i"
  credentials "node-$i" "/O=system:nodes/CN=system:node:node-$i"
  network_config "$i" >"$dir/cni/10-bridge.conflist"
  containerd_config "$dir" >"$dir/containerd.toml"
  kubelet_config "$i" >"$dir/kubelet.yaml"
  start "node-$i.containerd" containerd -c "$dir/containerd.toml"
  await 30 ctr -a "$dir/containerd.sock" version
  ctr -a "$dir/containerd.sock" -n k8s.io images import "$ROOT/pause.tar" >/dev/null
  start "node-$i.kubelet" "$BIN/kubelet" --config="$dir/kubelet.yaml" --kubeconfig="$PKI/node-$i.conf" \
    --hostname-override="node-$i" --root-dir="$dir/kubelet" --node-ip="10.244.$i.1"
}

await_node() { # I: wait until it is registered and ready
  await 60 kubectl get node "node-$1"
  kubectl wait --for=condition=Ready "node/node-$1" --timeout=90s >/dev/null
}

node_ports() { # I
  echo $((10248 + 100 * $1)) $((10250 + 100 * $1))
}

bridge() { # I
  ip link show "cni$1" >/dev/null 2>&1 && return
  ip link add "cni$1" type bridge
  ip addr add "10.244.$1.1/24" dev "cni$1"
  ip link set "cni$1" up
  sysctl -qw net.ipv4.ip_forward=1
}

enable_bridge_filter() { # let packets between pods of one node pass the rules of nftables
  [ -d /proc/sys/net/bridge ] || modprobe br_netfilter 2>/dev/null || return
  sysctl -qw net.bridge.bridge-nf-call-iptables=1
}

hierarchies() { # cgroup trees; cgroup v1 has one per controller
  awk '$3 == "cgroup" || $3 == "cgroup2" {print $2}' /proc/mounts
}

cgroups() { # I
  local tree file
  for tree in $(hierarchies); do
    mkdir -p "$tree/$GROUP-$1"
    for file in cpuset.cpus cpuset.mems; do # cgroup v1: a new group can hold no process until these are set
      [ ! -f "$tree/$file" ] || cat "$tree/$file" >"$tree/$GROUP-$1/$file"
    done
  done
}

kill_node() { # I: kill kubelet, containerd and all containers at once, like a power loss
  local name tree pids=()
  for name in "node-$1.kubelet" "node-$1.containerd"; do
    if is_running "$name"; then kill -9 "$(cat "$ROOT/$name.pid")"; fi
    rm -f "$ROOT/$name.pid"
  done
  for tree in $(hierarchies); do
    mapfile -t -O ${#pids[@]} pids < <(find "$tree/$GROUP-$1" -name cgroup.procs -exec cat {} + 2>/dev/null)
  done
  [ ${#pids[@]} -eq 0 ] || kill -9 "${pids[@]}" 2>/dev/null || true
}

clear_node() { # I: remove the state that a machine loses when it is switched off; images stay
  local dir=$ROOT/node-$1 tree
  stop_strays "$dir"
  unmount "$dir"
  rm -rf --one-file-system "$dir/state" "$dir/ipam" "$dir/kubelet" "$dir/logs"
  for tree in $(hierarchies); do
    [ ! -d "$tree/$GROUP-$1" ] || find "$tree/$GROUP-$1" -depth -type d -exec rmdir {} + 2>/dev/null || true
  done
}

unmount() { # DIRECTORY: unmount everything below it
  local mount
  while read -r mount; do umount -l "$mount"; done \
    < <(awk -v below="$1/" 'index($2, below) == 1 {print $2}' /proc/mounts | sort -r)
  ! grep -qF " $1/" /proc/mounts || die "still mounted below $1: $(grep -F " $1/" /proc/mounts | cut -d' ' -f2 | head -3)"
}

clear_network() { # remove the pods' network namespaces, the bridges, and the rules of kube-proxy and NetworkPolicies
  local name link
  for name in $(ip netns list 2>/dev/null | awk '/^cni-/ {print $1}'); do
    if ip -n "$name" -4 -o addr show eth0 2>/dev/null | grep -qF ' 10.244.'; then ip netns delete "$name"; fi
  done
  for link in /sys/class/net/cni[0-9]*; do
    [ ! -d "$link/bridge" ] || ip link delete "${link##*/}"
  done
  nft delete table ip kube-proxy 2>/dev/null || true
  nft delete table ip6 kube-proxy 2>/dev/null || true
  nft delete table inet network-policies 2>/dev/null || true
}

pause_image() { # build the pause image from busybox; tests use it as $REGISTRY/busybox:1
  local container
  if [ ! -f "$ROOT/pause.tar" ] || ! buildah inspect --type image "$PAUSE" >/dev/null 2>&1; then
    rm -f "$ROOT/pause.tar"
    container=$(buildah from scratch)
    buildah copy -q "$container" "$(command -v busybox)" /bin/busybox >/dev/null
    buildah config --entrypoint '["/bin/busybox","sleep","2147483647"]' "$container"
    buildah commit -q --rm "$container" "$PAUSE" >/dev/null
    buildah push -q "$PAUSE" "docker-archive:$ROOT/pause.tar:$PAUSE"
  fi
  buildah push -q --tls-verify=false "$PAUSE" "docker://$REGISTRY/busybox:1"
}

network_config() { # I
  cat <<JSON
{"cniVersion": "0.4.0", "name": "node-$1", "plugins": [
  {"type": "bridge", "bridge": "cni$1", "isGateway": true, "hairpinMode": true,
   "ipam": {"type": "host-local", "dataDir": "$ROOT/node-$1/ipam", "ranges": [[{"subnet": "10.244.$1.0/24"}]],
            "routes": [{"dst": "0.0.0.0/0"}]}},
  {"type": "portmap", "capabilities": {"portMappings": true}}]}
JSON
}

containerd_config() { # DIRECTORY
  # restrict_oom_score_adj: without CAP_SYS_RESOURCE the score can't be lowered, and runc fails with
  # "can't get final child's PID"
  cat <<TOML
version = 2
root = "$1/containerd"
state = "$1/state"
[grpc]
  address = "$1/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "$PAUSE"
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "$1/cni"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
    discard_unpacked_layers = true
TOML
}

kubelet_config() { # I
  local dir=$ROOT/node-$1 ports
  read -ra ports < <(node_ports "$1")
  cat <<YAML
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
cgroupDriver: cgroupfs
cgroupRoot: /$GROUP-$1
oomScoreAdj: 0
failSwapOn: false
failCgroupV1: false
containerRuntimeEndpoint: unix://$dir/containerd.sock
podLogsDir: $dir/logs
clusterDNS: [$DNS]
clusterDomain: cluster.local
healthzPort: ${ports[0]}
port: ${ports[1]}
authentication: {anonymous: {enabled: false}, webhook: {enabled: true}, x509: {clientCAFile: $PKI/ca.crt}}
authorization: {mode: Webhook}
evictionHard: {memory.available: 200Mi, nodefs.available: 1Gi, imagefs.available: 1Gi}
imageGCHighThresholdPercent: 99
imageGCLowThresholdPercent: 98
YAML
}
