#!/bin/busybox sh
# Stub worker for tests of the operator: it replaces the trainer's `python` and behaves as $STUB selects, with the
# exit codes and termination messages of the contract.
#   succeed     work for a second, then report a result
#   hold        run until SIGTERM, then exit as if a checkpoint had been saved
#   slow        like hold, but saving takes 3 s
#   until       like hold, but succeed once the file /data/<run>.<stage> exists
#   meet        like succeed, once both workers have met at the name of the first
#   serve       like hold, and answer every connection on the ports of a worker with the name of the host
#   config      exit with an error in the configuration
#   crash-once  crash in attempt 1, then like hold
# If /data is writable, each worker logs to /data/<run>.journal: stage, attempt, index and event.
bb=/bin/busybox
log=${SAILVL_TERMINATION_LOG:-/dev/termination-log} port=${SAILVL_RENDEZVOUS_PORT:-29500}
field() { $bb sed -n "s/.*\"$1\": *\"\{0,1\}\([^\",}]*\).*/\1/p" "$SAILVL_STAGE_FILE"; }
write_termination() { echo "$1" >"$log"; }
run=$(field run) stage=$(field stage) attempt=$(field attempt)
log_event() { { echo "$stage $attempt $SAILVL_NODE_RANK $1" >>"/data/$run.journal"; } 2>/dev/null; }
save_and_exit() {
  log_event sigterm
  $bb sleep "$1"
  log_event saved
  write_termination '{"exit_code": 75, "message": "saved"}'
  exit 75
}
hold() {
  trap "save_and_exit ${1:-0}" TERM
  while :; do
    $bb sleep 0.2
    [ "$STUB" != until ] || [ ! -e "/data/$run.$stage" ] || return 0
  done
}
succeed() {
  log_event finished
  write_termination "{\"exit_code\": 0, \"result\": {\"stage\": \"$stage\", \"kind\": \"$(field kind)\", \"digest\": \"$(field digest)\",
    \"attempt\": $attempt, \"output\": \"found/$stage\", \"metrics\": {\"score\": 0.5}}}"
}
meet() {
  if [ "$SAILVL_NODE_RANK" = 0 ]; then $bb nc -l -p "$port" </dev/null >/dev/null; return; fi
  until $bb nc -w 2 "$SAILVL_RENDEZVOUS_HOST" "$port" </dev/null 2>/dev/null; do $bb sleep 0.5; done
}
serve() { for each in "$port" 9400; do $bb nc -ll -p "$each" -e $bb hostname & done; }
log_event started
case $STUB in
  succeed) $bb sleep 1; succeed ;;
  meet) meet; succeed ;;
  hold) hold ;;
  serve) serve; hold ;;
  slow) hold 3 ;;
  until) hold; succeed ;;
  config) write_termination '{"exit_code": 64, "message": "preset huge is unknown", "rank": 0}'; exit 64 ;;
  crash-once) [ "$attempt" = 1 ] || hold; $bb sleep 1; write_termination '{"exit_code": 1, "message": "boom", "rank": 1}'; exit 1 ;;
esac
