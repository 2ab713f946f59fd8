#!/usr/bin/env bash
# Start a gateway and two workers with the model tales, and open the chat in a browser: `make demo-cluster`.
# Kill one of them in the middle of an answer: it is started again, and the answer continues. Ctrl-C stops all.
set -euo pipefail
bin=${BIN:-.venv/bin}
url=http://127.0.0.1:${PORT:-8000}
jobs=$(mktemp -d)
loops=()

# Run `moesaic ARGUMENTS...` under a name, and start it again when it was killed, until this shell gets SIGTERM.
supervise() {
    local name=$1 child='' code
    shift
    trap 'kill -TERM "$child" 2>/dev/null; wait "$child"; exit 0' TERM
    while true; do
        "$bin/moesaic" "$@" --drain-timeout 1 --log-format text --log-level warning &
        child=$!
        echo "$name:  kill -9 $child"
        wait "$child" 2>/dev/null && code=0 || code=$?
        [ "$code" -gt 128 ] || exit "$code"
        sleep 0.5
    done
}

stop_all() {
    trap '' INT TERM
    kill -TERM "${loops[@]}" 2>/dev/null || true
    wait || true
    rm -rf "$jobs"
}

supervise "the gateway" gateway --jobs "$jobs/jobs.sqlite" --port "${PORT:-8000}" &
gateway=$!
loops=("$gateway")
for name in one two; do
    supervise "worker $name" worker tales --gateway "$url" --name "$name" &
    loops+=($!)
done
trap stop_all EXIT
trap 'exit 0' INT TERM
echo "the chat is at $url"
"$bin/python" -m webbrowser "$url" >/dev/null 2>&1 || true
wait "$gateway"
