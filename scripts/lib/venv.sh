# Shared by the programs in scripts/: the Python environment in .venv. Sourced after packages.sh, not run.

# ensure_venv LOCK: makes .venv, or brings it up to date, from requirements/LOCK.txt (hash-pinned), and installs nixlet
# itself into it. A stamp of what was installed makes the second call free.
ensure_venv() {
  local lock=$1 python stamp=$top/.venv/.nixlet-stamp wanted
  # The place counts as well: what is installed names it.
  wanted=$lock-$({ echo "$top"; cat "$top/requirements/$lock.txt" "$top/pyproject.toml"; } | sha256sum | cut -c1-16)
  # The developers' lock holds all of the users' one: a checkout set up for tests serves the quickstart as it is.
  if [ -f "$stamp" ] && { grep -qx "$wanted" "$stamp" || { [ "$lock" = runtime ] && grep -q '^dev-' "$stamp" && [ "$stamp" -nt "$top/requirements/dev.txt" ]; }; }; then
    return
  fi
  python=$(suitable_python)
  say "Setting up the Python environment in .venv"
  [ -x "$top/.venv/bin/python" ] || "$python" -m venv "$top/.venv" >&2
  local pip=("$top/.venv/bin/python" -m pip --disable-pip-version-check --quiet --no-input)
  "${pip[@]}" install --require-hashes -r "$top/requirements/$lock.txt" >&2 || die "pip could not install requirements/$lock.txt: see above; is PyPI reachable?"
  # An editable install without a build: a .pth file and the console script are all that it would make, and building
  # would need the build back end, which users don't.
  local site
  site=$("$top/.venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  echo "$top/src" >"$site/nixlet.pth"
  cat >"$top/.venv/bin/nixlet" <<SCRIPT
#!$top/.venv/bin/python -P
import sys
from nixlet.__main__ import main
sys.exit(main())
SCRIPT
  chmod 755 "$top/.venv/bin/nixlet"
  # Compiled now, whatever the environment says of byte code: a program that starts often must not compile itself each time.
  "$top/.venv/bin/python" -m compileall -q "$top/src" >&2
  echo "$wanted" >"$stamp"
}

suitable_python() {
  local name
  for name in python3 python3.13 python3.12 python3.11 python3.14; do
    if "$name" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$name"
      return
    fi
  done
  die "no Python 3.11 or later with the venv module is installed"
}
