# Shared by the programs in scripts/: the Python environment in .venv. Sourced after packages.sh, not run.

source "$top/scripts/lib/environment.sh"
read -ra supported_pythons <<<"$known_pythons"

# ensure_venv LOCK [PYTHON]: makes .venv, or brings it up to date, from requirements/LOCK.txt (hash-pinned), and installs nixlet
# itself into it. A stamp of what was installed makes the second call free. With a version of Python: .venv-VERSION, of that Python.
ensure_venv() {
  local lock=$1 version=${2-} python venv stamp wanted
  venv=$top/.venv${version:+-$version}
  stamp=$venv/$environment_stamp
  # The place counts as well: what is installed names it.
  wanted=$lock-$({ echo "$top"; cat "$top/requirements/$lock.txt" "$top/pyproject.toml" "$top/scripts/lib/"{venv,environment}.sh; } | sha256sum | cut -c1-16)
  # The developers' lock holds all of the users' one: a checkout set up for tests serves the quickstart as it is.
  if [ -f "$stamp" ] && is_sound "$venv" && { grep -qx "$wanted" "$stamp" || { [ "$lock" = runtime ] && grep -q '^dev-' "$stamp" && [ "$stamp" -nt "$top/requirements/dev.txt" ]; }; }; then
    compile_sources "$venv"
    return
  fi
  if [ -n "$version" ]; then
    python=$(python_of "$version") || die "no Python $version with the venv module is installed"
  else
    find_python >/dev/null || need_packages python3 python3-venv
    python=$(suitable_python)
  fi
  say "Setting up the Python environment in ${venv##*/}"
  make_environment "$venv" "$python" "$top/requirements/$lock.txt" ||
    die "pip could not install requirements/$lock.txt: see above; is PyPI reachable?"
  # An editable install without a build: a .pth file and the console script are all that it would make, and building
  # would need the build back end, which users don't.
  echo "$top/src" >"$(site_of "$venv")/nixlet.pth"
  write_program "$venv"
  compile_sources "$venv"
  echo "$wanted" >"$stamp"
}

# compile_sources VENV: compiles what has changed, whatever the environment says of byte code: a program that starts often must not
# compile itself each time. A checkout that belongs to somebody else may have none.
compile_sources() {
  "$1/bin/python" -I -m compileall -q "$top/src" >/dev/null 2>&1 || true
}
