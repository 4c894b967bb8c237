# The steps of tests/run and tests/full, and how they are counted. Sourced by both, in the root of
# the checkout; runs nothing by itself. Deliberately not here: what is tested, which is in the
# rooms, in tests/tests and in tests/mininet.
# shellcheck shell=bash

passed=0
failed=0
child=
# The step that runs beside the others, if any.
aside=
aside_name=
aside_since=0
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

# Ends the step under way with all that it started (a step is a process group of its own), and
# still says what was counted.
interrupted() {
    trap '' INT TERM HUP
    if [ -n "$child" ]; then
        kill "-$1" -- "-$child" 2>/dev/null || true
        wait "$child" 2>/dev/null || true
    fi
    if [ -n "$aside" ]; then
        kill "-$1" -- "-$aside" 2>/dev/null || true
        wait "$aside" 2>/dev/null || true
    fi
    echo "interrupted"
    failed=$((failed + 1))
    echo "$passed passed, $failed failed"
    exit "$2"
}

end_checks() {
    echo "$passed passed, $failed failed"
    [ "$failed" -eq 0 ]
}

# run_logged NAME COMMAND...: its output goes to a file; returns its exit code.
run_logged() {
    local name=$1 code=0
    shift
    setsid "$@" >"$logs/$name.log" 2>&1 </dev/null &
    child=$!
    wait "$child" || code=$?
    child=
    return "$code"
}

# say NAME WORD SECONDS [FIGURES]
say() { printf '%-12s %-6s %4d s  %s\n' "$1" "$2" "$3" "${4:-}"; }

tail_of() {
    sed 's/^/    /' "$logs/$1.log" | tail -n "${2:-25}"
    echo "    (all of it: $logs/$1.log)"
}

# count_step NAME CODE SECONDS
count_step() {
    if [ "$2" -eq 0 ]; then
        passed=$((passed + 1))
        say "$1" ok "$3"
    else
        failed=$((failed + 1))
        say "$1" FAILED "$3"
        tail_of "$1"
        return 1
    fi
}

# step NAME COMMAND...: counts as one.
step() {
    local name=$1 since=$SECONDS code=0
    shift
    run_logged "$name" "$@" || code=$?
    count_step "$name" "$code" $((SECONDS - since))
}

# beside NAME OTHER COMMAND...: a step that runs beside the next ones, with what they leave of the CPUs. It begins
# when `Running` stands in the log of OTHER: until then that one may build, and would wait for cargo's lock.
# `rejoin` counts it.
beside() {
    local name=$1 log=$logs/$2.log
    shift 2
    aside_name=$name aside_since=$SECONDS
    rm -f "$log" "$logs/rejoined"
    # shellcheck disable=SC2016
    setsid bash -c '
        until [ -e "$1" ] || grep -qs "^ *Running " "$2"; do sleep 1; done
        shift 2
        exec nice -n 19 chrt --idle 0 "$@"
    ' beside "$logs/rejoined" "$log" "$@" >"$logs/$name.log" 2>&1 </dev/null &
    aside=$!
}

# Waits for the step that runs beside.
rejoin() {
    local code=0
    : >"$logs/rejoined"
    wait "$aside" || code=$?
    aside=
    count_step "$aside_name" "$code" $((SECONDS - aside_since))
}

# tests NAME READER COMMAND...: counts each of its tests; READER prints `PASSED FAILED` of its log.
# A command that fails without a failed test (it did not compile, it crashed) counts as one failure,
# and so does one that ran no test at all.
tests() {
    local name=$1 reader=$2 since=$SECONDS code=0 ok bad
    shift 2
    run_logged "$name" "$@" || code=$?
    read -r ok bad < <("$reader" "$logs/$name.log")
    if [ "$bad" -eq 0 ] && { [ "$code" -ne 0 ] || [ "$ok" -eq 0 ]; }; then bad=1; fi
    passed=$((passed + ok))
    failed=$((failed + bad))
    if [ "$bad" -eq 0 ]; then
        say "$name" ok $((SECONDS - since)) "$ok tests"
    else
        say "$name" FAILED $((SECONDS - since)) "$ok passed, $bad failed"
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

# One build serves the tests and the binaries that they start: with all of these targets in one command,
# cargo settles the features of each dependency once. Benchmarks are looked at by clippy alone, which
# takes its time while tests wait.
all_checks() {
    step install lab/install || true
    step fmt cargo fmt --all --check || true
    if ! step build cargo build --workspace --lib --bins --tests; then
        echo "    what is left cannot run without it, and counts as one failure"
        failed=$((failed + 1))
        return
    fi
    step image lab/image || true
    beside clippy cargo cargo clippy --workspace --all-targets -- -D warnings
    tests cargo cargo_results cargo test --workspace --no-fail-fast -- "${test_options[@]}" || true
    tests mininet unittest_results \
        /usr/bin/python3 -m unittest discover -v -s tests/mininet -p '*_test.py' || true
    rejoin || true
}

# What every page of the documentation says of the code has a target.
documentation() {
    step doc env RUSTDOCFLAGS='-D warnings -A rustdoc::private-intra-doc-links' cargo doc --workspace --no-deps || true
}

# The demonstration with its own checks, and a first look at every experiment.
all_experiments() {
    local name
    step demo lab/demo || true
    for name in $(lab/experiment list --names); do
        step "$name" lab/experiment "$name" --quick || true
    done
}
