#!/usr/bin/env bash
# A gateway and two workers with the built-in model on this machine, and the chat in a browser: `make demo-cluster`.
# Kill a worker in the middle of an answer: the answer goes on, and the worker is started again. Ctrl-C ends it all.
set -euo pipefail
bin=${BIN:-.venv/bin}
url=http://127.0.0.1:${PORT:-8000}
jobs=$(mktemp -d)
loops=()
pressed=

# Runs a worker, and another when it ends, until it is told to end itself.
supervise() {
    worker=
    trap 'kill -TERM "$worker" 2>/dev/null; wait "$worker"; exit 0' TERM
    while true; do
        "$bin/moesaic" worker --gateway "$url" --name "$1" --drain-timeout 1 --log-format text --log-level warning &
        worker=$!
        echo "worker $1:  kill -9 $worker"
        wait "$worker" 2>/dev/null || true
        sleep 0.5
    done
}

end() {
    trap '' INT TERM
    kill -TERM "${loops[@]}" 2>/dev/null || true
    [ "$pressed" ] || kill -TERM "$gateway" 2>/dev/null || true  # a key has told the gateway already; twice is at once
    wait || true
    rm -rf "$jobs"
}

"$bin/moesaic" gateway --jobs "$jobs/jobs.sqlite" --port "${PORT:-8000}" --drain-timeout 1 --log-format text --log-level warning &
gateway=$!
for name in one two; do
    supervise "$name" &
    loops+=($!)
done
trap end EXIT
trap 'exit 0' TERM
trap 'pressed=yes; exit 0' INT
echo "the chat is at $url"
"$bin/python" -m webbrowser "$url" >/dev/null 2>&1 || true
wait "$gateway"
