"""The parking lot: where a paused machine's vCPUs stand."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest
from support.parking import HEADERS, SUPPORT, planted

from avmm.vcpu.completion import NEEDS_COMPLETION

LIVES, ROUNDS = "100", "40"
Stress = Callable[[str, str, float], str]
_SOUND_SECONDS, _HANG_SECONDS = 200, 12
"""What is sound ends, on a host as busy as it may be; of what hangs that is what is to be seen."""

pytestmark = pytest.mark.timeout(2 * _SOUND_SECONDS)


@pytest.fixture
def stress(tmp_path: Path) -> Stress:
    """Gives what the stress test says of parking.h, with a piece of it replaced."""

    def run(old: str, new: str, seconds: float) -> str:
        source = planted(old, new) if old else (HEADERS / "parking.h").read_text()
        (tmp_path / "parking.h").write_text(source)
        program = tmp_path / "stress"
        flags = ["-O2", "-std=gnu11", "-pthread", f"-I{tmp_path}", f"-I{HEADERS}", f"-I{SUPPORT}"]
        source_file = SUPPORT / "parking_stress.c"
        subprocess.run(["cc", *flags, "-o", program, source_file], check=True)
        try:
            done = subprocess.run(
                [program, LIVES, ROUNDS],
                capture_output=True,
                text=True,
                check=False,
                timeout=seconds,
            )
        except subprocess.TimeoutExpired:
            return "it hangs"
        return done.stdout

    return run


def test_nothing_is_lost_in_whichever_order_threads_meet(stress: Stress) -> None:
    assert stress("", "", _SOUND_SECONDS) == "ok\n"


KICK: Final = "return s->tid && atomic_load(&s->runs) ? send_kick(s->pid, s->tid) : 0;"
BUGS: Final = {
    "parks without a second KVM_RUN": ("if (!drained) {", "if (0) {"),
    "takes no heed of the flag": ("\n            && !(run->flags & KVM_RUN_NEEDS_COMPLETION)", ""),
    "takes no heed of CompletionMode.ALWAYS": (" && !s->lot->always", ""),
    "takes INTR for this KVM_RUN's": (
        "            run->exit_reason = KVM_EXIT_UNKNOWN;\n",
        "            ;\n",
    ),
    "sleeps though the round is over": (
        "    if (atomic_load(&lot->round) != round || atomic_load(&s->stopping))\n"
        "        return;\n",
        "",
    ),
    "counts for another round": ("while (missing >> 32 == round)", "while (1)"),
    "does not look again before it sleeps": (
        "            if (!all_parked(lot))\n                return 0;\n",
        "            return 0;\n",
    ),
    "does not say that it sleeps": ("            atomic_store(&lot->sleeps, 1);\n", ""),
    "a vCPU that ends is waited for": (
        "    if (!s->gone && (round & 1) && atomic_load(&s->parked) != round)\n"
        "        count_parked(s, round);\n",
        "",
    ),
    "no kick": (KICK, "return 0;"),
    "kicks before it sets immediate_exit": (
        f"    set_immediate_exit(s->run, 1);\n    {KICK}",
        "    int answer = s->tid && atomic_load(&s->runs) ? send_kick(s->pid, s->tid) : 0;\n"
        "    pause_perhaps();\n    set_immediate_exit(s->run, 1);\n    return answer;",
    ),
    "looks whether it runs before it sets immediate_exit": (
        f"    set_immediate_exit(s->run, 1);\n    {KICK}",
        "    int runs = atomic_load(&s->runs);\n    pause_perhaps();\n"
        "    set_immediate_exit(s->run, 1);\n"
        "    return s->tid && runs ? send_kick(s->pid, s->tid) : 0;",
    ),
    "does not say that it runs": ("    atomic_store(&s->runs, 1);\n", ""),
    "clears immediate_exit after its last look": (
        "a second time. */\n            set_immediate_exit(run, 0);\n        }\n",
        "a second time. */\n        }\n        pause_perhaps();\n"
        "        set_immediate_exit(run, 0);\n",
    ),
    "a vCPU that is to end stays parked": (
        "    int answer = s->gone ? 0 : ask(s);\n    let_on(s);\n",
        "    int answer = s->gone ? 0 : ask(s);\n",
    ),
    "immediate_exit before the round": (
        """        atomic_store(&lot->round, round);
    }
    for (int i = 0; i < lot->count; i++)
        if (!lot->spots[i].gone && answer == 0)
            answer = ask(&lot->spots[i]);
""",
        """    }
    for (int i = 0; i < lot->count; i++)
        if (!lot->spots[i].gone && answer == 0)
            answer = ask(&lot->spots[i]);
    pause_perhaps();
    atomic_store(&lot->round, round);
""",
    ),
}


def test_it_goes_by_the_flag_of_the_policy() -> None:
    flag = f"#define KVM_RUN_NEEDS_COMPLETION (1 << {NEEDS_COMPLETION.bit_length() - 1})"
    for source in (HEADERS / "parking.h", SUPPORT / "parking_stress.c"):
        assert flag in source.read_text()


def test_the_planted_bugs_are_of_this_source() -> None:
    for change in BUGS.values():
        planted(*change)


@pytest.mark.slow
@pytest.mark.parametrize("bug", BUGS)
def test_the_stress_test_finds_planted_bugs(stress: Stress, bug: str) -> None:
    assert stress(*BUGS[bug], _HANG_SECONDS) not in ("ok\n", "")
