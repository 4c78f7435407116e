#!/bin/busybox sh
# Stands in for `python -m sailvl_trainer` where the operator is under test: does what $STUB says, and tells the
# operator so in the way of the contract.
#   succeed  a second of work, then a result        hold  until SIGTERM, then as if a checkpoint was saved
#   config   the settings can't work                crash-once  attempt 1 crashes, later ones hold
#   slow     as hold, but saving takes 3 s          until  as hold, but ends as succeed once /data/<run>.<stage> is there
#   meet     as succeed, once two workers have met at the name of the first
# Where it may write there, /data/<run>.journal has a line for each thing that a worker did: stage attempt index word.
bb=/bin/busybox
log=${SAILVL_TERMINATION_LOG:-/dev/termination-log} port=${SAILVL_RENDEZVOUS_PORT:-29500}
field() { $bb sed -n "s/.*\"$1\": *\"\{0,1\}\([^\",}]*\).*/\1/p" "$SAILVL_STAGE_FILE"; }
say() { echo "$1" >"$log"; }
run=$(field run) stage=$(field stage) attempt=$(field attempt)
note() { { echo "$stage $attempt $SAILVL_NODE_RANK $1" >>"/data/$run.journal"; } 2>/dev/null; }
save() {
  note sigterm
  $bb sleep "$1"
  note saved
  say '{"exit_code": 75, "message": "saved"}'
  exit 75
}
hold() {
  trap "save ${1:-0}" TERM
  while :; do
    $bb sleep 0.2
    [ "$STUB" != until ] || [ ! -e "/data/$run.$stage" ] || return 0
  done
}
succeed() {
  note done
  say "{\"exit_code\": 0, \"result\": {\"stage\": \"$stage\", \"kind\": \"$(field kind)\", \"digest\": \"$(field digest)\",
    \"attempt\": $attempt, \"output\": \"found/$stage\", \"metrics\": {\"score\": 0.5}}}"
}
meet() {
  if [ "$SAILVL_NODE_RANK" = 0 ]; then $bb nc -l -p "$port" </dev/null >/dev/null; return; fi
  until $bb nc -w 2 "$SAILVL_RENDEZVOUS_HOST" "$port" </dev/null 2>/dev/null; do $bb sleep 0.5; done
}
note began
case $STUB in
  succeed) $bb sleep 1; succeed ;;
  meet) meet; succeed ;;
  hold) hold ;;
  slow) hold 3 ;;
  until) hold; succeed ;;
  config) say '{"exit_code": 64, "message": "preset huge is unknown", "rank": 0}'; exit 64 ;;
  crash-once) [ "$attempt" = 1 ] || hold; $bb sleep 1; say '{"exit_code": 1, "message": "boom", "rank": 1}'; exit 1 ;;
esac
