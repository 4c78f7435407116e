#!/usr/bin/env bash
# Build the demo's data:  demo_data.sh PYTHON DIRECTORY
# It consists of synthetic images, questions and benchmarks, a tiny pretrained language model and, if the package can be
# downloaded, the captioned stamps of Debian's tuxpaint-stamps-default. A complete DIRECTORY is kept. Called by `make data`.
set -euo pipefail
python=$1 directory=$2
tree=build/stamps

[ ! -f "$directory/.complete" ] || exit 0
mkdir -p "$directory/raw/stamps"
if [ ! -d "$tree/usr" ] && command -v apt-get >/dev/null && command -v dpkg >/dev/null; then
  mkdir -p "$tree"
  (cd "$tree" && apt-get download -q tuxpaint-stamps-default && dpkg -x tuxpaint-stamps-default_*.deb .) \
    >build/stamps.log 2>&1 || echo "stamps can't be downloaded (see build/stamps.log); using synthetic images only" >&2
fi
stamps=()
[ ! -d "$tree/usr" ] || stamps=(--stamps "$tree")
"$python" -m sailvl_trainer.demo.build_data "$directory" "${stamps[@]}" --shapes 1800 --questions 1500
"$python" -m sailvl_trainer.demo.tiny_lm "$directory/models/tiny-language"
touch "$directory/.complete"
