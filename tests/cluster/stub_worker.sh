#!/bin/busybox sh
# Stands in for `python -m sailvl_trainer` where the operator is under test: does what $STUB says, and tells the
# operator so in the way of the contract.
#   succeed  a second of work, then a result        hold  until SIGTERM, then as if a checkpoint was saved
#   config   the settings can't work                crash-once  attempt 1 crashes, later ones hold
bb=/bin/busybox
field() { $bb sed -n "s/.*\"$1\": \"\{0,1\}\([^\",}]*\).*/\1/p" "$SAILVL_STAGE_FILE"; }
say() { echo "$1" >"$SAILVL_TERMINATION_LOG"; }
hold() {
  trap 'say "{\"exit_code\": 75, \"message\": \"saved\"}"; exit 75' TERM
  while :; do $bb sleep 0.2; done
}
case $STUB in
  succeed)
    $bb sleep 1
    say "{\"exit_code\": 0, \"result\": {\"stage\": \"$(field stage)\", \"kind\": \"$(field kind)\", \"digest\": \"$(field digest)\",
      \"attempt\": $(field attempt), \"output\": \"found/$(field stage)\", \"metrics\": {\"score\": 0.5}}}" ;;
  hold) hold ;;
  config) say '{"exit_code": 64, "message": "preset huge is unknown", "rank": 0}'; exit 64 ;;
  crash-once) [ "$(field attempt)" = 1 ] || hold; $bb sleep 1; say '{"exit_code": 1, "message": "boom", "rank": 1}'; exit 1 ;;
esac
