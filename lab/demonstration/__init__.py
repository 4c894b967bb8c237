"""The demo: evacuates a host of the lab's cloud while everybody watches, and judges the outcome.

    lab/demo --> main.py       options; the story, step by step
                   |
                   +-- standing.py   the cloud: lab/up as a process, commands in it
                   +-- watching.py   guests: ready? client: heartbeats; reservations seen
                   +-- waiting.py    who waited for a processor
                   +-- look.py       runs *inside*: processes, links, tc, OVS of every node
                   |
                   v
               evidence.py     all that was seen, as values
                   |
                   v
               checks.py       pure: evidence -> checks that held or did not (leftovers.py, gaps.py,
                   |           serial.py: one question each)
                   v
               telling.py      tables and the check list; the JSON record

Nothing is believed because Lifeboat says it: processes, switches, guests and the client are asked
themselves. Every check has a sample in tests/mininet/ that it must refuse. Deliberately not here:
repetition and statistics (lab/experiment), crashes (tests/).
"""
