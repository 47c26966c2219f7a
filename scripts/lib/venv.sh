# Shared by the programs in scripts/: the Python environment in .venv. Sourced after packages.sh, not run.

# The versions of Python that nixlet supports.
supported_pythons=(3.11 3.12 3.13 3.14)

# ensure_venv LOCK [PYTHON]: makes .venv, or brings it up to date, from requirements/LOCK.txt (hash-pinned), and installs nixlet
# itself into it. A stamp of what was installed makes the second call free. With a version of Python: .venv-VERSION, of that Python.
ensure_venv() {
  local lock=$1 version=${2-} python venv stamp wanted
  venv=$top/.venv${version:+-$version}
  stamp=$venv/.nixlet-stamp
  # The place counts as well: what is installed names it.
  wanted=$lock-$({ echo "$top"; cat "$top/requirements/$lock.txt" "$top/pyproject.toml" "$top/scripts/lib/venv.sh"; } | sha256sum | cut -c1-16)
  # The developers' lock holds all of the users' one: a checkout set up for tests serves the quickstart as it is.
  if [ -f "$stamp" ] && is_sound "$venv" && { grep -qx "$wanted" "$stamp" || { [ "$lock" = runtime ] && grep -q '^dev-' "$stamp" && [ "$stamp" -nt "$top/requirements/dev.txt" ]; }; }; then
    compile_sources "$venv"
    return
  fi
  if [ -n "$version" ]; then
    python=$(python_of "$version") || die "no Python $version with the venv module is installed"
  else
    python=$(suitable_python)
  fi
  say "Setting up the Python environment in ${venv##*/}"
  # -I: nothing is imported from the working directory, which may be anybody's.
  is_sound "$venv" || { rm -f "$stamp"; "$python" -I -m venv --clear "$venv" >&2; }
  local pip=("$venv/bin/python" -I -m pip --disable-pip-version-check --quiet --no-input)
  "${pip[@]}" install --require-hashes -r "$top/requirements/$lock.txt" >&2 || die "pip could not install requirements/$lock.txt: see above; is PyPI reachable?"
  # An editable install without a build: a .pth file and the console script are all that it would make, and building
  # would need the build back end, which users don't.
  local site
  site=$("$venv/bin/python" -I -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  echo "$top/src" >"$site/nixlet.pth"
  local first="#!$venv/bin/python -P"
  # The kernel cuts such a line at a blank, and after 127 bytes. There a shell reads two lines that are a string for Python.
  if [[ $venv = *[[:space:]]* || ${#venv} -gt 100 ]]; then
    first="#!/bin/sh"$'\n'"'''exec' \"$venv/bin/python\" -P \"\$0\" \"\$@\""$'\n'"' '''"
  fi
  cat >"$venv/bin/nixlet" <<SCRIPT
$first
import sys
from nixlet.__main__ import main
sys.exit(main())
SCRIPT
  chmod 755 "$venv/bin/nixlet"
  compile_sources "$venv"
  echo "$wanted" >"$stamp"
}

# compile_sources VENV: compiles what has changed, whatever the environment says of byte code: a program that starts often must not
# compile itself each time. A checkout that belongs to somebody else may have none.
compile_sources() {
  "$1/bin/python" -I -m compileall -q "$top/src" >/dev/null 2>&1 || true
}

# is_sound VENV: whether an environment is whole. One whose making was cut off has no pip that works, and neither has one whose
# Python was replaced by another version, which looks into a directory of its own.
is_sound() {
  if [ -f "$1/.nixlet-stamp" ]; then
    "$1/bin/python" -I -c 'import pip'
  else
    "$1/bin/python" -I -m pip --version
  fi >/dev/null 2>&1
}

suitable_python() {
  local version
  if is_python python3; then command -v python3; return; fi
  for version in 3.13 3.12 3.11 3.14; do python_of "$version" && return; done
  die "no Python 3.11 or later with the venv module is installed"
}

# is_python PROGRAM [VERSION]: whether it is a supported Python that can make environments, of that version.
is_python() {
  "$1" -I -c "import sys, ensurepip, venv; sys.exit('%d.%d' % sys.version_info[:2] not in '${2-${supported_pythons[*]}}'.split())" 2>/dev/null
}

# python_of VERSION: the program of a version ("3.13"), on PATH or one of pyenv's.
python_of() {
  local program
  for program in "$(command -v "python$1")" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$1".*/bin/python3; do
    # pyenv puts programs on PATH that only say that their version is not chosen.
    if [ -x "$program" ] && is_python "$program" "$1"; then
      echo "$program"
      return
    fi
  done
  return 1
}
