# Start, await and end the cluster's processes. Sourced by cluster.sh.
# A process is ours if its command line names the state folder ($ROOT); no other process is ever ended.
# shellcheck shell=bash

start() { # NAME COMMAND...: start in the background, detached from this script and its terminal
  local name=$1
  shift
  setsid "$@" >"$ROOT/log/$name.log" 2>&1 </dev/null 9>&- &
  echo $! >"$ROOT/$name.pid"
}

is_ours() { # PID
  grep -qzF -- "$ROOT/" "/proc/$1/cmdline" 2>/dev/null
}

is_running() { # NAME
  [ -f "$ROOT/$1.pid" ] && is_ours "$(cat "$ROOT/$1.pid")"
}

await() { # SECONDS COMMAND...
  local until=$((SECONDS + $1))
  shift
  until "$@" >/dev/null 2>&1; do
    ((SECONDS < until)) || die "timed out: $* (logs in $ROOT/log)"
    sleep 0.2
  done
}

stop() { # NAME...: SIGTERM all, and SIGKILL after 3 s; the API server would take a minute
  local name pid pids=()
  for name in "$@"; do
    if is_running "$name"; then pids+=("$(cat "$ROOT/$name.pid")"); fi
    rm -f "$ROOT/$name.pid"
  done
  [ ${#pids[@]} -eq 0 ] || end "${pids[@]}"
}

end() { # PID...
  local pid i
  kill "$@" 2>/dev/null || true
  for ((i = 0; i < 15; i++)); do
    kill -0 "$@" 2>/dev/null || break
    sleep 0.2
  done
  for pid in "$@"; do
    if is_ours "$pid"; then kill -9 "$pid" 2>/dev/null || true; fi
  done
  for pid in "$@"; do
    while is_ours "$pid"; do sleep 0.05; done
  done
}

stop_strays() { # FOLDER: end its processes that have no pid file, and the shims of its containers
  local proc pids=()
  for proc in /proc/[0-9]*; do
    case $(readlink "$proc/exe" 2>/dev/null) in
      */etcd | */kube-* | */kubelet | */coredns | */containerd | */containerd-shim-* | */docker-registry | */python3*)
        if grep -qzF -- "$1/" "$proc/cmdline" 2>/dev/null && is_part "$proc"; then pids+=("${proc#/proc/}"); fi ;;
    esac
  done
  [ ${#pids[@]} -eq 0 ] || end "${pids[@]}"
}

is_part() { # PROC: whether a process is one that this script starts; other programs in Python may name the folder, too
  case $(readlink "$1/exe") in */python3*) grep -qzF -- "$HERE/network_policies.py" "$1/cmdline" ;; esac
}

listeners() { # PORT...: print the processes that listen on them
  local port
  for port in "$@"; do ss -Hltnp "sport = :$port"; done | grep -oE '"[^"]+",pid=[0-9]+' | sort -u | tr '\n' ' '
}

die() {
  echo "cluster: $*" >&2
  exit 1
}
