#!/usr/bin/env bash
# Run the tests beyond `make check`, on a real cluster with the built images if this machine can run one:
#   test.sh MARKERS      e.g. "slow or cluster or e2e"
# If KUBECONFIG is set, that cluster is used, with the images of SAILVL_OPERATOR_IMAGE and SAILVL_TRAINER_IMAGE.
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p build

local_cluster() {
  local code=0 was_up
  was_up=$([ -f build/cluster/pki/admin.conf ] && echo yes || true)
  hack/cluster/cluster.sh up </dev/null || code=$?
  if [ "$code" -eq 3 ]; then return; fi # it printed the reason, with which the cluster tests skip
  [ "$code" -eq 0 ] || exit "$code"
  # On a CI machine, stop a cluster that was not up before.
  if [ "${CI:-}" = true ] && [ -z "$was_up" ]; then trap 'hack/cluster/cluster.sh down' EXIT; fi
  eval "$(hack/cluster/cluster.sh env)"
  hack/images/build.sh >build/images.env 2>build/images.log || { tail -40 build/images.log >&2; exit 1; }
  set -a
  # shellcheck source=/dev/null
  source build/images.env
  set +a
}

[ -n "${KUBECONFIG:-}" ] || local_cluster
.venv/bin/pytest -q -m "$1" tests
