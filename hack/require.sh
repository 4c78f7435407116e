#!/usr/bin/env bash
# Install the Debian packages of missing commands if run as root, else name them: require.sh COMMAND...
set -euo pipefail

declare -A package=([git]=git [python3.11]="python3.11 python3.11-venv"
  [busybox]=busybox-static [ip]=iproute2 [nft]=nftables)

missing=()
for command in "$@"; do
  command -v "$command" >/dev/null || missing+=("${package[$command]:-$command}")
done
# these plugins have no command on PATH
case " $* " in *" containerd "*) [ -x /usr/lib/cni/bridge ] || missing+=(containernetworking-plugins) ;; esac
[ ${#missing[@]} -eq 0 ] && exit 0
if [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then
  apt-get update -q >/dev/null
  # shellcheck disable=SC2048,SC2086  # one entry may name several packages
  DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends ${missing[*]} >/dev/null
else
  echo "missing: ${missing[*]}; install with: apt-get install ${missing[*]}" >&2
  exit 1
fi
