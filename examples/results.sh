#!/usr/bin/env bash
# Quantize one model with each recipe and measure each on the same windows: the rows of docs/results.md.
#
#   examples/results.sh MODEL FOLDER [extra options of rrsq quantize, such as --device cuda]
set -euo pipefail
model=$1 folder=$2
shift 2
mkdir -p "$folder"

measure() { # NAME MODEL
  rrsq eval "$2" --tasks wikitext2 --limit 24 --dtype float32 --json "$folder/$1.json"
}

measure full-precision "$model"
for recipe in rtn-w4a4 gptq-w4a16 w16a16kv4 quarot-w4a4kv4 rrs-paper-w4a4kv4 rrs-w4a8kv4 rrs-w4a4kv4; do
  rrsq quantize "$model" -o "$folder/$recipe" --recipe "$recipe" --overwrite "$@"
  measure "$recipe" "$folder/$recipe"
done
