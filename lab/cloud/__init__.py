"""The lab's cloud: raises a checked scenario with Mininet inside private namespaces.

    lab/up --> wrapper.py   outside: lock, sysctl, unshare, signals
                  |
                  v
               inside.py    process 1 of the private namespaces: reaps, starts raising.py
                  |
                  v
               raising.py   the network (network.py, cable.py, ovs.py), then services.py

`model.py` is the scenario as `lifeboat-lab` printed it; `configs.py` writes the configuration
files of the agents and the controller; `state.py` is what lab/exec and lab/down read.
Nothing here parses the scenario's TOML, and nothing decides about migrations.
"""
