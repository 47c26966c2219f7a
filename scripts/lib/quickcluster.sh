# The part of scripts/quickstart that is a whole Kubernetes cluster. For bash; sourced after packages.sh, not run.

# find_cluster_programs: sets kubectl, and in cluster_flags where the server finds the programs that a cluster is made of. Those that this
# machine has not are built.
find_cluster_programs() {
  local program directory
  cluster_flags=()
  if [ -n "${NIXLET_KUBERNETES_BIN_DIR-}" ]; then
    kubectl=$NIXLET_KUBERNETES_BIN_DIR/kubectl
    [ -x "$kubectl" ] || die "NIXLET_KUBERNETES_BIN_DIR names $NIXLET_KUBERNETES_BIN_DIR, and there is no kubectl"
  else
    kubectl=kubectl
    for program in kube-apiserver kube-controller-manager kube-scheduler kubelet kube-proxy kubectl; do
      if ! command -v "$program" >/dev/null; then
        directory=$(part kubernetes-1.36 "$program") || exit
        cluster_flags+=(--kubernetes-bin-dir "$directory")
        kubectl=$directory/kubectl
        break
      fi
    done
  fi
  # A cluster of a few minutes does without names of services.
  command -v coredns >/dev/null || cluster_flags+=(--disable coredns)
}

# part FAMILY PROGRAM: the directory of a family's programs, which are built if they are not there. What there is already, NIXLET_PARTS says,
# as scripts/parts prints it.
part() {
  local found
  found=$(sed -n "s/^$1 //p" <<<"${NIXLET_PARTS-}")
  if [ -z "$found" ]; then
    say "This machine has no $2: Kubernetes' programs are built from their Go modules, which takes some minutes, once"
    found=$("$top/scripts/parts" "$1" | sed -n "s/^$1 //p") || return
  fi
  echo "$found"
}

# start_cluster: brings it up, at places of its own, to be removed altogether with the end of this program.
start_cluster() {
  local i
  scratch=$(mktemp -d /tmp/nixlet-quickstart.XXXXXX)
  server=
  trap remove_cluster EXIT
  export KUBECONFIG=$scratch/kubeconfig
  say "Starting the cluster"
  "$top/.venv/bin/nixlet" server --snapshotter nix --kubernetes yes --write-kubeconfig "$KUBECONFIG" \
    --data-dir "$NIXLET_DATA_DIR" --state-dir "$NIXLET_STATE_DIR" "${cluster_flags[@]}" >"$scratch/log" 2>&1 &
  server=$!
  for ((i = 0; i < 1800; i++)); do
    kill -0 "$server" 2>/dev/null || { cat "$scratch/log" >&2; die "the cluster did not start: see above"; }
    if [ -s "$KUBECONFIG" ] && "$kubectl" get serviceaccount default >/dev/null 2>&1 &&
      "$kubectl" get nodes 2>/dev/null | grep -q ' Ready '; then
      return
    fi
    sleep 0.1
  done
  tail -n 20 "$scratch/log" >&2
  die "the cluster was not ready after three minutes: see above"
}

# remove_cluster: the end of it, with all that it made.
remove_cluster() {
  if [ -n "$server" ]; then
    say "Removing the cluster"
    kill -TERM "$server" 2>/dev/null && wait "$server" || true
    nixlet uninstall --data-dir "$NIXLET_DATA_DIR" --ignore-missing --yes >"$scratch/removed" 2>&1 || {
      cat "$scratch/removed" >&2
      say "What is left of it is taken away by: $top/.venv/bin/nixlet uninstall --data-dir $NIXLET_DATA_DIR --yes"
    }
  fi
  rm -rf "$scratch"
}

# serve IMAGE: two replicas of it behind a Service, which is asked.
serve() {
  local address i page
  # By no proxy: the address is this machine's own.
  local fetch='import sys, urllib.request as r; print(r.build_opener(r.ProxyHandler({})).open(sys.argv[1], timeout=5).read().decode(), end="")'
  say "Running two replicas of the server, and a Service before them"
  sed "s|@image@|$1|" "$top/nix/examples/server.yaml" | "$kubectl" apply -f - >&2
  "$kubectl" rollout status deployment/nix-server --timeout=120s >&2 || {
    "$kubectl" describe pods >&2
    die "the replicas did not get ready: see above"
  }
  address=$("$kubectl" get service nix-server --output 'jsonpath={.spec.clusterIP}')
  # kube-proxy follows a moment later.
  for ((i = 0; i < 100; i++)); do
    if page=$("$top/.venv/bin/python" -I -c "$fetch" "http://$address/" 2>/dev/null); then
      printf '%s\n\n' "$page"
      "$kubectl" get pods
      return
    fi
    sleep 0.2
  done
  die "the Service at $address does not answer"
}
