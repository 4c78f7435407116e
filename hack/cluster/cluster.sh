#!/usr/bin/env bash
# A real Kubernetes on one machine without Docker: control plane, nodes (containerd and kubelet each), DNS, a registry.
#   cluster.sh up [NODES] | add-node I | kill-node I | load IMAGE | env | down
# Needs root. State lies in $ROOT (default build/cluster below the working directory), binaries come from build.sh.
set -euo pipefail
HERE=$(cd "$(dirname "$0")" && pwd)
ROOT=$(realpath -m "${ROOT:-build/cluster}")
BIN=${BIN:-$("$HERE/build.sh")}
export PATH=$BIN:$PATH
PKI=$ROOT/pki; export KUBECONFIG=$PKI/admin.conf STORAGE_DRIVER=overlay
API=https://127.0.0.1:6443; HOST_IP=10.244.0.1          # node 0's bridge address: the API server as pods see it
NEEDS=(containerd runc buildah docker-registry busybox ip nft conntrack openssl)
mkdir -p "$PKI" "$ROOT/log"

is_ours() { # PIDFILE: whether the process it names still runs and is the one that we started
  [ -f "$1" ] && grep -qzF -- "$ROOT" "/proc/$(cat "$1")/cmdline" 2>/dev/null; }
is_up() { is_ours "$ROOT/apiserver.pid" && kubectl get --raw /readyz >/dev/null 2>&1; }
sweep() { # what a killed predecessor left: processes, mounts, the containers' cgroups
  for f in "$ROOT"/node-*.kubelet.pid; do [ ! -f "$f" ] || kill_node "$(basename "$f" .kubelet.pid | cut -d- -f2)"; done
  stop "$ROOT"/*.pid
  for m in $(awk -v r="$ROOT" 'index($2, r) == 1 {print $2}' /proc/mounts | sort -r); do umount -l "$m"; done; }
start() { local name=$1; shift; nohup "$@" >"$ROOT/log/$name.log" 2>&1 & echo $! >"$ROOT/$name.pid"; }
stop()  { # PIDFILE...: ask, wait 10 s, then kill (the API server takes a minute to leave by itself and keeps its port)
  local f pid i; for f in "$@"; do is_ours "$f" || { rm -f "$f"; continue; }; kill "$(cat "$f")" 2>/dev/null || true; done
  for f in "$@"; do [ -f "$f" ] || continue; pid=$(cat "$f")
    for ((i = 0; i < 50; i++)); do kill -0 "$pid" 2>/dev/null || break; sleep 0.2; done
    kill -9 "$pid" 2>/dev/null || true; rm -f "$f"; done; }
await() { # SECONDS COMMAND...
  local until=$((SECONDS + $1)); shift
  until "$@" >/dev/null 2>&1; do ((SECONDS < until)) || { echo "timed out: $* (logs in $ROOT/log)" >&2; exit 1; }; sleep 0.2; done; }
cert()  { # NAME SUBJECT [SAN]: a client or server certificate signed by the cluster's CA
  [ -f "$PKI/$1.crt" ] && return
  openssl req -newkey rsa:2048 -nodes -keyout "$PKI/$1.key" -out "$PKI/$1.csr" -subj "$2" 2>/dev/null
  openssl x509 -req -in "$PKI/$1.csr" -CA "$PKI/ca.crt" -CAkey "$PKI/ca.key" -CAcreateserial -days 365 \
    -out "$PKI/$1.crt" -extfile <(echo "subjectAltName=${3:-DNS:$1}") 2>/dev/null; }
kubeconfig() { # NAME SUBJECT
  cert "$1" "$2"; local k=(kubectl config --kubeconfig="$PKI/$1.conf")
  "${k[@]}" set-cluster local --server=$API --certificate-authority="$PKI/ca.crt" --embed-certs >/dev/null
  "${k[@]}" set-credentials "$1" --client-certificate="$PKI/$1.crt" --client-key="$PKI/$1.key" --embed-certs >/dev/null
  "${k[@]}" set-context local --cluster=local --user="$1" >/dev/null; "${k[@]}" use-context local >/dev/null; }

control_plane() {
  [ -f "$PKI/ca.crt" ] || openssl req -x509 -newkey rsa:2048 -nodes -keyout "$PKI/ca.key" -out "$PKI/ca.crt" -days 365 -subj /CN=local-ca 2>/dev/null
  [ -f "$PKI/sa.key" ] || { openssl genrsa -out "$PKI/sa.key" 2048; openssl rsa -in "$PKI/sa.key" -pubout -out "$PKI/sa.pub"; } 2>/dev/null
  cert apiserver /CN=kube-apiserver "DNS:localhost,DNS:kubernetes,DNS:kubernetes.default,DNS:kubernetes.default.svc,IP:127.0.0.1,IP:10.96.0.1,IP:$HOST_IP"
  kubeconfig admin /O=system:masters/CN=admin; kubeconfig controller-manager /CN=system:kube-controller-manager
  kubeconfig scheduler /CN=system:kube-scheduler; kubeconfig proxy /CN=system:kube-proxy
  start etcd "$BIN/etcd" --data-dir "$ROOT/etcd" --unsafe-no-fsync \
    --listen-client-urls http://127.0.0.1:2379 --advertise-client-urls http://127.0.0.1:2379 --listen-peer-urls http://127.0.0.1:2380
  bridge 0
  start apiserver "$BIN/kube-apiserver" --etcd-servers=http://127.0.0.1:2379 --secure-port=6443 --advertise-address=$HOST_IP \
    --client-ca-file="$PKI/ca.crt" --tls-cert-file="$PKI/apiserver.crt" --tls-private-key-file="$PKI/apiserver.key" \
    --service-account-key-file="$PKI/sa.pub" --service-account-signing-key-file="$PKI/sa.key" \
    --service-account-issuer=https://kubernetes.default.svc --service-cluster-ip-range=10.96.0.0/16 \
    --authorization-mode=Node,RBAC --enable-admission-plugins=NodeRestriction --allow-privileged=true \
    --kubelet-client-certificate="$PKI/admin.crt" --kubelet-client-key="$PKI/admin.key" --kubelet-preferred-address-types=InternalIP
  await 60 kubectl get --raw /readyz
  local c=$PKI/controller-manager.conf s=$PKI/scheduler.conf
  start controller-manager "$BIN/kube-controller-manager" --kubeconfig="$c" --authentication-kubeconfig="$c" --authorization-kubeconfig="$c" \
    --service-account-private-key-file="$PKI/sa.key" --root-ca-file="$PKI/ca.crt" --use-service-account-credentials --leader-elect=false \
    --node-monitor-grace-period=20s
  start scheduler "$BIN/kube-scheduler" --kubeconfig="$s" --authentication-kubeconfig="$s" --authorization-kubeconfig="$s" --leader-elect=false
  start proxy "$BIN/kube-proxy" --kubeconfig="$PKI/proxy.conf" --hostname-override=node-0 --proxy-mode=nftables --cluster-cidr=10.244.0.0/16
}

bridge() { ip link show "cni$1" >/dev/null 2>&1 || { ip link add "cni$1" type bridge; ip addr add "10.244.$1.1/24" dev "cni$1"; ip link set "cni$1" up; }; }

node() { # I: containerd and kubelet of their own
  local i=$1 dir=$ROOT/node-$1; mkdir -p "$dir/cni" "$dir/logs"; bridge "$i"; sysctl -qw net.ipv4.ip_forward=1
  kubeconfig "node-$i" "/O=system:nodes/CN=system:node:node-$i"
  cat >"$dir/cni/10-bridge.conflist" <<J
{"cniVersion": "0.4.0", "name": "node-$i", "plugins": [
  {"type": "bridge", "bridge": "cni$i", "isGateway": true, "hairpinMode": true,
   "ipam": {"type": "host-local", "dataDir": "$dir/ipam", "ranges": [[{"subnet": "10.244.$i.0/24"}]], "routes": [{"dst": "0.0.0.0/0"}]}},
  {"type": "portmap", "capabilities": {"portMappings": true}}]}
J
  # restrict_oom_score_adj: a machine without CAP_SYS_RESOURCE can't lower it, and runc dies with "can't get final child's PID"
  cat >"$dir/containerd.toml" <<T
version = 2
root = "$dir/containerd"
state = "$dir/state"
[grpc]
  address = "$dir/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "localhost/pause:1"
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "$dir/cni"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
    discard_unpacked_layers = true
T
  for h in cpu cpuacct cpuset memory devices freezer blkio pids systemd; do [ -d /sys/fs/cgroup/$h ] && mkdir -p "/sys/fs/cgroup/$h/node-$i"; done
  for f in cpus mems; do [ -d /sys/fs/cgroup/cpuset ] && cat /sys/fs/cgroup/cpuset/cpuset.$f >"/sys/fs/cgroup/cpuset/node-$i/cpuset.$f"; done
  cat >"$dir/kubelet.yaml" <<Y
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
cgroupDriver: cgroupfs
cgroupRoot: /node-$i
oomScoreAdj: 0
failSwapOn: false
containerRuntimeEndpoint: unix://$dir/containerd.sock
podLogsDir: $dir/logs
clusterDNS: [10.96.0.10]
clusterDomain: cluster.local
port: $((10250 + 100 * i))
healthzPort: $((10248 + 100 * i))
authentication: {anonymous: {enabled: false}, webhook: {enabled: true}, x509: {clientCAFile: $PKI/ca.crt}}
authorization: {mode: Webhook}
evictionHard: {memory.available: 200Mi, nodefs.available: 2%, imagefs.available: 2%}
imageGCHighThresholdPercent: 99
imageGCLowThresholdPercent: 98
Y
  start "node-$i.containerd" containerd -c "$dir/containerd.toml"
  await 30 ctr -a "$dir/containerd.sock" version
  pause_image; ctr -a "$dir/containerd.sock" -n k8s.io images import "$ROOT/pause.tar" >/dev/null
  start "node-$i.kubelet" "$BIN/kubelet" --config="$dir/kubelet.yaml" --kubeconfig="$PKI/node-$i.conf" --hostname-override="node-$i" \
    --root-dir="$dir/kubelet" --node-ip="10.244.$i.1"
  await 60 kubectl get node "node-$i"
  kubectl wait --for=condition=Ready "node/node-$i" --timeout=60s >/dev/null
}

pause_image() {
  [ -f "$ROOT/pause.tar" ] && return
  local c; c=$(buildah from scratch); buildah copy -q "$c" /bin/busybox /bin/busybox >/dev/null
  buildah config --entrypoint '["/bin/busybox","sleep","2147483647"]' "$c"; buildah commit -q "$c" localhost/pause:1 >/dev/null; buildah rm "$c" >/dev/null
  buildah push -q localhost/pause:1 "docker-archive:$ROOT/pause.tar:localhost/pause:1"
}

registry() {
  printf 'version: 0.1\nstorage: {filesystem: {rootdirectory: %s/registry}, delete: {enabled: true}}\nhttp: {addr: "127.0.0.1:5000"}\n' "$ROOT" >"$ROOT/registry.yml"
  start registry docker-registry serve "$ROOT/registry.yml"
}

dns() { # CoreDNS runs beside the control plane; a selector-less Service points at it
  printf '.:10053 {\n  bind %s\n  errors\n  kubernetes cluster.local {\n    kubeconfig %s\n    pods insecure\n  }\n  cache 5\n}\n' "$HOST_IP" "$KUBECONFIG" >"$ROOT/Corefile"
  start coredns "$BIN/coredns" -conf "$ROOT/Corefile"
  kubectl apply -f - >/dev/null <<Y
apiVersion: v1
kind: Service
metadata: {name: kube-dns, namespace: kube-system}
spec: {clusterIP: 10.96.0.10, ports: [{name: dns, port: 53, protocol: UDP}, {name: dns-tcp, port: 53, protocol: TCP}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: kube-dns-host, namespace: kube-system, labels: {kubernetes.io/service-name: kube-dns}}
addressType: IPv4
endpoints: [{addresses: [$HOST_IP], conditions: {ready: true}}]
ports: [{name: dns, port: 10053, protocol: UDP}, {name: dns-tcp, port: 10053, protocol: TCP}]
Y
}

kill_node() { # as a machine that loses its power: kubelet, containerd and every container of the node at once
  stop "$ROOT/node-$1.kubelet.pid" "$ROOT/node-$1.containerd.pid"
  local procs; procs=$(find "/sys/fs/cgroup/pids/node-$1" -name cgroup.procs -exec cat {} + 2>/dev/null || true)
  [ -z "$procs" ] || kill -9 $procs 2>/dev/null || true
}

case ${1:-} in
  up) if is_up; then exit 0; fi
      "$HERE/../require.sh" "${NEEDS[@]}"; sweep; rm -rf "$ROOT/etcd"
      control_plane; registry; dns; for ((i = 0; i < ${2:-2}; i++)); do node $i; done; kubectl get nodes -o wide ;;
  add-node) node "$2" ;;
  kill-node) kill_node "$2" ;;
  load) # a buildah image, to the registry at localhost:5000, from which the nodes pull; only changed layers travel
    buildah push -q --tls-verify=false --compression-format zstd --compression-level 1 "$2" "docker://$2" ;;
  env) echo "export KUBECONFIG=$KUBECONFIG REGISTRY=localhost:5000 PATH=$BIN:\$PATH" ;;
  down) sweep ;;
  *) sed -n 3p "$0"; exit 2 ;;
esac
