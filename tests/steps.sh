# The steps of tests/run and tests/full, and how they are counted. Sourced by both, in the root of
# the checkout; runs nothing by itself. Deliberately not here: what is tested, which is in the
# rooms, in tests/tests and in tests/mininet.
# shellcheck shell=bash

passed=0
failed=0
# Of each step that is running: its process group, and when it began.
declare -A group=() since=()
logs=
# Given to every test program; tests/full adds those tests that take long.
test_options=()

begin_checks() {
    # The logs are read by people and by awk, not by a terminal.
    export TERM=dumb CARGO_TERM_COLOR=never
    # CI has no next build to keep anything for, and panics say their line without debug information.
    [ "${CI:-}" != true ] || export CARGO_INCREMENTAL=0 CARGO_PROFILE_DEV_DEBUG=none
    logs=${CARGO_TARGET_DIR:-target}/checks
    mkdir -p "$logs"
    trap 'interrupted INT 130' INT
    trap 'interrupted TERM 143' TERM
    trap 'interrupted TERM 129' HUP
}

# Ends the steps under way with all that they started (a step is a process group of its own), and
# still says what was counted.
interrupted() {
    local name
    trap '' INT TERM HUP
    for name in "${!group[@]}"; do
        kill "-$1" -- "-${group[$name]}" 2>/dev/null || true
        wait "${group[$name]}" 2>/dev/null || true
    done
    echo "interrupted"
    failed=$((failed + 1))
    echo "$passed passed, $failed failed"
    exit "$2"
}

end_checks() {
    echo "$passed passed, $failed failed"
    [ "$failed" -eq 0 ]
}

# begin NAME COMMAND...: it runs beside whatever comes next, and its output goes to a file.
begin() {
    local name=$1
    shift
    since[$name]=$SECONDS
    setsid "$@" >"$logs/$name.log" 2>&1 </dev/null &
    group[$name]=$!
}

# end NAME: waits for it; returns its exit code.
end() {
    local code=0
    wait "${group[$1]}" || code=$?
    unset "group[$1]"
    return "$code"
}

# say NAME WORD SECONDS [FIGURES]
say() { printf '%-12s %-6s %4d s  %s\n' "$1" "$2" "$3" "${4:-}"; }

tail_of() {
    sed 's/^/    /' "$logs/$1.log" | tail -n "${2:-25}"
    echo "    (all of it: $logs/$1.log)"
}

# step NAME COMMAND...: counts as one.
step() {
    begin "$@"
    end_step "$1"
}

# end_step NAME: waits for it and counts it as one.
end_step() {
    local code=0 took
    end "$1" || code=$?
    took=$((SECONDS - since[$1]))
    if [ "$code" -eq 0 ]; then
        passed=$((passed + 1))
        say "$1" ok "$took"
    else
        failed=$((failed + 1))
        say "$1" FAILED "$took"
        tail_of "$1"
        return 1
    fi
}

# tests NAME READER COMMAND...: counts each of its tests; READER prints `PASSED FAILED` of its log.
tests() {
    local name=$1 reader=$2
    shift 2
    begin "$name" "$@"
    end_tests "$name" "$reader"
}

# end_tests NAME READER: waits for them and counts each. A command that fails without a failed test (it did
# not compile, it crashed) counts as one failure, and so does one that ran no test at all.
end_tests() {
    local name=$1 code=0 ok bad took
    end "$name" || code=$?
    took=$((SECONDS - since[$name]))
    read -r ok bad < <("$2" "$logs/$name.log")
    if [ "$bad" -eq 0 ] && { [ "$code" -ne 0 ] || [ "$ok" -eq 0 ]; }; then bad=1; fi
    passed=$((passed + ok))
    failed=$((failed + bad))
    if [ "$bad" -eq 0 ]; then
        say "$name" ok "$took" "$ok tests"
    else
        say "$name" FAILED "$took" "$ok passed, $bad failed"
        failures_in "$name"
        return 1
    fi
}

# What failed, and what each of them said: a log is gone with the machine that wrote it.
failures_in() {
    grep -E '^(test .* FAILED|error(\[|:)|FAIL: |ERROR: )' "$logs/$1.log" | sort -u | head -n 40 |
        sed 's/^/    /' || true
    # A backtrace hides them, and a world's story (lifeboat_tests::world) comes behind it.
    grep -v -E '^ +[0-9]+: |^ +at |^stack backtrace:|^note: |^$' "$logs/$1.log" |
        awk '/^(thread .* panicked at |Traceback )/ { left = 10 }
             /^== the / { left = 60 }
             /^test / { left = 0 }
             left-- > 0' |
        cut -c 1-400 | head -n 250 | sed 's/^/    | /' || true
    echo "    (all of it: $logs/$1.log)"
}

# `test result: ok. 12 passed; 0 failed; 0 ignored; ...`, once per binary.
cargo_results() {
    awk '/^test result: / { for (i = 2; i <= NF; i++) {
            if ($i == "passed;") ok += $(i - 1)
            if ($i == "failed;") bad += $(i - 1) } }
         END { print ok + 0, bad + 0 }' "$1"
}

# `Ran 5 tests in 1.2s` and `FAILED (failures=1, errors=1)` or `OK (skipped=1)`. A skipped test is
# no passed test; a class that cannot be set up is an error without a test.
unittest_results() {
    awk '/^Ran [0-9]+ tests? in / { ran += $2 }
         /^(FAILED|OK) \(/ { line = $0; gsub(/[^a-zA-Z=0-9 ]/, "", line); n = split(line, parts, " ")
            for (i = 1; i <= n; i++) { split(parts[i], pair, "=")
                if (pair[1] == "failures" || pair[1] == "errors" || pair[1] == "unexpectedSuccesses") bad += pair[2]
                if (pair[1] == "skipped") skipped += pair[2] } }
         END { ok = ran - bad - skipped; print (ok > 0 ? ok : 0), bad + 0 }' "$1"
}

# Test programs with migrating guests: they run one after the other, beside nothing but clippy, which takes what they leave:
# on a saturated machine QEMU's TCG itself loses writes of guests (docs/decisions/0006).
# Whatever allows userfaultfd on this machine is among them, and no test that wants it refused.
worlds=(disks handover_on_qemu kill_points modes pages_elsewhere real_elsewhere soak storage)
# These compare rates and times, or wait no longer than a guest would, and have the machine to themselves.
alone=(adaptive disk_swap disk_sync kernel_datapath links network outrun paced real_fuse reroute reservation)

# named OPTION NAME...: each name behind the option.
named() {
    local option=$1 name
    shift
    for name in "$@"; do printf '%s %s\n' "$option" "$name"; done
}

# The test programs that are in neither list.
others() {
    cargo metadata --no-deps --format-version 1 |
        /usr/bin/python3 -c '
import json, sys
packages = json.load(sys.stdin)["packages"]
names = {t["name"] for p in packages for t in p["targets"] if t["kind"] == ["test"]}
print(*sorted(names - set(sys.argv[1:])))' "${worlds[@]}" "${alone[@]}"
}

# begin_cargo_tests NAME WHAT...: cargo's word for which.
begin_cargo_tests() {
    local name=$1
    shift
    begin "$name" cargo test --workspace --no-fail-fast "$@" -- "${test_options[@]}"
}

# begin_gated NAME: the test programs in the list of that name. They go through cargo now, and run when there is
# a file $logs/NAME.gate.
begin_gated() {
    local gate=$logs/$1.gate
    local -n programs=$1
    rm -f "$gate"
    # shellcheck disable=SC2046
    begin_cargo_tests "$1" --config "target.'cfg(all())'.runner = ['$PWD/tests/when', '$(realpath "$gate")']" \
        $(named --test "${programs[@]}")
}

# One build serves the tests and the binaries that they start: with all of these targets in one command,
# cargo settles the features of each dependency once. Benchmarks are looked at by clippy alone, which takes
# its time while tests wait: it begins when all of them have been through cargo, whose lock it keeps.
all_checks() {
    local name rest
    step install lab/install || true
    step fmt cargo fmt --all --check || true
    if ! step build cargo build --workspace --lib --bins --tests; then
        echo "    what is left cannot run without it, and counts as one failure"
        failed=$((failed + 1))
        return
    fi
    step image lab/image || true
    tests doc-tests cargo_results cargo test --workspace --doc || true
    if ! rest=$(others) || [ -z "$rest" ]; then
        echo "    which test programs there are cannot be told, and counts as one failure"
        failed=$((failed + 1))
    fi
    # shellcheck disable=SC2046,SC2086
    begin_cargo_tests others --lib --bins $(named --test $rest)
    begin_gated worlds
    begin_gated alone
    for name in others worlds alone; do
        until grep -qs '^ *Running ' "$logs/$name.log" || ! kill -0 "${group[$name]}" 2>/dev/null; do sleep 1; done
    done
    begin clippy nice -n 19 chrt --idle 0 cargo clippy --workspace --all-targets -- -D warnings
    end_tests others cargo_results || true
    for name in worlds alone; do
        : >"$logs/$name.gate"
        end_tests "$name" cargo_results || true
    done
    tests mininet unittest_results \
        /usr/bin/python3 -m unittest discover -v -s tests/mininet -p '*_test.py' || true
    end_step clippy || true
}

# What every page of the documentation says of the code has a target.
documentation() {
    step doc env RUSTDOCFLAGS='-D warnings -A rustdoc::private-intra-doc-links' cargo doc --workspace --no-deps || true
}

# What pages go through, once and as briefly as criterion allows: a benchmark that nobody runs no longer runs. Those
# that have a bound print it, and end with 1 where it is broken.
benchmarks() {
    step bench-stream cargo bench -p lifeboat-agent --bench stream -- --quick || true
    step bench-pages cargo bench -p lifeboat-scatter-gather --bench pages -- --quick || true
    step bench-store cargo bench -p lifeboat-scatter-gather --bench store || true
}

# The demonstration with its own checks, and a first look at every experiment.
all_experiments() {
    local name
    step demo lab/demo || true
    for name in $(lab/experiment list --names); do
        step "$name" lab/experiment "$name" --quick || true
    done
}
