#!/usr/bin/env bash
# The cluster of cluster/local.yaml, on this machine alone.
#
#   cluster/local.sh up [FILE]   # make cluster-up: start it, and print what to set; FILE in place of local.yaml
#   cluster/local.sh down        # make cluster-down: end all of it
#
# Its files, among them the token that it asks for, lie in one folder that only you can enter; HRM_RAY_LOCAL names
# another one than the usual. Ports: 6380 (the cluster), 6381, 8266 (dashboard), 52366; PORT=... moves them all.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
folder=${HRM_RAY_LOCAL:-/tmp/hrm_ray-local-$(id -u)}
port=${PORT:-6380}
dashboard=$((port + 1886))

fail() {
    echo "error: $1" >&2
    exit 2
}

# Whether a process of the cluster is left: all are of one process group, which has the number of the first.
# The number may be another process's by now, if this machine was restarted.
is_up() {
    [ -f "$folder/pid" ] && ps -o args= -p "$(cat "$folder/pid")" | grep -q -F -- "--temp-dir=$folder/ray"
}

up() {
    is_up && fail "it is up already; source $folder/env, or end it: make cluster-down"
    command -v ray >/dev/null || fail "there is no ray command; activate the environment: source .venv/bin/activate"
    mkdir -m 700 "$folder" 2>/dev/null || { [ -d "$folder" ] && [ -O "$folder" ] && [ ! -L "$folder" ]; } ||
        fail "$folder is no folder of yours; set HRM_RAY_LOCAL to another one"
    chmod 700 "$folder"
    rm -rf "$folder/ray"
    (umask 077 && head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n' >"$folder/token")
    sed "s/6380/$port/" "${1:-$here/local.yaml}" >"$folder/cluster.yaml"
    cat >"$folder/env" <<END
export RAY_ADDRESS=127.0.0.1:$port               # hrm-ray and ray take this cluster
export RAY_API_SERVER_ADDRESS=http://127.0.0.1:$dashboard  # hrm-ray submit and ray job too
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$folder/token
export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0          # Ray's word for: on 127.0.0.1
END
    # shellcheck source=/dev/null
    source "$folder/env"
    unset RAY_ADDRESS RAY_API_SERVER_ADDRESS
    export RAY_FAKE_CLUSTER=1 AUTOSCALER_UPDATE_INTERVAL_S=1 RAY_USAGE_STATS_ENABLED=0 RAY_JOB_STOP_WAIT_TIME_S=120
    : >"$folder/log"
    setsid ray start --head --block --num-cpus=0 --temp-dir="$folder/ray" --autoscaling-config="$folder/cluster.yaml" \
        --port="$port" --ray-client-server-port=$((port + 1)) \
        --dashboard-host=127.0.0.1 --dashboard-port="$dashboard" --dashboard-agent-listen-port=$((port + 45986)) \
        </dev/null >"$folder/log" 2>&1 &
    echo $! >"$folder/pid"
    until grep -q "will now block forever" "$folder/log"; do
        kill -0 "$(cat "$folder/pid")" 2>/dev/null || fail "it did not start: $(grep -v '^ *$' "$folder/log" | tail -n 1); all it said: $folder/log"
        sleep 0.2
    done
    echo "the cluster is up, without workers yet; now: source $folder/env"
}

down() {
    is_up || { echo "it is not up"; return; }
    local group
    group=$(cat "$folder/pid")
    kill -TERM -- "-$group"
    for _ in $(seq 50); do
        kill -0 -- "-$group" 2>/dev/null || break
        sleep 0.2
    done
    kill -KILL -- "-$group" 2>/dev/null || true
    rm -rf "${folder:?}"/{ray,pid,log,env,token,cluster.yaml}
    rmdir --ignore-fail-on-non-empty "$folder"
    echo "it is down"
}

case ${1:-} in
up) up "${2:-}" ;;
down) down ;;
*) fail "give up or down" ;;
esac
