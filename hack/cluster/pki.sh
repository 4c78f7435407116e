# The cluster's certificate authority, certificates and credentials, under $PKI. Sourced by cluster.sh.
# shellcheck shell=bash

authority() {
  [ -f "$PKI/sa.pub" ] && return
  openssl req -x509 -newkey rsa:2048 -nodes -keyout "$PKI/ca.key" -out "$PKI/ca.crt" -days 365 -subj /CN=sailvl-cluster 2>/dev/null
  openssl genrsa -out "$PKI/sa.key" 2048 2>/dev/null
  openssl rsa -in "$PKI/sa.key" -pubout -out "$PKI/sa.pub" 2>/dev/null
}

certificate() { # NAME SUBJECT [SUBJECT_ALT_NAMES]
  [ -f "$PKI/$1.crt" ] && return
  openssl req -newkey rsa:2048 -nodes -keyout "$PKI/$1.key" -out "$PKI/$1.csr" -subj "$2" 2>/dev/null
  openssl x509 -req -in "$PKI/$1.csr" -CA "$PKI/ca.crt" -CAkey "$PKI/ca.key" -CAcreateserial -days 365 \
    -out "$PKI/$1.crt" -extfile <(echo "subjectAltName=${3:-DNS:$1}") 2>/dev/null
}

credentials() { # NAME SUBJECT: create a client certificate and the kubeconfig NAME.conf
  certificate "$1" "$2"
  cat >"$PKI/$1.conf" <<YAML
apiVersion: v1
kind: Config
clusters: [{name: sailvl, cluster: {server: "$API", certificate-authority-data: $(base64 -w0 "$PKI/ca.crt")}}]
users:
- name: $1
  user: {client-certificate-data: $(base64 -w0 "$PKI/$1.crt"), client-key-data: $(base64 -w0 "$PKI/$1.key")}
contexts: [{name: sailvl, context: {cluster: sailvl, user: $1}}]
current-context: sailvl
YAML
}
