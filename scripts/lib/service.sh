# shellcheck shell=sh
# Shared by install.sh and its tests: the systemd unit, its file of variables, and how a service does. For every POSIX shell; sourced
# after packages.sh, not run.

# Where systemd says that it runs the machine (sd_booted(3)).
systemd_runs=/run/systemd/system

# Where services look for programs (systemd.exec(5), "PATH").
service_path=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin

# has_systemd: whether there is a systemd to speak to.
has_systemd() {
  [ -d "$systemd_runs" ] && command -v systemctl >/dev/null
}

# quoted_words WORD…: words as a unit's ExecStart has them (systemd.service(5), "Command lines").
quoted_words() {
  for service_word in "$@"; do
    case $service_word in
      *"
"*) die "an argument has a line break, which no unit can have: $service_word" ;;
    esac
    # shellcheck disable=SC2016 # nothing is to expand
    printf ' %s' "$(printf '%s\n' "$service_word" | sed -e 's/\\/\\\\/g' -e 's/"/\\"/g' -e 's/%/%%/g' -e 's/\$/$$/g' \
      -e '/[^A-Za-z0-9_.,:=@/+-]/s/.*/"&"/' -e 's/^$/""/')"
  done
}

# started_by UNIT: what stands behind the program in the unit's ExecStart, in one line.
started_by() {
  # A line that ends in a backslash goes on in the next one.
  service_line=$(sed -e ':more' -e '/\\$/{' -e N -e 's/\\\n/ /' -e 'b more' -e '}' "$1" | sed -n 's/^ExecStart=//p')
  service_program=${service_line%% *}
  case $service_line in *"
"*) service_program= ;; esac
  case $service_program in
    */nixlet)
      printf '%s\n' "${service_line#"$service_program"}"
      return
      ;;
  esac
  die "$1 was written by somebody else, and what nixlet is to be started with can't be read from it; say it, as in: install.sh server"
}

# parted_words: of words as a unit's ExecStart has them (from standard input) each as it stands, and in the next line as what it means.
parted_words() {
  awk '{
    while (match($0, /^[ \t]*("([^"\\]|\\.)*"|[^ \t"\\]|\\.)+/)) {
      raw = substr($0, 1, RLENGTH)
      $0 = substr($0, RLENGTH + 1)
      sub(/^[ \t]*/, "", raw)
      meant = ""
      rest = raw
      while (rest != "") {
        sign = substr(rest, 1, 1)
        rest = substr(rest, 2)
        if (sign == "\"") continue
        if (sign == "\\" || ((sign == "%" || sign == "$") && substr(rest, 1, 1) == sign)) { sign = substr(rest, 1, 1); rest = substr(rest, 2) }
        meant = meant sign
      }
      print raw
      print meant
    }
    # What is not understood stays as it stands.
    if ($0 ~ /[^ \t]/) { print $0; print "" }
  }'
}

# unit_text TEMPLATE COMMAND VARIABLES [CONFIG]: a unit of deploy/ that starts this command, with the variables of one more file, and
# another config.yaml than nixlet's own.
unit_text() {
  service_command=$2 service_variables=$3 service_config=${4-} awk '
    /^EnvironmentFile=/ && ENVIRON["service_config"] != "" && !told { print "Environment=NIXLET_CONFIG_FILE=" ENVIRON["service_config"]; told = 1 }
    /^ExecStart=/ { print "EnvironmentFile=-" ENVIRON["service_variables"]; print "ExecStart=" ENVIRON["service_command"]; next }
    { print }' "$1"
}

# variables_text FILE [PATH]: the variables for a service: those of our own environment that are meant for nixlet, containerd and
# proxies, as k3s has it, and those that FILE has besides. One that is set to nothing goes. A PATH is only for who has none yet.
variables_text() {
  service_file=$1 service_own_path=${2-} awk '
    function meant(name) {
      return name ~ /^(NIXLET|CONTAINERD)_/ || tolower(name) ~ /^(no|http|https)_proxy$/
    }
    function told(name,   value) {
      value = ENVIRON[name]
      if (value == "") return
      if (value ~ /\n/) {
        print "error: " name " has a line break, which no file of variables can have" | "cat >&2"
        exit 125
      }
      gsub(/[\\"`$]/, "\\\\&", value)
      print name "=\"" value "\""
    }
    BEGIN {
      file = ENVIRON["service_file"]
      while ((getline line < file) > 0) {
        name = line
        sub(/=.*/, "", name)
        if (line ~ /^PATH=/) has_path = 1
        # What did not change must not look changed: each stays in its place.
        if (meant(name) && name in ENVIRON) { if (!(name in done)) told(name); done[name] = 1 } else print line
      }
      count = 0
      for (name in ENVIRON) if (meant(name) && !(name in done)) names[++count] = name
      # An array has no order of its own.
      for (i = 2; i <= count; i++) for (j = i; j > 1 && names[j - 1] > names[j]; j--) {
        name = names[j]; names[j] = names[j - 1]; names[j - 1] = name
      }
      for (i = 1; i <= count; i++) told(names[i])
      if (ENVIRON["service_own_path"] != "" && !has_path) print "PATH=\"" ENVIRON["service_own_path"] "\""
    }' </dev/null
}

# property UNIT NAME: what systemd says of a unit.
property() {
  systemctl show --property "$2" --value "$1"
}

# uptime_seconds: a clock that nobody sets.
uptime_seconds() {
  read -r service_uptime _ </proc/uptime
  echo "${service_uptime%%.*}"
}

# await_ready UNIT BEFORE SECONDS: whether a service that is being started gets ready and stays so. BEFORE is the run of it that was
# there before (its InvocationID).
await_ready() {
  service_end=$(($(uptime_seconds) + $3))
  while :; do
    service_run=$(property "$1" InvocationID)
    service_state=$(property "$1" ActiveState)
    if [ "$service_state" = active ] && [ "$service_run" != "$2" ]; then
      # What dies of its first work was never ready.
      sleep 2
      [ "$(property "$1" ActiveState) $(property "$1" InvocationID)" = "active $service_run" ] && return
    fi
    [ "$service_state" != failed ] || return 1
    # A start may fail for what passes; twice in a row it doesn't. (For a moment systemd may say nothing: it starts itself anew.)
    service_restarts=$(property "$1" NRestarts)
    [ "${service_restarts:-0}" -lt 2 ] || return 1
    [ "$(uptime_seconds)" -lt "$service_end" ] || return 1
    sleep 0.2 2>/dev/null || sleep 1
  done
}

# last_words UNIT: what a service said last.
last_words() {
  journalctl --unit "$1" --lines 15 --no-pager --output cat 2>/dev/null | sed 's/^/    /' >&2 || true
}
