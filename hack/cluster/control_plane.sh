# Start etcd, API server, controller manager, scheduler, kube-proxy, DNS, the registry and the process that enforces
# NetworkPolicies as processes of the host.
# Sourced by cluster.sh.
# shellcheck shell=bash

HOST=10.244.0.1 # node 0's bridge: the API server and DNS as pods see them
DNS=10.96.0.10

PORTS=(2379 2380 5000 6443 10249 10250 10256 10257 10259)

control_plane() {
  authority
  certificate apiserver /CN=kube-apiserver "DNS:localhost,DNS:kubernetes,DNS:kubernetes.default,DNS:kubernetes.default.svc,\
DNS:kubernetes.default.svc.cluster.local,IP:127.0.0.1,IP:10.96.0.1,IP:$HOST"
  credentials admin /O=system:masters/CN=admin
  credentials controller-manager /CN=system:kube-controller-manager
  credentials scheduler /CN=system:kube-scheduler
  credentials proxy /CN=system:kube-proxy
  bridge 0
  start etcd "$BIN/etcd" --data-dir "$ROOT/etcd" --unsafe-no-fsync --listen-peer-urls http://127.0.0.1:2380 \
    --listen-client-urls http://127.0.0.1:2379 --advertise-client-urls http://127.0.0.1:2379
  api_server
  await 60 kubectl get --raw /readyz
  controllers
}

api_server() { # PodSecurity is enabled by default; the labels of a namespace select its level
  start apiserver "$BIN/kube-apiserver" --etcd-servers=http://127.0.0.1:2379 --secure-port=6443 --advertise-address="$HOST" \
    --client-ca-file="$PKI/ca.crt" --tls-cert-file="$PKI/apiserver.crt" --tls-private-key-file="$PKI/apiserver.key" \
    --service-account-key-file="$PKI/sa.pub" --service-account-signing-key-file="$PKI/sa.key" \
    --service-account-issuer=https://kubernetes.default.svc --service-cluster-ip-range=10.96.0.0/16 \
    --authorization-mode=Node,RBAC --enable-admission-plugins=NodeRestriction --allow-privileged=true \
    --kubelet-client-certificate="$PKI/admin.crt" --kubelet-client-key="$PKI/admin.key" \
    --kubelet-preferred-address-types=InternalIP
}

controllers() { # $CONTROLLER_QPS limits the pods that the Job controller creates per second; Kubernetes' default is 20
  local qps=${CONTROLLER_QPS:-20}
  component controller-manager --use-service-account-credentials --service-account-private-key-file="$PKI/sa.key" \
    --root-ca-file="$PKI/ca.crt" --node-monitor-grace-period=20s --kube-api-qps="$qps" --kube-api-burst="$((qps * 3 / 2))"
  component scheduler
  start proxy "$BIN/kube-proxy" --kubeconfig="$PKI/proxy.conf" --hostname-override=node-0 --proxy-mode=nftables \
    --cluster-cidr=10.244.0.0/16
}

component() { # NAME FLAGS...: start a component with its own credentials for the API server
  local name=$1 conf=$PKI/$1.conf
  shift
  start "$name" "$BIN/kube-$name" --kubeconfig="$conf" --authentication-kubeconfig="$conf" \
    --authorization-kubeconfig="$conf" --leader-elect=false "$@"
}

registry() { # the nodes share the host's network, so they pull from localhost
  cat >"$ROOT/registry.yml" <<YAML
version: 0.1
log: {level: warn, accesslog: {disabled: true}}
storage: {filesystem: {rootdirectory: $ROOT/registry}, delete: {enabled: true}}
http: {addr: "127.0.0.1:5000"}
YAML
  start registry docker-registry serve "$ROOT/registry.yml"
  await 10 bash -c '</dev/tcp/127.0.0.1/5000'
}

network_policies() { # one process for all nodes, because they share the host's network
  start policies python3 "$HERE/network_policies.py" "$API" "$PKI"
}

dns() { # CoreDNS runs on the host; a Service without a selector points to it
  cat >"$ROOT/Corefile" <<CONF
.:10053 {
  bind $HOST
  errors
  kubernetes cluster.local {
    kubeconfig $KUBECONFIG
    pods insecure
  }
  forward . /etc/resolv.conf
  cache 5
}
CONF
  start coredns "$BIN/coredns" -conf "$ROOT/Corefile"
  kubectl apply -f - >/dev/null <<YAML
apiVersion: v1
kind: Service
metadata: {name: kube-dns, namespace: kube-system}
spec: {clusterIP: $DNS, ports: [{name: dns, port: 53, protocol: UDP}, {name: dns-tcp, port: 53, protocol: TCP}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: kube-dns-host, namespace: kube-system, labels: {kubernetes.io/service-name: kube-dns}}
addressType: IPv4
endpoints: [{addresses: [$HOST], conditions: {ready: true}}]
ports: [{name: dns, port: 10053, protocol: UDP}, {name: dns-tcp, port: 10053, protocol: TCP}]
YAML
}
